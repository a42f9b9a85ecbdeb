# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Values of settings that no training can use, which transformers lets pass or refuses without their name."""

import enum
import math
import numbers
import types
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from transformers import TrainingArguments


# Lowest and highest value, both allowed.
RANGES = {
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "num_train_epochs": (0, math.inf),
    "warmup_steps": (0, math.inf),
    "save_total_limit": (1, math.inf),
    "eval_delay": (0, math.inf),
    "dataloader_num_workers": (0, math.inf),
    "seed": (0, 2**32 - 1),  # numpy's limit
}


def check_numbers(args: TrainingArguments) -> None:
    """
    Raises `ValueError` if a number among training arguments is not finite, or out of its range: NaN would train
    nothing but NaN.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Those of DRO, or of a warm-up.
    """
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}={value}: it must be a finite number")
    for name, (lowest, highest) in RANGES.items():
        value = getattr(args, name)
        if value is not None and not lowest <= value <= highest:
            most = "" if highest == math.inf else f" and at most {highest}"
            raise ValueError(f"{name}={value}: it must be at least {lowest}{most}")
    for name in ("logging_steps", "save_steps", "eval_steps"):
        if (value := getattr(args, name)) is not None and value <= 0:
            raise ValueError(f"{name}={value}: it must be above 0; to turn it off set the strategy to 'no'")
    if args.max_steps == 0 or args.max_steps < -1:
        raise ValueError(f"max_steps={args.max_steps}: it must be at least 1, or -1 to count epochs instead")


def check_types(args: Any) -> None:
    """
    Raises `ValueError` if a field of a dataclass holds a plain value of another type than it declares.

    Args:
        args (`dataclass`):
            Settings, passed from Python; what the command line reads has its types already.
    """
    hints = get_type_hints(type(args))
    for field in fields(args):
        value = getattr(args, field.name)
        if not field.init or value == field.default or _is_of(value, hints[field.name]):
            continue
        # Fields that are inherited take None more often than they declare.
        own = field.name in vars(type(args))["__annotations__"]
        if type(value) in (bool, int, float, str, bytes, list, tuple, set, dict) or (value is None and own):
            declared = str(field.type).replace("typing.", "")
            named = field.type.__name__ if isinstance(field.type, type) else declared
            raise ValueError(f"{field.name}={value!r}: it must be {named}, not {type(value).__name__}")


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value has a type, as far as its outermost layer tells."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_is_of(value, each) for each in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    kind = type(None) if hint is None else origin or hint
    if kind is Callable:
        return callable(value)
    if not isinstance(kind, type):
        return True
    if kind in (int, float):
        return isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    return isinstance(value, (kind, str) if issubclass(kind, enum.Enum) else kind)


def check_model_settings(args: Any) -> None:
    """Raises `ValueError` if settings of the base or its adapters cannot be used, by the names that flags have."""
    if not (isinstance(args.lora_r, int) and args.lora_r >= 1):
        raise ValueError(f"lora_r={args.lora_r}: it must be at least 1")
    if not args.lora_alpha > 0:
        raise ValueError(f"lora_alpha={args.lora_alpha}: it must be above 0")
    if not 0 <= args.lora_dropout < 1:
        raise ValueError(f"lora_dropout={args.lora_dropout}: it must be at least 0 and below 1")
    if args.load_in_4bit and args.load_in_8bit:
        raise ValueError("load_in_4bit and load_in_8bit exclude each other: leave out one")
