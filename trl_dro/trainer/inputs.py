# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""A run's models, tokenizers and data by its config, and whatever can be wrong with them before weights are loaded."""

import logging
import warnings
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Literal, cast

from accelerate.utils import set_seed
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from .._trl_compat import create_model_from_path, disable_dropout_in_model, get_config_model_id
from ..data.schema import DatasetError, validate_dataset
from ..model.codec import PermutationCodec
from ..model.control_tokens import text_ids
from ..model.loading import context_length, load_tokenizer, prepare_tokenizer
from ..model.permutation import retriever_logits
from ..model.prompts import Prompts, check_lengths
from ..model.roles import ROLES, Role, Roles, cast_adapters_for_quantized_base, prepare_role_model
from ..model.shared_prefix import check_attention
from ..system.rag_config import RAGConfig
from .dro_config import DROConfig
from .engines import refuse_engines
from .zero import load_whole


logger = logging.getLogger(__name__)

LongAnswers = Literal["error", "drop", "truncate"]


def check_inputs(
    model: str | PreTrainedModel,
    selector_model: str | PreTrainedModel | None,
    processing_class: PreTrainedTokenizerBase | None,
    args: DROConfig,
    train_dataset: Dataset | None,
    eval_dataset: Dataset | dict[str, Dataset] | None,
) -> tuple[dict[Role, PreTrainedTokenizerBase], PermutationCodec, dict[Role, Prompts]]:
    """
    Tokenizers, codec and prompts of a run, and whatever can be wrong with its inputs before weights are loaded.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Base of both roles, or of the generator.
        selector_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Base of the selector alone.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer that was passed.
        args ([`DROConfig`]):
            Configuration.
        train_dataset ([`~datasets.Dataset`], *optional*):
            Questions for training; needed unless there are some for evaluation.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Questions for evaluation, whose target is the first answer.

    Returns:
        `tuple`: tokenizer of each role, codec, prompt builder of each role.

    Raises:
        `DatasetError`: a dataset is malformed.
        `ValueError`: something cannot fit, or settings cannot work together.
    """
    if args.train_selector and args.num_permutations == 1:
        warnings.warn(
            "num_permutations=1 makes every importance weight 1: the expected gradient of the selector is zero "
            "and its updates are noise at best. Set num_permutations to 2 or more, or train_selector=False.",
            stacklevel=3,
        )
    datasets: dict[str, Any] = {}  # by the names that errors call them
    if train_dataset is not None or eval_dataset is None:
        datasets["train_dataset"] = train_dataset
    if isinstance(eval_dataset, dict):
        datasets |= {f"eval_dataset[{key!r}]": dataset for key, dataset in eval_dataset.items()}
    elif eval_dataset is not None:
        datasets["eval_dataset"] = eval_dataset
    for name, dataset in datasets.items():
        validate_dataset(dataset, args.num_selected, name)
        if args.retriever_prior and args.retriever_prior_from == "score":
            check_scores(dataset, name, args.max_candidates)
    tokenizers = load_tokenizers(model, selector_model, processing_class, args)
    config = RAGConfig.of_training(args)
    codec = config.build_codec(tokenizers)
    context = context_length(model, generator_revision(args), args.trust_remote_code)
    contexts: dict[Role, int | None] = {"selector": context, "generator": context}
    if selector_model is not None:
        contexts["selector"] = context_length(selector_model, trust_remote_code=args.trust_remote_code)
    prompts = config.build_prompts(tokenizers, codec, contexts)
    shown = [(prompts["selector"], args.max_candidates), (prompts["generator"], args.num_selected)]
    for name, dataset in datasets.items():
        all_answers = args.answer_target != "first" and name == "train_dataset"
        check_lengths(dataset, name, shown, tokenizers["generator"], args.max_answer_length, all_answers)
    return tokenizers, codec, prompts


def fit_answers(
    dataset: Dataset,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    max_answer_length: int,
    long_answers: LongAnswers,
    all_answers: bool = False,
) -> Dataset:
    """
    A dataset without target answers that are too long to be learned. How many there were is said in a warning.

    Args:
        dataset (`Dataset`):
            Records.
        name (`str`):
            What messages call it.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the generator.
        max_answer_length (`int`):
            Longest answer in tokens.
        long_answers (`str`):
            `"error"` leaves them to [`~prompts.check_lengths`]. `"drop"` leaves out these answers, and questions
            without another target. `"truncate"` cuts them after the last word that fits.
        all_answers (`bool`, *optional*, defaults to `False`):
            Whether every alias is a target, not the first one alone.

    Returns:
        `Dataset`: the records in their order; other answers are as they were.

    Raises:
        `DatasetError`: a record is malformed, or none is left.
    """
    if long_answers == "error":
        return dataset
    validate_dataset(dataset, 1, name)
    answers = dataset["answers"][:]
    targets = [each if all_answers else each[:1] for each in answers]
    flat = [target for each in targets for target in each]
    lengths = iter(len(ids) for ids in text_ids(tokenizer, flat))
    rows, fitting = [], []
    num_long = 0
    for row, each in enumerate(targets):
        fits = [length <= max_answer_length for length in islice(lengths, len(each))]
        num_long += not all(fits)
        fitted = [
            target if fit else _cut_answer(target, tokenizer, max_answer_length)
            for target, fit in zip(each, fits, strict=True)
            if fit or long_answers == "truncate"
        ]
        if fitted:
            rows.append(row)
            fitting.append([*fitted, *answers[row][len(each) :]])
    if not num_long:
        return dataset
    num_lost = len(answers) - len(rows)
    done = "were cut" if long_answers == "truncate" else f"were left out, {num_lost} of them with the question"
    where = f"{name}: of {num_long} of {len(answers)} questions"
    logger.warning("%s, answers of over max_answer_length=%d tokens %s", where, max_answer_length, done)
    if not rows:
        raise DatasetError(f"{name}: no answer has as few tokens as max_answer_length={max_answer_length}; raise it")
    chosen = dataset.select(rows)
    if fitting == [answers[row] for row in rows]:
        return chosen
    return chosen.remove_columns("answers").add_column("answers", fitting, feature=dataset.features["answers"])


