# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Readers of questions and records, from files, folders and the Hub."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from .lines import as_identifier, first_line, read_jsonl, require_file, require_key
from .schema import (
    DatasetError,
    build_dataset,
    check_answers,
    check_documents,
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
        for where, row in read_jsonl(path):
            if "answers" not in row and "golden_answers" in row:
                row["answers"] = row["golden_answers"]
            require_key(row, "question", where)
            require_key(row, "answers", where)
            check_question(row["question"], where)
            check_answers(row["answers"], where)
            check_positive_ids(row.get("positive_ids"), where)
            if "id" in row:
                row["id"] = as_identifier(row["id"], where)
            yield row

    return build_dataset(questions())


def read_open_questions(path: str | os.PathLike) -> Dataset:
    """Reads questions to be answered, whose answers nobody knows, from a JSON Lines file.

    Args:
        path (`str` or `os.PathLike`): file with one object per line, with the key `question`, and optionally `id` and
            `documents`, the candidates in retrieval order.

    Returns:
        `Dataset`: columns `question`, and those of `id`, `documents` that the first line has.

    Raises:
        `DatasetError`: the file is missing or empty, or a line is broken; the message names the line and the cure.
    """

    def questions() -> Iterator[dict[str, Any]]:
        columns: set[str] = set()
        for where, row in read_jsonl(path):
            require_key(row, "question", where)
            check_question(row["question"], where)
            columns = columns or {"question", *({"id", "documents"} & row.keys())}
            if "documents" in columns:
                require_key(row, "documents", where)
                check_documents(row["documents"], where, num_selected=1)
            if "id" in columns:
                row["id"] = as_identifier(row["id"], where) if "id" in row else None
            yield {column: row[column] for column in columns}

    return build_dataset(questions())


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
        except Exception as error:  # whatever a damaged file raises in datasets or Arrow
            raise DatasetError(
                f"folder {path} cannot be read as a dataset ({first_line(error)}); write or copy it again"
            ) from error
    elif path.suffix in (".jsonl", ".json"):
        return build_dataset(_checked_records(path))
    elif path.suffix == ".parquet":
        require_file(path)
        try:
            return Dataset.from_parquet(str(path))
        except Exception as error:  # datasets wraps whatever the Parquet reader raises
            raise DatasetError(
                f"{path}: cannot be read as Parquet ({first_line(error.__cause__ or error)}); write it again"
            ) from error
    else:
        try:
            loaded = load_dataset(str(path_or_id), split=split)
        except (OSError, ValueError) as error:
            raise DatasetError(
                f"dataset {str(path_or_id)!r} is no folder, .jsonl or .parquet file here, and the Hub did not give it "
                f"({first_line(error)}); check the name and the network, or give local files with "
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
    for where, row in read_jsonl(path):
        for key in ("question", "answers", "documents"):
            require_key(row, key, where)
        check_record(row, where)
        if "id" in row:
            row["id"] = as_identifier(row["id"], where)
        yield row
