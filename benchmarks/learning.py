# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
What DRO learns, on an invented world with the tiny model that ships with the package: the paper's experiments and
negative controls, on two CPU cores. Every setting starts from the same warm start of both roles and is evaluated on
held-out questions before training (iteration 0) and after each iteration. docs/experiments.md says what is asked.

```bash
.venv/bin/python benchmarks/learning.py --quick                           # one seed of `iterations`, small
.venv/bin/python benchmarks/learning.py --experiment scoring --seeds 3
.venv/bin/python benchmarks/learning.py --experiment all --seeds 3        # hours
```

`results.jsonl` in `--out` has one line per run and iteration, with the processor seconds since the first evaluation. A
run that is there to its last iteration is not repeated, nor one that occurs in two experiments; one that was cut short
starts anew. `--out` serves one process.
"""

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset, disable_progress_bars
from learning_report import Results, write_report
from learning_variants import (
    DocumentwiseTrainer,
    OnEvaluation,
    SaveAdapter,
    UncorrectedTrainer,
    UniformTrainer,
    answers_first,
    context_reliance,
    estimator_variance,
    shuffle_answers,
)
from peft import PeftModel, get_peft_model
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    set_seed,
)
from transformers.utils import logging
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config

from trl_dro import DROConfig, DROTrainer
from trl_dro.demo.tiny import TINY_MODEL
from trl_dro.demo.world import synthetic_world
from trl_dro.model.codec import PermutationCodec
from trl_dro.model.prompts import PromptBuilder
from trl_dro.model.roles import ROLES, Role
from trl_dro.trainer.warmup import generator_examples, selector_examples


# Learning rates, templates and adapters are those of the demo.
RECIPE = yaml.safe_load((Path(__file__).resolve().parents[1] / "recipes" / "demo.yaml").read_text(encoding="utf-8"))
WARMUP_RATE = RECIPE.get("warmup_learning_rate", 2e-3)
RANK_NOISE = RECIPE.get("rank_noise", 5.0)
TWO_HOP_DEPTH = 40
COSTS = 0.0, 0.1, 0.5, 1.0, 2.0  # of a document, in nats


@dataclass(frozen=True)
class Size:
    """Size of the runs. An iteration is `updates` updates of `batch_size` questions."""

    num_candidates: int = 10
    num_selected: int = 3
    num_permutations: int = 8
    batch_size: int = 16
    updates: int = 8
    iterations: int = 5
    num_train: int = 2000
    num_eval: int = 150
    warmup_questions: int = 240
    repeats: int = 8  # of the gradient, to see its variance

    @property
    def max_steps(self) -> int:
        return self.iterations * self.updates


QUICK = Size(num_permutations=4, iterations=2, num_eval=80, repeats=4)


@dataclass(frozen=True)
class Setting:
    """
    What one run trains and on what.

    Args:
        name (`str`): as shown.
        trainer (`type`, *optional*): `DROTrainer` or a variant of it; `None` for SFT of each role on its own.
        teacher (`str`): what the selector learns by SFT: the retriever's order with the noise of the warm start
            (`"noisy retriever"`) or without (`"retriever"`), or candidates that contain the `"answer"` first.
        dro (`dict`): what differs in [`DROConfig`].
        two_hop (`bool`): whether the questions need two passages.
        num_candidates (`int`, *optional*): if not the size's.
        num_selected (`int`, *optional*): if not the size's.
        retrieved_share (`float`): share of a longer list that the retriever finds.
        shuffled_candidates (`bool`): whether held-out candidates are shown in random order, where a selector that
            always writes the same ids has the recall of chance and not the retriever's.
        shuffled_answers (`bool`): whether training questions have the answers of others.
        selector_warmup (`bool`): whether the selector is warmed up, like the generator.
        dropped_layers (`int`): last layers of the tiny model that the selector, with a base of its own, does without.
        probe (`Callable`, *optional*): measures more of a trainer at every evaluation.
    """

    name: str
    trainer: type[DROTrainer] | None = DROTrainer
    teacher: str = "noisy retriever"
    dro: dict[str, Any] = field(default_factory=dict)
    two_hop: bool = False
    num_candidates: int | None = None
    num_selected: int | None = None
    retrieved_share: float = 1.0
    shuffled_candidates: bool = False
    shuffled_answers: bool = False
    selector_warmup: bool = True
    dropped_layers: int = 0
    probe: Callable[[DROTrainer, int], dict[str, float]] | None = None

    def world(self, size: Size, world_seed: int) -> tuple:
        """Arguments of [`load_world`]."""
        num_candidates = self.num_candidates or size.num_candidates
        return size, world_seed, self.two_hop, num_candidates, self.retrieved_share, self.shuffled_candidates

    def definition(self) -> dict[str, Any]:
        """All but the name, as JSON can write it."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "name"}
        for name in ("trainer", "probe"):
            values[name] = values[name] and values[name].__name__
        return values