def _cut_answer(answer: str, tokenizer: PreTrainedTokenizerBase, most: int) -> str:
    """As many words as have no more tokens, or, if the first has, as many of its characters."""
    words = answer.split()

    def fitting(pieces: Sequence[str], join: str) -> str:
        ends = range(1, len(pieces) + 1)
        count = bisect_right(ends, most, key=lambda end: len(text_ids(tokenizer, [join.join(pieces[:end])])[0]))
        return join.join(pieces[:count])

    return fitting(words, " ") or fitting(words[0], "") or words[0][0]


def check_scores(dataset: Dataset, name: str, max_candidates: int) -> None:
    """
    Checks that the candidates have the scores of which a retriever's prior can be made.

    Args:
        dataset (`Dataset`):
            Records.
        name (`str`):
            What errors call it.
        max_candidates (`int`):
            Documents of each record that are shown, the first ones.

    Raises:
        `DatasetError`: a score is missing or not above 0; the message names the row.
    """
    for row, record in enumerate(dataset.with_format(None)):
        try:
            retriever_logits({**record, "documents": record["documents"][:max_candidates]}, 1.0, "score")
        except ValueError as error:
            raise DatasetError(f"{name}, row {row}: {error}") from None


def load_tokenizers(
    model: str | PreTrainedModel,
    selector_model: str | PreTrainedModel | None,
    processing_class: PreTrainedTokenizerBase | None,
    args: DROConfig,
) -> dict[Role, PreTrainedTokenizerBase]:
    """
    Tokenizer of each role. A selector given by id or folder brings its own; an instance shares the one passed.

    Raises:
        `TypeError`: `processing_class` is no tokenizer.
        `ValueError`: a model instance does not say where its tokenizer is, or a tokenizer has no eos token.
    """
    generator_tokenizer = prepare_tokenizer(processing_class or _load_tokenizer(model, args, generator_revision(args)))
    selector_tokenizer = generator_tokenizer
    if isinstance(selector_model, str) or (selector_model is not None and processing_class is None):
        selector_tokenizer = prepare_tokenizer(_load_tokenizer(selector_model, args, None, "selector_model"))
    return {"selector": selector_tokenizer, "generator": generator_tokenizer}


def _load_tokenizer(model: str | PreTrainedModel, args: DROConfig, revision: str | None, name: str = "model") -> Any:
    """
    Tokenizer of a model.

    Raises:
        `ValueError`: a model instance does not say where it came from.
    """
    if not isinstance(model, str | PreTrainedModel | PeftModel):
        raise TypeError(f"{name} must be a folder, a Hub id or a model, not {type(model).__name__}: {str(model)[:60]}")
    source = model if isinstance(model, str) else get_config_model_id(model.config)
    if not source:
        raise ValueError(
            "the model was not loaded from a folder or the Hub, so its tokenizer is unknown: pass `processing_class`"
        )
    return load_tokenizer(source, revision, trust_remote_code=args.trust_remote_code)


def generator_revision(args: DROConfig) -> str | None:
    """Revision of `model` in `args.model_init_kwargs`, which says nothing of the repo of a `selector_model`."""
    return cast(dict, args.model_init_kwargs or {}).get("revision")


