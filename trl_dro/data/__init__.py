# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""The dataset record, its validation, and the readers of files that hold it."""

from .files import load_records, read_corpus, read_questions
from .schema import DatasetError, Document, Message, Record, build_dataset, check_record, validate_dataset


__all__ = [
    "DatasetError",
    "Document",
    "Message",
    "Record",
    "build_dataset",
    "check_record",
    "load_records",
    "read_corpus",
    "read_questions",
    "validate_dataset",
]
