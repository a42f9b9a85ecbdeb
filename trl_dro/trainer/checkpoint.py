# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Checkpoint folders that are whole or not there, and a way to stop between two updates."""

import json
import os
import re
import shutil
import signal
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..model.roles import ROLES


def find_damage(folder: str | Path, weights_in: Sequence[str] = ROLES) -> str | None:
    """
    What is wrong with a checkpoint, as far as its files tell without being read in full; `None` if nothing is.

    Args:
        folder (`str` or `Path`):
            Checkpoint.
        weights_in (`list[str]`, *optional*, defaults to both roles):
            Its folders that hold weights.

    Returns:
        `str` or `None`: one line.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    for part in weights_in:
        weights = sorted((folder / part).glob("*.safetensors"))
        if not weights:
            return f"{part}/ has no weights"
        for path in weights:
            try:
                with safe_open(path, framework="pt"):  # checks the header against the file's size
                    pass
            except (OSError, SafetensorError) as error:
                return f"{part}/{path.name} is damaged ({error})"
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{TRAINER_STATE_NAME} is damaged ({type(error).__name__}: {error})"
    # FSDP's: of one file, and of a folder with a part of each process. `latest` is DeepSpeed's, and names its folder.
    optimizers = (OPTIMIZER_NAME, "optimizer.bin", "optimizer_0/.metadata", "latest")
    if not any((folder / name).is_file() for name in optimizers):
        return f"{OPTIMIZER_NAME} is missing, as with save_only_model"
    states = sorted(folder.glob("*.pt")) + sorted(folder.glob("*.pth"))
    if (folder / "latest").is_file():
        parts = folder / (folder / "latest").read_text(encoding="utf-8").strip()
        if not any(parts.glob("*optim_states.pt")):
            return f"{parts.name} has no optimizer states"
        states += sorted(parts.glob("*.pt"))
    for path in states:
        if not zipfile.is_zipfile(path):
            return f"{path.relative_to(folder)} is damaged"
    return None


def find_checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoint folders of a run, the newest first."""
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    steps = {}
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if path.is_dir() and (match := pattern.fullmatch(path.name)):
            steps[int(match[1])] = path
    return [steps[step] for step in sorted(steps, reverse=True)]


def staging_folder(checkpoint: Path) -> Path:
    """
    Where a checkpoint is written until it is whole: beside its place, under a name that nothing takes for one and that
    is not uploaded with the folder.
    """
    return checkpoint.with_name(f"_{checkpoint.name}.partial")


def put_in_place(written: Path, checkpoint: Path) -> None:
    """Moves a whole checkpoint to its place in one step, over an older one of the same name if there is one."""
    replaced = checkpoint.with_name(f"_{checkpoint.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if checkpoint.exists():
        os.rename(checkpoint, replaced)
    os.rename(written, checkpoint)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_leftovers(output_dir: str | Path) -> None:
    """Removes what a killed run left of an unfinished checkpoint, and puts back one that was about to be replaced."""
    for path in Path(output_dir).glob(f"_{PREFIX_CHECKPOINT_DIR}-*.replaced"):
        checkpoint = path.with_name(path.name.removeprefix("_").removesuffix(".replaced"))
        if not checkpoint.exists():
            os.rename(path, checkpoint)
    for path in Path(output_dir).glob(f"_{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(path, ignore_errors=True)


class StopOnSignal(TrainerCallback):
    """
    Ends training after the current update, with a checkpoint, when the process is asked to stop (SIGTERM, Ctrl-C). A
    second signal, a second or more later, ends the process at once.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Processes that stop together, though the signal reaches them at different times.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received: signal.Signals | None = None
        self.agreed: signal.Signals | None = None  # what all processes stop for
        self.received_at = 0.0  # seconds of the monotonic clock
        self.under_way = "this update"

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handles the signals in this block. Only the main thread can, so elsewhere nothing is handled."""
        self.received = self.agreed = None
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        if self.received is not None:
            # Schedulers signal a launcher and its processes, which the launcher then signals too: that is still once.
            if time.monotonic() - self.received_at > 1.0:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.received, self.received_at = signal.Signals(number), time.monotonic()
        # os.write, because a print that was interrupted by the signal cannot be entered again.
        message = f"{self.received.name}: saving a checkpoint after {self.under_way}; again to exit at once."
        os.write(2, f"\n{message}\n".encode())

    def on_step_begin(self, args, state, control, **kwargs):
        self.under_way = f"update {state.global_step + 1} of {state.max_steps}"

    def on_step_end(self, args, state, control, **kwargs):
        agreed = self.received
        if self.accelerator.num_processes > 1:
            number = torch.tensor(self.received or 0, device=self.accelerator.device)
            highest = int(self.accelerator.gather(number.reshape(1)).max())
            agreed = signal.Signals(highest) if highest else None
        if agreed is not None:
            self.received = self.agreed = agreed
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True
