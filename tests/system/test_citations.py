# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import pytest

from trl_dro.system.citations import cite
from trl_dro.system.pipeline import SelectedDocument


def documents(*texts):
    return [SelectedDocument(f"d{i}", f"Title {i}", text, i, 0.5, page=i) for i, text in enumerate(texts, start=1)]


def sentences(question, answer, *texts):
    return [(each.id, each.sentence, each.states_answer) for each in cite(question, answer, documents(*texts))]


def test_each_passage_that_states_the_answer_is_cited_with_the_sentence_that_does():
    passages = documents(
        "The mill is old. It was built by Ada Stone in 1921. It burnt down.",
        "Mills grind corn.",
        "Ada  STONE built mills.",
    )
    first, second = cite("who built the mill", "Ada Stone", passages)
    assert (first.id, first.title, first.page, first.position) == ("d1", "Title 1", 1, 1)
    assert first.sentence == "It was built by Ada Stone in 1921." and first.states_answer
    assert (second.id, second.position, second.sentence) == ("d3", 3, "Ada  STONE built mills.")


def test_of_sentences_that_state_the_answer_the_one_nearest_to_the_question_is_cited():
    text = "Ada Stone was born in Lindau. The mill was built by Ada Stone. Ada Stone died."
    assert sentences("who built the mill", "Ada Stone", text) == [("d1", "The mill was built by Ada Stone.", True)]
    dialogue = [
        {"role": "user", "content": "Tell me of Ada Stone."},
        {"role": "assistant", "content": "What?"},
        {"role": "user", "content": "where was she born"},
    ]
    assert sentences(dialogue, "Ada Stone", text)[0][1] == "Ada Stone was born in Lindau."


def test_a_sentence_that_states_the_answer_goes_before_one_that_has_its_words():
    text = "The gallery in the mill shows art. An art gallery is near."
    assert sentences("what is in the mill", "art gallery", text) == [("d1", "An art gallery is near.", True)]


def test_words_of_an_answer_within_others_are_no_answer():
    assert sentences("what is it", "art", "A party. Nothing.") == []


def test_an_answer_across_two_sentences_is_stated_by_its_passage():
    text = "Nothing is here. He plays in Yes. No one else does."
    assert sentences("which bands", "Yes. No", text) == [("d1", "He plays in Yes.", True)]


def test_an_answer_that_no_passage_states_rests_on_the_nearest_sentence():
    texts = ("It rains.", "In 1921 a mill was built by Stone, Ada. It burnt down.", "Ada Stone's mill is old.")
    answer = "The mill was built by Ada Stone in 1921."
    assert sentences("who built it", answer, *texts) == [("d2", "In 1921 a mill was built by Stone, Ada.", False)]


@pytest.mark.parametrize("answer", ["yes", "Grace Moor of Lindau", "", "…"])
def test_an_answer_of_other_words_rests_on_nothing(answer):
    assert sentences("who built it", answer, "A mill was built by Ada Stone of Rome.", "It rains.") == []


def test_nothing_selected_is_nothing_cited():
    assert cite("who built it", "Ada Stone", []) == []
