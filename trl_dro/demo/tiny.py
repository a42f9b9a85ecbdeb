# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""The tiny language model that ships with the package: trained from nothing by `scripts/pretrain_py` to find and
read passages, for the demo, for experiments without a GPU, and to try out data and settings."""

from pathlib import Path
from typing import Any

from ..model import prompts


# Loads offline with `from_pretrained`.
TINY_MODEL = Path(__file__).resolve().parent / "tiny_model"

# The prompts it was trained with. A generator that knows the question before the passages reads them better.
SELECTOR_TEMPLATE = "{documents}\nRank: {question}"
GENERATOR_TEMPLATE = "Reply: {question}\n{documents}\nReply: {question}"


def tiny_model_for(args: Any) -> str:
    """
    The tiny model, where none is named: sets the prompts that it was trained with in place of the defaults.

    Args:
        args ([`DROConfig`] or [`~warmup.WarmUpArguments`]):
            Settings, changed in place: `selector_template` and `generator_template`, if they are the defaults.

    Returns:
        `str`: folder of the model.
    """
    print("No --model_name_or_path: the tiny model of the demo stands in, to try out the data and the settings.")
    if args.selector_template == prompts.SELECTOR_TEMPLATE:
        args.selector_template = SELECTOR_TEMPLATE
    if args.generator_template == prompts.GENERATOR_TEMPLATE:
        args.generator_template = GENERATOR_TEMPLATE
    return str(TINY_MODEL)
