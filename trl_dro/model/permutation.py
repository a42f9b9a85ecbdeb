# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
r"""The selector's distribution over document permutations: ids to tokens and back, exact sampling, log-probability.

A permutation of K of n documents is written `[3] > [1] > [17]`. Writing is *constrained*: at every token only those
continuations are allowed that lead to an id that exists and was not chosen yet. Where a single continuation is left
the token is forced and costs nothing; where several are left (a *branch*) the model's probabilities are renormalised
over them. The product over branches is therefore a proper distribution over the n!/(n-K)! permutations,
\\( p(z \mid x) = \prod_t p(z_t \mid z_{<t}, x) \\) (equation 1 of https://huggingface.co/papers/2505.03075), whatever
the tokenizer makes of the digits.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .control_tokens import end_token_id
from .likelihood import CompletionLogits, completion_logps, pad_rows
from .shared_prefix import PackedModel, ReadPrompts


SelectorLikelihood = Literal["constrained", "full_vocabulary"]

# Samples of a question stand in one row, over which attention grows with the square of their number.
MAX_SAMPLES_IN_ROW = 64

_BRACKETED = re.compile(r"\[\s*(\d{1,9})\s*\]")
_NUMBER = re.compile(r"(?<!\d)\d{1,9}(?!\d)")


class Branch(NamedTuple):
    """A token of a written permutation that was chosen among several."""

    position: int  # index into the completion's tokens
    allowed: list[int]  # token ids that could have been written here
    chosen: int  # index into `allowed`


class PermutationSamples(NamedTuple):
    r"""
    Permutations drawn for a batch of questions.

    Args:
        permutations (`Tensor` of shape `(B, m, K)`):
            Document ids as they are written in the prompt, from 1.
        logps (`Tensor` of shape `(B, m)`):
            \\( \log p(z) \\) in nats: constrained, at temperature 1.
        proposal_logps (`Tensor` of shape `(B, m)`):
            \\( \log q(z) \\) in nats: what was really sampled from, temperature and top-p included. Zero for greedy
            permutations.
    """

    permutations: Tensor
    logps: Tensor
    proposal_logps: Tensor

    @property
    def correction(self) -> Tensor:
        r"""Proposal correction \\( \log p(z) - \log q(z) \\), `(B, m)`."""
        return self.logps - self.proposal_logps


class ParsedPermutation(NamedTuple):
    """Ids read from free text, and how many were dropped because they were out of range, repeated or surplus."""

    permutation: list[int]
    num_dropped: int


class PermutationCodec:
    """
    Turns permutations into token ids and back, for any tokenizer that can tell the ids apart.

    The segments (`[12]`, ` > `) are tokenised one by one and concatenated, in sampling and in scoring alike:
    tokenising the whole string could merge `] >`.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer with an end-of-sequence token.
        max_documents (`int`):
            Highest id that can be written, from 1.
        num_selected (`int`):
            Number of documents in a permutation, K.

    Raises:
        `ValueError`: the tokenizer writes two ids alike, or has no token to end with, or K exceeds
            `max_documents`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_documents: int, num_selected: int):
        if not 1 <= num_selected <= max_documents:
            raise ValueError(
                f"num_selected={num_selected} must lie between 1 and the number of documents, {max_documents}"
            )
        self.max_documents = max_documents
        self.num_selected = num_selected

        def encode(segment: str) -> tuple[int, ...]:
            return tuple(tokenizer(segment, add_special_tokens=False).input_ids)

        self.separator = encode(" > ")
        self.end = (end_token_id(tokenizer),)
        self.id_tokens = {i: encode(f"[{i}]") for i in range(1, max_documents + 1)}
        # For every beginning of an id, the ids that begin so and the token each continues with.
        self.continuations: dict[tuple[int, ...], dict[int, int]] = {}
        for i, tokens in self.id_tokens.items():
            for length, token in enumerate(tokens):
                self.continuations.setdefault(tokens[:length], {})[i] = token
        self.id_of_tokens: dict[tuple[int, ...], int] = {}
        for i, tokens in self.id_tokens.items():
            if tokens in self.id_of_tokens or tokens in self.continuations:
                other = self.id_of_tokens.get(tokens) or next(iter(self.continuations[tokens]))
                raise ValueError(
                    f"the tokenizer cannot tell document ids [{other}] and [{i}] apart (both begin with "
                    f"{tokenizer.convert_ids_to_tokens(list(tokens))}): add '[', ']' and the numbers up to "
                    f"{self.max_documents} to its vocabulary"
                )
            self.id_of_tokens[tokens] = i

    @property
    def max_length(self) -> int:
        """Tokens of the longest written permutation, the end included."""
        longest_id = max(len(tokens) for tokens in self.id_tokens.values())
        return self.num_selected * (longest_id + len(self.separator)) - len(self.separator) + len(self.end)

    def encode(self, permutation: Sequence[int], num_documents: int | None = None) -> tuple[list[int], list[Branch]]:
        """
        Tokens of a permutation, the end included, and the branches among them.

        Args:
            permutation (`list[int]`):
                K distinct ids from 1 to `num_documents`.
            num_documents (`int`, *optional*, defaults to `max_documents`):
                Number of candidates of this question.

        Returns:
            `tuple[list[int], list[Branch]]`

        Raises:
            `ValueError`: wrong number of ids, repeated ids, or ids out of range.
        """
        writer = _Writer(self, num_documents or self.max_documents)
        permutation = list(permutation)
        if len(permutation) != self.num_selected or len(set(permutation)) != len(permutation):
            raise ValueError(f"permutation {permutation} is not {self.num_selected} distinct ids")
        if not set(permutation) <= writer.remaining:
            raise ValueError(f"permutation {permutation} has ids outside 1..{len(writer.remaining)}")
        branches = []
        writer.write_forced()
        while allowed := writer.allowed():
            target = permutation[writer.num_chosen]
            chosen = allowed.index(self.continuations[writer.prefix][target])
            branches.append(Branch(len(writer.tokens), allowed, chosen))
            writer.write(allowed[chosen])
        return writer.tokens, branches

    def decode(self, tokens: Sequence[int]) -> list[int]:
        """
        Permutation written by `tokens`, with or without the end-of-sequence token.

        Raises:
            `ValueError`: the tokens are not a complete permutation in this codec's form.
        """
        writer = _Writer(self, self.max_documents)
        writer.write_forced()
        while allowed := writer.allowed():
            token = tokens[len(writer.tokens)] if len(writer.tokens) < len(tokens) else None
            if token not in allowed:
                break
            writer.write(token)
        if writer.allowed() or list(tokens) not in (writer.tokens, writer.tokens[:-1]):
            raise ValueError(f"tokens {list(tokens)} do not write a permutation of {self.num_selected} ids")
        return writer.permutation

    def forced_start(self, num_documents: int) -> list[int]:
        """Tokens with which every permutation of `num_documents` documents begins: those before the first branch."""
        return _Writer(self, num_documents).write_forced()

    @staticmethod
    def text(permutation: Sequence[int]) -> str:
        """Permutation as a reader sees it, `[3] > [1]`."""
        return " > ".join(f"[{i}]" for i in permutation)


