# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""DeepSpeed's ZeRO, which spreads optimizer states, in stage 2 gradients and in stage 3 weights over processes."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import Trainer
from transformers.integrations import unset_hf_deepspeed_config

from .._trl_compat import add_hooks, remove_hooks
from ..model.roles import ROLES, Role, Roles
from .sharding import DataParallel, Sharded


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

    def before_evaluation(self, trainer: Trainer) -> None:
        if self._deepspeed is None:  # Trainer leaves the model where it lies, for DeepSpeed to move
            self.roles.model.to(self.accelerator.device)

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
