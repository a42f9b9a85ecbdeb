# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Permutations drawn from the selector, exactly, all of a question behind one prompt."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .codec import PermutationCodec, Writer
from .permutation import allowed_logits
from .shared_prefix import PackedModel, ReadPrompts


# Samples of a question stand in one row, over which attention grows with the square of their number.
MAX_SAMPLES_IN_ROW = 64


class PermutationSamples(NamedTuple):
    r"""
    Permutations drawn for a batch of questions.

    Args:
        permutations (`Tensor` of shape `(B, m, K)`):
            Document ids as they are written in the prompt, from 1; zeros behind a permutation that ended early.
        logps (`Tensor` of shape `(B, m)`):
            \\( \log p(z) \\) in nats: constrained, at temperature 1.
        proposal_logps (`Tensor` of shape `(B, m)`):
            \\( \log q(z) \\) in nats: what was really sampled from, temperature and top-p included. Zero for greedy
            permutations.
    """

    permutations: Tensor
    logps: Tensor
    proposal_logps: Tensor

    @property
    def correction(self) -> Tensor:
        r"""Proposal correction \\( \log p(z) - \log q(z) \\), `(B, m)`."""
        return self.logps - self.proposal_logps


@torch.no_grad()
def sample_permutations(
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
    """
    Draws permutations from the constrained distribution. All permutations of a question share its prompt's cache; a
    forced token never costs a forward of its own, so that there are as many forwards as the longest permutation has
    branches, less the first, which the prompt's own forward decides.

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
            Keeps the most probable allowed tokens whose tempered probabilities reach `top_p`.
        greedy (`bool`, *optional*, defaults to `False`):
            Take the most probable token at every branch instead of sampling.
        seeds (`list[int]` of length `B`, *optional*):
            Seed of each question's draws, which then do not depend on the batch, the process or the device it is in.
            Drawn from the global generator by default.
        document_logits (`list[list[float]]` of length `B`, *optional*):
            Prior of each question's documents, see [`~permutation.retriever_logits`].

    Returns:
        [`PermutationSamples`]
    """
    if seeds is None:
        seeds = torch.randint(2**62, (len(num_documents),)).tolist()
    # A uniform number for every choice that each sample could have to make: [B, m, choices]
    noise = torch.stack(
        [torch.rand(num_permutations, codec.max_length, generator=torch.Generator().manual_seed(s)) for s in seeds]
    )
    priors = [None] * len(num_documents) if document_logits is None else document_logits
    questions = list(zip(num_documents, priors, strict=True))
    parts = [
        _draw(model, codec, read, questions, part, temperature, top_p, greedy)
        for part in torch.split(noise, MAX_SAMPLES_IN_ROW, dim=1)
    ]
    return PermutationSamples(*(torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)))


def _draw(
    model: PackedModel,
    codec: PermutationCodec,
    read: ReadPrompts,
    questions: Sequence[tuple[int, Sequence[float] | None]],
    noise: Tensor,
    temperature: float,
    top_p: float,
    greedy: bool,
) -> PermutationSamples:
    """
    Samples of each question in one row, by the uniform numbers `noise` of shape `(B, m, choices)`. A question is known
    by the number of its documents and their prior.
    """
    num_questions, num_permutations = noise.shape[:2]
    writers = [Writer(codec, n, prior) for n, prior in questions for _ in range(num_permutations)]  # B * m
    logps = torch.zeros(len(writers), device=model.device)
    proposal_logps = torch.zeros(len(writers), device=model.device)

    # A sample makes its choices without a pause until it is complete, so that all that are still being written are at
    # the same choice, if not at the same token.
    writing = [i for i, writer in enumerate(writers) if writer.allowed()]
    logits = read.logits.repeat_interleave(num_permutations, dim=0)[writing]
    for uniform in noise.flatten(0, 1).unbind(dim=-1):
        if not writing:
            break
        branch_logits, tokens = allowed_logits(
            logits, [writers[i].allowed() for i in writing], [writers[i].prior() for i in writing]
        )
        log_p = branch_logits.log_softmax(dim=-1)  # [being written, most allowed tokens]
        # A broken row (NaN) is sampled as if uniform; its log p stays NaN, by which it is known later.
        log_q = truncate_to_top_p((branch_logits.nan_to_num(nan=0.0) / temperature).log_softmax(dim=-1), top_p)
        chosen = (log_p.argmax(dim=-1) if greedy else inverse_cdf(log_q, uniform[writing])).unsqueeze(-1)
        logps[writing] += log_p.gather(-1, chosen).squeeze(-1)
        if not greedy:
            proposal_logps[writing] += log_q.gather(-1, chosen).squeeze(-1)
        for i, token in zip(writing, tokens.gather(-1, chosen).squeeze(-1).tolist(), strict=True):
            writers[i].write(token)
        writing = [i for i in writing if writers[i].allowed()]
        if writing:
            logits, read = _read_on(model, read, writers)

    permutations = torch.tensor([codec.padded(writer.permutation) for writer in writers], device=model.device)
    shape = (num_questions, num_permutations)
    return PermutationSamples(permutations.view(*shape, -1), logps.view(shape), proposal_logps.view(shape))


def _read_on(model: PackedModel, read: ReadPrompts, writers: Sequence[Writer]) -> tuple[Tensor, ReadPrompts]:
    """
    Lets the model read what was written since it last did: as many tokens as each choice forced, and none of what is
    complete. Returns the predictions for those that go on, and what is read now.
    """
    size = len(writers) // len(read.prompts)
    rows = [writers[start : start + size] for start in range(0, len(writers), size)]  # [B, m]
    logits, read = model.extend(
        read,
        [[writer.unread() for writer in row] for row in rows],
        [[len(prompt) + writer.num_read for writer in row] for prompt, row in zip(read.prompts, rows, strict=True)],
    )
    for writer in writers:
        writer.num_read = len(writer.tokens)
    return logits, read


def inverse_cdf(logps: Tensor, uniform: Tensor) -> Tensor:
    """
    Outcomes drawn by uniform numbers.

    Args:
        logps (`Tensor` of shape `(R, A)`):
            Log-probabilities; `-inf` is never drawn.
        uniform (`Tensor` of shape `(R,)`):
            Numbers from 0 (included) to 1 (excluded).

    Returns:
        `Tensor` of shape `(R,)`: indices.
    """
    # In double precision, a number below 1 stays below the total, so that no outcome of probability 0 is drawn.
    cumulative = logps.detach().cpu().double().exp().cumsum(dim=-1)
    thresholds = uniform.double().unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, thresholds, right=True).squeeze(-1).to(logps.device)


def truncate_to_top_p(logps: Tensor, top_p: float) -> Tensor:
    """
    Renormalised log-probabilities of the smallest set of outcomes whose probabilities reach `top_p`; `-inf` elsewhere.

    Args:
        logps (`Tensor` of shape `(R, A)`):
            Normalised log-probabilities.
        top_p (`float`):
            Between 0 (excluded) and 1 (everything is kept).

    Returns:
        `Tensor` of shape `(R, A)`
    """
    if top_p >= 1.0:
        return logps
    sorted_logps, order = logps.sort(dim=-1, descending=True)
    mass_before = sorted_logps.exp().cumsum(dim=-1) - sorted_logps.exp()
    outside = torch.zeros_like(logps, dtype=torch.bool).scatter(-1, order, mass_before >= top_p)
    return logps.masked_fill(outside, float("-inf")).log_softmax(dim=-1)
