# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""`trl-dro retrieve`: every question's candidates, once, for training and evaluation."""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset

from ..data.benchmarks import BENCHMARKS, benchmark_summary, load_benchmark
from ..data.corpus import Corpus, open_corpus
from ..data.files import load_records, read_questions
from ..data.schema import DatasetError
from ..data.storage import DEFAULT_CACHE_DIR
from ..retrieval import (
    BM25Retriever,
    ColBERTRetriever,
    DenseRetriever,
    HybridRetriever,
    PrecomputedRetriever,
    Retriever,
    open_service,
    retrieve_to_folder,
)
from ..retrieval.job import print_report, read_report
from ..retrieval.services import HOW_TO_NAME, is_service
from .arguments import CORPUS_HELP, CuttingArguments, check_range


RETRIEVERS = ("bm25", "dense", "colbert", "precomputed")


@dataclass
class RetrieveArguments(CuttingArguments):
    """
    Questions, corpus and retriever; see also [`CuttingArguments`].
    """

    questions: str = field(
        metadata={
            "help": f"Benchmark ({', '.join(BENCHMARKS)}), jsonl file with `question` and `answers`, or dataset of "
            "such: a `save_to_disk` folder, parquet file or Hub id."
        }
    )
    output_dir: str = field(metadata={"help": "Folder of the dataset; each split is a subfolder."})
    corpus: str | None = field(
        default=None,
        metadata={"help": f"{CORPUS_HELP} Not for `precomputed`."},
    )
    split: str = field(default="train", metadata={"help": "Split of the questions, and name of the result."})
    source: str | None = field(
        default=None, metadata={"help": "File, folder or Hub id to load the benchmark from; FlashRAG's by default."}
    )
    retriever: list[str] = field(
        default_factory=lambda: ["bm25"],
        metadata={
            "help": f"One of {', '.join(RETRIEVERS)}; several are fused by reciprocal rank. `precomputed` takes the "
            "candidates that the questions have already, such as the paragraphs of a benchmark. Or a service: "
            "elasticsearch+URL/INDEX, opensearch+URL/INDEX, qdrant+URL/COLLECTION, qdrant+file:FOLDER/COLLECTION, or "
            "MODULE:FUNCTION that returns a LangChain or LlamaIndex retriever."
        },
    )
    k: int = field(default=20, metadata={"help": "Candidates per question."})
    dense_model: str = field(
        default="sentence-transformers/all-MiniLM-L6-v2",
        metadata={
            "help": "sentence-transformers model of `dense` and of services that search vectors, a Hub id or folder."
        },
    )
    dense_index: str = field(
        default="Flat", metadata={"help": "Index of `dense` as faiss.index_factory names it; Flat is exact."}
    )
    colbert_model: str = field(
        default="colbert-ir/colbertv2.0", metadata={"help": "Checkpoint of `colbert`, a Hub id or a folder."}
    )
    k1: float = field(default=1.5, metadata={"help": "BM25: how slowly a repeated word stops adding to the score."})
    b: float = field(default=0.75, metadata={"help": "BM25: how much long passages are discounted, from 0 to 1."})
    shard_size: int = field(
        default=1000, metadata={"help": "Questions that are saved at once: the most that a kill can cost."}
    )
    batch_size: int = field(default=256, metadata={"help": "Questions searched at once."})
    cache_dir: str = field(
        default=str(DEFAULT_CACHE_DIR), metadata={"help": "Where corpora and indexes are kept, by their content."}
    )
    push_to_hub: str | None = field(default=None, metadata={"help": "Hub dataset to upload the result to as well."})

    def __post_init__(self):
        for name in self.retriever:
            if name not in RETRIEVERS and not is_service(name):
                raise DatasetError(
                    f"--retriever {name}: choose one or several of {', '.join(RETRIEVERS)}, or {HOW_TO_NAME}"
                )
        if len(set(self.retriever)) != len(self.retriever):
            raise DatasetError(f"--retriever {' '.join(self.retriever)}: name each retriever once")
        needs_corpus = any(name != "precomputed" and not is_service(name) for name in self.retriever)
        if needs_corpus != (self.corpus is not None):
            raise DatasetError(
                f"--retriever {' '.join(self.retriever)} needs a corpus to search: --corpus FILE"
                if needs_corpus
                else f"--retriever {' '.join(self.retriever)} searches no corpus: leave out --corpus"
            )
        check_range(self, ["k", "shard_size", "batch_size"], 1)
        self.cut()
        check_range(self, ["k1"], 0)
        check_range(self, ["b"], 0, 1)


def retrieve(args: RetrieveArguments) -> Dataset:
    """Gives every question its candidates, once, for training and evaluation, and prints Recall@k."""
    questions = load_questions(args)
    retrievers = [make_retriever(name, args, questions) for name in args.retriever]
    retriever = retrievers[0] if len(retrievers) == 1 else HybridRetriever(retrievers)
    corpus: Corpus | None = None
    if args.corpus is not None:
        corpus = open_corpus(args.corpus, args.cache_dir, *args.cut())
    dataset = retrieve_to_folder(
        questions,
        retriever,
        corpus,
        args.output_dir,
        split=args.split,
        k=args.k,
        cache_dir=args.cache_dir,
        shard_size=args.shard_size,
        batch_size=args.batch_size,
    )
    folder = Path(args.output_dir) / args.split
    k = args.k
    if (report := read_report(folder)) is not None:
        print_report(report, title=f"{' + '.join(args.retriever)}, {args.split}")
        k = report["settings"]["k"]
    print(f"{len(dataset):,} questions with their top {k} are in {folder}")
    if args.push_to_hub:
        dataset.push_to_hub(args.push_to_hub, split=args.split)
    return dataset


def load_questions(args: RetrieveArguments) -> Dataset:
    """The questions, from a benchmark, a file or a dataset."""
    if args.questions in BENCHMARKS:
        questions = load_benchmark(args.questions, args.split, args.source)
        print(benchmark_summary(args.questions, args.split, questions))
        return questions
    if args.source is not None:
        raise DatasetError(f"--source belongs to a benchmark ({', '.join(BENCHMARKS)}), not to {args.questions}")
    if args.retriever == ["precomputed"] or not args.questions.endswith((".jsonl", ".jsonl.gz")):
        # What has no splits of its own becomes that of the result.
        path = Path(args.questions)
        has_splits = not path.exists() or (path / "dataset_dict.json").is_file()
        return load_records(args.questions, args.split if has_splits else None)
    return read_questions(args.questions)


def make_retriever(name: str, args: RetrieveArguments, questions: Dataset) -> Retriever:
    """The retriever of this name, with its settings."""
    match name:
        case "bm25":
            return BM25Retriever(k1=args.k1, b=args.b)
        case "dense":
            return DenseRetriever(args.dense_model, factory=args.dense_index)
        case "colbert":
            return ColBERTRetriever(args.colbert_model)
        case "precomputed":
            return PrecomputedRetriever(questions)
        case _:
            return open_service(name, args.dense_model)
