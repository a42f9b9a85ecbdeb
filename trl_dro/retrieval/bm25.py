# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""BM25 over a corpus held in memory."""

from collections.abc import Sequence

import bm25s

from ..data.schema import Document


class BM25Retriever:
    """Ranks the passages of a corpus by BM25 [1], with `bm25s` [2].

    Title and text of a passage are indexed together. English stop words are removed, words are not stemmed.

    Args:
        corpus (`Sequence[Document]`): passages with `text` and, optionally, `id` and `title`; see
            [`~data.files.read_corpus`].
        k1 (`float`, *optional*, defaults to `1.5`): how slowly a repeated word stops adding to the score.
        b (`float`, *optional*, defaults to `0.75`): how much long passages are discounted, from 0 (not) to 1 (fully).
        show_progress (`bool`, *optional*, defaults to `True`): whether to show progress bars while indexing.

    Raises:
        `ValueError`: the corpus is empty.

    References:
        [1] S. Robertson and H. Zaragoza, The Probabilistic Relevance Framework: BM25 and Beyond, 2009.
        [2] X. H. Lù, BM25S: Orders of magnitude faster lexical search via eager sparse scoring, 2024.

    Example:
    ```python
    retriever = BM25Retriever(read_corpus("corpus.jsonl"))
    [documents] = retriever.search(["who wrote the origin of species"], k=20)
    ```
    """

    def __init__(self, corpus: Sequence[Document], k1: float = 1.5, b: float = 0.75, show_progress: bool = True):
        if len(corpus) == 0:
            raise ValueError("the corpus has no passages to index; check the file it was read from")
        self.corpus = corpus
        self.index = bm25s.BM25(k1=k1, b=b)
        texts = [f"{document.get('title') or ''} {document['text']}" for document in corpus]
        self.index.index(_tokenize(texts, show_progress), show_progress=show_progress)

    def search(self, queries: list[str], k: int) -> list[list[Document]]:
        """Ranks the passages for each query.

        Args:
            queries (`list[str]`): queries. Of one that shares no word with any passage, the ranking means nothing.
            k (`int`): number of passages per query, from 1 to the size of the corpus.

        Returns:
            `list[list[Document]]`: for each query, its `k` best passages, best first.

        Raises:
            `ValueError`: `k` is out of range.
        """
        if not 1 <= k <= len(self.corpus):
            raise ValueError(
                f"k={k} passages per query cannot be retrieved from a corpus of {len(self.corpus)}; "
                f"set k between 1 and {len(self.corpus)}, or give a larger corpus"
            )
        if not queries:
            return []
        positions, _ = self.index.retrieve(
            # "auto" would switch to JAX where it is installed, and with it the order of ties
            _tokenize(queries, show_progress=False),
            k=k,
            show_progress=False,
            backend_selection="numpy",
        )
        return [[self.corpus[position] for position in ranking] for ranking in positions.tolist()]


def _tokenize(texts: list[str], show_progress: bool) -> bm25s.tokenization.Tokenized:
    # \w+ rather than the default \w\w+, which drops "c" of "vitamin c" and "6" of "season 6".
    return bm25s.tokenize(texts, token_pattern=r"\b\w+\b", stopwords="english", show_progress=show_progress)
