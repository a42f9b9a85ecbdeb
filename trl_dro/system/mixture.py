# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
r"""
Answers by the sum that training maximises, \\( p(y \mid x) = \sum_z p(z \mid x) \, p(y \mid x, d_z) \\) (equation 2 of
https://huggingface.co/papers/2505.03075), in place of the answer from one permutation.

The most probable permutations are looked for, an answer is written from each, and equal ones are added up: RAG's "fast
decoding" [1], with permutations for documents.

References:
    [1] Lewis et al., Retrieval-Augmented Generation for Knowledge-Intensive NLP Tasks, 2020, section 2.5,
        https://huggingface.co/papers/2005.11401
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..metrics.text import normalize_answer
from ..model.generation import WrittenAnswer
from ..model.rag_model import RAGModel
from ..model.shared_prefix import ReadPrompts


class MixtureAnswer(NamedTuple):
    r"""
    An answer and what speaks for it.

    Args:
        text (`str`):
            The answer.
        permutation (`list[int]` of length `K`):
            The permutation that gives the most to it: places in `documents`, from 1, zeros behind an early end.
        logp (`float`):
            Log of the sum over the permutations that give it, \\( \log \sum_z p(z \mid x) \, p(y \mid x, d_z) \\), in
            nats.
        written (`list[tuple[list[int], str, float]]`):
            All permutations that were looked at, the most probable first, with the answer from each, and the
            log-probability of both.
    """

    text: str
    permutation: list[int]
    logp: float
    written: list[tuple[list[int], str, float]]


@torch.no_grad()
def answer_questions(
    rag: RAGModel,
    questions: Sequence[dict[str, Any]],
    num_permutations: int,
    max_answer_length: int,
    read: ReadPrompts | None = None,
    watch: Callable[[int, str], bool] | None = None,
) -> list[MixtureAnswer]:
    r"""
    The answer of each question with the greatest sum of \\( p(z \mid x) \, p(y \mid x, d_z) \\) over the most probable
    permutations. Answers that differ only in what exact match leaves out, such as case and articles, are one.

    Args:
        rag ([`~rag_model.RAGModel`]):
            Both roles, in evaluation mode.
        questions (`list[dict]` of length `B`):
            Questions with their documents.
        num_permutations (`int`):
            Permutations of each question, at most. With `1` the answer from the greedy permutation.
        max_answer_length (`int`):
            Tokens to generate at most.
        read ([`~shared_prefix.ReadPrompts`], *optional*):
            What [`~rag_model.RAGModel.read`] gives for these questions, if it was called before.
        watch (`Callable`, *optional*):
            Called after every token with a question's place and one of its answers as far as it is written; where it
            returns `True` that answer ends there.

    Returns:
        `list[MixtureAnswer]` of length `B`

    Raises:
        [`~prompts.PromptTooLongError`]: a question is too long however short its documents are cut.
    """
    sampling: Any = "distinct" if num_permutations > 1 else "independent"
    samples = rag.sample(questions, num_permutations, greedy=True, read=read, sampling=sampling)
    # A question with few documents has fewer permutations, and `-inf` for those that are missing.
    places = (samples.proposal_logps < float("inf")).nonzero().tolist()
    permutations = samples.permutations[samples.proposal_logps < float("inf")]  # [places, K]
    seen = None if watch is None else lambda i, text: watch(places[i][0], text)
    asked = [questions[question] for question, _ in places]
    written = rag.write_answers(asked, permutations, max_answer_length, watch=seen)
    answers: list[list[tuple[list[int], WrittenAnswer, float]]] = [[] for _ in questions]
    for (question, i), permutation, answer in zip(places, permutations.tolist(), written, strict=True):
        answers[question].append((permutation, answer, samples.logps[question, i].item() + answer.logp))
    return [_heaviest(row) for row in answers]


def _heaviest(answers: Sequence[tuple[list[int], WrittenAnswer, float]]) -> MixtureAnswer:
    """The answer with the greatest sum, of permutations, their answers, and the log-probabilities of both."""
    logps: dict[str, list[float]] = {}
    for _, answer, logp in answers:
        logps.setdefault(normalize_answer(answer.text), []).append(logp)
    sums = {text: torch.tensor(parts, dtype=torch.double).logsumexp(dim=0).item() for text, parts in logps.items()}
    best = max(sums, key=lambda text: sums[text])
    permutation, answer, _ = max(
        (each for each in answers if normalize_answer(each[1].text) == best), key=lambda each: each[2]
    )
    return MixtureAnswer(answer.text, permutation, sums[best], [(z, each.text, logp) for z, each, logp in answers])
