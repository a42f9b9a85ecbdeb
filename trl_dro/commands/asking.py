# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""The questions of `trl-dro evaluate` and `trl-dro predict`."""

from collections.abc import Callable

from datasets import Dataset

from ..data import load_records
from ..data.schema import BadRow
from ..retrieval import retrieve_candidates
from ..retrieval.services import retriever_of
from ..system.questions import Questions
from .arguments import QuestionArguments


# Arguments that do not change what is answered.
NOT_COMPARED = ("output_dir", "tokens_per_batch", "device", "on_error", "num_processes", "accelerate_config")


def load_questions(args: QuestionArguments, read_file: Callable[[str, list[BadRow]], Dataset]) -> Questions:
    """
    Questions of a dataset, or of a file.

    Args:
        args ([`~arguments.QuestionArguments`]):
            Where they are.
        read_file (`Callable`):
            Reads a file, and adds the rows that cannot be read to a list.

    Returns:
        [`~questions.Questions`]

    Raises:
        `DatasetError`: none can be read, or some cannot and `on_error` is `"stop"`.
    """
    bad_rows: list[BadRow] = []
    if args.dataset_name is not None:
        dataset, name = load_records(args.dataset_name, args.dataset_split, bad_rows), args.dataset_name
    else:
        dataset, name = read_file(str(args.questions), bad_rows), str(args.questions)
    questions = Questions(dataset, bad_rows, name)
    if args.max_questions is not None:
        questions.keep_first(args.max_questions)
    questions.settle(args.on_error)
    return questions


def find_candidates(args: QuestionArguments, questions: Questions, max_candidates: int) -> None:
    """Gives questions their candidates, if there is something to find them with."""
    retriever = retriever_of(args.corpus, args.retriever, args.dense_model, *args.cut())
    if retriever is not None:
        questions.dataset = retrieve_candidates(questions.dataset, retriever, max_candidates)
