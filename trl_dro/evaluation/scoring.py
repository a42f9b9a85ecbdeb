# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Questions answered by both roles, and how good their documents and answers are."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..metrics.text import contains, exact_match, f1, has_answer, recall_at_k, recall_of_ids_at_k
from ..model.importance import Sampling, elbo, iwae_bound
from ..model.rag_model import RAGModel
from ..system.citations import cite
from ..system.mixture import MixtureAnswer, answer_questions
from ..system.selection import SelectedDocument


Selection = Literal["selector", "retriever", "oracle"]


def answer_and_score(
    rag: RAGModel, questions: Sequence[dict[str, Any]], max_answer_length: int, answer_permutations: int = 1
) -> tuple[list[str], dict[str, Tensor]]:
    """
    Selects and answers, and scores both.

    Args:
        rag ([`~rag_model.RAGModel`]):
            Both roles, in evaluation mode.
        questions (`list[dict]` of length `B`):
            Records with their candidates in retrieval order.
        max_answer_length (`int`):
            Tokens to generate at most.
        answer_permutations (`int`, *optional*, defaults to `1`):
            See [`~mixture.answer_questions`].

    Returns:
        `tuple[list[str], dict[str, Tensor]]`: answers, and the scores of [`score_prediction`] by name, each `(B,)`;
        and `documents`, the number of those selected, where the selector may end early.
    """
    answers = answer_questions(rag, questions, answer_permutations, max_answer_length)
    scores = []
    codec = rag.codec
    for question, answer in zip(questions, answers, strict=True):
        documents = question["documents"]
        shown = [documents[i - 1] for i in answer.permutation if i]
        row = score_prediction(answer.text, shown, documents, question["answers"], codec.num_selected)
        scores.append(row | ({"documents": float(len(shown))} if codec.may_end else {}))
    texts = [answer.text for answer in answers]
    return texts, {name: torch.tensor([row[name] for row in scores], device=rag.device) for name in scores[0]}


def score_bounds(
    answer_logps: Tensor, proposal_correction: Tensor, sampling: Sampling = "independent"
) -> dict[str, Tensor]:
    """
    Bounds on the log-likelihood of answers, by sampled permutations.

    Args:
        answer_logps (`Tensor` of shape `(B, m)`):
            Log-likelihood of each question's answer under each permutation, in nats.
        proposal_correction (`Tensor` of shape `(B, m)`):
            See [`~importance.iwae_bound`].
        sampling (`str`, *optional*, defaults to `"independent"`):
            How the permutations were drawn.

    Returns:
        `dict[str, Tensor]`: `elbo`, `iwae_bound` and `loss`, which is minus the latter, each of shape `(B,)` in nats;
        NaN for a question with a likelihood that is not finite.
    """
    # Of distinct permutations there can be fewer than samples.
    missing = proposal_correction.isneginf() & (sampling == "distinct")
    usable = ((answer_logps + proposal_correction).isfinite() | missing).all(dim=-1)
    scores = {name: torch.full_like(answer_logps[:, 0], float("nan")) for name in ("elbo", "iwae_bound")}
    scores["elbo"][usable] = elbo(answer_logps[usable], proposal_correction[usable], sampling)
    scores["iwae_bound"][usable] = iwae_bound(answer_logps[usable], proposal_correction[usable])
    return {**scores, "loss": -scores["iwae_bound"]}


def recall_cutoffs(num_selected: int) -> list[int]:
    """
    Cut-offs of Recall@k that can be reported for `num_selected` documents: 1, 3 and 5 as far as they go, and
    `num_selected` itself below 5.
    """
    return sorted({k for k in (1, 3, 5) if k <= num_selected} | {min(5, num_selected)})


def score_prediction(
    prediction: str,
    selected: Sequence[dict[str, Any]],
    candidates: Sequence[dict[str, Any]],
    answers: Sequence[str],
    num_selected: int | None = None,
) -> dict[str, float]:
    """
    Scores of one answered question.

    Args:
        prediction (`str`):
            Generated answer.
        selected (`list[dict]`):
            Documents the selector chose, in its order.
        candidates (`list[dict]`):
            Documents in retrieval order.
        answers (`list[str]`):
            Gold answers.
        num_selected (`int`, *optional*):
            Number of documents that could be chosen, to which Recall@k goes; as many as there are by default.

    Returns:
        `dict[str, float]`: `em`, `f1`, `contains`, `recall@k` of the selector and `retriever_recall@k`, each
        from 0 to 1.
    """
    scores = {"em": exact_match(prediction, answers), "f1": f1(prediction, answers)}
    scores["contains"] = contains(prediction, answers)
    for k in recall_cutoffs(num_selected or len(selected)):
        scores[f"recall@{k}"] = recall_at_k([document["text"] for document in selected], answers, k)
        scores[f"retriever_recall@{k}"] = recall_at_k([document["text"] for document in candidates], answers, k)
    return scores