class _Writer:
    """One permutation while it is written token by token: what is written, what may come next."""

    def __init__(self, codec: PermutationCodec, num_documents: int):
        self.codec = codec
        self.remaining = set(range(1, num_documents + 1))
        self.permutation: list[int] = []
        self.tokens: list[int] = []
        self.prefix: tuple[int, ...] = ()  # tokens of the id that is being written

    @property
    def num_chosen(self) -> int:
        return len(self.permutation)

    def allowed(self) -> list[int]:
        """Tokens that may come next; none when the permutation is complete."""
        if self.num_chosen == self.codec.num_selected:
            return []
        continuations = self.codec.continuations[self.prefix]
        return sorted({token for i, token in continuations.items() if i in self.remaining})

    def write(self, token: int) -> list[int]:
        """Writes a chosen token and all that it forces; returns them."""
        start = len(self.tokens)
        self._append(token)
        self.write_forced()
        return self.tokens[start:]

    def write_forced(self) -> list[int]:
        """Writes tokens until there is a choice or the permutation is complete; returns them."""
        start = len(self.tokens)
        while len(allowed := self.allowed()) == 1:
            self._append(allowed[0])
        return self.tokens[start:]

    def _append(self, token: int) -> None:
        self.tokens.append(token)
        self.prefix = (*self.prefix, token)
        if self.prefix in self.codec.continuations:
            return
        chosen = self.codec.id_of_tokens[self.prefix]
        self.remaining.remove(chosen)
        self.permutation.append(chosen)
        self.prefix = ()
        self.tokens.extend(self.codec.end if self.num_chosen == self.codec.num_selected else self.codec.separator)


