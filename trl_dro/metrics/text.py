# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
r"""Metrics of one prediction or one list of documents against its gold answers, as pure functions on text.

References:
    [1] P. Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text, EMNLP 2016.
    [2] F. Petroni et al., KILT: a Benchmark for Knowledge Intensive Language Tasks, NAACL 2021.
    [3] V. Karpukhin et al., Dense Passage Retrieval for Open-Domain Question Answering, EMNLP 2020.
    [4] P. Lewis et al., MLQA: Evaluating Cross-lingual Extractive Question Answering, ACL 2020.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

import regex

from ..data.words import CHARACTER, UNSPACED, split_words


# ASCII punctuation, and that of Chinese and Japanese texts.
_EAST_ASIAN = "".join(map(chr, [*range(0x3000, 0x3040), 0x30FB, *range(0xFF01, 0xFF66)]))
_WIDE_PUNCTUATION = "".join(sign for sign in _EAST_ASIAN if unicodedata.category(sign).startswith("P"))
_PUNCTUATION = str.maketrans("", "", string.punctuation + _WIDE_PUNCTUATION)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
# A run of letters, digits and marks, or any single character that is neither space nor control [3]; letters of scripts
# that put no spaces between words each by itself, where a run would be a whole sentence.
_TOKENS = regex.compile(rf"{CHARACTER}|[[\p{{L}}\p{{N}}\p{{M}}]--[{UNSPACED}]]+|[^\p{{Z}}\p{{C}}]", regex.V1)


def normalize_answer(text: str) -> str:
    """Normalises an answer as SQuAD [1] and KILT [2] do.

    In this order: lowercase, remove ASCII punctuation, replace the articles a, an, the by a space, collapse white
    space. Punctuation goes without leaving a space, so `"U.S."` and `"US"` are equal and `"well-known"` is one word.
    That of Chinese and Japanese goes too, as in MLQA [4], so `"東京。"` and `"東京"` are equal.

    Args:
        text (`str`): answer or prediction.

    Returns:
        `str`: normalised text, possibly empty.

    Example:
    ```python
    >>> normalize_answer("The  U.S. Senate!")
    'us senate'
    ```
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Whether a prediction equals a gold answer after normalisation.

    Args:
        prediction (`str`): generated answer.
        answers (`Sequence[str]`): gold answers, at least one.

    Returns:
        `float`: 1.0 if the prediction equals any of the gold answers, else 0.0. A blank prediction, which KILT refuses
            to evaluate, scores 0, and a blank gold answer is passed over.
    """
    normalized = normalize_answer(prediction)
    given = [answer for answer in answers if answer.strip()]
    return float(bool(prediction.strip()) and any(normalized == normalize_answer(answer) for answer in given))


def contains(prediction: str, answers: Sequence[str]) -> float:
    """Whether a gold answer stands in a prediction, word for word, after normalisation.

    An answer in a sentence counts, which exact match knows nothing of; so does a prediction that lists all that could
    be meant, or denies it. It is to be read beside [`exact_match`], and never less than that. Where no spaces part
    words, characters are compared, see [`~data.words.split_words`].

    Args:
        prediction (`str`): generated answer.
        answers (`Sequence[str]`): gold answers, at least one.

    Returns:
        `float`: 1.0 if the words of any gold answer follow one another in the prediction, else 0.0.

    Example:
    ```python
    >>> contains("Lorenzo Monaco was influenced by Giotto.", ["Giotto"]), contains("He was a partisan.", ["art"])
    (1.0, 0.0)
    ```
    """
    text = _spaced_words(prediction)
    given = [words for answer in answers if (words := _spaced_words(answer)).strip()]
    return max(exact_match(prediction, answers), float(any(words in text for words in given)))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Harmonic mean of the precision and recall of a prediction's words, after normalisation.

    Where no spaces part words, of its characters, as in MLQA [4], see [`~data.words.split_words`].

    Args:
        prediction (`str`): generated answer.
        answers (`Sequence[str]`): gold answers, at least one.

    Returns:
        `float`: the highest F1 over the gold answers, in [0, 1]; 0 when no word is shared, also if both are empty.
    """
    return max(_f1(prediction, answer) for answer in answers)


def _f1(prediction: str, answer: str) -> float:
    prediction_words = split_words(normalize_answer(prediction))
    answer_words = split_words(normalize_answer(answer))
    num_shared = (Counter(prediction_words) & Counter(answer_words)).total()
    # 2PR/(P+R) with P = shared/len(prediction) and R = shared/len(answer).
    return 2 * num_shared / (len(prediction_words) + len(answer_words)) if num_shared else 0.0


def _spaced_words(text: str) -> str:
    return f" {' '.join(split_words(normalize_answer(text)))} "


def has_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether a text contains a gold answer, by the matching of DPR [3].

    Text and answer are brought to Unicode form NFD, cut into tokens and lowercased; the answer's tokens must follow
    one another in the text. So `"art"` is not found in `"party"`. Characters of scripts that put no spaces between
    words are tokens, which DPR did not do: `"東京"` is found in `"東京都"`.

    Args:
        text (`str`): document.
        answers (`Sequence[str]`): gold answers. One without any token is never contained.

    Returns:
        `bool`: whether the text contains any of the gold answers.
    """
    # No token holds a space, so a run of tokens is a substring of the tokens joined by spaces.
    haystack = _spaced_tokens(text)
    return any((needle := _spaced_tokens(answer)) != "  " and needle in haystack for answer in answers)


def _spaced_tokens(text: str) -> str:
    return f" {' '.join(_TOKENS.findall(unicodedata.normalize('NFD', text))).lower()} "


def recall_at_k(documents: Sequence[str], answers: Sequence[str], k: int) -> float:
    """Recall@k as DPR [3] and DRO define it: whether one of the first `k` documents contains a gold answer.

    Args:
        documents (`Sequence[str]`): texts of the documents in rank order; fewer than `k` are all looked at.
        answers (`Sequence[str]`): gold answers.
        k (`int`): number of documents to look at, at least 1.

    Returns:
        `float`: 1.0 or 0.0; the mean over questions is the metric usually reported.

    Raises:
        `ValueError`: `k` is below 1.
    """
    if k < 1:
        raise ValueError(f"k={k} documents cannot be looked at; set k to 1 or more")
    return float(any(has_answer(document, answers) for document in documents[:k]))


def recall_of_ids_at_k(ids: Sequence[str], supporting_ids: Sequence[str], k: int) -> float:
    """Share of the supporting documents that are among the first `k`.

    Args:
        ids (`Sequence[str]`): ids of the documents in rank order; fewer than `k` are all looked at.
        supporting_ids (`Sequence[str]`): ids of the documents known to be relevant, at least one.
        k (`int`): number of documents to look at, at least 1.

    Returns:
        `float`: from 0 to 1.

    Raises:
        `ValueError`: `k` is below 1, or there are no supporting documents.
    """
    if k < 1:
        raise ValueError(f"k={k} documents cannot be looked at; set k to 1 or more")
    if not supporting_ids:
        raise ValueError("recall of no supporting documents is undefined; leave the question out")
    return len(set(ids[:k]) & set(supporting_ids)) / len(set(supporting_ids))
