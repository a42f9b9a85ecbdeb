# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import math

import pytest
import torch

from trl_dro.estimation import Estimate
from trl_dro.importance import importance_weights, selector_coefficients
from trl_dro.permutation import PermutationSamples
from trl_dro.schedule import QuestionBatch


NAN, INF = float("nan"), float("inf")


def make_estimate(answer_logps, correction=None, counted=None):
    answer_logps = torch.tensor(answer_logps)
    num_questions, m = answer_logps.shape
    logps = torch.full((num_questions, m), -2.0)
    correction = torch.zeros_like(logps) if correction is None else torch.tensor(correction)
    permutations = torch.tensor([[[1, 2], [1, 2], [2, 1]]] * num_questions)
    batch = QuestionBatch(list(range(num_questions)), counted or [True] * num_questions, num_questions)
    samples = PermutationSamples(permutations, logps, logps - correction)
    return Estimate(batch, [[0, 1]] * num_questions, [["a"]] * num_questions, samples, answer_logps)


@pytest.mark.parametrize("estimator", ["rws", "rws_centered"])
def test_weights_are_those_of_the_corrected_likelihoods(estimator):
    estimate = make_estimate([[-1.0, -2.0, -4.0]], correction=[[0.5, 0.0, -0.5]])
    weights = estimate.weigh(estimator, temperature=2.0)
    arguments = (estimate.answer_logps, estimate.samples.correction, 2.0)
    torch.testing.assert_close(weights.generator, importance_weights(*arguments))
    torch.testing.assert_close(weights.selector, selector_coefficients(*arguments, estimator))


@pytest.mark.parametrize("bad", [[NAN, -1.0, -1.0], [INF, -1.0, -1.0], [-INF, -INF, -INF]])
def test_unusable_questions_are_marked_and_leave_the_others_alone(bad):
    good = [-1.0, -2.0, -4.0]
    alone = make_estimate([good]).weigh("rws", 1.0)
    weights = make_estimate([bad, good]).weigh("rws", 1.0)
    assert weights.usable.tolist() == [False, True]
    assert all(tensor.isfinite().all() for tensor in weights)
    torch.testing.assert_close(weights.generator[1:], alone.generator)
    torch.testing.assert_close(weights.selector[1:], alone.selector)


def test_a_likelihood_of_zero_is_usable_but_for_vimco():
    estimate = make_estimate([[-INF, -1.0, -1.0]])
    assert estimate.weigh("rws", 1.0).usable.tolist() == [True]
    torch.testing.assert_close(estimate.weigh("rws", 1.0).generator, torch.tensor([[0.0, 0.5, 0.5]]))
    assert estimate.weigh("vimco", 1.0).usable.tolist() == [False]


def test_statistics_are_of_counted_questions_with_finite_weights():
    rows = [[-1.0, -1.0, -1.0], [-30.0, -31.0, -40.0], [NAN, -1.0, -1.0], [-9.0, -9.0, -9.0]]
    estimate = make_estimate(rows, counted=[True, True, True, False])
    statistics = estimate.statistics(estimate.weigh("rws", 1.0), tiny_likelihood=1e-6)
    assert statistics["masked_question_share"].tolist() == [False, False, True]
    assert statistics["tiny_likelihood_share"].tolist() == [False, True]
    assert statistics["unique_permutations"].tolist() == [2, 2, 2]
    assert statistics["elbo"].tolist() == pytest.approx([-1.0, -101 / 3])
    assert statistics["ess"][0].item() == pytest.approx(3)
    assert statistics["weight_entropy"][0].item() == pytest.approx(math.log(3))
    assert statistics["selector/entropy"].tolist() == pytest.approx([2.0, 2.0])


def test_an_estimate_without_scores_says_so():
    estimate = make_estimate([[-1.0, -1.0, -1.0]])
    estimate.answer_logps = None
    with pytest.raises(RuntimeError, match="not scored yet"):
        estimate.weigh("rws", 1.0)
