# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Readers of questions, corpora and records, from files, folders and the Hub."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from .schema import (
    DatasetError,
    Document,
    build_dataset,
    check_answers,
    check_positive_ids,
    check_question,
    check_record,
)


def read_questions(path: str | os.PathLike) -> Dataset:
    """Reads questions and their gold answers from a JSON Lines file.

    Args:
        path (`str` or `os.PathLike`): file with one object per line, with the keys `question` and `answers` (or
            `golden_answers`, as FlashRAG names them), and optionally `id` and `positive_ids`.

    Returns:
        `Dataset`: columns `question`, `answers`, and those of `id`, `positive_ids` that the first line has.

    Raises:
        `DatasetError`: the file is missing or empty, or a line is broken; the message names the line and the cure.
    """

    def questions() -> Iterator[dict[str, Any]]:
        for where, row in _read_jsonl(path):
            if "answers" not in row and "golden_answers" in row:
                row["answers"] = row["golden_answers"]
            _require(row, "question", where)
            _require(row, "answers", where)
            check_question(row["question"], where)
            check_answers(row["answers"], where)
            check_positive_ids(row.get("positive_ids"), where)
            if "id" in row:
                row["id"] = _identifier(row["id"], where)
            yield row

    return build_dataset(questions())


def read_corpus(path: str | os.PathLike) -> list[Document]:
    r"""Reads passages from a JSON Lines file.

    Args:
        path (`str` or `os.PathLike`): file with one object per line, with the keys `id`, `text` and optionally
            `title`; or `id` and `contents`, which is FlashRAG's form: the title, a line break, the text.

    Returns:
        `list[Document]`: the passages in the order of the file, each with `id`, `title` (possibly empty) and `text`.

    Raises:
        `DatasetError`: the file is missing or empty, a line is broken, a text is empty or an id occurs twice; the
            message names the line and the cure.
    """
    documents: list[Document] = []
    lines: dict[str, str] = {}
    for where, row in _read_jsonl(path):
        _require(row, "id", where)
        document_id = _identifier(row["id"], where)
        if document_id in lines:
            raise DatasetError(
                f"{where}, key id: {document_id!r} is also the id of {lines[document_id]}; "
                "remove the repeated passage or give it an id of its own"
            )
        lines[document_id] = where.rpartition(", ")[2]

        if "text" not in row and isinstance(row.get("contents"), str):
            first_line, _, rest = row["contents"].partition("\n")
            # FlashRAG's Wikipedia puts the title in quotes; without a line break there is no title.
            title, text = (first_line.strip().strip('"'), rest) if rest.strip() else ("", first_line)
        else:
            _require(row, "text", where)
            title, text = row.get("title") or "", row["text"]
        if not isinstance(text, str) or not text.strip():
            raise DatasetError(
                f"{where}, key text (id {document_id!r}): must be a non-empty string; fill it or drop the line"
            )
        if not isinstance(title, str):
            raise DatasetError(
                f"{where}, key title (id {document_id!r}): must be a string; convert it or leave it out"
            )
        documents.append(Document(id=document_id, title=title, text=text))
    return documents


def load_records(path_or_id: str | os.PathLike, split: str | None = None) -> Dataset:
    """Loads a dataset of records from a folder, a file or the Hub.

    Args:
        path_or_id (`str` or `os.PathLike`): a folder written by `Dataset.save_to_disk`, a `.jsonl` file with one
            record per line, a `.parquet` file, or the id of a dataset on the Hub.
        split (`str`, *optional*): split to take where there are several; ignored for a file or folder without splits.

    Returns:
        `Dataset`: the records. Those of a `.jsonl` file are checked here, because only here a line can be named;
            [`~data.schema.validate_dataset`] checks the others.

    Raises:
        `DatasetError`: there is nothing to load at this place, or it cannot be read.
    """
    path = Path(path_or_id)
    if path.is_dir():
        try:
            loaded = load_from_disk(path)
        except FileNotFoundError:
            raise DatasetError(
                f"folder {path} was not written by Dataset.save_to_disk; pass one that was, or a .jsonl or .parquet "
                "file"
            ) from None
    elif path.suffix in (".jsonl", ".json"):
        return build_dataset(_checked_records(path))
    elif path.suffix == ".parquet":
        _require_file(path)
        try:
            return Dataset.from_parquet(str(path))
        except Exception as error:  # datasets wraps whatever the Parquet reader raises
            raise DatasetError(
                f"{path}: cannot be read as Parquet ({_first_line(error.__cause__ or error)}); write it again"
            ) from error
    else:
        try:
            loaded = load_dataset(str(path_or_id), split=split)
        except (OSError, ValueError) as error:
            raise DatasetError(
                f"dataset {str(path_or_id)!r} is no folder, .jsonl or .parquet file here, and the Hub did not give it "
                f"({_first_line(error)}); check the name and the network, or give local files with "
                "--questions FILE --corpus FILE"
            ) from error

    if isinstance(loaded, DatasetDict):
        if split is None and len(loaded) == 1:
            return next(iter(loaded.values()))
        if split not in loaded:
            raise DatasetError(f"dataset {path_or_id} has the splits {', '.join(loaded)}; name one, not {split!r}")
        return loaded[split]
    return loaded


def _checked_records(path: Path) -> Iterator[dict[str, Any]]:
    for where, row in _read_jsonl(path):
        for key in ("question", "answers", "documents"):
            _require(row, key, where)
        check_record(row, where)
        if "id" in row:
            row["id"] = _identifier(row["id"], where)
        yield row


def _read_jsonl(path: str | os.PathLike) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the place (`"FILE, line N"`) and the object of each line that is not blank."""
    _require_file(path)
    is_empty = True
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{os.fspath(path)}, line {number}"
            try:
                # Decoded line by line, so that an error has a line number; "-sig" drops the byte order mark.
                text = line.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise DatasetError(
                    f"{where}: is not UTF-8 (byte {error.start} of the line); save the file as UTF-8"
                ) from None
            if not text.strip():
                continue
            is_empty = False
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise DatasetError(
                    f"{where}: is not valid JSON ({error.msg} at character {error.pos}); write one object per line, "
                    "and if this is the last line, the file was cut short: copy it again"
                ) from None
            if not isinstance(row, dict):
                raise DatasetError(f"{where}: is a {type(row).__name__}, not an object; write one object per line")
            yield where, row
    if is_empty:
        raise DatasetError(f"{os.fspath(path)}: is empty; write one JSON object per line")


def _require_file(path: str | os.PathLike) -> None:
    if not os.path.isfile(path):
        raise DatasetError(f"{os.fspath(path)}: there is no such file; check the path")


def _require(row: dict[str, Any], key: str, where: str) -> None:
    if key not in row:
        raise DatasetError(f"{where}: has no key {key}, only {', '.join(map(repr, row))}; add it or rename yours")


def _identifier(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DatasetError(f"{where}, key id: must be a string or a whole number, not {value!r}; write one")
    return str(value)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
