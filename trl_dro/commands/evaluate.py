# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""`trl-dro evaluate`: a whole system on a dataset, compared with another evaluation of the same questions."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from ..data import read_questions
from ..data.processes import Processes
from ..data.resumable import SKIPPED_FILE, write_json
from ..data.schema import REQUIRED_COLUMNS, DatasetError, check_record, check_types, require_columns
from ..data.storage import content_key
from ..evaluation import evaluation
from ..evaluation.abstention import count_answers, count_at_thresholds, print_thresholds
from ..evaluation.evaluation import QUESTIONS_FILE, SUMMARY_FILE
from ..evaluation.scoring import Selection
from ..evaluation.summary import load_baseline, print_report, summarize
from ..system.pipeline import RAGPipeline
from ..system.questions import Questions
from ..system.run_folder import find_system, system_stamp
from .arguments import QuestionArguments, check_range
from .asking import NOT_COMPARED, find_candidates, load_questions


# Arguments that do not change the result of a question.
_NOT_COMPARED = (*NOT_COMPARED, "baseline", "ranking_measures", "prediction_gain", "min_gain")


@dataclass(kw_only=True)
class EvaluationArguments(QuestionArguments):
    """
    What is evaluated, and what it is compared with; see also [`QuestionArguments`].

    Args:
        selector (`str`, *optional*):
            Selector, if not that of `model`: a run, adapter or model, `"retriever"` for the candidates as they were
            retrieved, or `"oracle"` for the relevant ones first.
        generator (`str`, *optional*):
            Generator, if not that of `model`: a run, adapter or model.
        output_dir (`str`, *optional*, defaults to `"evaluation"`):
            Folder of `questions.jsonl`, `summary.json`, `settings.json` and, of rows that were left out,
            `skipped.jsonl`. What is there already is not done again.
        baseline (`str`, *optional*):
            Folder of another evaluation of the same questions, to compare with.
        num_selected (`int`, *optional*):
            Documents per question, K, instead of the trained system's.
        max_answer_length (`int`, *optional*):
            Longest answer in tokens, instead of the trained system's.
        context_reliance (`bool`, *optional*, defaults to `True`):
            Whether to score the gold answer with and without the documents, two more forwards per question.
        prediction_gain (`bool`, *optional*, defaults to `False`):
            Whether to score the predicted answer with and without the documents too, which tells at which `min_gain`
            to abstain; done if there is one.
        ranking_measures (`list[str]`, *optional*):
            Measures of `ir-measures` of the selected documents, e.g. `nDCG@5 RR@5`; needs `positive_ids`.
    """

    selector: str | None = field(
        default=None,
        metadata={"help": "Selector, if not the model's: a run, adapter or model, or `retriever`, or `oracle`."},
    )
    generator: str | None = field(
        default=None, metadata={"help": "Generator, if not the model's: a run, adapter or model."}
    )
    output_dir: str = field(
        default="evaluation", metadata={"help": "Folder of the results. What is there already is not done again."}
    )
    baseline: str | None = field(
        default=None, metadata={"help": "Folder of another evaluation of the same questions, to compare with."}
    )
    num_selected: int | None = field(default=None, metadata={"help": "Documents per question, K."})
    max_answer_length: int | None = field(default=None, metadata={"help": "Longest answer in tokens."})
    context_reliance: bool = field(
        default=True, metadata={"help": "Score the gold answer with and without the documents."}
    )
    prediction_gain: bool = field(
        default=False, metadata={"help": "Score the predicted answer so too, and show what --min_gain would do."}
    )
    ranking_measures: list[str] | None = field(
        default=None, metadata={"help": "Measures of ir-measures, e.g. nDCG@5 RR@5; needs positive_ids."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.generator is None and self.model is None:
            raise ValueError("nothing to evaluate: name a run (trl-dro evaluate RUN), or --generator and --selector")
        if self.selector is None and self.model is None:
            raise ValueError("--generator alone selects nothing: pass --selector PATH, or retriever, or oracle")
        if (self.questions is None) != (self.corpus is None and self.retriever is None):
            raise ValueError("--questions and --corpus go together: questions need a corpus, or a --retriever")
        if (self.questions is None) == (self.dataset_name is None):
            raise ValueError("pass either --dataset_name, or --questions and --corpus")
        if self.revision is not None and self.generator is not None:
            raise ValueError("--revision is that of --model: leave out --generator, or name a local folder")
        check_range(self, ["num_selected", "max_answer_length"], 1)


def evaluate(args: EvaluationArguments) -> dict[str, Any]:
    """
    Evaluates a system, prints the table and writes `questions.jsonl` and `summary.json`. What an earlier call left of
    the same evaluation is used; the model is loaded only if questions are left.

    Args:
        args ([`EvaluationArguments`]):
            System and dataset.

    Returns:
        `dict[str, Any]`: the summary, see [`~evaluation.summary.summarize`], and `num_skipped`, the rows left out;
        with `prediction_gain` also `thresholds`, see [`~evaluation.abstention.count_at_thresholds`], and `abstention`,
        the counts at `min_gain`.

    Raises:
        `DatasetError`: the dataset is malformed, a row is and `on_error` is `"stop"`, or all are, or the baseline is
            of other questions.
        `ValueError`: a model cannot be found, or `output_dir` holds another evaluation.
    """
    selection: Selection = cast(Selection, args.selector) if args.selector in ("retriever", "oracle") else "selector"
    # By default both roles are those of `model`. Where nothing is selected by a model, none is loaded to do so beside
    # the generator's own.
    system: dict[str, Any] = {
        "path": cast(str, args.generator or args.model),
        "selector": (args.selector or (args.model if args.generator else None)) if selection == "selector" else None,
        "revision": args.revision,
        "base_model": args.base_model,
        "options": args.load_options(),
        **args.changes("num_selected", "max_candidates", "max_answer_length"),
    }
    # Questions are read, retrieved and checked once, also where several processes answer them.
    processes = Processes.of_launcher()
    questions, asked, min_gain = processes.share(lambda: _questions_and_settings(args, system, selection))
    rows = evaluation.evaluate(
        lambda: RAGPipeline.from_pretrained(**system),
        questions.dataset,
        args.output_dir,
        selection,
        args.context_reliance,
        args.tokens_per_batch,
        asked,
        questions.skipped,
        processes,
        "prediction_gain" in asked,
    )
    return processes.share(lambda: _sum_up(args, rows, asked, len(questions.skipped), min_gain))


def _questions_and_settings(
    args: EvaluationArguments, system: dict[str, Any], selection: Selection
) -> tuple[Questions, dict[str, Any], float | None]:
    """Questions that can be asked, what tells this evaluation of them from others, and the system's least gain."""
    found = find_system(**system)
    questions = load_questions(args, read_questions)
    find_candidates(args, questions, found.config.max_candidates)
    require_columns(questions.dataset, REQUIRED_COLUMNS, questions.name)
    check_types(questions.dataset.features, questions.name)
    questions.check(
        [name for name in (*REQUIRED_COLUMNS, "positive_ids") if name in questions.dataset.column_names],
        lambda record, where: check_record(record, where, found.config.num_selected),
    )
    questions.check_lengths(found, system["options"])
    questions.settle(args.on_error)
    if args.ranking_measures and "positive_ids" not in questions.dataset.column_names:
        raise DatasetError("--ranking_measures need a column positive_ids, which the dataset has not: leave them out")
    asked = {name: value for name, value in asdict(args).items() if name not in _NOT_COMPARED}
    selector = (args.selector or args.model) if selection == "selector" else None
    asked |= system_stamp(selector, cast(str, args.generator or args.model), args.base_model)
    if args.prediction_gain or found.config.min_gain is not None:
        asked["prediction_gain"] = True
    if questions.skipped:
        asked["skipped_rows_sha256"] = content_key([row.row for row in questions.skipped])
    return questions, asked, found.config.min_gain


def _sum_up(
    args: EvaluationArguments,
    rows: list[dict[str, Any]],
    asked: dict[str, Any],
    num_skipped: int,
    min_gain: float | None,
) -> dict[str, Any]:
    """Prints the table and writes `summary.json`."""
    baseline = None if args.baseline is None else load_baseline(Path(args.baseline) / QUESTIONS_FILE, rows)
    summary = {**summarize(rows, baseline, args.ranking_measures), "num_skipped": num_skipped}
    if "prediction_gain" in asked:
        summary["thresholds"] = count_at_thresholds(rows)
        summary["abstention"] = None if min_gain is None else count_answers(rows, min_gain)
    write_json(Path(args.output_dir) / SUMMARY_FILE, {**summary, "settings": asked, "baseline": args.baseline})
    print_report(summary, args.baseline)
    if "prediction_gain" in asked:
        print_thresholds(summary["thresholds"], summary["abstention"])
    print(f"One line per question is in {args.output_dir}/{QUESTIONS_FILE}.")
    if num_skipped:
        print(f"{num_skipped:,} rows were skipped: {args.output_dir}/{SKIPPED_FILE} says why.")
    return summary
