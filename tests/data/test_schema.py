# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import re

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from trl_dro.data import DatasetError, build_dataset, check_record, validate_dataset


def record(**changes):
    documents = [{"id": f"p{i}", "title": f"Title {i}", "text": f"Text {i}."} for i in range(5)]
    return {"question": "who?", "answers": ["she", "her"], "documents": documents} | changes


def documents_with(**changes):
    """Five documents, the third of them changed."""
    documents = record()["documents"]
    return documents[:2] + [documents[2] | changes] + documents[3:]


def dataset_with(**changes):
    """Three rows, the second of them changed."""
    return Dataset.from_list([record(), record(**changes), record()])


def column_of(**changes):
    """Three rows, all of them changed: Arrow gives a column one type."""
    return Dataset.from_list([record(**changes)] * 3)


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


MALFORMED = {
    # case: (dataset, what the message must say about the place, the problem and the cure, in this order)
    "none": (lambda: None, ["train_dataset", "not NoneType", "Dataset.from_list"]),
    "list": (lambda: [record()], ["train_dataset", "not list", "Dataset.from_list"]),
    "iterable": (
        lambda: IterableDataset.from_generator(lambda: iter([record()])),
        ["train_dataset", "not IterableDataset", "Dataset.from_list"],
    ),
    "splits": (lambda: DatasetDict(train=dataset_with()), ["train_dataset", "several splits", "dataset['train']"]),
    "no rows": (lambda: dataset_with().select([]), ["train_dataset", "no rows", "check"]),
    "question column missing": (
        lambda: dataset_with().remove_columns("question"),
        ["no column question", "'answers', 'documents'", "add it"],
    ),
    "query": (
        lambda: dataset_with().rename_column("question", "query"),
        ["no column question", 'rename_column("query", "question")'],
    ),
    "golden_answers": (
        lambda: dataset_with().rename_column("answers", "golden_answers"),
        ["no column answers", "'golden_answers'", 'rename_column("golden_answers", "answers")'],
    ),
    "ctxs": (
        lambda: dataset_with().rename_column("documents", "ctxs"),
        ["no column documents", 'rename_column("ctxs", "documents")'],
    ),
    "contexts": (
        lambda: dataset_with().rename_column("documents", "contexts"),
        ["no column documents", 'rename_column("contexts", "documents")'],
    ),
    "passages": (
        lambda: dataset_with().rename_column("documents", "passages"),
        ["no column documents", 'rename_column("passages", "documents")'],
    ),
    "documents column missing": (
        lambda: dataset_with().remove_columns("documents"),
        ["no column documents", "retrieve_candidates"],
    ),
    "question of numbers": (lambda: column_of(question=3), ["column question", "int64", "dataset.map"]),
    "question null": (lambda: dataset_with(question=None), ["row 1", "column question", "None", "drop the row"]),
    "question blank": (lambda: dataset_with(question=" \n"), ["row 1", "column question", "empty", "drop the row"]),
    "dialogue empty": (
        lambda: Dataset.from_list([record(question=chat(("user", "hi"))), record(question=[])]),
        ["row 1", "column question", "non-empty list", "drop the row"],
    ),
    "dialogue ends with assistant": (
        lambda: column_of(question=chat(("user", "hi"), ("assistant", "ho"))),
        ["row 0", "column question[1].role", "last message", "user", "cut the dialogue"],
    ),
    "dialogue of unknown role": (
        lambda: column_of(question=chat(("Wizard", "hi"), ("user", "ho"))),
        ["row 0", "column question[0].role", "'Wizard'", "rename"],
    ),
    "dialogue with blank turn": (
        lambda: column_of(question=chat(("user", ""), ("user", "ho"))),
        ["row 0", "column question[0].content", "drop the turn"],
    ),
    "dialogue of other keys": (
        lambda: column_of(question=[{"from": "human", "value": "hi"}]),
        ["column question", "{role, content}", "dataset.map"],
    ),
    "answers empty": (lambda: dataset_with(answers=[]), ["row 1", "column answers", "[]", "add a gold answer"]),
    "answers empty everywhere": (lambda: column_of(answers=[]), ["row 0", "column answers", "add a gold answer"]),
    "answers null": (lambda: dataset_with(answers=None), ["row 1", "column answers", "None", "add a gold answer"]),
    "answers a string": (lambda: column_of(answers="she"), ["column answers", "string", "[row['answers']]"]),
    "answers numbers": (lambda: column_of(answers=[1, 2]), ["column answers", "int64", "str("]),
    "answer blank": (
        lambda: dataset_with(answers=["she", ""]),
        ["row 1", "column answers[1]", "''", "remove this answer"],
    ),
    "answer null": (
        lambda: dataset_with(answers=[None, "she"]),
        ["row 1", "column answers[0]", "None", "remove this answer"],
    ),
    "documents empty": (lambda: dataset_with(documents=[]), ["row 1", "column documents", "retrieve_candidates"]),
    "documents null": (lambda: dataset_with(documents=None), ["row 1", "column documents", "retrieve_candidates"]),
    "documents strings": (
        lambda: column_of(documents=["Text."] * 5),
        ["column documents", "{id, title, text}", "dataset.map"],
    ),
    "documents one string": (lambda: column_of(documents="Text."), ["column documents", "string", "dataset.map"]),
    "documents columnar": (
        lambda: column_of(documents={"id": ["p0"], "text": ["Text."]}),
        ["column documents", "{id, title, text}", "dataset.map"],
    ),
    "documents without text": (
        lambda: column_of(documents=[{"id": "p0", "contents": "Text."}]),
        ["column documents", "{id, title, text}", "contents", "dataset.map"],
    ),
    "document ids numbers": (
        lambda: column_of(documents=[{"id": i, "text": "Text."} for i in range(5)]),
        ["column documents", "all strings", "int64", "dataset.map"],
    ),
    "document null": (
        lambda: dataset_with(documents=[None] + record()["documents"]),
        ["row 1", "column documents[0]", "None", "write"],
    ),
    "document text missing": (
        lambda: dataset_with(documents=documents_with(text=None)),
        ["row 1", "column documents[2].text", "'p2'", "None", "drop the document"],
    ),
    "document text blank": (
        lambda: dataset_with(documents=documents_with(text="  ")),
        ["row 1", "column documents[2].text", "'p2'", "drop the document"],
    ),
    "document ids repeated": (
        lambda: dataset_with(documents=documents_with(id="p0")),
        ["row 1", "column documents[2].id", "'p0'", "documents[0]", "drop the repeated document"],
    ),
    "documents too few": (
        lambda: dataset_with(documents=record()["documents"][:2]),
        ["row 1", "column documents", "2 documents", "num_selected=3", "lower num_selected"],
    ),
    "positive ids numbers": (
        lambda: column_of(positive_ids=[1]),
        ["column positive_ids", "int64", "str()"],
    ),
    "positive ids a string": (lambda: column_of(positive_ids="p1"), ["column positive_ids", "string", "remove"]),
    "positive id null": (
        lambda: Dataset.from_list([record(positive_ids=["p1"]), record(positive_ids=[None])]),
        ["row 1", "column positive_ids", "None", "remove the column"],
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_dataset_is_refused_in_one_line_with_place_and_cure(case):
    make_dataset, expected = MALFORMED[case]
    with pytest.raises(DatasetError) as info:
        validate_dataset(make_dataset(), num_selected=3)
    message = str(info.value)
    assert "\n" not in message
    assert re.search(".*".join(map(re.escape, expected)), message), message


def test_error_names_the_dataset_as_the_caller_does():
    with pytest.raises(DatasetError, match="^eval_dataset, row 1, column answers"):
        validate_dataset(dataset_with(answers=[]), num_selected=3, name="eval_dataset")


def test_error_shows_no_line_breaks_and_cuts_long_values():
    with pytest.raises(DatasetError) as info:
        check_record(record(answers="line\n" * 1000), "file.jsonl, line 7")
    assert "\n" not in str(info.value)
    assert len(str(info.value)) < 250


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"question": chat(("system", "Be brief."), ("user", "hi"), ("assistant", "ho"), ("user", "who?"))},
        {"documents": [{"text": f"Text {i}."} for i in range(3)]},
        {"documents": [{"id": None, "title": None, "text": f"Text {i}.", "score": 0.5} for i in range(3)]},
        {"positive_ids": ["not retrieved"]},
        {"positive_ids": []},
        {"positive_ids": None},
        {"id": "q17"},
    ],
    ids=str,
)
def test_wellformed_dataset_is_accepted(changes):
    built = build_dataset([record(**changes | ({"id": "17"} if "id" in changes else {}))] * 3)
    for dataset in (column_of(**changes), built):
        assert validate_dataset(dataset, num_selected=3) is None


