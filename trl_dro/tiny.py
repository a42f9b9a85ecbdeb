# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""The tiny language model that ships with the package: trained from nothing by `scripts/pretrain_tiny.py` to find and
read passages, for the demo, for experiments without a GPU, and to try out data and settings."""

from pathlib import Path


# Loads offline with `from_pretrained`.
TINY_MODEL = Path(__file__).resolve().parent / "tiny_model"

# The prompts it was trained with. A generator that knows the question before the passages reads them better.
SELECTOR_TEMPLATE = "{documents}\nRank: {question}"
GENERATOR_TEMPLATE = "Reply: {question}\n{documents}\nReply: {question}"
