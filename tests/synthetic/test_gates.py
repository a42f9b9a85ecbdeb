# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import pytest

from trl_dro.synthetic import gates
from trl_dro.synthetic.gates import near_duplicates, refuse_by_text, sift
from trl_dro.synthetic.writers import Pair


PASSAGE = {"id": "a#0", "title": "Bleak House", "text": "Bleak House is a novel by Charles Dickens, of 1853."}


@pytest.mark.parametrize(
    "question, answer, reason",
    [
        ("Who is the author of Bleak House?", "Charles Dickens", None),
        ("When was the text of Bleak House printed?", "1853", None),
        ("What is its theme?", "a novel", gates.ABOUT_THE_PASSAGE),
        ("How many novels did he write?", "1853", gates.ABOUT_THE_PASSAGE),
        ("Who is the author?", "Charles Dickens", gates.ABOUT_THE_PASSAGE),
        ("According to the passage, who wrote Bleak House?", "Charles Dickens", gates.ABOUT_THE_PASSAGE),
        ("What does this article tell of Bleak House?", "a novel", gates.ABOUT_THE_PASSAGE),
        ("Who wrote Bleak House?", "Wilkie Collins", gates.NOT_IN_PASSAGE),
        ("Who wrote Bleak House?", "Dick", gates.NOT_IN_PASSAGE),  # words, and no parts of them
        ("When was Bleak House written?", "Charles Dickens", gates.WRONG_KIND),
        ("How many novels are called Bleak House?", "Charles Dickens", gates.WRONG_KIND),
        ("How many books are Bleak House?", "a novel", gates.WRONG_KIND),
        ("Who wrote Bleak House?", "1853", gates.WRONG_KIND),
        ("Which house is the novel Bleak House about?", "Bleak House", gates.GIVEN_AWAY),
        ("Dickens?", "1853", gates.FORM),
        ("Who wrote Bleak House?", "one two three four five six seven eight nine", gates.FORM),
    ],
)
def test_texts_alone_refuse_what_nobody_could_ask_or_answer(question, answer, reason):
    assert refuse_by_text(Pair(question, answer), [PASSAGE]) == reason


@pytest.mark.parametrize(
    "question, answer, reason",
    [
        ("青函トンネルはいつ開業しましたか？", "1988年", None),
        ("青函トンネルが結ぶのはどこですか？", "本州と北海道", None),
        ("いつ？", "1988年", gates.FORM),
        ("青函トンネルは1988年に開業しましたか？", "1988年", gates.GIVEN_AWAY),
        ("青函トンネルはいつ開業しましたか？", "1989年", gates.NOT_IN_PASSAGE),
        ("トンネルの話をしてください" * 5, "1988年", gates.FORM),
        ("青函トンネルとは何ですか？", "本州と北海道を結び、1988年に開業した鉄道トンネル", gates.FORM),
    ],
)
def test_questions_in_scripts_without_spaces_pass_the_same_gates(question, answer, reason):
    text = "青函トンネルは本州と北海道を結び、1988年に開業した鉄道トンネルである。"
    assert refuse_by_text(Pair(question, answer), [{"text": text}]) == reason


def test_an_answer_may_stand_in_either_of_two_passages():
    source = [{"text": "Bakery Nord was founded by Ada Stone."}, {"text": "Ada Stone climbed Mont Blanc in 1931."}]
    asked = "When did the founder of Bakery Nord climb Mont Blanc?"
    assert refuse_by_text(Pair(asked, "1931"), source) is None
    assert refuse_by_text(Pair(asked, "1931"), source[:1]) == gates.NOT_IN_PASSAGE
    assert refuse_by_text(Pair("Who stands in both passages?", "Ada Stone"), source) == gates.ABOUT_THE_PASSAGE


def test_near_duplicates_are_found_in_scripts_without_spaces():
    questions = [
        "青函トンネルは西暦何年に開業しましたか",
        "青函トンネルは西暦何年に開業したか",
        "関門トンネルは西暦何年に開業しましたか",
        "青函トンネルを掘るのに何年かかりましたか",
        "第3回の大会は東京のどこで開かれましたか",
        "第4回の大会は東京のどこで開かれましたか",
    ]
    assert near_duplicates(questions, [1.0] + [0.0] * 5) == {1: 0}


def test_of_near_duplicates_the_one_that_is_worth_more_stays():
    questions = [
        "Who wrote the long novel Bleak House in London?",
        "who wrote the long novel Bleak House in London then?",
        "Who wrote the long novel Hard Times in London?",  # another name
        "Who led team 3 of the long march in London?",
        "Who led team 4 of the long march in London?",  # another number
        "Where was Dickens born?",
    ]
    assert near_duplicates(questions, [1.0, 2.0, 0.0, 0.0, 0.0, 0.0]) == {0: 1}
    assert near_duplicates(questions[:2], [1.0, 1.0]) == {1: 0}


def test_rare_words_find_every_pair_that_a_comparison_of_all_finds():
    words = [f"w{chr(97 + i)}" for i in range(12)]
    questions = [" ".join(words[j] for j in range(12) if (i >> (j % 5)) & 1 or j > 4 + i % 3) for i in range(32)]
    found = near_duplicates(questions, [0.0] * 32)
    kept: list[int] = []
    for place, question in enumerate(questions):
        own = set(question.split())
        others = [set(questions[other].split()) for other in kept]
        is_near = any(len(own & other) >= gates.SAME_WORDS * len(own | other) for other in others)
        assert is_near == (place in found)
        if not is_near:
            kept.append(place)
    assert 3 < len(kept) < 32


def candidate(number, **values):
    question = f"Who wrote the book number {number}?"
    return {"id": f"q{number}", "question": question, "refused": None, "rank": 1, "gain": 5.0, **values}


def test_every_refusal_has_its_reason_and_an_unjudged_question_stays():
    candidates = [
        candidate(0),
        candidate(1, rank=None),
        candidate(2, rank=6),
        candidate(3, gain=1.9),
        candidate(4, gain=None),
        candidate(5, refused=gates.FORM, rank=None, gain=None),
        {**candidate(6, gain=4.0), "question": "Who wrote the book number 0?"},
    ]
    sift(candidates, min_gain=2.0, retrieved_within=5)
    assert [each["refused"] for each in candidates] == [
        *(None, gates.NOT_RETRIEVED, gates.NOT_RETRIEVED, gates.LOW_GAIN, None, gates.FORM, gates.DUPLICATE)
    ]
    assert candidates[6]["duplicate_of"] == "q0"
