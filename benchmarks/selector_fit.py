# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
What do the two numbers of a selector that scores documents gain by being fitted to the answers, before any update, and
how many questions does that take? Fits `query_likelihood_scale` and `retriever_prior` on training questions, as
`selector_fit_questions` does, and ranks the candidates of other questions by both.

```bash
.venv/bin/python benchmarks/selector_fit.py --base HuggingFaceTB/SmolLM2-135M-Instruct --data outputs/nq \
    --adapters outputs/real_models/runs/warm_start-seed0-…/generator/final
.venv/bin/python benchmarks/selector_fit.py --quick      # the tiny model and an invented world
```

`log p(relevant)` is over the questions that have a relevant candidate, in nats. Labels are for this table alone.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from peft import LoraConfig
from real_models import setting
from real_models_report import compared
from torch import Tensor
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from trl_dro import DROConfig, DROTrainer
from trl_dro.demo.tiny import TINY_MODEL
from trl_dro.demo.world import synthetic_world
from trl_dro.evaluation.scoring import is_relevant
from trl_dro.model.permutation import retriever_logits
from trl_dro.model.sampling import PermutationSamples
from trl_dro.trainer.fitting import ScoredQuestions, ScoreWeights, answer_bound, fit_weights, scored_questions


@dataclass
class Settings:
    base: str = setting("HuggingFaceTB/SmolLM2-135M-Instruct", "Base of both roles, a Hub id or a folder.")
    adapters: str = setting("", "Folder of both roles' adapters; new ones by default.")
    data: str = setting("outputs/nq", "Output of trl-dro retrieve, with a folder per split.")
    train_split: str = setting("train", "Split to fit on.")
    eval_split: str = setting("dev", "Split to rank.")
    first: int = setting(300, "First row to fit on, behind those that the adapters have seen.")
    sizes: list[int] = setting([20, 40, 80], "Numbers of questions to fit on.")
    eval_questions: int = setting(0, "First questions to rank; 0 takes all.")
    max_candidates: int = setting(5, "Candidates, n; the permutations are all of one document.")
    prior_from: list[str] = setting(["rank", "score"], "What the retriever's prior is made of.")
    start: list[float] = setting([0.1, 1.0], "Scale and prior to start from.")
    quick: bool = setting(False, "The tiny model and an invented world.")


def load(s: Settings) -> tuple[Dataset, Dataset]:
    if s.quick:
        s.base, s.first, s.sizes = str(TINY_MODEL), 0, [4, 8]
        return synthetic_world(8, 8, 0, 0.0, s.max_candidates)
    train, test = (load_from_disk(f"{s.data}/{split}") for split in (s.train_split, s.eval_split))
    return train.select(range(s.first, s.first + max(s.sizes))), test.select(range(s.eval_questions or len(test)))


@torch.no_grad()
def observe(trainer: DROTrainer, dataset: Dataset, answered: bool) -> ScoredQuestions:
    """All permutations of one document, without a prior; likelihoods of answers only where they are asked for."""
    rag, found = trainer.rag, []
    rag.query_likelihood_scale, rag.retriever_prior = 1.0, 0.0
    for record in tqdm(dataset, unit="question"):
        question = trainer._with_candidates(record)
        count = len(question["documents"])
        every = torch.arange(1, count + 1)[None, :, None]
        logps = torch.zeros(1, count)
        if answered:
            logps = rag.answer_logps([question], [question["answers"][:1]], every)
        samples = PermutationSamples(every, torch.zeros_like(logps), torch.zeros_like(logps))
        found.append(scored_questions(rag, [question], rag.read([question]), samples, logps))
    return ScoredQuestions(*map(torch.cat, zip(*found, strict=True)))


def with_prior(trainer: DROTrainer, dataset: Dataset, questions: ScoredQuestions, source: Any) -> ScoredQuestions:
    rows = [[0.0, *retriever_logits(trainer._with_candidates(record), 1.0, source)] for record in dataset]
    return questions._replace(retriever_logits=torch.tensor(rows, dtype=torch.float64))


def ranked(weights: ScoreWeights, questions: ScoredQuestions, relevant: Tensor) -> tuple[list[float], float]:
    """Whether the first document of each question is relevant, and the mean log-probability of the relevant ones."""
    scale, prior = weights
    logits = (scale * questions.question_logps + prior * questions.retriever_logits)[:, 1:]
    found = relevant.gather(1, logits.argmax(dim=1, keepdim=True)).squeeze(1).double().tolist()
    logps = logits.log_softmax(dim=1)[relevant.any(dim=1)]
    chosen = logps.masked_fill(~relevant[relevant.any(dim=1)], float("-inf"))
    return found, chosen.logsumexp(dim=1).mean().item()


def main(arguments: Sequence[str] | None = None) -> None:
    s = Settings(**vars(HfArgumentParser(Settings, description=__doc__).parse_args(arguments)))
    train, test = load(s)
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"num_selected": 1, "max_candidates": s.max_candidates, "max_document_length": 160}
        args = DROConfig(
            folder, use_cpu=True, bf16=False, report_to="none", selector_form="query_likelihood", **options
        )
        lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
        args.model_init_kwargs = {"dtype": "float32"}
        trainer = DROTrainer(s.base, args, train, peft_config=lora)
    if s.adapters:
        trainer.roles.load(s.adapters)
    trainer.model.eval()
    seen, asked = observe(trainer, train, answered=True), observe(trainer, test, answered=False)
    relevant = [[is_relevant(d, question) for d in question["documents"][: s.max_candidates]] for question in test]
    labels = torch.tensor(relevant)
    first = labels[:, 0].double().tolist()
    print(
        "| prior of | fitted on | scale | prior | bound, nats | Recall@1 | against the retriever | log p(relevant) |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for source in s.prior_from:
        start, tested = ScoreWeights(*s.start), with_prior(trainer, test, asked, source)
        for size in (0, *s.sizes):
            fitted = ScoredQuestions(*(rows[: size or None] for rows in with_prior(trainer, train, seen, source)))
            weights = fit_weights(start, fitted) if size else start
            found, logp = ranked(weights, tested, labels)
            bound = answer_bound(weights, fitted).mean().item()
            cells = [source, size, *(f"{value:g}" for value in weights), f"{bound:.3f}"]
            cells += [f"{100 * sum(found) / len(found):.1f}", compared(found, first), f"{logp:.3f}"]
            print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
