# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""One forward for sequences that begin alike.

Sequences stand in one row, one after the other, and tokens with which several begin stand there once. Positions count
along each sequence, and the mask lets a token see its own sequence only. So a prompt of 3,000 tokens with eight
permutations of 25 costs 3,200 tokens and not 24,200, in the forward, its backward and its recomputation under
checkpointing; and of the prompts for these permutations, those that begin with the same documents share these.

A token is known by an *owner*, the first sequence of its row that has it, and its position. A token of sequence `s`
sees the token that `a` owns at position `q` if `q` is not after it and below `common[s, a]`, the number of tokens with
which both sequences begin. The sequences P Q U V, P Q W and P X in one row:

    token     P  Q  U  V  W  X
    owner     0  0  0  0  1  2
    position  0  1  2  3  2  1

    P sees    #
    Q sees    #  #
    U sees    #  #  #
    V sees    #  #  #  #
    W sees    #  #        #        common[1, 0] = 2: of what 0 owns, P and Q
    X sees    #              #     common[2, 0] = 1: of what 0 owns, P

Nothing else tells where a token belongs, so that the columns may stand in any order.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache, PreTrainedConfig

from .likelihood import CompletionLogits, flat_tokens, kept_logits, pad_rows


class SharedTokens(NamedTuple):
    """
    `S` sequences of one row, tokens with which several begin stored once.

    Args:
        tokens (`list[int]` of length `L`):
            Token ids.
        owners (`list[int]` of length `L`):
            First sequence that has each token.
        positions (`list[int]` of length `L`):
            Position of each token in its sequence.
        paths (`list[list[int]]` of length `S`):
            Indices into `tokens` of each sequence's tokens.
        common (`list[list[int]]` of shape `(S, S)`):
            Number of tokens, from position 0, with which two sequences begin.
    """

    tokens: list[int]
    owners: list[int]
    positions: list[int]
    paths: list[list[int]]
    common: list[list[int]]


def share_prefixes(sequences: Sequence[Sequence[int]], first_position: int = 0) -> SharedTokens:
    """
    Packs sequences into one row.

    Args:
        sequences (`list[list[int]]` of length `S`):
            Token ids.
        first_position (`int`, *optional*, defaults to `0`):
            Position of the first token of each; all have the same tokens before it.

    Returns:
        [`SharedTokens`]
    """
    order = sorted(range(len(sequences)), key=lambda s: list(sequences[s]))
    tokens: list[int] = []
    owners: list[int] = []
    positions: list[int] = []
    paths: list[list[int]] = [[] for _ in sequences]
    common = [[first_position + len(sequence)] * len(sequences) for sequence in sequences]
    for rank, s in enumerate(order):
        # In sorted order no sequence shares more with an earlier one than its neighbours in between do.
        shared = 0 if rank == 0 else _common_length(sequences[order[rank - 1]], sequences[s])
        if rank > 0:
            previous = order[rank - 1]
            for earlier in order[:rank]:
                common[s][earlier] = common[earlier][s] = min(first_position + shared, common[previous][earlier])
            paths[s] = paths[previous][:shared]
        new = range(len(tokens), len(tokens) + len(sequences[s]) - shared)
        paths[s] = [*paths[s], *new]
        tokens.extend(sequences[s][shared:])
        owners.extend([s] * len(new))
        positions.extend(range(first_position + shared, first_position + len(sequences[s])))
    return SharedTokens(tokens, owners, positions, paths, common)


def side_by_side(
    continuations: Sequence[Sequence[int]], starts: Sequence[int], num_common: int, seen: Sequence[set[int]]
) -> SharedTokens:
    """
    Packs the next tokens of sequences whose earlier ones are read.

    Args:
        continuations (`list[list[int]]` of length `S`):
            Next token ids of each sequence, or none.
        starts (`list[int]` of length `S`):
            Position of the first of them.
        num_common (`int`):
            Number of tokens with which all sequences begin; what follows them is kept apart, even if it is alike.
        seen (`list[set[int]]` of length `S`):
            Owners of the tokens of each sequence that follow these, itself among them.

    Returns:
        [`SharedTokens`]: with paths through the next tokens only.
    """
    lengths = [len(new) for new in continuations]
    spans = list(zip(starts, lengths, strict=True))
    return SharedTokens(
        tokens=[token for new in continuations for token in new],
        owners=[s for s, length in enumerate(lengths) for _ in range(length)],
        positions=[start + i for start, length in spans for i in range(length)],
        paths=[list(range(end - n, end)) for n, end in zip(lengths, itertools.accumulate(lengths), strict=True)],
        common=[
            [start + n if a in owners else num_common for a in range(len(spans))]
            for owners, (start, n) in zip(seen, spans, strict=True)
        ],
    )


