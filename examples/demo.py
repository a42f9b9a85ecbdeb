# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
DRO on an invented world with the tiny model that ships with the package: no GPU, no network, a few minutes on two
cores. Both roles are warmed up with TRL's `SFTTrainer`, then trained together.

```bash
accelerate launch examples/demo.py
```
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
from peft import LoraConfig, PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config

from trl_dro import DROConfig, DROTrainer
from trl_dro.commands.cli import hush_libraries
from trl_dro.demo.tiny import TINY_MODEL
from trl_dro.demo.world import synthetic_world
from trl_dro.model.codec import PermutationCodec
from trl_dro.model.prompts import PromptBuilder
from trl_dro.model.roles import ROLES, load_role_adapters
from trl_dro.trainer.logs import show_readable_logs
from trl_dro.trainer.warmup import generator_examples, selector_examples


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "demo.yaml"


@dataclass
class WorldArguments:
    """The invented world and the warm start."""

    world_seed: int = field(default=0, metadata={"help": "Seed of people, places, works, organisations and facts."})
    num_train: int = field(default=2000, metadata={"help": "Training questions."})
    num_eval: int = field(default=200, metadata={"help": "Evaluation questions, over entities of their own."})
    two_hop_share: float = field(default=0.0, metadata={"help": "Share of questions that need two passages."})
    rank_noise: float = field(default=5.0, metadata={"help": "Noise in the ranks that the selector starts from."})
    warmup_questions: int = field(default=480, metadata={"help": "Questions of the warm start."})
    warmup_learning_rate: float = field(default=2e-3, metadata={"help": "Learning rate of the warm start."})
    warmup_batch_size: int = field(default=16, metadata={"help": "Batch size of the warm start."})


def warm_up(world: WorldArguments, args: DROConfig, peft_config: LoraConfig, records: list[dict]) -> PeftModel:
    """The tiny model with an adapter for each role, trained by SFT."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    codec = PermutationCodec(tokenizer, args.max_candidates, args.num_selected)
    prompts = {role: PromptBuilder(tokenizer, getattr(args, f"{role}_template"), args.num_selected) for role in ROLES}
    examples = {
        "selector": selector_examples(records, prompts["selector"], codec, world.rank_noise, seed=args.seed),
        "generator": generator_examples(records, prompts["generator"]),
    }
    folders = {}
    for role in ROLES:
        folders[role] = Path(args.output_dir) / "warm_start" / role
        trainer = SFTTrainer(
            str(TINY_MODEL),
            SFTConfig(
                output_dir=str(folders[role]),
                num_train_epochs=1,
                per_device_train_batch_size=world.warmup_batch_size,
                learning_rate=world.warmup_learning_rate,
                completion_only_loss=True,
                max_length=None,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=args.use_cpu,
                dataloader_pin_memory=args.dataloader_pin_memory,
                save_strategy="no",
                logging_steps=10,
                report_to="none",
                seed=args.seed,
            ),
            train_dataset=examples[role],
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        show_readable_logs(trainer)
        print(f"Warm start of the {role}, {len(examples[role])} examples.", flush=True)
        trainer.train()
        trainer.save_model()
    return load_role_adapters(AutoModelForCausalLM.from_pretrained(TINY_MODEL), **folders)


def recall_cutoffs(scores: dict[str, float]) -> list[str]:
    """Recalls that are known: K documents are selected."""
    return [name for name in ("recall@1", "recall@3", "recall@5") if f"eval_{name}" in scores]


def print_table(before: dict[str, float], after: dict[str, float]) -> None:
    """Retriever, warm start and DRO, in percent."""
    table = Table(title="Held-out questions", title_justify="left")
    table.add_column("")
    cutoffs = recall_cutoffs(before)
    for heading in ("EM, %", "F1, %", *(f"{name.capitalize()}, %" for name in cutoffs)):
        table.add_column(heading, justify="right")
    rows = {
        "retriever (BM25)": [None, None, *(before[f"eval_retriever_{name}"] for name in cutoffs)],
        "warm start": [before[f"eval_{name}"] for name in ("em", "f1", *cutoffs)],
        "DRO": [after[f"eval_{name}"] for name in ("em", "f1", *cutoffs)],
    }
    for name, values in rows.items():
        table.add_row(name, *("" if value is None else f"{100 * value:.1f}" for value in values))
    Console().print(table)


def save_figure(
    before: dict[str, float], after: dict[str, float], history: list[dict[str, float]], path: Path
) -> None:
    """Scores before and after, and the bound on the answers' log-likelihood while training."""
    figure, (scores, bound) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    names = {"em": "EM", "f1": "F1"} | {name: name.capitalize() for name in recall_cutoffs(before)}
    bars = {
        "retriever (BM25)": [before.get(f"eval_retriever_{name}", float("nan")) for name in names],
        "warm start": [before[f"eval_{name}"] for name in names],
        "DRO": [after[f"eval_{name}"] for name in names],
    }
    for number, (label, values) in enumerate(bars.items()):
        places = [place + 0.27 * (number - 1) for place in range(len(names))]
        drawn = scores.bar(places, [100 * value for value in values], width=0.25, label=label)
        scores.bar_label(drawn, ["" if math.isnan(value) else f"{100 * value:.0f}" for value in values], fontsize=8)
    scores.set(xticks=range(len(names)), xticklabels=names.values(), ylim=(0, 112), ylabel="% of held-out questions")
    scores.legend(loc="upper left", ncols=3, fontsize=8, frameon=False)
    points = [(row["step"], row["iwae_bound"]) for row in history if "iwae_bound" in row]
    bound.plot(*zip(*points, strict=True), marker="o")
    bound.set(xlabel="updates", ylabel="IWAE bound on log p(answer), nats", title="Training questions")
    for axes in (scores, bound):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(world: WorldArguments, args: DROConfig, model_args: ModelConfig) -> None:
    set_seed(args.seed)
    train_dataset, eval_dataset = synthetic_world(
        world.num_train, world.num_eval, world.world_seed, world.two_hop_share, args.max_candidates
    )
    records = train_dataset.select(range(world.warmup_questions)).to_list()
    model = warm_up(world, args, get_peft_config(model_args), records)
    trainer = DROTrainer(
        model,
        args,
        train_dataset,
        eval_dataset,
        AutoTokenizer.from_pretrained(TINY_MODEL),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model()
    print_table(before, after)
    figure = Path(args.output_dir) / "demo.png"
    save_figure(before, after, trainer.state.log_history, figure)
    print(f"Both adapters are in {args.output_dir}/selector and {args.output_dir}/generator, the figure is {figure}.")


def parse_arguments(given: list[str]) -> tuple[WorldArguments, DROConfig, ModelConfig]:
    """Flags win over the demo's recipe, or over another one that `--config` names."""
    recipe = [] if "--config" in given else ["--config", str(RECIPE)]
    return TrlParser((WorldArguments, DROConfig, ModelConfig)).parse_args_and_config([*recipe, *given])


if __name__ == "__main__":
    hush_libraries()
    main(*parse_arguments(sys.argv[1:]))
