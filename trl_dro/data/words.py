# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
Words of a text, also in scripts that put no spaces between them: Chinese, Japanese, Thai, Lao, Khmer and Burmese.
Where their words end only a dictionary knows. Passages and limits need no more than a length, and two of these
characters count as a word, about as many as Chinese words have; what is matched is matched by characters.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise

import regex


# Characters of these scripts, and the marks of length of Japanese, which Unicode gives to no script.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\u30fc\uff70"
CHARACTER = rf"[{UNSPACED}]\p{{M}}*+"  # with its marks
_OTHER = rf"[^\s{UNSPACED}]+"
# With the punctuation before and behind it.
_WORD = regex.compile(rf"[\p{{Ps}}\p{{Pi}}]*(?:{CHARACTER}){{1,2}}[\p{{Pe}}\p{{Pf}}\p{{Po}}]*|{_OTHER}")
_UNIT = regex.compile(rf"{CHARACTER}|{_OTHER}")
_RUN = regex.compile(rf"(?:{CHARACTER})+|{_OTHER}")
_CHARACTER = regex.compile(CHARACTER)
# Characters and full-width punctuation of Chinese and Japanese, which write no space behind a sentence either.
_EAST_ASIAN = regex.compile(r"[\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\uff01-\uff65]")


def count_words(text: str) -> int:
    """
    Number of words: what white space parts, and every two characters of scripts that put no spaces between words.

    Args:
        text (`str`): the text.

    Example:

    ```python
    >>> from trl_dro.data.words import count_words

    >>> count_words("The mill was built in 1921."), count_words("水車は1921年に建てられた。")
    (6, 7)
    ```
    """
    return sum(1 for _ in _WORD.finditer(text))


def cut_words(text: str, most: int) -> Iterator[str]:
    """
    Yields a text in pieces of at most so many words, as [`count_words`] counts them.

    Args:
        text (`str`): the text. Its white space becomes single spaces.
        most (`int`): words of a piece, at least 1.
    """
    text = " ".join(text.split())
    spans = [match.span() for match in _WORD.finditer(text)]
    for first in range(0, len(spans), most):
        yield text[spans[first][0] : spans[min(first + most, len(spans)) - 1][1]]


def join_texts(texts: Iterable[str]) -> str:
    """Sentences as one text: a space between two, but none between two of Chinese or Japanese."""
    joined = ""
    for text in texts:
        is_close = joined and _EAST_ASIAN.match(joined[-1]) and _EAST_ASIAN.match(text)
        joined += text if is_close or not joined else f" {text}"
    return joined


def split_words(text: str) -> list[str]:
    """Words by white space; each character of a script that puts none between words is one of its own."""
    return list(_UNIT.findall(text))


def shingles(text: str) -> list[str]:
    """
    What texts are compared by: words, and of scripts that put no spaces between them every two neighbours, as search
    engines index them. Single characters are shared by texts that have nothing to do with one another.

    Args:
        text (`str`): the text.

    Example:

    ```python
    >>> from trl_dro.data.words import shingles

    >>> shingles("the mill 東京都")
    ['the', 'mill', '東京', '京都']
    ```
    """
    runs: list[str] = _RUN.findall(text)
    if not _CHARACTER.search(text):  # nothing to pair, as in most texts
        return runs
    found: list[str] = []
    for run in runs:
        characters = _CHARACTER.findall(run)
        found += [one + other for one, other in pairwise(characters)] if len(characters) > 1 else [run]
    return found
