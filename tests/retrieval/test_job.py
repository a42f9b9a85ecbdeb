# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, load_from_disk

from trl_dro.data import Corpus, DatasetError, open_corpus, read_questions, validate_dataset
from trl_dro.metrics import recall_at_k
from trl_dro.retrieval import BM25Retriever, PrecomputedRetriever, retrieve_to_folder
from trl_dro.retrieval.job import count_hits, read_report

from ..data.test_documents import write_pdf


ROOT = Path(__file__).resolve().parents[2]
WORDS = [f"{first}{second}{third}" for first in "bdfgklmn" for second in "aeiou" for third in "prst"]


def write_corpus(path, size, changed=None):
    """A corpus of random words, one text of which can be changed."""
    rng = random.Random(0)
    with open(path, "w") as file:
        for number in range(size):
            text = " ".join(rng.choices(WORDS, k=30))
            file.write(
                json.dumps({"id": f"p{number}", "title": "", "text": changed if changed and not number else text})
            )
            file.write("\n")
    return path


def questions_of(size):
    rng = random.Random(1)
    return Dataset.from_list(
        [
            {"id": f"q{number}", "question": " ".join(rng.choices(WORDS, k=4)), "answers": [rng.choice(WORDS)]}
            for number in range(size)
        ]
    )


class Counting(BM25Retriever):
    """BM25 that counts its searches and, after some of them, dies as if killed."""

    def __init__(self, fail_after=None, **settings):
        super().__init__(show_progress=False, **settings)
        self.num_searches = 0
        self.fail_after = fail_after

    def search(self, queries, k):
        if self.num_searches == self.fail_after:
            raise KeyboardInterrupt
        self.num_searches += 1
        return super().search(queries, k)


@pytest.fixture
def job(tmp_path):
    """Runs retrieval of 50 questions in shards of 10."""
    write_corpus(tmp_path / "corpus.jsonl", 200)

    def run(retriever=None, output="out", **changes):
        settings = {
            "questions": questions_of(50),
            "corpus": open_corpus(tmp_path / "corpus.jsonl", tmp_path / "cache", show_progress=False),
            "output_dir": tmp_path / output,
            "k": 5,
            "cache_dir": tmp_path / "cache",
            "shard_size": 10,
            "batch_size": 4,
        } | changes
        return retrieve_to_folder(retriever=retriever or Counting(), **settings)

    return run


def test_records_are_valid_with_score_and_rank(job):
    dataset = job()
    validate_dataset(dataset, num_selected=5)
    assert dataset["id"][:] == [f"q{number}" for number in range(50)]
    for row in dataset:
        assert [document["rank"] for document in row["documents"]] == [1, 2, 3, 4, 5]
        scores = [document["score"] for document in row["documents"]]
        assert scores == sorted(scores, reverse=True)


def test_candidates_are_those_of_the_retriever(job, tmp_path):
    dataset = job()
    retriever = BM25Retriever(open_corpus(tmp_path / "corpus.jsonl", tmp_path / "cache").passages, show_progress=False)
    rankings = retriever.search(dataset["question"][:], k=5)
    for row, ranking in zip(dataset, rankings, strict=True):
        assert [document["id"] for document in row["documents"]] == [document["id"] for document in ranking]


def test_shards_and_batches_do_not_change_the_result(job):
    expected = job().to_list()
    assert job(output="large", shard_size=1000, batch_size=50).to_list() == expected


def test_a_killed_job_goes_on_at_the_shard_where_it_stopped(job, tmp_path):
    expected = job(output="whole").to_list()
    with pytest.raises(KeyboardInterrupt):
        job(Counting(fail_after=7))  # 3 searches per shard: in the middle of the third
    assert not (tmp_path / "out" / "train").exists()
    again = Counting()
    assert job(again).to_list() == expected
    assert again.num_searches == 9  # three of five shards


def test_a_second_call_computes_nothing(job):
    expected = job().to_list()
    again = Counting()
    assert job(again).to_list() == expected
    assert again.num_searches == 0 and again.corpus is None  # not even the index is opened


@pytest.mark.parametrize("change", ["k", "question", "answer", "settings", "passage"])
def test_a_change_is_never_answered_from_the_cache(job, change, tmp_path):
    before = job().to_list()
    retriever, changes = Counting(), {}
    if change == "k":
        changes["k"] = 6
    elif change in ("question", "answer"):
        rows = questions_of(50).to_list()
        rows[-1] |= {"question": "bapa"} if change == "question" else {"answers": ["bapa"]}
        changes["questions"] = Dataset.from_list(rows)
    elif change == "settings":
        retriever = Counting(k1=0.9)
    else:
        write_corpus(tmp_path / "corpus.jsonl", 200, changed=before[0]["question"])
    after = job(retriever, **changes).to_list()
    assert retriever.num_searches == 15
    assert after != before
    if change == "passage":
        assert after[0]["documents"][0]["id"] == "p0"


