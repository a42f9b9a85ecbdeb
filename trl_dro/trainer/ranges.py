# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Numbers of training arguments that no training can use, which transformers lets pass."""

import math

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
    if args.max_steps == 0 or args.max_steps < -1:
        raise ValueError(f"max_steps={args.max_steps}: it must be at least 1, or -1 to count epochs instead")
