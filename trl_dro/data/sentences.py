# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Sentences of a text, by its punctuation."""

import regex


ENDS = (".", "!", "?", "。", "！", "？")
"""Marks at the end of a sentence."""
# What ends a sentence, with the quotes and brackets that close behind it: marks before white space that no small
# letter follows; marks of Chinese and Japanese, unless what was quoted is inside of a sentence that goes on, as in
# 「はい。」と答えた; and empty lines.
_END = regex.compile(
    r"""[.!?…]+["'”’»)\]]*(?=\s+(?!\s|\p{Ll}))|[。！？]+(?:(?![。！？」』）”’])|[」』）”’]+(?=\s|[「『（“‘]|\Z))|\n[^\S\n]*(?=\n)""",
)
# Words that end with a point and no sentence; single letters, initials mostly, do neither.
_ABBREVIATIONS = frozenset(
    "al approx cf dept dr ed eds eq fig figs gen hon jr mr mrs ms nos nr pp prof rev sr st vol vs vgl bzw bspw".split()
)


def split_sentences(text: str) -> list[str]:
    """
    The sentences of a text, without the white space around them.

    A sentence ends with `.`, `!`, `?` or `…` before white space, unless a small letter follows, or the point is that
    of an initial, an abbreviation, or a number at the start; with `。`, `！` or `？`, unless it stands at the end of a
    quotation behind which the sentence goes on; and at an empty line.

    Args:
        text (`str`): the text.

    Returns:
        `list[str]`: no word is lost.

    Example:

    ```python
    >>> from trl_dro.data.sentences import split_sentences

    >>> split_sentences("Dr. J. Doe wrote it. Did she? 1. Buy bread.")
    ['Dr. J. Doe wrote it.', 'Did she?', '1. Buy bread.']
    ```
    """
    sentences = []
    start = 0
    for match in _END.finditer(text):
        if match[0] == "." and not _ends(text[start : match.start()]):
            continue
        sentences.append(text[start : match.end()])
        start = match.end()
    sentences.append(text[start:])
    return [stripped for sentence in sentences if (stripped := sentence.strip())]


def _ends(sentence: str) -> bool:
    """Whether a point behind these words ends them."""
    *before, last = sentence.split() or [""]
    word = last.lstrip("([\"'“‘«")
    if not before and (word.isdigit() or not word):
        return False
    is_initial = word[-1:].isalpha() and word[-2:-1] in ("", ".")  # J. and U.S.
    return not is_initial and word.lower() not in _ABBREVIATIONS