def test_the_index_is_shared_by_splits_and_settings_that_do_not_concern_it(job, tmp_path):
    job()
    indexes = sorted((tmp_path / "cache" / "indexes").iterdir())
    job(split="dev", k=3, output="other")
    assert sorted((tmp_path / "cache" / "indexes").iterdir()) == indexes


def test_splits_of_a_folder_load_together(job, tmp_path):
    job(split="train")
    job(split="dev", questions=questions_of(7))
    loaded = load_from_disk(tmp_path / "out")
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 50, "dev": 7}


def test_splits_that_were_saved_by_other_means_stay_listed(job, tmp_path):
    DatasetDict(test=questions_of(2)).save_to_disk(tmp_path / "out")
    job()
    assert set(load_from_disk(tmp_path / "out")) == {"test", "train"}


def test_recall_is_stored_and_equals_the_metric(job, tmp_path):
    dataset = job()
    report = read_report(tmp_path / "out" / "train")
    assert report["num_questions"] == 50
    assert list(report["recall"]) == ["contains an answer"]
    for cutoff, value in report["recall"]["contains an answer"].items():
        values = [
            recall_at_k([document["text"] for document in row["documents"]], row["answers"], int(cutoff))
            for row in dataset
        ]
        assert value == pytest.approx(sum(values) / 50)
    assert list(report["recall"]["contains an answer"]) == ["1", "3", "5"]


def test_supporting_passages_are_counted_where_they_are_known():
    documents = [{"id": f"p{number}", "text": f"text {number}"} for number in range(4)]
    records = [
        {"answers": ["text 2"], "documents": documents, "positive_ids": ["p3", "p1"]},
        {"answers": ["nothing"], "documents": documents, "positive_ids": ["elsewhere"]},
        {"answers": ["text 0"], "documents": documents, "positive_ids": None},
    ]
    assert count_hits(records, k=4) == {
        "contains an answer": {"1": 1, "3": 2, "4": 2, "of": 3},
        "is a supporting passage": {"1": 0, "3": 1, "4": 1, "of": 2},
    }


def test_positive_ids_of_another_corpus_are_not_reported(job, tmp_path):
    rows = [row | {"positive_ids": ["elsewhere"]} for row in questions_of(50).to_list()]
    assert job(questions=Dataset.from_list(rows))["positive_ids"][0] == ["elsewhere"]
    assert list(read_report(tmp_path / "out" / "train")["recall"]) == ["contains an answer"]


def test_a_kill_between_the_result_and_the_names_of_the_splits_is_mended(job, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_dro.retrieval.job._name_splits", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        job()
    monkeypatch.undo()
    job(Counting(fail_after=0))
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["dataset_dict.json", "train"]


@pytest.mark.parametrize("change", [{"question": " "}, {"answers": []}])
def test_bad_question_is_refused_before_indexing(job, change, tmp_path):
    questions = Dataset.from_list([*questions_of(3).to_list(), questions_of(1)[0] | change])
    with pytest.raises(DatasetError, match="questions, row 3, column"):
        job(questions=questions)
    assert not (tmp_path / "cache" / "indexes").exists()


def test_what_something_else_wrote_is_not_replaced(job, tmp_path):
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / "thesis.txt").write_text("years of work")
    with pytest.raises(DatasetError, match="did not write; choose another output_dir"):
        job()
    assert (tmp_path / "out" / "train" / "thesis.txt").exists()


def test_missing_column_is_refused(job):
    with pytest.raises(DatasetError, match="no column answers"):
        job(questions=questions_of(3).remove_columns("answers"))


def test_of_a_small_corpus_all_passages_are_candidates(job, tmp_path):
    dataset = job(questions=questions_of(3), k=201)
    assert all(len({document["id"] for document in row["documents"]}) == 200 for row in dataset)
    report = read_report(tmp_path / "out" / "train")
    assert report["settings"]["k"] == 200 and list(report["recall"]["contains an answer"])[-1] == "200"


