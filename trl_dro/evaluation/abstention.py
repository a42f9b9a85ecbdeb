# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Correct, wrong and abstained: what a least gain leaves of a system's answers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


DECILES = tuple(range(10, 100, 10))


def count_answers(rows: Sequence[dict[str, Any]], min_gain: float | None) -> dict[str, Any]:
    """
    What becomes of answered questions if answers of less gain are not given.

    Args:
        rows (`list[dict]`):
            Scored questions with `em` and, of the predicted answer, `prediction_gain` in nats.
        min_gain (`float`, *optional*):
            Least gain; `None` to give every answer.

    Returns:
        `dict[str, Any]`: `min_gain`; how many questions are answered right (`correct`) and wrong (`wrong`), and how
        many not (`abstained`), of which some would have been right (`abstained_correct`); `precision`, the share that
        is right of what is answered, `None` if nothing is.
    """
    given = [row["em"] == 1.0 for row in rows if min_gain is None or row["prediction_gain"] >= min_gain]
    correct = sum(given)
    return {
        "min_gain": min_gain,
        "correct": correct,
        "wrong": len(given) - correct,
        "abstained": len(rows) - len(given),
        "abstained_correct": sum(row["em"] == 1.0 for row in rows) - correct,
        "precision": correct / len(given) if given else None,
    }


def count_at_thresholds(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    The counts of [`count_answers`] without a threshold, and at every tenth of the gains that were seen.

    Args:
        rows (`list[dict]`):
            Scored questions, see [`count_answers`].

    Returns:
        `list[dict]`: from no threshold to the highest. They have one decimal, as they are printed.
    """
    gains = np.percentile([row["prediction_gain"] for row in rows], DECILES).round(1).tolist()
    return [count_answers(rows, min_gain) for min_gain in [None, *sorted(set(gains))]]


def print_thresholds(counts: Sequence[dict[str, Any]], chosen: dict[str, Any] | None) -> None:
    """Prints a table to choose a threshold from, and what the chosen one gives."""
    table = Table(
        title="questions by the least gain of an answer in nats, --min_gain",
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for heading in ("min_gain", "correct", "wrong", "abstained", "(else right)", "right of answered, %"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in counts:
        shown = [str(each[name]) for name in ("correct", "wrong", "abstained", "abstained_correct")]
        share = "" if each["precision"] is None else f"{100 * each['precision']:.1f}"
        table.add_row("none" if each["min_gain"] is None else f"{each['min_gain']:.1f}", *shown, share)
    Console().print(table)
    if chosen is not None:
        print(
            f"With --min_gain {chosen['min_gain']:g}: {chosen['correct']} correct, {chosen['abstained']} abstained, "
            f"{chosen['wrong']} wrong."
        )
