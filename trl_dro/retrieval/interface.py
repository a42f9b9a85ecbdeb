# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""What every retriever does, and what all of them share."""

import logging
import os
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import hf_hub_download

from ..data.corpus import Corpus
from ..data.lines import first_line
from ..data.schema import DatasetError, Document, Message
from ..data.storage import content_key, file_key


logger = logging.getLogger(__name__)


class Retriever(Protocol):
    """What a retriever can do. It need not inherit from this class."""

    @property
    def settings(self) -> dict[str, Any]:
        """What a ranking depends on besides the corpus, in values that JSON can hold."""
        ...

    def index(self, corpus: Corpus, folder: str | os.PathLike) -> None:
        """Indexes a corpus in a subfolder of `folder`, or opens its index where there is one already."""
        ...

    def search(self, queries: list[str], k: int) -> list[list[Document]]:
        """Returns the `k` best documents of each query, best first."""
        ...


def require_corpus(corpus: Corpus | None, k: int) -> tuple[Corpus, int]:
    """
    The corpus that was indexed, and how many passages of each query can be retrieved from it: all there are, which a
    warning says, where it has fewer than `k`.

    Raises:
        `DatasetError`: `k` is below 1.
        `ValueError`: nothing is indexed yet.
    """
    if corpus is None:
        raise ValueError("nothing is indexed yet; call index(corpus, folder) before search")
    return corpus, num_candidates(corpus, k)


def num_candidates(corpus: Corpus, k: int) -> int:
    """`k`, or the size of a corpus that is smaller; then a warning says so. See [`require_corpus`]."""
    if k < 1:
        raise DatasetError(f"k={k} passages per query cannot be retrieved; set k to 1 or more")
    if k > len(corpus):
        _tell_of_small_corpus(corpus.fingerprint, len(corpus), k)
    return min(k, len(corpus))


@cache  # once, however many queries there are
def _tell_of_small_corpus(fingerprint: str, num_passages: int, k: int) -> None:
    logger.warning(
        "the corpus has %d passages, fewer than the %d asked for: every question gets all of them", num_passages, k
    )


def query_text(question: str | list[Message]) -> str:
    """The question itself, or the dialogue so far with one turn per line, as KILT queries for Wizard of Wikipedia."""
    return question if isinstance(question, str) else "\n".join(message["content"] for message in question)


def checkpoint_key(name_or_path: str, file: str = "config.json") -> str:
    """
    Key of a checkpoint: the content of its files where it is a folder, the commit where it is on the Hub, so that an
    index made with other weights is never reused. `file` is one that checkpoints of this kind have.

    Raises:
        `DatasetError`: there is no such checkpoint.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        if not (folder / file).is_file():
            raise DatasetError(
                f"folder {folder} is no such retrieval model, as it has no {file}; give one that was saved whole"
            )
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return content_key([(path.relative_to(folder).as_posix(), file_key(path)) for path in files])
    try:
        downloaded = hf_hub_download(name_or_path, file)
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"retrieval model {name_or_path!r} is no folder here, and the Hub did not give it "
            f"({first_line(error)}); check the name and the network, or give the path of a downloaded folder"
        ) from error
    return Path(downloaded).parent.name  # snapshots/COMMIT/file
