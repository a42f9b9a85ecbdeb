# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import pytest

from trl_dro.evaluation.abstention import count_answers, count_at_thresholds, print_thresholds


def rows(*gains_and_em):
    return [{"prediction_gain": gain, "em": em} for gain, em in gains_and_em]


ROWS = rows((5.0, 1.0), (3.0, 1.0), (2.0, 0.0), (0.5, 1.0), (0.5, 0.0), (-1.0, 0.0))


def test_every_question_is_right_wrong_or_abstained_from():
    assert count_answers(ROWS, 2.0) == {
        "min_gain": 2.0,
        "correct": 2,
        "wrong": 1,
        "abstained": 3,
        "abstained_correct": 1,
        "precision": pytest.approx(2 / 3),
    }
    without = count_answers([{"em": 1.0}, {"em": 0.0}], None)  # for which no gain is needed
    assert (without["correct"], without["wrong"], without["abstained"], without["precision"]) == (1, 1, 0, 0.5)
    assert count_answers(ROWS, 6.0)["precision"] is None


def test_thresholds_are_gains_that_were_seen_and_give_what_is_printed_of_them(capsys):
    counts = count_at_thresholds(rows(*[(gain / 3, float(gain > 40)) for gain in range(100)]))
    assert [each["min_gain"] for each in counts] == [None, 3.3, 6.6, 9.9, 13.2, 16.5, 19.8, 23.1, 26.4, 29.7]
    assert [each["abstained"] for each in counts] == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert all(each["correct"] + each["wrong"] + each["abstained"] == 100 for each in counts)
    print_thresholds(counts, count_answers(ROWS, 2.0))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    [line] = [line for line in out.splitlines() if line.split()[:1] == ["13.2"]]
    assert line.split() == ["13.2", "59", "1", "40", "0", "98.3"]
    assert "With --min_gain 2: 2 correct, 3 abstained, 1 wrong." in out


def test_equal_gains_make_one_threshold():
    assert [each["min_gain"] for each in count_at_thresholds(rows(*[(0.0, 1.0)] * 5))] == [None, 0.0]
