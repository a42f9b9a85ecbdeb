# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""The dataset record, its validation, and the readers of files that hold it."""

from .benchmarks import load_benchmark
from .corpus import Corpus, open_corpus, read_corpus
from .files import load_records, read_open_questions, read_questions
from .schema import DatasetError, Document, Message, Record, build_dataset, check_record, validate_dataset


__all__ = [
    "Corpus",
    "DatasetError",
    "Document",
    "Message",
    "Record",
    "build_dataset",
    "check_record",
    "load_benchmark",
    "load_records",
    "open_corpus",
    "read_corpus",
    "read_open_questions",
    "read_questions",
    "validate_dataset",
]
