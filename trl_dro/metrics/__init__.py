# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Metrics of answers and of retrieved documents."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .ranking import ranking_measures
from .statistics import Interval, bootstrap_interval, paired_permutation_test
from .text import contains, exact_match, f1, has_answer, normalize_answer, recall_at_k, recall_of_ids_at_k


if TYPE_CHECKING:
    from .kilt_exact_match import KILTExactMatch
    from .kilt_f1 import KILTF1
    from .passage_recall import PassageRecall


__all__ = [
    "Interval",
    "KILTExactMatch",
    "KILTF1",
    "PassageRecall",
    "bootstrap_interval",
    "contains",
    "exact_match",
    "f1",
    "has_answer",
    "normalize_answer",
    "paired_permutation_test",
    "ranking_measures",
    "recall_at_k",
    "recall_of_ids_at_k",
]

# Imported at first use: `evaluate` takes seconds to import, and retrieval needs none of it.
_MODULES = {"KILTExactMatch": "kilt_exact_match", "KILTF1": "kilt_f1", "PassageRecall": "passage_recall"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
