# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""How processes share the work of training: plain data parallelism, where each holds all weights; FSDP2, where each
holds a part of every weight; or DeepSpeed's ZeRO, where each holds a part of the optimizer's states (stage 1), of the
gradients (stage 2) and of the weights (stage 3). The one file that knows engines.

Where weights are sharded, all processes must go through the model together. Without gradients their numbers of
forwards differ, by the length of what they write say: there the weights of a role are gathered first. With gradients
the numbers are made equal. And a layer's weights are gathered for the backward of its outputs, not of a cache that it
left: the M-step never goes on from the E-step's forward.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import save_fsdp_optimizer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config

from .._trl_compat import add_hooks, remove_hooks
from ..model.roles import ROLES, Role, Roles, is_quantized
from .schedule import QuestionBatch


class DataParallel:
    """
    One process, or several that hold all weights each.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Processes.
        roles ([`~roles.Roles`]):
            Both roles.
    """

    name = "data parallel"  # by which a checkpoint tells what wrote it
    lockstep = False
    """Whether all processes must go through the model together."""

    def __init__(self, accelerator: Accelerator, roles: Roles):
        self.accelerator = accelerator
        self.roles = roles

    def gathered(self, *roles: Role) -> contextlib.AbstractContextManager:
        """Has all weights of these roles at hand, for forwards without gradients."""
        return contextlib.nullcontext()

    def synced_backward(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """Gradients are averaged over processes once, in the last role's backward."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(model)

    def backward(self, loss: Tensor) -> None:
        """Backward of a role's loss, in [`synced_backward`]."""
        self.accelerator.backward(loss)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in a process that this one must go along with."""
        return flag

    def level(self, parts: list[QuestionBatch]) -> list[QuestionBatch]:
        """Parts of a micro-batch, as many as other processes have if they must go along."""
        return parts

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Norm of all of a role's gradients."""
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def leave_out(self, parameters: Sequence[nn.Parameter]) -> None:
        """Has the optimizer pass over the update that was to come, momentum and weight decay included."""
        for parameter in parameters:
            parameter.grad = None

    def clipped(self, norms: Sequence[Tensor]) -> float | None:
        """Norm of all gradients, by the roles', where the optimizer's step clips them; `None` where Trainer does."""
        return None

    def full(self, weight: Tensor) -> Tensor:
        """All of a weight of the model, detached."""
        return weight.detach()

    def whole(self, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Weights to be saved, where the model itself cannot give them; empty but in the first process."""
        return None

    def load(self, folder: str | Path) -> None:
        """Reads both roles from a folder, see [`~roles.Roles.load`]."""
        self.roles.load(folder)


class Sharded(DataParallel):
    """Processes that hold a part of every weight each, and go through the model together."""

    lockstep = True

    def any(self, flag: bool) -> bool:
        return self._most(int(flag)) > 0

    def level(self, parts: list[QuestionBatch]) -> list[QuestionBatch]:
        """Parts, and as many more, of a question that does not count, as make them those of any other process."""
        stand_in = QuestionBatch(parts[0].rows[:1], [False])
        return parts + [stand_in] * (self._most(len(parts)) - len(parts))

    def _most(self, number: int) -> int:
        mine = torch.tensor([number], device=self.accelerator.device)
        return int(self.accelerator.gather(mine).max())

    def whole(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parameters = dict(self.roles.model.named_parameters(remove_duplicate=False))
        kept = {}
        for name, weight in state.items():
            # One after the other: no device ever holds more than one weight that is whole.
            full = self.full(parameters.get(name, weight))
            if self.accelerator.is_main_process:
                kept[name] = full.cpu()
        return kept


class FSDP2(Sharded):
    """
    Weights, gradients and optimizer states sharded by `torch.distributed.fsdp.fully_shard`, as accelerate applies it.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Processes.
        roles ([`~roles.Roles`]):
            Both roles.
    """

    name = "FSDP2"

    def __init__(self, accelerator: Accelerator, roles: Roles):
        super().__init__(accelerator, roles)
        self.plugin: Any = accelerator.state.fsdp_plugin
        self._held: set[int] = set()  # units that an outer call gathered
        # Sums over processes in float32: bfloat16 has 8 bits, and each of both roles' backwards adds to them.
        if self.plugin.mixed_precision_policy is not None:
            self.plugin.mixed_precision_policy = replace(
                self.plugin.mixed_precision_policy, reduce_dtype=torch.float32
            )
        # Deferring the exchange would keep whole gradients of each role until then: every backward exchanges its own.
        accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
        prepare = accelerator.prepare

        def prepare_once(*objects: Any, **kwargs: Any) -> Any:
            if not isinstance(objects[0], nn.Module):
                return prepare(*objects, **kwargs)
            # accelerate finds an optimizer's parameters by their addresses, which empty shards do not have: a model
            # that is sharded stays as it is.
            if isinstance(objects[0], FSDPModule):
                model, optimizer = objects
                return model, accelerator.prepare_optimizer(optimizer)
            model, optimizer = prepare(*objects, **kwargs)
            # The first forward tells FSDP which module is the root: one of nothing, through the right one.
            model.touch = _nothing
            register_fsdp_forward_method(model, "touch")
            with torch.no_grad():
                model.touch()
            return model, optimizer

        accelerator.prepare = prepare_once  # type: ignore[method-assign,assignment]

    @contextlib.contextmanager
    def gathered(self, *roles: Role) -> Iterator[None]:
        model: Any = self.roles.model
        modules = list(model.modules())
        if not self.roles.shared:
            modules = [model, *(module for role in roles for module in model.get_submodule(role).modules())]
        units = [module for module in modules if isinstance(module, FSDPModule) and id(module) not in self._held]
        self._held |= {id(unit) for unit in units}
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for unit in units:
                # The root, and final norm and head, are kept from forward to backward, as accelerate has it.
                if type(unit).__name__.removeprefix("FSDP") in model._no_split_modules:
                    unit.set_reshard_after_forward(self.plugin.reshard_after_forward, recurse=False)
                unit.reshard()
            self._held -= {id(unit) for unit in units}

    def synced_backward(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        norm: Any = super().norm(parameters)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def full(self, weight: Tensor) -> Tensor:
        return (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach()

    def load(self, folder: str | Path) -> None:
        self.roles.load(folder, fill)

    def save_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> None:
        """Writes the optimizer's state, which any number of processes can read."""
        save_fsdp_optimizer(self.plugin, self.accelerator, optimizer, model, folder)


class ZeRO(DataParallel):
    """
    Optimizer states, and in stage 2 gradients, spread over processes by DeepSpeed, as accelerate applies it. Each
    process holds all weights, and goes through the model when it likes.

    DeepSpeed takes every backward for that of a whole loss, and accelerate steps the optimizer after it. Here the last
    role's backward of an update is told to be the last, and the step is made when the gradients have been looked at.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Processes.
        roles ([`~roles.Roles`]):
            Both roles.
    """

    def __init__(self, accelerator: Accelerator, roles: Roles):
        super().__init__(accelerator, roles)
        plugin: Any = accelerator.state.deepspeed_plugin
        # Each process keeps its part, which no other number of processes can read.
        self.name = f"ZeRO-{plugin.zero_stage} on {accelerator.num_processes} processes"
        self._deepspeed: Any = None  # its engine, once the model is prepared
        self._left_out = False
        prepare = accelerator.prepare

        def prepare_and_step_late(*objects: Any, **kwargs: Any) -> Any:
            prepared = prepare(*objects, **kwargs)
            if isinstance(objects[0], nn.Module):
                self._deepspeed, optimizer = prepared[:2]
                # A method of it, which the scheduler of learning rates will wrap.
                optimizer.step = MethodType(lambda _, closure=None: self._step(), optimizer)
            return prepared

        accelerator.prepare = prepare_and_step_late  # type: ignore[method-assign,assignment]

    def synced_backward(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        self._deepspeed.set_gradient_accumulation_boundary(last and self.accelerator.sync_gradients)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._deepspeed.backward(loss, scale_wrt_gas=False)

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        from deepspeed.utils import safe_get_full_grad

        # One after the other: no process ever holds more than one gradient that is whole.
        norms = [safe_get_full_grad(parameter).norm() for parameter in parameters]
        return torch.stack(norms).norm() if norms else torch.zeros((), device=self.accelerator.device)

    def leave_out(self, parameters: Sequence[nn.Parameter]) -> None:
        self._left_out = True

    def clipped(self, norms: Sequence[Tensor]) -> float:
        return 0.0 if self._left_out else float(torch.stack(list(norms)).norm())

    def _step(self) -> None:
        if not self._left_out:
            self._deepspeed.step()
            return
        self._left_out = False
        self._forget()

    def _forget(self) -> None:
        """Drops an update's gradients, as its own optimizer does where fp16 overflows."""
        optimizer = self._deepspeed.optimizer
        optimizer.zero_grad(set_to_none=True)
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None
        optimizer.micro_step_id = -1


class ZeRO3(Sharded, ZeRO):
    """
    Weights, gradients and optimizer states spread over processes by DeepSpeed, as accelerate applies it.

    DeepSpeed empties no buffer of gradients: in an update's first backward, and in no other, what comes overwrites
    what is left of the update before. With two backwards the second role's gradients would be added to old ones. Here
    all are added, and the buffer is emptied with the step.
    """

    def __init__(self, accelerator: Accelerator, roles: Roles):
        super().__init__(accelerator, roles)
        self._held: set[Role] = set()  # roles whose weights an outer call gathered
        load_whole()

    @contextlib.contextmanager
    def gathered(self, *roles: Role) -> Iterator[None]:
        # Before the model is prepared each process has all.
        if self._deepspeed is None or self._held.issuperset(roles):
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters

        model, held = self.roles.model, self._held
        modules = [model] if self.roles.shared else [model.get_submodule(role) for role in roles]
        with GatheredParameters([parameter for module in modules for parameter in module.parameters()]):
            # They would gather weights, all processes at once, and let go of them layer by layer.
            remove_hooks(self._deepspeed)
            self._held = held.union(ROLES if self.roles.shared else roles)
            try:
                yield
            finally:
                self._held = held
                add_hooks(self._deepspeed)

    def backward(self, loss: Tensor) -> None:
        self._deepspeed.optimizer.micro_step_id = 1  # of zero it would overwrite
        super().backward(loss)

    def full(self, weight: Tensor) -> Tensor:
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(weight):
            return weight.detach().clone()

    def load(self, folder: str | Path) -> None:
        from deepspeed.runtime.zero import GatheredParameters

        weights = [parameter for role in ROLES for _, parameter in self.roles.named_parameters(role)]
        with GatheredParameters(weights, modifier_rank=0):
            super().load(folder)

    def _step(self) -> None:
        super()._step()
        self._deepspeed.optimizer.grad_partitions_flat_buffer.zero_()

    def _forget(self) -> None:
        self._deepspeed.optimizer.zero_grad()


def load_whole() -> None:
    """
    Has transformers load all of a model in each process under ZeRO-3 too, where it would load parts: DeepSpeed makes
    these when it is given the model, and until then it can be copied, checked and asked.
    """
    unset_hf_deepspeed_config()


def _nothing() -> None:
    """A forward of nothing."""


def fill(weight: Tensor, values: Tensor) -> None:
    """Writes values into a weight, each process its part; those of the first process count."""
    with torch.no_grad():
        if not isinstance(weight, DTensor):
            weight.copy_(values)
            return
        whole = values.detach().to(device=weight.device, dtype=weight.dtype).contiguous()
        part = distribute_tensor(whole, weight.device_mesh, weight.placements)
        weight.to_local().copy_(part.to_local())


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
