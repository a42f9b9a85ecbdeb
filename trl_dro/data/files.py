# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Readers of questions and records, from files, folders and the Hub."""

import os
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from .lines import as_identifier, first_line, read_numbered, require_file, require_key
from .schema import (
    BadRow,
    DatasetError,
    build_dataset,
    check_answers,
    check_documents,
    check_positive_ids,
    check_question,
    check_record,
    collecting,
)
from .storage import as_path


def read_questions(path: str | os.PathLike, bad_rows: list[BadRow] | None = None) -> Dataset:
    """Reads questions and their gold answers from a JSON Lines file.

    Args:
        path (`str` or `os.PathLike`): file with one object per line, with the keys `question` and `answers` (or
            `golden_answers`, as FlashRAG names them), and optionally `id` and `positive_ids`.
        bad_rows (`list[BadRow]`, *optional*): list to which broken rows are added, which are then left out.

    Returns:
        `Dataset`: columns `question`, `answers`, and those of `id`, `positive_ids` that the first line has.

    Raises:
        `DatasetError`: the file is missing or empty, or a line is broken and `bad_rows` is `None`, or all are; the
            message names the line and the cure.
    """

    def check(row: dict[str, Any], where: str) -> dict[str, Any]:
        if "answers" not in row and "golden_answers" in row:
            row["answers"] = row["golden_answers"]
        require_key(row, "question", where)
        require_key(row, "answers", where)
        check_question(row["question"], where)
        check_answers(row["answers"], where)
        check_positive_ids(row.get("positive_ids"), where)
        if "id" in row:
            row["id"] = as_identifier(row["id"], where)
        return row

    return _build(path, check, bad_rows)


def read_open_questions(path: str | os.PathLike, bad_rows: list[BadRow] | None = None) -> Dataset:
    """Reads questions to be answered, whose answers nobody knows, from a JSON Lines file.

    Args:
        path (`str` or `os.PathLike`): file with one object per line, with the key `question`, and optionally `id` and
            `documents`, the candidates in retrieval order.
        bad_rows (`list[BadRow]`, *optional*): list to which broken rows are added, which are then left out.

    Returns:
        `Dataset`: columns `question`, and those of `id`, `documents` that the first line has.

    Raises:
        `DatasetError`: the file is missing or empty, or a line is broken and `bad_rows` is `None`, or all are; the
            message names the line and the cure.
    """
    columns: set[str] = set()

    def check(row: dict[str, Any], where: str) -> dict[str, Any]:
        require_key(row, "question", where)
        check_question(row["question"], where)
        asked = columns or {"question", *({"id", "documents"} & row.keys())}
        if "documents" in asked:
            require_key(row, "documents", where)
            check_documents(row["documents"], where, num_selected=1)
        if "id" in asked:
            row["id"] = as_identifier(row["id"], where) if "id" in row else None
        columns.update(asked)  # of the first row that is sound
        return {column: row[column] for column in columns}

    return _build(path, check, bad_rows)


def load_records(
    path_or_id: str | os.PathLike, split: str | None = None, bad_rows: list[BadRow] | None = None
) -> Dataset:
    """Loads a dataset of records from a folder, a file or the Hub.

    Args:
        path_or_id (`str` or `os.PathLike`): a folder written by `Dataset.save_to_disk`, a `.jsonl` file with one
            record per line, a `.parquet` file, or the id of a dataset on the Hub.
        split (`str`, *optional*): split to take where there are several; a file or folder without splits is `"train"`.
        bad_rows (`list[BadRow]`, *optional*): list to which broken rows of a `.jsonl` file are added, which are then
            left out.

    Returns:
        `Dataset`: the records. Those of a `.jsonl` file are checked here, because only here a line can be named;
            [`~data.schema.validate_dataset`] checks the others.

    Raises:
        `DatasetError`: there is nothing to load at this place, or it cannot be read.
    """
    path = as_path(path_or_id)
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
        _refuse_split(path, split)
        return _build(path, _check_record, bad_rows)
    elif path.suffix == ".parquet":
        require_file(path)
        _refuse_split(path, split)
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
    if path.is_dir():
        _refuse_split(path_or_id, split, loaded.split)
    return loaded


def _refuse_split(path: str | os.PathLike, split: str | None, own: Any = None) -> None:
    """Raises for a split of a source that has none, as it would be all of it; `"train"` is what callers default to."""
    if split not in (None, "train", own):
        raise DatasetError(f"{path} has no splits, so none is called {split!r}: leave it out, or name another dataset")


def _check_record(row: dict[str, Any], where: str) -> dict[str, Any]:
    for key in ("question", "answers", "documents"):
        require_key(row, key, where)
    check_record(row, where)
    if "id" in row:
        row["id"] = as_identifier(row["id"], where)
    return row


def _build(
    path: str | os.PathLike,
    check: Callable[[dict[str, Any], str], dict[str, Any]],
    bad_rows: list[BadRow] | None,
) -> Dataset:
    """Dataset of the rows of a JSON Lines file that pass a check, all of them questions or all of them dialogues."""

    def rows() -> Iterator[dict[str, Any]]:
        dialogues: bool | None = None
        for number, where, row in read_numbered(path, bad_rows):
            with collecting(bad_rows, number, row.get("id")):
                checked = check(row, where)
                is_dialogue = isinstance(checked["question"], list)
                if is_dialogue is not (is_dialogue if dialogues is None else dialogues):
                    raise DatasetError(
                        f"{where}, column question: is {'a list of messages' if is_dialogue else 'a text'}, but in "
                        f"the lines before {'a text' if is_dialogue else 'a list of messages'}; use one form for all"
                    )
                dialogues = is_dialogue
                yield checked

    sound = rows()
    first = next(sound, None)
    if first is None and bad_rows:
        raise DatasetError(f"none of the {len(bad_rows)} rows can be used; the first: {bad_rows[0].reason}")
    return build_dataset(chain([] if first is None else [first], sound))
