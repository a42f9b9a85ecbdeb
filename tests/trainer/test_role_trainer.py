# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Optimization and checkpoints of two roles, whatever their losses."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from trl_dro import DROConfig
from trl_dro.model.roles import ROLES
from trl_dro.trainer import run
from trl_dro.trainer.checkpoint import find_damage

from ..test_faults import LOGS, history, make_trainer, weights_of
from .test_dro_trainer import make_dataset


def checkpoints_in(folder):
    return sorted({path.name for path in folder.iterdir()} - LOGS)


SAVE = {"save_strategy": "steps", "save_steps": 1}


# Forward and backward


@pytest.mark.parametrize("training", [True, False])
def test_inference_leaves_the_mode_as_it_was_even_after_an_error(tmp_path, training):
    trainer = make_trainer(tmp_path)
    trainer.model.train(training)
    with trainer._inference():
        assert not trainer.model.training and not torch.is_grad_enabled()
    with pytest.raises(KeyError), trainer._inference(gradients=True):
        assert not trainer.model.training and torch.is_grad_enabled()
        raise KeyError
    assert trainer.model.training == training


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(DROConfig, "n_gpu", 2)
    with pytest.raises(ValueError, match="accelerate launch"):
        make_trainer(tmp_path)


# Optimization


def test_each_role_moves_by_its_own_learning_rate(tmp_path):
    trainer = make_trainer(
        tmp_path,
        selector_learning_rate=1e-4,
        generator_learning_rate=1e-2,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        max_steps=1,
    )
    before = weights_of(trainer)
    trainer.train()
    for role, rate in (("selector", 1e-4), ("generator", 1e-2)):
        moves = torch.cat([(p - before[n]).abs().flatten() for n, p in trainer.roles.named_parameters(role)])
        # AdamW's first step is the learning rate, wherever the gradient is not tiny.
        assert moves.max() <= 1.01 * rate and moves.median() > 0.9 * rate
    assert len(trainer.optimizer.param_groups) == 2  # adapters have neither biases nor norms


def test_a_role_without_a_rate_of_its_own_takes_the_common_one_and_a_frozen_one_none(tmp_path):
    trainer = make_trainer(tmp_path, generator_learning_rate=5e-3, train_selector=False)
    assert {group["lr"] for group in trainer.create_optimizer().param_groups} == {5e-3}
    in_optimizer = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert in_optimizer == {id(p) for _, p in trainer.roles.named_parameters("generator")}
    trainer = make_trainer(tmp_path, generator_learning_rate=5e-3)
    assert {group["lr"] for group in trainer.create_optimizer().param_groups} == {1e-2, 5e-3}


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-3])
def test_gradient_norms_of_both_roles_are_logged_as_they_were_before_clipping(tmp_path, max_grad_norm):
    trainer = make_trainer(tmp_path, max_grad_norm=max_grad_norm, max_steps=2)
    trainer.train()
    for logs in trainer.state.log_history[:2]:
        norms = [logs[f"{role}/grad_norm"] for role in ROLES]
        assert min(norms) > 1e-2
        assert logs["grad_norm"] == pytest.approx((norms[0] ** 2 + norms[1] ** 2) ** 0.5, rel=1e-4)


def losses_and_weights(folder, **settings):
    trainer = make_trainer(folder, **settings)
    trainer.train()
    losses = [history(trainer, name) for name in ("loss", "selector/loss", "generator/loss", "grad_norm", "ess")]
    return losses, torch.cat([weight.flatten() for weight in weights_of(trainer).values()])


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2, "steps_per_estimation": 2}])
def test_the_same_seed_gives_the_same_losses_to_the_last_bit_and_another_does_not(tmp_path, settings):
    settings = {"max_steps": 3} | settings
    first, second = (losses_and_weights(tmp_path, **settings) for _ in range(2))
    assert first[0] == second[0] and torch.equal(first[1], second[1])
    other = losses_and_weights(tmp_path, seed=7, **settings)
    assert all(a != b for a, b in zip(first[0], other[0], strict=True)) and not torch.equal(first[1], other[1])


