# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import itertools
import math

import pytest
import torch

from trl_dro.model.importance import (
    effective_sample_size,
    elbo,
    importance_weights,
    iwae_bound,
    selector_coefficients,
    weight_entropy,
)


NUM_PERMUTATIONS = 12  # of 4 documents, 2 selected


@pytest.fixture
def world():
    """A random selector over 12 permutations (logits are its parameters) and random answer likelihoods."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(NUM_PERMUTATIONS, generator=generator, dtype=torch.double)
    answer_logps = 2.0 * torch.randn(NUM_PERMUTATIONS, generator=generator, dtype=torch.double) - 3.0
    return logits, answer_logps


def all_samples(logits, m):
    """Every ordered sample of m permutations, shape `(12^m, m)`, and its probability."""
    samples = torch.tensor(list(itertools.product(range(NUM_PERMUTATIONS), repeat=m)))
    return samples, logits.log_softmax(-1)[samples].sum(-1).exp()


def expected_gradient(logits, answer_logps, m, estimator):
    """Mean and total variance of the estimated gradient with respect to the logits, by enumeration."""
    samples, probabilities = all_samples(logits, m)
    coefficients = selector_coefficients(answer_logps[samples], estimator=estimator).double()
    scores = torch.eye(NUM_PERMUTATIONS, dtype=torch.double) - logits.softmax(-1)  # row z: gradient of log p(z)
    gradients = torch.einsum("si,sik->sk", coefficients, scores[samples])
    mean = probabilities @ gradients
    variance = probabilities @ (gradients - mean).square().sum(-1)
    return mean, variance


def exact_gradient(logits, answer_logps):
    parameter = logits.clone().requires_grad_()
    (parameter.log_softmax(-1) + answer_logps).logsumexp(-1).backward()
    return parameter.grad


def test_weights_are_the_posterior_over_the_sample_and_ignore_a_common_factor():
    answer_logps = torch.tensor([[0.1, 0.3, 0.6]]).log()
    torch.testing.assert_close(importance_weights(answer_logps), torch.tensor([[0.1, 0.3, 0.6]]))
    torch.testing.assert_close(importance_weights(answer_logps - 500.0), torch.tensor([[0.1, 0.3, 0.6]]))


def test_temperature_tempers_the_likelihood_and_never_the_proposal_correction():
    answer_logps, correction = torch.tensor([[-4.0, -2.0]]), torch.tensor([[1.0, 0.0]])
    torch.testing.assert_close(
        importance_weights(answer_logps, correction, temperature=2.0), torch.tensor([[-1.0, -1.0]]).softmax(-1)
    )


def test_corrected_weights_recover_the_prior_expectation_under_another_proposal(world):
    logits, answer_logps = world
    proposal = (logits / 0.5).log_softmax(-1)
    samples = torch.multinomial(proposal.exp(), 400_000, replacement=True)
    correction = (logits.log_softmax(-1) - proposal)[samples]
    weights = importance_weights(answer_logps[samples][None], correction[None])[0].double()
    estimate = torch.zeros(NUM_PERMUTATIONS, dtype=torch.double).index_add(0, samples, weights)
    posterior = (logits.log_softmax(-1) + answer_logps).softmax(-1)
    torch.testing.assert_close(estimate, posterior, atol=5e-3, rtol=0)
    uncorrected = importance_weights(answer_logps[samples][None])[0].double()
    biased = torch.zeros(NUM_PERMUTATIONS, dtype=torch.double).index_add(0, samples, uncorrected)
    assert (biased - posterior).abs().max() > 0.05


def test_effective_sample_size_and_entropy_span_their_ranges():
    uniform, single = torch.full((1, 8), 1 / 8), torch.eye(8)[:1]
    assert effective_sample_size(uniform).item() == pytest.approx(8)
    assert effective_sample_size(single).item() == pytest.approx(1)
    assert weight_entropy(uniform).item() == pytest.approx(math.log(8))
    assert weight_entropy(single).item() == 0.0


def test_bounds_are_ordered_and_tighten_with_m(world):
    logits, answer_logps = world
    exact = (logits.log_softmax(-1) + answer_logps).logsumexp(-1).item()
    means = []
    for m in (1, 2, 3):
        samples, probabilities = all_samples(logits, m)
        assert (iwae_bound(answer_logps[samples]) >= elbo(answer_logps[samples]) - 1e-5).all()
        means.append((probabilities @ iwae_bound(answer_logps[samples]).double()).item())
    assert means == sorted(means)
    assert means[-1] < exact
    samples, probabilities = all_samples(logits, 1)
    assert (probabilities @ elbo(answer_logps[samples]).double()).item() == pytest.approx(means[0], abs=1e-6)


def test_bounds_under_another_proposal_stay_below_the_evidence(world):
    logits, answer_logps = world
    exact = (logits.log_softmax(-1) + answer_logps).logsumexp(-1).item()
    proposal = (logits / 0.7).log_softmax(-1)
    samples, probabilities = all_samples(proposal, 2)
    correction = (logits.log_softmax(-1) - proposal)[samples]
    bound = (probabilities @ iwae_bound(answer_logps[samples], correction).double()).item()
    lower = (probabilities @ elbo(answer_logps[samples], correction).double()).item()
    assert lower < bound < exact


@pytest.mark.parametrize("m", [2, 3])
def test_centering_keeps_the_expectation_of_rws_and_lowers_its_variance(world, m):
    rws, rws_variance = expected_gradient(*world, m, "rws")
    centered, centered_variance = expected_gradient(*world, m, "rws_centered")
    torch.testing.assert_close(centered, rws, atol=1e-6, rtol=1e-5)
    print(f"m={m}: total variance of rws {rws_variance:.3f}, of rws_centered {centered_variance:.3f}")
    assert centered_variance < 0.8 * rws_variance


@pytest.mark.parametrize("m", [2, 3])
def test_vimco_is_the_exact_gradient_of_the_iwae_bound(world, m):
    logits, answer_logps = world
    parameter = logits.clone().requires_grad_()
    samples = torch.tensor(list(itertools.product(range(NUM_PERMUTATIONS), repeat=m)))
    probabilities = parameter.log_softmax(-1)[samples].sum(-1).exp()
    bound = (probabilities * (answer_logps[samples].logsumexp(-1) - math.log(m))).sum()
    bound.backward()
    mean, variance = expected_gradient(logits, answer_logps, m, "vimco")
    print(f"m={m}: largest difference {(mean - parameter.grad).abs().max():.1e}, total variance {variance:.3f}")
    torch.testing.assert_close(mean, parameter.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("estimator", ["rws", "rws_centered", "vimco"])
def test_every_estimator_tends_to_the_gradient_of_the_evidence(world, estimator):
    logits, answer_logps = world
    exact = exact_gradient(logits, answer_logps)
    scores = torch.eye(NUM_PERMUTATIONS, dtype=torch.double) - logits.softmax(-1)
    errors = []
    for m in (4, 16, 64):
        samples = torch.multinomial(logits.softmax(-1), 25_000 * m, replacement=True).view(-1, m)
        coefficients = selector_coefficients(answer_logps[samples], estimator=estimator).double()
        total = torch.zeros(NUM_PERMUTATIONS, dtype=torch.double).index_add(
            0, samples.flatten(), coefficients.flatten()
        )
        errors.append((total / len(samples) @ scores - exact).norm().item())
    print(f"{estimator}: distance to the exact gradient at m=4, 16, 64: {', '.join(f'{e:.4f}' for e in errors)}")
    # The bias is O(1/m): four times the samples, about a quarter of the error.
    assert errors[1] < errors[0] / 2.5 and errors[2] < errors[1] / 2.5


def test_a_single_permutation_teaches_the_selector_nothing(world):
    mean, variance = expected_gradient(*world, 1, "rws")
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-6, rtol=0)
    assert variance > 0.1
    assert selector_coefficients(torch.tensor([[-3.0]]), estimator="rws_centered").item() == 0.0
    with pytest.raises(ValueError, match="at least 2 permutations"):
        selector_coefficients(torch.tensor([[-3.0]]), estimator="vimco")


def test_centering_subtracts_the_prior_share_under_another_proposal(world):
    logits, answer_logps = world
    proposal = (logits / 0.6).log_softmax(-1)
    samples, _ = all_samples(logits, 2)
    correction = (logits.log_softmax(-1) - proposal)[samples]
    coefficients = selector_coefficients(answer_logps[samples], correction, estimator="rws_centered")
    weights = importance_weights(answer_logps[samples], correction)
    torch.testing.assert_close(coefficients, weights - correction.float().softmax(-1))
    alike = selector_coefficients(torch.zeros_like(correction), correction, estimator="rws_centered")
    torch.testing.assert_close(alike, torch.zeros_like(alike))  # nothing to learn when all answers are as likely


def test_zero_likelihoods_get_zero_weight_and_no_nan():
    weights = importance_weights(torch.tensor([[float("-inf"), -1.0, -1.0]]))
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0.5, 0.5]]))
    assert weight_entropy(weights).isfinite().all()


@pytest.mark.parametrize("bad", [[float("-inf")] * 2, [float("nan"), -1.0], [float("inf"), -1.0]])
@pytest.mark.parametrize("function", [importance_weights, elbo, iwae_bound, selector_coefficients])
def test_unusable_rows_raise_and_are_named(function, bad):
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        function(torch.tensor([[-1.0, -2.0], bad]))


def test_impossible_requests_say_what_to_do():
    with pytest.raises(ValueError, match="choose one of rws, rws_centered, vimco"):
        selector_coefficients(torch.zeros(1, 2), estimator="reinforce")
    with pytest.raises(ValueError, match="drawn from the selector itself"):
        selector_coefficients(torch.zeros(1, 2), torch.tensor([[0.0, 0.5]]), estimator="vimco")
    with pytest.raises(ValueError, match="likelihoods above zero"):
        selector_coefficients(torch.tensor([[0.0, float("-inf")]]), estimator="vimco")


def test_half_precision_input_is_weighed_in_float32():
    weights = importance_weights(torch.tensor([[-100.0, -101.0]], dtype=torch.bfloat16))
    assert weights.dtype == torch.float32
