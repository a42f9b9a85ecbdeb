# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Whether an answer is owed to its documents: how much likelier they make it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..model.rag_model import RAGModel


class AnswerLogps(NamedTuple):
    r"""
    Log-likelihoods of an answer, in nats.

    Args:
        with_documents (`float`):
            \\( \log p(y \mid x, d_z) \\).
        without (`float`):
            \\( \log p(y \mid x) \\), the generator shown no document.
    """

    with_documents: float
    without: float

    @property
    def gain(self) -> float:
        """How much likelier the documents make the answer, in nats; 0 of none."""
        return self.with_documents - self.without


@torch.no_grad()
def answer_logps(
    rag: RAGModel, questions: Sequence[dict[str, Any]], answers: Sequence[str], permutations: Tensor
) -> list[AnswerLogps]:
    """
    Likelihoods of answers with their documents and without any.

    Args:
        rag ([`~rag_model.RAGModel`]):
            The models, of which the generator is asked.
        questions (`list[dict]` of length `B`):
            Questions with their documents.
        answers (`list[str]` of length `B`):
            An answer to each.
        permutations (`Tensor` of shape `(B, K)`):
            Places in `documents`, from 1; zeros behind one that ended early.

    Returns:
        `list[AnswerLogps]` of length `B`
    """
    targets = [[answer] for answer in answers]
    none = torch.empty(len(questions), 1, 0, dtype=torch.long)
    shown = rag.answer_logps(questions, targets, permutations.unsqueeze(1))[:, 0].tolist()
    alone = rag.answer_logps(questions, targets, none)[:, 0].tolist()
    return [AnswerLogps(*each) for each in zip(shown, alone, strict=True)]
