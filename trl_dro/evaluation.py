# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""A whole system evaluated on a dataset: any selector or none, any generator, resumable, one line per question."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import BitsAndBytesConfig

from .data import load_records, read_corpus, read_questions, validate_dataset
from .data.schema import DatasetError
from .evaluation_report import load_baseline, print_report, summarize
from .pipeline import RAGPipeline
from .prompts import question_text
from .rag_config import RAGConfig
from .rag_model import RAGModel, chunk_rows
from .resumable import complete_rows, fingerprint, weights_stamp, write_json
from .retrieval import BM25Retriever, retrieve_candidates
from .run_folder import LoadOptions
from .scoring import Selection, score_question, select


QUESTIONS_FILE = "questions.jsonl"
SUMMARY_FILE = "summary.json"

# Arguments that do not change the result of a question.
_NOT_COMPARED = ("output_dir", "baseline", "tokens_per_batch", "device", "ranking_measures")

Scored = dict[str, Any]


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
    asked["weights"] = weights_stamp(args.model, args.selector, args.generator)
    rows = run(load, dataset, args.output_dir, selection, args.context_reliance, args.tokens_per_batch, asked)
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


def run(
    load: Callable[[], RAGPipeline],
    dataset: Dataset,
    output_dir: str | Path,
    selection: Selection = "selector",
    context_reliance: bool = True,
    tokens_per_batch: int = 16384,
    settings: dict[str, Any] | None = None,
) -> list[Scored]:
    """
    Answers and scores every question of a dataset, one line of `questions.jsonl` each.

    Args:
        load (`Callable`):
            Loads the system; called only if questions are left.
        dataset (`Dataset`):
            Questions with `question`, `answers` and `documents`; `id` and `positive_ids` are used if they are there.
        output_dir (`str` or `Path`):
            Folder of the results. Questions that are answered there already are not asked again.
        selection (`str`, *optional*, defaults to `"selector"`):
            Who selects, see [`~scoring.select`].
        context_reliance (`bool`, *optional*, defaults to `True`):
            Whether to score the gold answer with and without the documents.
        tokens_per_batch (`int`, *optional*, defaults to `16384`):
            Prompt tokens computed at a time.
        settings (`dict`, *optional*):
            What tells this evaluation from others; a folder that was begun with other settings is refused.

    Returns:
        `list[dict]`: one dict per question in the order of the dataset, as in the file.

    Raises:
        `DatasetError`: the dataset is malformed.
        `ValueError`: `output_dir` holds another evaluation.
    """
    validate_dataset(dataset, 1, "dataset")
    asked = fingerprint(dataset, ("question", "answers", "documents"))

    def work(left: list[int]) -> Iterator[tuple[list[int], list[Scored]]]:
        pipe = load()
        validate_dataset(dataset, pipe.config.num_selected, "dataset")
        for rows, records in batches(pipe, dataset, left, tokens_per_batch):
            yield rows, _score_batch(pipe.rag, pipe.config, selection, context_reliance, records)

    own = {"selection": selection, "dataset_sha256": asked, **(settings or {})}
    return complete_rows(Path(output_dir) / QUESTIONS_FILE, len(dataset), own, work, "Evaluating")


def batches(
    pipe: RAGPipeline, dataset: Dataset, rows: Sequence[int], tokens_per_batch: int
) -> Iterator[tuple[list[int], list[dict[str, Any]]]]:
    """Rows and their records in batches of similar length, the longest first: too little memory shows at once."""
    rows = sorted(rows, key=lambda row: -sum(len(document["text"]) for document in dataset[row]["documents"]))
    for start in range(0, len(rows), 256):
        block = list(rows[start : start + 256])
        records = [
            {**record, "documents": record["documents"][: pipe.config.max_candidates]}
            for record in (dataset[row] for row in block)
        ]
        lengths = [len(pipe.rag.prompts["selector"](record["question"], record["documents"])) for record in records]
        for chunk in chunk_rows(lengths, tokens_per_batch):
            yield [block[i] for i in chunk], [records[i] for i in chunk]


@torch.no_grad()
def _score_batch(
    rag: RAGModel,
    config: RAGConfig,
    selection: Selection,
    context_reliance: bool,
    records: list[dict[str, Any]],
) -> list[Scored]:
    start = time.perf_counter()
    permutations = select(rag, records, selection)  # [B, K]
    answers = rag.answer(records, permutations, config.max_answer_length)
    seconds = (time.perf_counter() - start) / len(records)
    logps: list[tuple[float, float]] = []
    if context_reliance:
        targets = [record["answers"][:1] for record in records]
        none = torch.empty(len(records), 1, 0, dtype=torch.long)
        with_documents = rag.answer_logps(records, targets, permutations.unsqueeze(1))[:, 0].tolist()
        without = rag.answer_logps(records, targets, none)[:, 0].tolist()
        logps = list(zip(with_documents, without, strict=True))
    rows = []
    for i, (record, permutation, answer) in enumerate(zip(records, permutations.tolist(), answers, strict=True)):
        row: Scored = {
            "id": record.get("id"),
            "question": question_text(record["question"]),
            "answers": record["answers"],
            "prediction": answer,
            "selected": permutation,
            "selected_ids": [record["documents"][place - 1].get("id") for place in permutation],
            "positive_ids": record.get("positive_ids"),
            **score_question(record, permutation, answer),
        }
        if context_reliance:
            row["answer_logp"], row["answer_logp_without_documents"] = logps[i]
            row["context_gain"] = logps[i][0] - logps[i][1]
        rows.append(row | {"seconds": seconds, "tokens": _count_tokens(rag, record, permutation, answer, selection)})
    return rows


def _count_tokens(
    rag: RAGModel, record: dict[str, Any], permutation: list[int], answer: str, selection: Selection
) -> int:
    """Tokens read and written for one question, padding and the scoring of the gold answer left out."""
    documents = [record["documents"][place - 1] for place in permutation]
    tokens = len(rag.prompts["generator"](record["question"], documents))
    tokens += len(rag.tokenizers["generator"](answer, add_special_tokens=False).input_ids) + 1
    if selection == "selector":
        tokens += len(rag.prompts["selector"](record["question"], record["documents"]))
        tokens += len(rag.codec.encode(permutation, len(record["documents"]))[0])
    return tokens


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
