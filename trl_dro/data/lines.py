# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Lines of plain or gzipped text files and rows of datasets, with the place of each for error messages."""

import codecs
import csv
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm

from .schema import BadRow, DatasetError, collecting
from .storage import as_path


# A text longer than Python's limit of 128 KiB for one field is not an error here.
csv.field_size_limit(2**31 - 1)


def require_file(path: str | os.PathLike) -> None:
    """Raises a [`DatasetError`] unless there is a file at `path`."""
    if not as_path(path).is_file():
        raise DatasetError(f"{os.fspath(path)}: there is no such file; check the path")


def read_lines(path: str | os.PathLike, show_progress: bool = False) -> Iterator[tuple[int, str]]:
    """
    Yields the number, from 1, and the text of each line of a UTF-8 file, unpacked if its name ends in `.gz`.

    Args:
        path (`str` or `os.PathLike`): file to read.
        show_progress (`bool`, *optional*, defaults to `False`): whether to show how much of the file is read.

    Raises:
        `DatasetError`: the file is missing, its compression is broken, or a line is not UTF-8.
    """
    for number, line in _read_bytes(path, show_progress):
        yield number, _decoded(line, number, path)


def _decoded(line: bytes, number: int, path: str | os.PathLike) -> str:
    try:
        # Line by line, so that an error has a line number; "-sig" drops the byte order mark.
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{os.fspath(path)}, line {number}: is not UTF-8 (byte {error.start} of the line); save the file as UTF-8"
        ) from None


def _read_bytes(path: str | os.PathLike, show_progress: bool = False) -> Iterator[tuple[int, bytes]]:
    require_file(path)
    name = os.fspath(path)
    number = 0
    with (
        open(path, "rb") as raw,
        tqdm(
            total=os.path.getsize(path),
            desc=f"Reading {os.path.basename(name)}",
            unit="B",
            unit_scale=True,
            disable=not show_progress,
        ) as progress,
    ):
        file = gzip.GzipFile(fileobj=raw) if name.endswith(".gz") else raw
        try:
            for number, line in enumerate(file, start=1):
                yield number, line
                if number % 1000 == 0:
                    progress.update(raw.tell() - progress.n)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DatasetError(
                f"{name}, line {number + 1}: the gzip data is broken ({error}); download or compress the file again"
            ) from None
        progress.update(raw.tell() - progress.n)


def read_jsonl(path: str | os.PathLike, show_progress: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Yields the place (`"FILE, line N"`, from 1) and the object of each line of a JSON Lines file that is not blank.

    Raises:
        `DatasetError`: a line is no object, the file has none, or it cannot be read, see [`read_lines`].
    """
    for _, where, row in read_numbered(path, show_progress=show_progress):
        yield where, row


def read_numbered(
    path: str | os.PathLike, bad_rows: list[BadRow] | None = None, show_progress: bool = False
) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """
    Yields, as [`read_jsonl`], the number of each row (from 0, blank lines are none), its place and its object. Lines
    that are no object are added to `bad_rows`; with `None` the first is an error.
    """
    row = -1
    for number, line in _read_bytes(path, show_progress):
        if not line.removeprefix(codecs.BOM_UTF8).strip():
            continue
        row += 1
        where = f"{os.fspath(path)}, line {number}"
        with collecting(bad_rows, row):
            try:
                value = parse_json(_decoded(line, number, path))
            except DatasetError:
                raise
            except ValueError as error:
                raise DatasetError(
                    f"{where}: is not valid JSON ({error}); write one object per line, and if this is the last line, "
                    "the file was cut short: copy it again"
                ) from None
            if not isinstance(value, dict):
                raise DatasetError(f"{where}: is a {type(value).__name__}, not an object; write one object per line")
            yield row, where, value
    if row < 0:
        raise DatasetError(f"{os.fspath(path)}: is empty; write one JSON object per line")


def parse_json(text: str) -> Any:
    """
    The value that a JSON text writes.

    Raises:
        `ValueError`: it is none, or is nested too deeply, or has numbers too long or texts that no file can hold.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at line {error.lineno}, character {error.colno}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply to be read") from None
    except ValueError:
        raise ValueError("it has a number of thousands of digits") from None
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start].encode("ascii", "backslashreplace").decode()
            raise ValueError(f"{half} is half of a character, which no text can hold: leave it out") from None
    return value


def read_json_object(path: str | os.PathLike) -> dict[str, Any]:
    """
    Reads a JSON file that holds an object.

    Raises:
        `DatasetError`: it cannot be read, is no JSON, or holds something else; the message names the file.
    """
    name = os.fspath(path)
    try:
        with open(path, encoding="utf-8") as file:
            value = parse_json(file.read())
    except OSError as error:
        raise DatasetError(f"{name}: cannot be read ({error.strerror or error}); check the file") from None
    except ValueError as error:
        raise DatasetError(f"{name}: is damaged, no valid JSON ({error}); copy or download it again") from None
    if not isinstance(value, dict):
        raise DatasetError(f"{name}: is damaged, holds a {type(value).__name__}, not an object; copy it again")
    return value


