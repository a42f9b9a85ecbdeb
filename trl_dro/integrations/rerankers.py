# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""The selector as a ranker of `rerankers`."""

from typing import Any

from ..system.pipeline import RAGPipeline


try:
    from rerankers.documents import Document
    from rerankers.models.ranker import BaseRanker
    from rerankers.results import RankedResults, Result
    from rerankers.utils import prep_docs
except ImportError:
    raise ImportError("the ranker needs rerankers: pip install 'trl_dro[rerankers]'") from None


class DRORanker(BaseRanker):
    """
    Ranks the documents that the selector picks first, in its order; the others follow in the order in which they came.

    Args:
        pipeline ([`~pipeline.RAGPipeline`]):
            System with the selector.
        title_key (`str`, *optional*, defaults to `"title"`):
            Metadata that holds a document's title, if it has one.

    Example:

    ```python
    from trl_dro import RAGPipeline
    from trl_dro.integrations.rerankers import DRORanker

    ranker = DRORanker(RAGPipeline.from_pretrained("llama3-dro"))
    ranker.rank("who wrote the origin of species", docs=["…", "…"]).top_k(5)
    ```
    """

    def __init__(self, pipeline: RAGPipeline, title_key: str = "title"):
        self.pipeline = pipeline
        self.title_key = title_key

    def score(self, query: str, doc: str) -> float:
        """Raises `ValueError`: a listwise selector compares documents with each other."""
        raise ValueError("a listwise selector has no score for a single document: use rank")

    def rank(
        self,
        query: str,
        docs: str | list[str] | Document | list[Document],
        doc_ids: list[str] | list[int] | None = None,
        metadata: list[dict[str, Any]] | None = None,
    ) -> RankedResults:
        """
        Documents in the selector's order. A selected one has the probability of its choice, given those before it, as
        `score`, which need not fall with the rank; so `top_k` goes by rank.
        """
        if not docs:
            return RankedResults(results=[], query=query, has_scores=False)
        documents = prep_docs(docs, doc_ids, metadata)
        candidates: list[Any] = [{"title": d.metadata.get(self.title_key), "text": d.text} for d in documents]
        [selection] = self.pipeline.select([query], [candidates])
        scores = {chosen.position - 1: chosen.probability for chosen in selection}
        order = [*scores, *(i for i in range(len(documents)) if i not in scores)]
        results = [Result(documents[i], score=scores.get(i), rank=rank) for rank, i in enumerate(order, start=1)]
        return RankedResults(results=results, query=query, has_scores=False)