def test_the_seed_of_the_data_changes_the_order_of_the_questions_alone(tmp_path):
    orders = []
    for settings in ({}, {"data_seed": 42}, {"data_seed": 3}):
        trainer = make_trainer(tmp_path, **settings)
        orders.append([batch.block[batch.position].rows for batch in trainer.get_train_dataloader()])
    assert orders[0] == orders[1] != orders[2]  # 42 is the default of `seed`


@pytest.fixture
def restored_determinism():
    environment = dict(os.environ)
    yield
    torch.use_deterministic_algorithms(False)
    os.environ.clear()
    os.environ.update(environment)


def test_full_determinism_is_honoured_and_trains_alike_twice(tmp_path, restored_determinism):
    runs = []
    for _ in range(2):
        trainer = make_trainer(tmp_path, full_determinism=True, max_steps=2)
        assert torch.are_deterministic_algorithms_enabled()
        trainer.train()
        runs.append(weights_of(trainer))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


# Checkpoints


def test_a_checkpoint_has_both_roles_and_all_that_a_run_needs_to_go_on(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, **SAVE)
    trainer.train()
    assert checkpoints_in(tmp_path) == ["checkpoint-1"]
    names = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    state = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"}
    assert state | {"selector", "generator", "tokenizer.json"} <= names
    assert not {name for name in names if name.startswith("estimates") or name.endswith(".bin")} - {
        "training_args.bin"
    }
    for role in ROLES:
        files = {path.name for path in (tmp_path / "checkpoint-1" / role).iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files
    assert find_damage(tmp_path / "checkpoint-1") is None


@pytest.mark.parametrize("settings", [{"steps_per_estimation": 2}, {"maximization_epochs": 2}])
def test_a_checkpoint_holds_the_estimates_that_are_still_in_use(tmp_path, settings):
    make_trainer(tmp_path, max_steps=1, **SAVE, **settings).train()
    assert (tmp_path / "checkpoint-1" / "estimates_0.pt").is_file()


def test_saving_leaves_weights_and_training_as_they_are(tmp_path):
    plain = losses_and_weights(tmp_path / "plain", max_steps=3)
    saving = losses_and_weights(tmp_path / "saving", max_steps=3, **SAVE)
    assert plain[0] == saving[0] and torch.equal(plain[1], saving[1])


def test_saved_weights_are_those_of_the_model(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, **SAVE)
    trainer.train()
    for role in ROLES:
        saved = load_file(tmp_path / "checkpoint-2" / role / "adapter_model.safetensors")
        parameters = {name.replace(f".{role}.", "."): p for name, p in trainer.roles.named_parameters(role)}
        assert saved.keys() == parameters.keys()
        assert all(torch.equal(saved[name], parameters[name]) for name in saved)


def test_old_checkpoints_go_only_after_the_new_one_is_in_its_place(tmp_path):
    trainer = make_trainer(tmp_path, save_total_limit=2, **SAVE)
    seen = []
    save = trainer._save

    def watched(*args, **kwargs):
        save(*args, **kwargs)
        seen.append([name for name in checkpoints_in(tmp_path) if not name.startswith("_")])

    trainer._save = watched
    trainer.train()
    assert checkpoints_in(tmp_path) == ["checkpoint-3", "checkpoint-4"]
    assert seen == [[], ["checkpoint-1"], ["checkpoint-1", "checkpoint-2"], ["checkpoint-2", "checkpoint-3"]]


def test_the_best_checkpoint_is_kept_and_called_by_its_final_name(tmp_path):
    trainer = make_trainer(
        tmp_path,
        eval_dataset=make_dataset(2),
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="em",  # stays zero, so the first evaluation is the best
        greater_is_better=True,
        **SAVE,
    )
    trainer.train()
    best = str(tmp_path / "checkpoint-1")
    assert checkpoints_in(tmp_path) == ["checkpoint-1", "checkpoint-4"]
    assert trainer.state.best_model_checkpoint == best
    for step in (1, 4):
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == best
        assert ".partial" not in json.dumps(state)
    saved = load_file(tmp_path / "checkpoint-1" / "selector" / "adapter_model.safetensors")
    weights = {name.replace(".selector.", "."): p for name, p in trainer.roles.named_parameters("selector")}
    assert all(torch.equal(saved[name], weights[name]) for name in saved)


class Terminate(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_is_stopped_keeps_its_last_checkpoint_though_only_the_best_was_asked_for(tmp_path):
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "em",  # stays zero, so the first evaluation is the best
        "greater_is_better": True,
        "save_total_limit": 1,
    }
    trainer = make_trainer(tmp_path, eval_dataset=make_dataset(2), callbacks=[Terminate()], **settings, **SAVE)
    with pytest.raises(SystemExit):
        trainer.train()
    assert trainer.state.global_step == 3
    assert "checkpoint-3" in checkpoints_in(tmp_path)


def test_a_best_model_that_changes_is_followed(tmp_path):
    trainer = make_trainer(
        tmp_path,
        eval_dataset=make_dataset(2),
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="loss",  # falls with every update at first
        **SAVE,
    )
    trainer.train()
    losses = [logs["eval_loss"] for logs in trainer.state.log_history if "eval_loss" in logs]
    for step in range(1, 5):
        best = 1 + losses.index(min(losses[:step]))
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best}")
    assert losses.index(min(losses)) > 0


