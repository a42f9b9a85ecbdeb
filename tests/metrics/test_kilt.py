# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Agreement with KILT's evaluation as its paper and documentation describe it: answers are lowercased, stripped of
punctuation, of the articles and of surplus white space; a prediction is compared with every gold answer and the best
counts; F1 is over bags of words; blank gold answers are ignored."""

import random
import string
from fractions import Fraction

import pytest

from trl_dro.metrics import KILTF1, KILTExactMatch, exact_match, f1


def words_by_definition(text):
    """Character by character, with no regular expression: words between white space or, for articles, at any edge."""
    kept = [character for character in text.lower() if character not in string.punctuation + "。、！"]
    words, run = [], []

    def close():
        word = "".join(run)
        run.clear()
        words.append(word if word not in ("a", "an", "the") else " ")

    for character in kept:
        if character.isalnum() or character == "_":
            run.append(character)
        else:  # a boundary: white space, or a sign that is not ASCII punctuation and stays
            close()
            words.append(character)
    close()
    return "".join(words).split()


def units_by_definition(text):
    """Words, and each ideograph and kana by itself."""
    marked = (
        "".join(f" {sign} " if "\u3040" <= sign <= "\u9fff" else sign for sign in word)
        for word in words_by_definition(text)
    )
    return " ".join(marked).split()


def scores_by_definition(prediction, answers):
    given = [answer for answer in answers if answer.strip()]
    predicted = units_by_definition(prediction)
    best = Fraction(0)
    for answer in given:
        gold = units_by_definition(answer)
        left = list(gold)
        shared = sum(1 for word in predicted if word in left and (left.remove(word) or True))
        if shared:
            precision, recall = Fraction(shared, len(predicted)), Fraction(shared, len(gold))
            best = max(best, 2 * precision * recall / (precision + recall))
    words = words_by_definition(prediction)
    equal = bool(prediction.strip()) and any(words == words_by_definition(answer) for answer in given)
    return float(equal), float(best)


@pytest.mark.parametrize(
    "prediction, answers, em, best",
    [
        ("The Beatles", ["Beatles"], 1, 1),  # articles
        ("a an the", ["The"], 1, 0),  # nothing is left of either: equal, and no word shared
        ("Anthem", ["them"], 0, 0),  # an article is a whole word
        ("U.S.A.", ["USA"], 1, 1),  # punctuation leaves no gap
        ("well-known", ["well known"], 0, 0),
        ("the-end", ["theend"], 1, 1),  # it goes before the articles do
        ("O'Neill's", ["oneills"], 1, 1),
        ("rock & roll", ["rock roll"], 1, 1),
        ("$3.50", ["350"], 1, 1),
        ("Beyonc\u00e9", ["Beyonce"], 0, 0),  # accents count
        ("Beyonc\u00e9", ["Beyonce\u0301"], 0, 0),  # and so does the Unicode form
        ("\u0130stanbul", ["i\u0307stanbul"], 1, 1),  # lowercase of one letter can be two characters
        ("STRASSE", ["straße"], 0, 0),  # lowercase, not case folding
        ("“quoted”", ["quoted"], 0, 0),  # only ASCII punctuation goes
        ("the—end", ["—end"], 1, 1),  # a dash that stays is an edge of the article
        ("東京 都", ["東京都"], 0, 1),  # ideographs are the words of F1
        ("東京。", ["「東京」", "東京"], 1, 1),  # punctuation of Chinese and Japanese goes
        ("東京タワー", ["東京"], 0, 4 / 7),
        ("東京\u3000都", ["東京 都"], 1, 1),  # wide space is white space
        ("non\u00a0breaking", ["non breaking"], 1, 1),
        ("zero\u200bwidth", ["zero width"], 0, 0),  # and a zero-width one is not
        ("", ["Paris"], 0, 0),  # no prediction
        ("", ["The"], 0, 0),  # though the gold answer is as empty once normalised
        (" \n", ["!"], 0, 0),
        ("Paris", ["", " ", "Paris"], 1, 1),  # blank gold answers are passed over
        ("!", [" "], 0, 0),
        ("Paris", ["Rome", "Paris, France", "PARIS"], 1, 1),  # the best of several
        ("in Paris", ["Rome", "Paris", "Paris in France"], 0, 0.8),  # each metric's own best
        ("Paris Paris", ["Paris"], 0, 2 / 3),  # words are counted as often as both have them
        ("one two", ["two one"], 0, 1),  # F1 does not see order
        ("7 February 2008", ["February 7, 2008"], 0, 1),
    ],
)
def test_hard_cases(prediction, answers, em, best):
    assert exact_match(prediction, answers) == em
    assert f1(prediction, answers) == pytest.approx(best)
    assert scores_by_definition(prediction, answers) == (em, pytest.approx(best))


def random_text(draw):
    pieces = [
        *("the The a an AN theme", "a.n", "t-he", "U.S.", "it's", "_the_", "x", "X", "é", "e\u0301", "İ", "ß", "ﬁ"),
        *("日本", "本", "。"),
        *("“", "”", "—", "\u00a0", "\u3000", "\u200b", "\t", "\n", "  ", "1,000", "½", "²", "!", "", "the"),
        *string.punctuation,
        *string.ascii_letters[:8],
    ]
    return "".join(draw.choice(pieces) + draw.choice(["", "", " "]) for _ in range(draw.randint(0, 9)))


def test_ten_thousand_random_strings():
    draw = random.Random(0)
    predictions = [random_text(draw) for _ in range(10_000)]
    # Gold answers near the prediction, or none would ever be equal.
    answers = [
        [
            draw.choice([random_text(draw), prediction.upper(), f"the {prediction}.", prediction.replace(" ", "  ")])
            for _ in range(draw.randint(1, 4))
        ]
        for prediction in predictions
    ]
    expected = [scores_by_definition(*pair) for pair in zip(predictions, answers, strict=True)]
    share_equal = sum(em for em, _ in expected) / 10_000
    assert 0.3 < share_equal < 0.9
    em = KILTExactMatch().compute(predictions=predictions, references=answers, per_example=True)
    best = KILTF1().compute(predictions=predictions, references=answers, per_example=True)
    found = zip(em["em_per_example"], best["f1_per_example"], strict=True)
    # What differs, and not two long lists, whose comparison takes minutes to print.
    different = [
        pair
        for pair, scores, right in zip(zip(predictions, answers, strict=True), found, expected, strict=True)
        if scores != pytest.approx(right, abs=1e-12)
    ]
    assert different[:5] == []
