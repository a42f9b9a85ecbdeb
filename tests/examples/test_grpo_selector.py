# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import importlib.util
from pathlib import Path

import pytest
from trl import GRPOConfig, TrlParser

from trl_dro.data.synthetic import synthetic_world


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).resolve().parents[2] / "examples" / "grpo_selector.py"
    spec = importlib.util.spec_from_file_location("grpo_selector", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_trainers_train_and_are_compared(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "synthetic_world", lambda *_, **settings: synthetic_world(6, 6, **settings))
    arguments = [*script.DEMO_ARGUMENTS.split(), "--output_dir", tmp_path, "--max_steps", 1, "--num_generations", 2]
    arguments += ["--per_device_train_batch_size", 4, "--use_cpu"]
    parser = TrlParser((script.DataArguments, GRPOConfig))
    script.main(*parser.parse_args_and_config([str(each) for each in arguments]))
    for folder in ("dro/selector", "grpo"):
        assert (tmp_path / folder / "adapter_model.safetensors").is_file()
    output = capsys.readouterr().out
    assert all(name in output for name in ("before", "DROTrainer", "GRPOTrainer"))


def test_a_model_without_a_dataset_is_refused(script):
    with pytest.raises(ValueError, match="go together"):
        script.DataArguments(model_name_or_path="model")
