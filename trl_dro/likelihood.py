# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""One padded forward over prompts and their completions, and the log-probabilities read off it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class CompletionLogits:
    """
    Logits that predict the completions.

    Args:
        logits (`Tensor` of shape `(R, L, V)`):
            `logits[r, t]` predicts token `t` of completion `r`; `L` is the longest completion.
        tokens (`Tensor` of shape `(R, L)`):
            Completion tokens, padded on the right.
        mask (`Tensor` of shape `(R, L)`):
            True where there is a token.
    """

    logits: Tensor
    tokens: Tensor
    mask: Tensor


def completion_logits(
    forward: Callable[..., Any],
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad_token_id: int,
    device: torch.device,
) -> CompletionLogits:
    """
    One forward over rows of prompt and completion. Prompts are padded on the left and completions on the right, so
    that all completions begin in the same column and only their logits are computed.

    Args:
        forward (`Callable`):
            Takes `input_ids`, `attention_mask`, `position_ids`, `logits_to_keep`; returns an object with `logits`.
        prompts (`list[list[int]]` of length `R`):
            Prompt token ids.
        completions (`list[list[int]]` of length `R`):
            Completion token ids, none empty.
        pad_token_id (`int`):
            Any valid token id: padding is masked.
        device (`torch.device`):
            Device of the model.

    Returns:
        [`CompletionLogits`]
    """
    prompt_ids, prompt_mask = pad_rows(prompts, pad_token_id, device, side="left")
    tokens, mask = pad_rows(completions, pad_token_id, device, side="right")
    attention_mask = torch.cat([prompt_mask, mask], dim=1)
    outputs = forward(
        input_ids=torch.cat([prompt_ids, tokens], dim=1),
        attention_mask=attention_mask.long(),
        position_ids=positions(attention_mask),
        logits_to_keep=tokens.shape[1] + 1,
    )
    return CompletionLogits(outputs.logits[:, :-1], tokens, mask)


def completion_logps(completion: CompletionLogits, mean: bool = False) -> Tensor:
    r"""
    Log-probability of each completion, \\( \sum_t \log p(c_t \mid c_{<t}) \\), in `float32`.

    Args:
        completion ([`CompletionLogits`]):
            Output of [`completion_logits`].
        mean (`bool`, *optional*, defaults to `False`):
            Divide by the number of tokens.

    Returns:
        `Tensor` of shape `(R,)`: nats, or nats per token.
    """
    logits = completion.logits.float()
    token_logps = logits.gather(-1, completion.tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)
    total = token_logps.masked_fill(~completion.mask, 0.0).sum(dim=-1)
    return total / completion.mask.sum(dim=-1) if mean else total


def pad_rows(
    rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device, side: str
) -> tuple[Tensor, Tensor]:
    """Token ids `(R, L)` and mask `(R, L)` of ragged rows, padded on `side` (`"left"` or `"right"`)."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, columns] = torch.tensor(row, dtype=torch.long)
        mask[i, columns] = True
    return ids.to(device), mask.to(device)


def positions(attention_mask: Tensor) -> Tensor:
    """Position ids that count tokens and skip padding, `(R, L)`."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)
