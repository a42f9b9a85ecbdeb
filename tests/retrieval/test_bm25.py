# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import pytest
from datasets import Dataset

from trl_dro.data import DatasetError, build_dataset, read_corpus, read_questions, validate_dataset
from trl_dro.metrics import recall_at_k
from trl_dro.retrieval import BM25Retriever, retrieve_candidates


CORPUS = [
    {"id": "p0", "title": "Red fox", "text": "The largest of the true foxes."},
    {"id": "p1", "title": "Vitamin C", "text": "A vitamin found in food."},
    {"id": "p2", "title": "Vitamin K", "text": "A vitamin found in food."},
    {"id": "p3", "title": None, "text": "A thing of beauty is a joy for ever."},
    {"id": "p4", "text": "Bees make honey, and honey keeps: honey for ever."},
]


@pytest.fixture
def retriever():
    return BM25Retriever(CORPUS, show_progress=False)


@pytest.mark.parametrize(
    "query, best",
    [("joy of beauty", "p3"), ("red fox", "p0"), ("who found vitamin c", "p1"), ("what is vitamin k", "p2")],
)
def test_best_passage_comes_first_by_text_title_or_single_letter(retriever, query, best):
    [documents] = retriever.search([query], k=1)
    assert [document["id"] for document in documents] == [best]


def test_every_passage_is_ranked_once_whatever_the_query(retriever):
    for documents in retriever.search(["honey", "", "the", "xylophone"], k=5):
        assert sorted(document["id"] for document in documents) == ["p0", "p1", "p2", "p3", "p4"]


def test_ranking_does_not_depend_on_the_other_queries(retriever):
    queries = ["red fox", "vitamin", "honey for ever"]
    assert retriever.search(queries, k=3) == [retriever.search([query], k=3)[0] for query in queries]


def test_no_query_gives_no_ranking(retriever):
    assert retriever.search([], k=3) == []


def test_rare_word_outweighs_common_one(retriever):
    [documents] = retriever.search(["vitamin honey"], k=3)
    assert documents[0]["id"] == "p4"


@pytest.mark.parametrize("k", [0, 6])
def test_k_out_of_range_is_refused(retriever, k):
    with pytest.raises(ValueError, match=f"k={k} .* corpus of 5; set k between 1 and 5"):
        retriever.search(["fox"], k=k)


def test_empty_corpus_is_refused():
    with pytest.raises(ValueError, match="no passages"):
        BM25Retriever([])


def test_candidates_are_valid_records_in_rank_order(retriever):
    questions = [{"id": f"q{i}", "question": "red fox", "answers": ["Vulpes vulpes"]} for i in range(5)]
    dataset = retrieve_candidates(Dataset.from_list(questions), retriever, k=3, batch_size=2)
    validate_dataset(dataset, num_selected=3)
    assert dataset["id"][:] == ["q0", "q1", "q2", "q3", "q4"]
    [ranking] = retriever.search(["red fox"], k=3)
    for row in dataset:
        assert [document["id"] for document in row["documents"]] == [document["id"] for document in ranking]


def test_dialogue_is_searched_with_all_its_turns(retriever):
    turns = [("user", "what do bees make?"), ("assistant", "honey"), ("user", "does it keep?")]
    question = [{"role": role, "content": content} for role, content in turns]
    questions = build_dataset([{"question": question, "answers": ["yes"]}])
    [row] = retrieve_candidates(questions, retriever, k=2)
    assert row["documents"][0]["id"] == "p4"
    assert row["question"] == question


def test_any_object_with_search_is_a_retriever():
    class Constant:
        def search(self, queries, k):
            return [CORPUS[:k] for _ in queries]

    questions = Dataset.from_list([{"question": "who?", "answers": ["she"]}])
    [row] = retrieve_candidates(questions, Constant(), k=2)
    assert [document["id"] for document in row["documents"]] == ["p0", "p1"]


def test_wrongly_named_column_is_refused_with_the_renaming(retriever):
    questions = Dataset.from_list([{"question": "who?", "golden_answers": ["she"]}])
    with pytest.raises(DatasetError, match=r'rename_column\("golden_answers", "answers"\)'):
        retrieve_candidates(questions, retriever, k=2)


@pytest.mark.parametrize("split", ["train", "dev"])
def test_recall_on_real_questions_is_plausible(shared_data, split):
    retriever = BM25Retriever(read_corpus(shared_data / "nq" / "corpus.jsonl"), show_progress=False)
    dataset = retrieve_candidates(read_questions(shared_data / "nq" / f"{split}.jsonl"), retriever, k=20)
    validate_dataset(dataset, num_selected=5)
    recall = {
        k: sum(recall_at_k([document["text"] for document in row["documents"]], row["answers"], k) for row in dataset)
        / len(dataset)
        for k in (1, 5, 20)
    }
    print(f"BM25 on nq/{split}: " + ", ".join(f"Recall@{k} {value:.3f}" for k, value in recall.items()))
    assert 0.34 < recall[1] < 0.42
    assert 0.63 < recall[5] < 0.71
    assert 0.69 < recall[20] < 0.77
