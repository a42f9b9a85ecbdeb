# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Dense retrieval: one vector per passage."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..data.corpus import Corpus
from ..data.schema import Document
from ..data.storage import build_once, content_key
from .interface import checkpoint_key, require_corpus


class DenseRetriever:
    """Ranks passages by the similarity of one vector per query and passage: a `sentence-transformers` model encodes
    them, on a GPU where there is one, and `faiss` [1] searches. Needs `pip install trl_dro[dense]`.

    The model's own prompts for queries and documents are used, and its own similarity: cosine or dot product.
    Vectors are kept in shards named by the text they come from, so that encoding goes on where it was killed, and
    after a change in the corpus only the shards with a change are encoded again.

    Args:
        model (`str`): id or folder of a `sentence-transformers` model.
        factory (`str`, *optional*, defaults to `"Flat"`): index as `faiss.index_factory` names them. `"Flat"` is exact
            and holds all vectors in memory, 1.5 GB per million passages at 384 dimensions; `"IVF4096,PQ64"`, say,
            needs a small part of it.
        batch_size (`int`, *optional*, defaults to `64`): texts per forward of the model.
        shard_size (`int`, *optional*, defaults to `10000`): passages per shard of vectors.
        show_progress (`bool`, *optional*, defaults to `True`): whether to show a progress bar while encoding.

    Raises:
        `ImportError`: `sentence-transformers` or `faiss` is not installed.
        `DatasetError`: there is no such model.

    References:
        [1] J. Johnson et al., Billion-scale similarity search with GPUs, 2017.

    Example:
    ```python
    # needs the model from the Hub
    from trl_dro.data import open_corpus
    from trl_dro.retrieval import DenseRetriever

    retriever = DenseRetriever("sentence-transformers/all-MiniLM-L6-v2")
    retriever.index(open_corpus("corpus.jsonl"), "indexes")
    [documents] = retriever.search(["who wrote the origin of species"], k=20)
    ```
    """

    def __init__(
        self,
        model: str,
        factory: str = "Flat",
        batch_size: int = 64,
        shard_size: int = 10_000,
        show_progress: bool = True,
    ):
        try:
            import faiss
            import sentence_transformers
        except ImportError as error:
            raise ImportError(f"dense retrieval needs {error.name}: pip install trl_dro[dense]") from None
        self.faiss = faiss
        self.factory = factory
        self.batch_size = batch_size
        self.shard_size = shard_size
        self.show_progress = show_progress
        self.checkpoint_key = checkpoint_key(model)
        self.encoder = sentence_transformers.SentenceTransformer(model)
        self.normalize = self.encoder.similarity_fn_name != "dot"
        self.corpus: Corpus | None = None
        self.searcher: Any = None

    @property
    def settings(self) -> dict[str, Any]:
        """What the ranking depends on, besides the corpus."""
        return {"name": "dense", "checkpoint": self.checkpoint_key, "factory": self.factory}

    def index(self, corpus: Corpus, folder: str | os.PathLike) -> None:
        """Indexes a corpus, or opens its index; see [`BM25Retriever.index`]."""
        place = Path(folder) / f"dense-{content_key(self.settings, corpus.fingerprint)}"
        with build_once(place) as partial:
            if partial is not None:
                shards = self._encode(corpus, Path(folder) / f"vectors-{self.checkpoint_key}")
                self.faiss.write_index(self._built(shards), str(partial / "index.faiss"))
        self.corpus = corpus
        self.searcher = self.faiss.read_index(str(place / "index.faiss"))
        if self.faiss.get_num_gpus():
            self.searcher = self.faiss.index_cpu_to_all_gpus(self.searcher)

    def search(self, queries: list[str], k: int) -> list[list[Document]]:
        """Ranks the passages for each query; see [`BM25Retriever.search`]. An approximate index may find fewer."""
        corpus, k = require_corpus(self.corpus, k)
        if not queries:
            return []
        vectors = self.encoder.encode_query(
            queries, batch_size=self.batch_size, normalize_embeddings=self.normalize, show_progress_bar=False
        )
        scores, positions = self.searcher.search(vectors.astype(np.float32), k)
        # faiss fills up what it does not find with -1.
        found = [ranking[ranking >= 0].tolist() for ranking in positions]
        return corpus.rankings(
            found, [row[: len(ranking)].tolist() for row, ranking in zip(scores, found, strict=True)]
        )

    def _encode(self, corpus: Corpus, folder: Path) -> list[Path]:
        """Files with the vectors of the corpus, shard after shard."""
        folder.mkdir(parents=True, exist_ok=True)
        shards: list[Path] = []
        with tqdm(total=len(corpus), desc="Encoding", unit="passage", disable=not self.show_progress) as progress:
            for start in range(0, len(corpus), self.shard_size):
                texts = corpus.texts(start, start + self.shard_size)
                shards.append(folder / f"{content_key(texts)}.npy")
                if not shards[-1].is_file():
                    vectors = self.encoder.encode_document(
                        texts,
                        batch_size=self.batch_size,
                        normalize_embeddings=self.normalize,
                        show_progress_bar=False,
                    )
                    # Named by the process too: another one may be encoding the same text for another corpus.
                    temporary = shards[-1].with_suffix(f".{os.getpid()}.tmp.npy")
                    np.save(temporary, vectors.astype(np.float32))
                    temporary.replace(shards[-1])
                progress.update(len(texts))
        return shards

    def _built(self, shards: list[Path]) -> Any:
        vectors = [np.load(shard, mmap_mode="r") for shard in shards]
        index = self.faiss.index_factory(vectors[0].shape[1], self.factory, self.faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            # An even sample: faiss looks at 256 vectors per centroid at most.
            step = max(1, sum(map(len, vectors)) // 1_000_000)
            index.train(np.concatenate([shard[::step] for shard in vectors]))
        for shard in vectors:
            index.add(np.ascontiguousarray(shard))
        return index
