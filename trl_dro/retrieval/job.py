# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Candidates of many questions: in memory, or in a folder, shard by shard, under a key of all that they depend on."""

import json
import os
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, concatenate_datasets, load_from_disk
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from ..data.corpus import Corpus
from ..data.schema import DatasetError, build_dataset, check_answers, check_question, require_columns
from ..data.storage import DEFAULT_CACHE_DIR, content_key, locked, make_folder, whole_folder
from ..metrics.text import has_answer
from .interface import Retriever, num_candidates, query_text


REPORT = "retrieval.json"
SHARD = "records.arrow"
CUTOFFS = (1, 3, 5, 20)
ANSWER, SUPPORT = "contains an answer", "is a supporting passage"
VERSION = 1  # raised when the same inputs would give other records


def retrieve_candidates(questions: Dataset, retriever: Retriever, k: int = 20, batch_size: int = 256) -> Dataset:
    """Gives every question its candidate documents, in memory, with a progress bar.

    Args:
        questions (`Dataset`): column `question` and, optionally, `id`, `answers` and `positive_ids`, which are kept;
            see [`~data.files.read_questions`].
        retriever ([`Retriever`]): object with `search(queries, k)`, e.g. [`BM25Retriever`].
        k (`int`, *optional*, defaults to `20`): number of candidates per question.
        batch_size (`int`, *optional*, defaults to `256`): number of questions per call of the retriever.

    Returns:
        `Dataset`: the questions with a column `documents` of `k` documents, fewer of a smaller corpus, in rank order,
        with `score` and `rank`.

    Raises:
        `DatasetError`: there are no questions, or a column is missing.

    Example:
    ```python
    from trl_dro.data import read_corpus, read_questions
    from trl_dro.retrieval import BM25Retriever, retrieve_candidates

    retriever = BM25Retriever(read_corpus("corpus.jsonl"))
    dataset = retrieve_candidates(read_questions("train.jsonl"), retriever, k=20)
    ```
    """
    require_columns(questions, ("question",), "questions")

    def records() -> Iterator[dict[str, Any]]:
        with tqdm(total=len(questions), desc=f"Retrieving top {k}", unit="question") as progress:
            for start in range(0, len(questions), batch_size):
                rows = questions.select(range(start, min(start + batch_size, len(questions)))).to_list()
                yield from _with_candidates(rows, retriever, k)
                progress.update(len(rows))

    return build_dataset(records())


