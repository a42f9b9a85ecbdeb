# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import math

import pytest
import torch

from trl_dro.model.importance import importance_weights, selector_coefficients
from trl_dro.model.roles import ROLES
from trl_dro.model.sampling import PermutationSamples
from trl_dro.trainer.estimation import (
    Estimate,
    draw,
    load_estimates,
    reordered,
    save_estimates,
    significant_permutations,
)
from trl_dro.trainer.schedule import QuestionBatch

from ..test_faults import make_trainer
from .test_dro_trainer import gradients, make_dataset, run_step


NAN, INF = float("nan"), float("inf")


def draw_all(keys, shuffle_candidates=True, answer_target="random"):
    return draw(make_dataset(len(keys)).to_list(), keys, shuffle_candidates, answer_target)


def test_draws_depend_on_the_key_alone():
    keys = [f"row {i}" for i in range(8)]
    together = draw_all(keys)
    assert [draw_all([key]).orders[0] for key in keys] == together.orders
    assert [draw_all([key]).seeds[0] for key in keys] == together.seeds
    assert len(set(together.seeds)) == 8 and len({tuple(order) for order in together.orders}) > 1


def test_candidates_stay_in_their_order_unless_they_are_shuffled():
    assert draw_all(["a", "b"], shuffle_candidates=False).orders == [[0, 1, 2, 3]] * 2
    assert all(sorted(order) == [0, 1, 2, 3] for order in draw_all(["a", "b"]).orders)


def test_targets_are_the_first_answer_one_by_chance_or_all():
    keys = [f"row {i}" for i in range(20)]
    answers = [record["answers"] for record in make_dataset(20)]
    assert draw_all(keys, answer_target="first").targets == [[first] for first, _ in answers]
    assert draw_all(keys, answer_target="all").targets == answers
    drawn = [given.index(target) for given, [target] in zip(answers, draw_all(keys).targets, strict=True)]
    assert set(drawn) == {0, 1}


def test_reordering_moves_the_documents_alone_and_remembers_where_they_stood():
    [record] = make_dataset(1).to_list()
    [moved] = reordered([record], [[2, 0, 3, 1]])
    assert moved["documents"] == [record["documents"][i] for i in (2, 0, 3, 1)]
    assert moved.pop("retrieval_ranks") == [3, 1, 4, 2]
    assert {**moved, "documents": record["documents"]} == record


def test_estimates_of_a_block_come_back_as_they_were_written(tmp_path):
    estimates = [[make_estimate(ROWS)], [make_estimate(ROWS[:1]), make_estimate(ROWS[1:])]]
    save_estimates(3, estimates, tmp_path / "estimates.pt")
    block_index, loaded = load_estimates(tmp_path / "estimates.pt", torch.device("cpu", 0))
    assert block_index == 3 and [len(parts) for parts in loaded] == [1, 2]
    assert loaded[1][1].batch == estimates[1][1].batch
    assert torch.equal(loaded[0][0].answer_logps, estimates[0][0].answer_logps)


def make_estimate(answer_logps, correction=None, counted=None):
    answer_logps = torch.tensor(answer_logps)
    num_questions, m = answer_logps.shape
    logps = torch.full((num_questions, m), -2.0)
    correction = torch.zeros_like(logps) if correction is None else torch.tensor(correction)
    permutations = torch.tensor([[[1, 2], [1, 2], [2, 1]]] * num_questions)
    batch = QuestionBatch(list(range(num_questions)), counted or [True] * num_questions)
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


ROWS = [[-1.0, -2.0, -4.0], [-13.0, -14.0, -20.0], [-60.0, -61.0, -62.0]]
CORRECTION = [[0.5, 0.0, -0.5]] * 3


