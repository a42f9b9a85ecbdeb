# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Scores of single questions summed up: means with intervals, and a comparison with a baseline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..data.lines import read_jsonl
from ..data.schema import DatasetError
from ..metrics import bootstrap_interval, paired_permutation_test, ranking_measures


ERRORS = ("not_retrieved", "not_selected", "not_answered")


def summarize(
    rows: Sequence[dict[str, Any]],
    baseline: Sequence[dict[str, Any]] | None = None,
    measures: Sequence[str] | None = None,
) -> dict[str, Any]:
    """
    Means over questions with bootstrap 95% intervals, and p-values against a baseline.

    Args:
        rows (`list[dict]`):
            Scored questions, see [`~evaluation.run`].
        baseline (`list[dict]`, *optional*):
            The same questions in the same order, scored for another system.
        measures (`list[str]`, *optional*):
            Measures of `ir-measures` of the selected documents, over the questions that have `positive_ids`.

    Returns:
        `dict[str, Any]`: `num_questions` and `metrics`, by name: `mean`, `low`, `high`, `count` and, of metrics that
        the baseline has too, `baseline`, `difference`, `difference_low`, `difference_high` and `p_value`.
    """
    metrics: dict[str, dict[str, float]] = {}
    scores = _scores(rows, measures)
    others = {} if baseline is None else _scores(baseline, measures)
    for name, own in scores.items():
        values = [value for value in own if value is not None]
        if not values:
            continue
        low, high = bootstrap_interval(values)
        metrics[name] = {"mean": sum(values) / len(values), "low": low, "high": high, "count": len(values)}
        pairs = [(a, b) for a, b in zip(own, others.get(name, []), strict=False) if a is not None and b is not None]
        if pairs:
            differences = [a - b for a, b in pairs]
            low, high = bootstrap_interval(differences)
            metrics[name] |= {
                "baseline": sum(b for _, b in pairs) / len(pairs),
                "difference": sum(differences) / len(pairs),
                "difference_low": low,
                "difference_high": high,
                "p_value": paired_permutation_test([a for a, _ in pairs], [b for _, b in pairs]),
            }
    return {"num_questions": len(rows), "metrics": metrics}


def _scores(rows: Sequence[dict[str, Any]], measures: Sequence[str] | None) -> dict[str, list[float | None]]:
    """Every number of the rows by name, `None` where a question has none; outcomes as shares."""
    names = ["em", "f1", "contains"]
    names += sorted({name for row in rows for name in row if "recall@" in name}, key=_recall_order)
    names += ["documents"] * any("documents" in row for row in rows) + ["context_gain", "prediction_gain"]
    names += ["citation_precision", "answer_in_documents"]
    scores: dict[str, list[float | None]] = {name: [row.get(name) for row in rows] for name in names}
    if measures:
        with_positives = [i for i, row in enumerate(rows) if row["positive_ids"]]
        selected = [rows[i]["selected_ids"] for i in with_positives]
        values = ranking_measures(selected, [rows[i]["positive_ids"] for i in with_positives], measures)
        for name, column in values.items():
            by_row = dict(zip(with_positives, column, strict=True))
            scores[name] = [by_row.get(i) for i in range(len(rows))]
    for error in ERRORS:
        scores[error] = [float(row["outcome"] == error) for row in rows]
    for name in ("seconds", "tokens"):
        scores[name] = [row[name] for row in rows]
    return scores


def _recall_order(name: str) -> tuple[int, int]:
    kind, _, k = name.partition("recall@")
    return ["", "retriever_", "support_"].index(kind), int(k)


def load_baseline(path: Path, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Scored questions of another evaluation, in the order of `rows`.

    Raises:
        `DatasetError`: there is no such evaluation, it is not finished, or it is of other questions.
    """
    if not path.is_file():
        raise DatasetError(f"{path} does not exist: the baseline must be the folder of a finished evaluation")
    others = [row for _, row in read_jsonl(path)]
    if len(others) != len(rows):
        raise DatasetError(
            f"{path} has {len(others)} questions, not {len(rows)}: evaluate the baseline on the same ones"
        )
    for number, (row, other) in enumerate(zip(rows, others, strict=True), start=1):
        if (row["question"], row["answers"]) != (other["question"], other["answers"]):
            raise DatasetError(
                f"{path}, line {number}: is the question {other['question']!r}, not {row['question']!r}: evaluate "
                "the baseline on the same dataset"
            )
    return others


def print_report(summary: dict[str, Any], baseline: str | None) -> None:
    """Prints [`report_table`] to the terminal."""
    Console().print(report_table(summary, baseline))


def report_table(summary: dict[str, Any], baseline: str | None = None) -> Table:
    """
    Table of a summary, 80 characters wide.

    Args:
        summary (`dict`):
            Output of [`summarize`].
        baseline (`str`, *optional*):
            What the baseline is called; without one its columns are left out.

    Returns:
        [`~rich.table.Table`]: shares in percent.
    """
    skipped = f" ({summary['num_skipped']} skipped)" if summary.get("num_skipped") else ""
    title = f"{summary['num_questions']} questions{skipped}, shares in %, gain in nats, "
    title += "95% bootstrap intervals in brackets"
    if baseline is not None:
        title += f"\nbaseline: {baseline}, two-sided paired permutation test"
    # Five columns must fit into 80 characters.
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("")
    for heading in ("system", *(("baseline", "difference", "p") if baseline is not None else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, values in summary["metrics"].items():
        label, scale, digits = metric_label(name)

        def shown(key, sign="", values=values, scale=scale, digits=digits):
            return f"{scale * values[key]:{sign}.{digits}f}"

        cells = [f"{shown('mean')} ({shown('low')}–{shown('high')})"]
        if baseline is not None and "difference" in values:
            interval = f"({shown('difference_low')}–{shown('difference_high')})"
            cells += [shown("baseline"), f"{shown('difference', '+')} {interval}", f"{values['p_value']:.4f}"]
        table.add_row(label, *cells, end_section=name in ("answer_in_documents", "not_answered"))
    return table


def metric_label(name: str) -> tuple[str, float, int]:
    """What a metric is called in the table, what it is multiplied by, and its digits."""
    labels = {
        "em": "exact match",
        "f1": "F1",
        "contains": "contains answer",
        "citation_precision": "citation precision",
        "answer_in_documents": "answer in context",
        "not_retrieved": "error: retrieval",
        "not_selected": "error: selection",
        "not_answered": "error: generation",
    }
    others = {
        "context_gain": ("gain by documents", 1.0, 2),
        "prediction_gain": ("gain of own answer", 1.0, 2),
        "documents": ("documents/question", 1.0, 2),
        "seconds": ("seconds/question", 1.0, 3),
        "tokens": ("tokens/question", 1.0, 0),
    }
    if name in others:
        return others[name]
    if "recall@" in name:
        kind, _, k = name.partition("recall@")
        who = {"": "", "retriever_": " retriever", "support_": " by id"}[kind]
        return f"Recall@{k}{who}", 100.0, 1
    return (labels[name], 100.0, 1) if name in labels else (name, 1.0, 3)
