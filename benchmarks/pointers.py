# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
Can a base point to a passage by its id? A selector must before it can rank, and a small base cannot: asked for the
passage that a quote stands in, it guesses. This trains the ability alone, on nothing but passages: each row is a list
of numbered excerpts and then many quotes, each answered with the id of its excerpt, so that one forward teaches as
many choices as there are quotes, where a question with its candidates teaches one.

```bash
.venv/bin/python benchmarks/pointers.py --base HuggingFaceTB/SmolLM2-135M-Instruct --corpus corpus.jsonl
.venv/bin/python benchmarks/pointers.py --quick      # the tiny model and an invented world
```

Prints the loss in nats and the accuracy over the quotes of every 20 rows before they are trained on, and writes the
adapter, a plain peft one, to `--out`.
"""

import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from real_models import setting
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase, set_seed

from trl_dro.demo.tiny import TINY_MODEL
from trl_dro.demo.world import synthetic_world


@dataclass
class Settings:
    base: str = setting("HuggingFaceTB/SmolLM2-135M-Instruct", "Base, a Hub id or a folder.")
    corpus: str = setting("corpus.jsonl", "Passages, a jsonl file with `title` and `text`.")
    out: str = setting("outputs/pointers", "Folder of the adapter.")
    rows: int = setting(340, "Lists of passages.")
    passages: int = setting(5, "Passages of a list.")
    quotes: int = setting(10, "Quotes of a list.")
    excerpt_words: int = setting(20, "Words of a passage that are shown.")
    quote_words: int = setting(8, "Words of a quote.")
    titles: float = setting(0.2, "Share of quotes that are the title instead.")
    rows_per_update: int = setting(2, "Lists of an update.")
    learning_rate: float = setting(1e-3, "Learning rate, after a rise over 10 updates.")
    lora_r: int = setting(32, "Rank of the adapter; alpha is twice that.")
    seed: int = setting(0, "Seed of the adapter and of the lists.")
    quick: bool = setting(False, "The tiny model, an invented world and few lists, to see that it runs.")


@dataclass
class Row:
    """Tokens of a list with its quotes; where each id is written, and which it is, from 0."""

    tokens: list[int]
    places: list[int]
    ids: list[int]


def excerpt(text: str, words: int, rng: random.Random) -> str:
    every = text.split()
    start = rng.randrange(max(1, len(every) - words))
    return " ".join(every[start : start + words])


def id_tokens(tokenizer: PreTrainedTokenizerBase, number: int) -> tuple[int, list[int]]:
    """Where among the tokens of "[1]" the id stands, and the one token of each id."""
    written = [tokenizer(f"[{i + 1}]", add_special_tokens=False).input_ids for i in range(number)]
    place = next(i for i in range(len(written[0])) if len({ids[i] for ids in written}) > 1)
    if any(len(ids) != len(written[0]) or ids[place + 1 :] != written[0][place + 1 :] for ids in written):
        raise SystemExit("--passages: this tokenizer does not write each of these ids in one token")
    return place, [ids[place] for ids in written]


def rows(
    passages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, place: int, s: Settings
) -> Iterator[Row]:
    rng = random.Random(s.seed)
    for _ in range(s.rows):
        chosen = rng.sample(passages, s.passages)
        texts = [excerpt(passage["text"], s.excerpt_words, rng) for passage in chosen]
        blocks = [f"[{i + 1}] {p['title']}\n{text}" for i, (p, text) in enumerate(zip(chosen, texts, strict=True))]
        tokens = list(tokenizer("Passages:\n" + "\n".join(blocks) + "\n").input_ids)
        row = Row(tokens, [], [])
        for _ in range(s.quotes):
            asked = rng.randrange(s.passages)
            title = rng.random() < s.titles
            quote = chosen[asked]["title"] if title else excerpt(texts[asked], s.quote_words, rng)
            row.tokens += tokenizer(f"\nQuestion: {quote}\n", add_special_tokens=False).input_ids
            row.places.append(len(row.tokens) + place - 1)  # whose logits predict the id
            row.ids.append(asked)
            row.tokens += tokenizer(f"[{asked + 1}]", add_special_tokens=False).input_ids
        yield row


def main(arguments: Sequence[str] | None = None) -> None:
    s = Settings(**vars(HfArgumentParser(Settings, description=__doc__).parse_args(arguments)))
    if s.quick:
        s.base, s.rows = str(TINY_MODEL), 40
        world, _ = synthetic_world(24, 8, 0, 0.0, 5)
        passages = [document for documents in world["documents"] for document in documents]
    else:
        with open(s.corpus, encoding="utf-8") as file:
            passages = [json.loads(line) for line in file]
    set_seed(s.seed)
    tokenizer = AutoTokenizer.from_pretrained(s.base)
    place, choices = id_tokens(tokenizer, s.passages)
    config = LoraConfig(task_type="CAUSAL_LM", r=s.lora_r, lora_alpha=2 * s.lora_r, target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(s.base, dtype=torch.float32), config)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=s.learning_rate, weight_decay=0.0, betas=(0.9, 0.95))
    start, seen = time.process_time(), []
    print("| lists | loss, nats | accuracy, % | processor seconds |\n|---|---|---|---|")
    for number, row in enumerate(rows(passages, tokenizer, place, s), start=1):
        logits = model(torch.tensor([row.tokens])).logits[0, row.places][:, choices].log_softmax(dim=-1)
        target = torch.tensor(row.ids)
        loss = -logits.gather(-1, target[:, None]).mean()
        (loss / s.rows_per_update).backward()
        seen.append((loss.item(), (logits.argmax(dim=-1) == target).float().mean().item()))
        if number % s.rows_per_update == 0:
            for group in optimizer.param_groups:
                group["lr"] = s.learning_rate * min(1.0, number / s.rows_per_update / 10)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if number % 20 == 0:
            losses, hits = zip(*seen[-20:], strict=True)
            seconds = time.process_time() - start
            print(f"| {number} | {sum(losses) / 20:.2f} | {100 * sum(hits) / 20:.1f} | {seconds:.0f} |", flush=True)
    model.save_pretrained(s.out)
    tokenizer.save_pretrained(s.out)
    print(Path(s.out))


if __name__ == "__main__":
    main()
