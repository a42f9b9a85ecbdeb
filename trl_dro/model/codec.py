# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Permutations as a tokenizer writes them: ids to tokens and back, and what may come next while one is written.

A permutation of K of n documents is written `[3] > [1] > [17]`. Writing is *constrained*: at every token only those
continuations are allowed that lead to an id that exists and was not chosen yet. Where a single continuation is left
the token is forced and costs nothing; where several are left there is a *branch*.

Documents can have a prior, a logit for each that is added to the model's own at every choice. An id of several tokens
has several branches, so the prior is carried down them: a token's is the log of the mean of the exponentials over the
ids that it can still become. The mean, and not the sum, because a prior of zero must change nothing.

A permutation may be allowed to end early, with as many ids as it has: then the end is one more continuation before
each further id. The prior says which document and not how many, so that it is silent there.
"""

import copy
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from .control_tokens import end_token_id


_BRACKETED = re.compile(r"\[\s*(\d{1,9})\s*\]")
_NUMBER = re.compile(r"(?<!\d)\d{1,9}(?!\d)")


class Branch(NamedTuple):
    """A token of a written permutation that was chosen among several."""

    position: int  # index into the completion's tokens
    allowed: list[int]  # token ids that could have been written here
    prior: list[float]  # what is added to their logits
    chosen: int  # index into `allowed`


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
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer with an end-of-sequence token. Without one each id is a token of its own and 0 is the end, as
            [`~query_likelihood.ScoredDocuments`] has them.
        max_documents (`int`):
            Highest id that can be written, from 1.
        num_selected (`int`):
            Number of documents in a permutation, K: the most, if it may end early.
        min_selected (`int`, *optional*, defaults to `num_selected`):
            Number of documents from which it may end.

    Raises:
        `ValueError`: the tokenizer writes two ids alike, or has no token to end with, or K exceeds
            `max_documents`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        max_documents: int,
        num_selected: int,
        min_selected: int | None = None,
    ):
        if not 1 <= num_selected <= max_documents:
            raise ValueError(
                f"num_selected={num_selected} must lie between 1 and the number of documents, {max_documents}"
            )
        self.max_documents = max_documents
        self.num_selected = num_selected
        self.min_selected = num_selected if min_selected is None else min_selected
        if not 0 <= self.min_selected <= num_selected:
            raise ValueError(f"min_selected={min_selected} must lie between 0 and num_selected, {num_selected}")

        self.separator: tuple[int, ...] = ()
        self.end: tuple[int, ...] = (0,)
        self.id_tokens: dict[int, tuple[int, ...]] = {i: (i,) for i in range(1, max_documents + 1)}
        if tokenizer is not None:
            self.separator = _encode(tokenizer, " > ")
            self.end = (end_token_id(tokenizer),)
            self.id_tokens = {i: _encode(tokenizer, f"[{i}]") for i in self.id_tokens}
        # For every beginning of an id, the ids that begin so and the token each continues with.
        self.continuations: dict[tuple[int, ...], dict[int, int]] = {}
        for i, tokens in self.id_tokens.items():
            for length, token in enumerate(tokens):
                self.continuations.setdefault(tokens[:length], {})[i] = token
        self.id_of_tokens: dict[tuple[int, ...], int] = {}
        for i, tokens in self.id_tokens.items():
            if tokenizer is not None and (tokens in self.id_of_tokens or tokens in self.continuations):
                other = self.id_of_tokens.get(tokens) or next(iter(self.continuations[tokens]))
                raise ValueError(
                    f"the tokenizer cannot tell document ids [{other}] and [{i}] apart (both begin with "
                    f"{tokenizer.convert_ids_to_tokens(list(tokens))}): add '[', ']' and the numbers up to "
                    f"{self.max_documents} to its vocabulary"
                )
            self.id_of_tokens[tokens] = i

    @property
    def may_end(self) -> bool:
        """Whether a permutation may have fewer than K documents."""
        return self.min_selected < self.num_selected

    @property
    def max_length(self) -> int:
        """Tokens of the longest written permutation, the end included."""
        longest_id = max(len(tokens) for tokens in self.id_tokens.values())
        return self.num_selected * (longest_id + len(self.separator)) - len(self.separator) + len(self.end)

    def encode(
        self,
        permutation: Sequence[int],
        num_documents: int | None = None,
        document_logits: Sequence[float] | None = None,
    ) -> tuple[list[int], list[Branch]]:
        """
        Tokens of a permutation, the end included, and the branches among them.

        Args:
            permutation (`list[int]`):
                `min_selected` to K distinct ids from 1 to `num_documents`.
            num_documents (`int`, *optional*, defaults to `max_documents`):
                Number of candidates of this question.
            document_logits (`list[float]` of length `num_documents`, *optional*):
                Prior of each document, in nats; zero by default.

        Returns:
            `tuple[list[int], list[Branch]]`

        Raises:
            `ValueError`: wrong number of ids, repeated ids, or ids out of range.
        """
        num_documents = num_documents or self.max_documents
        permutation = list(permutation)
        sizes = range(self.min_selected, self.num_selected + 1)
        if len(permutation) not in sizes or len(set(permutation)) != len(permutation):
            size = f"{self.min_selected} to " * (len(sizes) > 1) + f"{self.num_selected}"
            raise ValueError(f"permutation {permutation} is not {size} distinct ids")
        if not set(permutation) <= set(range(1, num_documents + 1)):
            raise ValueError(f"permutation {permutation} has ids outside 1..{num_documents}")
        writer = Writer(self, num_documents, document_logits)
        branches = []
        while allowed := writer.allowed():
            chosen = allowed.index(writer.next_of(permutation))
            branches.append(Branch(len(writer.tokens), allowed, writer.prior(), chosen))
            writer.write(allowed[chosen])
        return writer.tokens, branches

    def decode(self, tokens: Sequence[int]) -> list[int]:
        """
        Permutation written by `tokens`, with or without the end-of-sequence token.

        Raises:
            `ValueError`: the tokens are not a complete permutation in this codec's form.
        """
        writer = Writer(self, self.max_documents)
        while allowed := writer.allowed():
            token = tokens[len(writer.tokens)] if len(writer.tokens) < len(tokens) else self.end[0]
            if token not in allowed:
                break
            writer.write(token)
        if writer.allowed() or list(tokens) not in (writer.tokens, writer.tokens[:-1]):
            raise ValueError(f"tokens {list(tokens)} do not write a permutation of {self.num_selected} ids")
        return writer.permutation

    def forced_start(self, num_documents: int) -> list[int]:
        """Tokens with which every permutation of `num_documents` documents begins: those before the first branch."""
        return Writer(self, num_documents).tokens

    def num_permutations(self, num_documents: int) -> int:
        """How many permutations of `num_documents` documents can be written."""
        return sum(math.perm(num_documents, size) for size in range(self.min_selected, self.num_selected + 1))

    def padded(self, permutation: Sequence[int]) -> list[int]:
        """The permutation with zeros up to K, as tensors hold it."""
        return [*permutation, *[0] * (self.num_selected - len(permutation))]

    @staticmethod
    def text(permutation: Sequence[int]) -> str:
        """Permutation as a reader sees it, `[3] > [1]`, without the padding of tensors."""
        return " > ".join(f"[{i}]" for i in permutation if i)


class Writer:
    """
    One permutation while it is written token by token. It stands at a branch or at the end: whatever is forced is
    written at once.

    Args:
        codec ([`PermutationCodec`]):
            Form of the permutation.
        num_documents (`int`):
            Number of candidates.
        document_logits (`list[float]` of length `num_documents`, *optional*):
            Prior of each document, in nats; zero by default.

    Attributes:
        permutation (`list[int]`):
            Ids written to their ends.
        tokens (`list[int]`):
            All tokens written.
        separator (`tuple[int, ...]`):
            Tokens to be written before the next id begins.
        prefix (`tuple[int, ...]`):
            Tokens of the id that is being written.
        num_read (`int`):
            Tokens that the model has read. A prompt is read together with the tokens that are forced at the start.
    """

    def __init__(self, codec: PermutationCodec, num_documents: int, document_logits: Sequence[float] | None = None):
        self.codec = codec
        self.document_logits = document_logits
        self.remaining = set(range(1, num_documents + 1))
        self.permutation: list[int] = []
        self.tokens: list[int] = []
        self.separator: tuple[int, ...] = ()
        self.prefix: tuple[int, ...] = ()
        self.complete = False
        self._write_forced()
        self.num_read = len(self.tokens)

    def allowed(self) -> list[int]:
        """Tokens that may come next; none when the permutation is complete."""
        return sorted([*self._ids_by_token(), *self._end()])

    def prior(self) -> list[float]:
        """What is added to the logit of each allowed token."""
        ids_by_token = self._ids_by_token()
        if self.document_logits is None:
            return [0.0] * (len(ids_by_token) + len(self._end()))
        logits = self.document_logits
        prior = {token: _log_mean_exp([logits[i - 1] for i in ids]) for token, ids in ids_by_token.items()}
        if end := self._end():
            mean = _log_mean_exp([logits[i - 1] for i in self.remaining])
            prior = {token: value - mean for token, value in prior.items()} | {end[0]: 0.0}
        return [value for _, value in sorted(prior.items())]

    def next_of(self, permutation: Sequence[int]) -> int:
        """The token with which a permutation that begins as this one goes on."""
        if len(self.permutation) == len(permutation):
            return self.codec.end[0]
        if self.separator:
            return self.separator[0]
        return self.codec.continuations[self.prefix][permutation[len(self.permutation)]]

    def copy(self) -> "Writer":
        """The same beginning, to be written on in another way."""
        other = copy.copy(self)
        other.remaining, other.permutation, other.tokens = {*self.remaining}, [*self.permutation], [*self.tokens]
        return other

    def write(self, token: int) -> None:
        """Writes a chosen token and all that it forces."""
        self._append(token)
        self._write_forced()

    def unread(self) -> list[int]:
        """Tokens that the model must read to predict the next; none when there is no next."""
        return self.tokens[self.num_read :] if self.allowed() else []

    def _ids_by_token(self) -> dict[int, list[int]]:
        """Tokens that may come next, but for the end, and the ids that each can still become."""
        if self.complete or len(self.permutation) == self.codec.num_selected:
            return {}
        if self.separator:
            return {self.separator[0]: sorted(self.remaining)}
        ids_by_token: dict[int, list[int]] = {}
        for i, token in self.codec.continuations[self.prefix].items():
            if i in self.remaining:
                ids_by_token.setdefault(token, []).append(i)
        return ids_by_token

    def _end(self) -> tuple[int, ...]:
        """The end, if it may come next."""
        between = not self.prefix and self.separator == (self.codec.separator if self.permutation else ())
        enough = len(self.permutation) >= self.codec.min_selected
        return self.codec.end if between and enough and not self.complete else ()

    def _write_forced(self) -> None:
        while len(allowed := self.allowed()) == 1:
            self._append(allowed[0])

    def _append(self, token: int) -> None:
        ends = (token,) == self._end()
        self.tokens.append(token)
        if ends:
            self.complete = True
        elif self.separator:
            self.separator = self.separator[1:]
        elif (*self.prefix, token) in self.codec.continuations:
            self.prefix = (*self.prefix, token)
        else:
            chosen = self.codec.id_of_tokens[*self.prefix, token]
            self.remaining.remove(chosen)
            self.permutation.append(chosen)
            self.prefix, self.separator = (), self.codec.separator


def _encode(tokenizer: PreTrainedTokenizerBase, segment: str) -> tuple[int, ...]:
    return tuple(tokenizer(segment, add_special_tokens=False).input_ids)


def _log_mean_exp(logits: Sequence[float]) -> float:
    highest = max(logits)
    return highest + math.log(sum(math.exp(logit - highest) for logit in logits) / len(logits))


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
    >>> from trl_dro.model.codec import parse_permutation

    >>> parse_permutation("[3] > [1] > [3] > [99]", num_documents=20, num_selected=5)
    ParsedPermutation(permutation=[3, 1], num_dropped=2)
    ```
    """
    ids = [int(number) for number in _BRACKETED.findall(text) or _NUMBER.findall(text)]
    valid = [i for i in dict.fromkeys(ids) if 1 <= i <= num_documents][:num_selected]
    return ParsedPermutation(valid, len(ids) - len(valid))
