# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Metrics of answers and of retrieved documents."""

from .kilt_exact_match import KILTExactMatch
from .kilt_f1 import KILTF1
from .passage_recall import PassageRecall
from .ranking import ranking_measures
from .statistics import Interval, bootstrap_interval, paired_permutation_test
from .text import exact_match, f1, has_answer, normalize_answer, recall_at_k, recall_of_ids_at_k


__all__ = [
    "Interval",
    "KILTExactMatch",
    "KILTF1",
    "PassageRecall",
    "bootstrap_interval",
    "exact_match",
    "f1",
    "has_answer",
    "normalize_answer",
    "paired_permutation_test",
    "ranking_measures",
    "recall_at_k",
    "recall_of_ids_at_k",
]
