# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Engines that cannot train two roles are refused in one line, whoever names them. See `tests/distributed` for what
FSDP2 computes."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from trl_dro import DROConfig
from trl_dro.model.roles import prepare_role_model
from trl_dro.trainer.inputs import refuse_unsupported
from trl_dro.trainer.sharding import engine_of, refuse_engines

from ..tiny_models import bpe_tokenizer, tiny_llama


FSDP = {"ACCELERATE_USE_FSDP": "true"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.mark.parametrize(
    "environment, message",
    [
        (FSDP, "FSDP1 .* set fsdp_version to 2"),
        (FSDP | {"FSDP_VERSION": "1"}, "FSDP1 .* set fsdp_version to 2"),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "ZeRO stage 3 .* use FSDP2, .* stages 1 and 2 are"),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "ZeRO stage 0 is not supported"),
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


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_stages_that_are_supported_are_not_refused(monkeypatch, stage):
    args = DROConfig(use_cpu=True, bf16=False)
    for name, value in (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}).items():
        monkeypatch.setenv(name, value)
    refuse_engines(args)


def test_zero_of_a_config_is_refused_by_its_stage_and_offload():
    plugin = SimpleNamespace(zero_stage=2, hf_ds_config=SimpleNamespace(is_offload=lambda: True))
    fake = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, state=SimpleNamespace(deepspeed_plugin=plugin))
    with pytest.raises(ValueError, match="leave out offload_optimizer_device"):
        engine_of(fake, None)
    plugin.zero_stage = 3
    with pytest.raises(ValueError, match="ZeRO stage 3"):
        engine_of(fake, None)


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


def test_sums_over_processes_are_of_float32_under_bfloat16():
    roles = SimpleNamespace(module=lambda role: torch.nn.Linear(1, 1))
    policy = torch.distributed.fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    fake = accelerator(mixed_precision_policy=policy)
    fake.gradient_state = SimpleNamespace(plugin_kwargs={})
    fake.prepare = None
    engine = engine_of(fake, roles)
    assert engine.lockstep and engine.plugin.mixed_precision_policy.reduce_dtype == torch.float32
    assert fake.gradient_state.plugin_kwargs == {"sync_each_batch": True}
