# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
Trains the same selector twice, with DROTrainer and with TRL's own GRPOTrainer, whose reward is the log-likelihood of
the right answer under the generator, and compares the two. The generator stays as it is.

Without arguments: the invented world and tiny model of the demo, offline, on two CPU cores.

```bash
python examples/grpo_selector.py
```

With a model of your own, which both selects and answers, and a dataset with candidates:

```bash
accelerate launch examples/grpo_selector.py --model_name_or_path meta-llama/Meta-Llama-3-8B-Instruct \
    --dataset_name my-org/nq-top20 --dataset_test_split validation --learning_rate 1e-5 --max_completion_length 32
```

DROTrainer samples valid permutations only and sees the likelihood of each; GRPOTrainer samples text, of which the
reward makes what it can.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer, TrlParser

from trl_dro import DROConfig, DROTrainer, RAGPipeline
from trl_dro.data import load_records
from trl_dro.data.synthetic import synthetic_world
from trl_dro.evaluation import run
from trl_dro.rewards import AnswerLikelihoodReward, prompt_dataset
from trl_dro.tiny import GENERATOR_TEMPLATE, SELECTOR_TEMPLATE, TINY_MODEL


DEMO_PROMPTS = {
    "num_selected": 2,
    "max_candidates": 10,
    "max_answer_length": 8,
    "selector_template": SELECTOR_TEMPLATE,
    "generator_template": GENERATOR_TEMPLATE,
}
DEMO_ARGUMENTS = (
    "--output_dir outputs/grpo_selector --max_steps 20 --learning_rate 3e-3 --per_device_train_batch_size 128 "
    "--num_generations 8 --max_completion_length 4 --beta 0 --report_to none --save_strategy no --bf16 False "
    "--gradient_checkpointing False --logging_steps 5"
)


@dataclass
class DataArguments:
    """Model and dataset; the demo's if neither is given."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Model of both roles."})
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Dataset with candidates: a Hub id, a `save_to_disk` folder, or a jsonl or parquet file."},
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})

    def __post_init__(self):
        if (self.model_name_or_path is None) != (self.dataset_name is None):
            raise ValueError("--model_name_or_path and --dataset_name go together; leave out both for the demo")


def load(args: DataArguments, seed: int) -> tuple[str, dict, Dataset, Dataset]:
    """Model folder or id, settings of its prompts, training and evaluation set."""
    if args.model_name_or_path and args.dataset_name:
        splits = (args.dataset_train_split, args.dataset_test_split)
        train_dataset, eval_dataset = (load_records(args.dataset_name, split) for split in splits)
        return args.model_name_or_path, {}, train_dataset, eval_dataset
    train_dataset, eval_dataset = synthetic_world(320, 200, seed, num_documents=DEMO_PROMPTS["max_candidates"])
    return str(TINY_MODEL), DEMO_PROMPTS, train_dataset, eval_dataset


def train_dro(model: str, prompts: dict, dataset: Dataset, args: GRPOConfig, folder: Path) -> None:
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
            save_strategy="no",
            report_to="none",
            **prompts,
        ),
        dataset,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()


def train_grpo(pipe: RAGPipeline, model: str, dataset: Dataset, args: GRPOConfig, folder: Path) -> None:
    trainer = GRPOTrainer(
        model,
        AnswerLikelihoodReward(pipe.rag),
        args,
        prompt_dataset(dataset, pipe),
        processing_class=pipe.rag.tokenizers["selector"],
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model(str(folder))


def main(data_args: DataArguments, args: GRPOConfig) -> None:
    set_seed(args.seed)
    folder = Path(args.output_dir)
    model, prompts, train_dataset, eval_dataset = load(data_args, args.seed)
    untrained = RAGPipeline.from_pretrained(model, **prompts)
    train_dro(model, prompts, train_dataset, args, folder / "dro")
    train_grpo(untrained, model, train_dataset, args, folder / "grpo")

    table = Table(title=f"Selector after {args.max_steps} updates, {len(eval_dataset)} questions, %")
    for heading in ("", "exact match", "Recall@1", f"Recall@{untrained.config.num_selected}"):
        table.add_column(heading, justify="right" if heading else "left")
    names = ("em", "recall@1", f"recall@{min(5, untrained.config.num_selected)}")
    for label, selector in (("before", None), ("DROTrainer", folder / "dro"), ("GRPOTrainer", folder / "grpo")):
        pipe = untrained if selector is None else RAGPipeline.from_pretrained(model, selector=selector, **prompts)
        rows = run(
            lambda pipe=pipe: pipe, eval_dataset, folder / "evaluation" / label, settings={"steps": args.max_steps}
        )
        table.add_row(label, *(f"{100 * sum(row[name] for row in rows) / len(rows):.1f}" for name in names))
    Console().print(table)


if __name__ == "__main__":
    main(*TrlParser((DataArguments, GRPOConfig)).parse_args_and_config(sys.argv[1:] or DEMO_ARGUMENTS.split()))
