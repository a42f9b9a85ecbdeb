# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Passages to retrieve from: readers of every form they come in, and a memory-mapped copy with a content key."""

import os
import shutil
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from .chunking import DocumentFolder
from .documents import WHOLE
from .lines import (
    as_identifier,
    dataset_rows,
    first_line,
    read_json_array,
    read_jsonl,
    read_table,
    require_file,
    require_key,
)
from .schema import DatasetError, Document, check_documents
from .storage import DEFAULT_CACHE_DIR, as_path, build_once, content_key, file_key


SCHEMA = pa.schema([("id", pa.string()), ("title", pa.string()), ("text", pa.string())])
SCHEMA_WITH_PAGES = SCHEMA.append(pa.field("page", pa.int32()))
# Files of passages by the end of their names; the first three may be packed, `.gz`.
FORMS = (".jsonl", ".tsv", ".csv", ".json", ".parquet")
PASSAGES_PER_BATCH = 1000
VERSION = 1  # raised when the same source would be read into other passages

# The names that other projects give to our columns: Tevatron, BEIR, DPR.
ID_KEYS = ("id", "docid", "_id", "passage_id")

Places = Iterator[tuple[str, dict[str, Any]]]


class Corpus:
    """
    Passages held in an Arrow table, memory-mapped where they lie in a file: however large, they need no memory.

    Args:
        passages (`Dataset`):
            Columns `id`, `title` and `text`, and `page` where they were cut from documents with pages.
        fingerprint (`str`):
            Key of the content. Indexes are kept under it.

    Example:
    ```python
    # needs DPR's file of passages
    from trl_dro.data import open_corpus

    corpus = open_corpus("psgs_w100.tsv.gz")
    corpus.documents([0, 2])
    ```
    """

    def __init__(self, passages: Dataset, fingerprint: str):
        self.passages = passages
        self.fingerprint = fingerprint

    @classmethod
    def from_documents(cls, documents: Iterable[Document]) -> "Corpus":
        """A corpus of passages in memory, which are taken as they are. Raises a [`DatasetError`] if there are none."""
        passages = list(documents)
        if not passages:
            raise DatasetError("the corpus has no passages; check the file it was read from")
        check_documents(passages, "corpus", num_selected=1)
        rows: list[dict[str, Any]] = [
            {"id": row.get("id"), "title": row.get("title") or "", "text": row["text"]} for row in passages
        ]
        schema = SCHEMA
        if any("page" in row for row in passages):
            schema = SCHEMA_WITH_PAGES
            rows = [{**row, "page": passage.get("page")} for row, passage in zip(rows, passages, strict=True)]
        return cls(Dataset(pa.Table.from_pylist(rows, schema=schema)), content_key(rows))

    def __len__(self) -> int:
        return len(self.passages)

    def documents(self, positions: Sequence[int]) -> list[Document]:
        """The passages at these positions, in this order."""
        columns = self.passages[list(positions)]
        return [cast(Document, dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]

    def rankings(self, positions: Sequence[Sequence[int]], scores: Sequence[Sequence[float]]) -> list[list[Document]]:
        """
        The passages of several rankings, each with its score; a passage is read once for all of them.

        Args:
            positions (`list[list[int]]`): positions of the passages of each ranking, best first.
            scores (`list[list[float]]`): their scores.

        Returns:
            `list[list[Document]]`: in the order of `positions`.
        """
        unique = sorted({position for ranking in positions for position in ranking})
        documents = dict(zip(unique, self.documents(unique), strict=True))
        return [
            [Document(**documents[position], score=score) for position, score in zip(*ranking, strict=True)]
            for ranking in zip(positions, scores, strict=True)
        ]

    def texts(self, start: int, stop: int) -> list[str]:
        """Title and text, joined by a space, of the passages from `start` up to `stop`."""
        columns = self.passages[start:stop]
        return [f"{title} {text}" for title, text in zip(columns["title"], columns["text"], strict=True)]


def read_corpus(path: str | os.PathLike, words_per_passage: int = 100, overlap_words: int = 0) -> list[Document]:
    r"""Reads the passages of a small corpus into memory; [`open_corpus`] is for large ones.

    Args:
        path (`str` or `os.PathLike`): file or folder, as for [`open_corpus`].
        words_per_passage (`int`, *optional*, defaults to `100`): length of a passage of documents.
        overlap_words (`int`, *optional*, defaults to `0`): how much of a passage the next one repeats.

    Returns:
        `list[Document]`: the passages in the order of the file, each with `id`, `title` (possibly empty) and `text`,
        and `page` if they were cut from documents of which some have pages.

    Raises:
        `DatasetError`: see [`open_corpus`].
    """
    source = _Source(path, words_per_passage, overlap_words)
    return list(source.passages(show_progress=False))


def open_corpus(
    path_or_id: str | os.PathLike,
    cache_dir: str | os.PathLike = DEFAULT_CACHE_DIR,
    words_per_passage: int = 100,
    overlap_words: int = 0,
    show_progress: bool = True,
) -> Corpus:
    r"""Opens a corpus of any size. The first time it is read, checked and copied to the cache; memory does not grow
    with its size.

    | form | columns |
    |---|---|
    | `.jsonl`, `.jsonl.gz` | `id`, `text`, `title`; or `id` and `contents`: title, line break, text (FlashRAG) |
    | `.tsv`, `.csv`, either `.gz` | the same, named in the first line: DPR's `psgs_w100.tsv.gz` as it is |
    | `.json` | the same, in an array of objects |
    | `.parquet` | the same |
    | Hub id, optionally `id:config` | the same |
    | folder of `Dataset.save_to_disk` | the same |
    | other folder, or one `.txt`, `.md`, `.html`, `.docx`, `.pdf` | documents, see [`~data.chunking.DocumentFolder`] |

    Args:
        path_or_id (`str` or `os.PathLike`): the corpus. `docid`, `_id` and `passage_id` are read as `id`.
        cache_dir (`str` or `os.PathLike`, *optional*, defaults to `$HF_HOME/trl_dro`): where the copy is kept, under
            a key of the content.
        words_per_passage (`int`, *optional*, defaults to `100`): length of a passage of documents.
        overlap_words (`int`, *optional*, defaults to `0`): how much of a passage the next one repeats.
        show_progress (`bool`, *optional*, defaults to `True`): whether to show a progress bar while reading.

    Returns:
        [`Corpus`]

    Raises:
        `DatasetError`: there is nothing at this place, or it holds no passage, or it is broken: an empty text, an id
            that occurs twice, a missing column, a line that is no UTF-8, a damaged file. The message names the file,
            the line and the cure.
    """
    source = _Source(path_or_id, words_per_passage, overlap_words)
    fingerprint = source.fingerprint()
    folder = Path(cache_dir) / "corpora" / fingerprint
    with build_once(folder) as partial:
        if partial is not None:
            try:
                _write(source.passages(show_progress), partial / "passages.arrow", source.schema)
            except DatasetError:
                # Mended, the corpus gets another fingerprint: nobody would come back for what is written.
                shutil.rmtree(partial)
                raise
    return Corpus(Dataset.from_file(str(folder / "passages.arrow")), fingerprint)


def _write(passages: Iterator[Document], path: Path, schema: pa.Schema) -> None:
    # pyarrow's stream format is the one that datasets maps into memory.
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while batch := list(islice(passages, PASSAGES_PER_BATCH)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))