def select(rag: RAGModel, questions: Sequence[dict[str, Any]], selection: Selection = "selector") -> Tensor:
    """
    Documents chosen greedily by the selector, or without it.

    Args:
        rag ([`~rag_model.RAGModel`]):
            Both roles, in evaluation mode.
        questions (`list[dict]` of length `B`):
            Records with their candidates in retrieval order.
        selection (`str`, *optional*, defaults to `"selector"`):
            `"selector"`; `"retriever"`, the first candidates; or `"oracle"`, the relevant ones first, see
            [`is_relevant`].

    Returns:
        `Tensor` of shape `(B, K)`: places in `documents`, from 1.
    """
    if selection == "selector":
        return rag.sample(questions, 1, greedy=True).permutations[:, 0]
    orders = [list(range(1, len(question["documents"]) + 1)) for question in questions]
    if selection == "oracle":
        for order, question in zip(orders, questions, strict=True):
            relevant = [is_relevant(document, question) for document in question["documents"]]
            order.sort(key=lambda i: not relevant[i - 1])  # noqa: B023 (used at once)
    return torch.tensor([order[: rag.codec.num_selected] for order in orders])


def answer_from(
    rag: RAGModel,
    questions: Sequence[dict[str, Any]],
    selection: Selection,
    max_answer_length: int,
    answer_permutations: int = 1,
) -> list[MixtureAnswer]:
    """
    Answers from the selector's documents, or from those of [`select`], of which there is one permutation only.

    Args:
        rag ([`~rag_model.RAGModel`]):
            Both roles, in evaluation mode.
        questions (`list[dict]` of length `B`):
            Records with their candidates in retrieval order.
        selection (`str`):
            Who selects, see [`select`].
        max_answer_length (`int`):
            Tokens to generate at most.
        answer_permutations (`int`, *optional*, defaults to `1`):
            Permutations of the selector, see [`~mixture.answer_questions`].

    Returns:
        `list[MixtureAnswer]` of length `B`; without a selector `logp` is the answer's alone.
    """
    if selection == "selector":
        return answer_questions(rag, questions, answer_permutations, max_answer_length)
    permutations = select(rag, questions, selection)
    written = rag.write_answers(questions, permutations, max_answer_length)
    return [
        MixtureAnswer(answer.text, permutation, answer.logp, [(permutation, answer.text, answer.logp)])
        for permutation, answer in zip(permutations.tolist(), written, strict=True)
    ]


def is_relevant(document: Mapping[str, Any], question: Mapping[str, Any]) -> bool:
    """Whether a document is among the `positive_ids` of its question or, where there are none, contains an answer."""
    if question.get("positive_ids"):
        return document.get("id") in question["positive_ids"]
    return has_answer(document["text"], question["answers"])


def score_question(
    question: dict[str, Any], permutation: Sequence[int], prediction: str, num_selected: int | None = None
) -> dict[str, Any]:
    """
    All that text alone tells about one answered question.

    Args:
        question (`dict`):
            Record with its candidates in retrieval order.
        permutation (`list[int]`):
            Selected places in `documents`, from 1.
        prediction (`str`):
            Generated answer.
        num_selected (`int`, *optional*):
            See [`score_prediction`].

    Returns:
        `dict[str, Any]`: the scores of [`score_prediction`]; `support_recall@k` where the record has `positive_ids`;
        [`citation_precision`];
        `answer_in_documents`, whether the prediction stands in a selected document; and `outcome`, one of `correct`,
        `not_retrieved` (no candidate contains a gold answer), `not_selected` (no selected document does) and
        `not_answered`.
    """
    candidates = question["documents"]
    selected = [candidates[i - 1] for i in permutation]
    scores: dict[str, Any] = score_prediction(prediction, selected, candidates, question["answers"], num_selected)
    if question.get("positive_ids"):
        for k in recall_cutoffs(num_selected or len(selected)):
            ids = [str(document.get("id")) for document in selected]
            scores[f"support_recall@{k}"] = recall_of_ids_at_k(ids, question["positive_ids"], k)
    scores["citation_precision"] = citation_precision(question, permutation, prediction)
    scores["answer_in_documents"] = float(any(has_answer(document["text"], [prediction]) for document in selected))

    def found(documents: Sequence[dict[str, Any]]) -> bool:
        return any(has_answer(document["text"], question["answers"]) for document in documents)

    if scores["em"] == 1.0:
        scores["outcome"] = "correct"
    elif not found(candidates):
        scores["outcome"] = "not_retrieved"
    else:
        scores["outcome"] = "not_answered" if found(selected) else "not_selected"
    return scores


def citation_precision(question: dict[str, Any], permutation: Sequence[int], prediction: str) -> float | None:
    """
    Share of the passages cited for an answer that are relevant, see [`~citations.cite`] and [`is_relevant`].

    Args:
        question (`dict`):
            Record with its candidates in retrieval order.
        permutation (`list[int]`):
            Selected places in `documents`, from 1.
        prediction (`str`):
            Generated answer.

    Returns:
        `float`, or `None` if nothing is cited.
    """
    candidates = question["documents"]
    selected = [
        SelectedDocument(candidates[place - 1].get("id"), None, candidates[place - 1]["text"], place, 0.0)
        for place in permutation
    ]
    cited = [candidates[each.position - 1] for each in cite(question["question"], prediction, selected)]
    return sum(is_relevant(document, question) for document in cited) / len(cited) if cited else None
