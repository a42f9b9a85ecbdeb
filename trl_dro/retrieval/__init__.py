# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Retrieval: any class with `index(corpus, folder)` and `search(queries, k)` gives the candidates of questions."""

from .bm25 import BM25Retriever
from .colbert import ColBERTRetriever
from .dense import DenseRetriever
from .fusion import HybridRetriever, PrecomputedRetriever, reciprocal_rank_fusion
from .interface import Retriever
from .job import retrieve_candidates, retrieve_to_folder
from .services import FrameworkRetriever, QdrantRetriever, SearchEngineRetriever, open_service


__all__ = [
    "BM25Retriever",
    "ColBERTRetriever",
    "DenseRetriever",
    "FrameworkRetriever",
    "HybridRetriever",
    "PrecomputedRetriever",
    "QdrantRetriever",
    "Retriever",
    "SearchEngineRetriever",
    "open_service",
    "reciprocal_rank_fusion",
    "retrieve_candidates",
    "retrieve_to_folder",
]
