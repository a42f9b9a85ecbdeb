# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import math
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy
import torch
from accelerate.utils import broadcast_object_list, set_seed
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from ..evaluation.scoring import answer_and_score, score_bounds
from ..model.likelihood import chunk_rows
from ..model.prompts import question_text
from ..model.rag_model import RAGModel
from ..model.roles import ROLES, Role
from ..model.sampling import PermutationSamples
from ..model.shared_prefix import ReadPrompts, TokenCount
from ..system.rag_config import RAGConfig
from .dro_config import DROConfig
from .estimation import Estimate, Weights, draw, load_estimates, reordered, save_estimates, significant_permutations
from .fitting import ScoreWeights, fit_selector, fitting_rows, saved_weights
from .inputs import check_inputs, load_roles, own_scores, refuse_arguments, refuse_unsupported
from .logs import keep_permutations, permutation_rows, warn_of_collapse
from .role_trainer import RoleTrainer
from .schedule import EstimationDataLoader, EstimationSampler, MicroBatch, QuestionBatch


class DROTrainer(RoleTrainer):
    r"""
    Trainer for Direct Retrieval-augmented Optimization (DRO), introduced in [Direct Retrieval-augmented Optimization:
    Synergizing Knowledge Selection and Language Models](https://huggingface.co/papers/2505.03075).

    A selector picks an ordered list of documents, a generator answers from it, and both are trained on the likelihood
    of the right answer by expectation maximisation: the E-step samples permutations from the selector and weighs each
    by the answer's likelihood under the generator; the M-step raises the weighted log-likelihoods of the permutations
    (selector) and of the answer (generator).

    Example:

    ```python
    from datasets import load_from_disk
    from peft import LoraConfig
    from trl_dro import DROConfig, DROTrainer

    trainer = DROTrainer(
        model="meta-llama/Meta-Llama-3-8B-Instruct",
        args=DROConfig(output_dir="llama3-dro"),
        train_dataset=load_from_disk("nq-top20/train"),  # question, answers, documents
        peft_config=LoraConfig(task_type="CAUSAL_LM"),
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Base model of both roles, or of the generator when `selector_model` is given: a model id or folder, or an
            instance. A [`~peft.PeftModel`] must have exactly the adapters `selector` and `generator`.
        args ([`DROConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        train_dataset ([`~datasets.Dataset`]):
            Questions with the columns `question`, `answers` and `documents`; see [`~data.schema`].
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Questions for evaluation, in the same form.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. If `None`, the model's own is loaded.
        peft_config ([`~peft.PeftConfig`] or `dict[str, PeftConfig]`, *optional*):
            Adapter of each role, one config for both or `{"selector": …, "generator": …}`. If `None`, the roles are
            two full models.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization of models given by id or folder; needs `peft_config`.
        selector_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Base model of the selector, when it is not the generator's.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            Callbacks added to the default ones.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler to use instead of AdamW and a linear schedule.
        compute_metrics (`Callable[[list[str], list[dict]], dict[str, float]]`, *optional*):
            Scores of your own beside `em` and the others: takes the answer to each question of an evaluation and the
            questions as they are in the dataset, and returns numbers by name, logged as `eval_{name}`.
        unsupported:
            Other arguments of [`~transformers.Trainer`], refused with the reason.

    Raises:
        `DatasetError`: a dataset is malformed; the message names row, column and cure.
        `ValueError`: settings that cannot work together, or prompts that cannot fit. Like the former, before any model
            is loaded.
    """

    loss_is_scaled_for_ga = False

    _tag_names = ["trl", "dro"]
    _name = "DRO"
    _paper = {
        "title": "Direct Retrieval-augmented Optimization: Synergizing Knowledge Selection and Language Models",
        "id": "2505.03075",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{shi2025direct,
                title  = {{Direct Retrieval-augmented Optimization:
                          Synergizing Knowledge Selection and Language Models}},
                author = {Shi, Zhengliang and others},
                year   = 2025,
                eprint = {arXiv:2505.03075},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: DROConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | dict[str, PeftConfig] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        selector_model: str | PreTrainedModel | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        compute_metrics: Callable[[list[str], list[dict[str, Any]]], dict[str, float]] | None = None,
        **unsupported: Any,
    ):
        refuse_arguments(unsupported, args, callbacks, compute_metrics)
        if args is None:
            args = DROConfig("dro-output")
        if quantization_config is not None and peft_config is None:
            raise ValueError(
                "quantized weights cannot be trained: pass `peft_config` along with `quantization_config`"
            )

        refuse_unsupported(args)
        # Whatever can be wrong is found before weights are loaded.
        data = (train_dataset, eval_dataset)
        tokenizers, codec, prompts = check_inputs(model, selector_model, processing_class, args, *data)

        self._estimates: list[list[Estimate]] = []  # of the block under way, by micro-batch and part of it
        self._estimated_block = -1
        self._shown_permutations: list[dict[str, Any]] = []
        self._collapse_warned = self._selector_is_to_fit = False

        super().__init__(
            load_roles(model, selector_model, args, peft_config, quantization_config),
            tokenizers,
            args=args,
            data_collator=list,  # a batch of evaluation questions is a list of records
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
            compute_metrics=compute_metrics,
        )
        settings = RAGConfig.of_training(args).selector() | {"negligible_weight": args.negligible_weight}
        limit = args.max_tokens_per_forward
        self.rag = RAGModel(self.roles, tokenizers, prompts, codec, args.device, limit, **settings)
        self._check_rows(self.rag)
        # Permutations are drawn from seeds of their own; dropout, if there is any, must differ between processes.
        set_seed(args.seed, device_specific=True)

    # Data

    def get_train_dataloader(self) -> EstimationDataLoader:
        if self.train_dataset is None:
            raise ValueError("training needs a `train_dataset`")
        args, drop_last = self.args, self.args.dataloader_drop_last
        # Estimates of an earlier call of `train` are stale, though its blocks count from 0 too.
        self._estimates, self._estimated_block = [], -1
        self._selector_is_to_fit = args.selector_fit_questions > 0
        seed = args.seed if args.data_seed is None else args.data_seed
        passes = (args.steps_per_estimation, args.maximization_epochs, args.gradient_accumulation_steps)
        sizes = (len(self.train_dataset), self._train_batch_size, *passes)
        processes = {"rank": args.process_index, "world_size": args.world_size}
        return EstimationDataLoader(EstimationSampler(*sizes, drop_last=drop_last, seed=seed, **processes))

    def _records(self, rows: list[int]) -> list[dict[str, Any]]:
        return [self._with_candidates(self.train_dataset[row]) for row in rows]

    def _with_candidates(self, record: dict[str, Any]) -> dict[str, Any]:
        return {**record, "documents": record["documents"][: self.args.max_candidates]}

    # Expectation maximisation

    def training_step(
        self, model: nn.Module, inputs: MicroBatch, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        with self._memory_advice():
            if self._selector_is_to_fit:
                self._fit_selector()
            model.train()
            return self._em_step(model, inputs)

    def _fit_selector(self) -> None:
        """Fits what the logits of documents are made of, before the first update, see [`~fitting.fit_selector`]."""
        rows = fitting_rows(self.args, len(self.train_dataset))
        with self._inference(), self.engine.gathered(*ROLES):
            weights = fit_selector(self.rag, self._records(rows), self.args)
        self._take_fitted(broadcast_object_list([weights])[0])  # processes may round differently
        self.log({f"selector/{name}": value for name, value in weights._asdict().items()})

    def _take_fitted(self, weights: ScoreWeights) -> None:
        self.rag.query_likelihood_scale, self.rag.retriever_prior = weights
        self._selector_is_to_fit, self.rag.count = False, TokenCount()

    def _em_step(self, model: nn.Module, inputs: MicroBatch) -> Tensor:
        """
        E-step, unless that of the block serves this micro-batch too, and M-step. Returns the micro-batch's share of
        the update's loss, which is the sum of both roles'.
        """
        loss = torch.zeros((), device=self.args.device)
        if not inputs.block:  # a filler
            return loss
        parts = self._split(inputs.block[inputs.position])
        self._shown_permutations = []
        seconds = {"e_step": 0.0, "m_step": 0.0}
        for number, part in enumerate(parts, start=1):
            start = time.perf_counter()
            if self._estimates_serve_once:
                estimate = self._estimate(part, inputs.block_index)
            else:
                estimate = self._block_estimates(inputs)[number - 1]
            middle = time.perf_counter()
            loss += self._maximization_step(model, estimate, inputs.update_size, last=number == len(parts))
            seconds["e_step"] += middle - start
            seconds["m_step"] += time.perf_counter() - middle
        self._means.add_speed(seconds, self.rag.count)
        self.rag.count = TokenCount()
        return loss

    def _split(self, batch: QuestionBatch) -> list[QuestionBatch]:
        """Parts with questions of similar length, each of which goes through a model at once."""
        if self.args.max_tokens_per_forward is None:
            return [batch]
        lengths = self.rag.question_lengths(self._records(batch.rows), self.args.num_permutations)
        return self.engine.level(batch.split(chunk_rows(lengths, self.args.max_tokens_per_forward)))

    @property
    def _estimates_serve_once(self) -> bool:
        """Whether each E-step serves one micro-batch once, so that the M-step has the weights it was made with."""
        return self.args.steps_per_estimation == self.args.maximization_epochs == 1

    def _block_estimates(self, inputs: MicroBatch) -> list[Estimate]:
        """Estimates of the micro-batch's parts, made for its whole block when they are not there yet."""
        # A checkpoint's estimates are of no use to another batch size or number of processes.
        estimated = [[row for part in parts for row in part.batch.rows] for parts in self._estimates]
        block = [[row for part in self._split(batch) for row in part.rows] for batch in inputs.block]
        if self.engine.any(inputs.block_index != self._estimated_block or block != estimated):
            show = len(block) > 1 and self.is_world_process_zero() and not self.args.disable_tqdm
            self._estimates = [
                [self._estimate(part, inputs.block_index) for part in self._split(batch)]
                for batch in tqdm(inputs.block, desc="E-step", leave=False, disable=not show)
            ]
            self._estimated_block = inputs.block_index
        return self._estimates[inputs.position]

    def _estimate(self, batch: QuestionBatch, block_index: int) -> Estimate:
        """The E-step: samples permutations for every question and scores its answer under each (equations 4 to 7)."""
        args = self.args
        records = self._records(batch.rows)
        keys = [f"{args.seed}, block {block_index}, row {row}" for row in batch.rows]
        orders, targets, seeds = draw(records, keys, args.shuffle_candidates, args.answer_target)
        questions = reordered(records, orders)
        # The M-step of the same weights goes on from the E-step's forward over the prompts. Checkpointing keeps none.
        read = None
        same_weights = self._estimates_serve_once and args.train_selector and args.disable_dropout
        if same_weights and self.rag.keeps_prompts(self.model_wrapped):
            with self._inference(gradients=True):
                read = self.rag.read(questions)
        with self._inference():
            samples = self._sample(questions, args.temperature, args.top_p, seeds, read)
            estimate = Estimate(batch, orders, targets, samples, read=read)
            # When an estimate serves one update, the generator's loss forward is its scoring forward too: the M-step
            # fills `answer_logps`. Not if that forward is to be over significant permutations only.
            if not (self._estimates_serve_once and args.train_generator) or args.negligible_weight > 0:
                with self.engine.gathered("generator"):
                    estimate.answer_logps = self._answer_logps(questions, targets, samples.permutations)
        if args.negligible_weight > 0 and args.train_generator:
            weights = self._weigh(estimate).importance
            estimate.significant = significant_permutations(samples.permutations, weights, args.negligible_weight)
        return estimate

    def _maximization_step(self, model: nn.Module, estimate: Estimate, update_size: float, last: bool) -> Tensor:
        """
        Forward and backward of both weighted losses (equations 8 to 13), one role after the other; returns their sum.
        Each backward ends before the other role's forward, as checkpointed layers are recomputed with the adapter that
        is active at that time. The generator is first: its forward may be the one that `estimate.answer_logps`, and
        with it the selector's coefficients, come from.
        """
        self._last_rows = estimate.batch.rows
        questions = reordered(self._records(estimate.batch.rows), estimate.orders)
        loss = torch.zeros((), device=self.args.device)
        if self.args.train_generator:
            last_backward = last and not self.args.train_selector
            loss += self._update("generator", model, estimate, questions, update_size, last_backward)
        if self.args.train_selector:
            loss += self._update("selector", model, estimate, questions, update_size, last)
        self._log_estimate(estimate, questions)
        return loss

    def _update(
        self,
        role: Role,
        model: nn.Module,
        estimate: Estimate,
        questions: list[dict[str, Any]],
        update_size: float,
        last: bool,
    ) -> Tensor:
        """
        One role's loss: minus the weighted log-probabilities, summed over permutations and divided by the questions of
        the whole update, over all micro-batches and processes. Leaves its gradient and returns the loss, in nats.
        """
        rows = list(range(len(questions)))
        with self.engine.synced_backward(model, last):
            logps = self._loss_forward(role, estimate, questions, rows, model)
            if estimate.answer_logps is None:  # these are the generator's, of the very weights that the E-step has
                estimate.answer_logps = logps.detach()
            moved = role == "selector" and not self._estimates_serve_once
            weights = self._weigh(estimate, logps.detach() if moved else None)
            coefficients = weights.generator if role == "generator" else weights.selector
            counted = weights.usable & estimate.counted
            broken = logps.isnan().any(dim=-1)
            if broken.any():
                # Even with a weight of zero a NaN would reach every gradient: once more, without its questions.
                self._warn_of_unusable(~(broken & weights.usable))
            if broken.any() and self.engine.lockstep:
                self._usable_questions = -math.inf  # other processes would wait: the update is left out by all
            elif broken.any():
                rows = (counted & ~broken).nonzero().flatten().tolist()
                coefficients, counted = coefficients[rows], counted[rows]
                logps = self._loss_forward(role, estimate, questions, rows)
            self._usable_questions += int(counted.sum())
            kept = counted.unsqueeze(-1) & logps.isfinite()
            terms = self._note_terms(role, coefficients * torch.where(kept, logps, 0.0))
            loss = -terms.sum() / update_size
            self.engine.backward(loss)
        # Shares add up to 1 over an update's parts, micro-batches and, on average, processes.
        self._means.add(f"{role}/loss", loss, sum(estimate.batch.counted) / update_size)
        return loss.detach()

    def _loss_forward(
        self,
        role: Role,
        estimate: Estimate,
        questions: list[dict[str, Any]],
        rows: list[int],
        wrapped: nn.Module | None = None,
    ) -> Tensor:
        """What the role's loss weighs, for rows of the micro-batch: log p(z|x) or log p(y|x, d_z), `(rows, m)`."""
        chosen = [questions[row] for row in rows]
        with self.compute_loss_context_manager():
            if not rows:
                return self._zero(role).expand(0, 1)
            if role == "selector":
                # The graph that `read` brings from the E-step is the selector's: nothing that the generator did since
                # has touched it. It is of all questions, and ends with its one backward.
                read = estimate.read if len(rows) == len(questions) else None
                estimate.read = None
                likelihood, permutations = self.args.selector_likelihood, estimate.samples.permutations[rows]
                return self.rag.permutation_logps(chosen, permutations, likelihood, wrapped, read)
            targets = [estimate.targets[row] for row in rows]
            if estimate.significant is None:
                return self._answer_logps(chosen, targets, estimate.samples.permutations[rows], wrapped)
            permutations, kept = (tensor[rows] for tensor in estimate.significant)
            logps = self._answer_logps(chosen, targets, permutations, wrapped)
            return torch.where(kept, logps, estimate.answer_logps[rows])

    def _weigh(self, estimate: Estimate, selector_logps: Tensor | None = None) -> Weights:
        a = self.args
        settings = (a.selector_estimator, a.weight_temperature, a.likelihood_floor)
        return estimate.weigh(*settings, selector_logps, a.document_cost)

    def _sample(
        self,
        questions: list[dict[str, Any]],
        temperature: float,
        top_p: float,
        seeds: list[int],
        read: ReadPrompts | None = None,
    ) -> PermutationSamples:
        """Permutations of the selector, with log p(z|x) in the likelihood that its loss has."""
        how: dict[str, Any] = {"seeds": seeds, "read": read, "sampling": self.args.sampling}
        likelihood = self.args.selector_likelihood
        with self.engine.gathered("selector"):
            samples = self.rag.sample(questions, self.args.num_permutations, temperature, top_p, **how)
            if likelihood != "constrained":
                logps = self.rag.permutation_logps(questions, samples.permutations, likelihood, read=read)
                samples = samples._replace(logps=logps)
        return samples

    def _answer_logps(
        self, questions: list[dict[str, Any]], targets: list[list[str]], permutations: Tensor, wrapped=None
    ) -> Tensor:
        mean = self.args.answer_likelihood == "mean"
        return self.rag.answer_logps(questions, targets, permutations, mean, wrapped)

    # Logs

    def _log_estimate(self, estimate: Estimate, questions: list[dict[str, Any]]) -> None:
        weights = self._weigh(estimate)
        if not weights.usable.all():
            self._warn_of_unusable(weights.usable)
        settings = (self.args.tiny_likelihood, self.args.sampling, self.rag.codec.may_end)
        for name, values in estimate.statistics(weights, *settings).items():
            self._means.add_all(name, values)
        scored = (estimate.targets, estimate.samples, estimate.answer_logps, weights.generator)
        self._shown_permutations += permutation_rows(self.state.global_step + 1, questions, *scored)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last log, over all processes, to a log of training."""
        if "loss" in logs:
            means = self._means.pop()
            logs.update(means)
            # With few documents there are fewer permutations than samples.
            most = min(self.args.num_permutations, self.rag.codec.num_permutations(self.args.max_candidates))
            unique = means.get("expected_unique", means.get("unique_permutations", math.inf))
            if unique / most < self.args.collapse_threshold and not self._collapse_warned:
                self._collapse_warned = True
                warn_of_collapse(unique / most, self.state.global_step)
            if self._shown_permutations and self.is_world_process_zero():
                a, shown = self.args, self._shown_permutations
                keep_permutations(shown, a.num_permutations, a.log_permutations, a.output_dir, a.report_to)
        super().log(logs, start_time)

    # Evaluation

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """
        Selects and answers, and scores both: `em`, `f1`, `contains`, `recall@k` of the selector and
        the retriever, and over `num_permutations` sampled permutations `elbo`, `iwae_bound` and `loss`, which
        is minus the IWAE bound of the first answer. A question's draws are the same at every evaluation.
        """
        self.callback_handler.eval_dataloader = dataloader
        self.engine.before_evaluation(self)
        scores: list[Tensor] = []
        names, answers = list[str](), list[str]()
        with self._memory_advice(), self._inference(), self.engine.gathered(*ROLES):
            for records in dataloader:
                batch_answers, batch_scores = self._score_batch([self._with_candidates(record) for record in records])
                names = list(batch_scores)
                answers += self.accelerator.gather_for_metrics(batch_answers, use_gather_object=True)
                # Cuts off the rows that were repeated to give every process as many.
                scores.append(self.accelerator.gather_for_metrics(torch.stack(list(batch_scores.values()), dim=-1)))
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        self.rag.count = TokenCount()
        per_question = torch.cat(scores)  # [questions, metrics], NaN where a bound is not finite
        means = dict(zip(names, per_question.nanmean(dim=0).tolist(), strict=True))
        if self.compute_metrics is not None:
            score, questions = cast(Any, self.compute_metrics), cast(Dataset, dataloader.dataset)
            means |= own_scores(score(answers, questions.to_list()), means)
        metrics = {f"{metric_key_prefix}_{name}": mean for name, mean in means.items()}
        return EvalLoopOutput(numpy.array(answers), None, metrics, num_samples=len(per_question))

    def _score_batch(self, questions: list[dict[str, Any]]) -> tuple[list[str], dict[str, Tensor]]:
        """Answer of each question, and its scores by name, each of shape `(B,)`."""
        length, num_answers = self.args.max_answer_length, self.args.answer_permutations
        answers, scores = answer_and_score(self.rag, questions, length, num_answers)
        keys = [f"{self.args.seed}, {question_text(question['question'])}" for question in questions]
        _, targets, seeds = draw(questions, keys, shuffle_candidates=False, answer_target="first")
        samples = self._sample(questions, temperature=1.0, top_p=1.0, seeds=seeds)
        answer_logps = self._answer_logps(questions, targets, samples.permutations)
        return answers, scores | score_bounds(answer_logps, samples.correction, self.args.sampling)

    # What a run that resumes needs: the fitted weights, and in the middle of a block its E-step

    def rag_config(self) -> RAGConfig:
        return replace(super().rag_config(), **{name: getattr(self.rag, name) for name in ScoreWeights._fields})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # With every engine, before evaluation and where no update is left, too.
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._selector_is_to_fit:
            self._take_fitted(saved_weights(checkpoint))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.args.steps_per_estimation != 1 or self.args.maximization_epochs != 1:
            save_estimates(self._estimated_block, self._estimates, self._estimates_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and (path := self._estimates_file(checkpoint)).is_file():
            self._estimated_block, self._estimates = load_estimates(path, self.args.device)

    def _estimates_file(self, folder: str) -> Path:
        return Path(folder) / f"estimates_{self.args.process_index}.pt"