def all_experiments(size: Size) -> dict[str, list[Setting]]:
    """Settings by experiment. The others are compared with the first of each."""
    twice = 2 * size.num_candidates
    two_hop: dict[str, Any] = {
        "two_hop": True,
        "num_candidates": 6,
        "num_selected": 2,
    }
    algorithm_1 = [
        Setting("Algorithm 1", dro={"steps_per_estimation": size.updates}),
        Setting("Algorithm 1, rws", dro={"steps_per_estimation": size.updates, "selector_estimator": "rws"}),
    ]
    return {
        "iterations": [
            Setting("joint"),
            Setting("w/o selector", dro={"train_selector": False}),
            Setting("w/o generator", dro={"train_generator": False}),
            Setting("SFT only", trainer=None),
            Setting("decoupled", trainer=None, teacher="retriever"),
            Setting("decoupled, documents labelled", trainer=None, teacher="answer"),
        ],
        "permutations": [
            Setting(f"m={size.num_permutations}", probe=estimator_variance),
            *(Setting(f"m={m}", dro={"num_permutations": m}) for m in (1, 2, 4, 8, 16) if m != size.num_permutations),
        ],
        "estimators": [
            Setting("rws_centered"),
            Setting("rws", dro={"selector_estimator": "rws"}),
            Setting("vimco", dro={"selector_estimator": "vimco"}),
            Setting("distinct", dro={"sampling": "distinct"}),
            *algorithm_1,
        ],
        "estimation": [
            Setting("rws_centered"),
            Setting("rws_centered, m=2", dro={"num_permutations": 2}),
            Setting("rws, m=2", dro={"num_permutations": 2, "selector_estimator": "rws"}),
            Setting("mean likelihood", dro={"answer_likelihood": "mean"}),
            Setting("T=0.7", dro={"temperature": 0.7}),
            Setting("T=0.7, not corrected", UncorrectedTrainer, dro={"temperature": 0.7}),
            Setting("E-step per 4 updates", dro={"steps_per_estimation": 4}),
            *algorithm_1,
        ],
        "scoring": [
            Setting("permutations, two-hop", **two_hop),
            Setting("each document alone, two-hop", DocumentwiseTrainer, **two_hop),
            Setting("permutations, single-hop"),
            Setting("each document alone, single-hop", DocumentwiseTrainer),
        ],
        "retrieval": [
            Setting(f"top {size.num_candidates}"),
            Setting(f"top {twice}", num_candidates=twice),
            Setting(f"{size.num_candidates} of top {twice}", retrieved_share=0.5),
            Setting("selector not warmed up", selector_warmup=False),
            Setting("selector without the last layer", dropped_layers=1),
        ],
        "context": [
            Setting("joint", probe=context_reliance),
            Setting("decoupled", trainer=None, teacher="retriever", probe=context_reliance),
        ],
        "stopping": [
            Setting("all K documents"),
            *(Setting(f"cost {cost}", dro={"min_selected": 0, "document_cost": cost}) for cost in COSTS),
        ],
        "controls": [
            Setting("joint", shuffled_candidates=True),
            Setting("answers shuffled", shuffled_answers=True, shuffled_candidates=True),
            Setting("selector's weights uniform", UniformTrainer, shuffled_candidates=True),
        ],
    }


