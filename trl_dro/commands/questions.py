# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""`trl-dro questions`: documents without questions get some, each with its answer and the passage it comes from."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.corpus import open_corpus
from ..data.resumable import write_json
from ..data.schema import DatasetError
from ..data.storage import DEFAULT_CACHE_DIR, write_whole
from ..retrieval import BM25Retriever
from ..synthetic.gates import BOTH_SIDES, GATES, sift
from ..synthetic.job import choose_pairs, choose_passages, split_by_document, write_candidates
from ..synthetic.writers import QUESTION_WORDS, Endpoint, LocalModel, Writer
from ..system.run_folder import LoadOptions
from .arguments import CORPUS_HELP, CuttingArguments, check_range


TRAIN_FILE, DEV_FILE, REFUSED_FILE, SUMMARY_FILE = "train.jsonl", "dev.jsonl", "refused.jsonl", "summary.json"

Row = dict[str, Any]


@dataclass
class QuestionWritingArguments(CuttingArguments):
    """
    Passages, who writes about them, and which questions are kept; see also [`CuttingArguments`].

    Args:
        corpus (`str`):
            Passages, as for [`~data.corpus.open_corpus`].
        output_dir (`str`, *optional*, defaults to `"questions"`):
            Folder of `train.jsonl`, `dev.jsonl`, `refused.jsonl`, `summary.json` and `candidates.jsonl`. Passages that
            were written about already are not written about again.
        model_name_or_path (`str`, *optional*):
            Language model that writes, unless there is an endpoint, and judges what a passage adds to its answers.
        api_base (`str`, *optional*):
            OpenAI-compatible endpoint that writes instead, see [`~synthetic.writers.Endpoint`].
        api_model (`str`, *optional*):
            Name of its model.
        questions_per_passage (`int`, *optional*, defaults to `3`):
            Questions about each passage.
        max_passages (`int`, *optional*):
            Passages to write about, drawn at random; all by default.
        max_pairs (`int`, *optional*, defaults to `0`):
            Pairs of passages that share a name to write about, too: questions that take both.
        question_words (`list[str]`, *optional*, defaults to `who when where what which how many`):
            First words that a local model's questions begin with, in turn.
        min_gain (`float`, *optional*, defaults to `2.0`):
            Nats by which its passage must make an answer likelier, and a pair than the better one of its passages.
        retrieved_within (`int`, *optional*, defaults to `20`):
            Rank by which BM25 must find the passage, or both.
        dev_share (`float`, *optional*, defaults to `0.2`):
            Share of the questions that is held out, of documents of their own.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Precision of the model; `"auto"` is that in which it is stored, and float32 on a CPU.
        device (`str`, *optional*):
            Device; the accelerator if there is one.
        seed (`int`, *optional*, defaults to `0`):
            Of the draw of passages.
        cache_dir (`str`, *optional*, defaults to `$HF_HOME/trl_dro`):
            Where corpora and indexes are kept.
    """

    corpus: str = field(metadata={"help": CORPUS_HELP})
    output_dir: str = field(
        default="questions", metadata={"help": "Folder of the questions; what is written is not written again."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model that writes, unless there is an endpoint, and judges the answers."}
    )
    api_base: str | None = field(
        default=None,
        metadata={"help": "OpenAI-compatible endpoint that writes, http://HOST/v1; OPENAI_API_KEY is its key."},
    )
    api_model: str | None = field(default=None, metadata={"help": "Name of the endpoint's model."})
    questions_per_passage: int = field(default=3, metadata={"help": "Questions about each passage."})
    max_passages: int | None = field(
        default=None, metadata={"help": "Passages to write about, drawn at random; all by default."}
    )
    max_pairs: int = field(
        default=0,
        metadata={"help": "Pairs of passages that share a name to write about, for questions that take both."},
    )
    question_words: list[str] = field(
        default_factory=lambda: list(QUESTION_WORDS),
        metadata={"help": "First words of a local model's questions, which take turns."},
    )
    min_gain: float = field(default=2.0, metadata={"help": "Nats by which a passage must make its answer likelier."})
    retrieved_within: int = field(default=20, metadata={"help": "Rank by which BM25 must find the passage."})
    dev_share: float = field(
        default=0.2, metadata={"help": "Share of the questions held out, of documents of their own."}
    )
    dtype: str = field(
        default="auto", metadata={"help": "Precision; auto is that in which the model is stored, float32 on a CPU."}
    )
    device: str | None = field(default=None, metadata={"help": "Device; the accelerator if there is one."})
    seed: int = field(default=0, metadata={"help": "Of the draw of passages."})
    cache_dir: str = field(
        default=str(DEFAULT_CACHE_DIR), metadata={"help": "Where corpora and indexes are kept, by their content."}
    )

    def __post_init__(self):
        if self.model_name_or_path is None and self.api_base is None:
            raise ValueError("nobody to write questions: pass --model_name_or_path, or --api_base and --api_model")
        if (self.api_base is None) != (self.api_model is None):
            raise ValueError("--api_base and --api_model go together: an endpoint's address and its model's name")
        self.cut()
        check_range(self, ["questions_per_passage", "max_passages", "retrieved_within"], 1)
        check_range(self, ["max_pairs"], 0)
        check_range(self, ["dev_share"], 0, 0.9)


def write_questions(args: QuestionWritingArguments) -> dict[str, Any]:
    """
    Writes questions about the passages of a corpus, keeps those that pass every gate, and says how many did.

    Args:
        args ([`QuestionWritingArguments`]):
            Passages, writer and gates.

    Returns:
        `dict[str, Any]`: what `summary.json` holds: `num_passages`, `num_pairs`, `num_written`, `refused` by reason,
        `num_train`, `num_dev`, `seconds` and `tokens`.

    Raises:
        `DatasetError`: the corpus cannot be read, the endpoint gives no answer, or no question passes.
        `ValueError`: the model cannot be loaded, or `output_dir` holds other questions.
    """
    corpus = open_corpus(args.corpus, args.cache_dir, *args.cut())
    places = choose_passages(corpus, args.max_passages, args.seed)
    retriever = BM25Retriever()
    retriever.index(corpus, Path(args.cache_dir) / "indexes")
    writer, judge = _writer_and_judge(args)
    count, within = args.questions_per_passage, args.retrieved_within
    depth = max(within, 20)  # so that the gate can be moved without writing anew
    pairs = choose_pairs(corpus, places, retriever, args.max_pairs, args.dev_share, args.seed)
    rows = write_candidates(corpus, places, pairs, writer, judge, retriever, args.output_dir, count, depth)
    candidates = [
        {**each, "passage_ids": row["passage_ids"], "sources": row["sources"]}
        for row in rows
        for each in row["candidates"]
    ]
    sift(candidates, args.min_gain, within)
    kept = [
        {
            "id": each["id"],
            "question": each["question"],
            "answers": [each["answer"]],
            "positive_ids": each["passage_ids"],
            "sources": each["sources"],
            "rank": each["rank"],
            "gain": each["gain"],
        }
        for each in candidates
        if each["refused"] is None
    ]
    train, dev = split_by_document(kept, args.dev_share)
    placed = {each["id"] for each in [*train, *dev]}
    for each in candidates:
        if each["refused"] is None and each["id"] not in placed:
            each["refused"] = BOTH_SIDES
    reasons = Counter(each["refused"] for each in candidates if each["refused"])
    summary = {
        "num_passages": len(places),
        "num_pairs": len(pairs),
        "num_written": len(candidates),
        "refused": {gate: reasons[gate] for gate in GATES},
        "num_train": len(train),
        "num_dev": len(dev),
        "judged": judge is not None,
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "tokens": sum(row["tokens"] for row in rows),
    }
    folder = Path(args.output_dir)
    write_lines(folder / REFUSED_FILE, [each for each in candidates if each["refused"]])
    write_lines(folder / TRAIN_FILE, train)
    write_lines(folder / DEV_FILE, dev)
    write_json(folder / SUMMARY_FILE, summary)
    print_summary(summary, folder)
    if not candidates:
        raise DatasetError(
            f"the model wrote nothing in the form of a question with its answer about {len(places)} passages: take a "
            "larger one"
        )
    if not train:
        raise DatasetError(
            f"none of {len(candidates)} questions can be trained on: {folder / REFUSED_FILE} says why; take a larger "
            "model, or lower --min_gain"
        )
    return summary


def _writer_and_judge(args: QuestionWritingArguments) -> tuple[Writer, LocalModel | None]:
    """The endpoint or else the model, and the model, if there is one."""
    judge = None
    if args.model_name_or_path is not None:
        options = LoadOptions(device=args.device)
        if args.dtype != "auto" or options.target.type == "cpu":  # where bfloat16 is a slow detour
            options = LoadOptions(device=args.device, dtype="float32" if args.dtype == "auto" else args.dtype)
        judge = LocalModel.from_pretrained(args.model_name_or_path, options, args.question_words)
    writer: Writer | None = judge
    if args.api_base is not None and args.api_model is not None:
        writer = Endpoint(args.api_base, args.api_model)
    assert writer is not None  # one of them is asked for
    return writer, judge


def write_lines(path: Path, rows: Sequence[Row]) -> None:
    """Writes a jsonl file that is whole or not there."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def print_summary(summary: Row, folder: Path) -> None:
    """Prints what became of the questions, gate by gate."""
    pairs = f" and {summary['num_pairs']:,} pairs" if summary["num_pairs"] else ""
    print(
        f"{summary['num_written']:,} questions about {summary['num_passages']:,} passages{pairs} were written, in "
        f"{summary['seconds']:,.0f} s and {summary['tokens']:,} tokens."
    )
    for gate, number in summary["refused"].items():
        print(f"  {gate:32}{-number:6,}")
    kept = summary["num_train"] + summary["num_dev"]
    print(f"  {'kept':32}{kept:6,}   ({summary['num_train']:,} to train, {summary['num_dev']:,} held out)")
    if not summary["judged"]:
        print("No --model_name_or_path: nobody judged whether the passage helps to answer.")
    print(f"They are in {folder / TRAIN_FILE} and {folder / DEV_FILE}, the others, with reasons, in {REFUSED_FILE}.")
