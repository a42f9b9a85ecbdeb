# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import pytest

from trl_dro.evaluation import recall_cutoffs, score_prediction


def document(text):
    return {"id": text, "title": "a title that says Anna", "text": text}


CANDIDATES = [document(text) for text in ("Bob.", "Carl.", "Dora.", "Emil.", "It was Anna Brown.", "Anna")]


@pytest.mark.parametrize(
    "num_selected, cutoffs",
    [(1, [1]), (2, [1, 2]), (3, [1, 3]), (4, [1, 3, 4]), (5, [1, 3, 5]), (6, [1, 3, 5]), (20, [1, 3, 5])],
)
def test_recall_is_cut_at_the_papers_places_as_far_as_they_go(num_selected, cutoffs):
    assert recall_cutoffs(num_selected) == cutoffs


def test_selector_and_retriever_are_scored_by_their_own_order():
    selected = [CANDIDATES[i] for i in (1, 4, 0, 2, 3)]
    scores = score_prediction("brown", selected, CANDIDATES, ["Anna Brown"])
    assert {name: scores[name] for name in scores if "recall" in name} == {
        "recall@1": 0.0,
        "recall@3": 1.0,
        "recall@5": 1.0,
        "retriever_recall@1": 0.0,
        "retriever_recall@3": 0.0,
        "retriever_recall@5": 1.0,
    }
    assert scores["em"] == 0.0 and scores["f1"] == pytest.approx(2 / 3)


def test_any_alias_counts_after_normalisation():
    scores = score_prediction("The Anna.", CANDIDATES[:1], CANDIDATES, ["nobody", "anna"])
    assert scores["em"] == scores["f1"] == 1.0


def test_answer_in_a_title_is_not_found():
    assert score_prediction("", CANDIDATES[:1], CANDIDATES, ["Anna"])["recall@1"] == 0.0


def test_retriever_is_looked_at_no_deeper_than_the_selector():
    scores = score_prediction("", CANDIDATES[:2], CANDIDATES, ["Anna"])
    assert scores["retriever_recall@2"] == 0.0 and "retriever_recall@5" not in scores