def test_precomputed_candidates_need_no_corpus(tmp_path):
    documents = [{"id": f"p{number}", "title": "", "text": f"text {number}"} for number in range(4)]
    questions = Dataset.from_list([{"question": "who?", "answers": ["text 1"], "documents": documents}])
    dataset = retrieve_to_folder(questions, PrecomputedRetriever(questions), None, tmp_path / "out", k=3)
    assert [document["id"] for document in dataset[0]["documents"]] == ["p0", "p1", "p2"]
    assert read_report(tmp_path / "out" / "train")["recall"]["contains an answer"] == {"1": 0.0, "3": 1.0}


def test_corpus_without_ids_can_be_searched_in_memory():
    retriever = BM25Retriever(show_progress=False, corpus=[{"text": "red fox"}, {"text": "grey wolf"}])
    assert [document["text"] for document in retriever.search(["wolf"], k=1)[0]] == ["grey wolf"]
    assert Corpus.from_documents([{"text": "a"}]).documents([0]) == [{"id": None, "title": "", "text": "a"}]


def start_command(tmp_path, output):
    corpus, questions = tmp_path / "corpus.jsonl", tmp_path / "questions.jsonl"
    arguments = ["--questions", questions, "--corpus", corpus, "--output_dir", tmp_path / output]
    arguments += ["--cache_dir", tmp_path / f"{output}_cache", "--shard_size", 50]
    command = [sys.executable, "-m", "trl_dro.commands.cli", "retrieve", *map(str, arguments)]
    with open(tmp_path / "log.txt", "w") as log:
        command = [sys.executable, "-m", "trl_dro.commands.cli", "retrieve", *map(str, arguments)]
    with open(tmp_path / "log.txt", "w") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def finish(process, tmp_path):
    assert process.wait(timeout=600) == 0, (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_a_command_killed_five_times_ends_as_one_that_was_not(tmp_path, shared_data):
    """
    On passages of the real sample, repeated with changes: 20,000, or as many as `RETRIEVAL_TEST_PASSAGES` says.
    """
    rng = random.Random(0)
    base = [json.loads(line) for line in (shared_data / "nq" / "corpus.jsonl").read_text().splitlines()]
    with open(tmp_path / "corpus.jsonl", "w") as file:
        for number in range(int(os.environ.get("RETRIEVAL_TEST_PASSAGES", 20_000))):
            words = base[number % len(base)]["text"].split()
            words[rng.randrange(len(words))] = rng.choice(base)["title"]
            file.write(json.dumps({"id": f"p{number}", "title": "", "text": " ".join(words)}) + "\n")
    (tmp_path / "questions.jsonl").write_text((shared_data / "nq" / "train.jsonl").read_text())

    begin = time.monotonic()
    finish(start_command(tmp_path, "whole"), tmp_path)
    seconds = time.monotonic() - begin
    kills = []
    while len(kills) < 5:
        process = start_command(tmp_path, "killed")
        delay = rng.uniform(0.1, 0.9) * seconds
        try:
            process.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills.append(delay)
        else:
            # Done between two kills. The index stays, so that searching is what is killed next.
            shutil.rmtree(tmp_path / "killed")
    print(f"uninterrupted: {seconds:.1f} s; killed after {', '.join(f'{delay:.1f}' for delay in kills)} s")
    finish(start_command(tmp_path, "killed"), tmp_path)

    whole, killed = load_from_disk(tmp_path / "whole" / "train"), load_from_disk(tmp_path / "killed" / "train")
    assert whole["id"][:] == read_questions(tmp_path / "questions.jsonl")["id"][:]
    assert killed.to_list() == whole.to_list()
    recall = [read_report(tmp_path / output / "train")["recall"] for output in ("whole", "killed")]
    assert recall[0] == recall[1]
    assert not list(tmp_path.glob("killed*/**/*.partial"))


def test_candidates_keep_the_page_that_they_begin_on(tmp_path):
    write_pdf(tmp_path / "documents" / "bees.pdf", ["Wasps sting.", "Bees fly."])
    (tmp_path / "documents" / "ants.txt").write_text("Ants walk.")
    corpus = open_corpus(tmp_path / "documents", tmp_path / "cache", words_per_passage=2, show_progress=False)
    questions = Dataset.from_list([{"question": name, "answers": ["x"]} for name in ("ants walk", "bees fly")])
    retriever = BM25Retriever(show_progress=False)
    settings = {"k": 1, "cache_dir": tmp_path / "cache", "shard_size": 1}
    dataset = retrieve_to_folder(questions, retriever, corpus, tmp_path / "out", **settings)
    assert [row["documents"][0]["page"] for row in dataset] == [None, 2]
