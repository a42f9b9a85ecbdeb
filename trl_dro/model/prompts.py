# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Selector and generator prompts: a question and its documents in, token ids out.

Both roles read the same document block, `[1] title`, newline, `text`, and so on. The tokenizer's chat template is
used when it has one, plain text otherwise. Documents that do not fit are shortened to a common number of tokens, so
that none is lost whole.

Texts cannot pass for what stands around them: control tokens in them are text (`control_tokens.py`), a document has no
line of its own that could begin another one (`document_body`), and a question or a turn is one line (`question_body`).
"""

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .control_tokens import control_tokens, end_token_id, escape_marked, text_ids


# The question stands before and after the documents: a causal model reads them knowing what to look for.
SELECTOR_TEMPLATE = (
    "Question: {question}\n\n"
    "Passages:\n{documents}\n\n"
    "Question: {question}\n"
    "Rank the {num_selected} of the {num_documents} passages above that help most to answer the question, best first. "
    "Write only their ids, like this: {format}\n"
)
GENERATOR_TEMPLATE = (
    "Passages:\n{documents}\n\n"
    "Question: {question}\n"
    "Answer the question with the passages above. Write only the answer, as short as possible.\n"
    "Answer:\n"
)

# A document and a question behind it, in parts that are encoded apart: no token spans two of them.
BEFORE_DOCUMENT, BEFORE_QUESTION = "Passage:", "\nQuestion:"

# Questions are refused beforehand if their documents would have to be cut below the first. A cut can encode to more
# tokens than it was cut to, so prompts are refused only below the second.
MIN_DOCUMENT_TOKENS = 8
LEAST_DOCUMENT_TOKENS = 6

# What could pass for the number of a passage where it begins a line.
_NUMBER = re.compile(r"\s*\[\s*\d")

Template = str | Callable[..., str | list[dict[str, str]]]
Question = str | list[dict[str, str]]
PassageRow = tuple[list[int], list[int]]  # what is read, and the question, whose likelihood is asked for


class PromptTooLongError(ValueError):
    """A question whose prompt exceeds the limit however short its documents are cut."""


class PromptBuilder:
    """
    Writes the prompts of one role.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the role's model.
        template (`str` or `Callable`):
            Format string with the fields `{question}` and `{documents}`, and any of `{num_documents}`,
            `{num_selected}`, `{format}` (the shape of a permutation, `[id] > [id]`); or a function that takes these
            as keyword arguments and returns the text of the user's message or a list of chat messages. What would be
            read as a control token in question and documents has a `MARK` before it, which is to stay there.
        num_selected (`int`):
            Number of documents in a permutation, K.
        max_length (`int`, *optional*):
            Longest prompt, in tokens. Documents are shortened evenly, longest first, until it fits.
        max_document_length (`int`, *optional*):
            Longest document (title and text), in tokens.
        chat_template_kwargs (`dict`, *optional*):
            Passed to the tokenizer's chat template, e.g. `{"enable_thinking": False}`.

    Raises:
        `ValueError`: the template has an unknown field, or lacks `{question}` or `{documents}`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        num_selected: int,
        max_length: int | None = None,
        max_document_length: int | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ):
        self.tokenizer = tokenizer
        self.template = template
        self.num_selected = num_selected
        self.max_length = max_length
        self.max_document_length = max_document_length
        self.chat_template_kwargs = chat_template_kwargs or {}
        check_template(template)

    def __call__(self, question: Question, documents: Sequence[dict[str, Any]]) -> list[int]:
        """
        Prompt for one question.

        Args:
            question (`str` or `list[dict]`):
                Question, or the messages of a dialogue that ends with the user's turn.
            documents (`list[dict]`):
                Documents with a `text` and an optional `title`, in the order in which they are numbered.

        Returns:
            `list[int]`: token ids, ready for the completion to be appended.

        Raises:
            [`PromptTooLongError`]: the prompt exceeds `max_length` with every document cut to `LEAST_DOCUMENT_TOKENS`.
        """
        return self._fit(question, documents)[1]

    def write(self, question: Question, documents: Sequence[dict[str, Any]]) -> str | list[dict[str, str]]:
        """
        The prompt of [`~PromptBuilder.__call__`] as trainers and servers take it, who encode it themselves: chat
        messages if the tokenizer has a chat template, else a text. As they would read control tokens in the texts, a
        space breaks these.
        """
        prompt = self._fit(question, documents)[0]
        if isinstance(prompt, str):
            return escape_marked(prompt)
        return [{**message, "content": escape_marked(message["content"])} for message in prompt]

    def _fit(
        self, question: Question, documents: Sequence[dict[str, Any]]
    ) -> tuple[str | list[dict[str, str]], list[int]]:
        """The prompt with its documents cut so that it fits, written and encoded."""
        bodies = [document_body(document) for document in documents]
        encoded = self._encode_bodies(bodies)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        limit = max(lengths, default=0) if self.max_document_length is None else self.max_document_length
        prompt = self._write(question, self._truncate(bodies, encoded, limit))
        ids = self._encode(prompt)
        # Tokens at a cut can merge with their neighbours, so the budget is met by trying, seldom more than twice.
        while self.max_length is not None and len(ids) > self.max_length:
            if limit <= LEAST_DOCUMENT_TOKENS:
                raise PromptTooLongError(self._too_long(len(ids), len(documents), limit))
            spare = sum(min(length, limit) for length in lengths) - (len(ids) - self.max_length)
            limit = max(LEAST_DOCUMENT_TOKENS, min(limit - 1, even_limit(lengths, spare)))
            prompt = self._write(question, self._truncate(bodies, encoded, limit))
            ids = self._encode(prompt)
        return prompt, ids

    def check_fits(self, question: Question, num_documents: int) -> None:
        """
        Raises [`PromptTooLongError`] if `question` with `num_documents` documents of `MIN_DOCUMENT_TOKENS` tokens
        exceeds `max_length`.
        """
        # Numbers stay one or more tokens each in any vocabulary.
        documents = ["1 " * MIN_DOCUMENT_TOKENS] * num_documents
        encoded = self._encode_bodies(documents)
        length = len(self._encode(self._write(question, self._truncate(documents, encoded, MIN_DOCUMENT_TOKENS))))
        if self.max_length is not None and length > self.max_length:
            raise PromptTooLongError(self._too_long(length, num_documents, MIN_DOCUMENT_TOKENS))

    def _too_long(self, length: int, num_documents: int, limit: int) -> str:
        return (
            f"the prompt has {length} tokens with each of the {num_documents} documents cut to {limit} tokens, more "
            f"than the limit of {self.max_length}: raise max_prompt_length, use fewer candidates, or shorten the "
            "question"
        )

    def _encode_bodies(self, bodies: list[str]) -> dict[str, Any]:
        if not bodies:  # no documents, to see what a model answers without
            return {"input_ids": [], "offset_mapping": []}
        # Only the "fast" tokenizers know where in the text a token ends.
        return control_tokens(self.tokenizer).tokenizer_for(bodies)(
            bodies, add_special_tokens=False, return_offsets_mapping=self.tokenizer.is_fast, verbose=False
        )

    def _truncate(self, bodies: list[str], encoded: dict[str, Any], limit: int) -> list[str]:
        truncated = []
        for i, (body, ids) in enumerate(zip(bodies, encoded["input_ids"], strict=True)):
            if len(ids) <= limit:
                truncated.append(body)
            elif self.tokenizer.is_fast:
                offsets = encoded["offset_mapping"][i]
                # A character of several tokens is kept whole or left out, and something is kept of each document.
                truncated.append(body[: max(1, min(offsets[limit - 1][1], offsets[limit][0]))])
            else:
                truncated.append(str(self.tokenizer.decode(ids[:limit])))
        return truncated

    def _write(self, question: Question, bodies: list[str]) -> str | list[dict[str, str]]:
        mark = control_tokens(self.tokenizer).mark
        fields = {
            "question": mark(question_body(question)),
            "documents": "\n".join(f"[{i}] {mark(body)}" for i, body in enumerate(bodies, start=1)),
            "num_documents": len(bodies),
            "num_selected": self.num_selected,
            "format": " > ".join(["[id]"] * self.num_selected),
        }
        content = render(self.template, fields)
        if self.tokenizer.chat_template is None:
            return content if isinstance(content, str) else question_text(content) + "\n"
        return [{"role": "user", "content": content}] if isinstance(content, str) else content

    def _encode(self, prompt: str | list[dict[str, str]]) -> list[int]:
        controls = control_tokens(self.tokenizer)
        if not isinstance(prompt, str):
            text = self.tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=False, **self.chat_template_kwargs
            )
            return controls.prompt_ids(str(text), add_special_tokens=False)
        ids = controls.prompt_ids(prompt, add_special_tokens=True)
        # Some tokenizers close every text with eos, which would end the prompt before the completion.
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids


class PassagePrompts:
    """
    Writes what a selector of query likelihoods reads: a row of its own for each document.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the selector's model. Its chat template is not used: a passage with its question is a text.
        max_length (`int`, *optional*):
            Longest row, in tokens. Documents are cut to fit.
        max_document_length (`int`, *optional*):
            Longest document (title and text), in tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        max_document_length: int | None = None,
    ):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.max_document_length = max_document_length
        before = list(tokenizer(BEFORE_DOCUMENT).input_ids)
        # Some tokenizers close every text with eos.
        self.before = before[:-1] if before[-1] == tokenizer.eos_token_id else before
        self.behind = list(tokenizer(BEFORE_QUESTION, add_special_tokens=False).input_ids)

    def rows(
        self, question: Question, documents: Sequence[dict[str, Any]], with_none: bool = False
    ) -> list[PassageRow]:
        """
        What is read for one question.

        Args:
            question (`str` or `list[dict]`):
                Question, or the messages of a dialogue that ends with the user's turn.
            documents (`list[dict]` of length `n`):
                Documents with a `text` and an optional `title`.
            with_none (`bool`, *optional*, defaults to `False`):
                Whether a row without any document comes last.

        Returns:
            `list[tuple[list[int], list[int]]]` of length `n` or `n + 1`: tokens of a document's row and, behind them,
            of the question.

        Raises:
            [`PromptTooLongError`]: the question leaves no room for a document of `MIN_DOCUMENT_TOKENS` tokens.
        """
        controls = control_tokens(self.tokenizer)
        asked = controls.text_ids(f" {question_body(question)}")
        limit = self._room(asked)
        bodies = [controls.text_ids(f" {document_body(document)}")[:limit] for document in documents]
        return [([*self.before, *body, *self.behind], asked) for body in [*bodies, *([[]] if with_none else [])]]

    def __call__(self, question: Question, documents: Sequence[dict[str, Any]]) -> list[int]:
        """All tokens that are read for one question, row behind row."""
        return [token for row in self.rows(question, documents) for part in row for token in part]

    def check_fits(self, question: Question, num_documents: int) -> None:
        """Raises [`PromptTooLongError`] if `question` leaves no room for a document; each has a row of its own."""
        self._room(control_tokens(self.tokenizer).text_ids(f" {question_body(question)}"))

    def _room(self, asked: Sequence[int]) -> int | None:
        """Tokens that a document can have; `None` for any number."""
        if self.max_length is None:
            return self.max_document_length
        room = self.max_length - len(self.before) - len(self.behind) - len(asked)
        if room < MIN_DOCUMENT_TOKENS:
            raise PromptTooLongError(
                f"a question of {len(asked)} tokens leaves no room for {MIN_DOCUMENT_TOKENS} tokens of a document in "
                f"the limit of {self.max_length}: raise max_prompt_length, or shorten the question"
            )
        return room if self.max_document_length is None else min(room, self.max_document_length)


Prompts = PromptBuilder | PassagePrompts


def check_lengths(
    dataset: Dataset,
    name: str,
    builders: Iterable[tuple[Prompts, int]],
    tokenizer: PreTrainedTokenizerBase,
    max_answer_length: int,
    all_answers: bool,
) -> None:
    """
    Checks before any model is loaded that the longest question fits the prompts and every target answer its limit.

    Args:
        dataset (`Dataset`):
            Dataset with the columns `question` and `answers`.
        name (`str`):
            What the dataset is called in error messages.
        builders (`Iterable[tuple[Prompts, int]]`):
            Prompt builders and the number of documents that each shows at most.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the generator.
        max_answer_length (`int`):
            Longest answer in tokens.
        all_answers (`bool`):
            Whether every alias is a training target, not the first one alone.

    Raises:
        [`PromptTooLongError`]: a question does not fit even with every document cut to `MIN_DOCUMENT_TOKENS`.
        `ValueError`: an answer is longer than `max_answer_length`.
    """
    builders = list(builders)
    longest = [(0, 0)] * len(builders)  # tokens and row of the longest question, by each builder's tokenizer
    row = 0
    for batch in dataset.select_columns(["question", "answers"]).iter(batch_size=1000):
        questions = [question_text(question) for question in batch["question"]]
        for i, (builder, _) in enumerate(builders):
            question_lengths = [len(ids) for ids in text_ids(builder.tokenizer, questions)]
            longest[i] = max(longest[i], *zip(question_lengths, range(row, row + len(questions)), strict=True))
        targets = [answers if all_answers else answers[:1] for answers in batch["answers"]]
        flat = text_ids(tokenizer, [answer for answers in targets for answer in answers])
        lengths = iter(len(ids) for ids in flat)
        for answers in targets:
            for position, length in enumerate(itertools.islice(lengths, len(answers))):
                if length > max_answer_length:
                    raise ValueError(
                        f"{name}, row {row}, column answers[{position}]: has {length} tokens, more than "
                        f"max_answer_length={max_answer_length}; raise the limit or drop the row (--long_answers drop)"
                    )
            row += 1
    for (builder, num_documents), (_, longest_row) in zip(builders, longest, strict=True):
        try:
            builder.check_fits(dataset[longest_row]["question"], num_documents)
        except PromptTooLongError as error:
            raise PromptTooLongError(f"{name}, row {longest_row}, column question: {error}") from None


def check_template(template: Template, name: str = "prompt template") -> None:
    """
    Raises `ValueError`, in which the template has a name, if it is neither a function nor a format string, or one that
    has an unknown field, or lacks `{question}` or `{documents}`.
    """
    if callable(template):
        return
    if not isinstance(template, str):
        raise ValueError(f"{name} must be a text or a function, not {template!r}: write one")
    # The first two are marks that no template contains by itself.
    marks: dict[str, Any] = {"question": "\0q", "documents": "\0d"}
    marks |= {"num_documents": 2, "num_selected": 1, "format": ""}
    try:
        text = template.format(**marks)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{name} {template[:60]!r} cannot be filled in ({type(error).__name__}: {error}): its fields "
            f"are {', '.join('{' + field + '}' for field in marks)}; write other braces twice"
        ) from None
    for field in ("question", "documents"):
        if marks[field] not in text:
            raise ValueError(f"{name} {template[:60]!r} does not show the {field}: add {{{field}}}")


def render(template: Template, fields: dict[str, Any]) -> str | list[dict[str, str]]:
    """Template filled in: the user's message, or a list of chat messages if a function returns one."""
    return template.format(**fields) if isinstance(template, str) else template(**fields)