class _Source:
    """Where passages come from, in which form."""

    def __init__(self, path_or_id: str | os.PathLike, words_per_passage: int, overlap_words: int):
        path = as_path(path_or_id)
        self.name = os.fspath(path_or_id)
        self.dataset: Dataset | None = None
        self.folder: DocumentFolder | None = None
        if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
            self.dataset = _only_split(load_from_disk(self.name), self.name)
        elif path.is_dir() or (path.suffix.lower() in WHOLE and path.is_file()):
            self.folder = DocumentFolder(path, words_per_passage, overlap_words)
        elif not self.name.removesuffix(".gz").endswith(FORMS):
            self.dataset = _load_from_hub(self.name)
        has_pages = self.folder is not None and self.folder.has_pages
        self.schema = SCHEMA_WITH_PAGES if has_pages else SCHEMA

    def fingerprint(self) -> str:
        if self.folder is not None:
            return content_key("corpus", VERSION, self.folder.fingerprint())
        if self.dataset is not None:
            return content_key("corpus", VERSION, [file_key(file["filename"]) for file in self.dataset.cache_files])
        require_file(self.name)
        form = Path(self.name.removesuffix(".gz")).suffix
        return content_key("corpus", VERSION, form, file_key(self.name))

    def passages(self, show_progress: bool) -> Iterator[Document]:
        """The passages one by one, checked; that no id occurs twice is checked after the last."""
        # Hashes take 8 bytes per passage, a set of ids would take 100. Equal hashes are looked into.
        hashes = array("q")
        for where, row in self._rows(show_progress):
            passage = _passage(row, where)
            if self.schema is SCHEMA_WITH_PAGES:
                passage["page"] = row["page"]
            hashes.append(hash(passage["id"]))
            yield passage
        if not hashes:
            raise DatasetError(f"{self.name}: has no passages; check the file and how it was made")
        values, counts = np.unique(np.frombuffer(hashes, dtype=np.int64), return_counts=True)
        if (counts > 1).any():
            self._refuse_repeated_id(set(values[counts > 1].tolist()))

    def _refuse_repeated_id(self, suspects: set[int]) -> None:
        places: dict[str, str] = {}
        for where, row in self._rows(show_progress=False):
            passage_id = _passage(row, where)["id"]
            if passage_id in places:
                raise DatasetError(
                    f"{where}, key id: {passage_id!r} is also the id of {places[passage_id].rpartition(', ')[2]}; "
                    "remove the repeated passage or give it an id of its own"
                )
            if hash(passage_id) in suspects:
                places[str(passage_id)] = where

    def _rows(self, show_progress: bool) -> Places:
        if self.folder is not None:
            return self.folder.passages(show_progress)
        if self.dataset is not None:
            return dataset_rows(self.dataset, self.name)
        form = Path(self.name.removesuffix(".gz")).suffix
        if form == ".parquet":
            return _parquet_rows(self.name)
        read = {".jsonl": read_jsonl, ".json": read_json_array}.get(form, read_table)
        return read(self.name, show_progress)


