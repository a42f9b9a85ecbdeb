# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""What training two roles needs of transformers' Trainer, whatever their losses: one optimizer with a rate per role,
one exchange of gradients per step, updates that are finite, checkpoints that are whole and hold both roles, and a way
to stop between two updates."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import HubStrategy, TrainOutput
from transformers.utils import PushInProgress

from .._trl_compat import _BaseTrainer
from ..data.resumable import questions_key
from ..data.schema import validate_dataset
from ..data.storage import content_key
from ..model.rag_model import RAGModel
from ..model.roles import ROLES, Role, Roles
from ..model.self_check import check_rows
from ..system.model_card import build_model_card
from ..system.rag_config import RAGConfig
from ..system.upload import upload_checkpoint, upload_system
from .dro_config import DROConfig
from .engines import engine_of
from .log_history import LogHistory
from .logs import RunningMeans
from .run import Identity, RunTrainer


logger = get_logger(__name__)

# Training arguments that a model card lists.
_SHOWN_SETTINGS = (
    *("num_selected", "max_candidates", "num_permutations", "selector_estimator", "answer_likelihood"),
    *("steps_per_estimation", "train_selector", "train_generator", "learning_rate", "selector_learning_rate"),
    *("generator_learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs"),
    *("max_steps", "lr_scheduler_type", "seed"),
)

# What a run is known by: another value makes it another run. Others, such as its length or how a batch is spread over
# processes, may change when it is resumed.
_IDENTIFYING_SETTINGS = (
    *("num_selected", "max_candidates", "num_permutations", "selector_template", "generator_template"),
    *("max_prompt_length", "max_document_length", "answer_target", "answer_likelihood", "selector_likelihood"),
    *("selector_estimator", "temperature", "top_p", "weight_temperature", "likelihood_floor", "negligible_weight"),
    *("train_selector", "train_generator", "shuffle_candidates", "maximization_epochs", "learning_rate"),
    *("selector_learning_rate", "generator_learning_rate", "weight_decay", "max_grad_norm", "optim"),
    *("lr_scheduler_type", "seed", "data_seed", "selector_fit_questions"),
)


