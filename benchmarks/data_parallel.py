# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
Whether two processes compute what one does: losses, norms of gradients and weights over some updates of the same four
questions on a tiny random Llama, in 11 settings, and their differences relative to the largest value. They must stay
below 1e-5. With `--engine fsdp2` and `zero3` (DeepSpeed) each of the two holds half of every weight, with `zero1` and
`zero2` half of the optimizer's states. On CPUs a config of accelerate starts neither: the processes are told as
`accelerate launch` tells them.

```bash
.venv/bin/python benchmarks/data_parallel.py
.venv/bin/python benchmarks/data_parallel.py --engine fsdp2
.venv/bin/python benchmarks/data_parallel.py --engine zero2  # needs the extra deepspeed
```
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tests.distributed.run_training import ENGINES, read_result  # noqa: E402


SCRIPT = "tests.distributed.run_training"
TOLERANCE = 1e-5
QUANTITIES = ("loss", "grad_norm", "selector/grad_norm", "generator/grad_norm")
# The optimizer is SGD but for one setting: Adam's quotient makes differences of 1e-8 in gradients near zero large.
SETTINGS = {
    "plain": {},
    "accumulation of 2": {"gradient_accumulation_steps": 2},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "accumulation and checkpointing": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    "selector frozen": {"train_selector": False},
    "generator frozen": {"train_generator": False},
    "E-step per 4 updates": {"steps_per_estimation": 4},
    "uneven last batch": {"num_questions": 15},
    "AdamW": {"optim": "adamw_torch", "learning_rate": 1e-3},
    "two full models": {"peft": False},
    "two full models, accumulation and checkpointing": {
        "peft": False,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
    },
}


def train(launcher: list[str], engine: str, batch_size: int, num_steps: int, folder: Path) -> None:
    """Trains in every setting, each into a folder of its own."""
    defaults = {"num_questions": 16, "max_steps": num_steps, "optim": "sgd", "learning_rate": 0.05}
    jobs = [
        defaults | settings | {"output_dir": str(folder / name), "per_device_train_batch_size": batch_size}
        for name, settings in SETTINGS.items()
    ]
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "CI": "1"}
    process = subprocess.run(
        [sys.executable, "-m", *launcher, json.dumps(jobs)],
        cwd=ROOT,
        env=os.environ | offline | ENGINES[engine],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if process.returncode:
        sys.exit(f"training failed:\n{process.stdout}")


def largest_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the largest value, because a selector's loss alone is close to zero now and then."""
    return float((actual - expected).abs().max() / expected.abs().max())


def compare(one: Path, two: Path) -> dict[str, float]:
    """Largest relative difference of every quantity that was logged, and of the weights."""
    (expected_logs, expected), (logs, weights) = read_result(one), read_result(two)
    differences = {}
    for name in QUANTITIES:
        if name in expected_logs[0]:
            values = [torch.tensor([row[name] for row in rows]).double() for rows in (logs, expected_logs)]
            differences[name] = largest_difference(*values)
    differences["weights"] = max(largest_difference(weights[name], expected[name]) for name in expected)
    return differences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=list(ENGINES), default="ddp", help="how two processes share the work")
    parser.add_argument("--steps", type=int, default=20, help="updates of every setting")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder) / "one", Path(folder) / "two"
        train([SCRIPT], "ddp", 4, arguments.steps, one)
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", SCRIPT]
        train(launcher, arguments.engine, 2, arguments.steps, two)
        results = {name: compare(one / name, two / name) for name in SETTINGS}

    title = f"Largest relative difference in {arguments.steps} updates, 1 process and 2 under {arguments.engine}"
    table = Table(title=title)
    for heading in ("setting", *QUANTITIES, "weights"):
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    for name, differences in results.items():
        cells = [f"{differences[each]:.1e}" if each in differences else "" for each in (*QUANTITIES, "weights")]
        table.add_row(name, *cells)
    Console(width=119).print(table)
    worst = max(max(differences.values()) for differences in results.values())
    if worst > TOLERANCE:
        sys.exit(f"two processes differ from one by {worst:.1e}, more than {TOLERANCE:.0e}")
    print(f"at most {worst:.1e}")


if __name__ == "__main__":
    main()