@torch.no_grad()
def sample_permutations(
    model: PackedModel,
    codec: PermutationCodec,
    read: ReadPrompts,
    num_documents: Sequence[int],
    num_permutations: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    greedy: bool = False,
    seeds: Sequence[int] | None = None,
) -> PermutationSamples:
    """
    Draws permutations from the constrained distribution. All permutations of a question share its prompt's cache; a
    forced token never costs a forward of its own, so that there are as many forwards as the longest permutation has
    branches, less the first, which the prompt's own forward decides.

    Args:
        model ([`~shared_prefix.PackedModel`]):
            The selector, in evaluation mode.
        codec ([`PermutationCodec`]):
            Form in which permutations are written.
        read ([`~shared_prefix.ReadPrompts`]):
            Selector prompts of `B` questions, read on to each question's [`~PermutationCodec.forced_start`].
        num_documents (`list[int]` of length `B`):
            Number of candidates of each question.
        num_permutations (`int`):
            Samples per question, m.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits of the allowed tokens; above 1 explores.
        top_p (`float`, *optional*, defaults to `1.0`):
            Keeps the most probable allowed tokens whose tempered probabilities reach `top_p`.
        greedy (`bool`, *optional*, defaults to `False`):
            Take the most probable token at every branch instead of sampling.
        seeds (`list[int]` of length `B`, *optional*):
            Seed of each question's draws, which then do not depend on the batch, the process or the device it is in.
            Drawn from the global generator by default.

    Returns:
        [`PermutationSamples`]
    """
    if seeds is None:
        seeds = torch.randint(2**62, (len(num_documents),)).tolist()
    # A uniform number for every choice that each sample could have to make: [B, m, choices]
    noise = torch.stack(
        [torch.rand(num_permutations, codec.max_length, generator=torch.Generator().manual_seed(s)) for s in seeds]
    )
    parts = [
        _sample(model, codec, read, num_documents, part, temperature, top_p, greedy)
        for part in torch.split(noise, MAX_SAMPLES_IN_ROW, dim=1)
    ]
    return PermutationSamples(*(torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)))


