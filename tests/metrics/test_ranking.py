# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import builtins
import math

import pytest

from trl_dro.metrics import ranking_measures, recall_of_ids_at_k


RANKINGS = [["a", "b", "c", "d"], ["x", "y"], ["p", "q", "r"]]
SUPPORTING = [["c", "a"], ["y", "missing"], ["none"]]


@pytest.fixture(autouse=True)
def installed():
    pytest.importorskip("ir_measures")


def test_measures_are_those_of_their_definitions():
    values = ranking_measures(RANKINGS, SUPPORTING, ["RR", "nDCG@2", "AP"])
    assert values["RR"] == [1.0, 0.5, 0.0]
    ideal = 1 + 1 / math.log2(3)
    assert values["nDCG@2"] == pytest.approx([1 / ideal, (1 / math.log2(3)) / ideal, 0.0])
    assert values["AP"] == pytest.approx([(1 + 2 / 3) / 2, (1 / 2) / 2, 0.0])


def test_recall_is_our_own_recall_of_ids():
    for k in (1, 2, 3):
        expected = [recall_of_ids_at_k(*pair, k) for pair in zip(RANKINGS, SUPPORTING, strict=True)]
        assert ranking_measures(RANKINGS, SUPPORTING, [f"R@{k}"]) == {f"R@{k}": pytest.approx(expected)}


def test_order_of_many_documents_is_kept():
    ranking = [str(i) for i in range(1000)]
    assert ranking_measures([ranking], [["999"]], ["RR"])["RR"] == [pytest.approx(1 / 1000)]


@pytest.mark.parametrize(
    "rankings, supporting, measures, message",
    [
        ([["a"]], [["a"], ["b"]], ["RR"], "1 rankings and supporting ids of 2"),
        ([["a"]], [[]], ["RR"], "question 0 has no supporting document"),
        ([["a"], ["b", "b"]], [["a"], ["b"]], ["RR"], "question 1 ranks a document twice"),
        ([["a"]], [["a"]], ["nonsense@3"], "unknown measure"),
    ],
)
def test_what_cannot_be_measured_is_refused(rankings, supporting, measures, message):
    with pytest.raises(ValueError, match=message):
        ranking_measures(rankings, supporting, measures)


def test_a_missing_package_names_its_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "ir_measures":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"trl_dro\[ranking\]"):
        ranking_measures(RANKINGS, SUPPORTING)
