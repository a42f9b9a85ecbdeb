# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Documents cut into passages."""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from .documents import SUFFIXES, Block, Reading, read_documents
from .schema import DatasetError
from .sentences import split_sentences
from .storage import content_key, file_key
from .words import count_words, cut_words, join_texts


logger = logging.getLogger(__name__)

VERSION = 4  # raised when the same documents would be cut into other passages


class DocumentFolder:
    """
    Documents of a folder and the folders in it, cut into passages.

    | file | documents | title |
    |---|---|---|
    | `.txt` | one | name of the file |
    | `.md` | one, without its front matter | `title` of the front matter, else its one highest heading |
    | `.html`, `.htm` | one, without navigation; needs the extra `documents` | `<title>`, else the first `<h1>` |
    | `.docx` | one; needs the extra `documents` | paragraph of the style Title, else the title of its properties, \
    else its one highest heading |
    | `.pdf` | one; needs the extra `documents` | of its metadata |
    | `.csv`, `.tsv`, `.json` (an array), `.jsonl` | one for each row, or object | `title` |

    What has no title is named as its file. A passage's title is that of its document and the headings above it,
    `Handbook > Travel > Hotels`. Rows with a `text` are documents, with `id` and `title` if they have them. Rows of
    other columns are written out, `City: Rome; Limit: 120 EUR.`, and so are those of tables within documents.

    A passage ends where a sentence or a row does, with its page, and before a heading; only a sentence longer than a
    passage is cut. DPR, which cut Wikipedia after every 100 words [1], did not look at sentences.

    The id of a passage is the path of its file within the folder, of rows with their `id` or number, and the passage's
    number in the document: `guide/start.md#0`. It does not change when other documents do. Files of other kinds,
    hidden ones (`.a.md`, `~$a.docx`), and documents without a word are passed over; how many is said in a warning.

    Args:
        folder (`str` or `os.PathLike`):
            Folder of documents, or one document.
        words_per_passage (`int`, *optional*, defaults to `100`):
            Most words of a passage, as [`~data.words.count_words`] counts them.
        overlap_words (`int`, *optional*, defaults to `0`):
            Most words of the sentences at the end of a passage with which the next one begins again.

    Raises:
        `DatasetError`: there is no document in the folder, `words_per_passage` is below 1, or `overlap_words` is
            negative or no less.

    References:
        [1] V. Karpukhin et al., Dense Passage Retrieval for Open-Domain Question Answering, EMNLP 2020.
    """

    def __init__(self, folder: str | os.PathLike, words_per_passage: int = 100, overlap_words: int = 0):
        if words_per_passage < 1:
            raise DatasetError(f"words_per_passage={words_per_passage} cuts no passages; set it to 1 or more")
        if not 0 <= overlap_words < words_per_passage:
            raise DatasetError(
                f"overlap_words={overlap_words} must be at least 0 and below words_per_passage={words_per_passage}; "
                "change one of them"
            )
        self.words_per_passage, self.overlap_words = words_per_passage, overlap_words
        path = Path(folder)
        self.folder = path if path.is_dir() else path.parent
        files = sorted(
            path
            for path in (self.folder.rglob("*") if path.is_dir() else [path])
            if path.is_file() and not any(part.startswith((".", "~$")) for part in path.relative_to(self.folder).parts)
        )
        self.files = [path for path in files if path.suffix.lower() in SUFFIXES]
        others = Counter(path.suffix.lower() or path.name for path in files if path.suffix.lower() not in SUFFIXES)
        if not self.files:
            raise DatasetError(
                f"folder {self.folder} has no documents ({', '.join(SUFFIXES)}) and was not written by "
                "Dataset.save_to_disk; check the path"
            )
        if others:
            kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5))
            logger.warning("%s: %d files are of no known kind and left out (%s)", folder, others.total(), kinds)

    @property
    def has_pages(self) -> bool:
        """Whether there are documents with pages, so that passages have a `page`."""
        return any(path.suffix.lower() == ".pdf" for path in self.files)

    def fingerprint(self) -> str:
        """Key of the names and contents of all documents and of how they are cut."""
        files = [(path.relative_to(self.folder).as_posix(), file_key(path)) for path in self.files]
        return content_key(VERSION, self.words_per_passage, self.overlap_words, files)

    def passages(self, show_progress: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
        """
        Yields the place and the `id`, `title` and `text` of each passage, and its `page`, `None` where documents have
        none, if some have.
        """
        empty: list[str] = []
        for path in tqdm(self.files, desc="Reading documents", unit="file", disable=not show_progress):
            name = path.relative_to(self.folder).as_posix()
            for where, own_id, document in read_documents(path):
                number = -1
                cut = cut_document(document, self.words_per_passage, self.overlap_words)
                for number, (title, text, page) in enumerate(cut):
                    passage = {"id": f"{name}{own_id}#{number}", "title": title, "text": text}
                    yield where, passage | ({"page": page} if self.has_pages else {})
                if number < 0:
                    empty.append(where)
        if empty:
            logger.warning("%d documents have no words and are left out, the first: %s", len(empty), empty[0])


def cut_document(
    document: Reading, words_per_passage: int = 100, overlap_words: int = 0
) -> Iterator[tuple[str, str, int | None]]:
    """Yields title, text, and page, if it has pages, of each passage of a document; see [`DocumentFolder`]."""
    for (title, page), blocks in groupby(
        document.blocks, lambda block: (_title(document.title, block.headings), block.page)
    ):
        passage: list[Unit] = []
        for unit in _units(blocks, words_per_passage):
            if passage and _count(passage) + unit.num_words > words_per_passage:
                yield title, _text(passage), page
                passage = _end(passage, min(overlap_words, words_per_passage - unit.num_words))
            passage.append(unit)
        if passage:
            yield title, _text(passage), page


def _title(title: str, headings: Sequence[str]) -> str:
    """Title and headings; the highest is often the title itself, or a part of it: `Travel | Example Inc`."""
    if headings and headings[0].casefold() in title.casefold():
        headings = headings[1:]
    return " > ".join([title, *headings])


class Unit(NamedTuple):
    """What is not cut: a sentence, a row, or as much of a long one as a passage has words."""

    text: str
    num_words: int


def _units(blocks: Iterator[Block], most: int) -> Iterator[Unit]:
    for block in blocks:
        is_row = block.is_row and count_words(block.text) <= most
        for sentence in [block.text] if is_row else split_sentences(block.text):
            for text in cut_words(sentence, most):
                yield Unit(text, count_words(text))


def _end(passage: list[Unit], room: int) -> list[Unit]:
    """The last units of a passage, as many as have no more words than `room`."""
    first = len(passage)
    while first and passage[first - 1].num_words <= room:
        first -= 1
        room -= passage[first].num_words
    return passage[first:]


def _count(passage: list[Unit]) -> int:
    return sum(unit.num_words for unit in passage)


def _text(passage: list[Unit]) -> str:
    return join_texts(unit.text for unit in passage)