def retrieve_to_folder(
    questions: Dataset,
    retriever: Retriever,
    corpus: Corpus | None,
    output_dir: str | os.PathLike,
    split: str = "train",
    k: int = 20,
    cache_dir: str | os.PathLike = DEFAULT_CACHE_DIR,
    shard_size: int = 1000,
    batch_size: int = 256,
) -> Dataset:
    """Gives every question its candidate documents, in a folder that training can load.

    Work is saved shard by shard, so that a second call goes on where a killed one stopped. The result is kept under a
    key of the questions, the corpus, the retriever's settings and `k`: with the same ones it is opened and nothing is
    computed; when one of them has changed it is made anew and replaced. The index is shared by all splits.

    Args:
        questions (`Dataset`): columns `question`, `answers` and, optionally, `id` and `positive_ids`, which are kept.
        retriever ([`Retriever`]): e.g. [`BM25Retriever`], not yet indexed.
        corpus ([`~data.corpus.Corpus`] or `None`): passages to search; `None` for [`PrecomputedRetriever`].
        output_dir (`str` or `os.PathLike`): folder of the dataset. Each split is a subfolder, so that
            `load_from_disk(output_dir)` gives all of them and `load_from_disk(output_dir / split)` gives one.
        split (`str`, *optional*, defaults to `"train"`): name of the split.
        k (`int`, *optional*, defaults to `20`): number of candidates per question; all passages of a smaller corpus.
        cache_dir (`str` or `os.PathLike`, *optional*, defaults to `$HF_HOME/trl_dro`): where indexes are kept.
        shard_size (`int`, *optional*, defaults to `1000`): questions per shard: the most that a kill can cost, and
            the most that memory holds.
        batch_size (`int`, *optional*, defaults to `256`): number of questions per call of the retriever.

    Returns:
        `Dataset`: the questions with a column `documents`, memory-mapped. `retrieval.json` beside it holds the
        settings, Recall@1/3/5/20 of the retriever, and the seconds the search took.

    Raises:
        `DatasetError`: a column is missing, or `output_dir` holds something else.

    Example:
    ```python
    # needs DPR's file of passages, and the questions from the Hub
    from trl_dro.data import load_benchmark, open_corpus
    from trl_dro.retrieval import BM25Retriever, retrieve_to_folder

    corpus = open_corpus("psgs_w100.tsv.gz")
    dataset = retrieve_to_folder(load_benchmark("nq", "train"), BM25Retriever(), corpus, "nq-top20")
    ```
    """
    require_columns(questions, ("question", "answers"), "questions")
    make_folder(output_dir)
    if len(questions) == 0:
        raise DatasetError("questions has no rows; check the file, split or filter it came from")
    if corpus is not None:
        k = num_candidates(corpus, k)
    settings = {"k": k, "corpus": corpus.fingerprint if corpus else None, "retriever": retriever.settings}
    key = content_key(VERSION, settings, _questions_key(questions))
    folder = Path(output_dir) / split
    partial = folder.with_name(f".{split}-{key}.partial")

    def is_done() -> bool:
        report = read_report(folder)
        return report is not None and report["key"] == key

    if not is_done() and read_report(folder) is None and folder.exists() and any(folder.iterdir()):
        raise DatasetError(f"{folder} holds something that retrieval did not write; choose another output_dir")
    if not is_done():
        with locked(Path(cache_dir) / "locks" / key):
            if not is_done():  # another process may have been faster
                if corpus is not None:
                    retriever.index(corpus, Path(cache_dir) / "indexes")
                shards = _search(questions, retriever, k, partial, shard_size, batch_size)
                _assemble(shards, partial / "whole", {"key": key, "settings": settings})
                if folder.exists():
                    folder.rename(partial / "replaced")
                (partial / "whole").rename(folder)
    # Here, because a kill may have come between the result and these.
    shutil.rmtree(partial, ignore_errors=True)
    _name_splits(Path(output_dir))
    return load_from_disk(str(folder))


def _assemble(shards: list[Path], folder: Path, report: dict[str, Any]) -> None:
    """Writes the records of all shards and a report with their recall as one dataset."""
    if folder.is_dir():  # whole before the process was killed
        return
    reports = [json.loads((shard / REPORT).read_text(encoding="utf-8")) for shard in shards]
    dataset = concatenate_datasets([Dataset.from_file(str(shard / SHARD)) for shard in shards])
    with whole_folder(folder) as temporary:
        dataset.save_to_disk(str(temporary))
        report |= {
            "num_questions": len(dataset),
            "seconds": sum(shard_report["seconds"] for shard_report in reports),
            "recall": _recall([shard_report["hits"] for shard_report in reports]),
        }
        _write_json(temporary / REPORT, report)


def read_report(folder: str | os.PathLike) -> dict[str, Any] | None:
    """What [`retrieve_to_folder`] wrote about a split: settings, recall, seconds; `None` where it wrote nothing."""
    path = Path(folder) / REPORT
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def print_report(report: dict[str, Any], title: str) -> None:
    """Prints Recall@k of the retriever as a table."""
    table = Table(title=f"{title}: {report['num_questions']:,} questions", title_justify="left")
    table.add_column("relevant is what")
    cutoffs = list(next(iter(report["recall"].values())))
    for cutoff in cutoffs:
        table.add_column(f"Recall@{cutoff}, %", justify="right")
    for name, values in report["recall"].items():
        table.add_row(name, *(f"{100 * values[cutoff]:.1f}" for cutoff in cutoffs))
    Console().print(table)


