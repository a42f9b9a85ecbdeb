# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import json

import pytest
from datasets import DatasetDict

from trl_dro.data import DatasetError, build_dataset, load_records, read_corpus, read_questions, validate_dataset


QUESTION = {"id": "q1", "question": "who?", "answers": ["she"]}
PASSAGE = {"id": "p1", "title": "Title", "text": "Text."}
RECORD = {"question": "who?", "answers": ["she"], "documents": [PASSAGE]}


@pytest.fixture
def write(tmp_path):
    """Writes lines, given as objects, strings or bytes, and returns the path of the file."""

    def write(*lines):
        path = tmp_path / "file.jsonl"
        lines = [line if isinstance(line, str | bytes) else json.dumps(line) for line in lines]
        path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines))
        return path

    return write


def assert_refused(read, path, *expected):
    with pytest.raises(DatasetError) as info:
        read(path)
    message = str(info.value)
    assert "\n" not in message
    assert str(path) in message
    for part in expected:
        assert part in message


@pytest.mark.parametrize("read", [read_questions, read_corpus, load_records])
class TestBrokenFile:
    good = {read_questions: QUESTION, read_corpus: PASSAGE, load_records: RECORD}

    def test_missing_file_is_named(self, read, tmp_path):
        assert_refused(read, tmp_path / "absent.jsonl", "no such file", "check the path")

    def test_empty_file_is_refused(self, read, write):
        assert_refused(read, write(""), "is empty", "write")
        assert_refused(read, write("", "  "), "is empty", "write")

    def test_cut_last_line_is_numbered(self, read, write):
        good = self.good[read]
        assert_refused(read, write(good, json.dumps(good)[:-9]), "line 2", "not valid JSON", "cut short")

    def test_line_that_is_no_object_is_numbered(self, read, write):
        assert_refused(read, write(self.good[read], "[1, 2]"), "line 2", "is a list", "one object per line")

    def test_line_that_is_not_utf8_is_numbered(self, read, write):
        assert_refused(read, write(self.good[read], '{"id": "caf\u00e9"}'.encode("latin-1")), "line 2", "UTF-8")

    def test_missing_key_is_named_with_those_present(self, read, write):
        assert_refused(read, write(self.good[read], {"id": "x", "name": "y"}), "line 2", "no key", "'name'", "rename")

    def test_blank_lines_and_byte_order_mark_are_skipped(self, read, write):
        path = write(b"\xef\xbb\xbf" + json.dumps(self.good[read]).encode(), "", "")
        assert len(read(path)) == 1


def test_questions_are_read_with_either_name_of_the_answers(write):
    golden = {"id": 2, "question": "where?", "golden_answers": ["here", "there"], "metadata": {"split": "dev"}}
    questions = read_questions(write(QUESTION, golden))
    assert questions.column_names == ["id", "question", "answers"]
    assert questions[1] == {"id": "2", "question": "where?", "answers": ["here", "there"]}


@pytest.mark.parametrize(
    "change, column",
    [
        ({"question": ""}, "column question"),
        ({"question": 3}, "column question"),
        ({"answers": "she"}, "column answers"),
        ({"answers": []}, "column answers"),
        ({"answers": [1907]}, "column answers[0]"),
        ({"positive_ids": [1]}, "column positive_ids"),
        ({"id": None}, "key id"),
    ],
    ids=str,
)
def test_bad_question_is_refused_with_line_and_column(change, column, write):
    assert_refused(read_questions, write(QUESTION, QUESTION | change), "line 2", column)


def test_corpus_is_read_in_both_forms(write):
    flashrag = {"id": 7, "contents": '"The Title"\nFirst line.\nSecond line.'}
    untitled = {"id": "p3", "contents": "Only a text."}
    assert read_corpus(write(PASSAGE, flashrag, untitled)) == [
        PASSAGE,
        {"id": "7", "title": "The Title", "text": "First line.\nSecond line."},
        {"id": "p3", "title": "", "text": "Only a text."},
    ]


@pytest.mark.parametrize(
    "change, parts",
    [
        ({"id": "p1"}, ["key id", "'p1'", "line 1", "remove the repeated passage"]),
        ({"text": " "}, ["key text", "'p2'", "drop the line"]),
        ({"text": 3}, ["key text", "'p2'", "drop the line"]),
        ({"title": 3}, ["key title", "'p2'", "convert it"]),
        ({"id": 1.5}, ["key id", "1.5"]),
    ],
    ids=str,
)
def test_bad_passage_is_refused_with_line_and_id(change, parts, write):
    assert_refused(read_corpus, write(PASSAGE, PASSAGE | {"id": "p2"} | change), "line 2", *parts)


def test_bad_record_is_refused_with_line_and_column(write):
    repeated = RECORD | {"documents": [PASSAGE, PASSAGE]}
    assert_refused(load_records, write(RECORD, repeated), "line 2", "column documents[1].id", "'p1'")


def test_dates_stay_strings(write):
    # Arrow's own JSON reader would turn a column of these into timestamps.
    records = load_records(write(RECORD | {"answers": ["2012-10-12"]}))
    assert records[0]["answers"] == ["2012-10-12"]


def test_records_survive_every_way_of_storing_them(tmp_path, write):
    records = build_dataset([RECORD] * 3)
    records.save_to_disk(tmp_path / "folder")
    records.to_parquet(tmp_path / "file.parquet")
    records.to_json(tmp_path / "other.jsonl")
    for place in ("folder", "file.parquet", "other.jsonl"):
        loaded = load_records(tmp_path / place)
        validate_dataset(loaded, num_selected=1)
        assert loaded.to_list() == records.to_list()


def test_split_of_a_saved_folder_is_chosen_by_name(tmp_path):
    splits = DatasetDict(train=build_dataset([RECORD] * 3), dev=build_dataset([RECORD] * 2))
    splits.save_to_disk(tmp_path / "folder")
    assert len(load_records(tmp_path / "folder", split="dev")) == 2
    assert_refused(load_records, tmp_path / "folder", "train, dev", "name one")
    DatasetDict(dev=splits["dev"]).save_to_disk(tmp_path / "single")
    assert len(load_records(tmp_path / "single")) == 2


def test_folder_of_something_else_is_refused(tmp_path):
    assert_refused(load_records, tmp_path, "save_to_disk", ".jsonl")


def test_broken_parquet_is_refused(tmp_path):
    (tmp_path / "file.parquet").write_bytes(b"no parquet")
    assert_refused(load_records, tmp_path / "file.parquet", "Parquet", "write it again")


def test_hub_dataset_that_cannot_be_reached_points_to_local_files():
    assert_refused(load_records, "someone/something", "Hub", "--questions FILE --corpus FILE")


def test_real_questions_and_corpus_are_read(shared_data):
    corpus = read_corpus(shared_data / "nq" / "corpus.jsonl")
    assert len(corpus) == 4889
    assert corpus[0]["id"] == "p00000"
    for split, size in (("train", 600), ("dev", 200)):
        questions = read_questions(shared_data / "nq" / f"{split}.jsonl")
        assert len(questions) == size
        assert questions.column_names == ["id", "question", "answers"]
