# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
r"""A selector that is asked, of each document by itself, how likely it makes the question.

\\( s_i = \tau \log p(x \mid d_i) \\) is the logit of document i at every choice, so that the selector's distribution
over permutations is Plackett and Luce's, exact as the written one: \\( p(z \mid x) = \prod_t \exp s_{z_t} / \sum_{i
\notin z_{<t}} \exp s_i \\). Language models know this likelihood before any training (Sachan et al. 2022 [1]), where
the smaller ones have to learn first what the number of a passage is. If a permutation may end early, the end has the
logit of the question without any document: a document must make the question more likely than nothing does.

What is drawn and scored is the same as where ids are written: the documents stand for a vocabulary of their own, and
[`ScoredDocuments`] for the model that predicts them.

References:
    [1] Sachan et al., Improving Passage Retrieval with Zero-Shot Question Generation, 2022,
        https://huggingface.co/papers/2204.07496
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from .likelihood import CompletionLogits, chunk_rows, completion_logps, flat_tokens
from .prompts import PassageRow
from .shared_prefix import Columns, PackedModel, ReadPrompts


SelectorForm = Literal["permutation", "query_likelihood"]


class ScoredDocuments:
    """
    Takes the place of a [`~shared_prefix.PackedModel`] where documents have logits of their own: token `i` is the
    document at place `i`, token 0 is the end, and the prediction is the same whatever was chosen before, as those that
    were chosen are not allowed any more.

    Args:
        device (`torch.device`):
            Device of the logits.
    """

    def __init__(self, device: torch.device):
        self.device = device

    def read(self, scores: Sequence[Tensor], num_documents: Sequence[int], max_documents: int) -> ReadPrompts:
        """
        Logits as [`~shared_prefix.PackedModel.read`] gives them.

        Args:
            scores (`list[Tensor]` of length `B`):
                Logits of each question's documents, and behind them of the end if it may come early.
            num_documents (`list[int]` of length `B`):
                Number of its documents.
            max_documents (`int`):
                Highest place.

        Returns:
            [`~shared_prefix.ReadPrompts`]: with `logits` of shape `(B, max_documents + 1)`.
        """
        rows = []
        for own, n in zip(scores, num_documents, strict=True):
            end = own[n:] if len(own) > n else own.new_zeros(1)
            rows.append(torch.cat([end, own[:n], own.new_zeros(max_documents - n)]))
        nothing = Columns(torch.zeros(0, device=self.device), torch.zeros(0, device=self.device))
        none: list[list[int]] = [[] for _ in scores]
        return ReadPrompts(none, none, DynamicCache(), nothing, torch.stack(rows))

    def extend(
        self,
        read: ReadPrompts,
        tokens: Sequence[Sequence[Sequence[int]]],
        positions: Sequence[Sequence[int]],
        parents: Sequence[Sequence[Sequence[int]]] | None = None,
    ) -> tuple[Tensor, ReadPrompts]:
        """As [`~shared_prefix.PackedModel.extend`]."""
        counts = torch.tensor([sum(bool(new) for new in row) for row in tokens], device=self.device)
        return read.logits.repeat_interleave(counts, dim=0), read

    def completion_logits(
        self, groups: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]], read: ReadPrompts
    ) -> CompletionLogits:
        """As [`~shared_prefix.PackedModel.completion_logits`], of what was read before."""
        completions = [completion for group in groups for _, completion in group]
        counts = torch.tensor([sum(len(c) for _, c in group) for group in groups], device=self.device)
        logits = read.logits.repeat_interleave(counts, dim=0)
        return CompletionLogits(logits, flat_tokens(completions, self.device), [len(c) for c in completions])


def question_logps(
    reader: PackedModel,
    asked: Sequence[Sequence[PassageRow]],
    in_chunks: Callable[[Callable[[list[int]], Sequence[Tensor]], Sequence[int]], list[Tensor]],
    recompute: bool,
    negligible: float = 0.0,
    max_tokens: int | None = None,
) -> list[Tensor]:
    r"""
    \\( \log p(x \mid d_i) \\), every row by itself.

    Args:
        reader ([`~shared_prefix.PackedModel`]):
            The selector.
        asked (`list[list[tuple[list[int], list[int]]]]` of length `B`):
            Rows of each question, see [`~prompts.PassagePrompts.rows`].
        in_chunks (`Callable`):
            Runs a function of rows over as many at a time as fit, by the rows' tokens.
        recompute (`bool`):
            Whether gradients come from rows that the backward computes again, see [`recomputed`], and not from a graph
            of all.
        negligible (`float`, *optional*, defaults to `0.0`):
            See [`recomputed`].
        max_tokens (`int`, *optional*):
            Padded tokens that the backward computes again at once.

    Returns:
        `list[Tensor]` of length `B`: nats, one for each row.
    """
    groups = [len(rows) for rows in asked]
    flat = [row for rows in asked for row in rows]
    lengths = [sum(map(len, row)) for row in flat]

    def score(chosen: Sequence[int]) -> Tensor:
        return completion_logps(reader.completion_logits([[flat[i]] for i in chosen]))

    with torch.set_grad_enabled(torch.is_grad_enabled() and not recompute):
        logps = torch.stack(in_chunks(lambda chosen: list(score(chosen)), lengths))
    if recompute:

        def chunks(chosen: Sequence[int]) -> list[list[int]]:
            return [[chosen[i] for i in part] for part in chunk_rows([lengths[i] for i in chosen], max_tokens)]

        logps = recomputed(logps, score, groups, negligible, chunks)
    return list(logps.split(groups))


def recomputed(
    values: Tensor,
    compute: Callable[[Sequence[int]], Tensor],
    groups: Sequence[int],
    negligible: float,
    chunks: Callable[[Sequence[int]], Sequence[Sequence[int]]],
) -> Tensor:
    r"""
    Values that are known without a graph, differentiable: the backward computes again those rows that matter, and
    sends the gradient through them at once. So what most of a question's documents would keep for a backward that
    does next to nothing to them is neither kept nor computed.

    Args:
        values (`Tensor` of shape `(R,)`):
            What `compute` gives for all rows.
        compute (`Callable`):
            Values of some rows, with gradients.
        groups (`list[int]`):
            Rows of each question, which stand together.
        negligible (`float`):
            Share of a question's gradient \\( \sum_i | \partial L / \partial s_i | \\) that may be left out, the
            smallest first; with 0 only rows without any are.
        chunks (`Callable`):
            Rows in parts that are computed one after the other, each with its backward.

    Returns:
        `Tensor` of shape `(R,)`
    """
    anchor = torch.zeros((), device=values.device, requires_grad=True)  # by which autograd comes here
    result: Tensor = _Recomputed.apply(values, anchor, compute, groups, negligible, chunks)
    return result


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, anchor, compute, groups, negligible, chunks):
        ctx.compute, ctx.groups, ctx.negligible, ctx.chunks = compute, groups, negligible, chunks
        device = values.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        device, dtype, enabled = ctx.autocast
        for rows in ctx.chunks(significant_rows(gradient, ctx.groups, ctx.negligible)):
            with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
                values = ctx.compute(rows)
            torch.autograd.backward(values, gradient[list(rows)])
        return None, None, None, None, None, None


def significant_rows(gradient: Tensor, groups: Sequence[int], negligible: float) -> list[int]:
    """
    Rows without those that have the smallest gradients of their question, which make at most a share of it.

    Args:
        gradient (`Tensor` of shape `(R,)`):
            Gradient of each row.
        groups (`list[int]`):
            Rows of each question, which stand together.
        negligible (`float`):
            The share.

    Returns:
        `list[int]`: in order.

    Example:

    ```python
    >>> import torch
    >>> from trl_dro.model.query_likelihood import significant_rows

    >>> significant_rows(torch.tensor([0.5, -0.4, -0.1, 0.0, 0.2, -0.2]), [3, 3], negligible=0.1)
    [0, 1, 4, 5]
    ```
    """
    rows: list[int] = []
    start = 0
    for sizes in gradient.abs().double().split(list(groups)):
        order = sizes.argsort()
        # Rounding must not keep what is just at the share.
        left_out = sizes[order].cumsum(0) <= negligible * sizes.sum() * (1 + 1e-6)
        rows += sorted((start + order[~left_out]).tolist())
        start += len(sizes)
    return rows
