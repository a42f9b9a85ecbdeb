# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Rankings that come from rankings: several retrievers fused, and candidates that a dataset has already."""

import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from ..data.corpus import Corpus
from ..data.schema import Document, require_columns
from ..data.storage import content_key
from .interface import Retriever, query_text


def reciprocal_rank_fusion(rankings: Sequence[Sequence[Document]], constant: float = 60.0) -> list[Document]:
    r"""Fuses rankings of the same question by \(\sum_r 1 / (c + \mathrm{rank}_r(d))\) [1].

    Args:
        rankings (`Sequence[Sequence[Document]]`): rankings, best first, of documents, told apart by their
            ids or, without ids, texts.
        constant (`float`, *optional*, defaults to `60.0`): \(c\); the larger, the less the first ranks stand out.

    Returns:
        `list[Document]`: every document once, best first, with the sum as its `score`. Ties go by the first ranking
        that has the document.

    References:
        [1] G. V. Cormack et al., Reciprocal Rank Fusion Outperforms Condorcet and Individual Rank Learning Methods,
        SIGIR 2009.
    """
    scores: dict[str, float] = defaultdict(float)
    documents: dict[str, Document] = {}
    for ranking in rankings:
        for rank, document in enumerate(ranking, start=1):
            identity = document.get("id") or document["text"]
            scores[identity] += 1 / (constant + rank)
            documents.setdefault(identity, document)
    # sorted is stable, also in reverse.
    ids = sorted(scores, key=scores.__getitem__, reverse=True)
    fused: list[Document] = [{**documents[document_id], "score": scores[document_id]} for document_id in ids]
    return fused


class HybridRetriever:
    """Several retrievers over one corpus, fused by [`reciprocal_rank_fusion`].

    Args:
        retrievers (`Sequence[Retriever]`): at least two retrievers.
        depth (`int`, *optional*, defaults to `100`): passages asked of each retriever, if `k` is not larger.
        constant (`float`, *optional*, defaults to `60.0`): constant of the fusion.

    Example:
    ```python
    # needs the model from the Hub
    from trl_dro.data import open_corpus
    from trl_dro.retrieval import BM25Retriever, DenseRetriever, HybridRetriever

    retriever = HybridRetriever([BM25Retriever(), DenseRetriever("BAAI/bge-base-en-v1.5")])
    retriever.index(open_corpus("corpus.jsonl"), "indexes")
    ```
    """

    def __init__(self, retrievers: Sequence[Retriever], depth: int = 100, constant: float = 60.0):
        self.retrievers = list(retrievers)
        self.depth = depth
        self.constant = constant
        self.num_passages = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What the ranking depends on, besides the corpus."""
        parts = [retriever.settings for retriever in self.retrievers]
        return {"name": "hybrid", "parts": parts, "depth": self.depth, "constant": self.constant}

    def index(self, corpus: Corpus, folder: str | os.PathLike) -> None:
        """Indexes a corpus with each retriever; see [`BM25Retriever.index`]. Indexes are shared with theirs alone."""
        for retriever in self.retrievers:
            retriever.index(corpus, folder)
        self.num_passages = len(corpus)

    def search(self, queries: list[str], k: int) -> list[list[Document]]:
        """Ranks the passages for each query; see [`BM25Retriever.search`]."""
        # Retrievers given with their index already say themselves what they cannot do.
        depth = max(k, min(self.depth, self.num_passages or k))
        rankings = [retriever.search(queries, depth) for retriever in self.retrievers]
        return [reciprocal_rank_fusion(of_query, self.constant)[:k] for of_query in zip(*rankings, strict=True)]


class PrecomputedRetriever:
    """Candidates that a dataset has already, as a retriever: those of a Hub dataset, or a benchmark's own paragraphs.

    Args:
        records (`Dataset`): columns `question` and `documents`, the latter in the order of retrieval. A question that
            occurs several times has the candidates of all its rows, fused by [`reciprocal_rank_fusion`].

    Raises:
        `DatasetError`: a column is missing.

    Example:
    ```python
    # needs MuSiQue's file
    from trl_dro.data import load_benchmark
    from trl_dro.retrieval import PrecomputedRetriever

    questions = load_benchmark("musique", "dev", source="musique_ans_v1.0_dev.jsonl")
    retriever = PrecomputedRetriever(questions)
    ```
    """

    def __init__(self, records: Dataset):
        require_columns(records, ("question", "documents"), "records")
        self.records = records
        self.rows: dict[str, list[int]] = defaultdict(list)
        for row, question in enumerate(records["question"]):
            self.rows[query_text(question)].append(row)

    @property
    def settings(self) -> dict[str, Any]:
        """What the ranking depends on: the candidates."""
        batches = self.records.select_columns(["documents"]).iter(1000)
        return {"name": "precomputed", "candidates": content_key([content_key(batch) for batch in batches])}

    def index(self, corpus: Corpus, folder: str | os.PathLike) -> None:
        """Does nothing: the candidates need no index."""

    def search(self, queries: list[str], k: int) -> list[list[Document]]:
        """The first `k` candidates of each question, or all of them where there are fewer.

        Raises:
            `ValueError`: a query is none of the dataset's questions.
        """
        rankings = []
        for query in queries:
            if query not in self.rows:
                raise ValueError(
                    f"{query!r} is no question of the dataset with the candidates; search for one that is"
                )
            found = self.records[self.rows[query]]["documents"]
            rankings.append((found[0] if len(found) == 1 else reciprocal_rank_fusion(found))[:k])
        return rankings
