# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import pytest
from datasets import Dataset

from trl_dro.data import Corpus, DatasetError, load_benchmark
from trl_dro.retrieval import (
    BM25Retriever,
    HybridRetriever,
    PrecomputedRetriever,
    reciprocal_rank_fusion,
    retrieve_candidates,
)


def ranking(*ids):
    return [{"id": document_id, "title": "", "text": f"text {document_id}"} for document_id in ids]


def ids(documents):
    return [document["id"] for document in documents]


CORPUS = Corpus.from_documents(
    [
        {"id": "fox", "title": "Fox", "text": "A red animal of the woods."},
        {"id": "bee", "title": "Bee", "text": "An animal that makes honey."},
        {"id": "ant", "title": "Ant", "text": "A small animal of the woods."},
        {"id": "sea", "title": "Sea", "text": "Much water."},
    ]
)


def test_fusion_sums_reciprocal_ranks():
    fused = reciprocal_rank_fusion([ranking("a", "b", "c"), ranking("c", "a", "d")], constant=60)
    expected = {"a": 1 / 61 + 1 / 62, "c": 1 / 63 + 1 / 61, "b": 1 / 62, "d": 1 / 63}
    assert {document["id"]: document["score"] for document in fused} == pytest.approx(expected)
    assert ids(fused) == ["a", "c", "b", "d"]


def test_fusion_of_one_ranking_is_its_order():
    assert ids(reciprocal_rank_fusion([ranking("b", "a", "c")])) == ["b", "a", "c"]


def test_ties_go_by_the_first_ranking():
    assert ids(reciprocal_rank_fusion([ranking("b"), ranking("a")])) == ["b", "a"]


def test_documents_without_ids_are_told_apart_by_their_text():
    fused = reciprocal_rank_fusion([[{"text": "x"}, {"text": "y"}], [{"text": "y"}]])
    assert [document["text"] for document in fused] == ["y", "x"]


def test_hybrid_is_the_fusion_of_its_retrievers(tmp_path):
    parts = [BM25Retriever(k1=k1, b=b, show_progress=False) for k1, b in ((0.1, 0.0), (3.0, 1.0))]
    hybrid = HybridRetriever(parts)
    hybrid.index(CORPUS, tmp_path)
    query = "small animal of the red woods"
    expected = reciprocal_rank_fusion([part.search([query], k=4)[0] for part in parts])
    assert hybrid.search([query], k=2) == [expected[:2]]


def test_hybrid_shares_the_indexes_of_its_retrievers(tmp_path):
    BM25Retriever(show_progress=False).index(CORPUS, tmp_path)
    before = sorted(tmp_path.iterdir())
    HybridRetriever([BM25Retriever(show_progress=False)]).index(CORPUS, tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_hybrid_settings_hold_those_of_its_parts():
    assert HybridRetriever([BM25Retriever()]).settings != HybridRetriever([BM25Retriever(b=0.5)]).settings
    assert HybridRetriever([BM25Retriever()], depth=10).settings != HybridRetriever([BM25Retriever()]).settings


def test_of_more_than_the_corpus_has_all_are_given(tmp_path):
    hybrid = HybridRetriever([BM25Retriever(show_progress=False)])
    hybrid.index(CORPUS, tmp_path)
    assert hybrid.search(["fox"], k=5) == hybrid.search(["fox"], k=4)


def test_precomputed_candidates_keep_their_order_and_scores():
    rows = [
        {
            "question": "who?",
            "documents": [{"id": "b", "text": "B", "score": 2.0}, {"id": "a", "text": "A", "score": 1.0}],
        },
        {"question": "where?", "documents": [{"id": "c", "text": "C", "score": 0.5}]},
    ]
    retriever = PrecomputedRetriever(Dataset.from_list(rows))
    assert retriever.search(["where?", "who?"], k=2) == [rows[1]["documents"], rows[0]["documents"]]
    assert ids(retriever.search(["who?"], k=1)[0]) == ["b"]


def test_question_that_occurs_twice_has_the_candidates_of_both_rows():
    rows = [{"question": "hi", "documents": ranking("a", "b")}, {"question": "hi", "documents": ranking("b", "c")}]
    assert ids(PrecomputedRetriever(Dataset.from_list(rows)).search(["hi"], k=3)[0]) == ["b", "a", "c"]


def test_unknown_question_and_missing_column_are_refused():
    records = Dataset.from_list([{"question": "who?", "documents": ranking("a")}])
    with pytest.raises(ValueError, match="'where\\?' is no question of the dataset"):
        PrecomputedRetriever(records).search(["where?"], k=1)
    with pytest.raises(DatasetError, match="no column documents"):
        PrecomputedRetriever(records.remove_columns("documents"))


def test_settings_of_precomputed_change_with_the_candidates():
    settings = [
        PrecomputedRetriever(Dataset.from_list([{"question": "who?", "documents": ranking(*order)}])).settings
        for order in ("ab", "ba", "ab")
    ]
    assert settings[0] == settings[2] != settings[1]


def test_paragraphs_of_a_real_benchmark_are_candidates_without_a_retriever(shared_data):
    questions = load_benchmark("musique", "dev", source=shared_data / "raw" / "musique.jsonl")
    dataset = retrieve_candidates(questions, PrecomputedRetriever(questions), k=20)
    for row, question in zip(dataset, questions, strict=True):
        assert ids(row["documents"]) == ids(question["documents"])
        assert set(row["positive_ids"]) <= set(ids(row["documents"]))
