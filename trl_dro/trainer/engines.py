# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Which engine a run is under, by its arguments, its launcher or a config file, and which ones are refused."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from transformers import TrainingArguments

from ..model.roles import ROLES, Roles, is_quantized
from .sharding import FSDP2, DataParallel
from .zero import ZeRO, ZeRO3


def engine_of(accelerator: Accelerator, roles: Roles) -> DataParallel:
    """
    Engine of an accelerator.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Processes, and what the launcher's config says of them.
        roles ([`~roles.Roles`]):
            Both roles.

    Returns:
        [`DataParallel`], [`FSDP2`], [`ZeRO`] or [`ZeRO3`]

    Raises:
        `ValueError`: it is another engine, or one with settings under which two roles cannot be trained.
    """
    kind = str(accelerator.distributed_type.value)
    if kind == "DEEPSPEED":
        zero: Any = accelerator.state.deepspeed_plugin
        _refuse_zero(zero.zero_stage, zero.hf_ds_config.is_offload())
        if zero.zero_stage != 3:
            return ZeRO(accelerator, roles)
        _refuse_quantized(roles, "ZeRO-3")
        return ZeRO3(accelerator, roles)
    if kind == "MEGATRON_LM":
        raise ValueError(f"Megatron-LM does not know two roles: use {_FSDP2_RECIPE}")
    if kind != "FSDP":
        return DataParallel(accelerator, roles)
    plugin: Any = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(_NO_FSDP1)
    if plugin.activation_checkpointing:
        raise ValueError(
            "FSDP's own activation checkpointing wraps layers, so that a role's weights lose their names: set "
            "fsdp_activation_checkpointing to false, and gradient_checkpointing=True in the training arguments"
        )
    _refuse_quantized(roles, FSDP2.name)
    return FSDP2(accelerator, roles)


def _refuse_quantized(roles: Roles, engine: str) -> None:
    for role in ROLES:
        if is_quantized(roles.module(role)):
            raise ValueError(
                f"the {role}'s base is quantized, which {engine} does not shard here: use plain data parallelism, "
                "e.g. recipes/accelerate/two_gpus.yaml, or leave out load_in_4bit and shard the base in bfloat16"
            )


_FSDP2_RECIPE = "FSDP2, e.g. accelerate launch --config_file recipes/accelerate/fsdp2.yaml"
_NO_FSDP1 = (
    "FSDP1 saves one adapter only and cannot run two roles' backwards one after the other: set fsdp_version to 2, as "
    "recipes/accelerate/fsdp2.yaml has it"
)


def _refuse_zero(stage: int, offloads: bool = False) -> None:
    """Raises `ValueError` for what DeepSpeed is not used for here."""
    if stage not in (1, 2, 3):
        raise ValueError(
            f"DeepSpeed's ZeRO stage {stage} spreads nothing: use stages 1 to 3, e.g. recipes/accelerate/zero2.yaml, "
            f"or {_FSDP2_RECIPE}"
        )
    if offloads:
        raise ValueError(
            "DeepSpeed's offload does not show the gradients of each role before the optimizer's step: leave out "
            "offload_optimizer_device and offload_param_device"
        )


def refuse_engines(args: TrainingArguments) -> None:
    """
    Raises `ValueError` for engines that cannot train two roles, before anything is loaded: by the training arguments,
    and by what `accelerate launch` says in the environment, as a config of its own sets no argument.
    """
    if args.deepspeed:
        _refuse_zero(_stage(args.hf_deepspeed_config.config))
    elif _is_true("ACCELERATE_USE_DEEPSPEED"):
        devices = [os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE") for what in ("OPTIMIZER", "PARAM")]
        _refuse_zero(_launched_stage(), any(device not in (None, "none") for device in devices))
    if args.fsdp_plugin_args is not None:
        if args.fsdp_plugin_args["fsdp_version"] != 2:
            raise ValueError(_NO_FSDP1)
    elif _is_true("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION") != "2":
        raise ValueError(_NO_FSDP1)


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def engine_name(accelerate_config: str | None, args: TrainingArguments) -> str:
    """
    `"data parallel"`, `"FSDP2"` or `"ZeRO-"` with its stage: what a run will be under, by its arguments, the
    launcher's environment, or a config file of accelerate.
    """
    if args.fsdp_plugin_args is not None or _is_true("ACCELERATE_USE_FSDP"):
        return FSDP2.name
    stage = None
    if args.deepspeed:
        stage = _stage(args.hf_deepspeed_config.config)
    elif _is_true("ACCELERATE_USE_DEEPSPEED"):
        stage = _launched_stage()
    elif accelerate_config is not None:
        config: Any = load_config_from_file(accelerate_config)
        if config.distributed_type == "FSDP":
            return FSDP2.name
        if config.distributed_type == "DEEPSPEED":
            file = config.deepspeed_config.get("deepspeed_config_file")
            stage = config.deepspeed_config.get("zero_stage", 2) if file is None else _stage_in(file)
    return DataParallel.name if stage is None else f"ZeRO-{stage}"


def _launched_stage() -> int:
    """Stage that `accelerate launch` was told, by a file of DeepSpeed's or of its own."""
    if file := os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        return _stage_in(file)
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))


def _stage_in(file: str) -> int:
    return _stage(json.loads(Path(file).read_text(encoding="utf-8")))


def _stage(config: Mapping[str, Any]) -> int:
    return int(config.get("zero_optimization", {}).get("stage", 0))
