# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import random
import unicodedata

import pytest

from trl_dro.metrics import contains, exact_match, f1, has_answer, normalize_answer, recall_at_k


@pytest.mark.parametrize(
    "text, normalized",
    [
        ("The Beatles", "beatles"),
        ("  A  man,\ta plan\n", "man plan"),
        ("U.S.A.", "usa"),
        ("well-known", "wellknown"),
        ('"Theatre" and then', "theatre and then"),  # articles go as words only
        ("the. an!", ""),
        ("a.n", ""),  # punctuation goes before articles
        ("Beyonc\u00e9", "beyonc\u00e9"),  # accents stay
        ("\u201cquoted\u201d", "\u201cquoted\u201d"),  # only ASCII punctuation goes
        ("", ""),
    ],
)
def test_normalization_is_that_of_squad_and_kilt(text, normalized):
    assert normalize_answer(text) == normalized


def test_normalization_is_idempotent():
    for text in ("The U.S. Senate, an example", "a the an", "7 February 2008"):
        assert normalize_answer(normalize_answer(text)) == normalize_answer(text)


def test_exact_match_takes_the_best_gold_answer():
    assert exact_match("the Beatles!", ["The Rolling Stones", "Beatles"]) == 1.0
    assert exact_match("Beatles band", ["The Rolling Stones", "Beatles"]) == 0.0


@pytest.mark.parametrize(
    "prediction, answers, score",
    [
        ("Beatles", ["The Beatles"], 1.0),
        ("John Lennon", ["John Keats"], 0.5),
        ("John", ["Paul"], 0.0),
        ("John John", ["John"], 2 / 3),  # a repeated word counts as often as the gold answer has it
        ("on 7 February 2008", ["7 February 2008", "2008"], 6 / 7),
        ("", ["John"], 0.0),
        ("กรุงเทพ", ["เทพ"], 6 / 9),  # of characters where no spaces part words, marks with their letters
        ("", ["The"], 0.0),  # no shared word, though both are empty after normalisation
    ],
)
def test_f1_is_that_of_bags_of_words(prediction, answers, score):
    assert f1(prediction, answers) == pytest.approx(score)


@pytest.mark.parametrize(
    "prediction, answers, contained",
    [
        ("Lorenzo Monaco was influenced by Giotto.", ["Giotto"], True),
        ("He lived in the U.S. for years", ["Rome", "US"], True),
        ("the New York Times", ["New York"], True),
        ("York is new", ["New York"], False),  # other order
        ("He was a partisan", ["art"], False),  # within a word
        ("Giotto", ["Giotto di Bondone"], False),
        ("", ["Giotto"], False),
        ("Anything", ["the", " "], False),  # nothing is left of these
        ("The", ["a"], True),  # as exact match has it
        (" ", ["the"], False),
        ("本州と北海道です。", ["北海道"], True),  # no spaces, and characters for words
        ("北海の道です。", ["北海道"], False),
    ],
)
def test_an_answer_is_contained_word_for_word(prediction, answers, contained):
    assert contains(prediction, answers) == float(contained)


def test_what_matches_exactly_is_contained():
    rng = random.Random(0)
    for _ in range(500):
        prediction, answer = ("".join(rng.choices("aA bt.,he ", k=rng.randint(0, 4))) for _ in range(2))
        assert contains(prediction, [answer]) >= exact_match(prediction, [answer]), (prediction, answer)


def test_f1_is_symmetric_and_bounds_exact_match():
    pairs = [("John Keats", "the poet John Keats"), ("1907", "in 1907"), ("yes", "yes"), ("yes", "no")]
    for prediction, answer in pairs:
        assert f1(prediction, [answer]) == f1(answer, [prediction])
        assert exact_match(prediction, [answer]) <= f1(prediction, [answer])


@pytest.mark.parametrize(
    "text, answers, contained",
    [
        ("It was written by John Keats in 1818.", ["john keats"], True),
        ("It was written by John Keats in 1818.", ["Keats John"], False),  # in this order
        ("John, says Keats", ["John Keats"], False),  # without a gap
        ("a party", ["art"], False),  # whole words
        ("the U.S. Senate", ["U.S."], True),
        ("the U.S. Senate", ["US"], False),  # punctuation is a token, not removed
        ("Beyonce\u0301 sang", ["Beyonc\u00e9"], True),  # composed and decomposed are equal
        ("Beyonce sang", ["Beyonc\u00e9"], False),  # with and without accent are not
        ("born\n in\u00a0Paris", ["in Paris"], True),  # white space does not matter
        ("1,000 people", ["1,000"], True),
        ("1,000 people", ["1 000"], False),
        ("New York City", ["Boston", "york city"], True),
        ("トンネルは1988年に開業した。", ["1988年"], True),
        ("トンネルは11988年に開業した。", ["1988年"], False),  # of numbers no part
        ("长江发源于青藏高原。", ["青藏高原"], True),
        ("长江发源于青藏高原。", ["高青藏原"], False),
        ("กรุงเทพเป็นเมืองหลวง", ["เมืองหลวง"], True),
        ("서울은 수도이다", ["수도"], False),  # Korean has spaces, and words
        ("anything", [""], False),
        ("", ["", " "], False),
        ("", ["x"], False),
    ],
)
def test_answer_is_matched_token_by_token(text, answers, contained):
    assert has_answer(text, answers) is contained


def test_matching_ignores_the_unicode_form():
    text, answer = "Ångström léger", "ångström"
    for form in ("NFC", "NFD", "NFKC"):
        assert has_answer(unicodedata.normalize(form, text), [answer])


def test_recall_looks_at_the_first_k_documents_only():
    documents = ["nothing", "by John Keats", "nothing"]
    assert [recall_at_k(documents, ["John Keats"], k) for k in (1, 2, 3, 10)] == [0.0, 1.0, 1.0, 1.0]
    assert recall_at_k([], ["John Keats"], 5) == 0.0


def test_recall_at_no_document_is_refused():
    with pytest.raises(ValueError, match="k=0"):
        recall_at_k(["text"], ["text"], 0)
