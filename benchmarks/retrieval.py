# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
Throughput and memory of BM25 retrieval by size of the corpus: passages read and indexed per second, seconds to open
the index, questions per second for their top 20, peak memory up to the index and with searching, and disk. Each size
runs in a process of its own, whose peak memory is the one reported, pages of memory-mapped files included. Seconds are
those of its work, on all its threads, so that cores that others share make no difference; waits for the disk do not
count.

The corpus has passages of 100 words: those of a file, repeated with every fifth word exchanged for another, or words
drawn by Zipf's law. The questions are those of a file, or eight words of a passage.

```bash
.venv/bin/python benchmarks/retrieval.py --sizes 10000 100000 1000000
```
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from trl_dro.data import open_corpus, read_corpus, read_questions
from trl_dro.retrieval import BM25Retriever


WORDS_PER_PASSAGE = 100
NUM_QUESTIONS = 500
K = 20


def passages(size: int, source: str | None) -> Iterator[str]:
    """Texts of `size` passages, the same at every call."""
    rng = np.random.default_rng(0)
    if source is None:
        vocabulary = np.array([f"w{number}" for number in range(300_000)])
        for _ in range(size):
            yield " ".join(vocabulary[rng.zipf(1.1, 4 * WORDS_PER_PASSAGE) % len(vocabulary)][:WORDS_PER_PASSAGE])
        return
    texts = [document["text"].split() for document in read_corpus(source)]
    vocabulary = np.array(list(itertools.chain.from_iterable(texts)))
    for number in range(size):
        words = (texts[number % len(texts)] * WORDS_PER_PASSAGE)[:WORDS_PER_PASSAGE]
        num_exchanged = WORDS_PER_PASSAGE // 5 if number >= len(texts) else 0
        others = vocabulary[rng.integers(len(vocabulary), size=num_exchanged)].tolist()
        for position, word in zip(rng.integers(WORDS_PER_PASSAGE, size=num_exchanged).tolist(), others, strict=True):
            words[position] = word
        yield " ".join(words)


def measure(corpus_path: str, questions: list[str], folder: str) -> dict[str, float]:
    """Speed of each stage, in seconds of work, and peak memory of this process."""
    marks = [time.process_time()]
    corpus = open_corpus(corpus_path, folder, show_progress=False)
    marks.append(time.process_time())
    retriever = BM25Retriever(show_progress=False)
    retriever.index(corpus, Path(folder) / "indexes")
    marks.append(time.process_time())
    peak_of_index = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    retriever = BM25Retriever(show_progress=False)
    retriever.index(corpus, Path(folder) / "indexes")
    marks.append(time.process_time())
    retriever.search(questions, K)
    marks.append(time.process_time())
    return {
        "read": len(corpus) / (marks[1] - marks[0]),
        "index": len(corpus) / (marks[2] - marks[1]),
        "open": marks[3] - marks[2],
        "search": len(questions) / (marks[4] - marks[3]),
        "peak of index": peak_of_index,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "disk": sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 2**30,
    }


def main() -> None:
    """Prints one row per size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--corpus", help="jsonl file whose passages are repeated with changes")
    parser.add_argument("--questions", help="jsonl file of questions")
    parser.add_argument("--json", help="file to write the numbers to")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        corpus_path, questions_path, folder = args.measure
        print(json.dumps(measure(corpus_path, json.loads(Path(questions_path).read_text()), folder)))
        return

    table = Table(title="BM25, passages of 100 words", title_justify="left")
    for heading in ("passages", "read/s", "index/s", "open, s", "questions/s", "peak GiB", "+ search", "disk GiB"):
        table.add_column(heading, justify="right")
    results = {}
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            path, questions_path = Path(folder) / "corpus.jsonl", Path(folder) / "questions.json"
            questions = []
            with open(path, "w") as file:
                for number, text in enumerate(passages(size, args.corpus)):
                    file.write(json.dumps({"id": f"p{number}", "title": "", "text": text}) + "\n")
                    if number < NUM_QUESTIONS:
                        questions.append(" ".join(text.split()[10:18]))
            if args.questions:
                questions = read_questions(args.questions)["question"][:NUM_QUESTIONS]
            questions_path.write_text(json.dumps(questions))
            command = [sys.executable, __file__, "--measure", str(path), str(questions_path), f"{folder}/cache"]
            process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[size] = numbers = json.loads(process.stdout.splitlines()[-1])
        table.add_row(
            f"{size:,}",
            f"{numbers['read']:,.0f}",
            f"{numbers['index']:,.0f}",
            f"{numbers['open']:.1f}",
            f"{numbers['search']:,.0f}",
            f"{numbers['peak of index']:.2f}",
            f"{numbers['peak']:.2f}",
            f"{numbers['disk']:.2f}",
        )
    Console().print(table)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
