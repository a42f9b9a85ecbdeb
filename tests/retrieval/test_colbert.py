# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import random
import sys

import pytest

from trl_dro.data import Corpus, DatasetError
from trl_dro.retrieval import ColBERTRetriever
from trl_dro.retrieval.colbert import prepare_colbert


WORDS = [f"{first}{second}" for first in "bdfgklmnprst" for second in ("a", "e", "i", "o", "u")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A ColBERT checkpoint of a tiny random BERT that knows `WORDS`."""
    for package in ("colbert", "faiss", "ninja"):
        pytest.importorskip(package, reason=f"needs {package}: pip install trl_dro[colbert]")
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    prepare_colbert()
    from colbert.infra import ColBERTConfig
    from colbert.modeling.base_colbert import BaseColBERT

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("colbert")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]", "[unused1]", ".", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(tokens))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    config = BertConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=256,
    )
    BertModel(config).save_pretrained(folder / "bert")
    # Saved through ColBERT: a plain BERT would get a new random projection at every load.
    BaseColBERT(str(folder / "bert"), ColBERTConfig(dim=16)).save(str(folder / "colbert"))
    return folder / "colbert"


@pytest.fixture(scope="module")
def corpus():
    rng = random.Random(0)
    return Corpus.from_documents(
        [{"id": f"p{i}", "title": "", "text": " ".join(rng.choices(WORDS, k=12))} for i in range(300)]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("indexes")


@pytest.fixture(scope="module")
def retriever(checkpoint, corpus, folder):
    retriever = ColBERTRetriever(str(checkpoint))
    retriever.index(corpus, folder)
    return retriever


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "colbert.modeling.base_colbert", None)
    with pytest.raises(ImportError, match=r"pip install trl_dro\[colbert\]"):
        ColBERTRetriever("anything")


def test_a_passage_used_as_its_own_query_comes_first(retriever, corpus):
    passages = corpus.documents(range(0, 300, 15))
    rankings = retriever.search([passage["text"] for passage in passages], k=5)
    hits = sum(ranking[0]["id"] == passage["id"] for ranking, passage in zip(rankings, passages, strict=True))
    print(f"ColBERT, tiny random BERT: {hits} of {len(passages)} passages are first for their own text")
    assert len(passages) == 20 and hits >= 19


def test_ranking_is_by_falling_score_without_repetition(retriever):
    for ranking in retriever.search(["ba be bi", "tu to ta ra"], k=10):
        scores = [document["score"] for document in ranking]
        assert scores == sorted(scores, reverse=True)
        assert len({document["id"] for document in ranking}) == len(ranking) > 0


def test_ranking_does_not_depend_on_earlier_searches(retriever):
    before = retriever.search(["ba be bi"], k=20)
    retriever.search(["tu to"], k=1)
    assert retriever.search(["ba be bi"], k=20) == before


def test_an_index_opened_from_disk_answers_as_the_one_that_was_built(retriever, checkpoint, corpus, folder):
    places = sorted(folder.glob("colbert-*/**/*"))
    opened = ColBERTRetriever(str(checkpoint))
    opened.index(corpus, folder)
    assert sorted(folder.glob("colbert-*/**/*")) == places
    assert opened.search(["ba be bi"], k=10) == retriever.search(["ba be bi"], k=10)


def test_the_shim_can_be_applied_twice(checkpoint):
    prepare_colbert()
    prepare_colbert()
    assert ColBERTRetriever(str(checkpoint)).settings["checkpoint"]


def test_plain_bert_is_refused(checkpoint):
    with pytest.raises(DatasetError, match=r"has no artifact\.metadata"):
        ColBERTRetriever(str(checkpoint.parent / "bert"))


def test_other_weights_have_another_key(checkpoint, tmp_path):
    import shutil

    changed = shutil.copytree(checkpoint, tmp_path / "changed")
    (changed / "config.json").write_text((changed / "config.json").read_text() + " ")
    assert ColBERTRetriever(str(changed)).settings != ColBERTRetriever(str(checkpoint)).settings


def test_indexing_that_was_killed_goes_on(retriever, checkpoint, corpus, tmp_path, monkeypatch):
    from colbert.indexing.collection_indexer import CollectionIndexer

    def killed(*args):
        raise KeyboardInterrupt

    trained = []
    train = CollectionIndexer.train
    monkeypatch.setattr(CollectionIndexer, "train", lambda *args: trained.append(1) or train(*args))
    for stage in ("train", "finalize", None):
        with monkeypatch.context() as patch:
            again = ColBERTRetriever(str(checkpoint))
            if stage is None:
                again.index(corpus, tmp_path)
            else:
                patch.setattr(CollectionIndexer, stage, killed)
                with pytest.raises(KeyboardInterrupt):
                    again.index(corpus, tmp_path)
    assert len(trained) == 1  # for the second call; the third finds the centroids
    assert again.search(["ba be bi"], k=10) == retriever.search(["ba be bi"], k=10)
