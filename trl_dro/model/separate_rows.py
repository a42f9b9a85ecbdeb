# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Every sequence in a row of its own: for models that cannot share a prompt's tokens, at several times the cost."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from .likelihood import CompletionLogits, completion_logits, last_logits
from .shared_prefix import Columns, PackedModel, ReadPrompts


class SeparateRows(PackedModel):
    """
    Does what [`~shared_prefix.PackedModel`] does with nothing that a causal language model could get wrong: no mask,
    no positions, no cache. Rows are padded on the right, where nothing that counts can see it, be it by attention or
    by a recurrent state.
    """

    def completion_logits(
        self, groups: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]], read: ReadPrompts | None = None
    ) -> CompletionLogits:
        """Logits that predict completions; `read` saves nothing here."""
        rows = [row for group in groups for row in group]
        self._count([[*prompt, *completion[:-1]] for prompt, completion in rows])
        prompts, completions = zip(*rows, strict=True)
        return completion_logits(self.forward, prompts, completions, self.pad_token_id, self.device)

    def read(self, prompts: Sequence[Sequence[int]], begun: Sequence[Sequence[int]]) -> ReadPrompts:
        """Prediction after each prompt with its beginning; nothing is kept but the tokens."""
        nothing = Columns(torch.zeros(0, device=self.device), torch.zeros(0, device=self.device))
        logits = self._predict([[*prompt, *start] for prompt, start in zip(prompts, begun, strict=True)])
        return ReadPrompts(prompts, begun, DynamicCache(), nothing, logits)

    def extend(
        self,
        read: ReadPrompts,
        tokens: Sequence[Sequence[Sequence[int]]],
        positions: Sequence[Sequence[int]],
        parents: Sequence[Sequence[Sequence[int]]] | None = None,
    ) -> tuple[Tensor, ReadPrompts]:
        """Continues each prompt in several ways: whatever was written so far goes through the model again."""
        rows: list[tuple[int, ...]] = []
        now: list[list[list[int]]] = []
        for b, (prompt, begun, news) in enumerate(zip(read.prompts, read.begun, tokens, strict=True)):
            olds = read.written[b] if read.written else []
            written = [[*old, *new] for old, new in itertools.zip_longest(olds, news, fillvalue=())]
            for s, new in enumerate(news):
                if new:
                    chain = [*(() if parents is None else parents[b][s]), s]
                    rows.append((*prompt, *begun, *(token for owner in chain for token in written[owner])))
            now.append(written)
        distinct = list(dict.fromkeys(rows))
        index = {row: i for i, row in enumerate(distinct)}
        return self._predict(distinct)[[index[row] for row in rows]], read._replace(written=now)

    def _predict(self, rows: Sequence[Sequence[int]]) -> Tensor:
        self._count(rows)
        return torch.cat(last_logits(self.forward, rows, [1] * len(rows), self.pad_token_id, self.device))

    def _count(self, rows: Sequence[Sequence[int]]) -> None:
        self.count.tokens += sum(map(len, rows))
        self.count.padded += len(rows) * max(map(len, rows))
