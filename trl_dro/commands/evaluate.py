# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""`trl-dro evaluate`: a whole system on a dataset, compared with another evaluation of the same questions."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from datasets import Dataset

from ..data import load_records, read_corpus, read_questions
from ..data.resumable import write_json
from ..data.schema import DatasetError
from ..evaluation import evaluation
from ..evaluation.evaluation import QUESTIONS_FILE, SUMMARY_FILE
from ..evaluation.scoring import Selection
from ..evaluation.summary import load_baseline, print_report, summarize
from ..retrieval import BM25Retriever, retrieve_candidates
from ..system.pipeline import RAGPipeline
from ..system.rag_config import RAGConfig
from ..system.run_folder import system_stamp
from .arguments import QuestionArguments, check_range


# Arguments that do not change the result of a question.
_NOT_COMPARED = ("output_dir", "baseline", "tokens_per_batch", "device", "ranking_measures")


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
            Folder of `questions.jsonl`, `summary.json` and `settings.json`. What is there already is not done again.
        baseline (`str`, *optional*):
            Folder of another evaluation of the same questions, to compare with.
        num_selected (`int`, *optional*):
            Documents per question, K, instead of the trained system's.
        max_answer_length (`int`, *optional*):
            Longest answer in tokens, instead of the trained system's.
        context_reliance (`bool`, *optional*, defaults to `True`):
            Whether to score the gold answer with and without the documents, two more forwards per question.
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
    ranking_measures: list[str] | None = field(
        default=None, metadata={"help": "Measures of ir-measures, e.g. nDCG@5 RR@5; needs positive_ids."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.generator is None and self.model is None:
            raise ValueError("nothing to evaluate: name a run (trl-dro evaluate RUN), or --generator and --selector")
        if self.selector is None and self.model is None:
            raise ValueError("--generator alone selects nothing: pass --selector PATH, or retriever, or oracle")
        if (self.questions is None) != (self.corpus is None):
            raise ValueError("--questions and --corpus go together: questions need a corpus to retrieve from")
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
        `dict[str, Any]`: the summary, see [`~evaluation.summary.summarize`].

    Raises:
        `DatasetError`: the dataset is malformed, or the baseline is of other questions.
        `ValueError`: a model cannot be found, or `output_dir` holds another evaluation.
    """
    selection: Selection = cast(Selection, args.selector) if args.selector in ("retriever", "oracle") else "selector"
    dataset = _load_dataset(args)
    if args.ranking_measures and "positive_ids" not in dataset.column_names:
        raise DatasetError("--ranking_measures need a column positive_ids, which the dataset has not: leave them out")

    def load() -> RAGPipeline:
        sizes = {name: getattr(args, name) for name in ("num_selected", "max_candidates", "max_answer_length")}
        # By default both roles are those of `model`. Where nothing is selected by a model, none is loaded to do so
        # beside the generator's own.
        selector = (args.selector or (args.model if args.generator else None)) if selection == "selector" else None
        return RAGPipeline.from_pretrained(
            cast(str, args.generator or args.model),
            selector=selector,
            revision=args.revision,
            base_model=args.base_model,
            options=args.load_options(),
            **{name: value for name, value in sizes.items() if value is not None},
        )

    asked = {name: value for name, value in asdict(args).items() if name not in _NOT_COMPARED}
    selector = (args.selector or args.model) if selection == "selector" else None
    asked |= system_stamp(selector, cast(str, args.generator or args.model), args.base_model)
    rows = evaluation.evaluate(
        load, dataset, args.output_dir, selection, args.context_reliance, args.tokens_per_batch, asked
    )
    baseline = None if args.baseline is None else load_baseline(Path(args.baseline) / QUESTIONS_FILE, rows)
    summary = summarize(rows, baseline, args.ranking_measures)
    write_json(Path(args.output_dir) / SUMMARY_FILE, {**summary, "settings": asked, "baseline": args.baseline})
    print_report(summary, args.baseline)
    print(f"One line per question is in {args.output_dir}/{QUESTIONS_FILE}.")
    return summary


def _load_dataset(args: EvaluationArguments) -> Dataset:
    if args.dataset_name is not None:
        dataset = load_records(args.dataset_name, args.dataset_split)
    else:
        questions = read_questions(cast(str, args.questions))
        if args.max_questions is not None:
            questions = questions.select(range(min(args.max_questions, len(questions))))
        retriever = BM25Retriever(read_corpus(cast(str, args.corpus)))
        dataset = retrieve_candidates(questions, retriever, args.max_candidates or RAGConfig.max_candidates)
    if args.max_questions is None:
        return dataset
    return dataset.select(range(min(args.max_questions, len(dataset))))
