# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Two processes compute what one does on the same global batch of four questions."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from trl_dro.trainer.checkpoint import find_checkpoints, find_damage
from trl_dro.trainer.schedule import EstimationSampler

from .run_training import read_result, start


ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120  # until a process is given up
TOLERANCE = 5e-5  # float32 sums over batches of other widths, after all updates


def dealt(rank, num_questions=8):
    """Rows of the first micro-batch that one of two processes gets."""
    [first] = next(iter(EstimationSampler(num_questions, batch_size=2, seed=42, rank=rank, world_size=2)))
    return first.block[0].rows


# The optimizer is SGD, because Adam's quotient makes differences of 1e-8 in gradients near zero large in the weights.
SETTINGS = {
    "plain": {},
    "accumulation and checkpointing": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    "frozen selector": {"train_selector": False},
    "frozen generator": {"train_generator": False},
    "E-step per 4 updates": {
        "steps_per_estimation": 4,
        "num_questions": 16,
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 2,
    },
    "Algorithm 1": {"steps_per_estimation": -1, "maximization_epochs": 2, "max_steps": 8},
    "vimco": {"selector_estimator": "vimco"},
    "uneven last batch": {"num_questions": 7},
    "last batch of one question": {"num_questions": 5, "gradient_accumulation_steps": 2},
    "all questions of a process unusable": {"unusable": dealt(1)},
    "all questions of the other process unusable": {"unusable": dealt(0), "gradient_checkpointing": True},
    "unusable with a frozen selector": {"unusable": dealt(1), "train_selector": False},
    "unusable with accumulation": {"unusable": dealt(1), "gradient_accumulation_steps": 2},
    "a whole update unusable": {"unusable": dealt(0) + dealt(1)},
    "own scores": {"num_eval": 7, "max_answer_length": 8},
    "query likelihoods": {
        "selector_form": "query_likelihood",
        "gradient_accumulation_steps": 2,
        "retriever_prior": 1.0,
        "selector_fit_questions": 5,
    },
    "fitted, frozen selector": {
        "selector_form": "query_likelihood",
        "retriever_prior": 1.0,
        "selector_fit_questions": 5,
        "train_selector": False,
    },
    "no clipping": {"max_grad_norm": 0.0, "learning_rate": 5e-4},
    "two full models, checkpointing and accumulation": {
        "peft": False,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
    },
    "adamw": {"optim": "adamw_torch", "learning_rate": 1e-3},
}


def job(name, batch_size, folder):
    defaults = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 4}
    return defaults | SETTINGS[name] | {"per_device_train_batch_size": batch_size, "output_dir": str(folder / name)}


def launch(jobs, log):
    """Starts two gloo processes."""
    with log.open("a") as file:
        return subprocess.Popen(
            [sys.executable, "-u", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
            + ["tests.distributed.run_training", json.dumps(jobs)],
            cwd=ROOT,
            stdout=file,
            stderr=file,
        )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Folders with the results of one and of two processes, by setting."""
    folder = tmp_path_factory.mktemp("data_parallel")
    one, two, log = folder / "one", folder / "two", folder / "log"
    alone = start([job(name, 4, one) for name in SETTINGS], folder / "log-of-one")
    together = launch([job(name, 2, two) for name in SETTINGS], log)
    code = together.wait(SECONDS)
    alone.join(SECONDS)
    assert alone.exitcode == 0, (folder / "log-of-one").read_text()
    assert code == 0, log.read_text()
    return one, two


def difference(actual, expected):
    """Largest difference of two trajectories, relative to the largest value."""
    actual, expected = (torch.tensor(values, dtype=torch.float64) for values in (actual, expected))
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-8)).item()


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_log_and_learn_what_one_does(results, name):
    (expected_logs, expected), (logs, weights), (_, other) = (
        read_result(results[0] / name),
        read_result(results[1] / name, rank=0),
        read_result(results[1] / name, rank=1),
    )
    assert all(torch.equal(weights[key], other[key]) for key in weights)
    assert len(logs) == len(expected_logs) == job(name, 2, results[1])["max_steps"]
    differences = {}
    for key in expected_logs[-1]:
        assert [key in row for row in logs] == [key in row for row in expected_logs], key
        pairs = [(row[key], right[key]) for row, right in zip(logs, expected_logs, strict=True) if key in right]
        differences[key] = difference(*zip(*pairs, strict=True))
    largest = max(difference(weights[key].tolist(), expected[key].tolist()) for key in expected)
    print(f"{name}: weights {largest:.1e}, " + ", ".join(f"{key} {value:.1e}" for key, value in differences.items()))
    assert max(differences.values()) < TOLERANCE, differences
    assert largest < TOLERANCE


@pytest.mark.slow
def test_two_processes_score_by_compute_metrics_what_one_does(results):
    scored = []
    for folder, rank in ((results[0], 0), (results[1], 0), (results[1], 1)):
        path = folder / "own scores" / f"result-{rank}" / "logs.json"
        scored.append([row for row in json.loads(path.read_text()) if "eval_em" in row])
    alone, *together = [(row["eval_questions"], row["eval_key"]) for [row] in scored]
    assert together == [alone, alone] and alone[0] == 7


@pytest.mark.slow
def test_unusable_questions_are_where_the_test_wants_them(results):
    shares = {name: read_result(results[1] / name)[0][0]["masked_question_share"] for name in SETTINGS}
    skipped = {name: read_result(results[1] / name)[0][0]["skipped_update_share"] for name in SETTINGS}
    assert shares["plain"] == 0 and shares["all questions of a process unusable"] == 0.5
    assert shares["a whole update unusable"] == 1
    assert {name for name in SETTINGS if skipped[name]} == {"a whole update unusable"}


@pytest.mark.slow
def test_signal_to_one_process_stops_both_with_a_checkpoint_from_which_both_resume(tmp_path, results):
    log = tmp_path / "log"
    settings = job("E-step per 4 updates", 2, tmp_path) | {"save_strategy": "steps", "save_steps": 1000}
    together = launch([settings | {"pause": 0.3}], log)
    end = time.monotonic() + SECONDS
    while log.read_text().count(": loss ") < 2:
        assert together.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.01)
    [pid] = re.findall(r"process (\d+) is rank 1", log.read_text())
    os.kill(int(pid), signal.SIGTERM)
    assert together.wait(SECONDS) != 0
    text = log.read_text()
    [step] = re.findall(r"Stopped by SIGTERM after update (\d+)\.", text)
    output_dir = settings["output_dir"]
    [checkpoint] = find_checkpoints(output_dir)
    assert checkpoint.name == f"checkpoint-{step}" and int(step) < 8 and find_damage(checkpoint) is None
    assert {path.name for path in checkpoint.glob("*_[01].pt*")} >= {"estimates_0.pt", "estimates_1.pt"}
    # A second run goes on from the middle of a block that one process has estimated.
    other = {"output_dir": str(tmp_path / "other"), "resume": str(results[0] / "E-step per 4 updates/checkpoint-2")}
    jobs = [settings | {"resume": True}, settings | other]
    assert launch(jobs, log).wait(SECONDS) == 0, log.read_text()
    weights, expected = (read_result(folder)[1] for folder in (output_dir, results[1] / "E-step per 4 updates"))
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    ranks = [read_result(other["output_dir"], rank)[1] for rank in (0, 1)]
    assert all(torch.equal(ranks[0][key], ranks[1][key]) for key in ranks[0])
