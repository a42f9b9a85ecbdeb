# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""What a written question must pass before anything is trained on it."""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import regex

from ..data.words import count_words, shingles
from ..metrics.text import has_answer, normalize_answer
from .writers import Pair, Source


# Reasons of refusal, in the order in which they are looked for: from what costs nothing to what takes a model.
FORM = "too long or too short"
ABOUT_THE_PASSAGE = "asks about the passage"
GIVEN_AWAY = "answer stands in the question"
NOT_IN_PASSAGE = "answer is not in the passage"
WRONG_KIND = "answer is of another kind"
NOT_RETRIEVED = "passage is not retrieved"
LOW_GAIN = "passage does not help"
DUPLICATE = "near-duplicate"
BOTH_SIDES = "needs what is held out"
GATES = (
    FORM,
    ABOUT_THE_PASSAGE,
    GIVEN_AWAY,
    NOT_IN_PASSAGE,
    WRONG_KIND,
    NOT_RETRIEVED,
    LOW_GAIN,
    DUPLICATE,
    BOTH_SIDES,
)

MAX_ANSWER_WORDS = 8
MAX_QUESTION_WORDS = 30
SAME_WORDS = 0.8  # share of the words, see data/words.py, of two questions that both have

_POINTS_AT_PASSAGE = re.compile(
    r"\b(?:this|that|given|above|following) (?:passage|paragraph|text|article|excerpt|document|section|story|author)\b"
    r"|\b(?:the|both|two|first|second|other) (?:passages?|paragraphs?|excerpts?|narrator)\b"
    # The author of a book may well be asked for.
    r"|\bthe (?:text|article|document|section|author|writer|story|speaker)\b(?! (?:of|for|who|that))"
    r"|\b(?:mentioned|described|quoted) (?:above|here|below)\b"
    # Somebody whom only the passage names.
    r"|^(?:\w+ ){1,3}?(?:did|does|do|is|was|were|are|has|have|had|will|would|can) "
    r"(?:he|she|it|they|his|her|its|their)\b",
    re.IGNORECASE,
)


_MAY_BE_NAMED = regex.compile(r"\p{N}|[\p{Han}\p{Katakana}]")

# What English questions ask for, by their first words, and what an answer of that kind holds.
_DATE = r"\d|century|spring|summer|autumn|fall|winter|January|March|April|[A-Z]\w*(?:day|ember)"
_NUMBER = r"\d|\b(?:no|one|two|three|four|five|six|seven|eight|nine|ten|eleven|dozen|hundred|thousand|million)s?\b"
_KINDS = (
    (re.compile(r"(?:in )?(?:when|what year|which year)\b", re.IGNORECASE), re.compile(_DATE)),
    (re.compile(r"how (?:many|much|old)\b", re.IGNORECASE), re.compile(_NUMBER, re.IGNORECASE)),
    (re.compile(r"(?:who|whom|whose)\b", re.IGNORECASE), re.compile(r"[^\W\d_]")),
)


def refuse_by_text(pair: Pair, source: Source) -> str | None:
    """
    The first gate, of those that need nothing but the texts, which a question does not pass; `None` if it passes all.

    Args:
        pair ([`~writers.Pair`]):
            Question and answer.
        source (`list[dict]`):
            The passage that it was written from, or both.
    """
    in_question, in_answer = count_words(pair.question), count_words(pair.answer)
    if not 3 <= in_question <= MAX_QUESTION_WORDS or not 1 <= in_answer <= MAX_ANSWER_WORDS:
        return FORM
    if _POINTS_AT_PASSAGE.search(pair.question):
        return ABOUT_THE_PASSAGE
    if has_answer(pair.question, [pair.answer]):
        return GIVEN_AWAY
    if not any(has_answer(passage["text"], [pair.answer]) for passage in source):
        return NOT_IN_PASSAGE
    fits = all(holds.search(pair.answer) for asks, holds in _KINDS if asks.match(pair.question))
    return None if fits else WRONG_KIND


def near_duplicates(questions: Sequence[str], worth: Sequence[float]) -> dict[int, int]:
    """
    Questions that ask in nearly the same words as one that is worth more, or as an earlier one that is worth as much.
    Two questions that differ in a number or a name are two questions.

    Args:
        questions (`list[str]`):
            The questions.
        worth (`list[float]`):
            Of two duplicates the one that is worth more stays.

    Returns:
        `dict[int, int]`: of each duplicate the place of the question that stays.
    """
    duplicates: dict[int, int] = {}
    words = [set(shingles(normalize_answer(question))) for question in questions]
    kept_with: dict[str, list[int]] = defaultdict(list)
    counts: dict[str, int] = defaultdict(int)
    for each in words:
        for word in each:
            counts[word] += 1
    for place in sorted(range(len(questions)), key=lambda place: (-worth[place], place)):
        own = words[place]
        # Of duplicates the rarest words are shared, but for a fifth of them: those suffice to find them by.
        rare = sorted(own, key=lambda word: (counts[word], word))[: len(own) - int(SAME_WORDS * len(own)) + 1]
        near = {other for word in rare for other in kept_with[word]}
        for other in sorted(near):
            shared, differing = own & words[other], own ^ words[other]
            if len(shared) >= SAME_WORDS * len(own | words[other]) and not _tells_apart(
                differing, questions[place], questions[other]
            ):
                duplicates[place] = other
                break
        else:
            for word in own:
                kept_with[word].append(place)
    return duplicates


def _tells_apart(words: set[str], *questions: str) -> bool:
    """
    Whether one of these words is a number, or a name in a question: capital, and not the first word. Scripts without
    capitals do not tell names, and what differs in Chinese characters or Katakana may be one.
    """
    names = {normalize_answer(word) for question in questions for word in question.split()[1:] if word[:1].isupper()}
    return any(word in names or _MAY_BE_NAMED.search(word) for word in words)


def sift(candidates: Sequence[dict[str, Any]], min_gain: float, retrieved_within: int) -> None:
    """
    Adds to every candidate `refused`, the reason, or `None`.

    Args:
        candidates (`list[dict]`):
            Each with `question`, and `refused` if its text was refused; `rank` of its passage in the retriever's
            ranking, of the lower one if it has two, `None` if one was not found; `gain` in nats, `None` if nobody
            judged it.
        min_gain (`float`):
            Least gain.
        retrieved_within (`int`):
            Last rank at which its passage may be found.
    """
    for each in candidates:
        if each["refused"] is None:
            if each["rank"] is None or each["rank"] > retrieved_within:
                each["refused"] = NOT_RETRIEVED
            elif each["gain"] is not None and each["gain"] < min_gain:
                each["refused"] = LOW_GAIN
    left = [each for each in candidates if each["refused"] is None]
    worth = [0.0 if each["gain"] is None else each["gain"] for each in left]
    for place, other in near_duplicates([each["question"] for each in left], worth).items():
        left[place] |= {"refused": DUPLICATE, "duplicate_of": left[other]["id"]}
