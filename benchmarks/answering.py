# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
`trl-dro evaluate` and `predict` in one process and in several: the tiny model that ships with the package answers
questions about an invented world, and the files must be equal, line by line and but for the seconds. The table has
seconds by the clock, start of the command included, and of work on all cores together, which is what processes cost.

```bash
.venv/bin/python benchmarks/answering.py
```
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from trl_dro.demo.tiny import GENERATOR_TEMPLATE, SELECTOR_TEMPLATE, TINY_MODEL
from trl_dro.demo.world import synthetic_world
from trl_dro.system.rag_config import RAGConfig


FILES = {"evaluate": "questions.jsonl", "predict": "predictions.jsonl"}
QUESTIONS_OF = {"evaluate": "--dataset_name", "predict": "--questions"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "CI": "1"}


def run(command: str, num_processes: int, folder: Path) -> tuple[list[dict[str, Any]], float, float]:
    """Lines that a command writes, without their seconds; seconds by the clock, and of work."""
    output_dir = folder / f"{command}-{num_processes}"
    flags = ["--output_dir", output_dir, QUESTIONS_OF[command], folder / "questions.jsonl", "--device", "cpu"]
    flags += ["--num_processes", num_processes, "--tokens_per_batch", 4000]
    program = "from trl_dro.commands.cli import main; main()"
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.run(
        [sys.executable, "-c", program, command, str(folder / "run"), *map(str, flags)],
        env=os.environ | OFFLINE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if process.returncode:
        sys.exit(f"{command} in {num_processes} processes failed:\n{process.stdout}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    work = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    lines = [json.loads(line) for line in (output_dir / FILES[command]).read_text(encoding="utf-8").splitlines()]
    rows = [{name: value for name, value in line.items() if name != "seconds"} for line in lines]
    return rows, time.perf_counter() - start, work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes")
    parser.add_argument("--questions", type=int, default=200, help="questions to answer")
    arguments = parser.parse_args()
    table = Table(title=f"{arguments.questions} questions, {os.cpu_count()} cores", title_justify="left")
    for heading in ("command", "processes", "lines", "equal to the first's", "seconds", "seconds of work"):
        table.add_column(heading, justify="left" if heading == "command" else "right")
    with TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(TINY_MODEL, folder / "run")
        RAGConfig(
            num_selected=3,
            max_candidates=10,
            max_answer_length=8,
            selector_template=SELECTOR_TEMPLATE,
            generator_template=GENERATOR_TEMPLATE,
        ).save(folder / "run")
        _, questions = synthetic_world(1, arguments.questions, num_documents=10)
        questions.to_json(folder / "questions.jsonl")
        different = []
        for command in FILES:
            expected = None
            for number in arguments.processes:
                rows, seconds, work = run(command, number, folder)
                expected = expected or rows
                equal = sum(row == other for row, other in zip(rows, expected, strict=True))
                different += [f"{command} in {number} processes"] if rows != expected else []
                table.add_row(command, f"{number}", f"{len(rows)}", f"{equal}", f"{seconds:.0f}", f"{work:.0f}")
    Console().print(table)
    if different:
        sys.exit(f"not equal: {', '.join(different)}")


if __name__ == "__main__":
    main()
