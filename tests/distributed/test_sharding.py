# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Two processes that hold half of every weight each compute what one does that holds all, and leave behind what one
leaves: roles for plain peft and transformers, and checkpoints to go on from, bit for bit."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from trl_dro.trainer.checkpoint import find_checkpoints, find_damage

from ..tiny_models import bpe_tokenizer, tiny_llama
from .run_training import ENGINES, read_result, start
from .test_data_parallel import dealt, difference
from .test_machines import lose
from .test_resume import assert_same_training, newest


ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300
TOLERANCE = 1e-5
SETTINGS = {
    # Unequal numbers of questions, and checkpoints with all states of AdamW.
    "adapters": {
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "num_questions": 7,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 2,
    },
    # Processes split their micro-batches into unequal numbers of parts.
    "blocks in parts": {"steps_per_estimation": 2, "maximization_epochs": 2, "max_tokens_per_forward": 150},
    "two full models": {"peft": False, "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    # Each role's weights in another module, and the exchange of gradients put off as under DDP: as exact, if the root
    # is the module of both.
    "deferred exchange": {"peft": False, "deferred": True, "gradient_accumulation_steps": 2},
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
    # Evaluated before it is trained, and the best weights put back in the end.
    "two bases": {
        "two_bases": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,  # the highest loss, so that the best weights are not the last
    },
}
UNUSABLE = {"unusable": dealt(1)[:1]}


def job(settings, batch_size, folder):
    defaults = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 4, "save": True}
    return defaults | settings | {"per_device_train_batch_size": batch_size, "output_dir": str(folder)}


def begin(engine, jobs, log):
    """Starts two gloo processes under an engine."""
    with log.open("a") as file:
        return subprocess.Popen(
            [sys.executable, "-u", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
            + ["tests.distributed.run_training", json.dumps(jobs)],
            cwd=ROOT,
            env=os.environ | ENGINES[engine],
            stdout=file,
            stderr=file,
        )


def launch(engine, jobs, log):
    """Runs two gloo processes under an engine."""
    assert begin(engine, jobs, log).wait(SECONDS) == 0, log.read_text()


def train_killed_and_not(engine, folder):
    """Output folders of a run that was killed while it wrote a checkpoint, and went on, and of one left alone."""
    settings = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 6}
    settings |= {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    killed, alone = (job(settings, 2, folder / name) for name in ("killed", "alone"))
    log = folder / "log"
    process, end = begin(engine, [killed], log), time.monotonic() + SECONDS
    while newest(folder / "killed") < 2 or not list((folder / "killed").glob("_checkpoint-*.partial")):
        assert process.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.001)
    lose(process)
    assert 2 <= newest(folder / "killed") < 6
    launch(engine, [killed | {"resume": True}, alone], log)
    return folder / "killed", folder / "alone"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Folders with the results of one and of two processes, by setting."""
    folder = tmp_path_factory.mktemp("sharding")
    one, two = folder / "one", folder / "two"
    alone = start([job(settings, 4, one / name) for name, settings in SETTINGS.items()], folder / "log-of-one")
    jobs = [job(settings, 2, two / name) for name, settings in (SETTINGS | {"unusable": UNUSABLE}).items()]
    again = job(SETTINGS["adapters"], 2, two / "resumed") | {"resume": str(two / "adapters/checkpoint-2")}
    launch("fsdp2", [*jobs, again], folder / "log")
    alone.join(SECONDS)
    assert alone.exitcode == 0, (folder / "log-of-one").read_text()
    return one, two


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_fsdp2_logs_and_learns_what_one_process_does(results, name):
    (expected_logs, expected), (logs, weights) = (read_result(folder / name) for folder in results)
    assert len(logs) == len(expected_logs) == 4 and weights.keys() == expected.keys()
    differences = {}
    for key in expected_logs[-1]:
        values = [[row[key] for row in rows] for rows in (logs, expected_logs)]
        differences[key] = difference(*values)
    differences["weights"] = max(difference(weights[key].tolist(), expected[key].tolist()) for key in expected)
    print(f"{name}: " + ", ".join(f"{key} {value:.1e}" for key, value in differences.items()))
    assert max(differences.values()) < TOLERANCE, differences


@pytest.mark.slow
def test_fsdp2_resumes_bit_for_bit(results):
    _, two = results
    checkpoints = find_checkpoints(two / "adapters")
    assert [path.name for path in checkpoints] == ["checkpoint-4", "checkpoint-2"]
    assert [find_damage(path) for path in checkpoints] == [None, None]
    (logs, weights), (expected_logs, expected) = read_result(two / "resumed"), read_result(two / "adapters")
    assert [row["loss"] for row in logs] == [row["loss"] for row in expected_logs]
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_a_killed_fsdp2_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path):
    assert_same_training(*train_killed_and_not("fsdp2", tmp_path))


@pytest.mark.slow
def test_fsdp2_puts_back_the_best_weights(results):
    best = []
    for folder in results:
        state = json.loads((find_checkpoints(folder / "two bases")[0] / "trainer_state.json").read_text())
        best.append(Path(state["best_model_checkpoint"]).name)
        rows = [row for row in state["log_history"] if row["step"] and "eval_em" in row]
        scores = {row["step"]: row["eval_loss"] for row in rows}
        assert best[-1] == f"checkpoint-{max(scores, key=scores.get)}" != "checkpoint-4"
        saved, final = (folder / "two bases" / best[-1] / "generator", folder / "two bases" / "generator")
        assert (saved / "adapter_model.safetensors").read_bytes() == (final / "adapter_model.safetensors").read_bytes()
    assert best[0] == best[1]


@pytest.mark.slow
@pytest.mark.parametrize("role", ["selector", "generator"])
def test_roles_that_fsdp2_saves_are_whole_for_peft_and_transformers(results, role):
    _, two = results
    base = tiny_llama(bpe_tokenizer(split_digits=False))
    adapted = PeftModel.from_pretrained(base, two / "adapters" / role)
    _, expected = read_result(two / "adapters")
    loaded = {name.replace(".default.", f".{role}."): p for name, p in adapted.named_parameters() if "lora_" in name}
    assert len(loaded) * 2 == len(expected)
    assert all(torch.equal(weight, expected[f"{role}.{name}"]) for name, weight in loaded.items())
    # A base that was made in memory is saved beside them.
    saved_base = AutoModelForCausalLM.from_pretrained(two / "adapters/base").state_dict()
    fresh = tiny_llama(bpe_tokenizer(split_digits=False)).state_dict()
    assert all(torch.equal(saved_base[name], weight) for name, weight in fresh.items())
    full = AutoModelForCausalLM.from_pretrained(two / "two full models" / role)
    _, expected = read_result(two / "two full models")
    assert all(torch.equal(p, expected[f"{role}.{role}.{name}"]) for name, p in full.named_parameters())


@pytest.mark.slow
def test_fsdp2_leaves_out_an_update_with_an_unusable_question_in_all_processes(results):
    _, two = results
    ranks = [read_result(two / "unusable", rank) for rank in (0, 1)]
    # Eight questions are two updates, one of which has the question.
    assert sum(row["skipped_update_share"] for row in ranks[0][0]) == 2
    assert all(weight.isfinite().all() for weight in ranks[0][1].values())
    assert all(torch.equal(ranks[0][1][name], ranks[1][1][name]) for name in ranks[0][1])
