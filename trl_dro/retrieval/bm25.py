# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""BM25, in memory or memory-mapped."""

import json
import os
import shutil
import unicodedata
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import bm25s
import numpy as np
import regex
from tqdm.auto import tqdm

from ..data.corpus import Corpus
from ..data.schema import Document
from ..data.storage import build_once, content_key
from ..data.words import shingles
from .interface import require_corpus


PASSAGES_PER_CHUNK = 5000
VERSION = 2  # raised when the same corpus would get other scores
# Also of one letter: bm25s drops "c" of "vitamin c". With marks, such as Hindi's vowels, at which `re` would cut.
_WORD = regex.compile(r"\w+")


class BM25Retriever:
    r"""Ranks the passages of a corpus by BM25 [1], with `bm25s` [2].

    Title and text of a passage are indexed together. English stop words are removed, words are not stemmed. Of scripts
    that put no spaces between words, Chinese, Japanese and Thai among them, every two neighbouring characters are a
    word, as in Lucene's analyzer for them; letters of full and half width are the same (Unicode form NFKC).

    The index is built in shards, one after the other, each with the document frequencies and the mean length of the
    whole corpus, so that the ranking is that of one index while memory is bounded by a shard. Searching maps the
    shards into memory.

    Args:
        corpus (`Sequence[Document]`, *optional*): small corpus to index at once, with `text` and, optionally, `id`
            and `title`. For a large one call [`~BM25Retriever.index`].
        k1 (`float`, *optional*, defaults to `1.5`): how slowly a repeated word stops adding to the score.
        b (`float`, *optional*, defaults to `0.75`): how much long passages are discounted, from 0 (not) to 1 (fully).
        shard_size (`int`, *optional*, defaults to `250000`): passages per shard of the index.
        show_progress (`bool`, *optional*, defaults to `True`): whether to show progress bars while indexing.

    Raises:
        `ValueError`: the corpus is empty.

    References:
        [1] S. Robertson and H. Zaragoza, The Probabilistic Relevance Framework: BM25 and Beyond, 2009.
        [2] X. H. Lù, BM25S: Orders of magnitude faster lexical search via eager sparse scoring, 2024.

    Example:
    ```python
    # needs DPR's file of passages
    from trl_dro.data import open_corpus
    from trl_dro.retrieval import BM25Retriever

    retriever = BM25Retriever()
    retriever.index(open_corpus("psgs_w100.tsv.gz"), "indexes")
    [documents] = retriever.search(["who wrote the origin of species"], k=20)
    ```
    """

    def __init__(
        self,
        corpus: Sequence[Document] | None = None,
        k1: float = 1.5,
        b: float = 0.75,
        shard_size: int = 250_000,
        show_progress: bool = True,
    ):
        self.k1 = k1
        self.b = b
        self.shard_size = shard_size
        self.show_progress = show_progress
        self.corpus: Corpus | None = None
        self.shards: list[bm25s.BM25] = []
        if corpus is not None:
            with TemporaryDirectory() as folder:
                self.index(Corpus.from_documents(corpus), folder)
                for shard in self.shards:
                    # The files are about to go.
                    shard.scores = {name: _in_memory(value) for name, value in shard.scores.items()}

    @property
    def settings(self) -> dict[str, Any]:
        """What the ranking depends on, besides the corpus."""
        return {"name": "bm25", "version": VERSION, "k1": self.k1, "b": self.b}

    def index(self, corpus: Corpus, folder: str | os.PathLike) -> None:
        """Indexes a corpus, or opens its index where there is one with the same content and settings.

        Args:
            corpus ([`~data.corpus.Corpus`]): passages.
            folder (`str` or `os.PathLike`): folder of indexes; this one gets a subfolder of its own. Indexing that
                was killed goes on at the shard where it stopped.
        """
        place = Path(folder) / f"bm25-{content_key(self.settings, corpus.fingerprint)}"
        with build_once(place) as partial:
            if partial is not None:
                self._build(corpus, partial)
        self.corpus = corpus
        vocabulary = json.loads((place / "vocabulary.json").read_text(encoding="utf-8"))
        self.shards = []
        for shard_folder in sorted(place.glob("shard-*")):
            shard = bm25s.BM25.load(shard_folder, mmap=True, load_vocab=False)
            shard.vocab_dict = vocabulary
            self.shards.append(shard)

    def search(self, queries: list[str], k: int) -> list[list[Document]]:
        """Ranks the passages for each query.

        Args:
            queries (`list[str]`): queries. Of one that shares no word with any passage, the ranking means nothing.
            k (`int`): number of passages per query. Of a smaller corpus all are returned.

        Returns:
            `list[list[Document]]`: for each query, its `k` best passages, best first, with their `score`.

        Raises:
            `DatasetError`: `k` is below 1.
            `ValueError`: nothing is indexed yet.
        """
        corpus, k = require_corpus(self.corpus, k)
        if not queries:
            return []
        starts = np.cumsum([0] + [shard.scores["num_docs"] for shard in self.shards])[:-1]
        positions, scores = [], []
        for words in bm25s.tokenization.convert_tokenized_to_string_list(_tokenize(queries)):
            found = [_best(shard.get_scores(words or [""]), k) for shard in self.shards]
            of_shards = np.concatenate([start + best for start, (best, _) in zip(starts, found, strict=True)])
            scores_of_shards = np.concatenate([values for _, values in found])
            order = np.lexsort((of_shards, -scores_of_shards))[:k]
            positions.append(of_shards[order].tolist())
            scores.append(scores_of_shards[order].tolist())
        return corpus.rankings(positions, scores)

    def _build(self, corpus: Corpus, folder: Path) -> None:
        """Counts the words of each shard, then turns the counts into scores, which need the whole corpus."""
        starts = range(0, len(corpus), self.shard_size)
        # The size is in the name, so that another size does not take these for its own.
        paths = [folder / f"counts-{self.shard_size}-{number:05d}.npz" for number in range(len(starts))]
        vocabulary = {"": 0}  # bm25s cannot search an index without words
        with tqdm(total=len(corpus), desc="Indexing", unit="passage", disable=not self.show_progress) as progress:
            for path, start in zip(paths, starts, strict=True):
                stop = min(start + self.shard_size, len(corpus))
                if path.is_file():
                    with np.load(path) as counts:
                        for word in str(counts["new_words"]).split():
                            vocabulary[word] = len(vocabulary)
                    progress.update(stop - start)
                else:
                    temporary = path.with_suffix(".tmp.npz")
                    np.savez(temporary, allow_pickle=False, **_count_words(corpus, start, stop, vocabulary, progress))
                    temporary.rename(path)

        frequencies = np.zeros(len(vocabulary), dtype=np.int64)
        num_words = 0
        for path in paths:
            with np.load(path) as counts:
                frequencies[: len(counts["frequencies"])] += counts["frequencies"]
                num_words += int(counts["lengths"].sum())
        # Lucene's inverse document frequency, which is bm25s's default.
        idf = np.log(1 + (len(corpus) - frequencies + 0.5) / (frequencies + 0.5))

        for leftover in folder.glob("shard-*"):  # of a build that was killed, maybe with another size
            shutil.rmtree(leftover)
        for number, path in enumerate(paths):
            with np.load(path) as counts:
                self._scored(counts, idf, num_words / len(corpus)).save(folder / f"shard-{number:05d}")
        (folder / "vocabulary.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        for path in folder.glob("counts-*"):
            path.unlink()

    def _scored(self, counts: Any, idf: np.ndarray, mean_length: float) -> bm25s.BM25:
        """One shard as an index of `bm25s`, which would take document frequencies and length from the shard alone."""
        lengths, passages, times = counts["lengths"], counts["passages"], counts["times"].astype(np.float32)
        frequencies = np.zeros(len(idf), dtype=np.int64)
        frequencies[: len(counts["frequencies"])] = counts["frequencies"]
        # Of a corpus of stop words, no words are left.
        discounts = (self.k1 * (1 - self.b + self.b * lengths / max(mean_length, 1e-9))).astype(np.float32)
        shard = bm25s.BM25(k1=self.k1, b=self.b)
        shard.vocab_dict = {}
        shard.nonoccurrence_array = None
        shard.scores = {
            "data": np.repeat(idf.astype(np.float32), frequencies) * times / (times + discounts[passages]),
            "indices": passages,
            "indptr": np.concatenate([[0], np.cumsum(frequencies)]),
            "num_docs": len(lengths),
        }
        return shard


def _count_words(
    corpus: Corpus, start: int, stop: int, vocabulary: dict[str, int], progress: tqdm
) -> dict[str, np.ndarray]:
    """
    How often which word stands in which passage of a shard, sorted by word and passage. Words that are new are added
    to the vocabulary.
    """
    num_known = len(vocabulary)
    words, lengths = [], []
    for first in range(start, stop, PASSAGES_PER_CHUNK):
        last = min(first + PASSAGES_PER_CHUNK, stop)
        chunk = _tokenize(corpus.texts(first, last))
        # bm25s numbers the words of each call anew.
        numbers = np.array([vocabulary.setdefault(word, len(vocabulary)) for word in chunk.vocab], dtype=np.int32)
        chunk_lengths = np.array([len(ids) for ids in chunk.ids], dtype=np.int32)
        flat = np.fromiter(chain.from_iterable(chunk.ids), dtype=np.int32, count=int(chunk_lengths.sum()))
        words.append(numbers[flat] if len(numbers) else flat)
        lengths.append(chunk_lengths)
        progress.update(last - first)
    all_lengths = np.concatenate(lengths)
    passages = np.repeat(np.arange(stop - start), all_lengths)
    pairs, times = np.unique(np.concatenate(words) * np.int64(stop - start) + passages, return_counts=True)
    return {
        "passages": (pairs % (stop - start)).astype(np.int32),
        "times": times.astype(np.int32),
        "frequencies": np.bincount(pairs // (stop - start), minlength=len(vocabulary)),
        "lengths": all_lengths,
        "new_words": np.array(" ".join(list(vocabulary)[num_known:])),
    }


def _best(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Positions and scores of the `k` best passages, in no order; of equal ones the first are taken, so that a ranking
    does not depend on the size of a shard. Most scores are 0, and a partition of many equal values is slow.
    """
    candidates = np.flatnonzero(scores > 0)
    if len(candidates) >= k:
        threshold = np.partition(scores[candidates], -k)[-k]
        candidates = candidates[scores[candidates] >= threshold]
        candidates = candidates[np.lexsort((candidates, -scores[candidates]))[:k]]
    else:
        candidates = np.union1d(candidates, np.arange(min(k + len(candidates), len(scores))))
    return candidates, scores[candidates]


def _tokenize(texts: list[str]) -> bm25s.tokenization.Tokenized:
    tokenizer = bm25s.tokenization.Tokenizer(splitter=_words, stopwords="english")
    return tokenizer.tokenize(texts, update_vocab=True, return_as="tuple", allow_empty=False, show_progress=False)


def _words(text: str) -> list[str]:
    words = _WORD.findall(unicodedata.normalize("NFKC", text))
    return words if text.isascii() else shingles(" ".join(words))


def _in_memory(value: Any) -> Any:
    return np.array(value) if isinstance(value, np.memmap) else value
