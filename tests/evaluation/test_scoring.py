# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

from trl_dro.evaluation.scoring import recall_cutoffs, score_bounds, score_prediction, score_question, select
from trl_dro.model.importance import elbo, iwae_bound


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


def test_an_answer_in_a_sentence_is_contained_and_no_exact_match():
    scores = score_prediction("It was by Anna Brown.", CANDIDATES[:1], CANDIDATES, ["nobody", "anna brown"])
    assert (scores["em"], scores["contains"]) == (0.0, 1.0)


def test_answer_in_a_title_is_not_found():
    assert score_prediction("", CANDIDATES[:1], CANDIDATES, ["Anna"])["recall@1"] == 0.0


def test_retriever_is_looked_at_no_deeper_than_the_selector():
    scores = score_prediction("", CANDIDATES[:2], CANDIDATES, ["Anna"])
    assert scores["retriever_recall@2"] == 0.0 and "retriever_recall@5" not in scores


def record(**more):
    return {"question": "who?", "answers": ["Anna Brown"], "documents": CANDIDATES} | more


@pytest.mark.parametrize(
    "permutation, prediction, answers, outcome",
    [
        ([5, 1], "anna brown", ["Anna Brown"], "correct"),
        ([1, 2], "Anna Brown", ["Anna Brown"], "correct"),  # known without the documents
        ([5, 1], "Bob", ["Anna Brown"], "not_answered"),
        ([1, 2], "Bob", ["Anna Brown"], "not_selected"),
        ([1, 2], "Bob", ["Zoe"], "not_retrieved"),
        ([1, 2], "Bob", ["Zoe", "Bob C", "Carl"], "not_answered"),  # any gold answer
    ],
)
def test_an_error_has_the_first_cause_on_the_way_to_the_answer(permutation, prediction, answers, outcome):
    assert score_question(record(answers=answers), permutation, prediction)["outcome"] == outcome


def test_a_prediction_stands_in_the_selected_documents_or_not():
    assert score_question(record(), [1, 2], "Carl")["answer_in_documents"] == 1.0
    assert score_question(record(), [1, 3], "Carl")["answer_in_documents"] == 0.0
    assert score_question(record(), [1, 3], "")["answer_in_documents"] == 0.0


def test_a_citation_is_precise_where_it_cites_what_is_relevant():
    documents = [document(text) for text in ("Anna came.", "It was Anna Brown.", "Bob.")]
    question = {"question": "who", "answers": ["Anna Brown"], "documents": documents}
    assert score_question(question, [2, 1], "Anna")["citation_precision"] == 0.5
    assert score_question(question, [3, 2], "Anna")["citation_precision"] == 1.0
    assert score_question(question, [3], "Anna")["citation_precision"] is None  # nothing to cite
    by_id = {**question, "positive_ids": ["Anna came.", "It was Anna Brown."]}
    assert score_question(by_id, [2, 1], "Anna")["citation_precision"] == 1.0


def test_supporting_documents_are_counted_where_they_are_known():
    ids = [CANDIDATES[0]["id"], CANDIDATES[3]["id"]]
    scores = score_question(record(positive_ids=ids), [1, 2], "")
    assert (scores["support_recall@1"], scores["support_recall@2"]) == (0.5, 0.5)
    assert "support_recall@1" not in score_question(record(positive_ids=[]), [1, 2], "")


class Codec:
    num_selected = 3


class Rag:
    codec = Codec()


def test_the_retriever_selects_its_first_candidates_and_the_oracle_the_relevant_ones_first():
    questions = [record(), record(positive_ids=[CANDIDATES[2]["id"], CANDIDATES[5]["id"]]), record(answers=["Zoe"])]
    assert select(Rag, questions, "retriever").tolist() == [[1, 2, 3]] * 3
    assert select(Rag, questions, "oracle").tolist() == [[5, 1, 2], [3, 6, 1], [1, 2, 3]]
    assert isinstance(select(Rag, questions, "oracle"), torch.Tensor)


def test_bounds_are_those_of_the_corrected_likelihoods_and_the_loss_is_minus_the_tighter():
    logps, correction = torch.tensor([[-1.0, -3.0], [-2.0, -2.0]]), torch.tensor([[0.5, -0.5], [0.0, 0.0]])
    scores = score_bounds(logps, correction)
    torch.testing.assert_close(scores["elbo"], elbo(logps, correction))
    torch.testing.assert_close(scores["iwae_bound"], iwae_bound(logps, correction))
    torch.testing.assert_close(scores["loss"], -scores["iwae_bound"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_question_with_a_likelihood_that_is_not_finite_has_no_bounds(bad):
    scores = score_bounds(torch.tensor([[-1.0, bad], [-1.0, -1.0]]), torch.zeros(2, 2))
    for name, value in (("elbo", -1.0), ("iwae_bound", -1.0), ("loss", 1.0)):
        assert scores[name].isnan().tolist() == [True, False] and scores[name][1] == value
