# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""A run: alone in its folder, known by its settings and data, stopped between two updates, and resumed from a whole
checkpoint of its own."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from ..data.storage import alone_in, different, write_whole
from .checkpoint import (
    StopOnSignal,
    find_checkpoints,
    find_damage,
    put_in_place,
    remove_leftovers,
    staging_folder,
)
from .logs import show_readable_logs


logger = get_logger(__name__)

RUN_FILE = "run.json"

Identity = dict[str, Any]


class RunTrainer(Trainer):
    """
    Trainer whose checkpoints are whole or not there, and are resumed by the run that wrote them and by no other. A
    run is what one call of `train` begins and resumed ones continue. Each checkpoint, and `run.json` in the output
    folder, has its key and what must not change in it.
    """

    weights_in: Sequence[str]
    """Folders of a checkpoint that hold weights."""
    how_to_resume: str
    """What a user does to go on after a stop."""

    def __init__(self, *args: Any, **kwargs: Any):
        self._staging: Path | None = None
        self._run: dict[str, Any] = {}
        super().__init__(*args, **kwargs)
        self._stop = StopOnSignal(self.accelerator)
        self.add_callback(self._stop)
        show_readable_logs(self)

    def identity(self) -> Identity:
        """What must be the same for a checkpoint to be continued: plain values, and keys of content."""
        raise NotImplementedError

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        Trains, see [`~transformers.Trainer.train`]. `resume_from_checkpoint=True` takes the newest checkpoint of this
        run that is whole. SIGTERM or Ctrl-C ends training after the current update with a checkpoint and exits.

        Raises:
            `ValueError`: another process trains into the folder, or the checkpoint to resume from is missing, damaged
                or another run's.
            `SystemExit`: the process was asked to stop, and its checkpoint is saved.
        """
        writes, folder = self.args.should_save, str(self.args.output_dir)
        with alone_in(folder) if writes else contextlib.nullcontext():
            if writes:
                remove_leftovers(folder)
            identity = json.loads(json.dumps(self.identity(), default=str))
            earlier: dict[str, Any] = {}
            if resume_from_checkpoint:
                resume_from_checkpoint = self._whole_checkpoint(resume_from_checkpoint, identity)
                self._refuse_different_checkpoints(resume_from_checkpoint)
                earlier = read_run(resume_from_checkpoint)
            elif writes and (others := find_checkpoints(folder)):
                logger.warning(
                    f"{folder} has checkpoints of an earlier run ({others[0].name}): this one starts "
                    "anew, replaces those of the same update, and is not resumed from the others."
                )
            self._run = {"run": earlier.get("run") or secrets.token_hex(8), **identity}
            if writes:
                self._write_run(Path(folder))
            with self._stop.installed():
                output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        if self._stop.received is not None:  # after the last update: nothing is left to stop here
            os.kill(os.getpid(), self._stop.received)
        return output

    def _write_run(self, folder: Path, **more: Any) -> None:
        write_whole(folder / RUN_FILE, json.dumps(self._run | more, indent=2, ensure_ascii=False) + "\n")

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Trainer looks at max_steps after an update only, and so makes one too many when nothing is left to do.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def finish(self) -> None:
        """Notes in `run.json` that the run is done and its weights are saved."""
        if self.args.should_save:
            self._write_run(Path(str(self.args.output_dir)), finished=True)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        stopped_by = self._stop.agreed
        if stopped_by is None:
            return super()._finalize_training(trial, num_train_samples, start_time)
        # Trainer would now load the best checkpoint, and remove the one just saved if only the best is kept.
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self._finish_current_push()
        if self.is_world_process_zero():
            print(
                f"Stopped by {stopped_by.name} after update {self.state.global_step}. The checkpoint is in "
                f"{self.args.output_dir}: {self.how_to_resume}.",
                flush=True,
            )
        # A launcher signals the other processes as soon as one exits.
        self.accelerator.wait_for_everyone()
        raise SystemExit(128 + int(stopped_by))

    def _whole_checkpoint(self, resume_from_checkpoint: str | bool, identity: Identity) -> str:
        if isinstance(resume_from_checkpoint, str):
            if damage := find_damage(resume_from_checkpoint, self.weights_in):
                raise ValueError(f"cannot resume from {resume_from_checkpoint}: {damage}; name an older checkpoint")
            self._refuse_another_run(resume_from_checkpoint, identity)
            return resume_from_checkpoint
        for checkpoint in checkpoints_of_run(str(self.args.output_dir)):
            damage = find_damage(checkpoint, self.weights_in)
            if damage is None:
                self._refuse_another_run(str(checkpoint), identity)
                return str(checkpoint)
            logger.warning(f"{checkpoint} is passed over: {damage}.")
        raise ValueError(
            f"{self.args.output_dir} has no whole checkpoint to resume from: train without resume_from_checkpoint"
        )

    def _refuse_different_checkpoints(self, checkpoint: str) -> None:
        """Machines without a disk in common may hold the checkpoints of different runs."""
        found = sorted(set(gather_object([f"{Path(checkpoint).name} of run {read_run(checkpoint).get('run')}"])))
        if len(found) > 1:
            raise ValueError(
                f"processes found different checkpoints ({', '.join(found)}): put {self.args.output_dir} on a disk "
                "that all machines share"
            )

    def _refuse_another_run(self, checkpoint: str, identity: Identity) -> None:
        before = read_run(checkpoint)
        known = before.keys() & identity.keys()  # all but what another version does not know
        if difference := different({name: before[name] for name in known}, {name: identity[name] for name in known}):
            raise ValueError(
                f"cannot resume from {checkpoint}: it is of a run with {difference}; set that back, or name another "
                "output_dir to begin a new run, which can start from this one's adapters"
            )

    def _get_output_dir(self, trial: Any) -> str:
        # Trainer._save_checkpoint writes where this points: beside the run's checkpoints until all is written.
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoint = Path(super()._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = staging_folder(checkpoint)
        written = staging / checkpoint.name
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if self.state.best_model_checkpoint == str(written):
                    self.state.best_model_checkpoint = str(checkpoint)
                    self.state.save_to_json(str(written / TRAINER_STATE_NAME))
                self._write_run(written)
                put_in_place(written, checkpoint)
        except (OSError, RuntimeError, SafetensorError) as error:
            older = next((str(path) for path in find_checkpoints(checkpoint.parent)), "no older one is left")
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise OSError(
                f"checkpoint {checkpoint} could not be written ({reason}): free space or mend the disk, then resume "
                f"with resume_from_checkpoint=True (newest: {older})"
            ) from error
        finally:
            self._staging = None
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(checkpoint)
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(checkpoint.parent),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # not before the folder is in its place
            super()._push_from_checkpoint(checkpoint_folder)


def read_run(folder: str | Path) -> dict[str, Any]:
    """`run.json` of a checkpoint or an output folder; empty where there is none, or it is damaged."""
    try:
        run = json.loads((Path(folder) / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return run if isinstance(run, dict) else {}


def checkpoints_of_run(output_dir: str | Path) -> list[Path]:
    """
    Checkpoints of the run that was begun last in a folder, the newest first: not those that an earlier run left there.
    Checkpoints without `run.json`, of an earlier version, count as its own.
    """
    run = read_run(output_dir).get("run")
    return [path for path in find_checkpoints(output_dir) if run is None or read_run(path).get("run") in (None, run)]
