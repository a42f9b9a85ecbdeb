# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""How far a mean over questions can be trusted, and whether two systems differ on the same questions.

References:
    [1] B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993.
    [2] E. Noreen, Computer-Intensive Methods for Testing Hypotheses, 1989.
    [3] B. Phipson and G. Smyth, Permutation P-values Should Never Be Zero, 2010.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


# Random numbers held at a time; 32 MB.
_CHUNK = 4_000_000


class Interval(NamedTuple):
    """Both ends of a confidence interval."""

    low: float
    high: float


def bootstrap_interval(
    scores: Sequence[float], confidence: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval [1] of a mean over questions.

    Args:
        scores (`Sequence[float]`): one score per question.
        confidence (`float`, *optional*, defaults to `0.95`): how often such intervals hold the true mean.
        num_resamples (`int`, *optional*, defaults to `10000`): samples drawn from the scores, with replacement.
        seed (`int`, *optional*, defaults to `0`): seed of the draws.

    Returns:
        [`Interval`]: in the unit of the scores.

    Raises:
        `ValueError`: there are no scores, or one is not finite.

    Example:
    ```python
    >>> low, high = bootstrap_interval([1.0, 0.0, 1.0, 1.0] * 25)
    >>> 0.6 < low < 0.75 < high < 0.9
    True
    ```
    """
    values = _checked(scores)
    generator = np.random.default_rng(seed)
    per_chunk = max(1, _CHUNK // len(values))
    means = [
        values[generator.integers(len(values), size=(min(per_chunk, num_resamples - start), len(values)))].mean(axis=1)
        for start in range(0, num_resamples, per_chunk)
    ]
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return Interval(float(low), float(high))


def paired_permutation_test(
    scores: Sequence[float], baseline: Sequence[float], num_permutations: int = 10_000, seed: int = 0
) -> float:
    """Two-sided paired permutation test (approximate randomisation) [2] of equal means on the same questions.

    If the systems were alike, either could have had either score of a question: the difference of the means is
    compared with those under random swaps, of which the one observed counts as one, so that p is never 0 [3].

    Args:
        scores (`Sequence[float]`): one score per question.
        baseline (`Sequence[float]`): scores of the other system on the same questions, in the same order.
        num_permutations (`int`, *optional*, defaults to `10000`): random swaps.
        seed (`int`, *optional*, defaults to `0`): seed of the swaps.

    Returns:
        `float`: p-value, at least `1 / (num_permutations + 1)`.

    Raises:
        `ValueError`: the systems have different numbers of scores, or there are none, or one is not finite.
    """
    if len(scores) != len(baseline):
        raise ValueError(
            f"{len(scores)} scores and {len(baseline)} of the baseline cannot be paired; score the same questions"
        )
    differences = _checked(scores) - _checked(baseline)
    differences = differences[differences != 0]  # a swap does not change the others
    if len(differences) == 0:
        return 1.0
    generator = np.random.default_rng(seed)
    observed = abs(differences.sum())
    per_chunk = max(1, _CHUNK // len(differences))
    as_extreme = 0
    for start in range(0, num_permutations, per_chunk):
        size = (min(per_chunk, num_permutations - start), len(differences))
        signs = 1 - 2 * generator.integers(2, size=size, dtype=np.int8)
        # Rounding must not make a sum smaller than its own mirror image.
        as_extreme += int((abs(signs @ differences) >= observed * (1 - 1e-12)).sum())
    return (as_extreme + 1) / (num_permutations + 1)


def _checked(scores: Sequence[float]) -> np.ndarray:
    values = np.asarray(scores, dtype=float)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError("scores must be a non-empty list of finite numbers, one per question; leave the others out")
    return values
