# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""ColBERT: one vector per token, in a PLAID index."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from ..data.corpus import PASSAGES_PER_BATCH, Corpus
from ..data.schema import Document
from ..data.storage import build_once, content_key
from .interface import checkpoint_key, require_corpus


INDEX_NAME = "plaid"


class ColBERTRetriever:
    """Ranks passages by ColBERTv2 [1], late interaction over a PLAID index [2], with `colbert-ai`, on all GPUs there
    are. The paper's candidates come from it. Needs `pip install trl_dro[colbert]` and a C++ compiler.

    Indexing that was killed goes on at the last of its chunks of up to 25,000 passages. PLAID prunes: where few
    passages come near a query, fewer than `k` may be found.

    Args:
        model (`str`, *optional*, defaults to `"colbert-ir/colbertv2.0"`): id or folder of a ColBERT checkpoint.
        document_length (`int`, *optional*, defaults to `220`): tokens of a passage that are read.
        query_length (`int`, *optional*, defaults to `32`): tokens of a query that are read; shorter ones are filled up
            with mask tokens, ColBERT's query augmentation.
        nbits (`int`, *optional*, defaults to `2`): bits per dimension of a compressed vector: 1, 2 or 4.

    Raises:
        `ImportError`: `colbert-ai`, `faiss` or `ninja` is not installed.
        `DatasetError`: there is no such checkpoint.

    References:
        [1] K. Santhanam et al., ColBERTv2: Effective and Efficient Retrieval via Lightweight Late Interaction, 2022.
        [2] K. Santhanam et al., PLAID: An Efficient Engine for Late Interaction Retrieval, 2022.

    Example:
    ```python
    # needs DPR's file of passages, and ColBERTv2 from the Hub
    from trl_dro.data import open_corpus
    from trl_dro.retrieval import ColBERTRetriever

    retriever = ColBERTRetriever()
    retriever.index(open_corpus("psgs_w100.tsv.gz"), "indexes")
    [documents] = retriever.search(["who wrote the origin of species"], k=20)
    ```
    """

    def __init__(
        self,
        model: str = "colbert-ir/colbertv2.0",
        document_length: int = 220,
        query_length: int = 32,
        nbits: int = 2,
    ):
        prepare_colbert()
        self.model = model
        self.document_length = document_length
        self.query_length = query_length
        self.nbits = nbits
        # A plain BERT would be taken, with a projection drawn anew at every load.
        self.checkpoint_key = checkpoint_key(model, "artifact.metadata")
        self.corpus: Corpus | None = None
        self.searcher: Any = None

    @property
    def settings(self) -> dict[str, Any]:
        """What the ranking depends on, besides the corpus."""
        return {
            "name": "colbert",
            "checkpoint": self.checkpoint_key,
            "document_length": self.document_length,
            "query_length": self.query_length,
            "nbits": self.nbits,
        }

    def index(self, corpus: Corpus, folder: str | os.PathLike) -> None:
        """Indexes a corpus, or opens its index; see [`BM25Retriever.index`]."""
        import torch
        from colbert import Indexer, Searcher
        from colbert.data import Collection
        from colbert.infra import ColBERTConfig, Run, RunConfig

        place = Path(folder).absolute() / f"colbert-{content_key(self.settings, corpus.fingerprint)}"
        collection = Collection(data=_Texts(corpus))
        config = ColBERTConfig(doc_maxlen=self.document_length, query_maxlen=self.query_length, nbits=self.nbits)

        def run_in(root: Path) -> AbstractContextManager:
            # The run's folders take precedence over those of a config.
            num_gpus = torch.cuda.device_count()
            return Run().context(
                RunConfig(root=str(root), index_root=str(root), nranks=max(1, num_gpus), avoid_fork_if_possible=True)
            )

        # colbert-ai prints tens of lines; its progress bars go to the standard error, which stays.
        with redirect_stdout(StringIO()):
            with build_once(place) as partial:
                if partial is not None:
                    # Without its centroids an index cannot be continued: the sample they come from is gone.
                    has_centroids = (partial / INDEX_NAME / "buckets.pt").is_file()
                    with run_in(partial):
                        Indexer(self.model, config, verbose=1).index(
                            INDEX_NAME, collection, overwrite="resume" if has_centroids else "force_silent_overwrite"
                        )
            with run_in(place):
                self.searcher = Searcher(INDEX_NAME, self.model, collection, config, verbose=1)
        self.corpus = corpus

    def search(self, queries: list[str], k: int) -> list[list[Document]]:
        """Ranks the passages for each query; see [`BM25Retriever.search`]."""
        corpus, k = require_corpus(self.corpus, k)
        if not queries:
            return []
        # colbert-ai derives how far it looks from the first k it sees, and keeps it for the next.
        self.searcher.configure(ncells=None, centroid_score_threshold=None, ndocs=None)
        with redirect_stdout(StringIO()):
            vectors = self.searcher.encode(queries)
            found = [self.searcher.dense_search(vectors[row : row + 1], k) for row in range(len(queries))]
        return corpus.rankings([positions for positions, _, _ in found], [scores for _, _, scores in found])


def prepare_colbert() -> None:
    """
    Makes `colbert-ai` 0.2.22 work with transformers 5, and puts the `ninja` that compiles its extensions on the path.

    Its model calls `init_weights` where transformers 5 needs `post_init`, which also records the tied weights that
    loading looks up (stanford-futuredata/ColBERT#412).

    Raises:
        `ImportError`: a package of the extra is missing.
    """
    try:
        import colbert.modeling.base_colbert as base_colbert
        import faiss  # noqa: F401
        import ninja
    except ImportError as error:
        raise ImportError(f"ColBERT needs {error.name}: pip install trl_dro[colbert]") from None

    # An environment that is not activated has no ninja on the path.
    if ninja.BIN_DIR not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ["PATH"]])

    make_class = base_colbert.class_factory
    if make_class.__module__ != __name__:
        base_colbert.class_factory = _with_post_init(make_class)


def _with_post_init(make_class: Any) -> Any:
    def class_factory(name_or_path: str) -> type:
        model_class = make_class(name_or_path)
        initialize = model_class.__init__

        def __init__(self, config, colbert_config):
            initialize(self, config, colbert_config)
            self.post_init()

        model_class.__init__ = __init__
        return model_class

    return class_factory


class _Texts:
    """The texts of a corpus, read from the disk as they are asked for."""

    def __init__(self, corpus: Corpus):
        self.corpus = corpus

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, position: int) -> str:
        return self.corpus.texts(position, position + 1)[0]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self.corpus), PASSAGES_PER_BATCH):
            yield from self.corpus.texts(start, start + PASSAGES_PER_BATCH)
