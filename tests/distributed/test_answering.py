# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Two processes that share an evaluation or a file of questions leave what one leaves, whatever kills them."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from trl_dro.commands.evaluate import EvaluationArguments, evaluate
from trl_dro.commands.predict import PredictArguments, predict

from ..test_faults import make_trainer
from ..trainer.test_dro_trainer import make_dataset


ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120  # until processes are given up
# Of one or two questions a batch.
SETTINGS = {"device": "cpu", "on_error": "skip", "tokens_per_batch": 400}
PREDICTIONS = "predictions.jsonl"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A run, a file of 24 questions with answers, three of which cannot be asked, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("answering")
    make_trainer(folder / "run", max_answer_length=8).save_model()
    rows = [{"id": f"q{i}", **row} for i, row in enumerate(make_dataset(24).to_list())]
    for i, row in enumerate(rows):
        row["documents"] = row["documents"][: 2 + i % 3]  # batches of different numbers of questions
        row["question"] = "" if i in (0, 7, 23) else row["question"]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"model": str(folder / "run"), **SETTINGS}
    predict(PredictArguments(questions=f"{folder}/questions.jsonl", output_dir=f"{folder}/one-predict", **settings))
    evaluate(
        EvaluationArguments(dataset_name=f"{folder}/questions.jsonl", output_dir=f"{folder}/one-evaluate", **settings)
    )
    return folder


def launch(command, files, output_dir, log):
    """Starts a command in two processes, as a user does."""
    source = "--questions" if command == "predict" else "--dataset_name"
    settings = {"--output_dir": output_dir, source: files / "questions.jsonl", "--num_processes": 2}
    settings |= {f"--{name}": value for name, value in SETTINGS.items()}
    flags = [str(part) for pair in settings.items() for part in pair]
    program = "from trl_dro.commands.cli import main; main()"
    with log.open("a") as file:
        return subprocess.Popen(
            [sys.executable, "-c", program, command, str(files / "run"), *flags], cwd=ROOT, stdout=file, stderr=file
        )


def without_time(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.slow
def test_two_processes_evaluate_as_one(files, tmp_path):
    one, two = files / "one-evaluate", tmp_path / "two"
    log = tmp_path / "log"
    assert launch("evaluate", files, two, log).wait(SECONDS) == 0, log.read_text()
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())
    assert without_time(two / "questions.jsonl") == without_time(one / "questions.jsonl")
    for name in ("settings.json", "skipped.jsonl"):
        assert (two / name).read_text() == (one / name).read_text()
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, two)]
    assert all(summary["metrics"].pop("seconds") for summary in summaries)
    assert summaries[0] == summaries[1] and summaries[1]["num_skipped"] == 3
    text = log.read_text()
    assert text.count("exact match") == text.count("3 rows were skipped") == 1 and "21/21" in text


def parts(output_dir):
    """Lines that each process has written."""
    names = [PREDICTIONS.replace(".", f".partial{end}.") for end in ("", "-1")]
    paths = [output_dir / name for name in names]
    return [path.read_bytes().count(b"\n") if path.is_file() else 0 for path in paths]


@pytest.mark.slow
@pytest.mark.parametrize("killed, number", [(0, 2), (1, 1)])
def test_killed_in_the_middle_any_number_of_processes_go_on_to_the_same_file(files, tmp_path, killed, number):
    two, log = tmp_path / "two", tmp_path / "log"
    launcher = launch("predict", files, two, log)
    end = time.monotonic() + SECONDS
    while not all(parts(two)):
        assert launcher.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.002)
    ranks = {int(each.environ()["RANK"]): each for each in psutil.Process(launcher.pid).children(recursive=True)}
    ranks[killed].send_signal(signal.SIGKILL)
    assert launcher.wait(SECONDS) != 0
    assert not psutil.wait_procs(ranks.values(), timeout=SECONDS)[1]  # no process stays behind
    kept = parts(two)
    assert 0 < sum(kept) < 21 and not (two / PREDICTIONS).exists()
    if number == 2:
        assert launch("predict", files, two, log).wait(SECONDS) == 0, log.read_text()
    else:
        settings = {"model": str(files / "run"), "questions": str(files / "questions.jsonl"), **SETTINGS}
        predict(PredictArguments(output_dir=str(two), **settings))
    expected = files / "one-predict"
    for name in (PREDICTIONS, "settings.json", "skipped.jsonl"):
        assert (two / name).read_bytes() == (expected / name).read_bytes()
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in expected.iterdir())


@pytest.mark.slow
def test_what_one_process_cannot_do_ends_all_with_one_line(files, tmp_path):
    shutil.copytree(files / "one-predict", tmp_path / "two")
    settings = tmp_path / "two" / "settings.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"max_candidates": 3}))
    log = tmp_path / "log"
    assert launch("predict", files, tmp_path / "two", log).wait(SECONDS) != 0
    lines = [line for line in log.read_text().splitlines() if line.startswith("trl-dro predict:")]
    assert len(lines) == 1 and "holds results with max_candidates=3, not None" in lines[0]
