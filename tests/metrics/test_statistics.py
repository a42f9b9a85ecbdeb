# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import itertools

import numpy as np
import pytest
import scipy.stats

from trl_dro.metrics import bootstrap_interval, paired_permutation_test


RNG = np.random.default_rng(0)
SCORES = RNG.integers(2, size=300).astype(float)
BASELINE = np.where(RNG.random(300) < 0.85, SCORES, 0.0)


def test_interval_is_that_of_scipy():
    expected = scipy.stats.bootstrap((SCORES,), np.mean, method="percentile", n_resamples=20_000, rng=1)
    actual = bootstrap_interval(SCORES, num_resamples=20_000)
    assert actual == pytest.approx(tuple(expected.confidence_interval), abs=0.004)


def test_interval_covers_the_true_mean_as_often_as_it_says():
    intervals = [bootstrap_interval(RNG.random(100) < 0.3, confidence=0.9, num_resamples=500) for _ in range(300)]
    covered = np.mean([low <= 0.3 <= high for low, high in intervals])
    assert 0.83 < covered < 0.96


def test_interval_does_not_depend_on_how_resamples_are_chunked(monkeypatch):
    whole = bootstrap_interval(SCORES, num_resamples=1000)
    monkeypatch.setattr("trl_dro.metrics.statistics._CHUNK", 7 * len(SCORES))
    assert bootstrap_interval(SCORES, num_resamples=1000) == whole


def test_interval_of_equal_scores_is_a_point():
    assert bootstrap_interval([0.5] * 10) == (0.5, 0.5)


def test_p_value_is_that_of_all_swaps():
    scores, baseline = [0.9, 0.4, 1.0, 0.7, 0.8, 0.3], [0.2, 0.5, 0.1, 0.6, 0.9, 0.3]
    differences = np.subtract(scores, baseline)
    sums = [np.dot(signs, differences) for signs in itertools.product([1, -1], repeat=6)]
    exact = np.mean(np.abs(sums) >= abs(differences.sum()) - 1e-12)
    assert paired_permutation_test(scores, baseline, num_permutations=40_000) == pytest.approx(exact, abs=0.01)


def test_p_value_is_that_of_scipy():
    expected = scipy.stats.permutation_test(
        (SCORES[:60], BASELINE[:60]),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=20_000,
        rng=2,
    ).pvalue
    assert paired_permutation_test(SCORES[:60], BASELINE[:60], 20_000) == pytest.approx(expected, abs=0.01)


def test_p_value_is_uniform_when_systems_are_alike():
    pairs = [RNG.random((2, 50)) for _ in range(200)]
    p_values = [paired_permutation_test(a, b, num_permutations=300) for a, b in pairs]
    assert scipy.stats.kstest(p_values, "uniform").pvalue > 0.01


def test_p_value_does_not_depend_on_the_direction_and_is_never_zero():
    better, worse = np.ones(40), np.zeros(40)
    assert paired_permutation_test(better, worse, 999) == paired_permutation_test(worse, better, 999) == 0.001
    assert paired_permutation_test(better, better) == 1.0


@pytest.mark.parametrize("scores", [[], [0.1, float("nan")], [[0.1]]])
def test_scores_that_have_no_mean_are_refused(scores):
    with pytest.raises(ValueError, match="non-empty list of finite numbers"):
        bootstrap_interval(scores)


def test_unpaired_scores_are_refused():
    with pytest.raises(ValueError, match="3 scores and 2 of the baseline"):
        paired_permutation_test([1, 2, 3], [1, 2])
