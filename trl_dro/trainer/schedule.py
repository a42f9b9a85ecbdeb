# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Which questions an E-step estimates, and in which order the M-step visits them.

One epoch is cut into global micro-batches of `batch_size * world_size` questions; `steps_per_estimation` of them make
a block. A block is estimated once and visited `maximization_epochs` times before the next. With one micro-batch per
block this is incremental EM; with the whole epoch as one block it is Algorithm 1 of
https://huggingface.co/papers/2505.03075. `gradient_accumulation_steps` micro-batches make an update, in which every
question weighs the same. A second visit begins with a new update:

    three micro-batches in blocks of two, visited twice, two micro-batches an update (- is a filler)
    block       0 0 0 0   1 1 1 1
    position    0 1 0 1   - 0 - 0
    update      1 1 2 2   3 3 4 4
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset


class QuestionBatch(NamedTuple):
    """The share of one process in a global micro-batch."""

    rows: list[int]  # rows of the dataset
    counted: list[bool]  # False for rows repeated only to give every process as many

    def split(self, parts: Sequence[Sequence[int]]) -> list["QuestionBatch"]:
        """Parts by index into `rows`."""
        return [QuestionBatch([self.rows[i] for i in part], [self.counted[i] for i in part]) for part in parts]


class MicroBatch(NamedTuple):
    """One step of the M-step, and the block that its E-step estimates."""

    block: list[QuestionBatch]  # empty for a filler, which trains on nothing
    block_index: int  # counts blocks over all epochs
    position: int  # index into `block`
    update_size: float  # questions of the update per process: what summed losses are divided by


class EstimationSampler:
    """
    Batch sampler that yields one [`MicroBatch`] at a time, the same for the same seed and epoch. It deals the
    questions out to processes itself: a block must be known before its first step, and an uneven last batch must weigh
    as it would on one process.

    Args:
        num_questions (`int`):
            Size of the dataset.
        batch_size (`int`):
            Questions per process and micro-batch.
        steps_per_estimation (`int`, *optional*, defaults to `1`):
            Micro-batches per block; `-1` for the whole epoch.
        maximization_epochs (`int`, *optional*, defaults to `1`):
            Visits to each block. More than one make a block of whole updates: `steps_per_estimation` is rounded up to
            a multiple of `gradient_accumulation_steps`, and fillers stand in where the epoch leaves fewer.
        gradient_accumulation_steps (`int`, *optional*, defaults to `1`):
            Micro-batches per update.
        drop_last (`bool`, *optional*, defaults to `False`):
            Leave out an incomplete last micro-batch.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order of the questions, to which the epoch is added.
        rank (`int`, *optional*, defaults to `0`):
            Index of this process.
        world_size (`int`, *optional*, defaults to `1`):
            Number of processes.

    Raises:
        `ValueError`: `drop_last` leaves no micro-batch.
    """

    def __init__(
        self,
        num_questions: int,
        batch_size: int,
        steps_per_estimation: int = 1,
        maximization_epochs: int = 1,
        gradient_accumulation_steps: int = 1,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.num_questions = num_questions
        self.global_batch_size = batch_size * world_size
        full, rest = divmod(num_questions, self.global_batch_size)
        self.num_micro_batches = full + (0 if drop_last else rest > 0)
        if self.num_micro_batches == 0:
            raise ValueError(
                f"{num_questions} questions do not fill one batch of {self.global_batch_size}: lower "
                "per_device_train_batch_size or set dataloader_drop_last=False"
            )
        self.gradient_accumulation_steps = gradient_accumulation_steps
        # What a visit to a block is rounded up to.
        self.granularity = 1 if maximization_epochs == 1 else gradient_accumulation_steps
        whole_epoch = steps_per_estimation == -1
        block_size = self.num_micro_batches if whole_epoch else self._whole_updates(steps_per_estimation)
        self.block_size = min(block_size, self.num_micro_batches)
        self.steps_per_block = maximization_epochs * self._whole_updates(self.block_size)
        self.maximization_epochs = maximization_epochs
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the questions for the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(self.num_micro_batches, self.block_size)
        return full * self.steps_per_block + self.maximization_epochs * self._whole_updates(rest)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_questions, generator=generator).tolist()
        size = self.global_batch_size
        batches = [order[i * size : (i + 1) * size] for i in range(self.num_micro_batches)]
        blocks = [batches[i : i + self.block_size] for i in range(0, len(batches), self.block_size)]
        dealt = [[self._deal(rows) for rows in block] for block in blocks]
        steps: list[tuple[int, int | None]] = []  # block and position
        for i, block in enumerate(blocks):
            # Fillers come first: gradients are exchanged and the optimizer steps after the last.
            fillers = [None] * (self._whole_updates(len(block)) - len(block))
            steps += [(i, position) for position in (*fillers, *range(len(block)))] * self.maximization_epochs
        for start in range(0, len(steps), self.gradient_accumulation_steps):
            update = steps[start : start + self.gradient_accumulation_steps]
            questions = sum(len(blocks[i][position]) for i, position in update if position is not None)
            for i, position in update:
                index = self.epoch * len(blocks) + i
                filler = position is None
                yield [MicroBatch([] if filler else dealt[i], index, position or 0, questions / self.world_size)]

    def _whole_updates(self, micro_batches: int) -> int:
        return -(-micro_batches // self.granularity) * self.granularity

    def _deal(self, rows: list[int]) -> QuestionBatch:
        surplus = -len(rows) % self.world_size
        dealt = [*rows, *(rows * self.world_size)[:surplus]]
        counted = [True] * len(rows) + [False] * surplus
        mine = slice(self.rank, None, self.world_size)
        return QuestionBatch(dealt[mine], counted[mine])


class EstimationDataLoader(DataLoader):
    """Data loader over an [`EstimationSampler`]; there is nothing to load, as the trainer reads the rows itself."""

    def __init__(self, sampler: EstimationSampler):
        super().__init__(_PassThrough(sampler.num_questions), batch_sampler=sampler, collate_fn=_only)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


class _PassThrough(Dataset):
    """Hands the sampler's keys through; its length is the number of questions."""

    def __init__(self, num_questions: int):
        self.num_questions = num_questions

    def __len__(self) -> int:
        return self.num_questions

    def __getitem__(self, key: MicroBatch) -> MicroBatch:
        return key


def _only(batch: list[MicroBatch]) -> MicroBatch:
    return batch[0]
