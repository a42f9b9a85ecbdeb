# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""`trl-dro predict`: a trained system answers a file of questions, resumable, one line per question."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..data import DatasetError, read_open_questions
from ..data.processes import Processes
from ..data.resumable import SKIPPED_FILE, complete_rows, fingerprint
from ..data.schema import check_documents, check_question
from ..data.storage import content_key
from ..evaluation.evaluation import batches
from ..system.pipeline import RAGPipeline
from ..system.questions import Questions
from ..system.run_folder import LoadOptions, find_system, system_stamp
from .arguments import QuestionArguments
from .asking import NOT_COMPARED, find_candidates, load_questions


PREDICTIONS_FILE = "predictions.jsonl"


@dataclass(kw_only=True)
class PredictArguments(QuestionArguments):
    """
    What is asked, and where the answers go; see also [`QuestionArguments`].

    Args:
        questions (`str`, *optional*):
            Questions, jsonl with `question`, and with `documents` unless there is a `corpus`.
        output_dir (`str`, *optional*, defaults to `"predictions"`):
            Folder of `predictions.jsonl`, `settings.json` and, of rows that were left out, `skipped.jsonl`. What is
            there already is not done again.
    """

    questions: str | None = field(
        default=None,
        metadata={"help": "Questions, jsonl with `question`, and with `documents` unless there is a corpus."},
    )
    output_dir: str = field(
        default="predictions", metadata={"help": "Folder of the answers; what is there is not done again."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.model is None:
            raise ValueError("nothing to answer with: name a run folder or Hub repo, trl-dro predict RUN")
        if (self.questions is None) == (self.dataset_name is None):
            raise ValueError("pass either --questions, with or without --corpus, or --dataset_name")
        if (self.corpus or self.retriever) is not None and self.questions is None:
            raise ValueError("--dataset_name has candidates already: leave out --corpus and --retriever")


def predict(args: PredictArguments) -> list[dict[str, Any]]:
    """
    Answers questions and writes `predictions.jsonl`. What an earlier call left of the same questions is kept.

    Args:
        args ([`PredictArguments`]):
            System and questions.

    Returns:
        `list[dict]`: for each question its `row`, `id`, `question`, `answer`, `logp` in nats (see
        [`~pipeline.RAGOutput`]), and of the selected documents, best first, `selected` (places among the candidates,
        from 1), `selected_ids`, `selected_titles`, `selected_texts` and `probabilities`, each that of the document
        being chosen next; `citations`, each with the fields of [`~citations.Citation`]; and, with `min_gain`, `gain`
        and `abstained`. Rows that are skipped are not among them.

    Raises:
        `DatasetError`: a question is malformed, too long, or has no documents, and `on_error` is `"stop"`, or all are.
        `ValueError`: the system cannot be found, or `output_dir` holds other answers.
    """
    changes = args.changes("max_candidates")
    options = args.load_options()
    # Questions are read, retrieved and checked once, also where several processes answer them.
    processes = Processes.of_launcher()
    questions, asked = processes.share(lambda: _questions_and_settings(args, options, changes))
    dataset = questions.dataset

    def work(left: list[int]) -> Iterator[tuple[list[int], list[dict[str, Any]]]]:
        pipe = RAGPipeline.from_pretrained(
            str(args.model), args.selector, None, args.revision, args.base_model, options, **changes
        )
        for rows, records in batches(pipe, dataset, left, args.tokens_per_batch, processes):
            asked_now, documents = ([record[name] for record in records] for name in ("question", "documents"))
            outputs = pipe(asked_now, documents, batch_size=len(rows))
            yield rows, [_line(record, output) for record, output in zip(records, outputs, strict=True)]

    path = Path(args.output_dir) / PREDICTIONS_FILE
    predictions = complete_rows(path, len(dataset), asked, work, "Answering", questions.skipped, processes)
    if processes.is_main:
        print(f"{len(predictions):,} answers are in {path}")
    if questions.skipped and processes.is_main:
        print(f"{len(questions.skipped):,} rows were skipped: {path.with_name(SKIPPED_FILE)} says why")
    return predictions


def _questions_and_settings(
    args: PredictArguments, options: LoadOptions, changes: dict[str, Any]
) -> tuple[Questions, dict[str, Any]]:
    """Questions that can be asked, and what tells their answers from others."""
    questions = load_questions(args, read_open_questions)
    if (args.corpus or args.retriever) is None:
        _check_documents(questions, args.questions is not None)
    system = find_system(str(args.model), args.selector, args.revision, args.base_model, options, **changes)
    find_candidates(args, questions, system.config.max_candidates)
    questions.check_lengths(system, options)
    questions.settle(args.on_error)
    asked = {name: value for name, value in asdict(args).items() if name not in NOT_COMPARED}
    asked |= system_stamp(args.selector or args.model, str(args.model), args.base_model)
    asked["dataset_sha256"] = fingerprint(questions.dataset, ("question", "documents"))
    if questions.skipped:
        asked["skipped_rows_sha256"] = content_key([row.row for row in questions.skipped])
    return questions, asked


def _check_documents(questions: Questions, may_retrieve: bool) -> None:
    """Leaves out questions without documents of their own."""
    for column in ("question", "documents"):
        if column not in questions.dataset.column_names:
            hint = "; pass --corpus or --retriever to find them" if column == "documents" and may_retrieve else ""
            raise DatasetError(f"{questions.name} has no {column}{hint}")

    def check(record: dict[str, Any], where: str) -> None:
        check_question(record["question"], where)
        check_documents(record["documents"], where, num_selected=1)

    questions.check(["question", "documents"], check)


def _line(record: dict[str, Any], output: Any) -> dict[str, Any]:
    return {
        "id": record.get("id"),
        "question": record["question"],
        "answer": output.answer,
        "logp": output.logp,
        "selected": [document.position for document in output.documents],
        "selected_ids": [document.id for document in output.documents],
        "selected_titles": [document.title for document in output.documents],
        "selected_texts": [document.text for document in output.documents],
        "probabilities": [document.probability for document in output.documents],
        "citations": [asdict(citation) for citation in output.citations],
        **({} if output.gain is None else {"gain": output.gain, "abstained": output.abstained}),
    }
