# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""What answering needs of a model's `generate`: a config of its own, and someone who watches what is written."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria


class WrittenAnswer(NamedTuple):
    """An answer, and its log-likelihood in nats."""

    text: str
    logp: float


class Watched(StoppingCriteria):
    """Shows each row's text to `watch`, which decides whether the row goes on."""

    def __init__(
        self,
        watch: Callable[[int, str], bool],
        rows: list[int],
        texts_of: Callable[[Tensor], list[str]],
        start: int,
    ):
        self.watch = watch
        self.rows = rows
        self.texts_of = texts_of
        self.start = start

    def __call__(self, input_ids, scores, **kwargs):
        texts = self.texts_of(input_ids[:, self.start :])
        # A character may take several tokens, the first of which show as U+FFFD.
        stop = [self.watch(row, text.rstrip("\ufffd").strip()) for row, text in zip(self.rows, texts, strict=True)]
        return torch.tensor(stop, device=input_ids.device)


class GreedyLogps(LogitsProcessor):
    """
    Adds up the log-probability, in nats, of what is written greedily, each row's end included: `logps`, `(B,)`.

    Args:
        start (`int`):
            Length of the padded prompts.
        ends (`Tensor` of shape `(E,)`):
            Tokens behind which nothing counts, on the device of the prompts.
    """

    def __init__(self, start: int, ends: Tensor):
        self.start = start
        self.ends = ends
        self.logps = torch.zeros((), device=ends.device)

    def __call__(self, input_ids, scores):
        over = torch.isin(input_ids[:, self.start :], self.ends).any(dim=-1)
        self.logps = self.logps + scores.log_softmax(dim=-1).amax(dim=-1).masked_fill(over, 0.0)
        return scores


@contextlib.contextmanager
def generation_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Replaces the model's own config, from which one passed to `generate` would be filled up (say, a penalty)."""
    holders = [model, model.get_base_model()] if isinstance(model, PeftModel) else [model]
    own = [holder.generation_config for holder in holders]
    try:
        for holder in holders:
            holder.generation_config = config
        yield
    finally:
        for holder, previous in zip(holders, own, strict=True):
            holder.generation_config = previous
