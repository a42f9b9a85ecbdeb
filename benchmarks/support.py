# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
Does the gain of an answer tell whether its documents hold it? Questions about an invented world, half of them with
every passage that answers them taken away, are answered by the tiny model that ships with the package; the table shows
what thresholds of the gain would leave. Then 50 answers, of which 25 are wrong or copied, stand before the gates of
`trl-dro write-back`, with the same model as judge.

```bash
.venv/bin/python benchmarks/support.py
```
"""

import random
from collections import Counter
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.table import Table

from trl_dro import LoadOptions, RAGPipeline
from trl_dro.commands.cli import hush_libraries
from trl_dro.data import Corpus
from trl_dro.demo.tiny import GENERATOR_TEMPLATE, SELECTOR_TEMPLATE, TINY_MODEL
from trl_dro.demo.world import draw_world
from trl_dro.evaluation.abstention import count_at_thresholds, print_thresholds
from trl_dro.evaluation.evaluation import evaluate
from trl_dro.evaluation.scoring import is_relevant
from trl_dro.retrieval import BM25Retriever, retrieve_candidates
from trl_dro.synthetic.write_back import GATES, GeneratorSupport, sift_pairs, statement


NUM_QUESTIONS = 200
NUM_CANDIDATES = 10
NUM_SHOWN = 3
MIN_GAIN = 2.0  # the command's own


def ask(pipe: RAGPipeline, facts: list[dict[str, Any]], retriever: BM25Retriever) -> None:
    """Prints what thresholds leave of answers of which every other cannot be right."""
    rows = retrieve_candidates(Dataset.from_list(facts), retriever, NUM_CANDIDATES).to_list()
    for row in rows[::2]:
        row["documents"] = [document for document in row["documents"] if not is_relevant(document, row)]
    with TemporaryDirectory() as folder:
        scored = evaluate(
            lambda: pipe, Dataset.from_list(rows), folder, "oracle", context_reliance=False, prediction_gain=True
        )
    print_thresholds(count_at_thresholds(scored), None)
    for name, half in (("with", scored[1::2]), ("without", scored[::2])):
        gains = sorted(row["prediction_gain"] for row in half)
        quartiles = ", ".join(f"{gains[len(gains) * k // 4]:.1f}" for k in (1, 2, 3))
        print(f"gain of answers {name} their passage among the documents, quartiles: {quartiles} nats")


def write_back(pipe: RAGPipeline, facts: list[dict[str, Any]], corpus: Corpus, retriever: BM25Retriever) -> None:
    """Prints which gates refuse answers of each kind; what the last seven facts state is a passage of the corpus."""

    def pair(own, answer, cited):
        return {"question": own["question"], "answer": answer["answers"][0], "citations": [{"id": passage_of(cited)}]}

    others = facts[50:]
    kinds = {
        "right": [pair(fact, fact, fact) for fact in facts[:25]],
        "wrong": [pair(fact, other, fact) for fact, other in zip(facts[25:35], others, strict=False)],
        "wrong, from another passage": [
            pair(fact, other, other) for fact, other in zip(facts[35:43], others, strict=False)
        ],
        "copied": [pair(fact, fact, fact) for fact in facts[43:50]],
    }
    rows = [row for of_kind in kinds.values() for row in of_kind]
    written, refused = sift_pairs(rows, corpus, retriever, GeneratorSupport(pipe.rag, MIN_GAIN), {})
    table = Table(title=f"{len(rows)} answers, --min_gain {MIN_GAIN:g}", title_justify="left")
    for heading in ("answers", "of them", *GATES, "written"):
        table.add_column(heading)
    for kind, of_kind in kinds.items():
        asked = {row["question"] for row in of_kind}
        gates = Counter(each["gate"] for each in refused if each["question"] in asked)
        kept = sum(each["provenance"]["question"] in asked for each in written)
        table.add_row(kind, str(len(of_kind)), *(str(gates[gate]) for gate in GATES), str(kept))
    Console().print(table)


def passage_of(fact: dict[str, Any]) -> str:
    return fact["positive_ids"][0]


def main() -> None:
    hush_libraries()
    world = draw_world(0, "eval")
    facts = random.Random(0).sample(world.single_hop, NUM_QUESTIONS + 100)
    asked, told = facts[:NUM_QUESTIONS], facts[NUM_QUESTIONS:]
    copies = [statement(fact["question"], fact["answers"][0]) for fact in told[43:50]]
    passages = [*world.corpus, *({"id": f"copy-{i}", "title": "", "text": text} for i, text in enumerate(copies))]
    retriever = BM25Retriever(passages, show_progress=False)
    pipe = RAGPipeline.from_pretrained(
        TINY_MODEL,
        options=LoadOptions(device="cpu"),
        num_selected=NUM_SHOWN,
        max_candidates=NUM_CANDIDATES,
        max_answer_length=8,
        selector_template=SELECTOR_TEMPLATE,
        generator_template=GENERATOR_TEMPLATE,
    )
    ask(pipe, asked, retriever)
    write_back(pipe, told, Corpus.from_documents(passages), retriever)


if __name__ == "__main__":
    main()
