# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
Whether two processes compute what one does: loss and gradient norm of 20 updates of the same four questions on a tiny
random Llama, one table per setting, with their differences relative to the largest value. They must stay below 1e-5.

```bash
.venv/bin/python benchmarks/data_parallel.py
```
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table


ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "tests.distributed.run_training"
TOLERANCE = 1e-5
QUANTITIES = ("loss", "grad_norm")
SETTINGS = {
    "plain": {},
    "accumulation of 2": {"gradient_accumulation_steps": 2},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "selector frozen": {"train_selector": False},
    "generator frozen": {"train_generator": False},
    "E-step per 4 updates": {"steps_per_estimation": 4},
}


def train(launcher: list[str], batch_size: int, num_steps: int, folder: Path) -> dict[str, list[dict[str, float]]]:
    """Logs of every update, by setting."""
    jobs = [
        {
            "output_dir": str(folder / name),
            "num_questions": 16,
            "max_steps": num_steps,
            "per_device_train_batch_size": batch_size,
            "learning_rate": 1e-3,
            **settings,
        }
        for name, settings in SETTINGS.items()
    ]
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "CI": "1"}
    process = subprocess.run(
        [sys.executable, "-m", *launcher, json.dumps(jobs)],
        cwd=ROOT,
        env=os.environ | offline,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if process.returncode:
        sys.exit(f"training failed:\n{process.stdout}")
    logs = {}
    for name in SETTINGS:
        history = json.loads((folder / name / "result-0" / "logs.json").read_text(encoding="utf-8"))
        logs[name] = [row for row in history if "loss" in row]
    return logs


def relative_differences(pairs: list[tuple[float, float]]) -> list[float]:
    """Relative to the largest value, because a selector's loss alone is close to zero now and then."""
    largest = max(abs(one) for one, _ in pairs)
    return [abs(one - two) / largest for one, two in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="updates of every setting")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        one = train([SCRIPT], 4, arguments.steps, Path(folder) / "one")
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", SCRIPT]
        two = train(launcher, 2, arguments.steps, Path(folder) / "two")

    console = Console(width=119)
    summary = Table(title=f"Largest relative difference in {arguments.steps} updates, 1 process and 2 processes")
    for heading in ("setting", *QUANTITIES):
        summary.add_column(heading, justify="left" if heading == "setting" else "right")
    worst = 0.0
    for name in SETTINGS:
        table = Table(title=name)
        table.add_column("update", justify="right")
        cells: list[list[str]] = [[str(step + 1)] for step in range(arguments.steps)]
        largest = []
        for quantity in QUANTITIES:
            for heading in (f"{quantity}, 1 process", "2 processes", "difference"):
                table.add_column(heading, justify="right")
            pairs = [(a[quantity], b[quantity]) for a, b in zip(one[name], two[name], strict=True)]
            differences = relative_differences(pairs)
            largest.append(max(differences))
            for row, (left, right), value in zip(cells, pairs, differences, strict=True):
                row += [f"{left:.6f}", f"{right:.6f}", f"{value:.1e}"]
        for row in cells:
            table.add_row(*row)
        console.print(table)
        worst = max(worst, *largest)
        summary.add_row(name, *(f"{value:.1e}" for value in largest))
    console.print(summary)
    if worst > TOLERANCE:
        sys.exit(f"two processes differ from one by {worst:.1e}, more than {TOLERANCE:.0e}")


if __name__ == "__main__":
    main()