def _sample(
    model: PackedModel,
    codec: PermutationCodec,
    read: ReadPrompts,
    num_documents: Sequence[int],
    noise: Tensor,
    temperature: float,
    top_p: float,
    greedy: bool,
) -> PermutationSamples:
    """Samples of each question in one row, by the uniform numbers `noise` of shape `(B, m, choices)`."""
    num_questions, num_permutations = noise.shape[:2]
    noise = noise.flatten(0, 1)
    writers = [_Writer(codec, n) for n in num_documents for _ in range(num_permutations)]  # B * m, by question
    for writer in writers:
        writer.write_forced()
    prompt_lengths = [len(prompt) for prompt in read.prompts for _ in range(num_permutations)]
    logps = torch.zeros(len(writers), device=model.device)
    proposal_logps = torch.zeros(len(writers), device=model.device)

    choosing = [i for i, writer in enumerate(writers) if writer.allowed()]
    logits = read.logits.repeat_interleave(num_permutations, dim=0)[choosing]
    for choice in itertools.count():
        if not choosing:
            break
        branch_logits, allowed_ids = _allowed_logits(logits, [writers[i].allowed() for i in choosing])
        log_p = branch_logits.log_softmax(dim=-1)  # [choosing samples, most allowed tokens]
        # A broken row (NaN) is sampled as if uniform; its log p stays NaN, by which it is known later.
        log_q = truncate_to_top_p((branch_logits.nan_to_num(nan=0.0) / temperature).log_softmax(dim=-1), top_p)
        # A sample makes its choices without a pause until it is complete.
        chosen = log_p.argmax(dim=-1) if greedy else inverse_cdf(log_q, noise[choosing, choice])
        logps[choosing] += log_p.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        if not greedy:
            proposal_logps[choosing] += log_q.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        new: list[list[int]] = [[] for _ in writers]
        positions = [n + len(writer.tokens) for n, writer in zip(prompt_lengths, writers, strict=True)]
        for i, token in zip(choosing, allowed_ids.gather(-1, chosen.unsqueeze(-1)).squeeze(-1).tolist(), strict=True):
            written = writers[i].write(token)
            if writers[i].allowed():
                new[i] = written
        choosing = [i for i in choosing if new[i]]
        if choosing:
            rows = range(0, len(writers), num_permutations)
            logits, read = model.extend(
                read,
                [new[i : i + num_permutations] for i in rows],
                [positions[i : i + num_permutations] for i in rows],
            )

    permutations = torch.tensor([writer.permutation for writer in writers], device=model.device)
    shape = (num_questions, num_permutations)
    return PermutationSamples(permutations.view(*shape, -1), logps.view(shape), proposal_logps.view(shape))


def permutation_logps(
    complete: Callable[[list[list[int]]], CompletionLogits],
    codec: PermutationCodec,
    permutations: Sequence[Sequence[int]],
    num_documents: Sequence[int],
    likelihood: SelectorLikelihood = "constrained",
) -> Tensor:
    r"""
    \\( \log p(z \mid x) \\) of given permutations, differentiable.

    Args:
        complete (`Callable`):
            The selector and its prompts: takes the tokens of each written permutation, returns the logits that predict
            them, see [`~shared_prefix.PackedModel`].
        codec ([`PermutationCodec`]):
            Form in which permutations are written.
        permutations (`list[list[int]]` of length `R`):
            Ids from 1.
        num_documents (`list[int]` of length `R`):
            Number of candidates of each permutation's question.
        likelihood (`str`, *optional*, defaults to `"constrained"`):
            `"constrained"` is the distribution that [`sample_permutations`] draws from. `"full_vocabulary"` is the
            plain likelihood of the written tokens, end-of-sequence included, as in the paper: it also rewards
            writing the format, and sums to less than 1 over permutations.

    Returns:
        `Tensor` of shape `(R,)`: nats, `float32`.
    """
    encoded = [codec.encode(z, n) for z, n in zip(permutations, num_documents, strict=True)]
    completion = complete([tokens for tokens, _ in encoded])
    if likelihood == "full_vocabulary":
        return completion_logps(completion)
    device = completion.logits.device
    starts = itertools.accumulate(completion.lengths, initial=0)
    # Row, index into all tokens, choice and alternatives of every branch
    branches = [
        (row, start + branch.position, branch.chosen, branch.allowed)
        for row, ((_, branches), start) in enumerate(zip(encoded, starts, strict=False))
        for branch in branches
    ]
    total = torch.zeros(len(encoded), device=device)
    if not branches:  # a single document to choose from: probability 1, kept in the graph
        return total + 0.0 * completion.logits.sum().float()
    rows, indices, chosen = torch.tensor([branch[:3] for branch in branches], device=device).unbind(dim=-1)
    branch_logits, _ = _allowed_logits(completion.logits[indices], [allowed for *_, allowed in branches])
    branch_logps = branch_logits.log_softmax(dim=-1).gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    return total.index_add(0, rows, branch_logps)