@pytest.mark.parametrize("estimator", ["rws", "rws_centered", "vimco"])
@pytest.mark.parametrize("floor", [1e-9, 1e-6, 0.5])
def test_a_likelihood_floor_scales_each_question_by_its_mean_likelihood_over_itself_plus_the_floor(estimator, floor):
    # vimco takes samples of the selector itself alone.
    estimate = make_estimate(ROWS, correction=None if estimator == "vimco" else CORRECTION)
    plain, floored = estimate.weigh(estimator), estimate.weigh(estimator, likelihood_floor=floor)
    likelihood = (estimate.answer_logps + estimate.samples.correction).double().exp().mean(dim=-1, keepdim=True)
    factor = (likelihood / (likelihood + floor)).float()
    torch.testing.assert_close(floored.generator, factor * plain.generator, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(floored.selector, factor * plain.selector, rtol=1e-5, atol=1e-12)
    assert torch.equal(floored.usable, plain.usable)


def test_a_likelihood_floor_lets_likely_answers_count_fully_and_impossible_ones_not_at_all():
    weights = make_estimate([[-0.1] * 3, [-200.0] * 3]).weigh("rws", likelihood_floor=1e-6)
    assert weights.generator.sum(dim=-1).tolist() == pytest.approx([1, 0], abs=1e-5)
    half = make_estimate([[math.log(1e-6)] * 3]).weigh("rws", likelihood_floor=1e-6)
    assert half.generator.sum().item() == pytest.approx(0.5)


@pytest.mark.parametrize("estimator", ["rws", "rws_centered", "vimco"])
def test_a_floor_of_zero_is_none_to_the_last_bit(estimator):
    rows = [*ROWS[:2], [NAN, -1.0, -1.0]]
    estimate = make_estimate(rows, correction=None if estimator == "vimco" else CORRECTION)
    with_zero, without = estimate.weigh(estimator, 1.0, 0.0), estimate.weigh(estimator, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(with_zero, without, strict=True))
    usable = without.usable
    arguments = (estimate.answer_logps[usable], estimate.samples.correction[usable], 1.0)
    assert torch.equal(without.generator[usable], importance_weights(*arguments))
    assert torch.equal(without.selector[usable], selector_coefficients(*arguments, estimator))


@pytest.mark.parametrize("bad", [[NAN, -1.0, -1.0], [-INF, -INF, -INF]])
def test_a_floor_leaves_unusable_questions_finite_and_marked(bad):
    weights = make_estimate([bad, ROWS[0]]).weigh("rws", likelihood_floor=1e-6)
    assert weights.usable.tolist() == [False, True]
    assert all(tensor.isfinite().all() for tensor in weights)


def test_statistics_of_a_floored_estimate_are_those_of_its_normalised_weights():
    estimate = make_estimate(ROWS[:2])
    plain = estimate.statistics(estimate.weigh("rws"), 1e-6)
    floored = estimate.statistics(estimate.weigh("rws", likelihood_floor=1e-4), 1e-6)
    for name in ("ess", "weight_entropy", "elbo", "iwae_bound"):
        torch.testing.assert_close(floored[name], plain[name])
    assert plain["question_weight"].tolist() == pytest.approx([1, 1])
    assert floored["question_weight"][0] > 0.99 and floored["question_weight"][1] < 0.05


def test_statistics_stay_finite_where_the_floor_leaves_no_weight():
    estimate = make_estimate([[-300.0, -301.0, -305.0]])
    statistics = estimate.statistics(estimate.weigh("rws", likelihood_floor=1e-6), 1e-6)
    assert all(values.float().isfinite().all() for values in statistics.values())


@pytest.mark.parametrize("floor, learns", [(0.0, True), (1e-6, False)])
def test_an_answer_impossible_under_all_permutations_teaches_nothing_with_a_floor(tmp_path, floor, learns):
    trainer = make_trainer(tmp_path, make_dataset(2), likelihood_floor=floor)
    answer_logps = trainer.rag.answer_logps
    trainer.rag.answer_logps = lambda *args, **kwargs: answer_logps(*args, **kwargs) - 200
    run_step(trainer)
    for role in ROLES:
        norm = gradients(trainer, role).norm()
        assert norm > 1e-2 if learns else norm < 1e-6


def test_a_floor_scales_the_gradient_of_a_question_by_its_factor(tmp_path):
    norms, factors = [], []
    for floor in (0.0, 1e-11):
        trainer = make_trainer(tmp_path, make_dataset(1), per_device_train_batch_size=1, likelihood_floor=floor)
        run_step(trainer)
        norms.append([gradients(trainer, role).norm().item() for role in ROLES])
        factors.append(trainer._means.pop()["question_weight"])
    assert factors[0] == pytest.approx(1) and 1e-3 < factors[1] < 0.999
    assert norms[1] == pytest.approx([factors[1] * norm for norm in norms[0]], rel=1e-4)


def test_only_the_lightest_permutations_are_left_out_and_none_that_is_drawn_again():
    permutations = torch.tensor([[[1, 2], [3, 4], [2, 1], [4, 1]], [[1, 2], [1, 2], [3, 1], [4, 2]]])
    weights = torch.tensor([[0.6, 0.3, 0.04, 0.06], [0.05, 0.05, 0.5, 0.4]])
    everything, kept = significant_permutations(permutations, weights, 0.0)
    assert kept.all() and torch.equal(everything, permutations)
    reduced, kept = significant_permutations(permutations, weights, 0.11)
    assert kept.tolist() == [[True, True, False, False], [False, False, True, True]]
    assert reduced[0].tolist() == [[1, 2], [3, 4], [1, 2], [1, 2]]  # nothing more to compute
    # Both copies of a permutation, or none.
    _, kept = significant_permutations(permutations, weights, 0.07)
    assert kept.tolist() == [[True, True, False, True], [True] * 4]


def test_the_heaviest_permutation_is_kept_whatever_may_be_left_out():
    permutations = torch.tensor([[[1, 2], [3, 4]]])
    _, kept = significant_permutations(permutations, torch.tensor([[0.4, 0.6]]), 0.999)
    assert kept.tolist() == [[False, True]]


def test_weights_of_zero_may_be_left_out_without_any_loss():
    permutations = torch.tensor([[[1, 2], [3, 4]]])
    _, kept = significant_permutations(permutations, torch.tensor([[0.0, 1.0]]), 0.0)
    assert kept.tolist() == [[False, True]]
