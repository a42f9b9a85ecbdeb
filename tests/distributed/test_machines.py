# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Two machines, each a launcher of its own on loopback, train as one process does; when one of them or one of their
processes is lost all others end."""

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


def lose(machine):
    """Kills a launcher and what it started, the launcher first, which so tells nobody."""
    launcher = psutil.Process(machine.pid)
    for process in [launcher, *launcher.children(recursive=True)]:
        process.kill()


@pytest.fixture
def machines(tmp_path):
    """Starts a command in as many processes on each of two machines, with the output of each in a file of its own."""
    started = []

    def start_both(num_processes, *command):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        recipe = (ROOT / "recipes/accelerate/two_cpu_processes.yaml").read_text().replace("num_machines: 1", "")
        alone = recipe.replace("num_processes: 2", f"num_processes: {2 * num_processes}")
        for rank in (0, 1):
            config = tmp_path / f"machine-{rank}.yaml"
            address = f"main_process_ip: 127.0.0.1\nmain_process_port: {port}\n"
            config.write_text(f"{alone}num_machines: 2\nmachine_rank: {rank}\n{address}")
            with (tmp_path / f"log-{rank}").open("a") as log:
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

    yield start_both
    for machine in started:
        if machine.poll() is None:
            lose(machine)


@pytest.mark.slow
def test_two_machines_train_as_one_process_and_one_resumes_what_they_saved(tmp_path, machines):
    settings = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    one, four, resumed = (settings | {"output_dir": str(tmp_path / name)} for name in ("one", "four", "resumed"))
    one["per_device_train_batch_size"] = resumed["per_device_train_batch_size"] = 4
    four["per_device_train_batch_size"] = 1
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "{config}"]
    job = json.dumps([four]).replace("{", "{{").replace("}", "}}")
    together = machines(2, *launcher, "-m", "tests.distributed.run_training", job)
    alone = start([one], tmp_path / "log-of-one")
    assert [machine.wait(SECONDS) for machine in together] == [0, 0], (tmp_path / "log-0").read_text()
    alone.join(SECONDS)
    resumed["resume"] = str(tmp_path / "four" / "checkpoint-2")
    again = start([resumed], tmp_path / "log-of-one")
    again.join(SECONDS)
    assert alone.exitcode == again.exitcode == 0, (tmp_path / "log-of-one").read_text()
    expected_logs, expected = read_result(tmp_path / "one")
    for name in ("four", "resumed"):
        logs, weights = read_result(tmp_path / name)
        assert len(logs) == len(expected_logs) == 3
        differences = {}
        for key in ("loss", "selector/grad_norm", "generator/grad_norm"):
            differences[key] = difference(*([row[key] for row in rows] for rows in (logs, expected_logs)))
        differences["weights"] = max(difference(weights[key].tolist(), expected[key].tolist()) for key in expected)
        print(f"{name}: " + ", ".join(f"{key} {value:.1e}" for key, value in differences.items()))
        assert max(differences.values()) < TOLERANCE, differences


@pytest.fixture
def training(tmp_path):
    """Command that trains without end."""
    questions, corpus = tmp_path / "questions.jsonl", tmp_path / "corpus.jsonl"
    records = [{"question": f"who is number {n}", "answers": [f"N{n}"]} for n in range(8)]
    questions.write_text("".join(json.dumps(record) + "\n" for record in records))
    passages = [{"id": str(n), "text": f"number {n} is N{n}"} for n in range(8)]
    corpus.write_text("".join(json.dumps(passage) + "\n" for passage in passages))
    settings = {"questions": questions, "corpus": corpus, "output_dir": tmp_path / "run", "max_steps": 10_000}
    settings |= {"max_candidates": 4, "num_selected": 2, "num_permutations": 2, "logging_steps": 1}
    flags = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    flags += ["--per_device_train_batch_size", "2", "--use_cpu", "--bf16", "false", "--report_to", "none"]
    program = "from trl_dro.commands.cli import main; main()"
    return ["-c", program, "train", "--accelerate_config", "{config}", *flags]


def wait_for_updates(started, log):
    end = time.monotonic() + SECONDS
    while (text := log.read_text()).count("update ") < 3:
        assert all(machine.poll() is None for machine in started) and time.monotonic() < end, text
        time.sleep(0.05)


def exit_codes(started):
    """Exit codes of machines, which have a minute to end."""
    end = time.monotonic() + 60
    codes = [machine.wait(end - time.monotonic()) for machine in started]
    print(f"ended after {60 - (end - time.monotonic()):.1f} s")
    return codes


def count_lines(log):
    """How many processes told of the loss, each in one line that names the cure; maybe behind a progress bar."""
    text = log.read_text()
    assert "Traceback" not in text, text
    line = r"trl-dro train: another process is gone, .*--resume_from_checkpoint true$"
    return len(re.findall(line, text, re.MULTILINE))


@pytest.mark.slow
def test_a_lost_machine_ends_the_other_within_a_minute_and_with_one_line(tmp_path, machines, training):
    first, second = machines(1, *training)
    wait_for_updates([first, second], tmp_path / "log-0")
    lose(second)
    assert exit_codes([first]) == [1]
    assert count_lines(tmp_path / "log-0") == 1


@pytest.mark.slow
def test_a_lost_process_ends_those_of_both_machines_within_a_minute_each_with_one_line(tmp_path, machines, training):
    started = machines(2, *training)
    wait_for_updates(started, tmp_path / "log-0")
    children = psutil.Process(started[1].pid).children(recursive=True)
    ranks = {int(child.environ()["RANK"]): child for child in children if "RANK" in child.environ()}
    ranks[3].kill()
    assert exit_codes(started) == [1, 1]
    assert not psutil.wait_procs(children, timeout=1)[1]
    assert count_lines(tmp_path / "log-0") == 2
    # Its launcher may end the neighbour of the lost one before that has noticed.
    assert count_lines(tmp_path / "log-1") <= 1