def unique_permutations(permutations: Tensor) -> tuple[list[tuple[int, list[int]]], Tensor]:
    """
    Distinct permutations of each question, so that equal ones are scored once.

    Args:
        permutations (`Tensor` of shape `(B, m, K)`):
            Ids from 1.

    Returns:
        `tuple[list[tuple[int, list[int]]], Tensor]`: the distinct pairs of question index and permutation, and for
        every sample the index of its pair, of shape `(B, m)`.
    """
    index: dict[tuple[int, ...], int] = {}
    inverse = [
        [index.setdefault((question, *permutation), len(index)) for permutation in samples]
        for question, samples in enumerate(permutations.tolist())
    ]
    pairs = [(question, list(permutation)) for question, *permutation in index]
    return pairs, torch.tensor(inverse, device=permutations.device)


def inverse_cdf(logps: Tensor, uniform: Tensor) -> Tensor:
    """
    Outcomes drawn by uniform numbers.

    Args:
        logps (`Tensor` of shape `(R, A)`):
            Log-probabilities; `-inf` is never drawn.
        uniform (`Tensor` of shape `(R,)`):
            Numbers from 0 (included) to 1 (excluded).

    Returns:
        `Tensor` of shape `(R,)`: indices.
    """
    # In double precision, a number below 1 stays below the total, so that no outcome of probability 0 is drawn.
    cumulative = logps.detach().cpu().double().exp().cumsum(dim=-1)
    thresholds = uniform.double().unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, thresholds, right=True).squeeze(-1).to(logps.device)


def truncate_to_top_p(logps: Tensor, top_p: float) -> Tensor:
    """
    Renormalised log-probabilities of the smallest set of outcomes whose probabilities reach `top_p`; `-inf` elsewhere.

    Args:
        logps (`Tensor` of shape `(R, A)`):
            Normalised log-probabilities.
        top_p (`float`):
            Between 0 (excluded) and 1 (everything is kept).

    Returns:
        `Tensor` of shape `(R, A)`
    """
    if top_p >= 1.0:
        return logps
    sorted_logps, order = logps.sort(dim=-1, descending=True)
    mass_before = sorted_logps.exp().cumsum(dim=-1) - sorted_logps.exp()
    outside = torch.zeros_like(logps, dtype=torch.bool).scatter(-1, order, mass_before >= top_p)
    return logps.masked_fill(outside, float("-inf")).log_softmax(dim=-1)


def parse_permutation(text: str, num_documents: int, num_selected: int) -> ParsedPermutation:
    """
    Reads a permutation from another ranker's free text. Bracketed numbers are ids; without any, all numbers are.

    Args:
        text (`str`):
            E.g. `"[3] > [1] > [3] > [99]"` or `"3, 1"`.
        num_documents (`int`):
            Number of candidates.
        num_selected (`int`):
            Longest permutation to return.

    Returns:
        [`ParsedPermutation`]: up to `num_selected` distinct valid ids in order, and the number of ids dropped.

    Example:

    ```python
    >>> from trl_dro.model.permutation import parse_permutation

    >>> parse_permutation("[3] > [1] > [3] > [99]", num_documents=20, num_selected=5)
    ParsedPermutation(permutation=[3, 1], num_dropped=2)
    ```
    """
    ids = [int(number) for number in _BRACKETED.findall(text) or _NUMBER.findall(text)]
    valid = [i for i in dict.fromkeys(ids) if 1 <= i <= num_documents][:num_selected]
    return ParsedPermutation(valid, len(ids) - len(valid))


def _allowed_logits(logits: Tensor, allowed: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Logits `(R, A)` of the allowed tokens of each row, `-inf` in the padding, and their token ids `(R, A)`."""
    ids, mask = pad_rows(allowed, 0, logits.device, side="right")
    return logits.float().gather(-1, ids).masked_fill(~mask, float("-inf")), ids
