# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import itertools
import json

import pytest

from trl_dro.data import Corpus, DatasetError
from trl_dro.retrieval import BM25Retriever
from trl_dro.synthetic import gates, job
from trl_dro.synthetic.job import choose_pairs, choose_passages, document_of, split_by_document, write_candidates
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

    def write(self, sources, count):
        written = []
        for passage, *more in sources:
            if passage["id"] == self.interrupted_at:
                raise KeyboardInterrupt
            self.asked.append("+".join(each["id"] for each in (passage, *more)))
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
    pairs = [tuple(CORPUS.documents([6, 0]))]
    whole = write_candidates(CORPUS, places, pairs, Copyist(), judge, retriever, tmp_path / "whole", depth=3)
    with pytest.raises(KeyboardInterrupt):
        write_candidates(CORPUS, places, pairs, Copyist("guide/7.md#0"), judge, retriever, tmp_path / "cut", depth=3)
    second = Copyist()
    rows = write_candidates(CORPUS, places, pairs, second, judge, retriever, tmp_path / "cut", depth=3)
    both = "guide/8.md#0+guide/5.md#0"
    assert second.asked == ["guide/7.md#0", "guide/7.md#1", "guide/8.md#0", "guide/8.md#1", both]
    for row, expected in zip(rows, whole, strict=True):
        assert {**row, "seconds": 0} == {**expected, "seconds": 0}
    good, bad = rows[3]["candidates"]
    assert good["id"] == "guide/6.md#1/q0" and good["rank"] == 1 and isinstance(good["gain"], float)
    assert bad["refused"] == gates.FORM and bad["rank"] is bad["gain"] is None
    assert rows[8]["passage_ids"] == ["guide/8.md#0", "guide/5.md#0"] and rows[8]["sources"][1] == "guide/5.md"
    of_pair = rows[8]["candidates"][0]
    found = [each["id"] for each in retriever.search([of_pair["question"]], 3)[0]]
    assert of_pair["id"] == f"{both}/q0" and found[0] == "guide/8.md#0"
    assert of_pair["rank"] == (found.index("guide/5.md#0") + 1 if "guide/5.md#0" in found else None)
    with pytest.raises(ValueError, match="holds results with questions_per_passage=3, not 1: name another"):
        write_candidates(CORPUS, places, pairs, Copyist(), judge, retriever, tmp_path / "cut", count=1, depth=3)


def test_the_rank_of_a_pair_is_that_of_its_lower_passage(retriever, tmp_path):
    pairs = [tuple(CORPUS.documents([0, other])) for other in range(1, 8)]
    rows = write_candidates(CORPUS, [], pairs, Copyist(), None, retriever, tmp_path, depth=4)
    [ranking] = retriever.search([rows[0]["candidates"][0]["question"]], 8)
    places = {document["id"]: place for place, document in enumerate(ranking, start=1)}
    assert places[CORPUS.documents([0])[0]["id"]] == 1
    for row in rows:
        lower = places[row["passage_ids"][1]]
        assert row["candidates"][0]["rank"] == (lower if lower <= 4 else None)


LINKED = Corpus.from_documents(
    [
        {
            "id": "a",
            "title": "Bakery Nord",
            "text": "Bakery Nord in Lindau was founded by Ada Stone in the year 1921.",
        },
        {
            "id": "b",
            "title": "Ada Stone",
            "text": "She was a baker who climbed a high mountain before she was twenty.",
        },
        {"id": "c", "title": "Lindau (town)", "text": "Lindau is a town on an island in the east of a lake there."},
        {"id": "d", "title": "Mills", "text": "The old mill of the Bakery Nord was sold to Mr Ada for one mark."},
        {"id": "e", "title": "Nothing", "text": "Here nobody has a name, and so there is nothing to be linked with."},
    ]
)


def test_pairs_share_a_name_that_is_a_title_or_has_several_words():
    retriever = BM25Retriever(LINKED.documents(range(5)), show_progress=False)
    linked = {
        tuple(passage["id"] for passage in pair)
        for seed in range(10)
        for pair in choose_pairs(LINKED, range(5), retriever, 9, seed=seed)
    }
    # Its own title stands in another text; what it names has a title, with brackets or without. Of one word alone,
    # "Ada", which several texts have, nothing follows.
    assert linked <= {("a", "d"), ("a", "b"), ("a", "c"), ("b", "a"), ("c", "a"), ("d", "a")}
    assert {frozenset(pair) for pair in linked} >= {frozenset("ab"), frozenset("ad"), frozenset("ac")}
    for seed in range(10):
        pairs = choose_pairs(LINKED, range(5), retriever, 2, seed=seed)
        assert len(pairs) == len({frozenset(each["id"] for each in pair) for pair in pairs}) == 2
    assert choose_pairs(LINKED, range(5), retriever, 0) == choose_pairs(LINKED, [4], retriever, 9) == []


def test_no_pair_joins_what_is_held_out_with_what_is_not():
    corpus = Corpus.from_documents(
        {
            "id": f"{i}",
            "title": f"Castle {i}",
            "text": f"It was built in stone by Anna Brown and others of family number {i}.",
        }
        for i in range(40)
    )
    retriever = BM25Retriever(corpus.documents(range(40)), show_progress=False)
    apart = [job._side(f"Castle {i}") < 0.5 for i in range(40)]
    pairs = choose_pairs(corpus, range(40), retriever, 40, dev_share=0.5)
    sides = [tuple(apart[int(passage["id"])] for passage in pair) for pair in pairs]
    assert set(sides) == {(True, True), (False, False)}
    joined = choose_pairs(corpus, range(40), retriever, 40)
    assert any(apart[int(one["id"])] != apart[int(other["id"])] for one, other in joined)


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
    questions = [{"sources": [f"d{i % 40}"], "positive_ids": [f"p{i}"], "id": i} for i in range(200)]
    train, dev = split_by_document(questions, 0.2)
    held_out = {each["sources"][0] for each in dev}
    assert not {each["sources"][0] for each in train} & held_out
    assert len(train) + len(dev) == 200 and 40 <= len(dev) < 45
    # It depends on names: other questions of these documents do not move them.
    again = split_by_document([each for each in questions if each["id"] < 160], 0.2)[1]
    assert {each["sources"][0] for each in again} == held_out
    assert split_by_document(questions, 0.0) == (questions, [])


def test_a_question_of_two_documents_is_where_both_are_or_nowhere():
    names = [f"d{i}" for i in range(12)]
    questions = [
        {"sources": [one, other], "positive_ids": [f"{one}#0", f"{other}#0"]}
        for one, other in itertools.combinations(names, 2)
    ]
    train, dev = split_by_document(questions, 0.4)
    of_train, of_dev = ({name for each in part for name in each["sources"]} for part in (train, dev))
    assert of_train and of_dev and not of_train & of_dev and of_train | of_dev == set(names)
    assert all(len(set(each["sources"]) & of_dev) == 1 for each in questions if each not in train and each not in dev)


def test_one_document_is_split_by_its_passages_and_one_passage_not_at_all():
    questions = [{"sources": ["d"], "positive_ids": [f"p{i // 2}"]} for i in range(6)]
    train, dev = split_by_document(questions, 0.2)
    assert len(dev) == 2 and dev[0]["positive_ids"] == dev[1]["positive_ids"]
    assert split_by_document(questions[:2], 0.2) == (questions[:2], [])
    assert json.dumps(split_by_document([], 0.2)) == "[[], []]"
