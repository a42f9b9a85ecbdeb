# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Control tokens stay in the hands of templates: what a question, document or answer holds is encoded as text.

A tokenizer reads `</s>` or `<|im_start|>` as a control token wherever it stands, so that a document could end the
prompt or open another's turn. Here such strings in a text are marked before templates are filled in, and encoded
character by character, as far as need be, behind them.
"""

import copy
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

import jinja2
from transformers import PreTrainedTokenizerBase


# Stands before what is no control token though it looks like one. A noncharacter, which no text for interchange holds.
MARK = "\ufdd0"


class ControlTokens:
    """
    What a tokenizer reads as control tokens: its special tokens, and other added tokens that its chat template writes.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Any tokenizer, "fast" or "slow".
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        template = str(tokenizer.chat_template or "")
        self.added = {
            token.content: (token_id, token)
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.special or (token.content.strip() and token.content in template)
        }
        self._lengths = sorted({len(content) for content in self.added}, reverse=True)
        firsts = {re.escape(content[0]) for content in self.added if content}
        self._first = re.compile("|".join(sorted(firsts)) or r"(?!)")
        self._as_text: PreTrainedTokenizerBase | None = None

    def starts(self, text: str) -> Iterator[tuple[int, str]]:
        """Yields the place and the longest control token of each place in `text` where one begins."""
        for match in self._first.finditer(text):
            start = match.start()
            for length in self._lengths:
                if text[start : start + length] in self.added:
                    yield start, text[start : start + length]
                    break

    def mark(self, text: str) -> str:
        """Text in which a `MARK` stands before everything that would be read as a control token."""
        text = text.replace(MARK, "")
        pieces, end = [], 0
        for start, _ in self.starts(text):
            pieces.append(text[end:start])
            end = start
        return MARK.join([*pieces, text[end:]])

    def tokenizer_for(self, texts: Sequence[str]) -> PreTrainedTokenizerBase:
        """The tokenizer for texts that hold no control token, or a copy that reads its special tokens as text."""
        if not any(True for text in texts for _ in self.starts(text)):
            return self.tokenizer
        if self._as_text is None:
            # A copy, since "fast" tokenizers keep the setting and other threads may be encoding.
            self._as_text = copy.deepcopy(self.tokenizer)
            self._as_text.split_special_tokens = True
        return self._as_text

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a text that holds no control token, whatever it looks like."""
        starts = [start for start, _ in self.starts(text)]
        if not starts:
            return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        tokenizer = self.tokenizer_for([text])
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        if not self._control_ids().isdisjoint(ids):  # the setting spares added tokens that are not declared special
            cuts = [0, *(start + 1 for start in starts), len(text)]
            pieces = [text[start:end] for start, end in zip(cuts[:-1], cuts[1:], strict=True) if start < end]
            encoded = tokenizer(pieces, add_special_tokens=False, verbose=False).input_ids
            ids = [token for piece in encoded for token in piece]
        return ids

    def prompt_ids(self, prompt: str, add_special_tokens: bool) -> list[int]:
        """
        Token ids of a prompt whose texts are marked: what is not marked is a control token, and the marks are left
        out. A prompt without marks is encoded as the tokenizer does.

        Args:
            prompt (`str`):
                Template with marked texts filled in.
            add_special_tokens (`bool`):
                Whether the tokenizer adds those with which it begins and ends a text.

        Returns:
            `list[int]`: token ids.
        """
        if MARK not in prompt:
            return list(self.tokenizer(prompt, add_special_tokens=add_special_tokens, verbose=False).input_ids)
        ids: list[int] = []
        done = 0
        for start, end in self._texts(prompt):
            if MARK in prompt[start:end]:
                if done < start:
                    ids += self.tokenizer(prompt[done:start], add_special_tokens=False, verbose=False).input_ids
                ids += self.text_ids(prompt[start:end].replace(MARK, ""))
                done = end
        if done < len(prompt):
            ids += self.tokenizer(prompt[done:], add_special_tokens=False, verbose=False).input_ids
        if add_special_tokens:
            inner = self.tokenizer("1", add_special_tokens=False, verbose=False).input_ids
            outer = list(self.tokenizer("1", verbose=False).input_ids)
            before = next(i for i in range(len(outer)) if outer[i : i + len(inner)] == inner)
            ids = [*outer[:before], *ids, *outer[before + len(inner) :]]
        return ids

    def _texts(self, prompt: str) -> Iterator[tuple[int, int]]:
        """Beginning and end of each text between control tokens, less the white space that these swallow."""
        begin, strip_left = 0, False
        controls = [(start, content) for start, content in self.starts(prompt) if prompt[start - 1 : start] != MARK]
        for start, content in [*controls, (len(prompt), "")]:
            if start < begin:
                continue  # within the control token before
            token = self.added[content][1] if content else None
            text = prompt[begin:start]
            left = len(text) - len(text.lstrip()) if strip_left else 0
            right = len(text) - len(text.rstrip()) if token and token.lstrip else 0
            yield begin + left, max(begin + left, start - right)
            begin, strip_left = start + len(content), bool(token and token.rstrip)

    def _control_ids(self) -> set[int]:
        # Words that are not in the vocabulary are no control tokens.
        return {token_id for token_id, _ in self.added.values()} - {self.tokenizer.unk_token_id}

    def end_token_id(self) -> int | None:
        """
        Token that ends the model's turn: the control token with which the chat template closes an answer, else the
        end-of-sequence token. For Gemma and Phi-3 these are two.
        """
        eos: int | None = self.tokenizer.eos_token_id
        if self.tokenizer.chat_template is None:
            return eos
        dialogue = [{"role": "user", "content": "1"}, {"role": "assistant", "content": MARK}]
        try:
            text = str(self.tokenizer.apply_chat_template(dialogue, tokenize=False))
        except (jinja2.TemplateError, TypeError, ValueError):  # a template for other messages
            return eos
        before, mark, behind = text.rpartition(MARK)
        start, content = next(self.starts(behind), (0, ""))
        return self.added[content][0] if mark and content and not behind[:start].strip() else eos


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
    """Control tokens of a tokenizer, found once."""
    return _control_tokens(tokenizer, str(tokenizer.chat_template), len(tokenizer))


@lru_cache(maxsize=16)
def _control_tokens(tokenizer: PreTrainedTokenizerBase, _template: str, _size: int) -> ControlTokens:
    return ControlTokens(tokenizer)  # the other arguments tell when it has changed


def text_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, in which nothing is a control token."""
    controls = control_tokens(tokenizer)
    return [controls.text_ids(text) for text in texts]


def end_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """
    Token with which answers and permutations end, see [`~ControlTokens.end_token_id`].

    Raises:
        `ValueError`: the tokenizer has none, so that no answer would ever end.
    """
    end = control_tokens(tokenizer).end_token_id()
    if end is None:
        raise ValueError("the tokenizer has no eos token to end an answer with: set tokenizer.eos_token")
    return end


def end_token_ids(tokenizer: PreTrainedTokenizerBase, declared: int | Sequence[int] | None) -> list[int]:
    """
    Tokens at which generation stops: the end of a turn, the end-of-sequence token, and those that the model declares.
    """
    ends = {tokenizer.eos_token_id, end_token_id(tokenizer)} - {None}
    ends |= {declared} if isinstance(declared, int) else set(declared or [])
    return sorted(ends)


def escape_marked(prompt: str) -> str:
    """A marked prompt for those who encode it themselves: a space breaks what they would read as a control token."""
    return re.sub(f"{MARK}(.)", r"\1 ", prompt, flags=re.DOTALL)
