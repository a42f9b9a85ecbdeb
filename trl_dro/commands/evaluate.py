# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""`trl-dro evaluate`: a whole system on a dataset, compared with another evaluation of the same questions."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import BitsAndBytesConfig

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
from ..system.run_folder import LoadOptions, system_stamp


# Arguments that do not change the result of a question.
_NOT_COMPARED = ("output_dir", "baseline", "tokens_per_batch", "device", "ranking_measures")


@dataclass
class EvaluationArguments:
    """
    What `trl-dro evaluate` evaluates, and on what.

    Args:
        model (`str`, *optional*):
            Run folder or Hub repo with both roles.
        selector (`str`, *optional*):
            Selector, if not that of `model`: a run, adapter or model, `"retriever"` for the candidates as they were
            retrieved, or `"oracle"` for the relevant ones first.
        generator (`str`, *optional*):
            Generator, if not that of `model`: a run, adapter or model.
        revision (`str`, *optional*):
            Branch, tag or commit of a Hub repo given as `model`.
        base_model (`str`, *optional*):
            Base of the adapters, instead of the one they name.
        dataset_name (`str`, *optional*):
            Dataset with candidates: a Hub id, a `save_to_disk` folder, or a jsonl or parquet file.
        dataset_split (`str`, *optional*):
            Its split.
        questions (`str`, *optional*):
            Questions, jsonl, whose candidates BM25 retrieves from `corpus`.
        corpus (`str`, *optional*):
            Passages, jsonl.
        max_questions (`int`, *optional*):
            Evaluate the first ones only.
        output_dir (`str`, *optional*, defaults to `"evaluation"`):
            Folder of `questions.jsonl`, `summary.json` and `settings.json`. What is there already is not done again.
        baseline (`str`, *optional*):
            Folder of another evaluation of the same questions, to compare with.
        num_selected (`int`, *optional*):
            Documents per question, K, instead of the trained system's.
        max_candidates (`int`, *optional*):
            Candidates per question, n, instead of the trained system's.
        max_answer_length (`int`, *optional*):
            Longest answer in tokens, instead of the trained system's.
        context_reliance (`bool`, *optional*, defaults to `True`):
            Whether to score the gold answer with and without the documents, two more forwards per question.
        ranking_measures (`list[str]`, *optional*):
            Measures of `ir-measures` of the selected documents, e.g. `nDCG@5 RR@5`; needs `positive_ids`.
        tokens_per_batch (`int`, *optional*, defaults to `16384`):
            Prompt tokens computed at a time; halved where memory runs out.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Precision.
        device (`str`, *optional*):
            Device; the accelerator if there is one.
        attn_implementation (`str`, *optional*):
            Attention of transformers.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Load the base in 4 bits (NF4, double quantization).
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that ships with a model.
    """

    model: str | None = field(default=None, metadata={"help": "Run folder or Hub repo with both roles."})
    selector: str | None = field(
        default=None,
        metadata={"help": "Selector, if not the model's: a run, adapter or model, or `retriever`, or `oracle`."},
    )
    generator: str | None = field(
        default=None, metadata={"help": "Generator, if not the model's: a run, adapter or model."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model's Hub repo."})
    base_model: str | None = field(default=None, metadata={"help": "Base of the adapters, if not the one they name."})
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Dataset with candidates: a Hub id, a `save_to_disk` folder, or a jsonl or parquet file."},
    )
    dataset_split: str | None = field(default=None, metadata={"help": "Its split."})
    questions: str | None = field(
        default=None, metadata={"help": "Questions, jsonl, whose candidates BM25 retrieves from the corpus."}
    )
    corpus: str | None = field(default=None, metadata={"help": "Passages, jsonl with `id`, `title` and `text`."})
    max_questions: int | None = field(default=None, metadata={"help": "Evaluate the first ones only."})
    output_dir: str = field(
        default="evaluation", metadata={"help": "Folder of the results. What is there already is not done again."}
    )
    baseline: str | None = field(
        default=None, metadata={"help": "Folder of another evaluation of the same questions, to compare with."}
    )
    num_selected: int | None = field(default=None, metadata={"help": "Documents per question, K."})
    max_candidates: int | None = field(default=None, metadata={"help": "Candidates per question, n."})
    max_answer_length: int | None = field(default=None, metadata={"help": "Longest answer in tokens."})
    context_reliance: bool = field(
        default=True, metadata={"help": "Score the gold answer with and without the documents."}
    )
    ranking_measures: list[str] | None = field(
        default=None, metadata={"help": "Measures of ir-measures, e.g. nDCG@5 RR@5; needs positive_ids."}
    )
    tokens_per_batch: int = field(default=16384, metadata={"help": "Prompt tokens computed at a time."})
    dtype: str = field(default="auto", metadata={"help": "Precision."})
    device: str | None = field(default=None, metadata={"help": "Device; the accelerator if there is one."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention of transformers."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Load the base in 4 bits."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether to run code that ships with a model."})

    def __post_init__(self):
        if self.generator is None and self.model is None:
            raise ValueError("nothing to evaluate: pass --model, or --generator and --selector")
        if self.selector is None and self.model is None:
            raise ValueError("--generator alone selects nothing: pass --selector PATH, or retriever, or oracle")
        if (self.questions is None) != (self.corpus is None):
            raise ValueError("--questions and --corpus go together: questions need a corpus to retrieve from")
        if (self.questions is None) == (self.dataset_name is None):
            raise ValueError("pass either --dataset_name, or --questions and --corpus")
        if self.revision is not None and self.generator is not None:
            raise ValueError("--revision is that of --model: leave out --generator, or name a local folder")
        for name in ("max_questions", "num_selected", "max_candidates", "max_answer_length", "tokens_per_batch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: it must be at least 1")


def evaluate(args: EvaluationArguments) -> dict[str, Any]:
    """
    Evaluates a system, prints the table and writes `questions.jsonl` and `summary.json`. What an earlier call left of
    the same evaluation is used; the model is loaded only if questions are left.

    Args:
        args ([`EvaluationArguments`]):
            System and dataset.

    Returns:
        `dict[str, Any]`: the summary, see [`~evaluation_report.summarize`].

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
            options=load_options(args),
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


def load_options(args: Any) -> LoadOptions:
    """Precision, device and quantization that a command's settings ask for."""
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return LoadOptions(
        dtype=args.dtype,
        device=args.device,
        quantization_config=four_bits if args.load_in_4bit else None,
        attn_implementation=args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
    )


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
