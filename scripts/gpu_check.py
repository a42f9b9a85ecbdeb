# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
Everything that only a GPU can tell, in under ten minutes on one H100 or H200: tests marked `gpu`, compiled
flex_attention, predicted against measured memory, what a step costs, QLoRA of 8B. Each part is a process of its own
with a limit of its own, so that one that fails or hangs leaves the rest. One table, and one JSON with the figures and
the last lines of each part.

```bash
.venv/bin/python scripts/gpu_check.py --json gpu_check.json  # needs a CUDA GPU, and 17 GB of disk under $TMPDIR
.venv/bin/python scripts/gpu_check.py --dry_run
```

Ends with 0 if all parts did well, 1 if one did not, 2 if there is no GPU.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table


ROOT = Path(__file__).resolve().parents[1]
TOTAL = 590  # seconds
TAIL = 4000  # characters of a part's output that are kept
GIB = 2**30


class Part(NamedTuple):
    """
    One thing to find out.

    Args:
        name (`str`):
            What the table calls it.
        command (`list[str]`):
            Program; `{json}` stands for the file to which it writes its figures.
        limit (`float`):
            Seconds after which it is ended.
        tell (`Callable`):
            What the table tells of its figures.
    """

    name: str
    command: list[str]
    limit: float
    tell: Callable[[Any], str] = lambda figures: ""


def tell_flex(rows: list[dict[str, Any]]) -> str:
    worst = max(row["gradients"] for row in rows)
    seconds, sdpa = (sum(row[name] for row in rows) for name in ("seconds", "sdpa_seconds"))
    return f"gradients differ by {worst:.0e}, {sdpa / seconds:.2f}x as fast as sdpa, {rows[-1]['graphs']} graphs"


def tell_memory(rows: list[dict[str, Any]]) -> str:
    pairs = [(row["measured"] / GIB, row["estimate"] / GIB) for row in rows]
    return ", ".join(f"{measured:.1f} GiB of {estimate:.1f} predicted" for measured, estimate in pairs)


def tell_step(figures: dict[str, Any]) -> str:
    seconds = figures["seconds"]["ours"]
    return (
        f"{seconds['step']:.2f} s a step, E-step {seconds['E'] / seconds['step']:.0%} of it, "
        f"{figures['peak_bytes']['ours'] / GIB:.1f} GiB; TRL's takes {figures['speedup']['trl']:.1f}x; "
        f"prefill {figures['utilisation']['prefill']:.0%} of {figures['utilisation']['ceiling_tflops']:.0f} TFLOP/s"
    )


def tell_qlora(figures: dict[str, Any]) -> str:
    last = figures["updates"][-1]
    share = last["e_step_seconds"] / (last["e_step_seconds"] + last["m_step_seconds"])
    unchanged = "unchanged" if figures["base_unchanged"] else "CHANGED"
    return (
        f"{figures['seconds_per_update']:.2f} s an update, E-step {share:.0%} of it, {figures['peak_gib']:.1f} GiB "
        f"(aim {figures['aim_gib']:g}), base {unchanged}"
    )


def benchmark(script: str, *flags: str) -> list[str]:
    return [sys.executable, f"benchmarks/{script}.py", *flags, "--json", "{json}"]


MEMORY = "--gpu --random gpu-llama1b --dtype bfloat16 --candidates 20 --selected 5 --permutations 8".split()
# What fails soonest first; the last gets the time that the others leave.
PARTS = [
    Part("tests", [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"], 120),
    Part("flex_attention", benchmark("flex_attention", "--device", "cuda"), 60, tell_flex),
    Part("memory of 1B", benchmark("memory", *MEMORY), 80, tell_memory),
    Part("step of 1B", benchmark("step_cost", "--preset", "gpu-llama1b"), 120, tell_step),
    Part("QLoRA of 8B", benchmark("qlora", "--preset", "gpu-llama8b"), 120, tell_qlora),
    Part("step of 8B, 4 bits", benchmark("step_cost", "--preset", "gpu-llama8b"), 300, tell_step),
]


def run_part(part: Part, seconds: float, folder: Path) -> dict[str, Any]:
    """
    Runs a part to its end or to its limit, and ends whatever it started.

    Args:
        part ([`Part`]):
            What to run.
        seconds (`float`):
            Time that is left for it, at most its own limit.
        folder (`Path`):
            Where it may write.

    Returns:
        `dict[str, Any]`: `part`, `command`, `outcome` (`"passed"`, or why not), `seconds`, `figures` if there are any,
        what the table `tells`, and the end of its `output`.
    """
    figures_file, log = folder / "figures.json", folder / "log"
    command = [each.replace("{json}", str(figures_file)) for each in part.command]
    start = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            outcome = "passed" if code == 0 else f"failed, exit code {code}"
        except subprocess.TimeoutExpired:
            outcome = f"not done after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it started too
            process.wait()
    found = {"part": part.name, "command": shlex.join(part.command), "outcome": outcome}
    found |= {"seconds": time.monotonic() - start, "figures": None, "tells": ""}
    if figures_file.is_file():
        try:
            found["figures"] = json.loads(figures_file.read_text())
            found["tells"] = part.tell(found["figures"])
        except (ValueError, LookupError, TypeError) as error:  # of one part, which must not cost the others
            found["outcome"] += f"; its figures cannot be read ({type(error).__name__}: {error})"
    lines = log.read_bytes().decode(errors="replace")[-TAIL:]
    if not found["tells"]:
        found["tells"] = next((line.strip() for line in reversed(lines.splitlines()) if line.strip()), "")[:160]
    return found | {"output": lines}


def check(parts: Sequence[Part], total: float, json_file: Path, console: Console) -> bool:
    """Runs parts one after the other, tells and writes what they found, and returns whether all did well."""
    end = time.monotonic() + total
    results: list[dict[str, Any]] = []
    for part in parts:
        left = end - time.monotonic()
        if left < 1:
            results.append({"part": part.name, "outcome": "no time was left", "seconds": 0.0, "tells": ""})
        else:
            console.print(f"{part.name} …")
            with tempfile.TemporaryDirectory() as folder:
                results.append(run_part(part, min(part.limit, left), Path(folder)))
        report = {"machine": machine(), "parts": results}
        json_file.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")  # also if this is ended now
    table = Table(box=box.MARKDOWN)
    for heading in ("part", "outcome", "seconds", "figures"):
        table.add_column(heading, justify="right" if heading == "seconds" else "left", overflow="fold")
    for result in results:
        table.add_row(result["part"], result["outcome"], f"{result['seconds']:.0f}", result["tells"])
    console.print(table)
    console.print(f"All figures, and the last lines of each part, are in {json_file}")
    return all(result["outcome"] == "passed" for result in results)


def machine() -> dict[str, Any]:
    """GPU and versions."""
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gib": properties.total_memory / GIB}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"), help="file to write the figures to")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="these parts alone")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for all parts together")
    parser.add_argument("--dry_run", action="store_true", help="print the parts, their limits and commands")
    arguments = parser.parse_args()
    parts = [part for part in PARTS if arguments.only is None or part.name in arguments.only]
    console = Console(width=160, highlight=False, markup=False)
    if arguments.dry_run:
        for part in parts:
            print(f"{part.name}, at most {part.limit:g} s: {shlex.join(part.command)}")
        return
    if not torch.cuda.is_available():
        print("gpu_check: this machine has no CUDA GPU; --dry_run prints what would be run on one", file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if check(parts, arguments.seconds, arguments.json, console) else 1)


if __name__ == "__main__":
    main()