def _search(
    questions: Dataset, retriever: Retriever, k: int, partial: Path, shard_size: int, batch_size: int
) -> list[Path]:
    """Searches what is not there yet, one folder per shard."""
    partial.mkdir(parents=True, exist_ok=True)
    # The size is in the name, so that another size does not take these for its own.
    starts = range(0, len(questions), shard_size)
    shards = [partial / f"shard-{shard_size}-{start // shard_size:05d}" for start in starts]
    todo = [(start, shard) for start, shard in zip(starts, shards, strict=True) if not shard.is_dir()]
    num_todo = sum(min(shard_size, len(questions) - start) for start, _ in todo)
    num_done = len(questions) - num_todo
    with tqdm(total=len(questions), initial=num_done, desc=f"Retrieving top {k}", unit="question") as progress:
        for start, shard in todo:
            stop = min(start + shard_size, len(questions))
            begin = time.monotonic()
            records: list[dict[str, Any]] = []
            for first in range(start, stop, batch_size):
                rows = questions.select(range(first, min(first + batch_size, stop))).to_list()
                records += _with_candidates(rows, retriever, k)
                progress.update(len(rows))
            with whole_folder(shard) as temporary:
                table = build_dataset(records).data.table
                with pa.OSFile(str(temporary / SHARD), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                    writer.write_table(table)
                seconds = time.monotonic() - begin
                _write_json(temporary / REPORT, {"hits": count_hits(records, k), "seconds": seconds})
    return shards


def _with_candidates(rows: list[dict[str, Any]], retriever: Retriever, k: int) -> list[dict[str, Any]]:
    rankings = retriever.search([query_text(row["question"]) for row in rows], k)
    return [
        {**row, "documents": [{**document, "rank": rank} for rank, document in enumerate(documents, start=1)]}
        for row, documents in zip(rows, rankings, strict=True)
    ]


def count_hits(records: Sequence[dict[str, Any]], k: int) -> dict[str, dict[str, int]]:
    """
    For how many records a relevant document is among the first 1, 3, 5, 20 and `k`, as far as `k` goes.

    Args:
        records (`list[dict]`):
            Records with their candidates.
        k (`int`):
            Number of candidates.

    Returns:
        `dict[str, dict[str, int]]`: relevant is a document that contains an answer, by [`~metrics.has_answer`], and,
        where records have `positive_ids`, one of these. Cut-offs are strings, as JSON has no other keys; `"of"` is
        the number of records that were looked at.
    """
    cutoffs = sorted({cutoff for cutoff in CUTOFFS if cutoff <= k} | {k})
    ranks = {
        ANSWER: [
            _first(has_answer(document["text"], record["answers"]) for document in record["documents"])
            for record in records
        ]
    }
    if with_positives := [record for record in records if record.get("positive_ids")]:
        ranks[SUPPORT] = [
            _first(document["id"] in record["positive_ids"] for document in record["documents"])
            for record in with_positives
        ]
    return {
        name: {str(cutoff): sum(1 <= rank <= cutoff for rank in firsts) for cutoff in cutoffs} | {"of": len(firsts)}
        for name, firsts in ranks.items()
    }


def _first(is_relevant: Iterator[bool]) -> int:
    """Rank of the first relevant document, 0 if none is."""
    return next((rank for rank, relevant in enumerate(is_relevant, start=1) if relevant), 0)


def _recall(hits_of_shards: list[dict[str, dict[str, int]]]) -> dict[str, dict[str, float]]:
    totals: dict[str, Counter[str]] = defaultdict(Counter)
    for hits in hits_of_shards:
        for name, counts in hits.items():
            totals[name].update(counts)
    return {
        name: {cutoff: count / counts["of"] for cutoff, count in counts.items() if cutoff != "of"}
        for name, counts in totals.items()
        # Positive ids of another corpus, a benchmark's own paragraphs say, are never found: no recall of this one.
        if counts.total() > counts["of"] or name == ANSWER
    }


def _questions_key(questions: Dataset) -> str:
    """Checks all questions and gives a key of their content."""
    columns = [name for name in ("id", "question", "answers", "positive_ids") if name in questions.column_names]
    keys = []
    for start in range(0, len(questions), 1000):
        rows = questions.select_columns(columns)[start : start + 1000]
        for row, (question, answers) in enumerate(zip(rows["question"], rows["answers"], strict=True), start=start):
            check_question(question, f"questions, row {row}")
            check_answers(answers, f"questions, row {row}")
        keys.append(content_key(rows))
    return content_key(columns, keys)


def _name_splits(output_dir: Path) -> None:
    """Lists the splits where `load_from_disk` looks for them."""
    path = output_dir / "dataset_dict.json"
    # Splits that were saved here by other means stay listed.
    splits = json.loads(path.read_text(encoding="utf-8"))["splits"] if path.is_file() else []
    splits += [report.parent.name for report in output_dir.glob(f"[!.]*/{REPORT}")]
    temporary = path.with_suffix(".tmp")
    _write_json(temporary, {"splits": sorted(set(splits))})
    temporary.rename(path)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
