# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
Trains the same selector twice, with DROTrainer and with TRL's own GRPOTrainer, whose reward is the log-likelihood of
the right answer under the generator, and compares the two. The generator stays as it is.

Without arguments: the invented world and tiny model of the demo, offline, on two CPU cores, from a warm start of both
roles as in the demo.

```bash
python examples/grpo_selector.py
```

With a system of your own, a run folder, two SFT adapters or a model that does both, and a dataset with candidates:

```bash
accelerate launch examples/grpo_selector.py --system sft --dataset_name my-org/nq-top20 \
    --dataset_test_split validation --learning_rate 1e-5 --max_completion_length 32
```

DROTrainer samples valid permutations only and sees the likelihood of each; GRPOTrainer samples text, of which the
reward makes what it can.
"""

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from demo import WorldArguments, warm_up
from peft import LoraConfig, PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, set_seed
from trl import GRPOConfig, GRPOTrainer, TrlParser

from trl_dro import DROConfig, DROTrainer, RAGPipeline
from trl_dro.data import load_records
from trl_dro.demo.tiny import GENERATOR_TEMPLATE, SELECTOR_TEMPLATE
from trl_dro.demo.world import synthetic_world
from trl_dro.evaluation.evaluation import evaluate as run
from trl_dro.integrations.rewards import AnswerLikelihoodReward, prompt_dataset
from trl_dro.model.roles import load_role_adapters


DEMO_PROMPTS = {
    "num_selected": 3,
    "max_candidates": 10,
    "max_answer_length": 8,
    "selector_template": SELECTOR_TEMPLATE,
    "generator_template": GENERATOR_TEMPLATE,
}
WARMUP_QUESTIONS = 240
DEMO_ARGUMENTS = (
    "--output_dir outputs/grpo_selector --max_steps 20 --learning_rate 1e-3 --per_device_train_batch_size 128 "
    "--num_generations 8 --max_completion_length 6 --beta 0 --report_to none --save_strategy no --bf16 False "
    "--gradient_checkpointing False --logging_steps 5"
)


@dataclass
class SystemArguments:
    """System and dataset; the demo's if neither is given."""

    system: str | None = field(
        default=None,
        metadata={
            "help": "Where training starts: a folder with `selector/` and `generator/`, or a model of both roles."
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Dataset with candidates: a Hub id, a `save_to_disk` folder, or a jsonl or parquet file."},
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})

    def __post_init__(self):
        if (self.system is None) != (self.dataset_name is None):
            raise ValueError("--system and --dataset_name go together; leave out both for the demo")


def load(args: SystemArguments, folder: Path, seed: int) -> tuple[str, dict, Dataset, Dataset]:
    """Folder or id of the system, settings of its prompts, training and evaluation set."""
    if args.system and args.dataset_name:
        splits = (args.dataset_train_split, args.dataset_test_split)
        train_dataset, eval_dataset = (load_records(args.dataset_name, split) for split in splits)
        return args.system, {}, train_dataset, eval_dataset
    train_dataset, eval_dataset = synthetic_world(
        WARMUP_QUESTIONS + 320, 200, seed, num_documents=DEMO_PROMPTS["max_candidates"]
    )
    demo_args = DROConfig(str(folder), use_cpu=True, bf16=False, seed=seed, report_to="none", **DEMO_PROMPTS)
    warm_up(WorldArguments(), demo_args, lora(), train_dataset.select(range(WARMUP_QUESTIONS)).to_list())
    train_dataset = train_dataset.select(range(WARMUP_QUESTIONS, len(train_dataset)))
    return str(folder / "warm_start"), DEMO_PROMPTS, train_dataset, eval_dataset


def lora() -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")


def train_dro(system: RAGPipeline, dataset: Dataset, args: GRPOConfig, folder: Path) -> None:
    selector, generator = system.sources["selector"], system.sources["generator"]
    model: Any = generator.model
    if selector.base is not None:
        base = AutoModelForCausalLM.from_pretrained(generator.model, dtype="auto")
        model = load_role_adapters(base, selector.path, generator.path)
    trainer = DROTrainer(
        model,
        DROConfig(
            str(folder),
            train_generator=False,
            num_permutations=args.num_generations,
            # GRPO counts completions where DRO counts questions.
            per_device_train_batch_size=args.per_device_train_batch_size // args.num_generations,
            learning_rate=args.learning_rate,
            max_steps=args.max_steps,
            seed=args.seed,
            logging_steps=args.logging_steps,
            gradient_checkpointing=args.gradient_checkpointing,
            bf16=args.bf16,
            use_cpu=args.use_cpu,
            save_strategy="no",
            report_to="none",
            **{name: getattr(system.config, name) for name in system.config.names_in_training()},
        ),
        dataset,
        processing_class=system.rag.tokenizers["generator"],
        peft_config=None if selector.base is not None else lora(),
    )
    trainer.train()
    trainer.save_model()


def train_grpo(system: RAGPipeline, dataset: Dataset, args: GRPOConfig, folder: Path) -> None:
    selector = system.sources["selector"]
    model: Any = selector.model
    if selector.base is not None:
        base = AutoModelForCausalLM.from_pretrained(selector.base, dtype="auto")
        model = PeftModel.from_pretrained(base, selector.path, is_trainable=True)
    trainer = GRPOTrainer(
        model,
        AnswerLikelihoodReward(system.rag),
        args,
        prompt_dataset(dataset, system),
        processing_class=system.rag.tokenizers["selector"],
        peft_config=None if selector.base is not None else lora(),
    )
    trainer.train()
    trainer.save_model(str(folder))


def main(system_args: SystemArguments, args: GRPOConfig) -> None:
    set_seed(args.seed)
    folder = Path(args.output_dir)
    path, prompts, train_dataset, eval_dataset = load(system_args, folder, args.seed)
    before = RAGPipeline.from_pretrained(path, **prompts)
    train_dro(before, train_dataset, args, folder / "dro")
    train_grpo(before, train_dataset, args, folder / "grpo")

    shutil.rmtree(folder / "evaluation", ignore_errors=True)  # of an earlier run
    num_selected = before.config.num_selected
    table = Table(title=f"Selector after {args.max_steps} updates, {len(eval_dataset)} questions, %")
    for heading in ("", "exact match", "Recall@1", f"Recall@{num_selected}"):
        table.add_column(heading, justify="right" if heading else "left")
    base = before.sources["selector"].base
    for label, selector in (("before", None), ("DROTrainer", folder / "dro"), ("GRPOTrainer", folder / "grpo")):
        pipe = before
        if selector is not None:
            pipe = RAGPipeline.from_pretrained(path, selector=selector, base_model=base, **prompts)
        rows = run(lambda pipe=pipe: pipe, eval_dataset, folder / "evaluation" / label)
        names = ("em", "recall@1", f"recall@{min(5, num_selected)}")
        table.add_row(label, *(f"{100 * sum(row[name] for row in rows) / len(rows):.1f}" for name in names))
    Console().print(table)


if __name__ == "__main__":
    main(*TrlParser((SystemArguments, GRPOConfig)).parse_args_and_config(sys.argv[1:] or DEMO_ARGUMENTS.split()))
