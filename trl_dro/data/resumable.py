# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""A file of one line per question that grows batch by batch, written by one process or by several: a killed command
goes on where it stopped."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm

from .lines import parse_json, read_json_object
from .processes import ALONE, Processes
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
    processes: Processes = ALONE,
    unit: str = "question",
) -> list[Row]:
    """
    The lines of a file, one for each of `num_rows` questions in their order. Those that an earlier call left are kept,
    the others are made and written as they come, to a file beside it until all are there. Of several processes each
    writes a file of its own, whose lines the main one puts into the one file, now or when they are resumed, by however
    many.

    Args:
        path (`Path`):
            File, jsonl. Its folder, which all processes must see, also gets `settings.json`.
        num_rows (`int`):
            Questions.
        settings (`dict`):
            What tells this result from others; a folder that was begun with other settings is refused.
        work (`Callable`):
            Takes the places of the questions that are left, from 0, at least one, and yields batches of places with
            their results: all that are left, or those that this process is to do. Results that are there already are
            not written again.
        description (`str`):
            Of the progress bar.
        skipped (`list[BadRow]`, *optional*):
            Rows of the source that are left out, listed in `skipped.jsonl`; the questions are the others.
        processes ([`~processes.Processes`], *optional*):
            Those that call this function together.
        unit (`str`, *optional*, defaults to `"question"`):
            Of the progress bar.

    Returns:
        `list[dict]`: the results, each with its `row`, the number in the source; in every process all.

    Raises:
        `ValueError`: the folder holds results of other settings, or another command writes to it, or not all processes
            see it.
    """
    numbers = row_numbers(num_rows, skipped)
    with alone_in(path.parent) if processes.is_main else nullcontext():
        done = processes.share(lambda: _begin(path, numbers, json.loads(json.dumps(settings)), skipped))
        left = [place for place, row in enumerate(numbers) if row not in done]
        if left:
            with tqdm(
                total=num_rows, initial=len(done), desc=description, unit=unit, disable=not processes.is_main
            ) as progress:
                _append(path, processes, numbers, done, work(left), progress)
                processes.wait()
                progress.update(num_rows - progress.n)
        return processes.share(lambda: _finish(path, numbers))


def _part(path: Path, rank: int) -> Path:
    """File of the lines of one process until all are there."""
    return path.with_suffix(f".partial{f'-{rank}' if rank else ''}{path.suffix}")


def _parts(path: Path) -> list[Path]:
    """Such files of all processes, of this call and of earlier ones."""
    return [_part(path, 0), *sorted(path.parent.glob(f"{path.stem}.partial-*{path.suffix}"))]


def _begin(path: Path, numbers: list[int], settings: dict[str, Any], skipped: Sequence[BadRow]) -> set[int]:
    """Rows that earlier calls left, in one file from now on."""
    if path.is_file():
        results = _whole_lines(path, cut=False)
    else:
        first, *others = _parts(path)
        results = [row for part in (first, *others) for row in _whole_lines(part)]
        if others:
            write_whole(first, "".join(map(_line, results)))
            for part in others:
                part.unlink()
    begun = _is_begun(path.parent, results, settings)
    if path.is_file() and sorted(row["row"] for row in results) != numbers:
        raise ValueError(
            f"{path} is damaged: it has {len(results)} of {len(numbers)} results; delete that folder, or name another "
            "output_dir"
        )
    _write_skipped(path.parent / SKIPPED_FILE, skipped)
    if not begun:  # which claims nothing before there is a result
        write_json(path.parent / SETTINGS_FILE, settings)
    return {row["row"] for row in results}


def _append(
    path: Path,
    processes: Processes,
    numbers: list[int],
    done: set[int],
    batches: Iterable[tuple[list[int], list[Row]]],
    progress: tqdm,
) -> None:
    """Writes results as they come, and shows how many all processes have."""
    own = _part(path, processes.rank)
    read = {_part(path, rank): 0 for rank in range(processes.count) if rank != processes.rank}  # bytes
    with open(own, "a", encoding="utf-8") as file:
        for places, results in batches:
            rows = [{"row": numbers[place], **result} for place, result in zip(places, results, strict=True)]
            new = [row for row in rows if row["row"] not in done]
            file.write("".join(map(_line, new)))
            file.flush()
            progress.update(len(new))
            for part in read if processes.is_main else ():
                if part.is_file():
                    with open(part, "rb") as other:
                        other.seek(read[part])
                        content = other.read()
                    read[part] += len(content)
                    progress.update(content.count(b"\n"))


def _finish(path: Path, numbers: list[int]) -> list[Row]:
    """Results in the order of the questions, in the file."""
    parts = [path] if path.is_file() else _parts(path)
    done = {row["row"]: row for part in parts for row in _whole_lines(part)}
    if missing := [row for row in numbers if row not in done]:
        raise ValueError(
            f"{len(missing)} of {len(numbers)} results are not in {path.parent}, the first of row {missing[0]}: all "
            "processes must write to one folder, name one as output_dir that every machine sees"
        )
    results = [done[row] for row in numbers]
    if not path.is_file():
        write_whole(path, "".join(map(_line, results)))
    for part in _parts(path):
        part.unlink(missing_ok=True)
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
