# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import io
import json

import pytest
from rich.console import Console

from trl_dro.evaluation.summary import load_baseline, report_table, summarize


def scored(em, outcome="correct", **more):
    scores = {"em": em, "f1": em, "contains": em, "outcome": outcome, "seconds": 0.5, "tokens": 10}
    return {"question": "q"} | scores | more


ROWS = (
    [scored(1.0)] * 6
    + [scored(0.0, "not_retrieved"), scored(0.0, "not_selected"), scored(0.0, "not_answered")]
    + [scored(0.0, "not_answered")]
)


def test_means_and_shares_of_errors():
    metrics = summarize(ROWS)["metrics"]
    assert metrics["em"]["mean"] == 0.6
    assert [metrics[name]["mean"] for name in ("not_retrieved", "not_selected", "not_answered")] == [0.1, 0.1, 0.2]
    assert metrics["seconds"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "count": 10}
    assert "context_gain" not in metrics and "baseline" not in metrics["em"]


def test_a_metric_that_few_questions_have_is_their_mean():
    rows = [scored(1.0, **{"support_recall@1": 1.0}), scored(0.0, **{"support_recall@1": 0.5}), scored(0.0)]
    metrics = summarize(rows)["metrics"]
    assert metrics["support_recall@1"]["mean"] == 0.75 and metrics["support_recall@1"]["count"] == 2


def test_a_baseline_is_compared_question_by_question():
    worse = [scored(0.0, "not_selected")] * 5 + ROWS[5:]
    em = summarize(ROWS, worse)["metrics"]["em"]
    assert (em["baseline"], em["difference"]) == (pytest.approx(0.1), pytest.approx(0.5))
    # Five differences of 1: 2 of 32 swaps are as extreme.
    assert em["p_value"] == pytest.approx(2 / 32, abs=0.01)
    same = summarize(ROWS, ROWS)["metrics"]["em"]
    assert (same["difference"], same["p_value"]) == (0.0, 1.0)


def test_the_table_has_percentages_intervals_and_p_values():
    def text(*arguments):
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(report_table(*arguments))
        return console.export_text()

    plain = text(summarize(ROWS))
    [line] = [line for line in plain.splitlines() if "exact match" in line]
    assert max(map(len, plain.splitlines())) <= 80
    assert "60.0" in line and "baseline" not in plain
    same = [line.split("  ")[0] for line in plain.splitlines() if "60.0" in line]
    assert same == ["exact match", "F1", "contains answer"]
    compared = text(summarize(ROWS, ROWS), "runs/bm25")
    labels = {line.split("  ")[0] for line in compared.splitlines()}
    assert {"error: generation", "seconds/question"} <= labels  # nothing wraps
    assert "runs/bm25" in compared and "1.0000" in compared and "+0.0" in compared


def test_a_baseline_is_read_whatever_characters_its_questions_have(tmp_path):
    rows = [{"question": f"who{separator}wrote it?", "answers": ["a"]} for separator in ("\u2028", "\x85", " ")]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert load_baseline(path, rows) == rows
