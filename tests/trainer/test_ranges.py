# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import math
from dataclasses import fields

import pytest
from transformers import TrainingArguments
from trl import SFTConfig

from trl_dro import DROConfig
from trl_dro.trainer.ranges import RANGES, check_numbers


def test_every_float_of_the_training_must_be_finite(tmp_path):
    args = DROConfig(output_dir=str(tmp_path), use_cpu=True)
    floats = [each.name for each in fields(DROConfig) if isinstance(getattr(args, each.name), float)]
    assert {"learning_rate", "adam_epsilon", "temperature", "likelihood_floor"} <= set(floats)
    for name in [*floats, "selector_learning_rate"]:
        for value in (math.nan, math.inf):
            before = getattr(args, name)
            setattr(args, name, value)
            with pytest.raises(ValueError, match=f"{name}={value}: it must be a finite number"):
                check_numbers(args)
            setattr(args, name, before)


@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 0},
        {"gradient_accumulation_steps": 0},
        {"learning_rate": -1e-5},
        {"generator_learning_rate": -1.0},
        {"adam_beta1": 1.5},
        {"max_grad_norm": -1.0},
        {"save_total_limit": -3},
        {"max_steps": -7},
    ],
)
def test_numbers_out_of_their_range_are_named(settings, tmp_path):
    [[name, value]] = settings.items()
    with pytest.raises(ValueError, match=f"{name}={value}: it must be at least"):
        DROConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_the_ranges_are_those_of_settings_that_exist(tmp_path):
    assert RANGES.keys() <= {each.name for each in fields(TrainingArguments)}
    check_numbers(SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False))  # the defaults lie within
