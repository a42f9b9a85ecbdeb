# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import math
import pickle
from dataclasses import dataclass, field
from typing import Any, get_args

import torch

from .._trl_compat import _BaseConfig
from ..model.importance import Sampling, SelectorEstimator
from ..model.permutation import PriorSource, SelectorLikelihood
from ..model.prompts import GENERATOR_TEMPLATE, SELECTOR_TEMPLATE, check_template
from ..model.query_likelihood import SelectorForm
from ..model.self_check import SharedPrefix
from .combinations import check_combinations
from .estimation import AnswerTarget
from .ranges import check_numbers, check_types


_CHOICES = {
    "answer_likelihood": ["sum", "mean"],
    "answer_target": list(get_args(AnswerTarget)),
    "retriever_prior_from": list(get_args(PriorSource)),
    "sampling": list(get_args(Sampling)),
    "selector_form": list(get_args(SelectorForm)),
    "selector_estimator": list(get_args(SelectorEstimator)),
    "selector_likelihood": list(get_args(SelectorLikelihood)),
    "shared_prefix": list(get_args(SharedPrefix)),
}


@dataclass
class DROConfig(_BaseConfig):
    r"""
    Configuration class for the [`DROTrainer`].

    This class includes only the parameters that are specific to DRO training. For a full list of training arguments,
    please refer to the [`~transformers.TrainingArguments`] documentation. Defaults follow the paper where it gives
    them ([Direct Retrieval-augmented Optimization](https://huggingface.co/papers/2505.03075)). One example of a batch
    is one question: `per_device_train_batch_size` counts questions, each with `num_permutations` permutations.

    Parameters:
        > Parameters that control the models

        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for [`~transformers.AutoModelForCausalLM.from_pretrained`], used when `model` or
            `selector_model` is given as a string.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to load models and tokenizers that ship custom Python code from the Hub.
        shared_prefix (`str`, *optional*, defaults to `"auto"`):
            Whether permutations share their prompt's tokens, which makes an update several times as fast. At the start
            every model is tried on a few short sequences: `"auto"` shares where that is exact and warns where it is
            not, `"always"` refuses a model for which it is not, `"never"` gives each sequence a row of its own.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Turn off all dropout, that of the adapters included. Importance weights compare likelihoods, and dropout
            would make them noise.

        > Parameters that control the prompts

        max_candidates (`int`, *optional*, defaults to `20`):
            Candidates shown to the selector, n: the first ones in retrieval order.
        num_selected (`int`, *optional*, defaults to `5`):
            Documents in a permutation, K.
        min_selected (`int`, *optional*):
            Documents from which the selector may end its permutation: then it chooses, before each further document,
            between going on and the end. `0` lets it select none. By default it selects all K.
        selector_form (`str`, *optional*, defaults to `"permutation"`):
            `"permutation"`, as in the paper: the selector reads all candidates and writes ids. `"query_likelihood"`:
            it reads each by itself, and the log-likelihood of the question behind it is its logit, which language
            models tell apart before any training.
        query_likelihood_scale (`float`, *optional*, defaults to `0.1`):
            Factor of these log-likelihoods, in nats: the greater, the surer the selector.
        retriever_prior (`float`, *optional*, defaults to `0.0`):
            Say of the retriever's ranking in the selector's choices, \\( \alpha \\): every choice's logits get
            \\( -\alpha \log \\) of the candidates' retrieval ranks, which shuffling does not change. `0` is the
            model's choice alone; the greater, the nearer to the retriever's order.
        retriever_prior_from (`str`, *optional*, defaults to `"rank"`):
            `"score"` takes the retriever's scores in place of its ranks, with \\( +\alpha \log \\) of them: every
            document must have one above 0. Scores say more than ranks, and want a greater \\( \alpha \\).
        selector_fit_questions (`int`, *optional*, defaults to `0`):
            Training questions, drawn at random, by whose answers `query_likelihood_scale` and a `retriever_prior`
            above 0 are fitted before the first update, see [`~trainer.fitting.fit_weights`]; each costs an E-step.
            `0` leaves both as they are set. With `train_selector=False` they are all that the selector learns. For
            `selector_form="query_likelihood"`.
        selector_template (`str`):
            Selector prompt: a format string with `{question}`, `{documents}` and any of `{num_documents}`,
            `{num_selected}`, `{format}`, or in Python a function of these, defined at the top level of a module.
        generator_template (`str`):
            Generator prompt, with the same fields.
        max_prompt_length (`int`, *optional*):
            Longest prompt in tokens. Documents are shortened evenly to fit. `None` takes the model's context less
            the completion.
        max_document_length (`int`, *optional*):
            Longest document in tokens, title included.
        max_answer_length (`int`, *optional*, defaults to `64`):
            Longest answer in tokens, in training and in generation. A longer target is an error (`--long_answers`).
        answer_permutations (`int`, *optional*, defaults to `1`):
            Permutations under which evaluation, and the trained system, look for an answer. `1` answers from the
            greedy permutation. More answer from each of the most probable ones, and take the answer with the greatest
            sum of \\( p(z \mid x) \, p(y \mid x, d_z) \\), the quantity that training maximises.
        shuffle_candidates (`bool`, *optional*, defaults to `True`):
            Shuffle each question's candidates in training, so that the selector cannot lean on their position. Never
            in evaluation.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for the tokenizer's chat template.

        > Parameters that control the E-step

        num_permutations (`int`, *optional*, defaults to `8`):
            Permutations sampled per question, m.
        sampling (`str`, *optional*, defaults to `"independent"`):
            How they are drawn: `"independent"` of each other, so that some are equal, or `"distinct"`, without
            replacement, by stochastic beam search. Both are corrected for in the importance weights.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the sampling. Other values are corrected for in the importance weights.
        top_p (`float`, *optional*, defaults to `1.0`):
            Nucleus of the sampling, per choice. Permutations outside the nucleus are never seen, so only part of the
            bias can be corrected.
        answer_likelihood (`str`, *optional*, defaults to `"sum"`):
            Log-likelihood of an answer as the `"sum"` of its tokens' (the paper's formula) or their `"mean"` (a
            tempered weight, as in the authors' code).
        answer_target (`str`, *optional*, defaults to `"first"`):
            Which of the `answers` is the target: the `"first"`, a `"random"` one for each E-step, or `"all"`, whose
            likelihoods are summed.
        weight_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the importance weights; above 1 flattens them.
        document_cost (`float`, *optional*, defaults to `0.0`):
            What each selected document must be worth, \\( \lambda \\) in nats: weights are multiplied by
            \\( \exp(-\lambda |z|) \\). For selectors that may end, see `min_selected`.
        steps_per_estimation (`int`, *optional*, defaults to `1`):
            Micro-batches that one E-step serves. `1` is incremental EM, with fresh samples for every step; `-1` is a
            whole epoch, the paper's Algorithm 1.

        > Parameters that control the M-step

        maximization_epochs (`int`, *optional*, defaults to `1`):
            Passes over the questions of one E-step before the next.
        selector_estimator (`str`, *optional*, defaults to `"rws_centered"`):
            Gradient estimator of the selector: `"rws"` (reweighted wake-sleep, the paper's), `"rws_centered"` (same
            expectation, less noise) or `"vimco"` (gradient of the IWAE bound).
        selector_likelihood (`str`, *optional*, defaults to `"constrained"`):
            What the selector's loss differentiates: `"constrained"` is the distribution over valid permutations that
            is sampled from; `"full_vocabulary"` the likelihood of the written tokens among all tokens, as in the
            paper, which also teaches the format to a selector that will be served by plain text generation.
        likelihood_floor (`float`, *optional*, defaults to `0.0`):
            Answer likelihood \\( f \\) from which a question counts fully. Both losses of a question are multiplied by
            \\( \bar p / (\bar p + f) \\), with \\( \bar p \\) the mean likelihood over its permutations: without it, a
            question whose answer is impossible under all of them is weighed like any other, and self-normalisation
            amplifies noise. The mean factor is logged as `question_weight`.
        max_skipped_updates (`int`, *optional*, defaults to `10`):
            Training ends with an error after this many updates in a row were left out because a gradient was not
            finite or no question had a finite likelihood.
        train_selector (`bool`, *optional*, defaults to `True`):
            Whether to train the selector. `False` is the paper's "w/o selector".
        train_generator (`bool`, *optional*, defaults to `True`):
            Whether to train the generator. `False` is the paper's "w/o generator".
        selector_learning_rate (`float`, *optional*):
            Learning rate of the selector. `None` takes `learning_rate`.
        generator_learning_rate (`float`, *optional*):
            Learning rate of the generator. `None` takes `learning_rate`.

        negligible_weight (`float`, *optional*, defaults to `0.0`):
            Share of a question's importance weight that the generator's update may leave out, lightest permutations
            first; `0` is exact. Above it all permutations are scored without gradients first, then those kept go
            forward and backward, which is faster if less than two thirds are kept (three quarters under gradient
            checkpointing). Logged as `generator/skipped_weight` and `generator/skipped_share`.
        max_tokens_per_forward (`int`, *optional*):
            Tokens, padding included, that go through a model at once, in training and in evaluation: questions of a
            micro-batch are taken in parts of similar length, the gradient being that of the whole. `None` takes the
            whole micro-batch in training; without gradients it halves what does not fit into memory.

        > Parameters that control the logging

        log_permutations (`bool`, *optional*, defaults to `False`):
            At every log print a table of a question, its permutations, their weights and the answer, keep those of
            the whole last micro-batch in `_permutations/` of the output folder, where otherwise four questions are
            kept, and send them to wandb or trackio if those are reported to.
        tiny_likelihood (`float`, *optional*, defaults to `1e-6`):
            A question whose answer is less likely than this under each of its permutations is counted in
            `tiny_likelihood_share`: it has little to teach.
        collapse_threshold (`float`, *optional*, defaults to `0.25`):
            Warn once when the share of distinct permutations among those sampled falls below this. With
            `sampling="distinct"`: the share that independent draws would be expected to have.

    > [!NOTE]
    > These defaults differ from [`~transformers.TrainingArguments`]: `learning_rate` 1e-5, `weight_decay` 0.01 and
    > `num_train_epochs` 5 are the paper's. `selector_estimator` and `steps_per_estimation` differ from the paper's for
    > reasons given in docs/how_it_works.md. `remove_unused_columns` is `False`; `bf16` is off on a machine without an
    > accelerator.
    """

    _VALID_DICT_FIELDS = _BaseConfig._VALID_DICT_FIELDS + ["model_init_kwargs", "chat_template_kwargs"]

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay for AdamW if we apply some."})
    num_train_epochs: float = field(default=5.0, metadata={"help": "Total number of training epochs to perform."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Drop dataset columns that the model's forward does not name: always False."}
    )

    # Models
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments for `from_pretrained` when a model is given as a string."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether to load models and tokenizers that ship custom Python code."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Turn off all dropout, that of the adapters included."}
    )
    shared_prefix: str = field(
        default="auto",
        metadata={
            "help": "Share a prompt's tokens between permutations: where the model is shown to be exact, always (or "
            "refuse it), or never.",
            "choices": _CHOICES["shared_prefix"],
        },
    )

    # Prompts
    max_candidates: int = field(default=20, metadata={"help": "Candidates shown to the selector, n."})
    num_selected: int = field(default=5, metadata={"help": "Documents in a permutation, K."})
    min_selected: int | None = field(
        default=None,
        metadata={"help": "Documents from which the selector may end its permutation; by default it selects all K."},
    )
    selector_form: str = field(
        default="permutation",
        metadata={
            "help": "How the selector chooses: permutation writes ids, query_likelihood scores documents.",
            "choices": _CHOICES["selector_form"],
        },
    )
    query_likelihood_scale: float = field(
        default=0.1, metadata={"help": "Factor of the question's log-likelihoods, with query_likelihood."}
    )
    retriever_prior: float = field(
        default=0.0,
        metadata={"help": "Say of the retriever's ranking in the selector's choices; 0 is the model's choice alone."},
    )
    retriever_prior_from: str = field(
        default="rank",
        metadata={
            "help": "What retriever_prior is made of, the retriever's ranks or its scores.",
            "choices": _CHOICES["retriever_prior_from"],
        },
    )
    selector_fit_questions: int = field(
        default=0,
        metadata={
            "help": "Training questions by whose answers query_likelihood_scale and retriever_prior are fitted first."
        },
    )
    selector_template: str = field(
        default=SELECTOR_TEMPLATE,
        metadata={
            "help": "Selector prompt: a format string with {question}, {documents} and any of {num_documents}, "
            "{num_selected}, {format}."
        },
    )
    generator_template: str = field(
        default=GENERATOR_TEMPLATE, metadata={"help": "Generator prompt, with the fields of the selector's."}
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest prompt in tokens; documents are shortened evenly to fit. None takes the model's context "
            "less the completion."
        },
    )
    max_document_length: int | None = field(
        default=None, metadata={"help": "Longest document in tokens, title included."}
    )
    max_answer_length: int = field(
        default=64, metadata={"help": "Longest answer in tokens, in training and in generation."}
    )
    answer_permutations: int = field(
        default=1,
        metadata={"help": "Permutations whose answers are added up when answering; 1 answers from the greedy one."},
    )
    shuffle_candidates: bool = field(
        default=True, metadata={"help": "Shuffle each question's candidates in training. Never in evaluation."}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments for the tokenizer's chat template."}
    )

    # E-step
    num_permutations: int = field(default=8, metadata={"help": "Permutations sampled per question, m."})
    sampling: str = field(
        default="independent",
        metadata={
            "help": "How permutations are drawn: independent of each other, or distinct, without replacement.",
            "choices": _CHOICES["sampling"],
        },
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Sampling temperature, corrected for in the importance weights."}
    )
    top_p: float = field(default=1.0, metadata={"help": "Nucleus of the sampling, per choice."})
    answer_likelihood: str = field(
        default="sum",
        metadata={
            "help": "Log-likelihood of an answer: sum or mean over its tokens.",
            "choices": _CHOICES["answer_likelihood"],
        },
    )
    answer_target: str = field(
        default="first",
        metadata={
            "help": "Which of the answers is the target: the first, a random one per E-step, or all of them summed.",
            "choices": _CHOICES["answer_target"],
        },
    )
    weight_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of the importance weights; above 1 flattens them."}
    )
    document_cost: float = field(
        default=0.0, metadata={"help": "Nats that each selected document must be worth, where min_selected is set."}
    )
    steps_per_estimation: int = field(
        default=1, metadata={"help": "Micro-batches that one E-step serves; -1 is a whole epoch (Algorithm 1)."}
    )

    # M-step
    maximization_epochs: int = field(
        default=1, metadata={"help": "Passes over the questions of one E-step before the next."}
    )
    selector_estimator: str = field(
        default="rws_centered",
        metadata={"help": "Gradient estimator of the selector.", "choices": _CHOICES["selector_estimator"]},
    )
    selector_likelihood: str = field(
        default="constrained",
        metadata={
            "help": "What the selector's loss differentiates: the distribution over valid permutations, or the "
            "likelihood of the written tokens among all tokens.",
            "choices": _CHOICES["selector_likelihood"],
        },
    )
    likelihood_floor: float = field(
        default=0.0,
        metadata={"help": "Answer likelihood from which a question counts fully; 0 counts every question alike."},
    )
    max_skipped_updates: int = field(
        default=10, metadata={"help": "End with an error after this many updates in a row were not finite."}
    )
    train_selector: bool = field(default=True, metadata={"help": "Whether to train the selector."})
    train_generator: bool = field(default=True, metadata={"help": "Whether to train the generator."})
    selector_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the selector; `learning_rate` if not set."}
    )
    generator_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the generator; `learning_rate` if not set."}
    )
    negligible_weight: float = field(
        default=0.0,
        metadata={"help": "Share of a question's weight that the generator's update may leave out; 0 is exact."},
    )
    max_tokens_per_forward: int | None = field(
        default=None,
        metadata={"help": "Padded tokens that go through a model at once; None takes a whole micro-batch."},
    )

    # Logging
    log_permutations: bool = field(
        default=False,
        metadata={"help": "Show permutations, their weights and answers at every log, and keep more of them."},
    )
    tiny_likelihood: float = field(
        default=1e-6,
        metadata={"help": "Answer likelihood below which a question is counted as having little to teach."},
    )
    collapse_threshold: float = field(
        default=0.25, metadata={"help": "Warn once when the share of distinct permutations falls below this."}
    )

    def __post_init__(self):
        check_types(self)
        # TRL's default of bf16 is an error on a machine without an accelerator.
        if self.bf16 is None and not torch.accelerator.is_available():
            self.bf16 = False
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is nothing to load, and torch warns
        super().__post_init__()
        self._check_ranges()
        check_combinations(self)
        if not isinstance(self.chat_template_kwargs, dict | None):
            raise ValueError(
                f'chat_template_kwargs must be a dict, as `{{"enable_thinking": false}}`, not '
                f"{self.chat_template_kwargs!r}: write one"
            )
        for name in ("selector_template", "generator_template"):
            check_template(getattr(self, name), name)
            try:
                pickle.dumps(getattr(self, name))
            except (AttributeError, pickle.PicklingError):
                raise ValueError(
                    f"{name} is a function that cannot be saved with the training arguments: define it with `def` at "
                    "the top level of a module"
                ) from None

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled, in `training_args.bin`: all but tokens."""
        kwargs = self.model_init_kwargs
        if isinstance(kwargs, dict):
            kwargs = {name: value for name, value in kwargs.items() if "token" not in name}
        return {**self.__dict__, "hub_token": None, "model_init_kwargs": kwargs}

    def to_dict(self) -> dict[str, Any]:
        """Fields as plain values, functions by their names."""
        values = super().to_dict()
        return {name: value.__qualname__ if callable(value) else value for name, value in values.items()}

    def _check_ranges(self) -> None:
        check_numbers(self)
        at_least = {
            "num_selected": 1,
            "num_permutations": 1,
            "max_answer_length": 1,
            "answer_permutations": 1,
            "maximization_epochs": 1,
            "max_skipped_updates": 1,
            "max_candidates": self.num_selected,
            "max_prompt_length": 1,
            "max_document_length": 1,
            "max_tokens_per_forward": 1,
            "selector_fit_questions": 0,
        }
        for name, lowest in at_least.items():
            if getattr(self, name) is not None and getattr(self, name) < lowest:
                hint = " (num_selected)" if name == "max_candidates" else ""
                raise ValueError(f"{name}={getattr(self, name)}: it must be at least {lowest}{hint}")
        if self.min_selected is not None and not 0 <= self.min_selected <= self.num_selected:
            raise ValueError(
                f"min_selected={self.min_selected}: it must lie between 0 and num_selected={self.num_selected}"
            )
        if not 0 <= self.document_cost < math.inf:
            raise ValueError(f"document_cost={self.document_cost}: it must be a finite number of at least 0")
        for name in ("selector_learning_rate", "generator_learning_rate", "collapse_threshold"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: it must be at least 0")
        for name in ("temperature", "weight_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: it must be above 0 (evaluation is greedy by itself)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: it must lie above 0 and not above 1")
        if not 0 <= self.likelihood_floor < 1:
            raise ValueError(f"likelihood_floor={self.likelihood_floor}: it must be at least 0 and below 1")
        for name in ("retriever_prior", "query_likelihood_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: it must be a finite number of at least 0")
        if not 0 <= self.negligible_weight < 1:
            raise ValueError(f"negligible_weight={self.negligible_weight}: it must be at least 0 and below 1")
        if not 0 < self.tiny_likelihood < 1:
            raise ValueError(f"tiny_likelihood={self.tiny_likelihood}: it must lie between 0 and 1")
        if self.steps_per_estimation < 1 and self.steps_per_estimation != -1:
            raise ValueError(
                f"steps_per_estimation={self.steps_per_estimation}: it must be at least 1, or -1 for a whole epoch"
            )
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")