class RoleTrainer(RunTrainer, _BaseTrainer):
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
        self._usable_questions: float = 0  # of the update under way
        self._moved_roles: set[Role] = set()  # by its losses
        self._last_rows: list[int] = []
        self._skipped_updates = 0  # in a row
        super().__init__(model=roles.model, processing_class=tokenizers["generator"], **kwargs)
        # Asked here, because Trainer counts one where a model is spread over all.
        if self.args.n_gpu > 1:
            raise ValueError(
                "several GPUs are visible to one process: launch with `accelerate launch` or `torchrun`, or make one "
                "visible with CUDA_VISIBLE_DEVICES"
            )
        self.roles.sharded = self.engine.lockstep
        self._means = RunningMeans(self.accelerator)
        self.add_callback(LogHistory())

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.engine = engine_of(self.accelerator, self.roles)

    def _check_rows(self, rag: RAGModel) -> None:
        """
        See [`~self_check.check_rows`]. Weights that are yet to be sharded are checked where they were loaded, by the
        first process, which alone has them under FSDP's `cpu_ram_efficient_loading`; the others do as it finds.
        """
        device, found = rag.device, [self.roles.separate]
        rag.device = next(self.model.parameters()).device
        if self.accelerator.is_main_process or not self.engine.lockstep:
            check_rows(rag, self.args.shared_prefix, noiseless=self.args.disable_dropout)
        rag.device = device
        if self.engine.lockstep:
            self.roles.separate = broadcast_object_list(found)[0]

    # Data

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        if isinstance(eval_dataset, Dataset):
            validate_dataset(eval_dataset, self.args.num_selected, "eval_dataset")
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        validate_dataset(test_dataset, self.args.num_selected, "test_dataset")
        return super().get_test_dataloader(test_dataset)

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
        norm = self._check_gradients()
        return super()._clip_grad_norm(model) if norm is None else norm

    def _get_grad_norm(self, model: nn.Module, grad_norm=None):
        if grad_norm is None:  # gradients are not clipped
            grad_norm = self._check_gradients()
        return super()._get_grad_norm(model, grad_norm)

    def _check_gradients(self) -> float | None:
        """
        Logs the norm of each role's gradient, and leaves out an update that could only do harm. Returns the norm of
        all where the engine clips by itself.

        Raises:
            `RuntimeError`: a role has a loss and no gradient at all.
            `FloatingPointError`: too many updates in a row were left out.
        """
        scaler = self.accelerator.scaler  # of fp16 alone, which leaves out such updates by itself
        scale = 1.0 if scaler is None else scaler.get_scale()
        norms = {}
        for role in self.roles.trained:
            norms[role] = self.engine.norm([p for _, p in self.roles.named_parameters(role)]) / scale
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
            return self.engine.clipped(list(norms.values()))
        for role in self.roles.trained:
            self.engine.leave_out([p for _, p in self.roles.named_parameters(role)])
            self._means.add(f"{role}/grad_norm", 0.0, 0.0)
        self._skipped_updates += 1
        shown = self._question_ids(self._last_rows)
        logger.warning(f"Update {self.state.global_step + 1} left out: not finite (last questions: {shown}).")
        if self._skipped_updates >= self.args.max_skipped_updates:
            raise FloatingPointError(
                f"{self._skipped_updates} updates in a row were not finite (last questions: {shown}): lower the "
                "learning rate, check these questions, or use bf16 instead of fp16"
            )
        return self.engine.clipped(list(norms.values()))

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

    # Saving and loading

    weights_in = ROLES
    how_to_resume = "continue with resume_from_checkpoint=True"

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Trains, see [`~run.RunTrainer.train`]."""
        if self.train_dataset is None:
            raise ValueError("training needs a `train_dataset`")
        self._skipped_updates = 0
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def identity(self) -> Identity:
        """Settings that decide what is learned, the training questions, and the frozen bases."""
        settings = {name: getattr(self.args, name) for name in _IDENTIFYING_SETTINGS}
        settings = {name: value.__qualname__ if callable(value) else value for name, value in settings.items()}
        base = self._base_key()
        if self.engine.lockstep:  # the first process may be the only one that has loaded it
            base = broadcast_object_list([base])[0]
        dataset = questions_key(self.train_dataset)
        return {**settings, "train_dataset": dataset, "base": base, "engine": self.engine.name}

    def _base_key(self) -> str:
        """Key of the frozen bases, which some of their embeddings tell apart, in whatever precision they are held."""
        samples = []
        for role in ROLES:
            module = self.roles.module(role)
            if isinstance(module, PeftModel):
                base: Any = module.get_base_model()
                weight = self.engine.full(base.get_input_embeddings().weight).flatten()
                samples.append(weight[:: max(1, len(weight) // 1000)].bfloat16().float().tolist())
        return content_key(samples)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Uploads the system, see [`~upload.upload_system`] for what that is and [`~transformers.Trainer.push_to_hub`]
        for arguments; `kwargs` go to [`~RoleTrainer.create_model_card`].
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if self.hub_model_id is None:  # called though args.push_to_hub is False
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**{"model_name": str(self.hub_model_id).rpartition("/")[2], **kwargs})
        self._finish_current_push()
        revision = revision or self.args.hub_revision
        message = commit_message or "End of training"
        return upload_system(str(self.args.output_dir), str(self.hub_model_id), message, token, revision, blocking)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is not None or self.args.hub_strategy == HubStrategy.END:
            return
        state = self.engine.whole(self.roles.state_to_save())
        if not self.is_world_process_zero():
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        folder, repo, token = Path(str(self.args.output_dir)), str(self.hub_model_id), self.args.hub_token
        for role in ROLES:
            shutil.copytree(Path(checkpoint_folder) / role, folder / role, dirs_exist_ok=True)
        self._save_what_belongs_to_the_run(folder, state)
        message = f"Training in progress, step {self.state.global_step}"
        jobs = [upload_system(folder, repo, message, token, self.args.hub_revision, blocking=False)]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            every = self.args.hub_strategy == HubStrategy.ALL_CHECKPOINTS
            place = Path(checkpoint_folder).name if every else "last-checkpoint"
            revision = self.args.hub_revision
            jobs.append(upload_checkpoint(checkpoint_folder, place, repo, message, token, revision))
        if busy and self.push_in_progress is not None:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """
        Writes `selector/` and `generator/`, each loadable on its own, the tokenizers, the training arguments and what
        inference must know of them.
        """
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.roles.save(folder, state_dict)
        if folder == Path(self.args.output_dir):
            self._save_what_belongs_to_the_run(folder, state_dict)
        self.processing_class.save_pretrained(folder)
        for role in ROLES:
            self.tokenizers[role].save_pretrained(folder / role)
        self.rag_config().save(folder)
        torch.save(self.args, folder / "training_args.bin")

    def rag_config(self) -> RAGConfig:
        """What inference must know of this run."""
        return RAGConfig.of_training(self.args)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves both roles, see [`~transformers.Trainer.save_model`]; all processes must call it."""
        self._save(output_dir, self.engine.whole(self.roles.state_to_save()))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_what_belongs_to_the_run(self, folder: Path, state: dict[str, Tensor] | None) -> None:
        """Writes once, beside the checkpoints, a base that nobody else has, the last evaluation and the model card."""
        self.roles.save_unnamed_bases(folder, state)
        self.rag_config().save(folder)
        (folder / "metrics.json").write_text(json.dumps(self._last_metrics(), indent=2) + "\n", encoding="utf-8")
        self.create_model_card()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Without `total_flos`, which Trainer counts for models that it calls itself and would be 0."""
        logs.pop("total_flos", None)
        super().log(logs, start_time)

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
        self.engine.load(resume_from_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.engine.save_optimizer(self.optimizer, output_dir):
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_best_model(self) -> None:
        logger.info(f"Loading best roles from {self.state.best_model_checkpoint} (score: {self.state.best_metric}).")
        self.engine.load(self.state.best_model_checkpoint)
