# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import json

import pytest

from trl_dro.data import Corpus, DatasetError
from trl_dro.retrieval import BM25Retriever
from trl_dro.synthetic import gates
from trl_dro.synthetic.job import choose_passages, document_of, split_by_document, write_candidates
from trl_dro.synthetic.writers import LocalModel, Pair, Written

from ..tiny_models import TOKENIZERS, tiny_llama


NUMBERS = range(10, 18)
CORPUS = Corpus.from_documents(
    {
        "id": f"guide/{i // 2}.md#{i % 2}",
        "title": f"Town {i}",
        "text": f"Anna {i} built the old mill of town {i} alone.",
    }
    for i in NUMBERS
)


class Copyist:
    """Asks a good question and a bad one; is interrupted at a passage."""

    at_once = 2

    def __init__(self, interrupted_at=None):
        self.interrupted_at = interrupted_at
        self.asked = []

    @property
    def settings(self):
        return {"name": "copyist"}

    def write(self, passages, count):
        written = []
        for passage in passages:
            if passage["id"] == self.interrupted_at:
                raise KeyboardInterrupt
            self.asked.append(passage["id"])
            number = passage["title"].split()[-1]
            pairs = [Pair(f"Who built the old mill of town {number}?", f"Anna {number}"), Pair("Who knows?", "Nobody")]
            written.append(Written(pairs[:count], 5))
        return written


@pytest.fixture
def retriever():
    return BM25Retriever(CORPUS.documents(range(len(CORPUS))), show_progress=False)


def test_an_interrupted_job_goes_on_and_ends_as_one_that_was_not(retriever, tmp_path):
    tokenizer = TOKENIZERS["WordLevel"]()
    judge = LocalModel(tiny_llama(tokenizer), tokenizer, "tiny")
    places = choose_passages(CORPUS)
    whole = write_candidates(CORPUS, places, Copyist(), judge, retriever, tmp_path / "whole", depth=3)
    with pytest.raises(KeyboardInterrupt):
        write_candidates(CORPUS, places, Copyist("guide/7.md#0"), judge, retriever, tmp_path / "cut", depth=3)
    second = Copyist()
    rows = write_candidates(CORPUS, places, second, judge, retriever, tmp_path / "cut", depth=3)
    assert second.asked == ["guide/7.md#0", "guide/7.md#1", "guide/8.md#0", "guide/8.md#1"]
    for row, expected in zip(rows, whole, strict=True):
        assert {**row, "seconds": 0} == {**expected, "seconds": 0}
    good, bad = rows[3]["candidates"]
    assert good["id"] == "guide/6.md#1/q0" and good["rank"] == 1 and isinstance(good["gain"], float)
    assert bad["refused"] == gates.FORM and bad["rank"] is bad["gain"] is None
    with pytest.raises(ValueError, match="holds results with questions_per_passage=3, not 1: name another"):
        write_candidates(CORPUS, places, Copyist(), judge, retriever, tmp_path / "cut", count=1, depth=3)


def test_passages_without_words_are_not_asked_about_and_some_can_be_drawn():
    short = Corpus.from_documents([*CORPUS.documents(range(4)), {"id": "short", "title": "", "text": "Too short."}])
    assert choose_passages(short) == [0, 1, 2, 3]
    drawn = {tuple(choose_passages(short, 2, seed)) for seed in range(20)}
    assert all(len(places) == 2 and set(places) <= {0, 1, 2, 3} for places in drawn) and len(drawn) > 3
    japanese = ["水車は古い。", "水車は1921年にエイダが一人で建てた。"]
    assert choose_passages(Corpus.from_documents([{"id": text, "text": text} for text in japanese])) == [1]
    with pytest.raises(DatasetError, match="no passage of the corpus has 8 words"):
        choose_passages(Corpus.from_documents([{"id": "a", "text": "Too short."}]))


@pytest.mark.parametrize(
    "passage, document",
    [
        ({"id": "guide/a.md#12", "title": "Start", "text": "t"}, "guide/a.md"),
        ({"id": "p7", "title": "Bleak House", "text": "t"}, "Bleak House"),
        ({"id": "p7", "title": "", "text": "t"}, "p7"),
        ({"id": None, "title": None, "text": "t"}, "t"),
    ],
)
def test_a_passage_tells_its_document(passage, document):
    assert document_of(passage) == document


def test_no_document_is_on_both_sides_and_about_a_fifth_is_held_out():
    questions = [{"document": f"d{i % 40}", "positive_ids": [f"p{i}"], "id": i} for i in range(200)]
    train, dev = split_by_document(questions, 0.2)
    assert not {each["document"] for each in train} & {each["document"] for each in dev}
    assert len(train) + len(dev) == 200 and 40 <= len(dev) < 45
    # It depends on names: other questions of these documents do not move them.
    again = split_by_document([each for each in questions if each["id"] < 160], 0.2)[1]
    assert {each["document"] for each in again} == {each["document"] for each in dev}
    assert split_by_document(questions, 0.0) == (questions, [])


def test_one_document_is_split_by_its_passages_and_one_passage_not_at_all():
    questions = [{"document": "d", "positive_ids": [f"p{i // 2}"]} for i in range(6)]
    train, dev = split_by_document(questions, 0.2)
    assert len(dev) == 2 and dev[0]["positive_ids"] == dev[1]["positive_ids"]
    assert split_by_document(questions[:2], 0.2) == (questions[:2], [])
    assert json.dumps(split_by_document([], 0.2)) == "[[], []]"
