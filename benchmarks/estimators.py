# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
Which estimator and which schedule learn best on the demo's world: exact match, recall and bound after the same number
of updates from the same warm start, one row per setting, mean and range over seeds.

```bash
.venv/bin/python benchmarks/estimators.py --seeds 3
```
"""

import argparse
import copy
import os
import tempfile
import time

import torch
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback

from trl_dro import DROConfig, DROTrainer
from trl_dro.tiny import GENERATOR_TEMPLATE, SELECTOR_TEMPLATE, demo_system


SETTINGS = {
    "rws": {"selector_estimator": "rws"},
    "rws_centered": {"selector_estimator": "rws_centered"},
    "vimco": {"selector_estimator": "vimco"},
    "rws_centered, m=2": {"selector_estimator": "rws_centered", "num_permutations": 2},
    "rws, m=2": {"selector_estimator": "rws", "num_permutations": 2},
    "rws_centered, E-step per 8 updates": {"selector_estimator": "rws_centered", "steps_per_estimation": 8},
    "rws_centered, E-step per epoch (Algorithm 1)": {"selector_estimator": "rws_centered", "steps_per_estimation": -1},
}
METRICS = ("em", "recall@1", "recall@2", "iwae_bound")


def run(system, settings: dict, num_steps: int, seed: int) -> dict[str, float]:
    """Evaluation after `num_steps` updates of one setting, and the seconds they took."""
    model, tokenizer, train_dataset, eval_dataset = system
    with tempfile.TemporaryDirectory() as folder:
        args = DROConfig(
            output_dir=folder,
            num_selected=2,
            max_candidates=5,
            max_answer_length=8,
            selector_template=SELECTOR_TEMPLATE,
            generator_template=GENERATOR_TEMPLATE,
            max_steps=num_steps,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=100,
            selector_learning_rate=3e-3,
            generator_learning_rate=1e-3,
            warmup_steps=10,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            seed=seed,
            **{"num_permutations": 4} | settings,
        )
        # Every setting sees the same 640 questions, so that an epoch is a third of the run.
        trainer = DROTrainer(
            copy.deepcopy(model),
            args,
            train_dataset.select(range(640)),
            eval_dataset,
            tokenizer,
            LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
        )
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        if num_steps:
            trainer.train()
        seconds = time.perf_counter() - start
        metrics = trainer.evaluate()
    return {**{name: metrics[f"eval_{name}"] for name in METRICS}, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds of world, warm start and training")
    parser.add_argument("--steps", type=int, default=60, help="updates of 16 questions")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)

    settings = {"warm start": None, **SETTINGS}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in settings}
    for seed in range(arguments.seeds):
        system = demo_system(seed=seed)
        for name, setting in settings.items():
            num_steps = 0 if setting is None else arguments.steps
            results[name].append(run(system, setting or {}, num_steps, seed))
            print(f"seed {seed}, {name}: {results[name][-1]}", flush=True)

    table = Table(
        title=f"{arguments.steps} updates of 16 questions, {arguments.seeds} seeds: mean (lowest to highest)"
    )
    table.add_column("setting")
    for metric in (*METRICS, "seconds"):
        table.add_column(metric, justify="right")
    for name, rows in results.items():
        columns = [[row[metric] for row in rows] for metric in (*METRICS, "seconds")]
        cells = [f"{sum(c) / len(c):.3f} ({min(c):.3f} to {max(c):.3f})" for c in columns]
        table.add_row(name, *cells)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
