# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
Would write-back's entailment gate refuse wrong answers if a passage had to make the question likelier too? Of right
answers, of answers that stand in a passage about something else, and of names in a passage that BM25 finds for the
question and that does not answer it, the table has the gain of the answer, which the gate asks for, and that of the
question, log p(question | passage) − log p(question), in nats.

```bash
.venv/bin/python benchmarks/question_gain.py      # the tiny model and an invented world
.venv/bin/python benchmarks/question_gain.py --base HuggingFaceTB/SmolLM2-135M-Instruct --dtype bfloat16 --pairs 12 \
    --seed 0 --questions train.jsonl --corpus corpus.jsonl
```
"""

import random
import re
from argparse import ArgumentParser
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from trl_dro import LoadOptions, RAGPipeline
from trl_dro.commands.cli import hush_libraries
from trl_dro.data import read_corpus, read_questions
from trl_dro.data.schema import Document
from trl_dro.demo.tiny import GENERATOR_TEMPLATE, SELECTOR_TEMPLATE, TINY_MODEL
from trl_dro.demo.world import draw_world
from trl_dro.metrics.text import has_answer
from trl_dro.model.likelihood import completion_logits, completion_logps
from trl_dro.model.prompts import PassagePrompts
from trl_dro.retrieval import BM25Retriever
from trl_dro.synthetic.write_back import GeneratorSupport


KINDS = ("right", "wrong, from another passage", "wrong, from a passage that was retrieved")
MIN_GAIN = 2.0  # the command's own
NUM_RETRIEVED = 5
# A name within a sentence.
NAME = re.compile(r"(?<![.!?] )(?<!^)\b[A-Z]\w+(?: [A-Z]\w+)?")


class Fact(NamedTuple):
    """A question, its answer, and a passage with it."""

    question: str
    answer: str
    passage: Document


class Pair(NamedTuple):
    """A question, an answer, right or wrong, and the passage that it cites."""

    kind: str
    question: str
    answer: str
    passage: Document


def invented_facts(seed: int, number: int) -> tuple[list[Fact], BM25Retriever]:
    world = draw_world(seed, "eval")
    passages = {passage["id"]: passage for passage in world.corpus}
    drawn: list[Any] = random.Random(seed).sample(world.single_hop, number)
    facts = [Fact(each["question"], each["answers"][0], passages[each["positive_ids"][0]]) for each in drawn]
    return facts, BM25Retriever(world.corpus, show_progress=False)


def real_facts(questions: str, corpus: str, rng: random.Random, number: int) -> tuple[list[Fact], BM25Retriever]:
    """Questions that are answered by one of the first passages that BM25 finds."""
    retriever = BM25Retriever(read_corpus(corpus), show_progress=False)
    rows = read_questions(questions).to_list()
    rng.shuffle(rows)
    facts = []
    for row, ranking in zip(rows, retriever.search([row["question"] for row in rows], NUM_RETRIEVED), strict=True):
        stated = [
            (answer, each) for each in ranking for answer in row["answers"] if has_answer(each["text"], [answer])
        ]
        facts += [Fact(row["question"], *each) for each in stated[:1]]
    return facts[:number], retriever


def make_pairs(facts: Sequence[Fact], retriever: BM25Retriever, rng: random.Random) -> list[Pair]:
    """As many of each kind as a third of the facts, in turns, as far as there are names."""
    number = len(facts) // 3
    right = [Pair(KINDS[0], *fact) for fact in facts[:number]]
    asked = facts[number : 2 * number]
    elsewhere = [
        Pair(KINDS[1], fact.question, other.answer, other.passage)
        for fact, other in zip(asked, facts[2 * number :], strict=False)
    ]
    near = []
    for fact, ranking in zip(asked, retriever.search([fact.question for fact in asked], NUM_RETRIEVED), strict=True):
        passage = next((each for each in ranking if not has_answer(each["text"], [fact.answer])), None)
        if passage is None:
            continue
        known = f"{fact.question} {passage.get('title') or ''}".lower()
        if names := [name for name in NAME.findall(passage["text"]) if name.lower() not in known]:
            near.append(Pair(KINDS[2], fact.question, rng.choice(names), passage))
    return [pair for turn in zip_longest(right, elsewhere, near) for pair in turn if pair is not None]


@torch.no_grad()
def question_gain(pipe: RAGPipeline, question: str, passage: Document) -> float:
    tokenizer = pipe.rag.tokenizers["generator"]
    rows = PassagePrompts(tokenizer).rows(question, [passage], with_none=True)
    prompts, asked = zip(*rows, strict=True)
    model = pipe.rag.roles.module("generator")
    shown, alone = completion_logps(completion_logits(model, prompts, asked, tokenizer.pad_token_id, model.device))
    return (shown - alone).item()


def five_numbers(values: Sequence[float]) -> str:
    """The least, the quartiles, the most."""
    ordered = sorted(values)
    return ", ".join(f"{ordered[min(len(ordered) * k // 4, len(ordered) - 1)]:.1f}" for k in range(5))


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--base", help="Model; the tiny one by default, in an invented world.")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--questions", help="Questions with answers, jsonl.")
    parser.add_argument("--corpus", help="Their passages.")
    parser.add_argument("--pairs", type=int, default=25, help="Of each kind.")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    hush_libraries()
    rng = random.Random(args.seed)
    templates = {}
    if args.base is None:
        facts, retriever = invented_facts(args.seed, 3 * args.pairs)
        templates = {"selector_template": SELECTOR_TEMPLATE, "generator_template": GENERATOR_TEMPLATE}
    else:
        facts, retriever = real_facts(args.questions, args.corpus, rng, 3 * args.pairs)
    options = LoadOptions(device="cpu", dtype=args.dtype)
    sizes = {"num_selected": 1, "max_candidates": 10, "max_answer_length": 16}
    pipe = RAGPipeline.from_pretrained(args.base or TINY_MODEL, options=options, **sizes, **templates)
    support = GeneratorSupport(pipe.rag, MIN_GAIN)
    gains: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for kind, question, answer, passage in tqdm(make_pairs(facts, retriever, rng), unit="pair"):
        [of_answer] = support(question, answer, [passage])
        gains[kind].append((of_answer, question_gain(pipe, question, passage)))
    table = Table(title="Gains in nats: least, quartiles, most", title_justify="left")
    levels = (MIN_GAIN, 5.0, 10.0)
    for heading in ("answers", "of them", "answer", "question", *(f"both at least {level:g}" for level in levels)):
        table.add_column(heading)
    for kind, pairs in gains.items():
        shown = (five_numbers(values) for values in zip(*pairs, strict=True))
        table.add_row(kind, str(len(pairs)), *shown, *(str(sum(min(p) >= level for p in pairs)) for level in levels))
    Console().print(table)


if __name__ == "__main__":
    main()