def read_json_array(path: str | os.PathLike, show_progress: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Yields the place (`"FILE, item N"`, from 0) and the object of each item of a JSON file that holds an array of them;
    a file whose first line is an object is read by [`read_jsonl`].

    Raises:
        `DatasetError`: it cannot be read, is no JSON, is empty, or an item is no object.
    """
    name = os.fspath(path)
    begin = next((text.strip() for _, text in read_lines(path) if text.strip()), "{}")
    try:
        if not begin.startswith("["):
            parse_json(begin)
            yield from read_jsonl(path, show_progress)
            return
        items = parse_json("".join(text for _, text in read_lines(path, show_progress)))
    except DatasetError:
        raise
    except ValueError as error:
        raise DatasetError(
            f"{name}: holds no array of objects, nor one on each line ({error}); write one of these, or take it away"
        ) from None
    for number, item in enumerate(items):
        if not isinstance(item, dict):
            raise DatasetError(f"{name}, item {number}: is a {type(item).__name__}, not an object; write one")
        yield f"{name}, item {number}", item
    if not items:
        raise DatasetError(f"{name}: is empty; write an array of objects")


def read_table(path: str | os.PathLike, show_progress: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Yields the place and the columns of each row of a table whose first line names them. Values are separated by tabs
    in a file whose name ends in `.tsv` or `.tsv.gz`, elsewhere by commas, semicolons or tabs: what the first line has
    most of. A column without a name gets its number.

    Raises:
        `DatasetError`: a row has other columns, two have one name, the file has none, or it cannot be read, see
            [`read_lines`].
    """
    name = os.fspath(path)
    separator = "\t"
    if not name.lower().removesuffix(".gz").endswith(".tsv"):
        first = next((text for _, text in read_lines(path) if text.strip()), "")
        separator = max(",;\t", key=first.count)
    columns: list[str] = []
    read = [0, 0]  # lines and separators of the row under way

    def lines() -> Iterator[str]:
        for number, text in read_lines(path, show_progress):
            read[0] += 1
            read[1] += text.count("\t")
            # A quote that is left open would take the rows behind it for text, up to the next quote. Of commas, which
            # texts have many of, nobody could tell.
            many = separator == "\t" and len(columns) > 1 and read[1] >= 2 * (len(columns) - 1)
            if read[0] > 1 and many:
                raise DatasetError(
                    f"{name}, line {number - read[0] + 1}: opens a quote that does not end before line {number}, a "
                    "row of its own; close it, or write a quote that belongs to a text twice, in a quoted text"
                )
            yield text

    kind = {"\t": "tab", ",": "comma", ";": "semicolon"}[separator]
    reader = csv.reader(lines(), delimiter=separator, strict=True)
    is_empty = True
    while True:
        where = f"{name}, line {reader.line_num + 1}"
        read[:] = [0, 0]
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise DatasetError(
                f"{where}: cannot be read as {kind}-separated values ({error}); quote a text that begins with a "
                "quote, and write its own quotes twice"
            ) from None
        if not columns and row:
            columns = [column.strip() or f"column {number}" for number, column in enumerate(row, start=1)]
            if twice := {column for column in columns if columns.count(column) > 1}:
                raise DatasetError(f"{where}: calls several columns {min(twice)!r}; give each a name of its own")
            continue
        if row is None:
            break
        if not row:
            continue
        is_empty = False
        if len(row) != len(columns):
            raise DatasetError(
                f"{where}: has {len(row)} columns, but the first line has {len(columns)} "
                f"({', '.join(map(repr, columns))}); quote {kind}s, line breaks and leading quotes in a text"
            )
        yield where, dict(zip(columns, row, strict=True))
    if is_empty:
        raise DatasetError(
            f"{os.fspath(path)}: is empty; write the names of the columns in the first line, then one row per line"
        )


def dataset_rows(dataset: Dataset, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the place (`"NAME, row N"`, from 0) and the values of each row of a dataset."""
    row = 0
    for batch in dataset.with_format("arrow").iter(batch_size=1000):
        for values in batch.to_pylist():
            yield f"{name}, row {row}", values
            row += 1


def require_key(row: dict[str, Any], key: str, where: str) -> None:
    """Raises a [`DatasetError`] that lists the keys of an object which lacks one."""
    if key not in row:
        raise DatasetError(f"{where}: has no key {key}, only {', '.join(map(repr, row))}; add it or rename yours")


def as_identifier(value: Any, where: str) -> str:
    """An id as a string; whole numbers are taken too, and anything else raises a [`DatasetError`]."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DatasetError(f"{where}, key id: must be a string or a whole number, not {value!r}; write one")
    return str(value)


def first_line(error: BaseException) -> str:
    """Type and first line of an error, for a one-line message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
