# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""What chance decides in an E-step, and what it leaves for the M-step: sampled permutations, how likely they make the
answer, and their weights."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..model.importance import (
    Sampling,
    SelectorEstimator,
    effective_sample_size,
    elbo,
    expected_unique,
    importance_weights,
    iwae_bound,
    selector_coefficients,
    weight_entropy,
)
from ..model.sampling import PermutationSamples
from ..model.shared_prefix import ReadPrompts
from .schedule import QuestionBatch


AnswerTarget = Literal["first", "random", "all"]


class Draws(NamedTuple):
    """
    What chance decides about `B` questions before their permutations are sampled.

    Args:
        orders (`list[list[int]]` of length `B`):
            Candidate shown at each place of the selector's prompt.
        targets (`list[list[str]]` of length `B`):
            Answers whose likelihoods are summed.
        seeds (`list[int]` of length `B`):
            Seed of each question's permutations.
    """

    orders: list[list[int]]
    targets: list[list[str]]
    seeds: list[int]


def draw(
    records: Sequence[Mapping[str, Any]], keys: Sequence[str], shuffle_candidates: bool, answer_target: AnswerTarget
) -> Draws:
    """
    Draws order, target and seed of each question, which depend on its key and not on the batch or process it is in.

    Args:
        records (`list[dict]` of length `B`):
            Questions with `answers` and `documents`.
        keys (`list[str]` of length `B`):
            Names each question's draws: the same key gives the same ones.
        shuffle_candidates (`bool`):
            Whether to shuffle the candidates.
        answer_target (`str`):
            Which answers are the target: the `"first"`, a `"random"` one, or `"all"`.

    Returns:
        [`Draws`]
    """
    draws = Draws([], [], [])
    for record, key in zip(records, keys, strict=True):
        rng = random.Random(key)
        order, answers = list(range(len(record["documents"]))), record["answers"]
        draws.orders.append(rng.sample(order, len(order)) if shuffle_candidates else order)
        if answer_target == "all":
            draws.targets.append(answers)
        else:
            draws.targets.append([rng.choice(answers) if answer_target == "random" else answers[0]])
        draws.seeds.append(rng.getrandbits(62))
    return draws


