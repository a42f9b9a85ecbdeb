# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Answers of a whole system scored: measures, intervals, tests, causes of errors."""

from .evaluation import evaluate
from .summary import summarize


__all__ = ["evaluate", "summarize"]
