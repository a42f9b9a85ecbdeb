# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import json
import shlex
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console


ROOT = Path(__file__).resolve().parents[2]
WRITE = "import json, sys; json.dump({'seconds': 3}, open(sys.argv[1], 'w'))"
# Starts a process of its own, tells its id, and waits for ever.
HANG = (
    "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    "print('child', child.pid, flush=True); time.sleep(600)"
)


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import gpu_check

    return gpu_check


def program(code, *arguments):
    return [sys.executable, "-c", code, *arguments]


def is_gone(pid):
    """Whether a process has ended, be it that nobody has asked for its exit code yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_part_that_fails_or_hangs_leaves_the_rest(gpu_check, tmp_path):
    parts = [
        gpu_check.Part("fails", program("print('why it failed'); raise SystemExit(3)"), 60),
        gpu_check.Part("hangs", program(HANG), 3),
        gpu_check.Part("writes", program(WRITE, "{json}"), 60, lambda figures: f"{figures['seconds']} [s] of {{all}}"),
        gpu_check.Part("unreadable", program(WRITE, "{json}"), 60, lambda figures: figures["absent"]),
    ]
    console = Console(width=200, record=True, markup=False)
    start = time.monotonic()
    assert not gpu_check.check(parts, 100, tmp_path / "found.json", console)
    assert time.monotonic() - start < 60
    report = json.loads((tmp_path / "found.json").read_text())
    fails, hangs, writes, unreadable = report["parts"]
    assert fails["outcome"] == "failed, exit code 3" and fails["tells"] == "why it failed"
    assert hangs["outcome"] == "not done after 3 s" and 3 <= hangs["seconds"] < 30
    child = int(hangs["output"].split()[-1])
    assert is_gone(child), "what a part started is left"
    assert writes["outcome"] == "passed" and writes["figures"] == {"seconds": 3} and writes["seconds"] > 0
    assert unreadable["outcome"] == "passed; its figures cannot be read (KeyError: 'absent')"
    assert report["machine"]["torch"] == torch.__version__
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in console.export_text().splitlines() if "|" in line
    ]
    assert rows[0] == ["part", "outcome", "seconds", "figures"]
    assert [row[:2] for row in rows[2:]] == [[part["part"], part["outcome"]] for part in report["parts"]]
    assert rows[4][3] == "3 [s] of {all}"


def test_a_part_without_time_left_is_told_of(gpu_check, tmp_path):
    parts = [
        gpu_check.Part("slow", program("import time; time.sleep(60)"), 60),
        gpu_check.Part("last", ["absent"], 60),
    ]
    assert not gpu_check.check(parts, 2, tmp_path / "found.json", Console())
    report = json.loads((tmp_path / "found.json").read_text())
    assert [part["outcome"] for part in report["parts"]] == ["not done after 2 s", "no time was left"]


def test_all_well_is_told_so(gpu_check, tmp_path):
    assert gpu_check.check([gpu_check.Part("well", program("pass"), 60)], 60, tmp_path / "found.json", Console())


def test_parts_are_programs_of_this_repository_that_take_these_flags(gpu_check, monkeypatch, capsys):
    assert sum(part.limit for part in gpu_check.PARTS[:-1]) < gpu_check.TOTAL < 600
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    for part in gpu_check.PARTS[1:]:
        script, *flags = part.command[1:]
        monkeypatch.setattr(sys, "argv", [script, *[flag.format(json="figures.json") for flag in flags], "--help"])
        with pytest.raises(SystemExit) as ended:
            __import__(Path(script).stem).main()
        assert ended.value.code == 0, capsys.readouterr().err


def test_dry_run_needs_no_gpu_and_a_run_says_in_one_line_that_there_is_none(gpu_check, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--dry_run"])
    gpu_check.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(gpu_check.PARTS)
    assert all(shlex.join(part.command) in line for part, line in zip(gpu_check.PARTS, lines, strict=True))
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "gpu_check: this machine has no CUDA GPU; --dry_run prints what would be run on one"
    ]


STEP = {"seconds": {"ours": {"E": 1.0, "M": 3.0, "step": 4.0}}, "peak_bytes": {"ours": 2**31}, "speedup": {"trl": 2.5}}
FIGURES = {
    "flex_attention": (
        [{"gradients": 2e-3, "seconds": 1.0, "sdpa_seconds": 2.0, "graphs": 3}],
        "differ by 2e-03, 2.00x",
    ),
    "memory of 1B": ([{"measured": 2**31, "estimate": 2**32}], "2.0 GiB of 4.0 predicted"),
    "step of 1B": (STEP | {"utilisation": {"prefill": 0.5, "ceiling_tflops": 700.0}}, "E-step 25% of it, 2.0 GiB"),
    "QLoRA of 8B": (
        {
            "updates": [{"e_step_seconds": 1.0, "m_step_seconds": 3.0}],
            "base_unchanged": True,
            "seconds_per_update": 4.0,
            "peak_gib": 20.0,
            "aim_gib": 22.0,
        },
        "E-step 25% of it, 20.0 GiB (aim 22), base unchanged",
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_the_table_tells_what_a_benchmark_found(gpu_check, name):
    [part] = [part for part in gpu_check.PARTS if part.name == name]
    figures, told = FIGURES[name]
    assert told in part.tell(figures)
