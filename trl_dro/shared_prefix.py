# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""One forward for many continuations of one prompt.

The prompt and its continuations stand in one row, one after the other. Positions restart after the prompt for each
continuation, and the mask lets each see the prompt and itself. So a prompt of 3,000 tokens with eight continuations of
25 costs 3,200 tokens and not 24,200, in the forward, its backward and its recomputation under checkpointing.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import PreTrainedConfig

from .likelihood import CompletionLogits, pad_rows


def shared_prefix_logits(
    forward: Callable[..., Any],
    config: PreTrainedConfig,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
    pad_token_id: int,
    device: torch.device,
    dtype: torch.dtype,
) -> CompletionLogits:
    """
    Logits that predict the continuations, as [`~likelihood.completion_logits`] gives them for separate rows.

    Args:
        forward (`Callable`):
            Takes `input_ids`, `attention_mask`, `position_ids`, `logits_to_keep`; returns an object with `logits`.
        config ([`~transformers.PreTrainedConfig`]):
            The model's config, which names its attention and its sliding windows.
        prompts (`list[list[int]]` of length `B`):
            Token ids of each prompt.
        continuations (`list[list[list[int]]]` of length `B`):
            Token ids of each prompt's continuations, none empty.
        pad_token_id (`int`):
            Any valid token id: padding is masked.
        device (`torch.device`):
            Device of the model.
        dtype (`torch.dtype`):
            Dtype of the model's attention, which eager attention adds the mask to.

    Returns:
        [`~likelihood.CompletionLogits`]: one row per continuation, in order.

    Raises:
        `ValueError`: the model's attention cannot take a mask of this shape.
    """
    packed = [[token for continuation in group for token in continuation] for group in continuations]
    prompt_ids, prompt_mask = pad_rows(prompts, pad_token_id, device, side="left")
    packed_ids, packed_mask = pad_rows(packed, pad_token_id, device, side="right")
    length = prompt_ids.shape[1]

    # Which continuation a column belongs to (from 1), 0 for the prompt, -1 for padding; and its position.
    segments = torch.full((len(prompts), length + packed_ids.shape[1]), -1)
    position_ids = torch.zeros_like(segments)
    for row, (prompt, group) in enumerate(zip(prompts, continuations, strict=True)):
        segments[row, length - len(prompt) : length] = 0
        position_ids[row, length - len(prompt) : length] = torch.arange(len(prompt))
        column = length
        for number, continuation in enumerate(group, start=1):
            end = column + len(continuation)
            segments[row, column:end] = number
            position_ids[row, column:end] = torch.arange(len(prompt), len(prompt) + len(continuation))
            column = end
    segments, position_ids = segments.to(device), position_ids.to(device)

    outputs = forward(
        input_ids=torch.cat([prompt_ids, packed_ids], dim=1),
        attention_mask=_attention_masks(config, segments, position_ids, dtype),
        position_ids=position_ids,
        logits_to_keep=packed_ids.shape[1] + 1,  # the prompt's last token predicts every first one
    )

    # From the packed row back to one row per continuation.
    flat = [continuation for group in continuations for continuation in group]
    tokens, mask = pad_rows(flat, pad_token_id, device, side="right")
    columns = torch.zeros(tokens.shape, dtype=torch.long)
    rows = torch.zeros(len(flat), dtype=torch.long)
    index = 0
    for row, group in enumerate(continuations):
        starts = accumulate((len(continuation) for continuation in group), initial=0)
        for start, continuation in zip(starts, group, strict=False):
            columns[index, 1 : len(continuation)] = torch.arange(start + 1, start + len(continuation))
            rows[index] = row
            index += 1
    logits = outputs.logits[rows.to(device).unsqueeze(-1), columns.to(device)]  # [continuations, longest, V]
    return CompletionLogits(logits, tokens, mask)


def _attention_masks(config: PreTrainedConfig, segments: Tensor, position_ids: Tensor, dtype: torch.dtype) -> Any:
    """Mask in the form that the model's attention takes; one for each kind of layer where windows slide in some."""
    text_config = config.get_text_config()
    check_attention(text_config._attn_implementation)
    window = getattr(text_config, "sliding_window", None)  # only models with windows have the attribute
    layer_types = set(getattr(text_config, "layer_types", None) or [])
    unknown = layer_types - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(
            f"layers of type {', '.join(sorted(unknown))} take no mask of their own, by which permutations share "
            "their prompt: use a model with attention in every layer"
        )

    def make(window: int | None) -> Any:
        return _mask(text_config._attn_implementation, segments, position_ids, window, dtype)

    if layer_types == {"full_attention"} or window is None:
        return make(None)
    if not layer_types or layer_types == {"sliding_attention"}:
        return make(window)
    return {"full_attention": make(None), "sliding_attention": make(window)}


def check_attention(attention: str | None) -> None:
    """
    Raises `ValueError` for an attention that takes no mask of its own, which a shared prompt needs (flash attention
    knows causal masks and padding only). `None` is the model's default.
    """
    if attention not in (None, "eager", "sdpa", "flex_attention"):
        raise ValueError(
            f"attn_implementation='{attention}' takes no mask of its own, by which permutations share their prompt: "
            "use sdpa, flex_attention or eager"
        )


def _mask(attention: str, segments: Tensor, position_ids: Tensor, window: int | None, dtype: torch.dtype) -> Any:
    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query_segment, key_segment = segments[batch, query], segments[batch, key]
        visible = (key_segment == query_segment) | (key_segment == 0)
        distance = position_ids[batch, query] - position_ids[batch, key]
        visible = visible & (query >= key) & (key_segment >= 0)
        return visible if window is None else visible & (distance < window)

    num_rows, length = segments.shape
    if attention == "flex_attention":
        return create_block_mask(sees, num_rows, None, length, length, device=segments.device)
    columns = torch.arange(length, device=segments.device)
    batch = torch.arange(num_rows, device=segments.device)[:, None, None]
    allowed = sees(batch, batch, columns[None, :, None], columns[None, None, :]).unsqueeze(1)  # [B, 1, S, S]
    # Padding sees itself, because a softmax over nothing is NaN.
    allowed = allowed | torch.eye(length, dtype=torch.bool, device=segments.device)
    if attention == "sdpa":
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)
