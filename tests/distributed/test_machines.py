# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Two machines, each a launcher of its own on loopback, train as one process does; when one is lost the other ends."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from .run_training import read_result, start
from .test_data_parallel import difference


ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120  # until a process is given up
TOLERANCE = 1e-5


def machines(folder, *command):
    """Starts a command on two machines of one process each, with the output of each in a file of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = (ROOT / "recipes/accelerate/two_cpu_processes.yaml").read_text().replace("num_machines: 1", "")
    started = []
    for rank in (0, 1):
        config = folder / f"machine-{rank}.yaml"
        address = f"main_process_ip: 127.0.0.1\nmain_process_port: {port}\n"
        config.write_text(f"{alone}num_machines: 2\nmachine_rank: {rank}\n{address}")
        with (folder / f"log-{rank}").open("a") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-u", *(word.format(config=config) for word in command)],
                    cwd=ROOT,
                    env=os.environ | {"ACCELERATE_USE_CPU": "true"},
                    stdout=log,
                    stderr=log,
                )
            )
    return started


def lose(machine):
    """Kills a launcher and what it started, the launcher first, which so tells nobody."""
    launcher = psutil.Process(machine.pid)
    for process in [launcher, *launcher.children(recursive=True)]:
        process.kill()


@pytest.mark.slow
def test_two_machines_train_as_one_process_and_one_resumes_what_they_saved(tmp_path):
    settings = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    one, two, resumed = (settings | {"output_dir": str(tmp_path / name)} for name in ("one", "two", "resumed"))
    one["per_device_train_batch_size"] = resumed["per_device_train_batch_size"] = 4
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "{config}"]
    job = json.dumps([two]).replace("{", "{{").replace("}", "}}")
    together = machines(tmp_path, *launcher, "-m", "tests.distributed.run_training", job)
    alone = start([one], tmp_path / "log-of-one")
    assert [machine.wait(SECONDS) for machine in together] == [0, 0], (tmp_path / "log-0").read_text()
    alone.join(SECONDS)
    resumed["resume"] = str(tmp_path / "two" / "checkpoint-2")
    again = start([resumed], tmp_path / "log-of-one")
    again.join(SECONDS)
    assert alone.exitcode == again.exitcode == 0, (tmp_path / "log-of-one").read_text()
    expected_logs, expected = read_result(tmp_path / "one")
    for name in ("two", "resumed"):
        logs, weights = read_result(tmp_path / name)
        assert len(logs) == len(expected_logs) == 3
        for key in ("loss", "selector/grad_norm", "generator/grad_norm"):
            assert difference(*([row[key] for row in rows] for rows in (logs, expected_logs))) < TOLERANCE, key
        assert max(difference(weights[key].tolist(), expected[key].tolist()) for key in expected) < TOLERANCE


@pytest.mark.slow
def test_a_lost_machine_ends_the_other_within_a_minute_and_with_one_line(tmp_path):
    questions, corpus = tmp_path / "questions.jsonl", tmp_path / "corpus.jsonl"
    records = [{"question": f"who is number {n}", "answers": [f"N{n}"]} for n in range(8)]
    questions.write_text("".join(json.dumps(record) + "\n" for record in records))
    passages = [{"id": str(n), "text": f"number {n} is N{n}"} for n in range(8)]
    corpus.write_text("".join(json.dumps(passage) + "\n" for passage in passages))
    settings = {"questions": questions, "corpus": corpus, "output_dir": tmp_path / "run", "max_steps": 10_000}
    settings |= {"max_candidates": 4, "num_selected": 2, "num_permutations": 2, "logging_steps": 1}
    flags = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    flags += ["--per_device_train_batch_size", "2", "--use_cpu", "--bf16", "false", "--report_to", "none"]
    command = ["-c", "from trl_dro.commands.cli import main; main()", "train", "--accelerate_config", "{config}"]
    first, second = machines(tmp_path, *command, *flags)
    try:
        end = time.monotonic() + SECONDS
        while (text := (tmp_path / "log-0").read_text()).count("update ") < 3:
            assert first.poll() is None and time.monotonic() < end, text
            time.sleep(0.05)
        lose(second)
        assert first.wait(60) == 1
    finally:
        for machine in (first, second):
            if machine.poll() is None:
                lose(machine)
    text = (tmp_path / "log-0").read_text()
    [line] = re.findall(r"^.*another process is gone.*$", text, re.MULTILINE)
    assert line.startswith("trl-dro train: ") and "--resume_from_checkpoint true" in line
    assert "Traceback" not in text, text
