# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Retrieval: any class with `search(queries, k)` gives the candidates of a set of questions."""

from collections.abc import Iterator
from typing import Any, Protocol

from datasets import Dataset
from tqdm.auto import tqdm

from ..data.schema import Document, Message, build_dataset, require_columns
from .bm25 import BM25Retriever


__all__ = ["BM25Retriever", "Retriever", "retrieve_candidates"]


class Retriever(Protocol):
    """What a retriever can do. It need not inherit from this class."""

    def search(self, queries: list[str], k: int) -> list[list[Document]]:
        """Returns the `k` best documents of each query, best first."""
        ...


def retrieve_candidates(questions: Dataset, retriever: Retriever, k: int = 20, batch_size: int = 256) -> Dataset:
    """Gives every question its candidate documents, with a progress bar.

    Args:
        questions (`Dataset`): columns `question`, `answers` and, optionally, `id` and `positive_ids`, which are kept;
            see [`~data.files.read_questions`].
        retriever (`Retriever`): object with `search(queries, k)`, e.g. [`BM25Retriever`].
        k (`int`, *optional*, defaults to `20`): number of candidates per question.
        batch_size (`int`, *optional*, defaults to `256`): number of questions per call of the retriever.

    Returns:
        `Dataset`: the questions with a column `documents` of `k` documents in rank order.

    Raises:
        `DatasetError`: there are no questions, or a column is missing.
        `ValueError`: the retriever has fewer than `k` documents.

    Example:
    ```python
    retriever = BM25Retriever(read_corpus("corpus.jsonl"))
    dataset = retrieve_candidates(read_questions("train.jsonl"), retriever, k=20)
    ```
    """

    require_columns(questions, ("question", "answers"), "questions")

    def records() -> Iterator[dict[str, Any]]:
        with tqdm(total=len(questions), desc=f"Retrieving top {k}", unit="question") as progress:
            for start in range(0, len(questions), batch_size):
                rows = questions.select(range(start, min(start + batch_size, len(questions)))).to_list()
                rankings = retriever.search([_query(row["question"]) for row in rows], k)
                for row, documents in zip(rows, rankings, strict=True):
                    yield {**row, "documents": documents}
                progress.update(len(rows))

    return build_dataset(records())


def _query(question: str | list[Message]) -> str:
    """The question itself, or the dialogue so far with one turn per line, as KILT queries for Wizard of Wikipedia."""
    return question if isinstance(question, str) else "\n".join(message["content"] for message in question)
