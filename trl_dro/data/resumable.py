# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""A file of one line per question that grows batch by batch: a killed command goes on where it stopped."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm

from .lines import parse_json, read_json_object
from .schema import BadRow
from .storage import alone_in, content_key, different, write_whole


SETTINGS_FILE = "settings.json"
SKIPPED_FILE = "skipped.jsonl"

Row = dict[str, Any]


def complete_rows(
    path: Path,
    num_rows: int,
    settings: dict[str, Any],
    work: Callable[[list[int]], Iterable[tuple[list[int], list[Row]]]],
    description: str,
    skipped: Sequence[BadRow] = (),
    unit: str = "question",
) -> list[Row]:
    """
    The lines of a file, one for each of `num_rows` questions in their order. Those that an earlier call left are kept,
    the others are made and written as they come, to a file beside it until all are there.

    Args:
        path (`Path`):
            File, jsonl. Its folder also gets `settings.json`.
        num_rows (`int`):
            Questions.
        settings (`dict`):
            What tells this result from others; a folder that was begun with other settings is refused.
        work (`Callable`):
            Takes the places of the questions that are left, from 0, at least one, and yields batches of places with
            their results.
        description (`str`):
            Of the progress bar.
        skipped (`list[BadRow]`, *optional*):
            Rows of the source that are left out, listed in `skipped.jsonl`; the questions are the others.
        unit (`str`, *optional*, defaults to `"question"`):
            Of the progress bar.

    Returns:
        `list[dict]`: the results, each with its `row`, the number in the source.

    Raises:
        `ValueError`: the folder holds results of other settings, or another process writes to it.
    """
    partial_path = path.with_suffix(f".partial{path.suffix}")
    settings = json.loads(json.dumps(settings))
    numbers = row_numbers(num_rows, skipped)
    with alone_in(path.parent):
        results = _whole_lines(path, cut=False) if path.is_file() else _whole_lines(partial_path)
        begun = _is_begun(path.parent, results, settings)
        if path.is_file() and sorted(row["row"] for row in results) != numbers:
            raise ValueError(
                f"{path} is damaged: it has {len(results)} of {num_rows} results; delete that folder, or name another "
                "output_dir"
            )
        _write_skipped(path.parent / SKIPPED_FILE, skipped)
        done = {row["row"]: row for row in results}
        left = [place for place, row in enumerate(numbers) if row not in done]
        if left:
            with (
                open(partial_path, "a", encoding="utf-8") as file,
                tqdm(total=num_rows, initial=len(done), desc=description, unit=unit) as progress,
            ):
                for places, batch in work(left):
                    if not begun:  # not before there is a result: an attempt that failed claims nothing
                        write_json(path.parent / SETTINGS_FILE, settings)
                        begun = True
                    for place, result in zip(places, batch, strict=True):
                        row = numbers[place]
                        done[row] = {"row": row, **result}
                        file.write(_line(done[row]))
                    file.flush()
                    progress.update(len(places))
        results = [done[row] for row in numbers]
        if not path.is_file():
            write_whole(path, "".join(map(_line, results)))
        partial_path.unlink(missing_ok=True)
    return results


def row_numbers(num_rows: int, skipped: Sequence[BadRow]) -> list[int]:
    """Numbers, in their source, of `num_rows` rows beside those that were skipped."""
    bad = {row.row for row in skipped}
    return [row for row in range(num_rows + len(bad)) if row not in bad]


def _write_skipped(path: Path, skipped: Sequence[BadRow]) -> None:
    if skipped:
        write_whole(path, "".join(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in skipped))
    else:  # of an attempt that came to no result
        path.unlink(missing_ok=True)


def _line(row: Row) -> str:
    """A row as a line. Raises `ValueError` for NaN and infinity, which JSON does not have."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError:
        raise ValueError(
            f"row {row['row']} (id {row.get('id')!r}) gave a number that is not finite: the weights hold NaN, or "
            "overflow in their precision (--dtype float32)"
        ) from None


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a JSON file that is whole or not there."""
    write_whole(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def fingerprint(dataset: Dataset, columns: Sequence[str]) -> str:
    """Hash of what is asked: the same questions and documents have the same, wherever they come from."""
    digest = hashlib.sha256()
    for record in dataset.select_columns(list(columns)):
        digest.update(json.dumps(record, sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()


def questions_key(dataset: Dataset) -> str:
    """
    Key of questions for training: of every question and its answers, and of the candidates of some 250 of them, as
    reading all takes minutes where there are many.
    """
    asked = fingerprint(dataset, ("question", "answers"))
    some = dataset.select(range(0, len(dataset), max(1, len(dataset) // 250)))
    return content_key(len(dataset), asked, fingerprint(some, ("documents",)))


def _is_begun(folder: Path, results: list[Row], settings: dict[str, Any]) -> bool:
    """Whether the folder has results of these settings already. Raises if it has others."""
    if not results:
        return False
    claimed = folder / SETTINGS_FILE
    if not claimed.is_file():
        raise ValueError(f"{folder} has results without {SETTINGS_FILE}: name another output_dir")
    before = read_json_object(claimed)
    if difference := different(before, settings):
        raise ValueError(f"{folder} holds results with {difference}: name another output_dir, or delete that folder")
    return True


def _whole_lines(path: Path, cut: bool = True) -> list[Row]:
    """Lines of a file whose last one may have been cut: that one is removed from the file too, or `cut` is `False`."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content) and not cut:
        raise ValueError(
            f"{path} is damaged: its last line is cut short; delete that folder, or name another output_dir"
        )
    if len(whole) < len(content):
        with open(path, "rb+") as file:
            file.truncate(len(whole))
    # str.splitlines would also split at U+2028 and U+0085, which may stand in a question.
    rows = []
    for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
        try:
            row = parse_json(line.decode())
            if not isinstance(row, dict) or not isinstance(row.get("row"), int):
                raise ValueError("it is no object with a row")
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: is damaged ({error}); delete that folder, or name another output_dir"
            ) from None
        rows.append(row)
    return rows
