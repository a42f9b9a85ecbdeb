# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""A run that is stopped at any moment, by any signal, and resumed ends with the weights of one that never was."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from trl_dro.trainer.checkpoint import find_checkpoints, find_damage

from .run_training import read_result, start


ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120  # until a process is given up
SETTINGS = {
    "defaults": {},
    "E-step per 4 updates": {"steps_per_estimation": 4},
    "E-step per epoch, visited twice": {"steps_per_estimation": -1, "maximization_epochs": 2},
    "accumulation": {"gradient_accumulation_steps": 2},
    "accumulation in a block": {"gradient_accumulation_steps": 2, "steps_per_estimation": 3},
    "checkpointing": {"gradient_checkpointing": True},
    "frozen selector": {"train_selector": False},
    "frozen generator": {"train_generator": False},
    "random answers, tempered": {"answer_target": "random", "temperature": 1.3, "top_p": 0.9},
    "adamw": {"optim": "adamw_torch", "weight_decay": 0.1, "selector_learning_rate": 1e-3},
    "another order of the data": {"data_seed": 7, "num_questions": 7},
}


def finish(process):
    process.join(SECONDS)
    assert process.exitcode is not None, "the process did not end"
    return process.exitcode


def wait_for(condition, process=None):
    """Waits until `condition` gives something, or the process has ended."""
    end = time.monotonic() + SECONDS
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        if process is not None and not process.is_alive():
            return condition()
        time.sleep(0.001)
    return value


def assert_same_training(output_dir, reference):
    (logs, weights), (expected_logs, expected_weights) = read_result(output_dir), read_result(reference)
    assert [row["loss"] for row in logs] == [row["loss"] for row in expected_logs]
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)


def leftovers(output_dir):
    return [path.name for path in Path(output_dir).glob("*") if path.name.startswith("_checkpoint")]


@pytest.mark.parametrize("name", SETTINGS)
def test_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, name):
    num_updates = {"another order of the data": 10}.get(name, 6)
    settings = SETTINGS[name] | {"max_steps": num_updates, "save_strategy": "steps", "save_steps": num_updates // 2}
    whole, halves = str(tmp_path / "whole"), str(tmp_path / "halves")
    assert finish(start([settings | {"output_dir": whole}], tmp_path / "log")) == 0
    checkpoint = f"{whole}/checkpoint-{num_updates // 2}"
    job = settings | {"output_dir": halves, "resume": checkpoint}
    assert finish(start([job], tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    assert_same_training(halves, whole)
    mid_block = settings.get("steps_per_estimation", 1) != 1
    assert (Path(checkpoint) / "estimates_0.pt").is_file() == mid_block


def test_run_resumes_in_mid_block_with_another_batch_size(tmp_path):
    settings = {"num_questions": 16, "max_steps": 6}
    first = {
        "output_dir": str(tmp_path / "first"),
        "steps_per_estimation": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    second = {"output_dir": str(tmp_path / "second"), "resume": str(tmp_path / "first" / "checkpoint-2")}
    halved = {"steps_per_estimation": 8, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    assert finish(start([settings | first, settings | second | halved], tmp_path / "log")) == 0, (
        tmp_path / "log"
    ).read_text()
    logs, weights = read_result(tmp_path / "second")
    assert len(logs) == 6 and all(weight.isfinite().all() for weight in weights.values())


KILLED = {"max_steps": 24, "steps_per_estimation": 3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}


def newest(output_dir):
    return max((int(path.name.split("-")[1]) for path in find_checkpoints(output_dir)), default=0)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Output folder of a run with the settings `KILLED` that was left alone."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert finish(start([KILLED | {"output_dir": str(folder / "run")}], folder / "log")) == 0
    return folder / "run"


@pytest.mark.slow
def test_run_killed_at_six_random_moments_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, uninterrupted):
    draw = random.Random(0)
    output_dir, log = tmp_path / "run", tmp_path / "log"
    reached = []
    for kill in range(6):
        first = newest(output_dir)
        process = start([KILLED | {"output_dir": str(output_dir), "resume": first > 0}], log)
        target = first + (draw.randint(0, 3) if kill else 0)
        wait_for(lambda target=target: newest(output_dir) >= target, process)
        if kill % 3:  # while a checkpoint is written
            wait_for(lambda: list(output_dir.glob("_checkpoint-*.partial")), process)
            time.sleep(draw.uniform(0, 0.015))
        else:
            time.sleep(draw.uniform(0, 0.1 if target > first else 1.0))
        process.kill()
        assert finish(process) == -signal.SIGKILL, log.read_text()
        reached.append((newest(output_dir), leftovers(output_dir)))
    print(f"newest checkpoint and leftovers at each kill: {reached}")
    assert any(names for _, names in reached)  # at least one kill met a checkpoint half written
    process = start([KILLED | {"output_dir": str(output_dir), "resume": newest(output_dir) > 0}], log)
    assert finish(process) == 0, log.read_text()
    assert_same_training(output_dir, uninterrupted)
    assert not leftovers(output_dir)
    assert len(find_checkpoints(output_dir)) == 2


class Interpreter:
    """A run in a new interpreter, as a user starts it."""

    def __init__(self, job, log):
        self.log = log
        with log.open("a") as file:
            self.popen = subprocess.Popen(
                [sys.executable, "-u", "-m", "tests.distributed.run_training", json.dumps([job])],
                cwd=ROOT,
                stdout=file,
                stderr=file,
            )
        self.pid = self.popen.pid

    def is_alive(self):
        return self.popen.poll() is None

    def join(self, timeout):
        self.popen.wait(timeout)

    @property
    def exitcode(self):
        return self.popen.poll()


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, begin",
    [(signal.SIGTERM, Interpreter), (signal.SIGTERM, None), (signal.SIGINT, None)],
    ids=["SIGTERM to an interpreter, resumed by another", "SIGTERM", "SIGINT"],
)
def test_signal_saves_a_checkpoint_exits_with_one_line_and_the_run_resumes(tmp_path, uninterrupted, number, begin):
    output_dir, log = tmp_path / "run", tmp_path / "log"
    settings = KILLED | {"output_dir": str(output_dir), "save_steps": 1000}
    begin = begin or (lambda job, log: start([job], log))
    process = begin(settings, log)
    wait_for(lambda: log.exists() and log.read_text().count(": loss ") >= 4, process)
    os.kill(process.pid, number)
    assert finish(process) == 128 + number, log.read_text()
    text = log.read_text()
    [(name, step)] = re.findall(r"Stopped by (\w+) after update (\d+)\. The checkpoint is in", text)
    assert name == number.name and "Traceback" not in text
    assert text.count(": loss ") == int(step) < KILLED["max_steps"]
    [checkpoint] = find_checkpoints(output_dir)
    assert checkpoint.name == f"checkpoint-{step}" and find_damage(checkpoint) is None
    assert finish(begin(settings | {"resume": True}, log)) == 0, log.read_text()
    assert_same_training(output_dir, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_exits_at_once(tmp_path, number):
    log = tmp_path / "log"
    process = start([{"output_dir": str(tmp_path / "run"), "pause": SECONDS}], log)
    wait_for(lambda: log.exists() and "update 1 begins" in log.read_text(), process)
    os.kill(process.pid, number)
    wait_for(lambda: "; again to exit at once" in log.read_text(), process)
    time.sleep(1.1)  # sooner it would count as the same request, passed on by a launcher
    os.kill(process.pid, number)
    assert finish(process) == -number
    assert not find_checkpoints(tmp_path / "run")