def test_row_number_is_that_of_the_dataset_as_passed():
    shuffled = dataset_with(answers=[]).select([2, 0, 1])
    with pytest.raises(DatasetError, match="row 2, column answers"):
        validate_dataset(shuffled, num_selected=3)


def test_row_beyond_the_first_batch_is_checked_and_numbered():
    rows = [record()] * 2500 + [record(question="")]
    with pytest.raises(DatasetError, match="row 2500, column question"):
        validate_dataset(Dataset.from_list(rows), num_selected=3)


def test_format_set_by_the_user_does_not_hide_columns():
    assert validate_dataset(dataset_with().with_format("numpy", columns=["question"]), num_selected=3) is None


def test_built_dataset_has_the_same_types_whatever_the_values():
    bare = build_dataset([record(documents=[{"text": "Text."}])])
    full = build_dataset([record()])
    assert bare.features == full.features
    assert bare[0]["documents"] == [{"id": None, "title": None, "text": "Text."}]


def test_built_dataset_spans_chunks_in_order():
    dataset = build_dataset(record(question=f"question {i}") for i in range(2100))
    assert dataset["question"][:] == [f"question {i}" for i in range(2100)]


def test_strings_and_dialogues_do_not_mix():
    with pytest.raises(DatasetError, match="row 1, column question.*row 0 holds a string; use one form"):
        build_dataset([record(), record(question=chat(("user", "hi")))])


@pytest.mark.parametrize("form", ["pandas", "arrow"])
def test_a_dataset_whose_rows_are_no_dicts_is_refused(form):
    dataset = build_dataset([RECORD]).with_format(form)
    with pytest.raises(DatasetError, match=f"has the format '{form}'.*with_format"):
        validate_dataset(dataset, 1)


def test_documents_that_are_strings_are_named():
    with pytest.raises(DatasetError, match=r"row 0, column documents\[0\]: must be a dict with id, title and text"):
        build_dataset([{"question": "who?", "answers": ["Anna"], "documents": ["Anna Brown"]}])


RECORD = {"question": "who?", "answers": ["Anna"], "documents": [{"id": "a", "title": None, "text": "Anna"}]}
