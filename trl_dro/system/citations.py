# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""What an answer rests on: the selected passages that state it, and their sentence that does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..data.sentences import split_sentences
from ..data.words import shingles
from ..metrics.text import has_answer, normalize_answer
from ..model.prompts import Question, question_text


# Share of an answer's words that a sentence must have for the answer to rest on it, where none holds all in a row.
MIN_SHARED = 0.5


class Passage(Protocol):
    """What can be cited."""

    id: str | None
    title: str | None
    text: str
    page: int | None
    position: int


@dataclass
class Citation:
    """
    A passage that an answer rests on.

    Args:
        id (`str`, *optional*):
            Its id, if it has one.
        title (`str`, *optional*):
            Its title, with the headings above it where it was cut from a document that has some.
        page (`int`, *optional*):
            Page that it begins on, from 1, where it was cut from a document with pages.
        position (`int`):
            Its place among the candidates, from 1.
        sentence (`str`):
            Sentence of it that states the answer, or shares the most words with it.
        states_answer (`bool`):
            Whether the answer stands in the passage, word for word.
    """

    id: str | None
    title: str | None
    page: int | None
    position: int
    sentence: str
    states_answer: bool


def cite(question: Question, answer: str, documents: Sequence[Passage]) -> list[Citation]:
    """
    Citations of an answer: each selected passage in which it stands, as Recall@k matches answers, in the selector's
    order. Where it stands in none, the one passage with the sentence that shares the most of its words, if that is
    half of them.

    Args:
        question (`str` or `list[dict]`):
            What was asked. Of two sentences that state the answer the one that shares more words with it is cited.
        answer (`str`):
            The answer.
        documents (`list[SelectedDocument]`):
            Passages that it was written from.

    Returns:
        `list[Citation]`
    """
    asked = set(shingles(normalize_answer(question_text(question))))
    words = set(shingles(normalize_answer(answer)))
    found: list[tuple[float, Citation]] = []
    for document in documents:
        states_answer = has_answer(document.text, [answer])
        scored = [(_score(sentence, answer, words, asked), sentence) for sentence in split_sentences(document.text)]
        (_, shared, _), sentence = max(scored, key=lambda each: each[0], default=((False, 0.0, 0), document.text))
        place = (document.id, document.title, document.page, document.position)
        found.append((shared, Citation(*place, sentence, states_answer)))
    if stating := [citation for _, citation in found if citation.states_answer]:
        return stating
    # The first of equals, which the selector thought best.
    shared, nearest = max(found, key=lambda each: each[0], default=(0.0, None))
    return [nearest] if nearest is not None and shared >= MIN_SHARED else []


def _score(sentence: str, answer: str, words: set[str], asked: set[str]) -> tuple[bool, float, int]:
    """Whether a sentence states the answer, its share of the answer's words, and how many of the question's it has."""
    own = set(shingles(normalize_answer(sentence)))
    shared = len(words & own) / len(words) if words else 0.0
    return has_answer(sentence, [answer]), shared, len(asked & own)
