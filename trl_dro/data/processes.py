# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Processes that share a piece of work whose parts need nothing of each other."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Self, TypeVar


T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """
    This process among those that do a piece of work; by default it is alone.

    Args:
        rank (`int`, *optional*, defaults to `0`):
            Which one it is, from 0, the main one.
        count (`int`, *optional*, defaults to `1`):
            How many there are.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def of_launcher(cls) -> Self:
        """
        Those that `accelerate launch` or `torchrun` started. Each gets a device of its own, if its machine has as
        many. They talk through the CPU, and seldom.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        import torch
        from accelerate import PartialState

        # The launcher ends all when one dies: a long silence only means that another one still works.
        state = PartialState(cpu=True, timeout=timedelta(days=30))
        if torch.accelerator.is_available():
            torch.accelerator.set_device_index(state.local_process_index % torch.accelerator.device_count())
        return cls(state.process_index, state.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that does what must be done once."""
        return self.rank == 0

    def share(self, make: Callable[[], T]) -> T:
        """What the main process makes, in all of them."""
        if self.count == 1:
            return make()
        from accelerate.utils import broadcast_object_list

        with self._ends_with_the_main_one():
            [made] = broadcast_object_list([make() if self.is_main else None])
        return made

    def wait(self) -> None:
        """Waits until all processes are here."""
        if self.count > 1:
            from accelerate import PartialState

            with self._ends_with_the_main_one():
                PartialState().wait_for_everyone()

    @contextmanager
    def _ends_with_the_main_one(self) -> Iterator[None]:
        """A connection that breaks says only that the main process has ended, which has told why."""
        try:
            yield
        except RuntimeError:
            if self.is_main:
                raise
            sys.exit(f"process {self.rank} ends, as the main one did")


ALONE = Processes()