class Columns(NamedTuple):
    """Owner and position of every column of a batch of rows, both `(B, L)`; position -1 is padding."""

    owners: Tensor
    positions: Tensor

    def then(self, later: "Columns") -> "Columns":
        """These columns followed by others."""
        return Columns(*(torch.cat(pair, dim=1) for pair in zip(self, later, strict=True)))


class ReadPrompts(NamedTuple):
    """
    Prompts in the model's cache, to be continued in any number of ways.

    Args:
        prompts (`list[list[int]]` of length `B`):
            Token ids.
        begun (`list[list[int]]` of length `B`):
            Tokens read after each, with which all its continuations begin.
        cache ([`~transformers.Cache`]):
            Keys and values.
        columns ([`Columns`]):
            Owner and position of each of the cache's columns.
        logits (`Tensor` of shape `(B, V)`):
            Prediction after the last token read.
        written (`list[list[list[int]]]` of shape `(B, S)`, *optional*):
            Tokens of each continuation, kept by [`~separate_rows.SeparateRows`] alone, which has no cache.
    """

    prompts: Sequence[Sequence[int]]
    begun: Sequence[Sequence[int]]
    cache: DynamicCache
    columns: Columns
    logits: Tensor
    written: Sequence[Sequence[list[int]]] = ()

    def cut_to(self, lengths: Sequence[int]) -> "ReadPrompts":
        """The same, with what stands at these positions (one per prompt) and after them hidden."""
        positions = self.columns.positions
        ends = torch.tensor(lengths, device=positions.device).unsqueeze(-1)
        return self._replace(columns=self.columns._replace(positions=positions.masked_fill(positions >= ends, -1)))


@dataclass
class TokenCount:
    """Tokens that went through a model, without and with padding."""

    tokens: int = 0
    padded: int = 0


