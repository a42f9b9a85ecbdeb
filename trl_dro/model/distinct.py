# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
r"""Permutations drawn without replacement: m different ones of a question, by stochastic beam search [1].

To every permutation belongs its log-probability plus a Gumbel number. The m permutations where the sum, \\( G \\), is
greatest are a sample without replacement (Gumbel top-m). Not all need be looked at: the greatest sum among those that
begin alike is itself the log-probability of the beginning plus a Gumbel number, so a beam search goes down from the
empty beginning, hands each beginning's sum to one of its continuations and smaller ones to the others, and keeps the
greatest. With \\( \kappa \\) the (m+1)-th greatest sum, a permutation is among the m with probability
\\( q(\kappa) = 1 - \exp(-\exp(\log p - \kappa)) \\), and \\( \sum_i f(z_i) \, p(z_i) / q(z_i) \\) estimates
\\( E_p[f] \\) without bias. With as many samples as there are permutations it is the exact sum.

The beams of a question stand in one row of its prompt's cache. One that goes on in two ways is not copied: the mask
lets both see it.

References:
    [1] Kool, van Hoof and Welling, Stochastic Beams and Where to Find Them, 2019,
        https://huggingface.co/papers/1903.06059
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .codec import PermutationCodec, Writer
from .permutation import allowed_logits
from .sampling import PermutationSamples, truncate_to_top_p
from .shared_prefix import PackedModel, ReadPrompts


@dataclass
class _Beam:
    """
    The beginning of a permutation.

    Args:
        writer ([`~codec.Writer`]):
            What is written.
        logp (`float`):
            Its log-probability in nats, at temperature 1.
        proposal_logp (`float`):
            The same in what is drawn from, temperature and top-p included.
        perturbed (`float`):
            Greatest sum among the permutations that begin so.
        parents (`list[int]`):
            Continuations of the prompt, as they were read, that it consists of.
    """

    writer: Writer
    logp: float
    proposal_logp: float
    perturbed: float
    parents: list[int]


@torch.no_grad()
def sample_distinct_permutations(
    model: PackedModel,
    codec: PermutationCodec,
    read: ReadPrompts,
    num_documents: Sequence[int],
    num_permutations: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    greedy: bool = False,
    seeds: Sequence[int] | None = None,
    document_logits: Sequence[Sequence[float] | None] | None = None,
) -> PermutationSamples:
    r"""
    Draws different permutations of each question from the constrained distribution, or takes the most probable ones.

    Args:
        model ([`~shared_prefix.PackedModel`]):
            The selector, in evaluation mode.
        codec ([`~codec.PermutationCodec`]):
            Form in which permutations are written.
        read ([`~shared_prefix.ReadPrompts`]):
            Selector prompts of `B` questions, read on to each question's [`~codec.PermutationCodec.forced_start`].
        num_documents (`list[int]` of length `B`):
            Number of candidates of each question.
        num_permutations (`int`):
            Samples per question, m.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits of the allowed tokens; above 1 explores.
        top_p (`float`, *optional*, defaults to `1.0`):
            Keeps the most probable allowed tokens whose tempered probabilities reach `top_p`; what is outside is
            never drawn.
        greedy (`bool`, *optional*, defaults to `False`):
            Search for the most probable permutations instead, with no Gumbel numbers: plain beam search, which is
            exact for a single choice, and where there are no more than m + 1 beginnings.
        seeds (`list[int]` of length `B`, *optional*):
            Seed of each question's draws, on which alone they depend. Drawn from the global generator by default.
        document_logits (`list[list[float]]` of length `B`, *optional*):
            Prior of each question's documents, see [`~permutation.retriever_logits`].

    Returns:
        [`~sampling.PermutationSamples`]: in the order of a draw one after the other. `proposal_logps` is
        \\( \log q(\kappa) - \log m \\), so that the mean over samples with the correction is the sum above. If there
        are fewer permutations than m, the first stands in for those that are missing, with a correction of `-inf`.
        The most probable are sorted, the first being the most probable, and their `proposal_logps` are zero.
    """
    if seeds is None:
        seeds = [0] * len(num_documents) if greedy else torch.randint(2**62, (len(num_documents),)).tolist()
    priors = [None] * len(num_documents) if document_logits is None else document_logits
    beams = []
    noise = []  # of each question: [choices, m + 1, most allowed tokens]
    for n, prior, seed in zip(num_documents, priors, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        greatest = 0.0 if greedy else _gumbel((1,), generator).item()
        beams.append([_Beam(Writer(codec, n, prior), 0.0, 0.0, greatest, [])])
        noise.append(_gumbel((codec.max_length, num_permutations + 1, codec.max_documents + 1), generator))

    logits = read.logits[[i for i, (beam,) in enumerate(beams) if beam.writer.allowed()]]
    num_read = [0] * len(beams)  # continuations of each prompt
    for choice in range(codec.max_length):
        if not any(beam.writer.allowed() for row in beams for beam in row):
            break
        if choice > 0:
            logits, read = _read_on(model, read, beams, num_read)
        beams = _grown(beams, logits, [each[choice] for each in noise], temperature, top_p, greedy)
    return _samples(beams, num_permutations, model.device, greedy)


def _read_on(
    model: PackedModel, read: ReadPrompts, beams: Sequence[Sequence[_Beam]], num_read: list[int]
) -> tuple[Tensor, ReadPrompts]:
    """
    Lets the model read what was written of the beams that are not complete, each as a new continuation of the prompt.
    Returns the predictions for them, and what is read now.
    """
    tokens: list[list[list[int]]] = []
    positions: list[list[int]] = []
    parents: list[list[list[int]]] = []
    for i, (prompt, row) in enumerate(zip(read.prompts, beams, strict=True)):
        growing = [beam for beam in row if beam.writer.allowed()]
        tokens.append([[]] * num_read[i] + [beam.writer.unread() for beam in growing])
        positions.append([0] * num_read[i] + [len(prompt) + beam.writer.num_read for beam in growing])
        parents.append([[]] * num_read[i] + [beam.parents for beam in growing])
        for beam in growing:
            beam.parents = [*beam.parents, num_read[i]]
            beam.writer.num_read = len(beam.writer.tokens)
            num_read[i] += 1
    return model.extend(read, tokens, positions, parents)


def _grown(
    beams: Sequence[Sequence[_Beam]],
    logits: Tensor,
    noise: Sequence[Tensor],
    temperature: float,
    top_p: float,
    greedy: bool,
) -> list[list[_Beam]]:
    """
    The beams with the greatest sums after one more choice, complete ones among them, the greatest first; `greedy`, the
    sums are the log-probabilities themselves.
    """
    growing = [beam for row in beams for beam in row if beam.writer.allowed()]
    allowed = [beam.writer.allowed() for beam in growing]
    branch_logits, _ = allowed_logits(logits, allowed, [beam.writer.prior() for beam in growing])
    branch_logits = branch_logits.double().cpu()
    log_p = branch_logits.log_softmax(dim=-1)  # [growing beams, most allowed tokens]
    # A broken row (NaN) is sampled as if uniform; its log p stays NaN, by which it is known later.
    log_q = (branch_logits.nan_to_num(nan=0.0, neginf=-math.inf) / temperature).log_softmax(dim=-1)
    log_q = truncate_to_top_p(log_q, top_p)
    gumbels = torch.cat(
        [
            own[: sum(bool(beam.writer.allowed()) for beam in row), : log_q.shape[1]]
            for row, own in zip(beams, noise, strict=True)
        ]
    )
    sums = torch.tensor([[beam.proposal_logp] for beam in growing], dtype=torch.double) + log_q
    if not greedy:
        greatest = torch.tensor([[beam.perturbed] for beam in growing], dtype=torch.double)
        sums = _perturbed(sums, greatest, gumbels)
    perturbed = sums.tolist()

    grown = []
    numbers = iter(range(len(growing)))
    for row, own in zip(beams, noise, strict=True):
        # Sum, beam, and which continuation of the growing beam of which number, if any
        candidates: list[tuple[float, _Beam, tuple[int, int] | None]] = []
        for beam in row:
            if not beam.writer.allowed():
                candidates.append((beam.perturbed, beam, None))
                continue
            number = next(numbers)
            candidates += [
                (perturbed[number][c], beam, (number, c))
                for c in range(len(allowed[number]))
                if perturbed[number][c] > -math.inf  # outside the nucleus
            ]
        kept = []
        for total, beam, grows in heapq.nlargest(len(own), candidates, key=lambda c: c[0]):
            if grows is None:
                kept.append(beam)
                continue
            writer = beam.writer.copy()
            writer.write(allowed[grows[0]][grows[1]])
            kept.append(
                _Beam(
                    writer,
                    beam.logp + log_p[grows].item(),
                    beam.proposal_logp + log_q[grows].item(),
                    total,
                    beam.parents,
                )
            )
        grown.append(kept)
    return grown


def _samples(
    beams: Sequence[Sequence[_Beam]], num_permutations: int, device: torch.device, greedy: bool
) -> PermutationSamples:
    permutations, logps, proposal_logps = [], [], []
    for row in beams:
        drawn, rest = list(row[:num_permutations]), row[num_permutations:]
        threshold = rest[0].perturbed if rest else -math.inf
        inclusion = log_inclusion(torch.tensor([beam.proposal_logp for beam in drawn], dtype=torch.double), threshold)
        proposals = [0.0] * len(drawn) if greedy else (inclusion - math.log(num_permutations)).tolist()
        missing = num_permutations - len(drawn)
        drawn += drawn[:1] * missing
        permutations.append([beam.writer.codec.padded(beam.writer.permutation) for beam in drawn])
        logps.append([beam.logp for beam in drawn])
        proposal_logps.append([*proposals, *[math.inf] * missing])
    return PermutationSamples(
        torch.tensor(permutations, device=device),
        torch.tensor(logps, device=device),
        torch.tensor(proposal_logps, device=device),
    )


def log_inclusion(logps: Tensor, threshold: float) -> Tensor:
    r"""
    Log-probability that a permutation is among the drawn, \\( \log(1 - \exp(-\exp(\log p - \kappa))) \\).

    Args:
        logps (`Tensor`):
            \\( \log p \\) in nats, of what is drawn from.
        threshold (`float`):
            \\( \kappa \\), the greatest sum that was left out; `-inf` if none was.

    Returns:
        `Tensor`: nats, in the shape of `logps`.

    Example:

    ```python
    >>> import torch
    >>> from trl_dro.model.distinct import log_inclusion

    >>> log_inclusion(torch.tensor([0.5]).log(), threshold=-1.0).exp()
    tensor([0.7431])
    ```
    """
    excess = logps - threshold
    # Far below the threshold 1 - exp(-x) is x, which rounding would lose.
    return torch.where(excess < -20, excess, (-torch.expm1(-excess.exp())).log())


def _perturbed(logps: Tensor, greatest: Tensor, gumbels: Tensor) -> Tensor:
    """
    Log-probabilities with Gumbel numbers added, given that the greatest sum of each row is known.

    Args:
        logps (`Tensor` of shape `(R, A)`):
            Log-probabilities of the continuations.
        greatest (`Tensor` of shape `(R, 1)`):
            The greatest sum.
        gumbels (`Tensor` of shape `(R, A)`):
            Gumbel numbers.

    Returns:
        `Tensor` of shape `(R, A)`
    """
    # Appendix B.3 of [1]: the sums are moved so that their greatest is the known one, by a function that keeps their
    # order and distribution, in a form that loses no digits.
    free = logps + gumbels
    below = free - free.amax(dim=-1, keepdim=True)
    v = greatest - free + torch.where(below > -math.log(2), (-torch.expm1(below)).log(), torch.log1p(-below.exp()))
    return greatest - v.clamp(min=0) - torch.log1p((-v.abs()).exp())


def _gumbel(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return -torch.empty(shape, dtype=torch.double).exponential_(generator=generator).log()
