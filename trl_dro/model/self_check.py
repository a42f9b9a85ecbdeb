# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Whether a loaded model computes rows that share a prompt as it computes each sequence alone.

A model may bind its attention to places in the row instead of positions (MPT, local layers of GPT-Neo), keep a state
that runs through the row (RWKV, Mamba), or ignore what it does not know: nothing in its config tells. So a few short
sequences go through it alone, which is the definition, and then in every way that training and answering use.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .likelihood import CompletionLogits, completion_logps
from .shared_prefix import PackedModel


# Largest difference that rounding makes, relative to the size of what is compared, by dtype of the weights.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.15}


class Probe(NamedTuple):
    """
    Sequences that begin alike, as they are scored and as they are written.

    Args:
        groups (`list[list[tuple[list[int], list[int]]]]` of length `2`):
            Prompts and completions; those of the first group begin alike, two of them with the same prompt.
        rows (`list[list[int]]` of length `4`):
            All prompts with their completions.
    """

    groups: list[list[tuple[list[int], list[int]]]]

    @property
    def rows(self) -> list[list[int]]:
        return [[*prompt, *completion] for group in self.groups for prompt, completion in group]


def make_probe(tokens: Sequence[int], prompt_length: int) -> Probe:
    """
    A probe of some tokens.

    Args:
        tokens (`list[int]`):
            Ordinary token ids of the model's vocabulary.
        prompt_length (`int`):
            Tokens of the longest prompt, at least 20.
    """
    stride = max(1, len(tokens) // 97)
    ids = [tokens[(stride * 7 * i + i) % len(tokens)] for i in range(prompt_length + 40)]
    prompt, rest = ids[:prompt_length], ids[prompt_length:]
    same = [(prompt, [rest[0], *rest[1:4]]), (prompt, [rest[0], *rest[5:7]])]
    other = ([*prompt[: prompt_length // 2], *rest[7:21]], rest[21:24])
    return Probe([[*same, other], [(rest[24:35], rest[35:38])]])


def largest_difference(model: PackedModel, probe: Probe, parameters: Sequence[Tensor], cached: bool) -> float:
    """
    Largest difference between what a model computes of a probe and what it computes of each sequence alone.

    Args:
        model ([`~shared_prefix.PackedModel`]):
            The model, as rows are given to it.
        probe ([`Probe`]):
            What to compute.
        parameters (`list[Tensor]`):
            Parameters whose gradients are compared too; none if none is trained.
        cached (`bool`):
            Whether prompts are read into the cache and continued from there.

    Returns:
        `float`: relative to the size of what is compared; `inf` if something is not finite.
    """
    expected = [model.forward(input_ids=_row(row, model), use_cache=False).logits[0] for row in probe.rows]
    completions = [completion for group in probe.groups for _, completion in group]
    wanted = torch.cat([logits[-len(c) - 1 : -1] for logits, c in zip(expected, completions, strict=True)])
    together = model.completion_logits(probe.groups)
    found = [_difference(together.logits, wanted)]
    if parameters:
        exact = CompletionLogits(wanted, together.tokens, together.lengths)
        gradients = [_gradient(completion, parameters) for completion in (together, exact)]
        found.append(_relative(*gradients))
    with torch.no_grad():
        alone = model.completion_logits([[row] for group in probe.groups for row in group])
        found.append(_difference(alone.logits, wanted))
        if cached:
            found += _cached_differences(model, probe, expected)
    return max(difference if difference == difference else float("inf") for difference in found)


def _cached_differences(model: PackedModel, probe: Probe, expected: Sequence[Tensor]) -> Iterator[float]:
    """Differences of prompts read once and continued, at once and token by token."""
    (first, second, _), (last,) = probe.groups
    begun = [first[1][:1], []]
    read = model.read([first[0], last[0]], begun)
    ends = [expected[0][len(first[0])], expected[3][len(last[0]) - 1]]
    yield _difference(read.logits, torch.stack(ends))
    continued = model.completion_logits([[first, second], [last]], read)
    rows = [(expected[0], first), (expected[1], second), (expected[3], last)]
    yield _difference(continued.logits, torch.cat([logits[-len(c) - 1 : -1] for logits, (_, c) in rows]))
    written = [[1, 1], [0]]
    for step in (1, 2):
        new = [[first[1][step : step + 1], second[1][step : step + 1]], [last[1][step - 1 : step]]]
        starts = [[len(first[0]) + w for w in written[0]], [len(last[0]) + w for w in written[1]]]
        written = [[w + len(t) for w, t in zip(*pair, strict=True)] for pair in zip(written, new, strict=True)]
        logits, read = model.extend(read, new, starts)
        lengths = [len(first[0]) + written[0][0], len(second[0]) + written[0][1], len(last[0]) + written[1][0]]
        yield _difference(logits, torch.stack([row[n - 1] for (row, _), n in zip(rows, lengths, strict=True)]))


def noise(model: PackedModel, probe: Probe) -> float:
    """Relative difference of two forwards of the same sequence: that of dropout, if any is left in training mode."""
    row = _row(probe.rows[0], model)
    return _difference(*(model.forward(input_ids=row, use_cache=False).logits[0] for _ in range(2)))


def _row(tokens: Sequence[int], model: PackedModel) -> Tensor:
    return torch.tensor([tokens], device=model.device)


def _gradient(completion: CompletionLogits, parameters: Sequence[Tensor]) -> Tensor:
    logps = completion_logps(completion)
    weighted = (logps * torch.arange(1.0, len(logps) + 1, device=logps.device)).sum()
    gradients: Any = torch.autograd.grad(weighted, parameters, allow_unused=True)
    return torch.cat([g.float().flatten() for g in gradients if g is not None])


def _difference(logits: Tensor, expected: Tensor) -> float:
    """Of what a softmax sees: logits up to a constant."""
    return _relative(*(each.detach().float() - each.detach().float().mean(-1, True) for each in (logits, expected)))


def _relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))
