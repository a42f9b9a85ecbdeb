# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import json
import os
import shutil
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from transformers import TrainerControl

from trl_dro.model.roles import ROLES
from trl_dro.trainer import checkpoint as checkpoint_module
from trl_dro.trainer.checkpoint import (
    StopOnSignal,
    find_checkpoints,
    find_damage,
    put_in_place,
    remove_leftovers,
    staging_folder,
)


@pytest.fixture
def checkpoint(tmp_path):
    """A whole checkpoint, small."""
    folder = tmp_path / "checkpoint-3"
    for role in ROLES:
        (folder / role).mkdir(parents=True)
        save_file({"weight": torch.ones(100)}, folder / role / "adapter_model.safetensors")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 3}), encoding="utf-8")
    torch.save({"state": torch.ones(100)}, folder / "optimizer.pt")
    torch.save({"cpu": torch.ones(100)}, folder / "rng_state.pth")
    return folder


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def shards(folder):
    save_file({"weight": torch.ones(100)}, folder / "selector" / "model-00002-of-00002.safetensors")
    truncate(folder / "selector" / "model-00002-of-00002.safetensors")


DAMAGE = {
    "no folder": (shutil.rmtree, "there is no such folder"),
    "a file in its place": (lambda c: (shutil.rmtree(c), c.write_text("")), "there is no such folder"),
    "no folder of a role": (lambda c: shutil.rmtree(c / "selector"), "selector/ has no weights"),
    "no weights of a role": (
        lambda c: (c / "generator" / "adapter_model.safetensors").unlink(),
        "generator/ has no weights",
    ),
    "half of the weights": (
        lambda c: truncate(c / "generator" / "adapter_model.safetensors"),
        r"generator/adapter_model.safetensors is damaged \(.+\)",
    ),
    "empty weights": (
        lambda c: (c / "selector" / "adapter_model.safetensors").write_bytes(b""),
        "selector/adapter_model.safetensors is damaged",
    ),
    "half of a shard": (shards, "selector/model-00002-of-00002.safetensors is damaged"),
    "no state": (lambda c: (c / "trainer_state.json").unlink(), "trainer_state.json is damaged"),
    "half of the state": (lambda c: truncate(c / "trainer_state.json"), "trainer_state.json is damaged"),
    "half of the optimizer": (lambda c: truncate(c / "optimizer.pt"), "optimizer.pt is damaged"),
    "empty random states": (lambda c: (c / "rng_state.pth").write_bytes(b""), "rng_state.pth is damaged"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_every_kind_of_damage_is_found_and_named_in_one_line(checkpoint, case):
    damage, message = DAMAGE[case]
    damage(checkpoint)
    found = find_damage(checkpoint)
    assert found is not None and "\n" not in found
    pytest.raises(ValueError, _raise, found).match(message)


def _raise(message):
    raise ValueError(message)


def test_whole_checkpoint_has_no_damage(checkpoint):
    assert find_damage(checkpoint) is None
    assert find_damage(str(checkpoint)) is None


def test_checkpoint_of_the_model_alone_cannot_be_resumed(checkpoint):
    (checkpoint / "optimizer.pt").unlink()
    assert "optimizer.pt is missing, as with save_only_model" in find_damage(checkpoint)


def test_checkpoints_are_found_the_newest_first_whatever_their_age_on_disk(tmp_path):
    for age, step in enumerate((1000, 2, 10)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        os.utime(folder, (age, age))
    for other in ("_checkpoint-2000.partial", "checkpoint-3000-old", "checkpoint-", "checkpoint-best", "run"):
        (tmp_path / other).mkdir()
    (tmp_path / "checkpoint-4000").write_text("not a folder")
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-1000", "checkpoint-10", "checkpoint-2"]
    assert find_checkpoints(tmp_path / "nowhere") == []


def write(folder, text):
    folder.mkdir(parents=True)
    (folder / "weights").write_text(text)
    return folder


@pytest.mark.parametrize("older", [False, True])
def test_checkpoint_takes_its_place_over_an_older_one(tmp_path, older):
    checkpoint = tmp_path / "checkpoint-3"
    if older:
        write(checkpoint, "old")
    written = write(staging_folder(checkpoint) / checkpoint.name, "new")
    put_in_place(written, checkpoint)
    assert (checkpoint / "weights").read_text() == "new" and not written.exists()
    shutil.rmtree(staging_folder(checkpoint))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_staging_folder_is_beside_the_checkpoint_and_is_not_taken_for_one(tmp_path):
    checkpoint = tmp_path / "checkpoint-3"
    staging = staging_folder(checkpoint)
    write(staging, "")
    assert staging.parent == tmp_path  # on one file system, so that a rename is one step
    assert find_checkpoints(tmp_path) == []


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    checkpoint = write(tmp_path / "checkpoint-3", "")
    write(staging_folder(tmp_path / "checkpoint-4") / "checkpoint-4", "")
    write(tmp_path / "checkpoint-5", "")
    write(tmp_path / "_checkpoint-5.replaced", "")
    write(tmp_path / ".cache", "")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".cache", checkpoint.name, "checkpoint-5"]
    remove_leftovers(tmp_path / "nowhere")


@pytest.mark.parametrize("renames", [0, 1])
def test_run_killed_while_a_checkpoint_is_replaced_keeps_one_of_the_two(tmp_path, monkeypatch, renames):
    checkpoint = write(tmp_path / "checkpoint-3", "old")
    written = write(staging_folder(checkpoint) / checkpoint.name, "new")
    rename = os.rename
    done = []

    def until_killed(*args):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(rename(*args))

    monkeypatch.setattr(os, "rename", until_killed)
    with pytest.raises(KeyboardInterrupt):
        put_in_place(written, checkpoint)
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


SIGNALS = (signal.SIGTERM, signal.SIGINT)


def test_handlers_are_installed_in_the_block_and_restored_after_it_even_after_an_error():
    stop = StopOnSignal(Accelerator(cpu=True))
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ZeroDivisionError), stop.installed():
        assert all(signal.getsignal(number) == stop._receive for number in SIGNALS)
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_stops_after_the_update_with_a_checkpoint(capfd, number):
    stop = StopOnSignal(Accelerator(cpu=True))
    control = TrainerControl(should_evaluate=True)
    with stop.installed():
        stop.on_step_begin(SimpleNamespace(), SimpleNamespace(global_step=6, max_steps=60), control)
        stop.on_step_end(SimpleNamespace(), SimpleNamespace(), control)
        assert not (control.should_save or control.should_training_stop) and control.should_evaluate
        signal.raise_signal(number)
        stop.on_step_end(SimpleNamespace(), SimpleNamespace(), control)
    assert control.should_save and control.should_training_stop and not control.should_evaluate
    assert stop.received == number
    said = capfd.readouterr().err.strip()
    assert said == f"{number.name}: saving a checkpoint after update 7 of 60; again to exit at once."
    with stop.installed():  # another training starts afresh
        assert stop.received is None


class TwoProcesses:
    """Stands in for an accelerator of two processes, the other of which has received `others`."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, others=0, during=lambda: None):
        self.others, self.during = others, during

    def gather(self, number):
        self.during()
        return torch.cat([number, torch.tensor([self.others])])


def test_signal_to_another_process_stops_this_one():
    stop, control = StopOnSignal(TwoProcesses(others=int(signal.SIGTERM))), TrainerControl()
    stop.on_step_end(SimpleNamespace(), SimpleNamespace(), control)
    assert control.should_save and control.should_training_stop and stop.received == signal.SIGTERM


def test_signal_that_comes_while_processes_agree_is_heeded_by_all_after_the_next_update():
    stop = StopOnSignal(TwoProcesses(during=lambda: stop._receive(signal.SIGTERM, None)))
    first, second = TrainerControl(), TrainerControl()
    stop.on_step_end(SimpleNamespace(), SimpleNamespace(), first)
    assert not first.should_training_stop  # the other process goes on, so this one must
    stop.accelerator = TwoProcesses()
    stop.on_step_end(SimpleNamespace(), SimpleNamespace(), second)
    assert second.should_save and second.should_training_stop


@pytest.mark.parametrize("number", SIGNALS)
def test_second_signal_ends_the_process(number, monkeypatch):
    killed, clock = [], iter([10.0, 10.5, 11.5])
    monkeypatch.setattr(checkpoint_module.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append((pid, number, signal.getsignal(number))))
    with StopOnSignal(Accelerator(cpu=True)).installed():
        signal.raise_signal(number)
        signal.raise_signal(number)  # soon after: the same request, passed on by a launcher
        assert not killed
        signal.raise_signal(number)
    assert killed == [(os.getpid(), number, signal.SIG_DFL)]


def test_outside_the_main_thread_signals_are_left_alone():
    stop = StopOnSignal(Accelerator(cpu=True))
    before = [signal.getsignal(number) for number in SIGNALS]
    seen = []

    def train():
        with stop.installed():
            seen.extend(signal.getsignal(number) for number in SIGNALS)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == before