def test_a_checkpoint_of_the_model_only_holds_no_training_state(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, save_only_model=True, **SAVE)
    trainer.train()
    names = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    assert {"selector", "generator", "trainer_state.json"} <= names
    assert not names & {"optimizer.pt", "scheduler.pt", "rng_state.pth", "estimates_0.pt"}
    other = make_trainer(tmp_path)
    other.roles.load(tmp_path / "checkpoint-1")
    expected = weights_of(trainer)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights_of(other).items())


def test_a_checkpoint_of_the_same_name_is_replaced_whole(tmp_path):
    make_trainer(tmp_path, max_steps=1, **SAVE).train()
    (tmp_path / "checkpoint-1" / "stale").touch()
    trainer = make_trainer(tmp_path, max_steps=1, seed=7, **SAVE)
    trainer.train()
    assert checkpoints_in(tmp_path) == ["checkpoint-1"] and not (tmp_path / "checkpoint-1" / "stale").exists()
    saved = load_file(tmp_path / "checkpoint-1" / "selector" / "adapter_model.safetensors")
    weights = {name.replace(".selector.", "."): p for name, p in trainer.roles.named_parameters("selector")}
    assert all(torch.equal(saved[name], weights[name]) for name in saved)


def test_save_model_writes_in_place_and_marks_nothing(tmp_path):
    trainer = make_trainer(tmp_path / "run")
    trainer.save_model(str(tmp_path / "model"))
    names = set(checkpoints_in(tmp_path / "model"))
    assert {"selector", "generator", "training_args.bin"} <= names
    assert not {name for name in names if name.startswith((".", "_"))}


@pytest.mark.parametrize("done", [3, 2])
def test_a_run_that_is_done_is_not_trained_further_when_it_resumes(tmp_path, done):
    # 4 updates an epoch: the last checkpoint lies in the middle of one.
    make_trainer(tmp_path, max_steps=3, **SAVE).train()
    resumed = make_trainer(tmp_path, max_steps=done, **SAVE)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    saved = load_file(tmp_path / "checkpoint-3" / "selector" / "adapter_model.safetensors")
    weights = {name.replace(".selector.", "."): p for name, p in resumed.roles.named_parameters("selector")}
    assert all(torch.equal(saved[name], weights[name]) for name in saved)


def test_machines_that_found_different_checkpoints_do_not_go_on(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=1, **SAVE)
    trainer.train()
    monkeypatch.setattr(run, "gather_object", lambda mine: [*mine, "checkpoint-7 of run 0"])
    with pytest.raises(ValueError, match="checkpoint-7 of run 0.*on a disk that all machines share") as error:
        trainer.train(resume_from_checkpoint=True)
    assert "\n" not in str(error.value)


def test_logs_are_readable_lines(tmp_path, capsys):
    make_trainer(tmp_path, max_steps=2, eval_dataset=make_dataset(2), eval_strategy="steps", eval_steps=2).train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines[0].startswith("update 1 of 2: loss ") and "bound -" in lines[0] and "ESS " in lines[0]
    assert lines[2].startswith("evaluation at update 2: EM 0.0%") and lines[3].startswith("trained for ")
    assert len(lines) == 4 and all(len(line) < 140 and "{" not in line for line in lines)
