# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""How processes share the work of training: plain data parallelism, where each holds all weights; FSDP2, where each
holds a part of every weight; and, in `zero.py`, DeepSpeed's ZeRO, where each holds a part of the optimizer's states
(stage 1), of the gradients (stage 2) and of the weights (stage 3). `engines.py` says which one a run is under; nothing
else tells them apart.

Where weights are sharded, all processes must go through the model together. Without gradients their numbers of
forwards differ, by the length of what they write say: there the weights of a role are gathered first. With gradients
the numbers are made equal. And a layer's weights are gathered for the backward of its outputs, not of a cache that it
left: the M-step never goes on from the E-step's forward.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import save_fsdp_optimizer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer

from ..model.roles import Role, Roles
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

    def save_optimizer(self, optimizer: torch.optim.Optimizer, folder: str) -> bool:
        """Whether it wrote the optimizer's state, where Trainer would write more than that."""
        return False

    def before_evaluation(self, trainer: Trainer) -> None:
        """Readies a model that may not have been trained yet."""


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

    def save_optimizer(self, optimizer: torch.optim.Optimizer, folder: str) -> bool:
        # Trainer would write the weights once more, of both roles and their bases.
        save_fsdp_optimizer(self.plugin, self.accelerator, optimizer, self.roles.model, folder)
        return True

    def before_evaluation(self, trainer: Trainer) -> None:
        trainer.create_optimizer()
        trainer.model, trainer.optimizer = self.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.model_wrapped = trainer.model


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
