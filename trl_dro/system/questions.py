# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Which questions a system can be asked, known before its weights are loaded, and which are left out, and why."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from datasets import Dataset

from ..data.lines import dataset_rows
from ..data.resumable import row_numbers
from ..data.schema import BadRow, DatasetError
from ..model.control_tokens import text_ids
from ..model.prompts import Prompts, PromptTooLongError, document_body, question_text
from ..model.roles import Role
from .rag_config import RAGConfig
from .run_folder import FoundSystem, LoadOptions


OnError = Literal["stop", "skip"]


class Questions:
    """
    Questions of a file or dataset, and the rows of it that cannot be asked.

    Args:
        dataset (`Dataset`):
            Questions that were not found to be bad so far.
        skipped (`list[BadRow]`):
            The others, by their numbers in the source.
        name (`str`):
            What the source is called in error messages.
    """

    def __init__(self, dataset: Dataset, skipped: list[BadRow], name: str):
        self.dataset = dataset
        self.skipped = skipped
        self.name = name

    def keep_first(self, num_rows: int) -> None:
        """Leaves out all but the first rows of the source."""
        self.skipped = [row for row in self.skipped if row.row < num_rows]
        self.dataset = self.dataset.select(range(min(len(self.dataset), num_rows - len(self.skipped))))

    def check(self, columns: list[str], check: Callable[[dict[str, Any], str], None]) -> None:
        """Leaves out the rows for which a check of some columns, given them and their place, raises `DatasetError`."""
        reasons: dict[int, str] = {}
        numbers = row_numbers(len(self.dataset), self.skipped)
        for place, (_, record) in enumerate(dataset_rows(self.dataset.select_columns(columns), self.name)):
            try:
                check(record, f"{self.name}, row {numbers[place]}")
            except DatasetError as error:
                reasons[place] = str(error)
        self._leave_out(reasons)

    def check_lengths(self, system: FoundSystem, options: LoadOptions) -> None:
        """Leaves out the questions that are too long for a prompt however short their documents are cut."""
        if len(self.dataset):
            self._leave_out(too_long(self.dataset, system.load_prompts(options), system.config))

    def settle(self, on_error: OnError) -> None:
        """
        Says what becomes of rows that cannot be asked.

        Args:
            on_error (`str`):
                `"stop"` for an error, `"skip"` to go on without them.

        Raises:
            `DatasetError`: there are such rows and `on_error` is `"stop"`, or no other ones.
        """
        if not self.skipped:
            return
        self.skipped.sort(key=lambda row: row.row)
        total = len(self.dataset) + len(self.skipped)
        first = self.skipped[0]
        named = f"row {first.row}" + ("" if first.id is None else f" (id {first.id!r})")
        if not len(self.dataset):
            raise DatasetError(f"none of the {total} rows of {self.name} can be asked; {named}: {first.reason}")
        if on_error == "stop":
            raise DatasetError(
                f"{len(self.skipped)} of {total} rows of {self.name} cannot be asked; {named}: {first.reason}; or "
                "leave out such rows with --on_error skip"
            )

    def _leave_out(self, reasons: Mapping[int, str]) -> None:
        """Moves rows of the dataset, by their places in it, to those that are skipped."""
        if not reasons:
            return
        numbers = row_numbers(len(self.dataset), self.skipped)
        ids = self.dataset["id"] if "id" in self.dataset.column_names else {}
        self.skipped += [
            BadRow(numbers[place], ids[place] if ids else None, reason) for place, reason in reasons.items()
        ]
        self.dataset = self.dataset.select([place for place in range(len(self.dataset)) if place not in reasons])


def too_long(dataset: Dataset, prompts: Mapping[Role, Prompts], config: RAGConfig) -> dict[int, str]:
    """
    Questions whose prompt exceeds the limit of a role however short their documents are cut.

    Args:
        dataset (`Dataset`):
            Questions with their `documents`.
        prompts (`dict[str, PromptBuilder]`):
            Prompt builder of each role.
        config ([`RAGConfig`]):
            How many documents each role is shown.

    Returns:
        `dict[int, str]`: of each such row why it does not fit.
    """
    found: dict[int, str] = {}
    questions = [question_text(question) for question in dataset["question"]]
    counts = [len(documents) for documents in dataset["documents"]]
    for role, builder in prompts.items():
        if builder.max_length is None:
            continue
        shown = config.max_candidates if role == "selector" else config.num_selected
        lengths = [len(ids) for ids in text_ids(builder.tokenizer, questions)]
        for row in sorted(range(len(questions)), key=lambda row: -lengths[row]):
            question = dataset[row]["question"]
            try:
                builder.check_fits(question, min(shown, max(counts)))
                break  # and so do all shorter ones
            except PromptTooLongError:
                pass
            # Seldom: now with its own documents, which may be fewer or shorter. Any may be selected: the longest.
            documents = dataset[row]["documents"][: config.max_candidates]
            if role == "generator":
                documents = sorted(documents, key=lambda document: -len(document_body(document)))[:shown]
            try:
                builder(question, documents)
            except PromptTooLongError as error:
                found.setdefault(row, f"{role}: {error}")
    return found