@dataclass
class PackedModel:
    """
    A causal language model that reads rows of sequences that begin alike.

    Args:
        forward (`Callable`):
            Takes `input_ids`, `attention_mask`, `position_ids`, `logits_to_keep` and, for [`~PackedModel.read`] and
            what follows it, `past_key_values` and `use_cache`; returns an object with `logits`.
        config ([`~transformers.PreTrainedConfig`]):
            The model's config, which names its attention and its sliding windows.
        pad_token_id (`int`):
            Any valid token id: padding is masked.
        device (`torch.device`):
            Device of the model.
        dtype (`torch.dtype`):
            Dtype of the model's attention, which eager attention adds the mask to.
        count ([`TokenCount`], *optional*):
            Counts what is read.
    """

    forward: Callable[..., Any]
    config: PreTrainedConfig
    pad_token_id: int
    device: torch.device
    dtype: torch.dtype
    count: TokenCount = field(default_factory=TokenCount)

    def completion_logits(
        self, groups: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]], read: ReadPrompts | None = None
    ) -> CompletionLogits:
        """
        Logits that predict completions, as [`~likelihood.completion_logits`] gives them, from one row per group.

        Args:
            groups (`list[list[tuple[list[int], list[int]]]]` of length `B`):
                Prompts and completions that share a row, no completion empty.
            read ([`ReadPrompts`], *optional*):
                The prompts, where each group has one and [`~PackedModel.read`] has read it. Gradients flow through.

        Returns:
            [`CompletionLogits`]: of all completions, in order.

        Raises:
            `ValueError`: the model's attention cannot take a mask of this shape.
        """
        rows, wanted = [], []
        for group in groups:
            # With the prompt in the cache its last token is read again, to predict the first of each completion.
            first = 0 if read is None else len(group[0][0]) - 1
            row = share_prefixes([[*prompt[first:], *completion[:-1]] for prompt, completion in group], first)
            rows.append(row)
            wanted.append([i for path, (_, c) in zip(row.paths, group, strict=True) for i in path[-len(c) :]])
        if read is not None:
            read = read.cut_to([len(prompt) - 1 for prompt in read.prompts])
        logits, _ = self._run(rows, wanted, read)
        completions = [completion for group in groups for _, completion in group]
        return CompletionLogits(logits, flat_tokens(completions, self.device), [len(c) for c in completions])

    def read(self, prompts: Sequence[Sequence[int]], begun: Sequence[Sequence[int]]) -> ReadPrompts:
        """
        Reads prompts, each once. The model must not be checkpointing gradients: its cache would stay empty.

        Args:
            prompts (`list[list[int]]` of length `B`):
                Token ids.
            begun (`list[list[int]]` of length `B`):
                Tokens with which every continuation of each prompt begins.

        Returns:
            [`ReadPrompts`]: with `logits` after the last token of `begun`.
        """
        rows = [[*prompt, *start] for prompt, start in zip(prompts, begun, strict=True)]
        # Padded on the right, where causal attention does not look: it needs no mask, and attention without one is
        # twice as fast. That all tokens are visible must be said, or rows of one question are taken for packed ones.
        input_ids, mask = pad_rows(rows, self.pad_token_id, self.device, side="right")
        counted = torch.arange(input_ids.shape[1], device=self.device).expand_as(input_ids)
        lasts = sorted({len(row) - 1 for row in rows})
        # Without a config every layer keeps all tokens, whatever its window: masks take care of windows.
        cache = DynamicCache()
        outputs = self.forward(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            position_ids=counted,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=torch.tensor(lasts, device=self.device),
        )
        self.count.tokens += sum(map(len, rows))
        self.count.padded += input_ids.numel()
        columns = torch.tensor([lasts.index(len(row) - 1) for row in rows], device=self.device)
        kept = kept_logits(outputs.logits, lasts, input_ids.shape[1])
        logits = kept[torch.arange(len(rows), device=self.device), columns]
        positions = counted.masked_fill(~mask, -1)
        return ReadPrompts(prompts, begun, cache, Columns(torch.zeros_like(positions), positions), logits)

    def extend(
        self,
        read: ReadPrompts,
        tokens: Sequence[Sequence[Sequence[int]]],
        positions: Sequence[Sequence[int]],
        parents: Sequence[Sequence[Sequence[int]]] | None = None,
    ) -> tuple[Tensor, ReadPrompts]:
        """
        Continues each prompt in several ways, which do not see each other unless they go on from one another.

        Args:
            read ([`ReadPrompts`]):
                Prompts and what earlier calls added to their continuations.
            tokens (`list[list[list[int]]]` of shape `(B, S)`):
                New token ids of each continuation, or none.
            positions (`list[list[int]]` of shape `(B, S)`):
                Position of the first new token of each.
            parents (`list[list[list[int]]]` of shape `(B, S)`, *optional*):
                Earlier continuations that each goes on from. By default each goes on from itself alone.

        Returns:
            `tuple[Tensor, ReadPrompts]`: predictions after the last new token of each continuation that has any,
            `(N, V)`, and what is read now.
        """
        rows = []
        for b, (prompt, begun) in enumerate(zip(read.prompts, read.begun, strict=True)):
            seen = [{s} for s in range(len(tokens[b]))]
            if parents is not None:
                seen = [{s, *ancestors} for s, ancestors in enumerate(parents[b])]
            rows.append(side_by_side(tokens[b], positions[b], len(prompt) + len(begun), seen))
        logits, read_now = self._run(rows, [[path[-1] for path in row.paths if path] for row in rows], read)
        return logits, cast(ReadPrompts, read_now)

    def _run(
        self, rows: Sequence[SharedTokens], wanted: Sequence[Sequence[int]], past: ReadPrompts | None
    ) -> tuple[Tensor, ReadPrompts | None]:
        """
        One forward over rows, behind what was read before if they continue it.

        Args:
            rows (`list[SharedTokens]` of length `B`):
                Tokens of each row.
            wanted (`list[list[int]]` of length `B`):
                Indices of the tokens of each row after which the prediction is wanted.
            past ([`ReadPrompts`], *optional*):
                What the rows continue.

        Returns:
            `tuple[Tensor, ReadPrompts]`: predictions `(T, V)`, those of a row behind those of the row before; and what
            is read now, if `past` was given.
        """
        # Logits cost most, and a model can leave out those of all but the last columns: there the wanted tokens go.
        # Masks go by owner and position, so that the order is free; a sequence alone in its row keeps its own.
        orders = []
        for row, indices in zip(rows, wanted, strict=True):
            last = set(indices)
            orders.append(sorted(range(len(row.tokens)), key=lambda index: (index in last, index)))  # noqa: B023
        num_logits = max(len(set(indices)) for indices in wanted)

        # Rows are padded on the left.
        def columns_of(values: Sequence[Sequence[int]], padding: int) -> Tensor:
            ordered = [[value[index] for index in order] for value, order in zip(values, orders, strict=True)]
            return pad_rows(ordered, padding, self.device, side="left")[0]

        input_ids = columns_of([row.tokens for row in rows], self.pad_token_id)
        query = Columns(columns_of([row.owners for row in rows], 0), columns_of([row.positions for row in rows], -1))
        key = query if past is None else past.columns.then(query)
        cached: dict[str, Any] = {}
        if past is not None:
            cached = {"past_key_values": _copy_of(past.cache), "use_cache": True}
        if past is None and all(len(row.paths) == 1 for row in rows):
            mask = (query.positions >= 0).long()  # plain rows, for which the model makes its masks itself
        else:
            mask = _attention_masks(self.config, query, key, _common_of(rows, self.device), self.dtype)
        outputs = self.forward(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=query.positions.clamp(min=0),
            logits_to_keep=num_logits,
            **cached,
        )
        self.count.tokens += sum(map(len, orders))
        self.count.padded += input_ids.numel()

        columns = []  # of the logits, for each wanted token
        for order, indices in zip(orders, wanted, strict=True):
            column = {index: i for i, index in enumerate(order, start=num_logits - len(order))}
            columns.append([column[index] for index in indices])
        batch = [b for b, indices in enumerate(wanted) for _ in indices]
        width = input_ids.shape[1]
        kept = kept_logits(outputs.logits, range(width - num_logits, width), width)
        logits = kept[torch.tensor(batch, device=self.device), flat_tokens(columns, self.device)]
        return logits, past and past._replace(cache=cached["past_key_values"], columns=key)


