# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Who writes questions about a passage or two: a language model here, or one behind an OpenAI-compatible endpoint."""

import copy
import itertools
import json
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.lines import first_line
from ..data.schema import DatasetError, Document
from ..data.storage import content_key
from ..model.likelihood import completion_logits, completion_logps
from ..model.loading import load_tokenizer, longest_sequence, prepare_tokenizer
from ..system.run_folder import LoadOptions, RoleSource, files_key


# Environment variable with the key of an endpoint; it stands in no settings, message or file.
KEY_VARIABLE = "OPENAI_API_KEY"
# What passes by itself: too many requests, and servers that are starting or behind one that is.
TRANSIENT = {429, 500, 502, 503, 504}
QUESTION_WORDS = ("who", "when", "where", "what", "which", "how many")
MAX_PASSAGE_TOKENS = 512
MAX_NEW_TOKENS = 64

BAKERY = (
    "Bakery Nord: Bakery Nord is a bakery in Lindau, founded by Ada Stone in 1921. It sells rye bread, and was the "
    "first bakery in Bavaria to bake with solar power."
)
RIVER = (
    "Oker: The Oker is a river in Lower Saxony, Germany, 128 kilometres long. It rises in the Harz mountains and "
    "flows into the Aller near Meinersen."
)
FILM = (
    "Second Harvest (film): Second Harvest is a drama film directed by Lena Brook. Its score, by Tomas Vial, won the "
    "Silver Reel award. It was released in March 1987."
)
# One question each: a model that reads several in a row begins to repeat itself.
EXAMPLES = {  # by the number of passages
    1: (
        ((BAKERY,), "who founded Bakery Nord?", "Ada Stone"),
        ((RIVER,), "where does the river Oker rise?", "the Harz mountains"),
        ((FILM,), "when was the film Second Harvest released?", "March 1987"),
    ),
    2: (
        (
            (BAKERY, "Ada Stone: Ada Stone was a baker and mountaineer. She climbed Mont Blanc in 1931."),
            "when did the founder of Bakery Nord climb Mont Blanc?",
            "1931",
        ),
        (
            ("Aller: The Aller is a river 215 kilometres long. It flows through the town of Celle.", RIVER),
            "which town lies on the river that the Oker flows into?",
            "Celle",
        ),
        (
            (FILM, "Lena Brook: Lena Brook is a director from Porto, where she went to school with Ana Reis."),
            "who went to school with the director of Second Harvest?",
            "Ana Reis",
        ),
    ),
}
SHOTS = {
    number: [
        "".join(f"Passage: {passage}\n" for passage in passages) + f"Question: {question}\nAnswer: {answer}\n\n"
        for passages, question, answer in examples
    ]
    for number, examples in EXAMPLES.items()
}
ASKED_FOR = {
    1: "that the passage below answers, each about another fact of it. A reader who has not seen the passage must "
    "understand each question, so name what it is about, and never write of the passage, the text or its author. The "
    "answer is a name, date, number or short phrase copied from the passage word for word.",
    2: "that take both passages below to answer: each asks about a fact of one passage, and says what it asks about "
    "only by a fact of the other, without the name that links them. A reader who has not seen the passages must "
    "understand each question, so never write of the passages, the texts or their authors. The answer is a name, "
    "date, number or short phrase copied from a passage word for word.",
}
INSTRUCTION = (
    "You write questions for a search engine's test. Write {count} questions {asked_for} Write nothing but lines of "
    "the form\nQuestion: …\nAnswer: …\n\nAn example:\n\n{example}\n\n{passages}"
)

_PAIR = re.compile(r"^\W*Question(?: \d+)?\W*:[ \t]*(.+?)\s*\n\W*Answer(?: \d+)?\W*:[ \t]*(.+?)[ \t]*$", re.MULTILINE)


# What one question is about: a passage, or two that share a name.
Source = Sequence[Document]


