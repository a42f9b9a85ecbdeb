# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
r"""Importance weights of sampled permutations, the bounds they estimate, and the selector's gradient estimators.

Pure functions on tensors, all in log space. One row is one question, one column is one of its `m` sampled
permutations. The same quantities under their other names: self-normalised importance sampling with the selector as
the proposal, reweighted wake-sleep [1], the importance-weighted bound [2], and VIMCO [3].

References:
    [1] Bornschein and Bengio, Reweighted Wake-Sleep, 2015, https://huggingface.co/papers/1406.2751
    [2] Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, 2016,
        https://huggingface.co/papers/1509.00519
    [3] Mnih and Rezende, Variational Inference for Monte Carlo Objectives, 2016,
        https://huggingface.co/papers/1602.06725
    [4] Shi et al., Direct Retrieval-augmented Optimization, 2025, https://huggingface.co/papers/2505.03075
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor


SelectorEstimator = Literal["rws", "rws_centered", "vimco"]
Sampling = Literal["independent", "distinct"]


def importance_weights(
    answer_logps: Tensor, proposal_correction: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    r"""Self-normalised importance weights of sampled permutations (equations 7 and 19 of [4]).

    \\( w_i \propto p(y \mid x, d_{z_i})^{1/\tau} \, p(z_i) / q(z_i) \\)

    Args:
        answer_logps (`Tensor` of shape `(B, m)`):
            \\( \log p(y \mid x, d_{z_i}) \\) in nats.
        proposal_correction (`Tensor` of shape `(B, m)`, *optional*):
            \\( \log p(z_i) - \log q(z_i) \\) in nats, needed when the permutations were not drawn from the selector
            itself. `None` stands for zeros.
        temperature (`float`, *optional*, defaults to `1.0`):
            \\( \tau \\). Values above 1 flatten the weights; the proposal correction is never tempered.

    Returns:
        `Tensor` of shape `(B, m)`: non-negative `float32`, each row sums to 1.

    Raises:
        `ValueError`: a row holds a NaN or `+inf`, or nothing but `-inf`.

    Example:

    ```python
    >>> import torch
    >>> from trl_dro.model.importance import importance_weights

    >>> importance_weights(torch.tensor([[0.1, 0.3]]).log())
    tensor([[0.2500, 0.7500]])
    ```
    """
    log_weights = _log_weights(answer_logps / temperature, proposal_correction)
    return log_weights.softmax(dim=-1)


def effective_sample_size(weights: Tensor) -> Tensor:
    r"""Effective sample size \\( 1 / \sum_i w_i^2 \\): from 1 (one permutation has all the weight) to `m` (uniform).

    Args:
        weights (`Tensor` of shape `(B, m)`):
            Self-normalised weights.

    Returns:
        `Tensor` of shape `(B,)`: effective number of permutations.
    """
    return 1.0 / weights.square().sum(dim=-1)


def weight_entropy(weights: Tensor) -> Tensor:
    r"""Entropy of the self-normalised weights, from 0 to \\( \log m \\) nats.

    Args:
        weights (`Tensor` of shape `(B, m)`):
            Self-normalised weights.

    Returns:
        `Tensor` of shape `(B,)`: nats.
    """
    return -torch.xlogy(weights, weights).sum(dim=-1)


def elbo(
    answer_logps: Tensor, proposal_correction: Tensor | None = None, sampling: Sampling = "independent"
) -> Tensor:
    r"""Evidence lower bound on \\( \log p(y \mid x) \\), estimated from `m` permutations.

    \\( \frac{1}{m} \sum_i \log p(y \mid x, d_{z_i}) + \log p(z_i) - \log q(z_i) \\). Distinct permutations are not
    drawn equally often: theirs is the p/q-weighted mean of \\( \log p(y \mid x, d_{z_i}) \\) plus the log of the mean
    p/q, which tends to 0.

    Args:
        answer_logps (`Tensor` of shape `(B, m)`):
            \\( \log p(y \mid x, d_{z_i}) \\) in nats.
        proposal_correction (`Tensor` of shape `(B, m)`, *optional*):
            \\( \log p(z_i) - \log q(z_i) \\) in nats.
        sampling (`str`, *optional*, defaults to `"independent"`):
            How the permutations were drawn, `"independent"` or `"distinct"`.

    Returns:
        `Tensor` of shape `(B,)`: nats.

    Raises:
        `ValueError`: a row holds a NaN or `+inf`, or nothing but `-inf`.
    """
    log_weights = _log_weights(answer_logps, proposal_correction)
    if sampling == "independent":
        return log_weights.mean(dim=-1)
    prior = _log_prior(answer_logps, proposal_correction)
    # Where there were fewer permutations than samples, those that are missing have a weight of 0.
    expected = torch.where(prior.isinf(), 0.0, prior.softmax(dim=-1) * answer_logps.float()).sum(dim=-1)
    return expected + prior.logsumexp(dim=-1) - math.log(prior.shape[-1])


def iwae_bound(answer_logps: Tensor, proposal_correction: Tensor | None = None) -> Tensor:
    r"""Importance-weighted bound on \\( \log p(y \mid x) \\) [2]: never below the ELBO, tight as `m` grows.

    \\( \log \frac{1}{m} \sum_i p(y \mid x, d_{z_i}) \, p(z_i) / q(z_i) \\)

    Args:
        answer_logps (`Tensor` of shape `(B, m)`):
            \\( \log p(y \mid x, d_{z_i}) \\) in nats.
        proposal_correction (`Tensor` of shape `(B, m)`, *optional*):
            \\( \log p(z_i) - \log q(z_i) \\) in nats.

    Returns:
        `Tensor` of shape `(B,)`: nats.

    Raises:
        `ValueError`: a row holds a NaN or `+inf`, or nothing but `-inf`.
    """
    log_weights = _log_weights(answer_logps, proposal_correction)
    return log_weights.logsumexp(dim=-1) - math.log(log_weights.shape[-1])


def expected_unique(logps: Tensor, proposal_correction: Tensor) -> Tensor:
    r"""Distinct permutations that m independent draws from the selector would be expected to have, estimated from m
    that were drawn otherwise: \\( \sum_z 1 - (1 - p(z))^m \\).

    Args:
        logps (`Tensor` of shape `(B, m)`):
            \\( \log p(z_i) \\) in nats.
        proposal_correction (`Tensor` of shape `(B, m)`):
            \\( \log p(z_i) - \log q(z_i) \\) in nats.

    Returns:
        `Tensor` of shape `(B,)`: number of permutations.
    """
    num_permutations = logps.shape[-1]
    drawn = -torch.expm1(num_permutations * torch.log1p(-logps.exp().clamp(max=1.0)))  # in m draws, at least once
    return ((proposal_correction - logps).exp() * drawn).mean(dim=-1)


def selector_coefficients(
    answer_logps: Tensor,
    proposal_correction: Tensor | None = None,
    temperature: float = 1.0,
    estimator: SelectorEstimator = "rws",
    present_correction: Tensor | None = None,
) -> Tensor:
    r"""Constants \\( c_i \\) of the selector's loss \\( -\sum_i c_i \log p(z_i \mid x) \\).

    - `"rws"`: \\( c_i = w_i \\) (equation 8 of [4]). Its expectation tends to \\( \nabla \log p(y \mid x) \\), with
      a bias of \\( O(1/m) \\).
    - `"rws_centered"`: \\( w_i \\) minus the self-normalised \\( p(z_i)/q(z_i) \\), which is \\( 1/m \\) when q = p.
      Then its expectation is that of `rws`, with far less noise. In later updates on the same samples p is the
      selector of that update: then the loss is the cross-entropy between the weights and the selector's own
      probabilities over the samples, which has a minimum. With 1/m throughout it would have none.
    - `"vimco"`: \\( \hat L - \hat L_{-i} \\), the IWAE bound minus the one with sample i replaced by the geometric
      mean of the others. Its expectation is the gradient of the IWAE bound for every m of 2 or more. It needs q = p.

    At `m = 1` `rws` has an expected gradient of zero (it is noise), `rws_centered` is zero, `vimco` does not exist.

    Args:
        answer_logps (`Tensor` of shape `(B, m)`):
            \\( \log p(y \mid x, d_{z_i}) \\) in nats.
        proposal_correction (`Tensor` of shape `(B, m)`, *optional*):
            \\( \log p(z_i) - \log q(z_i) \\) in nats.
        temperature (`float`, *optional*, defaults to `1.0`):
            Weight temperature, see [`importance_weights`].
        estimator (`str`, *optional*, defaults to `"rws"`):
            One of `"rws"`, `"rws_centered"`, `"vimco"`.
        present_correction (`Tensor` of shape `(B, m)`, *optional*):
            \\( \log p(z_i) - \log q(z_i) \\) in nats of the selector that is updated, where that is no longer the one
            of `proposal_correction`.

    Returns:
        `Tensor` of shape `(B, m)`: `float32`. Rows of `rws` sum to 1, rows of `rws_centered` to 0.

    Raises:
        `ValueError`: unknown estimator; a row holds a NaN or `+inf`, or nothing but `-inf`; `vimco` with m = 1, with
            a proposal correction, or with a likelihood of zero.
    """
    if estimator == "vimco":
        return _vimco_coefficients(answer_logps, proposal_correction, temperature)
    if estimator not in get_args(SelectorEstimator):
        raise ValueError(
            f"unknown selector estimator '{estimator}': choose one of {', '.join(get_args(SelectorEstimator))}"
        )
    weights = importance_weights(answer_logps, proposal_correction, temperature)
    if estimator == "rws":
        return weights
    # Under a tempered or truncated proposal the mean of the score function is not the plain average over samples
    # but the p/q-weighted one, so that is what has to be subtracted for the centring to remove noise and not signal.
    prior = proposal_correction if present_correction is None else present_correction
    return weights - _log_prior(answer_logps, prior).softmax(dim=-1)


def _vimco_coefficients(answer_logps: Tensor, proposal_correction: Tensor | None, temperature: float) -> Tensor:
    num_permutations = answer_logps.shape[-1]
    if num_permutations < 2:
        raise ValueError("vimco compares each permutation with the others: it needs at least 2 permutations")
    if proposal_correction is not None and proposal_correction.abs().max() > 1e-4:
        raise ValueError(
            "vimco needs permutations drawn from the selector itself: set temperature=1, top_p=1 and "
            "selector_likelihood='constrained', or use rws or rws_centered"
        )
    log_weights = _log_weights(answer_logps / temperature, None)
    if not log_weights.isfinite().all():
        raise ValueError("vimco needs likelihoods above zero: mask the question, or use rws or rws_centered")
    others_mean = (log_weights.sum(dim=-1, keepdim=True) - log_weights) / (num_permutations - 1)  # [B, m]
    # One row of `replaced` per left-out sample: [B, m, m], sample i on the diagonal replaced by its baseline.
    diagonal = torch.eye(num_permutations, dtype=torch.bool, device=log_weights.device)
    replaced = torch.where(diagonal, others_mean.unsqueeze(-1), log_weights.unsqueeze(-2))
    return log_weights.logsumexp(dim=-1, keepdim=True) - replaced.logsumexp(dim=-1)


def _log_prior(answer_logps: Tensor, proposal_correction: Tensor | None) -> Tensor:
    """Log of p/q, unnormalised, in float32."""
    return torch.zeros_like(answer_logps.float()) if proposal_correction is None else proposal_correction.float()


def _log_weights(answer_logps: Tensor, proposal_correction: Tensor | None) -> Tensor:
    """Unnormalised log weights in float32, refused where normalising would spread NaN."""
    log_weights = answer_logps.float()
    if proposal_correction is not None:
        log_weights = log_weights + proposal_correction.float()
    broken = log_weights.isnan().any(dim=-1) | (log_weights.amax(dim=-1).isinf())
    if broken.any():
        rows = broken.nonzero().flatten().tolist()
        raise ValueError(
            f"rows {rows} have no usable log-likelihood (NaN, +inf, or -inf for every permutation): mask these "
            "questions before weighting"
        )
    return log_weights
