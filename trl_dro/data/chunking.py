# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""A folder of documents cut into passages."""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .lines import first_line, read_jsonl, read_lines, require_key
from .schema import DatasetError
from .storage import content_key, file_key


logger = logging.getLogger(__name__)

SUFFIXES = (".txt", ".md", ".jsonl", ".html", ".htm", ".pdf")


class DocumentFolder:
    """
    Documents of a folder and the folders in it, cut into passages of equal length as DPR cuts Wikipedia [1].

    | file | documents | title |
    |---|---|---|
    | `.txt` | one | name of the file |
    | `.md` | one | first heading, else name of the file |
    | `.html`, `.htm` | one; needs the extra `documents` | `<title>`, else name of the file |
    | `.pdf` | one; needs the extra `documents` | of its metadata, else name of the file |
    | `.jsonl` | one per line, with `text` and optionally `id` and `title` | `title`, else name of the file |

    The id of a passage is the path of its file within the folder, for `.jsonl` the document's id, and the passage's
    number in the document: `guide/start.md#0`. It does not change when other documents do. Files of other kinds,
    hidden ones, and documents without a word are passed over, and how many were is said in a warning.

    Args:
        folder (`str` or `os.PathLike`):
            Folder of documents.
        words_per_passage (`int`, *optional*, defaults to `100`):
            Words of a passage. The last of a document has what is left.

    Raises:
        `DatasetError`: there is no document in the folder, or `words_per_passage` is below 1.

    References:
        [1] V. Karpukhin et al., Dense Passage Retrieval for Open-Domain Question Answering, EMNLP 2020.
    """

    def __init__(self, folder: str | os.PathLike, words_per_passage: int = 100):
        if words_per_passage < 1:
            raise DatasetError(f"words_per_passage={words_per_passage} cuts no passages; set it to 1 or more")
        self.folder = Path(folder)
        self.words_per_passage = words_per_passage
        files = sorted(
            path
            for path in self.folder.rglob("*")
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(self.folder).parts)
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

    def fingerprint(self) -> str:
        """Key of the names and contents of all documents and of the length of a passage."""
        files = [(path.relative_to(self.folder).as_posix(), file_key(path)) for path in self.files]
        return content_key(self.words_per_passage, files)

    def passages(self, show_progress: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields the place and the `id`, `title` and `text` of each passage."""
        empty: list[str] = []
        for path in tqdm(self.files, desc="Reading documents", unit="file", disable=not show_progress):
            for where, document_id, title, text in self._documents(path):
                words = text.split()
                if not words:
                    empty.append(where)
                for number, start in enumerate(range(0, len(words), self.words_per_passage)):
                    passage = " ".join(words[start : start + self.words_per_passage])
                    yield where, {"id": f"{document_id}#{number}", "title": title, "text": passage}
        if empty:
            logger.warning("%d documents have no words and are left out, the first: %s", len(empty), empty[0])

    def _documents(self, path: Path) -> Iterator[tuple[str, str, str, str]]:
        """Yields place, id, title and text of each document of a file."""
        name = path.relative_to(self.folder).as_posix()
        kind = path.suffix.lower()
        if kind == ".jsonl":
            for number, (where, row) in enumerate(read_jsonl(path)):
                require_key(row, "text", where)
                title, text = row.get("title") or path.stem, row["text"]
                if not isinstance(text, str) or not isinstance(title, str):
                    raise DatasetError(f"{where}: title and text must be strings; convert them")
                yield where, f"{name}:{row.get('id', number)}", title, text
            return
        read = {".html": _html, ".htm": _html, ".pdf": _pdf, ".md": _markdown}.get(kind, _plain)
        title, text = read(path)
        yield str(path), name, title.strip() or path.stem, text


def _plain(path: Path) -> tuple[str, str]:
    return "", "".join(text for _, text in read_lines(path))


def _markdown(path: Path) -> tuple[str, str]:
    _, text = _plain(path)
    heading = re.search(r"^#+\s+(.+?)\s*#*$", text, flags=re.MULTILINE)
    return heading[1] if heading else "", text


def _html(path: Path) -> tuple[str, str]:
    try:
        from bs4 import BeautifulSoup
    except ImportError:
        raise ImportError(f"{path}: HTML needs beautifulsoup4: pip install trl_dro[documents]") from None
    # As bytes, because a page declares its own encoding.
    page = BeautifulSoup(path.read_bytes(), "html.parser")
    title = page.title.get_text() if page.title else ""
    for element in page(["script", "style", "template", "title"]):
        element.decompose()
    return title, page.get_text(" ")


def _pdf(path: Path) -> tuple[str, str]:
    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ImportError:
        raise ImportError(f"{path}: PDF needs pypdf: pip install trl_dro[documents]") from None
    try:
        reader = PdfReader(path)
        text = "\n".join(page.extract_text() for page in reader.pages)
    except (PyPdfError, OSError, ValueError) as error:
        raise DatasetError(
            f"{path}: cannot be read as PDF ({first_line(error)}); save it again or remove it"
        ) from None
    return (reader.metadata.title if reader.metadata else None) or "", text