def load_roles(
    model: str | PreTrainedModel | PeftModel,
    selector_model: str | PreTrainedModel | None,
    args: DROConfig,
    peft_config: PeftConfig | dict[str, PeftConfig] | None,
    quantization_config: BitsAndBytesConfig | None,
) -> Roles:
    """
    Both roles, ready to be trained: loaded, with new adapters drawn from `args.seed`.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Base of both roles, or of the generator when there is a `selector_model`.
        selector_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Base of the selector alone.
        args ([`DROConfig`]):
            Configuration.
        peft_config ([`~peft.PeftConfig`] or `dict[str, PeftConfig]`, *optional*):
            See [`~roles.prepare_role_model`].
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization of models given by id or folder.

    Returns:
        [`~roles.Roles`]

    Raises:
        `ValueError`: models and `peft_config` do not go together, see [`~roles.prepare_role_model`].
    """
    set_seed(args.seed)
    load_whole()
    role_model = prepare_role_model(
        load_model(model, args, quantization_config, generator_revision(args)),
        None if selector_model is None else load_model(selector_model, args, quantization_config),
        peft_config,
    )
    trained: list[Role] = [role for role in ROLES if getattr(args, f"train_{role}")]
    roles = Roles(role_model, trained)
    cast_adapters_for_quantized_base(roles)
    if args.disable_dropout:
        disable_dropout(role_model)
    if args.gradient_checkpointing or any(roles.is_checkpointed(role) for role in ROLES):
        roles.enable_input_require_grads()
    return roles


def load_model(
    model: str | PreTrainedModel | PeftModel,
    args: DROConfig,
    quantization_config: BitsAndBytesConfig | None,
    revision: str | None = None,
) -> Any:
    """
    Model instance: loaded with `args.model_init_kwargs` when given by id or folder, returned as it is otherwise.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
        args ([`DROConfig`]):
            Configuration.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization of a model that is loaded.
        revision (`str`, *optional*):
            Branch, tag or commit of a Hub id.

    Returns:
        [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]
    """
    if not isinstance(model, str):
        return model
    # The config's type allows a JSON string, which its constructor has parsed.
    kwargs = {**cast(dict, args.model_init_kwargs or {}), "revision": revision}
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    # One process, one device: "auto" would spread the model over all GPUs.
    if args.distributed_state.distributed_type in ["MULTI_GPU", "DEEPSPEED"]:
        kwargs["device_map"] = None
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    return create_model_from_path(model, **kwargs)


def disable_dropout(model: nn.Module) -> None:
    """
    Turns off dropout for good: that of modules, the functional one whose rate is a module's or a config's attribute,
    dropped layers, and the jitter of routers.
    """
    disable_dropout_in_model(model)
    configs = {id(module.config): module.config for module in model.modules() if "config" in vars(module)}
    for holder in (*model.modules(), *configs.values()):
        for name, value in vars(holder).items():
            if type(value) is float and ("drop" in name or "jitter" in name):
                setattr(holder, name, 0.0)


def refuse_unsupported(args: DROConfig) -> None:
    """
    Raises `ValueError` for attention that takes no mask of its own, and for engines that cannot train two roles, see
    [`~engines.refuse_engines`].
    """
    if args.shared_prefix != "never":
        check_attention(cast(dict, args.model_init_kwargs or {}).get("attn_implementation"))
    refuse_engines(args)


# Arguments of transformers' Trainer that have no meaning here, and why.
_REFUSED = {
    "data_collator": "questions become prompts in the E-step, there is nothing to collate",
    "model_init": "pass `model`, and `selector_model` or `peft_config` for the second role",
    "compute_loss_func": "the losses are the M-step's; set selector_estimator, answer_likelihood or likelihood_floor",
    "preprocess_logits_for_metrics": "evaluation scores generated answers; pass `compute_metrics`",
    "tokenizer": "it is called `processing_class`",
}


def refuse_arguments(unsupported: Mapping[str, Any], args: Any, callbacks: Any, compute_metrics: Any) -> None:
    """
    Raises `TypeError` for arguments that DROTrainer does not take, unless they are `None`, with the reason, and for
    others that are not of their kind.
    """
    for name, value in unsupported.items():
        if value is not None or name not in _REFUSED:
            reason = _REFUSED.get(name, "see its documentation")
            raise TypeError(f"DROTrainer takes no `{name}`: {reason}; leave it out")
    if args is not None and not isinstance(args, DROConfig):
        raise TypeError(f"`args` must be a DROConfig, not {type(args).__name__}: pass DROConfig(output_dir, …)")
    if callbacks is not None and not isinstance(callbacks, list | tuple):
        raise TypeError(f"`callbacks` must be a list, not {type(callbacks).__name__}: put them in one")
    if compute_metrics is not None and not callable(compute_metrics):
        raise TypeError(f"`compute_metrics` must be a function, not {type(compute_metrics).__name__}: pass one")


def own_scores(scores: Any, others: Mapping[str, float]) -> dict[str, float]:
    """
    What a user's `compute_metrics` returned, as floats.

    Raises:
        `ValueError`: it is no dict of numbers, or has a name that is taken.
    """
    if not isinstance(scores, Mapping):
        raise ValueError(f"compute_metrics returned {type(scores).__name__}: it must return a dict of numbers")
    for name, score in scores.items():
        if name in others:
            raise ValueError(f"compute_metrics returned {name!r}, which the trainer computes itself: rename it")
        try:
            float(score)
        except (TypeError, ValueError):
            raise ValueError(f"compute_metrics returned {name}={score!r}: it must be a number") from None
    return {str(name): float(score) for name, score in scores.items()}
