# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""The engine of a run is known whoever names it, and one that cannot train two roles is refused in one line."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from trl_dro import DROConfig
from trl_dro.model.roles import prepare_role_model
from trl_dro.trainer.engines import engine_name, engine_of, refuse_engines
from trl_dro.trainer.inputs import refuse_unsupported

from ..tiny_models import bpe_tokenizer, tiny_llama


FSDP = {"ACCELERATE_USE_FSDP": "true"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.mark.parametrize(
    "environment, message",
    [
        (FSDP, "FSDP1 .* set fsdp_version to 2"),
        (FSDP | {"FSDP_VERSION": "1"}, "FSDP1 .* set fsdp_version to 2"),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "ZeRO stage 0 spreads nothing: use stages 1 to 3"),
        (ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "leave out offload_optimizer_device"),
    ],
)
def test_engines_that_the_launcher_chose_are_refused_though_no_argument_names_them(monkeypatch, environment, message):
    args = DROConfig(use_cpu=True, bf16=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message) as error:
        refuse_unsupported(args)
    assert "\n" not in str(error.value)


def test_fsdp2_of_the_launcher_or_of_the_arguments_is_not_refused(monkeypatch):
    args = DROConfig(use_cpu=True, bf16=False)
    for name, value in (FSDP | {"FSDP_VERSION": "2"}).items():
        monkeypatch.setenv(name, value)
    refuse_engines(args)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    args.fsdp_plugin_args = {"fsdp_version": 2}
    refuse_engines(args)
    args.fsdp_plugin_args = {"fsdp_version": 1}
    with pytest.raises(ValueError, match="FSDP1"):
        refuse_engines(args)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_that_are_supported_are_not_refused(monkeypatch, stage):
    args = DROConfig(use_cpu=True, bf16=False)
    for name, value in (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}).items():
        monkeypatch.setenv(name, value)
    refuse_engines(args)
    assert engine_name(None, args) == f"ZeRO-{stage}"


def test_zero_of_a_config_is_refused_by_its_stage_and_offload():
    plugin = SimpleNamespace(zero_stage=2, hf_ds_config=SimpleNamespace(is_offload=lambda: True))
    fake = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, state=SimpleNamespace(deepspeed_plugin=plugin))
    with pytest.raises(ValueError, match="leave out offload_optimizer_device"):
        engine_of(fake, None)
    plugin.zero_stage = 0
    with pytest.raises(ValueError, match="ZeRO stage 0"):
        engine_of(fake, None)
    plugin.zero_stage, plugin.hf_ds_config = 3, SimpleNamespace(is_offload=lambda: False)
    roles = SimpleNamespace(module=lambda role: SimpleNamespace(is_loaded_in_4bit=True))
    with pytest.raises(ValueError, match="the selector's base is quantized, which ZeRO-3 does not shard"):
        engine_of(fake, roles)


def accelerator(**plugin):
    settings = {"fsdp_version": 2, "activation_checkpointing": False, "mixed_precision_policy": None} | plugin
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**settings))
    return SimpleNamespace(distributed_type=DistributedType.FSDP, state=state)


def test_settings_of_fsdp2_with_which_two_roles_cannot_be_trained_are_refused():
    roles = SimpleNamespace(module=lambda role: model)
    model = prepare_role_model(tiny_llama(bpe_tokenizer(split_digits=False)))
    with pytest.raises(ValueError, match="gradient_checkpointing=True"):
        engine_of(accelerator(activation_checkpointing=True), roles)
    with pytest.raises(ValueError, match="set fsdp_version to 2"):
        engine_of(accelerator(fsdp_version=1), roles)
    model.is_loaded_in_4bit = True
    with pytest.raises(ValueError, match="the selector's base is quantized, .* recipes/accelerate/two_gpus.yaml"):
        engine_of(accelerator(), roles)


def test_the_engine_of_a_run_is_known_from_arguments_launcher_or_config(monkeypatch, tmp_path):
    args = DROConfig(use_cpu=True, bf16=False)
    recipes = Path(__file__).resolve().parents[2] / "recipes/accelerate"
    names = {path.stem: engine_name(str(path), args) for path in recipes.glob("*.yaml")}
    alone = dict.fromkeys(("one_gpu", "two_gpus", "two_cpu_processes"), "data parallel")
    assert names == alone | {"fsdp2": "FSDP2", "two_machines": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
    file = tmp_path / "zero1.json"
    file.write_text('{"zero_optimization": {"stage": 1}}')
    config = tmp_path / "config.yaml"
    config.write_text(f"distributed_type: DEEPSPEED\ndeepspeed_config: {{deepspeed_config_file: {file}}}\n")
    assert engine_name(str(config), args) == "ZeRO-1"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert engine_name(None, args) == "ZeRO-2"  # accelerate's own default
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    assert engine_name(None, args) == "ZeRO-1"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert engine_name(None, args) == "FSDP2"
