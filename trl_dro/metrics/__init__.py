# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Metrics of answers and of retrieved documents."""

from .text import exact_match, f1, has_answer, normalize_answer, recall_at_k


__all__ = ["exact_match", "f1", "has_answer", "normalize_answer", "recall_at_k"]