def of_recipe(config: type) -> dict[str, Any]:
    """What the recipe says of a dataclass's fields."""
    names = {field.name for field in fields(config)}
    return {name: value for name, value in RECIPE.items() if name in names}


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


@lru_cache(maxsize=1)
def model_digest() -> str:
    return hashlib.sha256((TINY_MODEL / "model.safetensors").read_bytes()).hexdigest()


@cache
def data_digest(*world: Any) -> str:
    return digest(*(dataset.to_list() for dataset in load_world(*world)))


def run_id(setting: Setting, size: Size, world_seed: int, seed: int) -> str:
    """The same for runs that would give the same rows."""
    definition = {**setting.definition(), "dro": {"num_permutations": size.num_permutations, **setting.dro}}
    data = data_digest(*setting.world(size, world_seed))
    return digest(definition, asdict(size), RECIPE, model_digest(), data, world_seed, seed)


# Data


@lru_cache(maxsize=4)
def load_world(
    size: Size, world_seed: int, two_hop: bool, num_candidates: int, retrieved_share: float, shuffled: bool
) -> tuple[Dataset, Dataset]:
    """
    Training and evaluation questions with `num_candidates` candidates.

    Those of two-hop questions are both passages that are needed, and others of BM25's first `TWO_HOP_DEPTH`: half as
    many as all candidates that resemble the second passage most, and the rest at random. The former say the same of
    others of one nationality, so that only the first passage tells which of them is asked for.
    """
    retrieved = TWO_HOP_DEPTH if two_hop else round(num_candidates / retrieved_share)
    rng = random.Random(world_seed)

    def choose(record: dict[str, Any]) -> dict[str, Any]:
        documents, shown = record["documents"], []
        if two_hop:
            ids = [document["id"] for document in documents]
            needed = [ids.index(passage) for passage in record["positive_ids"]]
            words = [set(document["text"].lower().split()) for document in documents]
            others = rng.sample([rank for rank in range(retrieved) if rank not in needed], retrieved - 2)
            others.sort(key=lambda rank: len(words[rank] & words[needed[1]]), reverse=True)
            shown = needed + others[: num_candidates // 2]
        others = [rank for rank in range(retrieved) if rank not in shown]
        ranks = sorted(shown + rng.sample(others, num_candidates - len(shown)))
        return {**record, "documents": [documents[rank] for rank in ranks]}

    def is_answerable(record: dict[str, Any]) -> bool:
        return not two_hop or set(record["positive_ids"]) <= {document["id"] for document in record["documents"]}

    numbers = (size.num_train, size.num_eval)
    drawn = [math.ceil(1.5 * number) if two_hop else number for number in numbers]
    datasets = synthetic_world(*drawn, world_seed, float(two_hop), retrieved)
    kept = [[choose(record) for record in dataset if is_answerable(record)] for dataset in datasets]
    if shuffled:
        for record in kept[1]:
            rng.shuffle(record["documents"])
    train, test = (Dataset.from_list(rows[:number]) for rows, number in zip(kept, numbers, strict=True))
    return train, test


# Runs


@dataclass
class Run:
    """One setting with one seed of the world and one of warm start and training, in the folder `out`."""

    setting: Setting
    size: Size
    world_seed: int
    seed: int
    out: Path

    def __post_init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
        self.num_candidates = self.setting.num_candidates or self.size.num_candidates
        self.num_selected = self.setting.num_selected or self.size.num_selected
        self.world = self.setting.world(self.size, self.world_seed)
        self.train_dataset, self.eval_dataset = load_world(*self.world)

    def execute(self, record: Callable[[int, dict[str, float]], None]) -> None:
        """Trains, and calls `record` with every iteration's number and metrics."""
        warm_start = self.warm_start()
        with tempfile.TemporaryDirectory(dir=self.out) as folder:
            trainer = self.trainer(folder)
            trainer.roles.load(warm_start)

            def measure(iteration: int, metrics: dict[str, float]) -> None:
                more = self.setting.probe(trainer, self.size.repeats) if self.setting.probe else {}
                numbers = {name.removeprefix("eval_"): value for name, value in metrics.items()}
                record(iteration, {"documents": float(self.num_selected)} | numbers | more)

            if self.setting.trainer is not None:
                trainer.add_callback(OnEvaluation(measure, self.size.updates))
                trainer.evaluate()
                trainer.train()
                return
            measure(0, trainer.evaluate())
            count = self.size.max_steps * self.size.batch_size
            records = (self.train_dataset.to_list() * (1 + count // len(self.train_dataset)))[:count]
            examples = self.examples(records, self.setting.teacher, seed=self.seed + 1)
            saves = {i * self.size.updates: Path(folder) / f"{i}" for i in range(1, self.size.iterations + 1)}
            for role in ROLES:
                rate = RECIPE[f"{role}_learning_rate"]
                self.fine_tune(role, examples[role], rate, self.size.max_steps, saves, warm_start)
            for iteration, saved in enumerate(saves.values(), start=1):
                trainer.roles.load(saved)
                measure(iteration, trainer.evaluate())

    def trainer(self, folder: str) -> DROTrainer:
        setting, size = self.setting, self.size
        settings = of_recipe(DROConfig) | {
            "output_dir": folder,
            "max_candidates": self.num_candidates,
            "num_selected": self.num_selected,
            "num_permutations": size.num_permutations,
            "per_device_train_batch_size": size.batch_size,
            "max_steps": size.max_steps,
            "eval_strategy": "steps",
            "eval_steps": size.updates,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "logging_strategy": "no",
            "use_cpu": True,
            "seed": self.seed,
        }
        train_dataset = self.train_dataset
        if setting.shuffled_answers:
            train_dataset = shuffle_answers(train_dataset, self.seed)
        trainer = (setting.trainer or DROTrainer)(
            self.base("generator"),
            DROConfig(**settings | setting.dro),
            train_dataset,
            self.eval_dataset,
            self.tokenizer,
            get_peft_config(ModelConfig(**of_recipe(ModelConfig))),
            selector_model=self.base("selector") if setting.dropped_layers else None,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def base(self, role: Role) -> Any:
        config = AutoConfig.from_pretrained(TINY_MODEL)
        if role == "selector":
            config.num_hidden_layers -= self.setting.dropped_layers
        return AutoModelForCausalLM.from_pretrained(TINY_MODEL, config=config)

    def warm_start(self) -> Path:
        """Folder with both adapters, made once for all settings that can share it."""
        setting, size = self.setting, self.size
        key = digest(
            [setting.selector_warmup, setting.dropped_layers, self.num_selected, setting.dro.get("min_selected")],
            [asdict(size), RECIPE, model_digest(), data_digest(*self.world), self.seed],
        )
        folder = self.out / "warm_starts" / key
        if not folder.exists():
            making = folder.with_suffix(".tmp")
            shutil.rmtree(making, ignore_errors=True)
            examples = self.examples(
                self.train_dataset.select(range(size.warmup_questions)).to_list(), "noisy retriever", self.seed
            )
            for role in ROLES:
                steps = size.warmup_questions // size.batch_size
                if role == "selector" and not setting.selector_warmup:
                    steps = 0
                self.fine_tune(role, examples[role], WARMUP_RATE, steps, {steps: making})
            os.replace(making, folder)
        return folder

    def examples(self, records: list[dict[str, Any]], teacher: str, seed: int) -> dict[Role, Dataset]:
        """Training sets for SFT: permutations of a teacher, and answers from the retriever's first documents."""
        prompts = {
            role: PromptBuilder(self.tokenizer, RECIPE[f"{role}_template"], self.num_selected) for role in ROLES
        }
        min_selected = self.setting.dro.get("min_selected")
        codec = PermutationCodec(self.tokenizer, self.num_candidates, self.num_selected, min_selected)
        ranked = [answers_first(record) for record in records] if teacher == "answer" else records
        noise = RANK_NOISE if teacher == "noisy retriever" else 0.0
        return {
            "selector": selector_examples(ranked, prompts["selector"], codec, noise, seed=seed),  # type: ignore[arg-type]
            "generator": generator_examples(records, prompts["generator"]),  # type: ignore[arg-type]
        }

    def fine_tune(
        self,
        role: Role,
        examples: Dataset,
        learning_rate: float,
        steps: int,
        saves: dict[int, Path],
        start: Path | None = None,
    ) -> None:
        """SFT of one role, from the adapter in `start` or a new one; saves it after the steps that `saves` names."""
        set_seed(self.seed)
        base = self.base(role)
        if start is None:
            model = get_peft_model(base, get_peft_config(ModelConfig(**of_recipe(ModelConfig))), adapter_name=role)
        else:
            model = PeftModel.from_pretrained(base, start / role, adapter_name=role, is_trainable=True)
        if steps == 0:
            model.save_pretrained(saves[0])
            return
        with tempfile.TemporaryDirectory(dir=self.out) as folder:
            args = SFTConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=self.size.batch_size,
                learning_rate=learning_rate,
                completion_only_loss=True,
                max_length=None,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=self.seed,
            )
            trainer = SFTTrainer(
                model, args, train_dataset=examples, processing_class=self.tokenizer, callbacks=[SaveAdapter(saves)]
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()


def run_all(
    experiments: dict[str, list[Setting]], size: Size, seeds: int, world_seed: int, out: Path
) -> list[dict[str, Any]]:
    """Runs what `results.jsonl` in `out` does not have yet; returns the rows of all that was asked for."""
    results = Results(out / "results.jsonl")
    plan = [
        (name, setting, seed)
        for seed in range(seeds)
        for name, settings in experiments.items()
        for setting in settings
    ]
    wanted = set()
    with tqdm(plan, unit="run") as progress:
        for experiment, setting, seed in progress:
            run = run_id(setting, size, world_seed, seed)
            wanted.add((run, experiment, setting.name))
            labels = {"experiment": experiment, "setting": setting.name, "world_seed": world_seed, "seed": seed}
            found = results.of(run)
            if (experiment, setting.name) in found:
                continue
            if found:
                for row in next(iter(found.values())):
                    results.add(row | labels)
                continue
            progress.set_description(f"{experiment}: {setting.name}, seed {seed}")
            begun: list[float] = []  # processor seconds at the first evaluation: the warm start may be another run's

            def record(iteration: int, metrics: dict[str, float], labels=labels, run=run, begun=begun) -> None:
                begun.append(time.process_time())
                numbers = {name: value for name, value in metrics.items() if not name.endswith("per_second")}
                numbers |= {"iwae": numbers.pop("iwae_bound"), "seconds": round(begun[-1] - begun[0], 1)}
                numbers |= {"iterations": size.iterations, "run": run}
                results.add(labels | {"iteration": iteration} | numbers)
                scores = ", ".join(f"{name} {numbers[name]:.3f}" for name in ("em", "recall@1", "iwae"))
                tqdm.write(f"{labels['setting']}, seed {labels['seed']}, iteration {iteration}: {scores}")

            Run(setting, size, world_seed, seed, out).execute(record)
    return [row for row in results.rows if (row["run"], row["experiment"], row["setting"]) in wanted]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/learning"), help="folder for results and figures")
    parser.add_argument("--experiment", choices=[*all_experiments(QUICK), "all"], default="iterations")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds of warm start and training")
    parser.add_argument("--world-seed", type=int, default=0, help="seed of the world")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} and not {Size()}")
    parser.add_argument("--size", nargs="+", default=[], metavar="NAME=NUMBER", help="what differs from that size")
    args = parser.parse_args(arguments)
    disable_progress_bars()
    logging.disable_progress_bar()
    torch.set_num_threads(1)

    try:
        size = replace(
            QUICK if args.quick else Size(), **{name: int(n) for name, n in (e.split("=") for e in args.size)}
        )
    except (TypeError, ValueError):
        parser.error(f"--size {' '.join(args.size)}: must be NAME=NUMBER, of {Size()}")
    experiments = all_experiments(size)
    if args.experiment != "all":
        experiments = {args.experiment: experiments[args.experiment]}
    (args.out / "warm_starts").mkdir(parents=True, exist_ok=True)
    rows = run_all(experiments, size, args.seeds, args.world_seed, args.out)
    for path in write_report(rows, args.out):
        print(path)


if __name__ == "__main__":
    main()
