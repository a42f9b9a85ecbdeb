# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import json
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

from trl_dro.data.corpus import Corpus
from trl_dro.retrieval import BM25Retriever
from trl_dro.synthetic.write_back import (
    ATTRIBUTION,
    ENTAILMENT,
    MARKER,
    NOVELTY,
    EntailmentSupport,
    add_passages,
    remove_passages,
    sift_pairs,
    statement,
)


# No two share four of five words, and none is a question.
PASSAGES = [
    {"id": f"p{i}", "title": f"Mill {i}", "text": f"Mill {i} was built by Person{i} in Town{i}. It grinds corn."}
    for i in range(50)
]


class Named:
    """Passages support an answer to a question that is about their mill."""

    name, least = "gain", 2.0

    def __call__(self, question, answer, passages):
        return [3.0 if each["title"].lower() in question else 1.0 for each in passages]


def pair(i, answer=None, cited=None, **more):
    cited = f"p{i}" if cited is None else cited
    question = f"who built mill {i}"
    return {"question": question, "answer": answer or f"Person{i}", "citations": [{"id": cited}], **more}


def sift(rows, passages=PASSAGES):
    retriever = BM25Retriever(passages, show_progress=False)
    return sift_pairs(rows, Corpus.from_documents(passages), retriever, Named(), {"date": "2026", "system": "run"})


def refusals(rows, passages=PASSAGES):
    return [(each["gate"], each["reason"]) for each in sift(rows, passages)[1]]


def test_of_fifty_pairs_those_that_are_wrong_or_copied_are_refused_by_the_right_gate():
    right = [pair(i) for i in range(25)]
    wrong = [pair(i, answer=f"Person{i + 1}") for i in range(25, 35)]  # stands in another passage
    beside = [pair(i, answer=f"Person{i + 1}", cited=f"p{i + 1}") for i in range(35, 43)]  # in one about another mill
    copied = [pair(i) for i in range(7)]
    written, refused = sift([*right, *wrong, *beside, *copied])
    assert [each["provenance"]["question"] for each in written] == [row["question"] for row in right]
    assert Counter(each["gate"] for each in refused) == {ATTRIBUTION: 10, ENTAILMENT: 8, NOVELTY: 7}
    assert {each["question"] for each in refused if each["gate"] == NOVELTY} == {row["question"] for row in copied}


def test_what_is_written_carries_where_it_comes_from():
    [passage], _ = sift([pair(3)])
    assert passage["id"].startswith(MARKER) and passage["title"] == "Mill 3"
    assert passage["text"] == "Who built mill 3? Person3."
    told = {"question": "who built mill 3", "answer": "Person3", "cited_ids": ["p3"], "gain": 3.0}
    assert passage["provenance"] == {**told, "date": "2026", "system": "run"}


@pytest.mark.parametrize(
    "row, reason",
    [
        (pair(1, answer="Person"), "does not stand in p1"),
        (pair(1, cited="p99"), "cites no passage of the corpus that was not written back itself"),
        ({**pair(1), "citations": []}, "cites nothing"),
        ({**pair(1), "answer": " "}, "is no answer"),
        (pair(1, abstained=True), "the system abstained"),
        ({**pair(1), "question": [{"role": "user", "content": "who built mill 1"}]}, "is a turn of a dialogue"),
    ],
)
def test_an_answer_that_is_owed_to_no_passage_is_refused(row, reason):
    [(gate, why)] = refusals([row])
    assert gate == ATTRIBUTION and why.startswith(reason)


def test_what_was_written_back_supports_nothing_further():
    own = {"id": f"{MARKER}1", "title": "Mill 1", "text": "Mill 1, they say, was built by Person1."}
    assert refusals([pair(1, cited=own["id"])], [*PASSAGES, own])[0][0] == ATTRIBUTION


def test_the_best_of_the_cited_passages_decides():
    both = {**pair(1), "citations": [{"id": "p2"}, {"id": "p1"}]}
    passages = [{**each, "text": f"{each['text']} So did Person1."} for each in PASSAGES]
    [passage], _ = sift([both], passages)
    assert passage["provenance"]["cited_ids"] == ["p1"] and passage["title"] == "Mill 1"
    assert refusals([pair(1, cited="p2")], passages) == [(ENTAILMENT, "gain 1.00 is below 2")]


def test_what_stands_in_the_corpus_is_not_written_twice():
    [passage], _ = sift([pair(4)])
    assert refusals([pair(4)], [*PASSAGES, passage]) == [(NOVELTY, f"near-duplicate of {passage['id']}")]
    told = {"id": "q", "title": "", "text": "Who built mill 4? surely Person4."}
    assert refusals([pair(4)], [*PASSAGES, told]) == [(NOVELTY, "near-duplicate of q")]
    other = {**told, "text": "Who built mill 5? surely Person5."}
    assert refusals([pair(4)], [*PASSAGES, other]) == []


def test_a_question_with_its_answer_is_a_text():
    assert statement("who  built it", "Ada Stone") == "Who built it? Ada Stone."
    assert statement("Who built it?", "Ada S.") == "Who built it? Ada S."


@pytest.mark.parametrize("end", ["\n", "", "\n\n", "\r\n"])
def test_a_corpus_is_what_it_was_when_all_is_removed(tmp_path, end):
    path = tmp_path / "corpus.jsonl"
    lines = [json.dumps(each) for each in PASSAGES[:3]]
    lines[1] = lines[1].replace("corn.", f"{MARKER} is no id.").replace(": ", ":  ")
    before = ("\n".join(lines) + end).encode()
    path.write_bytes(before)
    path.chmod(0o640)
    first, second = [pair(1), pair(2)], [pair(3)]
    for rows in (first, second):
        add_passages(path, sift(rows)[0])
    after = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    assert [each["id"].startswith(MARKER) for each in after] == [False] * 3 + [True] * 3
    assert path.read_bytes().startswith(before.rstrip()) and path.stat().st_mode & 0o777 == 0o640
    assert remove_passages(path) == 3 and path.read_bytes() == before
    assert remove_passages(path) == 0 and path.read_bytes() == before


def test_a_cross_encoder_for_inference_can_judge(monkeypatch):
    class CrossEncoder:
        config = SimpleNamespace(label2id={"contradiction": 0, "Entailment": 1, "neutral": 2})

        def __init__(self, name, device=None):
            self.name = name

        def predict(self, pairs, apply_softmax):
            assert apply_softmax
            return [[0.1, 0.9, 0.0] if "Person1" in text else [0.8, 0.1, 0.1] for text, _ in pairs]

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(CrossEncoder=CrossEncoder))
    support = EntailmentSupport("nli", 0.5)
    assert support("who built mill 1", "Person1", PASSAGES[1:3]) == [0.9, 0.1]
    monkeypatch.setattr(CrossEncoder, "config", SimpleNamespace(label2id={"LABEL_0": 0}))
    with pytest.raises(ValueError, match="knows label_0 and no entailment: name one trained on inference"):
        EntailmentSupport("ranker", 0.5)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"pip install trl_dro\[dense\]"):
        EntailmentSupport("nli", 0.5)
