# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
What does a base know of relevance before any training? Ranks each question's candidates by log p(question | passage)
(Sachan et al. 2022, https://huggingface.co/papers/2204.07496), one passage at a time, where no id has to be written,
and compares Recall@1 and Recall@2 with the retriever's on the same questions.

```bash
.venv/bin/python benchmarks/query_likelihood.py --base HuggingFaceTB/SmolLM2-135M-Instruct --data outputs/nq/train
.venv/bin/python benchmarks/query_likelihood.py --quick      # the tiny model and an invented world
```

`--weights` adds so many times the log of the retriever's score, as `retriever_prior_from="score"` does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import load_from_disk
from real_models import setting
from real_models_report import compared
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from trl_dro.demo.tiny import TINY_MODEL
from trl_dro.demo.world import synthetic_world
from trl_dro.evaluation.scoring import is_relevant


@dataclass
class Settings:
    base: str = setting("HuggingFaceTB/SmolLM2-135M-Instruct", "Base, a Hub id or a folder.")
    data: str = setting("outputs/nq/train", "A dataset that trl-dro retrieve wrote.")
    questions: int = setting(100, "Questions, the last ones.")
    candidates: int = setting(5, "Candidates of each, n.")
    weights: list[float] = setting([0.0, 2.0, 5.0], "Weights of the log of the retriever's score.")
    quick: bool = setting(False, "The tiny model and an invented world.")


@torch.no_grad()
def likelihood(model: Any, tokenizer: Any, question: str, document: dict[str, Any]) -> float:
    """log p(question | passage), in nats."""
    prompt = tokenizer(f"Passage: {document['title']}\n{document['text']}\nQuestion:").input_ids
    asked = tokenizer(f" {question}", add_special_tokens=False).input_ids
    logits = model(torch.tensor([prompt + asked]), logits_to_keep=len(asked) + 1).logits[0, :-1]
    return logits.log_softmax(dim=-1).gather(-1, torch.tensor(asked)[:, None]).sum().item()


def main(arguments: Sequence[str] | None = None) -> None:
    s = Settings(**vars(HfArgumentParser(Settings, description=__doc__).parse_args(arguments)))
    if s.quick:
        s.base = str(TINY_MODEL)
        _, dataset = synthetic_world(24, 8, 0, 0.0, s.candidates)
    else:
        dataset = load_from_disk(s.data)
        dataset = dataset.select(range(max(0, len(dataset) - s.questions), len(dataset)))
    tokenizer = AutoTokenizer.from_pretrained(s.base)
    model = AutoModelForCausalLM.from_pretrained(s.base, dtype=torch.float32).eval()
    rows = []
    for record in tqdm(dataset, unit="question"):
        documents = record["documents"][: s.candidates]
        logps = [likelihood(model, tokenizer, record["question"], document) for document in documents]
        scores = [math.log(document["score"]) for document in documents]
        rows.append((logps, scores, [is_relevant(document, record) for document in documents]))
    print("| weight | Recall@1 | against the retriever | Recall@2 | against the retriever |\n|---|---|---|---|---|")
    for weight in s.weights:
        cells = []
        for k in (1, 2):
            found, retrieved = [], []
            for logps, scores, relevant in rows:
                value = [logp + weight * score for logp, score in zip(logps, scores, strict=True)]
                order = sorted(range(len(value)), key=value.__getitem__, reverse=True)
                found.append(float(any(relevant[i] for i in order[:k])))
                retrieved.append(float(any(relevant[:k])))
            cells += [f"{100 * sum(found) / len(found):.1f}", compared(found, retrieved)]
        print(f"| {weight:g} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
