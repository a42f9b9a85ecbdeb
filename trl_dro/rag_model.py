# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
r"""The latent-variable model that DRO trains, \\( p(y \mid x) = \sum_z p(z \mid x) \, p(y \mid x, d_z) \\)
(equation 2 of https://huggingface.co/papers/2505.03075): roles, tokenizers, prompts and codec put together.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .likelihood import CompletionLogits, completion_logits, completion_logps, pad_rows
from .permutation import (
    PermutationCodec,
    PermutationSamples,
    SelectorLikelihood,
    permutation_logps,
    sample_permutations,
    unique_permutations,
)
from .prompts import PromptBuilder, answer_ids
from .roles import Role, Roles
from .shared_prefix import shared_prefix_logits


class RAGModel:
    r"""
    Selector \\( p(z \mid x) \\) and generator \\( p(y \mid x, d_z) \\) over batches of questions.

    A question is a dict with `question` and `documents`; a permutation holds places in its `documents`, from 1.

    Args:
        roles ([`~roles.Roles`]):
            The two models.
        tokenizers (`dict[str, PreTrainedTokenizerBase]`):
            Tokenizer of each role.
        prompts (`dict[str, PromptBuilder]`):
            Prompt builder of each role.
        codec ([`~permutation.PermutationCodec`]):
            Form in which the selector writes permutations.
        device (`torch.device`):
            Device of the models.
    """

    def __init__(
        self,
        roles: Roles,
        tokenizers: dict[Role, PreTrainedTokenizerBase],
        prompts: dict[Role, PromptBuilder],
        codec: PermutationCodec,
        device: torch.device,
    ):
        self.roles = roles
        self.tokenizers = tokenizers
        self.prompts = prompts
        self.codec = codec
        self.device = device
        self.max_tokens: int | None = None
        # Counted on the device: reading it at every forward would wait for the GPU.
        self.num_tokens = torch.zeros((), dtype=torch.long, device=device)

    def sample(
        self,
        questions: Sequence[dict[str, Any]],
        num_permutations: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        greedy: bool = False,
        seeds: Sequence[int] | None = None,
    ) -> PermutationSamples:
        """Permutations drawn from the selector, see [`~permutation.sample_permutations`]."""
        if seeds is None:
            seeds = [0] * len(questions) if greedy else torch.randint(2**62, (len(questions),)).tolist()
        prompts = self._selector_prompts(questions)

        def sample(rows: list[int]) -> PermutationSamples:
            return sample_permutations(
                self._forward("selector"),
                self.codec,
                [prompts[row] for row in rows],
                [len(questions[row]["documents"]) for row in rows],
                num_permutations,
                self.tokenizers["selector"].pad_token_id,
                self.device,
                temperature,
                top_p,
                greedy,
                [seeds[row] for row in rows],
            )

        # The prefill is one row per question, its cache `num_permutations` of them.
        parts = self._in_chunks(sample, [num_permutations * len(prompt) for prompt in prompts])
        return PermutationSamples(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def permutation_logps(
        self,
        questions: Sequence[dict[str, Any]],
        permutations: Tensor,
        likelihood: SelectorLikelihood = "constrained",
        wrapped: nn.Module | None = None,
    ) -> Tensor:
        r"""
        \\( \log p(z_i \mid x) \\), equal permutations computed once.

        Args:
            questions (`list[dict]` of length `B`):
                Questions with their documents.
            permutations (`Tensor` of shape `(B, m, K)`):
                Places in `documents`, from 1.
            likelihood (`str`, *optional*, defaults to `"constrained"`):
                See [`~permutation.permutation_logps`].
            wrapped (`nn.Module`, *optional*):
                Module through which gradients are averaged over processes.

        Returns:
            `Tensor` of shape `(B, m)`: nats.
        """
        pairs, inverse = unique_permutations(permutations)
        prompts = self._selector_prompts(questions)
        groups = [[z for owner, z in pairs if owner == question] for question in range(len(questions))]
        base: Any = self.roles.module("selector")

        def score(rows: list[int]) -> Tensor:
            def complete(tokens: list[list[int]]) -> CompletionLogits:
                remaining = iter(tokens)
                continuations = [list(islice(remaining, len(groups[row]))) for row in rows]
                self.num_tokens += sum(len(prompts[row]) for row in rows) + sum(map(len, tokens))
                return shared_prefix_logits(
                    partial(self.roles.forward, "selector", wrapped),
                    base.config,
                    [prompts[row] for row in rows],
                    continuations,
                    self.tokenizers["selector"].pad_token_id,
                    self.device,
                    base.dtype,
                )

            permutations = [z for row in rows for z in groups[row]]
            sizes = [len(questions[row]["documents"]) for row in rows for _ in groups[row]]
            return permutation_logps(complete, self.codec, permutations, sizes, likelihood)

        lengths = [
            len(prompt) + len(group) * self.codec.max_length for prompt, group in zip(prompts, groups, strict=True)
        ]
        return torch.cat(self._in_chunks(score, lengths))[inverse]

    def answer_logps(
        self,
        questions: Sequence[dict[str, Any]],
        targets: Sequence[Sequence[str]],
        permutations: Tensor,
        mean: bool = False,
        wrapped: nn.Module | None = None,
    ) -> Tensor:
        r"""
        \\( \log p(y \mid x, d_{z_i}) \\), equal permutations computed once.

        Args:
            questions (`list[dict]` of length `B`):
                Questions with their documents.
            targets (`list[list[str]]` of length `B`):
                Answers of each question; the likelihoods of several are added up.
            permutations (`Tensor` of shape `(B, m, K)`):
                Places in `documents`, from 1.
            mean (`bool`, *optional*, defaults to `False`):
                Average over an answer's tokens instead of summing.
            wrapped (`nn.Module`, *optional*):
                Module through which gradients are averaged over processes.

        Returns:
            `Tensor` of shape `(B, m)`: nats, or nats per token.
        """
        pairs, inverse = unique_permutations(permutations)
        prompts = [self._generator_prompt(questions[question], permutation) for question, permutation in pairs]
        tokenizer = self.tokenizers["generator"]
        pairs_and_answers = [
            (prompts[i], answer_ids(tokenizer, target))
            for i, (question, _) in enumerate(pairs)
            for target in targets[question]
        ]

        def score(rows: list[int]) -> Tensor:
            completion = completion_logits(
                self._forward("generator", wrapped),
                [pairs_and_answers[row][0] for row in rows],
                [pairs_and_answers[row][1] for row in rows],
                tokenizer.pad_token_id,
                self.device,
            )
            return completion_logps(completion, mean)

        logps = self._in_chunks(score, [len(prompt) + len(answer) for prompt, answer in pairs_and_answers])
        aliases = torch.cat(logps).split([len(targets[question]) for question, _ in pairs])
        return torch.stack([alias_logps.logsumexp(dim=0) for alias_logps in aliases])[inverse]

    @torch.no_grad()
    def answer(self, questions: Sequence[dict[str, Any]], permutations: Tensor, max_answer_length: int) -> list[str]:
        """
        Greedy answers from the selected documents.

        Args:
            questions (`list[dict]` of length `B`):
                Questions with their documents.
            permutations (`Tensor` of shape `(B, K)`):
                Places in `documents`, from 1.
            max_answer_length (`int`):
                Tokens to generate at most.

        Returns:
            `list[str]`: stripped texts without special tokens.
        """
        tokenizer = self.tokenizers["generator"]
        prompts = [
            self._generator_prompt(question, permutation)
            for question, permutation in zip(questions, permutations.tolist(), strict=True)
        ]
        input_ids, mask = pad_rows(prompts, tokenizer.pad_token_id, self.device, side="left")
        model: Any = self.roles.module("generator")
        declared = model.generation_config.eos_token_id
        end_tokens = {tokenizer.eos_token_id, *([declared] if isinstance(declared, int) else declared or [])}
        greedy = GenerationConfig(
            max_new_tokens=max_answer_length,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=sorted(end_tokens),
        )
        with _generation_config(model, greedy):
            generated = model.generate(input_ids=input_ids, attention_mask=mask.long())
        texts = tokenizer.batch_decode(generated[:, input_ids.shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _in_chunks(self, run: Callable[[list[int]], Any], lengths: Sequence[int]) -> list[Any]:
        """
        Results of `run` over all rows, in as few chunks as fit into memory. The largest chunk, in padded tokens, is
        found by halving when memory runs out, and kept. A forward with gradients is one chunk: its graph is needed
        whole.
        """
        rows = list(range(len(lengths)))
        if torch.is_grad_enabled():
            return [run(rows)]
        while True:
            chunks = chunk_rows(lengths, self.max_tokens)
            try:
                return [run(chunk) for chunk in chunks]
            except torch.OutOfMemoryError:
                if len(chunks) == len(rows):
                    raise
            # Here, where the error no longer holds the tensors that did not fit.
            if self.device.type != "cpu":
                torch.accelerator.empty_cache()
            self.max_tokens = max(len(chunk) * max(lengths[row] for row in chunk) for chunk in chunks) // 2

    def _selector_prompts(self, questions: Sequence[dict[str, Any]]) -> list[list[int]]:
        return [self.prompts["selector"](question["question"], question["documents"]) for question in questions]

    def _generator_prompt(self, question: dict[str, Any], permutation: list[int]) -> list[int]:
        return self.prompts["generator"](question["question"], [question["documents"][i - 1] for i in permutation])

    def _forward(self, role: Role, wrapped: nn.Module | None = None) -> Callable[..., Any]:
        def forward(**inputs):
            self.num_tokens += inputs["attention_mask"][:, -inputs["input_ids"].shape[1] :].sum()
            return self.roles.forward(role, wrapped, **inputs)

        return forward


def chunk_rows(lengths: Sequence[int], max_tokens: int | None) -> list[list[int]]:
    """
    Consecutive rows in chunks that, padded to their longest, have at most `max_tokens` tokens; a longer row is alone.

    Args:
        lengths (`list[int]`):
            Tokens of each row.
        max_tokens (`int`, *optional*):
            Padded tokens of a chunk; `None` puts all rows in one.

    Returns:
        `list[list[int]]`: row indices.
    """
    chunks: list[list[int]] = []
    longest = 0
    for row, length in enumerate(lengths):
        longest = max(longest, length)
        if not chunks or (max_tokens is not None and (len(chunks[-1]) + 1) * longest > max_tokens):
            chunks.append([])
            longest = length
        chunks[-1].append(row)
    return chunks


@contextlib.contextmanager
def _generation_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """
    Replaces the model's own config: one passed to `generate` would be filled up from it, with the repetition penalty
    of an instruct model, say.
    """
    holders = [model, model.get_base_model()] if isinstance(model, PeftModel) else [model]
    own = [holder.generation_config for holder in holders]
    try:
        for holder in holders:
            holder.generation_config = config
        yield
    finally:
        for holder, previous in zip(holders, own, strict=True):
            holder.generation_config = previous
