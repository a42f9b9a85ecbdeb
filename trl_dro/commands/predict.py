# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""`trl-dro predict`: a trained system answers a file of questions, resumable, one line per question."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data import DatasetError, load_records, read_corpus, read_open_questions
from ..data.resumable import complete_rows, fingerprint
from ..data.schema import check_documents, check_question
from ..evaluation.evaluation import batches
from ..retrieval import BM25Retriever, retrieve_candidates
from ..system.pipeline import RAGPipeline
from ..system.rag_config import RAGConfig
from ..system.run_folder import system_stamp
from .evaluate import load_options


PREDICTIONS_FILE = "predictions.jsonl"


@dataclass
class PredictArguments:
    """
    System, and questions that it is to answer.

    Args:
        model (`str`):
            Run folder or Hub repo with both roles, or the generator alone.
        selector (`str`, *optional*):
            Selector, if not that of `model`.
        revision (`str`, *optional*):
            Branch, tag or commit of a Hub repo given as `model`.
        base_model (`str`, *optional*):
            Base of the adapters, instead of the one they name.
        questions (`str`, *optional*):
            Questions, jsonl with `question`, and with `documents` unless there is a `corpus`.
        corpus (`str`, *optional*):
            Passages, jsonl, from which BM25 retrieves the candidates.
        dataset_name (`str`, *optional*):
            Dataset with candidates, instead of `questions`: a Hub id, a `save_to_disk` folder, or a parquet file.
        dataset_split (`str`, *optional*):
            Its split.
        max_questions (`int`, *optional*):
            Answer the first ones only.
        output_dir (`str`, *optional*, defaults to `"predictions"`):
            Folder of `predictions.jsonl` and `settings.json`. What is there already is not done again.
        max_candidates (`int`, *optional*):
            Candidates per question, n, instead of the trained system's.
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

    model: str = field(metadata={"help": "Run folder or Hub repo with both roles, or the generator alone."})
    selector: str | None = field(default=None, metadata={"help": "Selector, if it is elsewhere."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model's Hub repo."})
    base_model: str | None = field(default=None, metadata={"help": "Base of the adapters, if not the one they name."})
    questions: str | None = field(
        default=None,
        metadata={"help": "Questions, jsonl with `question`, and with `documents` unless there is a corpus."},
    )
    corpus: str | None = field(
        default=None, metadata={"help": "Passages, jsonl, from which BM25 retrieves the candidates."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Dataset with candidates: a Hub id, a `save_to_disk` folder, or a jsonl or parquet file."},
    )
    dataset_split: str | None = field(default=None, metadata={"help": "Its split."})
    max_questions: int | None = field(default=None, metadata={"help": "Answer the first ones only."})
    output_dir: str = field(
        default="predictions", metadata={"help": "Folder of the answers; what is there is not done again."}
    )
    max_candidates: int | None = field(default=None, metadata={"help": "Candidates per question, n."})
    tokens_per_batch: int = field(default=16384, metadata={"help": "Prompt tokens computed at a time."})
    dtype: str = field(default="auto", metadata={"help": "Precision."})
    device: str | None = field(default=None, metadata={"help": "Device; the accelerator if there is one."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention of transformers."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Load the base in 4 bits."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether to run code that ships with a model."})

    def __post_init__(self):
        if (self.questions is None) == (self.dataset_name is None):
            raise ValueError("pass either --questions, with or without --corpus, or --dataset_name")
        if self.corpus is not None and self.questions is None:
            raise ValueError("--dataset_name has candidates already: leave out --corpus")
        for name in ("max_questions", "max_candidates", "tokens_per_batch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: it must be at least 1")


def predict(args: PredictArguments) -> list[dict[str, Any]]:
    """
    Answers questions and writes `predictions.jsonl`. What an earlier call left of the same questions is kept.

    Args:
        args ([`PredictArguments`]):
            System and questions.

    Returns:
        `list[dict]`: for each question its `row`, `id`, `question`, `answer`, and of the selected documents, best
        first, `selected` (places among the candidates, from 1), `selected_ids` and `probabilities`, each that of the
        document being chosen next.

    Raises:
        `DatasetError`: a question is malformed, or has no documents.
        `ValueError`: the system cannot be found, or `output_dir` holds other answers.
    """
    dataset = _load_questions(args)

    def work(left: list[int]) -> Iterator[tuple[list[int], list[dict[str, Any]]]]:
        sizes = {} if args.max_candidates is None else {"max_candidates": args.max_candidates}
        pipe = RAGPipeline.from_pretrained(
            args.model, args.selector, None, args.revision, args.base_model, load_options(args), **sizes
        )
        for rows, records in batches(pipe, dataset, left, args.tokens_per_batch):
            questions, documents = ([record[name] for record in records] for name in ("question", "documents"))
            outputs = pipe(questions, documents, batch_size=len(rows))
            yield rows, [_line(record, output) for record, output in zip(records, outputs, strict=True)]

    asked = {name: value for name, value in asdict(args).items() if name not in _NOT_COMPARED}
    asked |= system_stamp(args.selector or args.model, args.model, args.base_model)
    asked["dataset_sha256"] = fingerprint(dataset, ("question", "documents"))
    path = Path(args.output_dir) / PREDICTIONS_FILE
    predictions = complete_rows(path, len(dataset), asked, work, "Answering")
    print(f"{len(predictions):,} answers are in {path}")
    return predictions


# What does not change an answer.
_NOT_COMPARED = ("output_dir", "tokens_per_batch", "device")


def _load_questions(args: PredictArguments) -> Dataset:
    if args.dataset_name is not None:
        dataset, name = load_records(args.dataset_name, args.dataset_split), args.dataset_name
    else:
        dataset, name = read_open_questions(str(args.questions)), str(args.questions)
    if args.max_questions is not None:
        dataset = dataset.select(range(min(args.max_questions, len(dataset))))
    if args.corpus is not None:
        retriever = BM25Retriever(read_corpus(args.corpus))
        return retrieve_candidates(dataset, retriever, args.max_candidates or RAGConfig.max_candidates)
    for column in ("question", "documents"):
        if column not in dataset.column_names:
            hint = "; pass --corpus to retrieve them" if column == "documents" and args.questions else ""
            raise DatasetError(f"{name} has no {column}{hint}")
    for row, record in enumerate(dataset.select_columns(["question", "documents"])):
        check_question(record["question"], f"{name}, row {row}")
        check_documents(record["documents"], f"{name}, row {row}", num_selected=1)
    return dataset


def _line(record: dict[str, Any], output: Any) -> dict[str, Any]:
    return {
        "id": record.get("id"),
        "question": record["question"],
        "answer": output.answer,
        "selected": [document.position for document in output.documents],
        "selected_ids": [document.id for document in output.documents],
        "probabilities": [document.probability for document in output.documents],
    }
