# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Log-probabilities of completions, and the plain forward that defines them: one row per completion."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


# Logits are turned into float32 this many at a time: 128 MB.
MAX_FLOAT_LOGITS = 2**25


@dataclass
class CompletionLogits:
    """
    Logits that predict the tokens of `R` completions, `T` tokens in all, one completion after the other.

    Args:
        logits (`Tensor` of shape `(T, V)`):
            `logits[t]` predicts token `t`.
        tokens (`Tensor` of shape `(T,)`):
            Token ids.
        lengths (`list[int]` of length `R`):
            Tokens of each completion.
    """

    logits: Tensor
    tokens: Tensor
    lengths: list[int]


def completion_logits(
    forward: Callable[..., Any],
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad_token_id: int,
    device: torch.device,
) -> CompletionLogits:
    """
    The definition: every completion in a row of its own behind its prompt. What [`~shared_prefix.PackedModel`]
    computes must equal it.

    Args:
        forward (`Callable`):
            Takes `input_ids`, `use_cache`, `logits_to_keep`; returns an object with `logits`.
        prompts (`list[list[int]]` of length `R`):
            Prompt token ids.
        completions (`list[list[int]]` of length `R`):
            Completion token ids, none empty.
        pad_token_id (`int`):
            Any valid token id: nothing sees it.
        device (`torch.device`):
            Device of the model.

    Returns:
        [`CompletionLogits`]
    """
    # The last token is predicted and predicts nothing.
    rows = [[*prompt, *completion[:-1]] for prompt, completion in zip(prompts, completions, strict=True)]
    lengths = [len(completion) for completion in completions]
    logits = last_logits(forward, rows, lengths, pad_token_id, device)
    return CompletionLogits(torch.cat(logits), flat_tokens(completions, device), lengths)


def last_logits(
    forward: Callable[..., Any],
    rows: Sequence[Sequence[int]],
    lengths: Sequence[int],
    pad_token_id: int,
    device: torch.device,
) -> list[Tensor]:
    """
    Predictions after the last tokens of rows that are padded on the right: what is causal does not see the padding,
    so that the model is told of neither masks nor positions and can get none wrong.

    Args:
        forward (`Callable`):
            As in [`completion_logits`].
        rows (`list[list[int]]` of length `R`):
            Token ids.
        lengths (`list[int]` of length `R`):
            Number of tokens of each row, the last ones, after which the prediction is wanted.
        pad_token_id (`int`):
            Any valid token id.
        device (`torch.device`):
            Device of the model.

    Returns:
        `list[Tensor]` of length `R`: each `(length, V)`.
    """
    input_ids, _ = pad_rows(rows, pad_token_id, device, side="right")
    spans = [range(len(row) - length, len(row)) for row, length in zip(rows, lengths, strict=True)]
    kept = sorted({column for span in spans for column in span})
    outputs = forward(input_ids=input_ids, use_cache=False, logits_to_keep=torch.tensor(kept, device=device))
    logits = kept_logits(outputs.logits, kept, input_ids.shape[1])
    place = {column: i for i, column in enumerate(kept)}
    return [logits[row, [place[column] for column in span]] for row, span in enumerate(spans)]


def kept_logits(logits: Tensor, kept: Sequence[int], width: int) -> Tensor:
    """
    Logits of the columns `kept`, which were asked for by `logits_to_keep`: a model may have swallowed that.

    Args:
        logits (`Tensor` of shape `(B, len(kept), V)` or `(B, width, V)`):
            What the model gave.
        kept (`list[int]`):
            Columns whose logits were asked for.
        width (`int`):
            Columns of the forward.

    Returns:
        `Tensor` of shape `(B, len(kept), V)`

    Raises:
        `ValueError`: the model gave logits of other columns.
    """
    if logits.shape[1] == len(kept):
        return logits
    if logits.shape[1] != width:
        raise ValueError(
            f"the model gave logits of {logits.shape[1]} columns where {len(kept)} of {width} were asked for by "
            "logits_to_keep: it cannot be used"
        )
    return logits[:, list(kept)]


def completion_logps(completion: CompletionLogits, mean: bool = False) -> Tensor:
    r"""
    Log-probability of each completion, \\( \sum_t \log p(c_t \mid c_{<t}) \\), in `float32`.

    Args:
        completion ([`CompletionLogits`]):
            Logits of `R` completions.
        mean (`bool`, *optional*, defaults to `False`):
            Divide by the number of tokens.

    Returns:
        `Tensor` of shape `(R,)`: nats, or nats per token.
    """
    logits, tokens = completion.logits, completion.tokens
    size = max(1, MAX_FLOAT_LOGITS // logits.shape[-1])
    if len(tokens) <= size:
        token_logps = _token_logps(logits, tokens)
    else:
        # Kept for the backward is what the model gave, and no float32 copy of it.
        parts = zip(torch.split(logits, size), torch.split(tokens, size), strict=True)
        token_logps = torch.cat([checkpoint(_token_logps, *part, use_reentrant=False) for part in parts])
    lengths = torch.tensor(completion.lengths, device=logits.device)
    rows = torch.arange(len(lengths), device=logits.device).repeat_interleave(lengths, output_size=len(tokens))
    total = torch.zeros(len(lengths), device=logits.device).index_add(0, rows, token_logps)
    return total / lengths if mean else total


def flat_tokens(completions: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token ids of all completions, one after the other, `(T,)`."""
    return torch.tensor([token for completion in completions for token in completion], device=device)


def pad_rows(
    rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device, side: str
) -> tuple[Tensor, Tensor]:
    """
    Ragged rows of token ids as a tensor.

    Args:
        rows (`list[list[int]]` of length `R`):
            Token ids.
        pad_token_id (`int`):
            Any valid token id: padding is masked.
        device (`torch.device`):
            Device of the result.
        side (`str`):
            Where to pad, `"left"` or `"right"`.

    Returns:
        `tuple[Tensor, Tensor]`: token ids, and a mask that is false in the padding, both `(R, L)`.
    """
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, columns] = torch.tensor(row, dtype=torch.long)
        mask[i, columns] = True
    return ids.to(device), mask.to(device)


def chunk_rows(lengths: Sequence[int], max_tokens: int | None) -> list[list[int]]:
    """
    Rows in chunks that, padded to their longest, have at most `max_tokens` tokens; a longer row is alone.

    Args:
        lengths (`list[int]`):
            Tokens of each row.
        max_tokens (`int`, *optional*):
            Padded tokens of a chunk; `None` puts all rows in one.

    Returns:
        `list[list[int]]`: row indices, those of similar length together.
    """
    if max_tokens is None:
        return [list(range(len(lengths)))] if lengths else []
    chunks: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not chunks or (len(chunks[-1]) + 1) * lengths[row] > max_tokens:
            chunks.append([])
        chunks[-1].append(row)
    return chunks


def _token_logps(logits: Tensor, tokens: Tensor) -> Tensor:
    logits = logits.float()
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)
