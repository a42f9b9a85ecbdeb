# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""What a run logged, kept in its folder while it trains, checkpoints or not, and read again for the report."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from ..data.storage import write_whole
from ..system.rag_config import CONFIG_FILE
from .checkpoint import find_checkpoints
from .logs import PERMUTATIONS_FOLDER


logger = get_logger(__name__)

LOG_FILE = "log_history.jsonl"

Logged = dict[str, Any]


class LogHistory(TrainerCallback):
    """
    Appends what is logged to `log_history.jsonl` in the output folder: quantities by name, and the update (`step`)
    they are of. Evaluations before training are update 0. A run that resumes goes on from its checkpoint's line, and
    one that starts anew replaces the file.
    """

    def __init__(self):
        self.begun = False
        self.lines: dict[tuple, Logged] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        earlier = self._earlier_lines(folder / LOG_FILE) if state.global_step > 0 else []
        # Lines of an earlier call of `train` are of other weights.
        just_logged = [] if self.begun else list(self.lines.values())
        lines = [line for line in [*earlier, *state.log_history, *just_logged] if line["step"] <= state.global_step]
        self.lines = {_key(line): line for line in sorted(lines, key=lambda line: line["step"])}
        self._write(folder)
        for path, step in permutation_files(folder):
            if step > state.global_step:
                path.unlink()
        self.begun = True

    def on_log(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        line = state.log_history[-1]
        again = _key(line) in self.lines  # the same evaluation of the same weights
        self.lines[_key(line)] = line
        if not self.begun:  # evaluating alone leaves no trace in a folder that may be another run's
            return
        if again:
            self._write(Path(args.output_dir))
        else:
            with open(Path(args.output_dir) / LOG_FILE, "a", encoding="utf-8") as file:
                file.write(_text([line]))

    def _earlier_lines(self, path: Path) -> list[Logged]:
        try:
            return read_lines(path) if path.is_file() else []
        except ValueError as error:  # training matters more
            logger.warning(f"{error}. It is replaced by the checkpoint's log.")
            return []

    def _write(self, folder: Path) -> None:
        write_whole(folder / LOG_FILE, _text(self.lines.values()))


def _key(line: Logged) -> tuple:
    """What tells an update's lines apart: training, and each evaluation set, have quantities of their own."""
    return (line["step"], *sorted(line))


def _text(lines: Iterable[Logged]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def read_lines(path: Path) -> list[Logged]:
    """
    Lines of a file of JSON objects that have a `step`. A last line that was cut off, by a kill, is left out.

    Raises:
        `ValueError`: another line is damaged.
    """
    lines = []
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            line = json.loads(text)
            if not isinstance(line["step"], int):
                raise TypeError("step is no number")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path}, line {number}, is damaged ({reason}): delete or mend the line") from None
        lines.append(line)
    return lines


def read_log_history(run: str | Path) -> list[Logged]:
    """
    What a run logged, by updates: `log_history.jsonl` or, where there is none, that of its newest checkpoint.

    Args:
        run (`str` or `Path`):
            Output folder of a trainer.

    Returns:
        `list[dict]`: quantities by name, with `step` and mostly `epoch`.

    Raises:
        `ValueError`: there is no such folder, it is no run, it has no logs yet, or a file is damaged.
    """
    run = Path(run)
    if not run.is_dir():
        raise ValueError(f"there is no folder {run}: name the output_dir of a training run")
    checkpoints = find_checkpoints(run)
    lines: list[Logged] = []
    if (run / LOG_FILE).is_file():
        lines = read_lines(run / LOG_FILE)
    elif checkpoints:
        path = checkpoints[0] / TRAINER_STATE_NAME
        try:
            lines = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged ({type(error).__name__}: {error}): remove that checkpoint, an older one will do"
            ) from None
    elif not (run / CONFIG_FILE).is_file():
        raise ValueError(
            f"{run} is not a training run: it has no {LOG_FILE}, no checkpoint and no {CONFIG_FILE}; name the "
            "output_dir of one"
        )
    if not lines:
        raise ValueError(
            f"{run} has no logs yet: the first comes after `logging_steps` updates of training ({LOG_FILE} is empty "
            "or cut short: train on)"
        )
    return lines


def permutation_files(run: Path) -> list[tuple[Path, int]]:
    """Files of saved permutations with the update each is of, in order."""
    paths = (run / PERMUTATIONS_FOLDER).glob("step-*.jsonl")
    return sorted(((path, int(path.stem.removeprefix("step-"))) for path in paths), key=lambda pair: pair[1])