def reordered(records: Sequence[dict[str, Any]], orders: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """
    Records with their documents as they are shown to the selector, and their places in the retriever's order under
    `retrieval_ranks`.

    Args:
        records (`list[dict]` of length `B`):
            Questions with `documents`.
        orders (`list[list[int]]` of length `B`):
            See [`Draws`].

    Returns:
        `list[dict]` of length `B`
    """
    return [
        {
            **record,
            "documents": [record["documents"][i] for i in order],
            "retrieval_ranks": [i + 1 for i in order],
        }
        for record, order in zip(records, orders, strict=True)
    ]


class Weights(NamedTuple):
    """
    Weights of `B` questions with `m` permutations each, constant in the M-step.

    Args:
        importance (`Tensor` of shape `(B, m)`):
            Self-normalised importance weights.
        selector (`Tensor` of shape `(B, m)`):
            Coefficients of the selector's estimator, times the question's weight.
        question_weight (`Tensor` of shape `(B,)`):
            From 0 to 1 under a likelihood floor, 1 without.
        usable (`Tensor` of shape `(B,)`):
            False where a NaN, or a likelihood of zero under every permutation, leaves nothing to weigh.
    """

    importance: Tensor
    selector: Tensor
    question_weight: Tensor
    usable: Tensor

    @property
    def generator(self) -> Tensor:
        """Weights of the generator's loss, `(B, m)`: importance weights, times the question's weight."""
        return self.question_weight.unsqueeze(-1) * self.importance


@dataclass
class Estimate:
    r"""
    What the E-step leaves for one micro-batch of `B` questions.

    Args:
        batch ([`~schedule.QuestionBatch`]):
            Rows of the training set.
        orders (`list[list[int]]` of length `B`):
            See [`Draws`].
        targets (`list[list[str]]` of length `B`):
            See [`Draws`].
        samples ([`~sampling.PermutationSamples`]):
            Permutations of the candidates as shown.
        answer_logps (`Tensor` of shape `(B, m)`, *optional*):
            \\( \log p(y \mid x, d_{z_i}) \\) in nats; filled by the E-step, or where the estimate serves one update by
            the forward of the generator's loss.
        significant (`tuple[Tensor, Tensor]`, *optional*):
            See [`significant_permutations`]; what the generator's loss goes through where it may leave something out.
        read ([`~shared_prefix.ReadPrompts`], *optional*):
            Selector prompts in the cache, with the graph that the selector's gradient flows through; taken by the
            forward of its loss.
    """

    batch: QuestionBatch
    orders: list[list[int]]
    targets: list[list[str]]
    samples: PermutationSamples
    answer_logps: Tensor | None = None
    significant: tuple[Tensor, Tensor] | None = None
    read: ReadPrompts | None = None

    @property
    def counted(self) -> Tensor:
        """False for questions repeated only to give every process as many, `(B,)`."""
        return torch.tensor(self.batch.counted, device=self.samples.logps.device)

    def weigh(
        self,
        estimator: SelectorEstimator,
        temperature: float = 1.0,
        likelihood_floor: float = 0.0,
        selector_logps: Tensor | None = None,
        document_cost: float = 0.0,
    ) -> Weights:
        r"""
        Weights of both roles' losses.

        Args:
            estimator (`str`):
                See [`~importance.selector_coefficients`].
            temperature (`float`, *optional*, defaults to `1.0`):
                See [`~importance.importance_weights`].
            likelihood_floor (`float`, *optional*, defaults to `0.0`):
                \\( f \\) in the factor \\( \bar p / (\bar p + f) \\) of each question, \\( \bar p \\) being its mean
                likelihood over permutations.
            selector_logps (`Tensor` of shape `(B, m)`, *optional*):
                \\( \log p(z_i \mid x) \\) in nats under the selector that is updated, if it was updated since the
                E-step.
            document_cost (`float`, *optional*, defaults to `0.0`):
                Nats that each document of a permutation must be worth.

        Returns:
            [`Weights`]
        """
        answer_logps, correction = self._scored()
        log_weights = answer_logps + correction
        # Likelihoods of zero are weights of zero, which only vimco cannot do with.
        usable = log_weights.isfinite().all(dim=-1) if estimator == "vimco" else log_weights.amax(dim=-1).isfinite()
        # Unusable rows are weighed as if all alike and masked in the loss.
        answer_logps = torch.where(usable.unsqueeze(-1), answer_logps, 0.0)
        correction = torch.where(usable.unsqueeze(-1), correction, 0.0)
        question_weight = torch.ones_like(answer_logps[:, 0])
        if likelihood_floor > 0:
            question_weight = (iwae_bound(answer_logps, correction) - math.log(likelihood_floor)).sigmoid()
        worth = answer_logps - document_cost * (self.samples.permutations > 0).sum(dim=-1)
        present = None
        if selector_logps is not None:
            present = selector_logps - self.samples.proposal_logps
            known = present.isfinite() | correction.isneginf()  # there can be fewer permutations than samples
            present = torch.where(known.all(dim=-1, keepdim=True), present, correction)
        coefficients = selector_coefficients(worth, correction, temperature, estimator, present)
        return Weights(
            importance_weights(worth, correction, temperature),
            question_weight.unsqueeze(-1) * coefficients,
            question_weight,
            usable,
        )

    def statistics(
        self,
        weights: Weights,
        tiny_likelihood: float,
        sampling: Sampling = "independent",
        may_end: bool = False,
    ) -> dict[str, Tensor]:
        """
        Quantities to log, one value per question that counts and, but for the first and last, has finite weights.

        Args:
            weights ([`Weights`]):
                Output of [`~Estimate.weigh`].
            tiny_likelihood (`float`):
                Likelihood below which a permutation says nothing.
            sampling (`str`, *optional*, defaults to `"independent"`):
                How the permutations were drawn.
            may_end (`bool`, *optional*, defaults to `False`):
                Whether permutations can have fewer than K documents.

        Returns:
            `dict[str, Tensor]`: each of shape `(up to B,)`; entropies and bounds in nats.
        """
        answer_logps, correction = self._scored()
        missing = self.samples.proposal_logps.isposinf()  # where there are fewer permutations than samples
        kept = self.counted & ((answer_logps + correction).isfinite() | missing).all(dim=-1)
        answer_logps, correction, logps = answer_logps[kept], correction[kept], self.samples.logps[kept]
        unique = [len({tuple(z) for z in samples}) for samples in self.samples.permutations[self.counted].tolist()]
        num_documents = (self.samples.permutations[kept] > 0).sum(dim=-1)
        statistics = {
            "masked_question_share": ~weights.usable[self.counted],
            "elbo": elbo(answer_logps, correction, sampling),
            "iwae_bound": iwae_bound(answer_logps, correction),
            "ess": effective_sample_size(weights.importance[kept]),
            "weight_entropy": weight_entropy(weights.importance[kept]),
            "question_weight": weights.question_weight[kept],
            "tiny_likelihood_share": answer_logps.amax(dim=-1) < math.log(tiny_likelihood),
            # -E_p[log p], with the samples of another proposal weighted by p/q.
            "selector/entropy": -(correction.softmax(dim=-1) * logps).sum(dim=-1),
            "unique_permutations": torch.tensor(unique),
        }
        if may_end:
            statistics["selector/documents"] = (correction.softmax(dim=-1) * num_documents).sum(dim=-1)
        if self.significant is not None:
            left_out = ~self.significant[1][self.counted]
            statistics["generator/skipped_share"] = left_out.float().mean(dim=-1)
            statistics["generator/skipped_weight"] = (left_out * weights.importance[self.counted]).sum(dim=-1)
        if sampling == "distinct":
            statistics["expected_unique"] = expected_unique(logps, correction)
        return statistics

    def _scored(self) -> tuple[Tensor, Tensor]:
        if self.answer_logps is None:
            raise RuntimeError("the answers of this estimate were not scored yet")
        return self.answer_logps, self.samples.correction


def save_estimates(block_index: int, estimates: list[list[Estimate]], path: str | Path) -> None:
    """Writes the estimates of a block, by micro-batch and part of it, for [`load_estimates`]."""
    torch.save((block_index, estimates), path)


def load_estimates(path: str | Path, device: torch.device) -> tuple[int, list[list[Estimate]]]:
    """Index of a block and its estimates, as [`save_estimates`] wrote them, on `device`."""
    with torch.serialization.safe_globals([Estimate, QuestionBatch, PermutationSamples]):
        # torch.load does not know the device "cpu:0", which a process of several has.
        block_index, estimates = torch.load(path, map_location="cpu" if device.type == "cpu" else device)
    return block_index, estimates


def significant_permutations(permutations: Tensor, weights: Tensor, negligible: float) -> tuple[Tensor, Tensor]:
    """
    Permutations without those whose weights are negligible. A generator's gradient is a weighted mean over
    permutations, so leaving out a share of the weight leaves out that share of the mean.

    Args:
        permutations (`Tensor` of shape `(B, m, K)`):
            Places in the prompt, from 1.
        weights (`Tensor` of shape `(B, m)`):
            Importance weights.
        negligible (`float`):
            Share of a question's weight that may be left out, lightest permutations first.

    Returns:
        `tuple[Tensor, Tensor]`: the permutations, `(B, m, K)`, where the question's heaviest stands in for each that
        is left out, so that it costs nothing to compute; and which are kept, `(B, m)`.
    """
    order = weights.argsort(dim=-1)
    left_out = weights.gather(-1, order).cumsum(dim=-1) <= negligible
    left_out[:, -1] = False
    kept = torch.ones_like(left_out).scatter(-1, order, ~left_out)
    # A permutation that was drawn again is computed once: it is kept whole.
    same = (permutations.unsqueeze(2) == permutations.unsqueeze(1)).all(dim=-1)  # [B, m, m]
    kept = (same & kept.unsqueeze(1)).any(dim=-1)
    heaviest = permutations.gather(1, order[:, -1:, None].expand(-1, 1, permutations.shape[-1]))
    return torch.where(kept.unsqueeze(-1), permutations, heaviest), kept
