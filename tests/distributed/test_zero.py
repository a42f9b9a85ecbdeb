# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Two processes under DeepSpeed's ZeRO, stages 1 to 3, compute what one does without it, and leave behind what it
leaves: roles for plain peft and transformers, and checkpoints to go on from, bit for bit."""

import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from trl_dro.trainer.checkpoint import find_checkpoints, find_damage

from ..tiny_models import bpe_tokenizer, tiny_llama
from .run_training import read_result, start
from .test_data_parallel import dealt, difference
from .test_resume import assert_same_training
from .test_sharding import SECONDS, SETTINGS, TOLERANCE, UNUSABLE, job, launch, train_killed_and_not


pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install -c constraints.txt -e '.[deepspeed]'")

SHARED = ("adapters", "blocks in parts", "two full models", "query likelihoods", "two bases")
ZERO2 = {name: SETTINGS[name] for name in SHARED} | {
    "no clipping": {"max_grad_norm": 0.0, "learning_rate": 5e-4},
    # Nothing but what is left of an update can make the next one's gradients differ.
    "nothing learned": {"learning_rate": 0.0, "max_steps": 2},
    "questions unusable in one process": {"unusable": dealt(1)[:1]},
    # The third update comes after one that is left out, and momentum must not know of that.
    "a whole update unusable": {
        "unusable": dealt(0) + dealt(1),
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "gradient_checkpointing": True,
    },
}
ZERO1 = {name: ZERO2[name] for name in ("adapters", "two full models", "a whole update unusable")}
ZERO3 = {name: ZERO2[name] for name in (*SHARED, "nothing learned")}
STAGES = {"zero2": ZERO2, "zero1": ZERO1, "zero3": ZERO3}
RUNS = [(stage, name) for stage, settings in STAGES.items() for name in settings]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Folder with the results of one process, in `one`, and of two under each stage, by setting."""
    folder = tmp_path_factory.mktemp("zero")
    jobs = [job(settings, 4, folder / "one" / name) for name, settings in ZERO2.items()]
    alone = start(jobs, folder / "log-of-one")
    for stage, settings in STAGES.items():
        jobs = [job(settings[name], 2, folder / stage / name) for name in settings]
        again = {"resume": str(folder / stage / "adapters" / "checkpoint-2")}
        jobs.append(job(settings["adapters"], 2, folder / stage / "resumed") | again)
        if stage == "zero3":
            jobs.append(job(UNUSABLE, 2, folder / stage / "unusable"))
        launch(stage, jobs, folder / "log")
    alone.join(SECONDS)
    assert alone.exitcode == 0, (folder / "log-of-one").read_text()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage, name", RUNS)
def test_zero_logs_and_learns_what_one_process_does(results, stage, name):
    (expected_logs, expected), (logs, weights) = (read_result(results / each / name) for each in ("one", stage))
    assert len(logs) == len(expected_logs) == ZERO2[name].get("max_steps", 4) and weights.keys() == expected.keys()
    assert [row.keys() for row in logs] == [row.keys() for row in expected_logs]  # fewer of an update left out
    differences = {}
    for key in expected_logs[-1]:
        values = [[row[key] for row in rows if key in row] for rows in (logs, expected_logs)]
        differences[key] = difference(*values)
    differences["weights"] = max(difference(weights[key].tolist(), expected[key].tolist()) for key in expected)
    print(f"{stage}, {name}: " + ", ".join(f"{key} {value:.1e}" for key, value in differences.items()))
    assert max(differences.values()) < TOLERANCE, differences
    if name == "a whole update unusable":
        assert 0 < sum(row["skipped_update_share"] for row in logs) < 4


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_zero_resumes_bit_for_bit_from_whole_checkpoints(results, stage, tmp_path):
    checkpoints = find_checkpoints(results / stage / "adapters")
    assert [path.name for path in checkpoints] == ["checkpoint-4", "checkpoint-2"]
    assert [find_damage(path) for path in checkpoints] == [None, None]
    runs = [read_result(results / stage / name) for name in ("resumed", "adapters")]
    (logs, weights), (expected_logs, expected) = runs
    assert [row["loss"] for row in logs] == [row["loss"] for row in expected_logs]
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    [part, _] = sorted((checkpoints[0] / "global_step4").glob("*optim_states.pt"))
    damaged = tmp_path / "checkpoint-4"
    shutil.copytree(checkpoints[0], damaged)
    (damaged / "global_step4" / part.name).write_bytes(part.read_bytes()[:-100])
    assert find_damage(damaged) == f"global_step4/{part.name} is damaged"
    for path in (damaged / "global_step4").glob("*optim_states.pt"):
        path.unlink()
    assert find_damage(damaged) == "global_step4 has no optimizer states"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_killed_zero_run_ends_with_the_weights_of_an_uninterrupted_one(stage, tmp_path):
    assert_same_training(*train_killed_and_not(stage, tmp_path))


@pytest.mark.slow
def test_zero_puts_back_the_best_weights(results):
    for stage in ("one", "zero2", "zero3"):
        run = results / stage / "two bases"
        last = find_checkpoints(run)[0]
        saved = (last / "generator" / "adapter_model.safetensors").read_bytes()
        assert (run / "generator" / "adapter_model.safetensors").read_bytes() != saved  # the best are not the last


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
@pytest.mark.parametrize("role", ["selector", "generator"])
def test_roles_that_zero_saves_are_whole_for_peft_and_transformers(results, role, stage):
    run = results / stage
    base = tiny_llama(bpe_tokenizer(split_digits=False))
    adapted = PeftModel.from_pretrained(base, run / "adapters" / role)
    _, expected = read_result(run / "adapters")
    loaded = {name.replace(".default.", f".{role}."): p for name, p in adapted.named_parameters() if "lora_" in name}
    assert len(loaded) * 2 == len(expected)
    assert all(torch.equal(weight, expected[f"{role}.{name}"]) for name, weight in loaded.items())
    full = AutoModelForCausalLM.from_pretrained(run / "two full models" / role)
    _, expected = read_result(run / "two full models")
    assert all(torch.equal(p, expected[f"{role}.{role}.{name}"]) for name, p in full.named_parameters())


@pytest.mark.slow
def test_zero3_leaves_out_an_update_with_an_unusable_question_in_all_processes(results):
    ranks = [read_result(results / "zero3" / "unusable", rank) for rank in (0, 1)]
    # Eight questions are two updates, one of which has the question; nothing of it is left for the next one.
    assert sum(row["skipped_update_share"] for row in ranks[0][0]) == 2
    assert all(weight.isfinite().all() for weight in ranks[0][1].values())
    assert all(torch.equal(ranks[0][1][name], ranks[1][1][name]) for name in ranks[0][1])