def _passage(row: dict[str, Any], where: str) -> Document:
    id_key = next((key for key in ID_KEYS if key in row), "id")
    require_key(row, id_key, where)
    passage_id = as_identifier(row[id_key], where)
    if "text" not in row and isinstance(row.get("contents"), str):
        head, _, rest = row["contents"].partition("\n")
        # FlashRAG's Wikipedia puts the title in quotes; without a line break there is no title.
        title, text = (head.strip().strip('"'), rest) if rest.strip() else ("", head)
    else:
        require_key(row, "text", where)
        title, text = "" if row.get("title") is None else row["title"], row["text"]
    if not isinstance(text, str) or not text.strip():
        raise DatasetError(
            f"{where}, key text (id {passage_id!r}): must be a non-empty string; fill it or drop the line"
        )
    if not isinstance(title, str):
        raise DatasetError(f"{where}, key title (id {passage_id!r}): must be a string; convert it or leave it out")
    return Document(id=passage_id, title=title, text=text)


def _parquet_rows(path: str) -> Places:
    require_file(path)
    try:
        file = pa.parquet.ParquetFile(path)
        row = 0
        for batch in file.iter_batches(PASSAGES_PER_BATCH):
            for values in batch.to_pylist():
                yield f"{path}, row {row}", values
                row += 1
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(f"{path}: cannot be read as Parquet ({first_line(error)}); write it again") from error


def _load_from_hub(name: str) -> Dataset:
    dataset_id, _, config = name.partition(":")
    try:
        return _only_split(load_dataset(dataset_id, config or None), name)
    except (OSError, ValueError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(
            f"corpus {name!r} is no folder, file of passages ({', '.join(FORMS)}) or document here, and the Hub did "
            f"not give it ({first_line(error)}); check the path, the name and the network"
        ) from error


def _only_split(loaded: Dataset | DatasetDict, name: str) -> Dataset:
    if isinstance(loaded, Dataset):
        return loaded
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    raise DatasetError(
        f"corpus {name} has the splits {', '.join(loaded)}; write the one with the passages to a file: "
        "dataset['…'].to_parquet('corpus.parquet')"
    )
