# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import json
import runpy
import sys
from pathlib import Path

from trl_dro.model.roles import ROLES


SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_nq.py"


def test_the_example_trains_as_it_stands(tmp_path, monkeypatch):
    questions = [{"question": f"who wrote book {i}", "answers": [f"Anna {i}"]} for i in range(4)]
    corpus = [{"id": f"p{i}", "title": f"Book {i}", "text": f"Book {i} was written by Anna {i}."} for i in range(8)]
    for name, rows in (("questions", questions), ("corpus", corpus)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--questions", tmp_path / "questions.jsonl", "--corpus", tmp_path / "corpus.jsonl", "--use_peft"]
    arguments += ["--output_dir", tmp_path / "run", "--max_steps", 1, "--num_permutations", 2, "--max_candidates", 5]
    arguments += ["--report_to", "none", "--use_cpu", "--save_strategy", "no"]
    monkeypatch.setattr(sys, "argv", ["train_nq.py", *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert all((tmp_path / "run" / role / "adapter_model.safetensors").is_file() for role in ROLES)
