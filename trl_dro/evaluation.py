# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Questions answered by both roles, and how good their documents and answers are."""

from collections.abc import Sequence
from typing import Any

from .metrics.text import exact_match, f1, recall_at_k
from .rag_model import RAGModel


def answer_and_score(
    rag: RAGModel, questions: Sequence[dict[str, Any]], max_answer_length: int
) -> tuple[list[str], list[dict[str, float]]]:
    """
    Selects greedily, answers greedily, and scores both.

    Args:
        rag ([`~rag_model.RAGModel`]):
            Both roles, in evaluation mode.
        questions (`list[dict]` of length `B`):
            Records with their candidates in retrieval order.
        max_answer_length (`int`):
            Tokens to generate at most.

    Returns:
        `tuple[list[str], list[dict[str, float]]]`: answers, and the scores of [`score_prediction`], one per question.
    """
    selected = rag.sample(questions, 1, greedy=True).permutations[:, 0]  # [B, K]
    answers = rag.answer(questions, selected, max_answer_length)
    scores = []
    for question, answer, permutation in zip(questions, answers, selected.tolist(), strict=True):
        documents = question["documents"]
        scores.append(
            score_prediction(answer, [documents[i - 1] for i in permutation], documents, question["answers"])
        )
    return answers, scores


def recall_cutoffs(num_selected: int) -> list[int]:
    """
    Cut-offs of Recall@k that can be reported for `num_selected` documents: 1, 3 and 5 as far as they go, and
    `num_selected` itself below 5.
    """
    return sorted({k for k in (1, 3, 5) if k <= num_selected} | {min(5, num_selected)})


def score_prediction(
    prediction: str, selected: Sequence[dict[str, Any]], candidates: Sequence[dict[str, Any]], answers: Sequence[str]
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

    Returns:
        `dict[str, float]`: `em`, `f1`, `recall@k` of the selector and `retriever_recall@k`, each from 0 to 1.
    """
    scores = {"em": exact_match(prediction, answers), "f1": f1(prediction, answers)}
    for k in recall_cutoffs(len(selected)):
        scores[f"recall@{k}"] = recall_at_k([document["text"] for document in selected], answers, k)
        scores[f"retriever_recall@{k}"] = recall_at_k([document["text"] for document in candidates], answers, k)
    return scores
