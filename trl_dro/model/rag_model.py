# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
r"""The latent-variable model that DRO trains, \\( p(y \mid x) = \sum_z p(z \mid x) \, p(y \mid x, d_z) \\)
(equation 2 of https://huggingface.co/papers/2505.03075): roles, tokenizers, prompts and codec put together.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .codec import PermutationCodec
from .control_tokens import end_token_id, end_token_ids
from .distinct import sample_distinct_permutations
from .generation import GreedyLogps, Watched, WrittenAnswer, generation_config
from .importance import Sampling
from .likelihood import CompletionLogits, chunk_rows, completion_logps, pad_rows
from .permutation import PriorSource, SelectorLikelihood, permutation_logps, retriever_logits, unique_permutations
from .prompts import PassagePrompts, Prompts, answer_ids
from .query_likelihood import ScoredDocuments, question_logps
from .roles import Role, Roles
from .sampling import PermutationSamples, sample_permutations
from .separate_rows import SeparateRows
from .shared_prefix import PackedModel, ReadPrompts, TokenCount, share_prefixes


class RAGModel:
    r"""
    Selector \\( p(z \mid x) \\) and generator \\( p(y \mid x, d_z) \\) over batches of questions.

    A question is a dict with `question` and `documents`, in the retriever's order or with their places in it, from 1,
    under `retrieval_ranks`. A permutation holds places in `documents`, from 1, and zeros behind if it ended early.

    Args:
        roles ([`~roles.Roles`]):
            The two models.
        tokenizers (`dict[str, PreTrainedTokenizerBase]`):
            Tokenizer of each role.
        prompts (`dict[str, PromptBuilder]`):
            Prompt builder of each role. A selector with [`~prompts.PassagePrompts`] has the likelihoods of
            the question for its documents' logits, any other writes their ids.
        codec ([`~codec.PermutationCodec`]):
            Form in which the selector writes permutations.
        device (`torch.device`):
            Device of the models.
        max_tokens (`int`, *optional*):
            Padded tokens of a forward without gradients; `None` bounds them by memory alone.
        retriever_prior (`float`, *optional*, defaults to `0.0`), retriever_prior_from (`str`, defaults to `"rank"`):
            Strength and source of the retriever's prior, see [`~permutation.retriever_logits`].
        query_likelihood_scale (`float`, *optional*, defaults to `1.0`):
            What log-likelihoods of the question are multiplied by to be logits.
        negligible_weight (`float`, *optional*, defaults to `0.0`):
            See [`~query_likelihood.recomputed`].
    """

    def __init__(
        self,
        roles: Roles,
        tokenizers: dict[Role, PreTrainedTokenizerBase],
        prompts: dict[Role, Prompts],
        codec: PermutationCodec,
        device: torch.device,
        max_tokens: int | None = None,
        retriever_prior: float = 0.0,
        retriever_prior_from: PriorSource = "rank",
        query_likelihood_scale: float = 1.0,
        negligible_weight: float = 0.0,
    ):
        self.roles = roles
        self.tokenizers = tokenizers
        self.prompts = prompts
        self.codec = codec
        self.device = device
        self.max_tokens = max_tokens
        self.retriever_prior = retriever_prior
        self.retriever_prior_from = retriever_prior_from
        self.query_likelihood_scale = query_likelihood_scale
        self.negligible_weight = negligible_weight
        self.count = TokenCount()

    @property
    def scores_documents(self) -> bool:
        """Whether the selector's choices have the likelihoods of the question for logits."""
        return isinstance(self.prompts["selector"], PassagePrompts)

    def keeps_prompts(self, wrapped: nn.Module | None = None) -> bool:
        """
        Whether what [`~RAGModel.read`] keeps with gradients can be continued in training mode, by a model that the
        trainer wrapped.
        """
        if self.scores_documents:
            return self._recomputes(wrapped)
        return not (self.roles.sharded or self.roles.is_checkpointed("selector") or "selector" in self.roles.separate)

    def _recomputes(self, wrapped: nn.Module | None) -> bool:
        """Whether a backward may compute likelihoods of the question again: nowhere where processes work in step."""
        return not self.roles.sharded and (wrapped is None or wrapped is self.roles.model)

    def read(self, questions: Sequence[dict[str, Any]], wrapped: nn.Module | None = None) -> ReadPrompts:
        """
        The selector's prompts in its cache, for [`~RAGModel.sample`] and [`~RAGModel.permutation_logps`] of the same
        weights. With gradients enabled those of the latter flow through it. A selector that writes must not be
        checkpointing.

        Args:
            questions (`list[dict]` of length `B`):
                Questions with their documents.
            wrapped (`nn.Module`, *optional*):
                Module through which gradients are averaged over processes, used where documents are scored.

        Returns:
            [`~shared_prefix.ReadPrompts`]

        Raises:
            [`~prompts.PromptTooLongError`]: a question is too long however short its documents are cut.
        """
        sizes = [len(question["documents"]) for question in questions]
        prompts = self.prompts["selector"]
        if isinstance(prompts, PassagePrompts):
            asked = [prompts.rows(each["question"], each["documents"], self.codec.may_end) for each in questions]
            recompute = torch.is_grad_enabled() and self._recomputes(wrapped)
            reader = self.reader("selector", wrapped)
            logps = question_logps(reader, asked, self._in_chunks, recompute, self.negligible_weight, self.max_tokens)
            scores = [self.query_likelihood_scale * each for each in logps]
            return ScoredDocuments(self.device).read(scores, sizes, self.codec.max_documents)
        begun = [self.codec.forced_start(size) for size in sizes]
        return self.reader("selector").read(self._selector_prompts(questions), begun)

    def sample(
        self,
        questions: Sequence[dict[str, Any]],
        num_permutations: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        greedy: bool = False,
        seeds: Sequence[int] | None = None,
        read: ReadPrompts | None = None,
        sampling: Sampling = "independent",
    ) -> PermutationSamples:
        """
        Permutations drawn from the selector, see [`~sampling.sample_permutations`] and
        [`~distinct.sample_distinct_permutations`].

        Args:
            questions (`list[dict]` of length `B`):
                Questions with their documents.
            num_permutations (`int`):
                Samples per question, m.
            temperature (`float`, *optional*, defaults to `1.0`):
                Divides the logits of the allowed tokens.
            top_p (`float`, *optional*, defaults to `1.0`):
                Nucleus of every choice.
            greedy (`bool`, *optional*, defaults to `False`):
                Take the most probable token at every branch instead of sampling; with `"distinct"`, the most probable
                permutations that a beam search finds.
            seeds (`list[int]` of length `B`, *optional*):
                Seed of each question's draws; drawn from the global generator by default.
            read ([`~shared_prefix.ReadPrompts`], *optional*):
                What [`~RAGModel.read`] gives for these questions, if it was called before.
            sampling (`str`, *optional*, defaults to `"independent"`):
                `"independent"`, or `"distinct"` for different permutations.

        Returns:
            [`~sampling.PermutationSamples`]: permutations `(B, m, K)`, log-probabilities `(B, m)` in nats.

        Raises:
            [`~prompts.PromptTooLongError`]: a question is too long however short its documents are cut.
        """
        if seeds is None:
            seeds = [0] * len(questions) if greedy else torch.randint(2**62, (len(questions),)).tolist()

        def sample(rows: list[int]) -> list[PermutationSamples]:
            chosen = [questions[row] for row in rows]
            with torch.no_grad():
                draw = sample_distinct_permutations if sampling == "distinct" else sample_permutations
                samples = draw(
                    self._chooser(),
                    self.codec,
                    self.read(chosen) if read is None else read,
                    [len(question["documents"]) for question in chosen],
                    num_permutations,
                    temperature,
                    top_p,
                    greedy,
                    seeds=[seeds[row] for row in rows],
                    document_logits=[self.document_logits(question) for question in chosen],
                )
            return [PermutationSamples(*tensors) for tensors in zip(*samples, strict=True)]

        if read is not None:
            parts = sample(list(range(len(questions))))
        else:
            with torch.no_grad():
                parts = self._in_chunks(sample, self._selector_lengths(questions, num_permutations))
        return PermutationSamples(*(torch.stack(tensors) for tensors in zip(*parts, strict=True)))

    def permutation_logps(
        self,
        questions: Sequence[dict[str, Any]],
        permutations: Tensor,
        likelihood: SelectorLikelihood = "constrained",
        wrapped: nn.Module | None = None,
        read: ReadPrompts | None = None,
    ) -> Tensor:
        r"""
        \\( \log p(z_i \mid x) \\), equal permutations computed once, a question's permutations behind one prompt.

        Args:
            questions (`list[dict]` of length `B`):
                Questions with their documents.
            permutations (`Tensor` of shape `(B, m, K)`):
                Places in `documents`, from 1.
            likelihood (`str`, *optional*, defaults to `"constrained"`):
                See [`~permutation.permutation_logps`].
            wrapped (`nn.Module`, *optional*):
                Module through which gradients are averaged over processes.
            read ([`~shared_prefix.ReadPrompts`], *optional*):
                What [`~RAGModel.read`] gives for these questions, if it was called before.

        Returns:
            `Tensor` of shape `(B, m)`: nats.
        """
        pairs, inverse = unique_permutations(permutations)
        groups = [[z for owner, z in pairs if owner == question] for question in range(len(questions))]
        if self.scores_documents and read is None:
            read = self.read(questions, wrapped)
        prompts = self._selector_prompts(questions) if read is None else read.prompts
        # Where the cache stays empty, prompt and permutations go through the model together.
        cached = not self.roles.module("selector").training or self.keeps_prompts()

        def score(rows: list[int]) -> Sequence[Tensor]:
            def complete(tokens: list[list[int]]) -> CompletionLogits:
                remaining = iter(tokens)
                completions = [[(prompts[row], next(remaining)) for _ in groups[row]] for row in rows]
                past = read
                if cached and read is None:
                    past = self.read([questions[row] for row in rows])
                return self._chooser(wrapped).completion_logits(completions, past)

            permutations = [z for row in rows for z in groups[row]]
            sizes = [len(questions[row]["documents"]) for row in rows for _ in groups[row]]
            priors = [self.document_logits(questions[row]) for row in rows for _ in groups[row]]
            logps = permutation_logps(complete, self.codec, permutations, sizes, likelihood, priors)
            return logps.split([len(groups[row]) for row in rows])

        lengths = [len(p) + len(group) * self.codec.max_length for p, group in zip(prompts, groups, strict=True)]
        # What was read was read of all questions.
        parts = self._in_chunks(score, lengths) if read is None else score(list(range(len(questions))))
        return torch.cat(list(parts))[inverse]

    def document_logits(self, question: dict[str, Any]) -> list[float] | None:
        """Prior of each document of a question, see [`~permutation.retriever_logits`]; `None` if there is none."""
        if self.retriever_prior == 0:
            return None
        return retriever_logits(question, self.retriever_prior, self.retriever_prior_from)

    def written_logits(self, written: Sequence[Sequence[int]], read: ReadPrompts) -> CompletionLogits:
        """
        Logits that predict what the selector writes.

        Args:
            written (`list[list[int]]` of length `B`):
                Tokens written after each prompt.
            read ([`~shared_prefix.ReadPrompts`]):
                The prompts, see [`~RAGModel.read`].

        Returns:
            [`~likelihood.CompletionLogits`]: of `B` completions, in order.
        """
        groups = [[(prompt, tokens)] for prompt, tokens in zip(read.prompts, written, strict=True)]
        return self._chooser().completion_logits(groups, read)

    def answer_logps(
        self,
        questions: Sequence[dict[str, Any]],
        targets: Sequence[Sequence[str]],
        permutations: Tensor,
        mean: bool = False,
        wrapped: nn.Module | None = None,
    ) -> Tensor:
        r"""
        \\( \log p(y \mid x, d_{z_i}) \\), equal permutations computed once. Permutations that begin with the same
        documents share their tokens, where that makes the forward cheaper.

        Args:
            questions (`list[dict]` of length `B`):
                Questions with their documents.
            targets (`list[list[str]]` of length `B`):
                Answers of each question; the likelihoods of those that differ in their tokens are added up.
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
        tokenizer = self.tokenizers["generator"]
        # An alias that is written in the same tokens as another is the same answer and counts once.
        aliases = [
            list(dict.fromkeys(tuple(answer_ids(tokenizer, target)) for target in question)) for question in targets
        ]
        groups: list[list[tuple[list[int], list[int]]]] = [[] for _ in questions]
        for question, permutation in pairs:
            prompt = self._generator_prompt(questions[question], permutation)
            groups[question] += [(prompt, list(answer)) for answer in aliases[question]]
        together = [len(share_prefixes([prompt + answer for prompt, answer in group]).tokens) for group in groups]
        apart = [len(prompt) + len(answer) for group in groups for prompt, answer in group]
        separate = "generator" in self.roles.separate
        if separate or self._forward_flops("generator", apart) <= self._forward_flops("generator", together):
            groups, lengths = [[row] for group in groups for row in group], apart
        else:
            lengths = together

        def score(rows: list[int]) -> Sequence[Tensor]:
            chosen = [groups[row] for row in rows]
            logits = self.reader("generator", wrapped).completion_logits(chosen)
            return completion_logps(logits, mean).split([len(group) for group in chosen])

        logps = torch.cat(self._in_chunks(score, lengths))
        per_pair = logps.split([len(aliases[question]) for question, _ in pairs])
        return torch.stack([alias_logps.logsumexp(dim=0) for alias_logps in per_pair])[inverse]

    def question_lengths(self, questions: Sequence[dict[str, Any]], num_permutations: int) -> list[int]:
        """
        Most tokens that `num_permutations` of each question take in either role, its longest documents selected and
        nothing shared between the generator's prompts, nor between the selector's rows where each is read by itself.

        Args:
            questions (`list[dict]` of length `B`):
                Questions with their documents.
            num_permutations (`int`):
                Permutations per question, m.

        Returns:
            `list[int]` of length `B`: tokens.
        """
        separate = "selector" in self.roles.separate and not self.scores_documents
        rows = self._selector_lengths(questions, 1 if separate else num_permutations)
        rows = [row * num_permutations if separate else row for row in rows]
        lengths = []
        for question, row in zip(questions, rows, strict=True):
            longest = sorted(question["documents"], key=lambda document: -len(document["text"]))
            prompt = self.prompts["generator"](question["question"], longest[: self.codec.num_selected])
            lengths.append(max(row, num_permutations * len(prompt)))
        return lengths

    def answer(self, questions: Sequence[dict[str, Any]], permutations: Tensor, max_answer_length: int) -> list[str]:
        """Greedy answers, see [`~RAGModel.write_answers`]."""
        return [answer.text for answer in self.write_answers(questions, permutations, max_answer_length)]

    @torch.no_grad()
    def write_answers(
        self,
        questions: Sequence[dict[str, Any]],
        permutations: Tensor,
        max_answer_length: int,
        streamer: BaseStreamer | None = None,
        watch: Callable[[int, str], bool] | None = None,
    ) -> list[WrittenAnswer]:
        """
        Greedy answers from the selected documents.

        Args:
            questions (`list[dict]` of length `B`):
                Questions with their documents.
            permutations (`Tensor` of shape `(B, K)`):
                Places in `documents`, from 1.
            max_answer_length (`int`):
                Tokens to generate at most.
            streamer ([`~transformers.generation.streamers.BaseStreamer`], *optional*):
                Receives the tokens of a single question's answer while they are written.
            watch (`Callable`, *optional*):
                Called after every token with each question's place and its answer as far as it is written; where it
                returns `True` that answer ends there. If memory runs out it is called for the same tokens again.

        Returns:
            `list[WrittenAnswer]`: stripped texts without special tokens, and their log-likelihoods in nats, the end
            included where it was written.
        """
        tokenizer = self.tokenizers["generator"]
        prompts = [
            self._generator_prompt(question, permutation)
            for question, permutation in zip(questions, permutations.tolist(), strict=True)
        ]
        model: Any = self.roles.module("generator")
        end = end_token_id(tokenizer)
        ends = end_token_ids(tokenizer, model.generation_config.eos_token_id)
        greedy = GenerationConfig(
            max_new_tokens=max_answer_length,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=ends,
        )

        def texts_of(generated: Tensor) -> list[str]:
            # The end of a turn need not be declared special.
            written = [[token for token in row if token != end] for row in generated.tolist()]
            return tokenizer.batch_decode(written, skip_special_tokens=True)

        def generate(rows: list[int]) -> list[WrittenAnswer]:
            lengths = {row: len(prompts[row]) for row in rows}
            if "generator" in self.roles.separate and len(set(lengths.values())) > 1:  # rows without padding
                alike = [[row for row in rows if lengths[row] == n] for n in set(lengths.values())]
                written = {row: text for part in alike for row, text in zip(part, generate(part), strict=True)}
                return [written[row] for row in rows]
            chosen = [prompts[row] for row in rows]
            input_ids, mask = pad_rows(chosen, tokenizer.pad_token_id, self.device, side="left")
            watched = None
            if watch is not None:
                watched = StoppingCriteriaList([Watched(watch, rows, texts_of, input_ids.shape[1])])
            likelihood = GreedyLogps(input_ids.shape[1], torch.tensor(ends, device=self.device))
            generated = model.generate(
                input_ids=input_ids,
                attention_mask=mask.long(),
                streamer=streamer,
                stopping_criteria=watched,
                logits_processor=LogitsProcessorList([likelihood]),
            )
            texts = texts_of(generated[:, input_ids.shape[1] :])
            logps = likelihood.logps.tolist()
            return [WrittenAnswer(text.strip(), logp) for text, logp in zip(texts, logps, strict=True)]

        with generation_config(model, greedy):
            return self._in_chunks(generate, [len(prompt) + max_answer_length for prompt in prompts])

    def _in_chunks(self, run: Callable[[list[int]], Sequence[Any]], lengths: Sequence[int]) -> list[Any]:
        """
        Results of `run`, one for each row, in as few chunks of rows of similar length as fit into memory. The largest
        chunk, in padded tokens, is found by halving when memory runs out, and kept. A forward with gradients is one
        chunk: its graph is needed whole.
        """
        rows = list(range(len(lengths)))
        if torch.is_grad_enabled():
            return list(run(rows))
        while True:
            chunks = chunk_rows(lengths, self.max_tokens)
            try:
                results: dict[int, Any] = {}
                for chunk in chunks:
                    results.update(zip(chunk, run(chunk), strict=True))
                return [results[row] for row in rows]
            except torch.OutOfMemoryError:
                if len(chunks) == len(rows):
                    raise
            # Here, where the error no longer holds the tensors that did not fit.
            if self.device.type != "cpu":
                torch.accelerator.empty_cache()
            self.max_tokens = max(len(chunk) * max(lengths[row] for row in chunk) for chunk in chunks) // 2

    def _selector_prompts(self, questions: Sequence[dict[str, Any]]) -> list[list[int]]:
        return [self.prompts["selector"](question["question"], question["documents"]) for question in questions]

    def _generator_prompt(self, question: dict[str, Any], places: list[int]) -> list[int]:
        return self.prompts["generator"](question["question"], [question["documents"][i - 1] for i in places if i])

    def _selector_lengths(self, questions: Sequence[dict[str, Any]], num_permutations: int) -> list[int]:
        written = 0 if self.scores_documents else num_permutations * self.codec.max_length
        return [len(p) + written for p in self._selector_prompts(questions)]

    def _chooser(self, wrapped: nn.Module | None = None) -> Any:
        """What predicts the selector's choices."""
        return ScoredDocuments(self.device) if self.scores_documents else self.reader("selector", wrapped)

    def reader(self, role: Role, wrapped: nn.Module | None = None) -> PackedModel:
        """A role's model as rows are given to it."""
        base: Any = self.roles.module(role)
        model = SeparateRows if role in self.roles.separate else PackedModel
        return model(
            partial(self.roles.forward, role, wrapped),
            base.config,
            self.tokenizers[role].pad_token_id,
            self.device,
            base.dtype,
            self.count,
        )

    def _forward_flops(self, role: Role, lengths: Sequence[int]) -> int:
        """
        Operations of a forward over rows of these lengths, padded: two per weight and token, and four per pair of
        tokens and attention channel, as a mask of one's own lets no pair be skipped.
        """
        base: Any = self.roles.module(role)
        config = base.config.get_text_config()
        # Not all configs have the attribute.
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        channels = config.num_hidden_layers * config.num_attention_heads * head_dim
        width = max(lengths)
        return len(lengths) * width * (2 * base.num_parameters(exclude_embeddings=True) + 4 * channels * width)