def check_attention(attention: str | None) -> None:
    """
    Raises `ValueError` for an attention that takes no mask of its own, which a shared prefix needs: flash attention
    knows causal masks and padding only. `None` is the model's default.
    """
    if attention not in (None, "eager", "sdpa", "flex_attention"):
        raise ValueError(
            f"attn_implementation='{attention}' takes no mask of its own, by which permutations share their prompt: "
            "use sdpa, flex_attention or eager, or set shared_prefix='never'"
        )


def check_layers(config: PreTrainedConfig) -> None:
    """Raises `ValueError` for a model some layers of which are no attention over all tokens or a window of them."""
    unknown = _layer_types(config) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(
            f"layers of type {', '.join(sorted(unknown))} take no mask of their own, by which permutations share "
            "their prompt"
        )


def _layer_types(config: PreTrainedConfig) -> set[str]:
    return set(getattr(config.get_text_config(), "layer_types", None) or [])  # not all models have the attribute


def _attention_masks(
    config: PreTrainedConfig, query: Columns, key: Columns, common: Tensor, dtype: torch.dtype
) -> Any:
    """
    Mask in the form that the model's attention takes; one for each kind of layer where windows slide in some. The
    query's columns are the last of the key's.
    """
    attention = config.get_text_config()._attn_implementation
    check_attention(attention)
    check_layers(config)
    window = getattr(config.get_text_config(), "sliding_window", None)  # only models with windows have the attribute
    layer_types = _layer_types(config)

    def make(window: int | None) -> Any:
        return _mask(attention, query, key, common, window, dtype)

    if layer_types == {"full_attention"} or window is None:
        return make(None)
    if not layer_types or layer_types == {"sliding_attention"}:
        return make(window)
    return {"full_attention": make(None), "sliding_attention": make(window)}


def _mask(attention: str, query: Columns, key: Columns, common: Tensor, window: int | None, dtype: torch.dtype) -> Any:
    def sees(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        position, key_position = query.positions[batch, i], key.positions[batch, j]
        visible = (key_position >= 0) & (key_position <= position)
        visible = visible & (key_position < common[batch, query.owners[batch, i], key.owners[batch, j]])
        return visible if window is None else visible & (position - key_position < window)

    num_rows, num_queries = query.positions.shape
    num_keys, device = key.positions.shape[1], key.positions.device
    if attention == "flex_attention":
        return create_block_mask(sees, num_rows, None, num_queries, num_keys, device=device)
    batch = torch.arange(num_rows, device=device)[:, None, None]
    i, j = torch.arange(num_queries, device=device)[:, None], torch.arange(num_keys, device=device)
    allowed = sees(batch, batch, i, j).unsqueeze(1)  # [B, 1, Q, K]
    # Padding sees itself, because a softmax over nothing is NaN.
    allowed = allowed | (i + num_keys - num_queries == j)
    if attention == "sdpa":
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill(~allowed, torch.finfo(dtype).min)


def _common_of(rows: Sequence[SharedTokens], device: torch.device) -> Tensor:
    """`common` of each row, `(B, S, S)`, zero where a row has fewer sequences."""
    size = max(len(row.common) for row in rows)
    common = torch.zeros(len(rows), size, size, dtype=torch.long)
    for b, row in enumerate(rows):
        common[b, : len(row.common), : len(row.common)] = torch.tensor(row.common)
    return common.to(device)


def _copy_of(cache: DynamicCache) -> DynamicCache:
    """A cache that can grow by itself. Tensors are shared, as growing replaces them."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
