# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Selected documents, and with what probability each was chosen."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..model.rag_model import RAGModel
from ..model.shared_prefix import ReadPrompts


@dataclass
class SelectedDocument:
    """
    One document of a selection.

    Args:
        id (`str`, *optional*):
            Its id, if it has one.
        title (`str`, *optional*):
            Its title, if it has one.
        text (`str`):
            Its text.
        position (`int`):
            Its place among the candidates, from 1: the id that the selector wrote.
        probability (`float`):
            Probability with which the selector chose it next, given the question, the candidates and the documents
            chosen before it.
        page (`int`, *optional*):
            Page that it begins on, if it was cut from a document with pages.
    """

    id: str | None
    title: str | None
    text: str
    position: int
    probability: float
    page: int | None = None


@torch.no_grad()
def selected_documents(
    rag: RAGModel, questions: list[dict[str, Any]], permutations: Sequence[Sequence[int]], read: ReadPrompts
) -> list[list[SelectedDocument]]:
    """
    Documents of a permutation of each question, with their probabilities.

    Args:
        rag ([`~rag_model.RAGModel`]):
            The models.
        questions (`list[dict]` of length `B`):
            Questions with their documents.
        permutations (`list[list[int]]` of shape `(B, K)`):
            Places in `documents`, from 1; zeros behind one that ended early.
        read ([`~shared_prefix.ReadPrompts`]):
            What [`~rag_model.RAGModel.read`] gives for these questions.

    Returns:
        `list[list[SelectedDocument]]` of length `B`
    """
    places = [[i for i in permutation if i] for permutation in permutations]
    return [
        [
            SelectedDocument(
                question["documents"][i - 1].get("id"),
                question["documents"][i - 1].get("title"),
                question["documents"][i - 1]["text"],
                i,
                probability,
                question["documents"][i - 1].get("page"),
            )
            for i, probability in zip(permutation, chosen, strict=True)
        ]
        for question, permutation, chosen in zip(
            questions, places, choice_probabilities(rag, questions, places, read), strict=True
        )
    ]


@torch.no_grad()
def choice_probabilities(
    rag: RAGModel,
    questions: Sequence[dict[str, Any]],
    permutations: Sequence[Sequence[int]],
    read: ReadPrompts | None = None,
) -> list[list[float]]:
    r"""
    Probability of every choice of a permutation, \\( p(z_t \mid z_{<t}, x) \\). Their product is \\( p(z \mid x) \\),
    unless it ends early: that choice is left out.

    Args:
        rag ([`~rag_model.RAGModel`]):
            The models.
        questions (`list[dict]` of length `B`):
            Questions with their documents.
        permutations (`list[list[int]]` of shape `(B, K)`):
            Places in `documents`, from 1.
        read ([`~shared_prefix.ReadPrompts`], *optional*):
            What [`~rag_model.RAGModel.read`] gives for these questions, if it was called before.

    Returns:
        `list[list[float]]` of shape `(B, K)`
    """
    written = [
        rag.codec.encode(permutation, len(question["documents"]), rag.document_logits(question))
        for question, permutation in zip(questions, permutations, strict=True)
    ]
    completion = rag.written_logits([tokens for tokens, _ in written], rag.read(questions) if read is None else read)
    probabilities = []
    start = 0  # of the row in the logits of all
    for (tokens, branches), permutation in zip(written, permutations, strict=True):
        lengths = [len(rag.codec.id_tokens[i]) + len(rag.codec.separator) for i in permutation]
        # First token after each id, where the next choice begins: it may be to end.
        ends = torch.tensor(lengths, dtype=torch.long).cumsum(0) - len(rag.codec.separator)
        logps = torch.zeros(len(permutation) + 1)
        for branch in branches:
            logits = completion.logits[start + branch.position, branch.allowed].float().cpu()
            logits = logits + torch.tensor(branch.prior)
            choice = int(torch.searchsorted(ends, branch.position, right=True))
            logps[choice] += logits.log_softmax(dim=-1)[branch.chosen]
        probabilities.append(logps[:-1].exp().tolist())
        start += len(tokens)
    return probabilities