class Pair(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


class Written(NamedTuple):
    """What was written about a passage, and how many tokens were read and written for it."""

    pairs: list[Pair]
    tokens: int


class Writer(Protocol):
    """What writes questions."""

    at_once: int

    @property
    def settings(self) -> dict[str, Any]:
        """What its questions depend on, in values that JSON can hold."""
        ...

    def write(self, sources: Sequence[Source], count: int) -> list[Written]:
        """Up to `count` questions about each of at most `at_once` passages or pairs of passages."""
        ...


def parse_pairs(text: str) -> list[Pair]:
    """
    The questions and answers of lines `Question: …`, `Answer: …`, without white space, quotes and full stops around.

    Args:
        text (`str`):
            What a model wrote. What is no such pair of lines is passed over.
    """
    pairs = []
    for question, answer in _PAIR.findall(text):
        question = " ".join(question.strip(' "“”*').split()).rstrip(".。")
        answer = " ".join(answer.strip(' "“”*').split())
        answer = answer if re.search(r"\b\w{1,2}\.$", answer) else answer.rstrip(".。")
        if question and answer:
            question = question[0].upper() + question[1:]
            pairs.append(Pair(question if question.endswith(("?", "？")) else f"{question}?", answer))
    return pairs


def passage_text(passage: Document) -> str:
    """Title and text on one line, as writers read a passage."""
    title = (passage.get("title") or "").strip()
    return " ".join(f"{title}: {passage['text']}".split() if title else passage["text"].split())


class LocalModel:
    """
    A causal language model of transformers. It writes each question after three examples and a question word,
    greedily, which small base models can do too, and tells how much likelier an answer is with its passage.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        name (`str`, *optional*):
            What tells the model from others.
        question_words (`tuple[str]`, *optional*):
            First words of questions. They take turns, passage after passage.
    """

    at_once = 1

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "",
        question_words: Sequence[str] = QUESTION_WORDS,
    ):
        self.model = model.eval()
        self.tokenizer = prepare_tokenizer(tokenizer)
        self.name = name
        self.question_words = tuple(question_words)
        self._turn = 0
        self._shots: dict[int, tuple[list[int], Any]] = {}

    @classmethod
    def from_pretrained(
        cls, name: str, options: LoadOptions | None = None, question_words: Sequence[str] = QUESTION_WORDS
    ) -> "LocalModel":
        """Loads a model from a folder or the Hub. Raises `ValueError` if it cannot be loaded."""
        options = options or LoadOptions()
        tokenizer = load_tokenizer(name, trust_remote_code=options.trust_remote_code)
        return cls(options.load(RoleSource(name)), tokenizer, files_key([name]) or name, question_words)

    @property
    def settings(self) -> dict[str, Any]:
        """What its questions depend on."""
        return {"model": self.name, "question_words": list(self.question_words), "prompt": content_key(SHOTS)}

    def begin_at(self, row: int) -> None:
        """Gives the passage at this place the question words that it would have had without a kill."""
        self._turn = row

    @torch.no_grad()
    def write(self, sources: Sequence[Source], count: int) -> list[Written]:
        """See [`Writer`]."""
        return [self._write_one(source, count) for source in sources]

    def _write_one(self, source: Source, count: int) -> Written:
        count = min(count, len(self.question_words))
        words = [self.question_words[(self._turn * count + i) % len(self.question_words)] for i in range(count)]
        self._turn += 1
        device = self.model.device
        shots, cache = self._read_shots(len(source))
        head = self.tokenizer("Passage:", add_special_tokens=False).input_ids
        end = self.tokenizer("\n", add_special_tokens=False).input_ids
        most = self._room(len(source), len(shots))
        read: list[int] = []
        for passage in source:
            body = self.tokenizer(f" {passage_text(passage)}", add_special_tokens=False).input_ids
            read += [*head, *body[:most], *end]
        cache = copy.deepcopy(cache)
        cache = self.model(torch.tensor([read], device=device), past_key_values=cache, use_cache=True).past_key_values
        cache.batch_repeat_interleave(count)
        leads = [self.tokenizer(f"Question: {word}", add_special_tokens=False).input_ids for word in words]
        texts, num_written = self._write_on(leads, cache)
        found = [parse_pairs(f"Question: {word}{text}") for word, text in zip(words, texts, strict=True)]
        pairs = [pair for of_word in found for pair in of_word[:1]]
        return Written(list(dict.fromkeys(pairs)), len(read) + num_written)

    def _write_on(self, leads: Sequence[Sequence[int]], cache: Any) -> tuple[list[str], int]:
        """
        What the model writes behind each of several beginnings, greedily and up to the end of the second line, and how
        many tokens that took. The beginnings need not be as long as one another: a row reads its own while others are
        being written, so that none is padded.
        """
        rows = [list(lead) for lead in leads]
        texts = [""] * len(rows)
        tokens = [row[0] for row in rows]
        for step in range(1, max(map(len, rows)) + MAX_NEW_TOKENS):
            ids = torch.tensor(tokens, device=self.model.device).unsqueeze(1)
            logits = self.model(ids, past_key_values=cache, use_cache=True).logits[:, -1]
            tokens = logits.argmax(dim=-1).tolist()
            is_done = True
            for i, row in enumerate(rows):
                if step < len(leads[i]):
                    tokens[i], is_done = leads[i][step], False
                elif texts[i].count("\n") < 2 and row[-1] != self.tokenizer.eos_token_id:
                    row.append(tokens[i])
                    texts[i] = str(self.tokenizer.decode(row[len(leads[i]) :], skip_special_tokens=True))
                    is_done = False
            if is_done:
                break
        return texts, sum(map(len, rows))

    def _room(self, number: int, others: int = 0) -> int:
        """Tokens of each of so many passages, beside others, a question and an answer."""
        context = longest_sequence(self.model.config) or math.inf
        return int(min(MAX_PASSAGE_TOKENS, max(1, (context - others - 2 * MAX_NEW_TOKENS) // number)))

    def _read_shots(self, number: int) -> tuple[list[int], Any]:
        """Token ids of the examples with so many passages, and what the model keeps of them; read once."""
        if number not in self._shots:
            ids = self.tokenizer("".join(SHOTS[number])).input_ids
            if ids and ids[-1] == self.tokenizer.eos_token_id:  # which some tokenizers put at the end
                ids = ids[:-1]
            cache = self.model(torch.tensor([ids], device=self.model.device), use_cache=True).past_key_values
            self._shots[number] = ids, cache
        return self._shots[number]

    @torch.no_grad()
    def gains(self, source: Source, pairs: Sequence[Pair]) -> list[float]:
        r"""
        How much likelier each answer is with its passage, \\( \log p(y \mid x, d) - \log p(y \mid x) \\); with two
        passages, how much likelier with both than with the better one of them, or none.

        Args:
            source (`list[dict]`):
                The passage, or both.
            pairs (`list[Pair]`):
                Questions and answers.

        Returns:
            `list[float]`: nats.
        """
        if not pairs:
            return []
        answers = [self.tokenizer(f" {pair.answer}", add_special_tokens=False).input_ids for pair in pairs]
        asked = [f"Question: {pair.question}\nAnswer:" for pair in pairs]
        pad, most = self.tokenizer.pad_token_id, self._room(len(source))
        logps = []
        for size in range(len(source) + 1):
            for part in itertools.combinations(source, size):
                read: list[int] = []
                for passage in part:
                    text = f"Passage: {passage_text(passage)}\n"
                    read += self.tokenizer(text, add_special_tokens=not read).input_ids[:most]
                prompts = [read + self.tokenizer(each, add_special_tokens=not read).input_ids for each in asked]
                logits = completion_logits(self.model, prompts, answers, pad, self.model.device)
                logps.append(completion_logps(logits))
        *less, whole = torch.stack(logps)
        gains: list[float] = (whole - torch.stack(less).amax(dim=0)).tolist()
        return gains


class _Refused(urllib.request.HTTPRedirectHandler):
    """A redirection would take the key along to wherever it leads."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Endpoint:
    """
    A chat model behind an OpenAI-compatible endpoint: OpenAI's own, vLLM, llama.cpp, Ollama and so on. The environment
    variable `OPENAI_API_KEY`, if it is set, is sent as its key.

    Args:
        api_base (`str`):
            Address up to and without `/chat/completions`, e.g. `"http://localhost:8000/v1"`.
        model (`str`):
            Name of the model there.
        attempts (`int`, *optional*, defaults to `6`):
            Requests until the endpoint is given up.
        pause (`float`, *optional*, defaults to `1.0`):
            Seconds before the second, twice as many before each other; what the endpoint asks for, if it is longer.
        at_once (`int`, *optional*, defaults to `8`):
            Requests at a time.

    Raises:
        `DatasetError`: the address is none.
    """

    def __init__(self, api_base: str, model: str, attempts: int = 6, pause: float = 1.0, at_once: int = 8):
        if not re.match(r"https?://[^/@]+(/|$)", api_base):
            raise DatasetError(
                "--api_base must be an address like http://localhost:8000/v1, without name or key in it"
            )
        self.url = api_base.rstrip("/") + "/chat/completions"
        self.api_base = api_base
        self.model = model
        self.attempts = attempts
        self.pause = pause
        self.at_once = at_once
        self._opener = urllib.request.build_opener(_Refused)

    @property
    def settings(self) -> dict[str, Any]:
        """What its questions depend on."""
        return {"api_base": self.api_base, "model": self.model, "prompt": content_key(INSTRUCTION, ASKED_FOR, SHOTS)}

    def write(self, sources: Sequence[Source], count: int) -> list[Written]:
        """See [`Writer`]. Raises a `DatasetError` if the endpoint refuses, or does not answer after all attempts."""
        with ThreadPoolExecutor(self.at_once) as pool:
            return list(pool.map(lambda source: self._write_one(source, count), sources))

    def _write_one(self, source: Source, count: int) -> Written:
        prompt = INSTRUCTION.format(
            count=count,
            asked_for=ASKED_FOR[len(source)],
            example=SHOTS[len(source)][0].strip(),
            passages="".join(f"Passage: {passage_text(passage)}\n" for passage in source),
        )
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
        answer = self._ask(json.dumps(body).encode())
        try:
            text = answer["choices"][0]["message"]["content"] or ""
        except (KeyError, IndexError, TypeError):
            raise DatasetError(f"{self.url} did not answer as a chat model does: check --api_base") from None
        usage = answer.get("usage") or {}
        return Written(list(dict.fromkeys(parse_pairs(text)))[:count], int(usage.get("total_tokens") or 0))

    def _ask(self, body: bytes) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        pause, reason = self.pause, ""
        for attempt in range(1, self.attempts + 1):
            asked_for = 0.0
            try:
                with self._opener.open(urllib.request.Request(self.url, body, headers), timeout=300) as reply:
                    return json.loads(reply.read())
            except urllib.error.HTTPError as error:
                if error.code not in TRANSIENT:
                    hint = f"set {KEY_VARIABLE}" if error.code in (401, 403) else "check --api_base and --api_model"
                    raise DatasetError(
                        f"{self.url} refuses the request ({error.code} {error.reason}): {hint}"
                    ) from None
                reason = f"{error.code} {error.reason}"
                asked_for = _seconds(error.headers.get("Retry-After"))
            except (OSError, ValueError) as error:
                reason = first_line(error)
            if attempt < self.attempts:
                time.sleep(max(pause, min(asked_for, 120.0)))
                pause = min(2 * pause, 60.0)
        raise DatasetError(
            f"{self.url} does not answer ({reason}) after {self.attempts} attempts: check it and run the command "
            "again; what was written so far is kept"
        )


def _seconds(value: str | None) -> float:
    return float(value) if value and value.isdecimal() else 0.0
