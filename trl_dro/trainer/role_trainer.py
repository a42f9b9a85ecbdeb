# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""What training two roles needs of transformers' Trainer, whatever their losses: one optimizer with a rate per role,
one exchange of gradients per step, updates that are finite, checkpoints that are whole and hold both roles, and a way
to stop between two updates."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from .._trl_compat import _BaseTrainer
from ..model.roles import ROLES, Role, Roles
from ..system.model_card import build_model_card
from ..system.rag_config import RAGConfig
from .checkpoint import (
    StopOnSignal,
    find_checkpoints,
    find_damage,
    put_in_place,
    remove_leftovers,
    staging_folder,
)
from .dro_config import DROConfig
from .log_history import LogHistory
from .logs import LogLine, LogLineAboveProgress, RunningMeans


logger = get_logger(__name__)

# Training arguments that a model card lists.
_SHOWN_SETTINGS = (
    *("num_selected", "max_candidates", "num_permutations", "selector_estimator", "answer_likelihood"),
    *("steps_per_estimation", "train_selector", "train_generator", "learning_rate", "selector_learning_rate"),
    *("generator_learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs"),
    *("max_steps", "lr_scheduler_type", "seed"),
)


class RoleTrainer(_BaseTrainer):
    """
    Trainer of a module made by [`~roles.prepare_role_model`].

    Args:
        roles ([`~roles.Roles`]):
            The two roles.
        tokenizers (`dict[str, PreTrainedTokenizerBase]`):
            Tokenizer of each role, saved beside it.
        kwargs:
            Passed to [`~transformers.Trainer`].

    Raises:
        `ValueError`: several GPUs are visible to one process.
    """

    args: DROConfig

    def __init__(self, roles: Roles, tokenizers: dict, **kwargs):
        self.roles = roles
        self.tokenizers = tokenizers
        self._usable_questions = 0  # of the update under way
        self._moved_roles: set[Role] = set()  # by its losses
        self._last_rows: list[int] = []
        self._skipped_updates = 0  # in a row
        self._staging: Path | None = None
        super().__init__(model=roles.model, processing_class=tokenizers["generator"], **kwargs)
        # Asked here, because Trainer counts one where a model is spread over all.
        if self.args.n_gpu > 1:
            raise ValueError(
                "several GPUs are visible to one process: launch with `accelerate launch` or `torchrun`, or make one "
                "visible with CUDA_VISIBLE_DEVICES"
            )
        self._means = RunningMeans(self.accelerator)
        self._stop = StopOnSignal(self.accelerator)
        self.add_callback(self._stop)
        self.add_callback(LogHistory())
        for usual, readable in ((PrinterCallback, LogLine), (ProgressCallback, LogLineAboveProgress)):
            if self.pop_callback(usual) is not None:
                self.add_callback(readable)

    # Optimization

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW or `args.optim`, with one learning rate per role."""
        if self.optimizer is None:
            optimizer_cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            decayed = set(self.get_decay_parameter_names(self.model))
            groups = []
            for role in self.roles.trained:
                rate = getattr(self.args, f"{role}_learning_rate")
                for decays in (True, False):
                    group = {
                        "params": [p for n, p in self.roles.named_parameters(role) if (n in decayed) == decays],
                        "weight_decay": self.args.weight_decay if decays else 0.0,
                        "lr": self.args.learning_rate if rate is None else rate,
                    }
                    if group["params"]:
                        groups.append(group)
            self.optimizer_cls_and_kwargs = (optimizer_cls, {**kwargs, "params": groups})
        return super().create_optimizer(model)

    def _clip_grad_norm(self, model: nn.Module):
        self._check_gradients()
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm=None):
        if grad_norm is None:  # gradients are not clipped
            self._check_gradients()
        return super()._get_grad_norm(model, grad_norm)

    def _check_gradients(self) -> None:
        """
        Logs the norm of each role's gradient, and leaves out an update that could only do harm.

        Raises:
            `RuntimeError`: a role has a loss and no gradient at all.
            `FloatingPointError`: too many updates in a row were left out.
        """
        scaler = self.accelerator.scaler  # of fp16 alone, which leaves out such updates by itself
        scale = 1.0 if scaler is None else scaler.get_scale()
        norms = {}
        for role in self.roles.trained:
            gradients = [p.grad for _, p in self.roles.named_parameters(role) if p.grad is not None]
            norms[role] = nn.utils.get_total_norm(gradients) / scale
            # In fp16 a gradient may be too small for its dtype.
            if scaler is None and role in self._moved_roles and norms[role] == 0:
                raise RuntimeError(
                    f"update {self.state.global_step + 1}: the {role} has a loss and no gradient, so that it would "
                    "never learn: its weights are frozen, quantized or not used by its forward"
                )
        self._moved_roles.clear()
        usable = torch.tensor(float(self._usable_questions), device=self.args.device)
        usable = self.accelerator.reduce(usable, reduction="sum")
        self._usable_questions = 0
        skip = not bool(usable > 0) or (scaler is None and not all(bool(norm.isfinite()) for norm in norms.values()))
        self._means.add("skipped_update_share", float(skip))
        if not skip:
            self._skipped_updates = 0
            for role, norm in norms.items():
                self._means.add(f"{role}/grad_norm", norm)
            return
        for role in self.roles.trained:
            for _, parameter in self.roles.named_parameters(role):
                parameter.grad = None  # the optimizer passes over it, momentum and weight decay included
            self._means.add(f"{role}/grad_norm", 0.0, 0.0)
        self._skipped_updates += 1
        shown = self._question_ids(self._last_rows)
        logger.warning(f"Update {self.state.global_step + 1} left out: not finite (last questions: {shown}).")
        if self._skipped_updates >= self.args.max_skipped_updates:
            raise FloatingPointError(
                f"{self._skipped_updates} updates in a row were not finite (last questions: {shown}): lower the "
                "learning rate, check these questions, or use bf16 instead of fp16"
            )

    def _note_terms(self, role: Role, terms: Tensor) -> Tensor:
        """Notes whether a role's loss has terms, weighted log-probabilities, that are not zero; returns them."""
        if bool((terms.detach().abs() > 1e-6).any()):
            self._moved_roles.add(role)
        return terms

    def _warn_of_unusable(self, usable: Tensor) -> None:
        rows = [self._last_rows[i] for i in (~usable).nonzero().flatten().tolist()]
        if rows:
            logger.warning(f"No finite likelihood for questions {self._question_ids(rows)}: left out.")

    def _question_ids(self, rows: list[int]) -> str:
        """Ids of training questions, or their rows where they have none."""
        return ", ".join(str(self.train_dataset[row].get("id", f"row {row}")) for row in rows)

    # Forward and backward

    @contextlib.contextmanager
    def _memory_advice(self) -> Iterator[None]:
        """Says which settings take how much memory, should it run out."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            args = self.args
            raise torch.OutOfMemoryError(
                f"{str(error).splitlines()[0]} A micro-batch of {args.per_device_train_batch_size} questions "
                f"({args.per_device_eval_batch_size} in evaluation) has up to {args.max_candidates} candidates and "
                f"{args.num_permutations} permutations of {args.num_selected} documents each. Lower "
                "per_device_train_batch_size and raise gradient_accumulation_steps, lower max_document_length, "
                "max_candidates or num_permutations, turn on gradient_checkpointing, or load the base in 4 bits."
            ) from error

    @contextlib.contextmanager
    def _inference(self, gradients: bool = False) -> Iterator[None]:
        """
        Evaluation mode, without gradients unless asked for; the mode from before is restored. Autocast keeps casts of
        weights till its end, those made without gradients too: never nest the two.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.set_grad_enabled(gradients), self.accelerator.autocast():
                yield
        finally:
            self.model.train(was_training)

    def _zero(self, role: Role) -> Tensor:
        """A zero that keeps the role's parameters in the graph, as other processes wait for their gradients."""
        return 0.0 * torch.stack([parameter.sum() for _, parameter in self.roles.named_parameters(role)]).sum()

    def _synced_backward(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """Gradients are averaged over processes once, in the last role's backward."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(model)

    # Saving, loading, stopping

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        Trains, see [`~transformers.Trainer.train`]. `resume_from_checkpoint=True` takes the newest checkpoint that is
        whole. SIGTERM or Ctrl-C ends training after the current update with a checkpoint and exits.

        Raises:
            `ValueError`: the checkpoint to resume from is missing or damaged.
            `SystemExit`: the process was asked to stop, and its checkpoint is saved.
        """
        if self.args.should_save:
            remove_leftovers(self.args.output_dir)
        if resume_from_checkpoint:
            resume_from_checkpoint = self._whole_checkpoint(resume_from_checkpoint)
        self._skipped_updates = 0
        with self._stop.installed():
            output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        if self._stop.received is not None:  # after the last update: nothing is left to stop here
            os.kill(os.getpid(), self._stop.received)
        return output

    def _run_epoch(self, **kwargs: Any) -> None:
        # Trainer looks at max_steps after an update only, and so makes one too many when nothing is left to do.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

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
                f"{self.args.output_dir}: continue with resume_from_checkpoint=True.",
                flush=True,
            )
        # A launcher signals the other processes as soon as one exits.
        self.accelerator.wait_for_everyone()
        raise SystemExit(128 + int(stopped_by))

    def _whole_checkpoint(self, resume_from_checkpoint: str | bool) -> str:
        if isinstance(resume_from_checkpoint, str):
            if damage := find_damage(resume_from_checkpoint):
                raise ValueError(f"cannot resume from {resume_from_checkpoint}: {damage}; name an older checkpoint")
            return resume_from_checkpoint
        for checkpoint in find_checkpoints(self.args.output_dir):
            damage = find_damage(checkpoint)
            if damage is None:
                return str(checkpoint)
            logger.warning(f"{checkpoint} is passed over: {damage}.")
        raise ValueError(
            f"{self.args.output_dir} has no whole checkpoint to resume from: train without resume_from_checkpoint"
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
        if self._staging is not None:  # not before the folder is in its place
            return
        if self.is_world_process_zero():
            # Trainer copies the files that a single model has.
            for role in ROLES:
                shutil.copytree(Path(checkpoint_folder) / role, Path(self.args.output_dir) / role, dirs_exist_ok=True)
            self._save_what_belongs_to_the_run(Path(self.args.output_dir))
        super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """
        Writes `selector/` and `generator/`, each loadable on its own, the tokenizers, the training arguments and what
        inference must know of them.
        """
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.roles.save(folder)
        if folder == Path(self.args.output_dir):
            self._save_what_belongs_to_the_run(folder)
        self.processing_class.save_pretrained(folder)
        for role in ROLES:
            self.tokenizers[role].save_pretrained(folder / role)
        RAGConfig.of_training(self.args).save(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _save_what_belongs_to_the_run(self, folder: Path) -> None:
        """Writes once, beside the checkpoints, a base that nobody else has, the last evaluation and the model card."""
        self.roles.save_unnamed_bases(folder)
        RAGConfig.of_training(self.args).save(folder)
        (folder / "metrics.json").write_text(json.dumps(self._last_metrics(), indent=2) + "\n", encoding="utf-8")
        self.create_model_card()

    def _last_metrics(self) -> dict[str, float]:
        """Metrics of the last evaluation, from 0 to 1 or in nats, by their names without prefix."""
        logged = [logs for logs in self.state.log_history if "eval_em" in logs]
        last = logged[-1] if logged else {}
        return {name.removeprefix("eval_"): value for name, value in last.items() if name.startswith("eval_")}

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """
        Writes `README.md` to the output folder: how to load the system, its last evaluation (also as model-index
        metadata), training arguments and citation.

        Args:
            model_name (`str`, *optional*):
                Name of the system; that of the output folder by default.
            dataset_name (`str`, *optional*):
                Dataset it was trained and evaluated on, e.g. its Hub id.
            tags (`str` or `list[str]`, *optional*):
                Tags to add.
        """
        if not self.is_world_process_zero():
            return
        models: list[Any] = [self.roles.module(role) for role in ROLES]
        adapters: list[Any] = [model for model in models if isinstance(model, PeftModel)]
        names: list[str] = [model.get_base_model().config.name_or_path for model in adapters]
        settings = {name: getattr(self.args, name) for name in _SHOWN_SETTINGS}
        card = build_model_card(
            name=model_name or Path(self.args.output_dir).name,
            repo_id=self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).name,
            bases=[name for name in names if name],
            adapters=bool(adapters),
            dataset_name=dataset_name,
            metrics=self._last_metrics(),
            settings=settings,
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
            paper_id=self._paper["id"],
            citation=self._paper["citation"],
        )
        card.save(Path(self.args.output_dir) / "README.md")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.roles.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        logger.info(f"Loading best roles from {self.state.best_model_checkpoint} (score: {self.state.best_metric}).")
        self.roles.load(self.state.best_model_checkpoint)
