# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from datasets import DatasetDict
from safetensors.torch import load_file
from trl import GRPOConfig, TrlParser

from ..test_faults import make_trainer
from ..trainer.test_dro_trainer import make_dataset


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).resolve().parents[2] / "examples" / "grpo_selector.py"
    sys.path.insert(0, str(path.parent))  # as where Python runs it, beside the demo
    spec = importlib.util.spec_from_file_location("grpo_selector", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(script, folder, *more):
    arguments = [*script.DEMO_ARGUMENTS.split(), "--output_dir", folder, "--max_steps", 1, "--num_generations", 2]
    arguments += ["--per_device_train_batch_size", 4, "--use_cpu", *more]
    parser = TrlParser((script.SystemArguments, GRPOConfig))
    script.main(*parser.parse_args_and_config([str(each) for each in arguments]))
    for adapter in ("dro/selector", "grpo"):
        assert (folder / adapter / "adapter_model.safetensors").is_file()


def test_both_trainers_train_the_demos_selector_and_are_compared(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "WARMUP_QUESTIONS", 2)
    monkeypatch.setattr(script, "synthetic_world", lambda *a, **k: (make_dataset(6, 10), make_dataset(3, 10)))
    train(script, tmp_path)
    output = capsys.readouterr().out
    assert all(name in output for name in ("before", "DROTrainer", "GRPOTrainer"))


def test_both_trainers_go_on_from_the_adapters_of_a_run(script, tmp_path):
    make_trainer(tmp_path / "run").save_model()
    DatasetDict({"train": make_dataset(6), "test": make_dataset(3)}).save_to_disk(tmp_path / "data")
    train(script, tmp_path / "out", "--system", tmp_path / "run", "--dataset_name", tmp_path / "data")
    start = load_file(tmp_path / "run" / "selector" / "adapter_model.safetensors")
    for adapter in ("dro/selector", "grpo"):
        end = load_file(tmp_path / "out" / adapter / "adapter_model.safetensors")
        assert start.keys() == end.keys() and any(not torch.equal(start[name], end[name]) for name in start)
        # Not begun anew: after one small update the weights are still near where they were.
        assert all(torch.allclose(start[name], end[name], atol=0.05) for name in start)


def test_a_system_without_a_dataset_is_refused(script):
    with pytest.raises(ValueError, match="go together"):
        script.SystemArguments(system="run")
