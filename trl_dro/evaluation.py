# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""How good the documents and the answer of one question are."""

from collections.abc import Sequence
from typing import Any

from .metrics.text import exact_match, f1, recall_at_k


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