def answer_ids(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """
    Token ids of an answer and of the end of the model's turn, see [`~control_tokens.end_token_id`], encoded apart from
    the prompt so that no token spans both.
    """
    return [*control_tokens(tokenizer).text_ids(answer), end_token_id(tokenizer)]


def document_body(document: dict[str, Any]) -> str:
    """
    Title, newline, text; the text alone when there is no title.

    Title and text are a line each: line breaks in them become spaces. A text that begins like the number of a passage,
    `[3]`, stays on the line of its title. So a line that begins with a number begins a passage, whatever they say.
    """
    title, text = (_one_line(document.get(key) or "") for key in ("title", "text"))
    if not title:
        return text
    return f"{title}{' ' if _NUMBER.match(text) else chr(10)}{text}"


def _one_line(text: str) -> str:
    lines = text.splitlines()  # at every line break of Unicode
    return text if lines == [text] else " ".join(line.strip() for line in lines if line.strip())


def question_body(question: Question) -> str:
    """
    The question as prompts show it: one line, or one for each turn of a dialogue. Line breaks in them become spaces,
    so that no line of theirs can begin a turn or a passage.
    """
    if isinstance(question, str):
        return _one_line(question)
    return question_text([{**message, "content": _one_line(message["content"])} for message in question])


def question_text(question: Question) -> str:
    """A dialogue as one line per turn, `User: …`, `Assistant: …`; a plain question as it is."""
    if isinstance(question, str):
        return question
    return "\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in question)


def even_limit(lengths: Sequence[int], budget: int) -> int:
    """
    Largest limit with `sum(min(length, limit)) <= budget`: short documents stay whole, long ones share the rest.

    Args:
        lengths (`list[int]`):
            Document lengths in tokens.
        budget (`int`):
            Tokens for all documents together.

    Returns:
        `int`: tokens per document, at least 0.

    Example:

    ```python
    >>> from trl_dro.model.prompts import even_limit

    >>> even_limit([10, 100, 100], budget=110)
    50
    ```
    """
    remaining = sorted(lengths)
    while remaining:
        share = max(budget, 0) // len(remaining)
        if remaining[0] > share:
            return share
        budget -= remaining.pop(0)
    return max(lengths, default=0)
