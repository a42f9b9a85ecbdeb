# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Sound inputs of every kind, of which the cases break one thing each."""

import contextlib
import io
import json
import shutil
from pathlib import Path

from trl_dro.commands.cli import run
from trl_dro.data import load_records

from ..tiny_models import bpe_tokenizer, tiny_llama


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class World:
    """
    Files and folders that every command takes, made once.

    Args:
        folder (`Path`):
            Where they are.
    """

    def __init__(self, folder):
        folder = Path(folder)
        self.passages = [
            {"id": f"p{i}", "title": f"Book {i}", "text": f"Book {i} was written by Anna {i}."} for i in range(8)
        ]
        self.questions = [
            {"id": f"q{i}", "question": f"who wrote book {i}", "answers": [f"Anna {i}"]} for i in range(4)
        ]
        self.records = [{**question, "documents": self.passages[:4]} for question in self.questions]
        self.corpus_file = write_jsonl(folder / "corpus.jsonl", self.passages)
        self.questions_file = write_jsonl(folder / "questions.jsonl", self.questions)
        self.records_file = write_jsonl(folder / "records.jsonl", self.records)
        self.records_folder = folder / "records"
        load_records(self.records_file).save_to_disk(self.records_folder)
        tokenizer = bpe_tokenizer(split_digits=False)
        self.base = folder / "tiny"
        tiny_llama(tokenizer).save_pretrained(self.base)
        tokenizer.save_pretrained(self.base)
        self.run = folder / "run"
        self.evaluation = folder / "evaluation"
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            run(["train", *self.train_flags(self.run), "--dataset_name", str(self.records_file)])
            run(
                ["evaluate", str(self.run), *self.small, "--dataset_name", str(self.records_file)]
                + ["--output_dir", str(self.evaluation), "--max_questions", "2"]
            )

    # What keeps a command that should have been refused short.
    small = ["--device", "cpu"]

    def train_flags(self, output_dir, /, **settings):
        """Flags of one short update."""
        settings = {
            "model_name_or_path": self.base,
            "output_dir": output_dir,
            "num_selected": 2,
            "max_candidates": 4,
            "num_permutations": 2,
            "max_answer_length": 8,
            "per_device_train_batch_size": 2,
            "max_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": "true",
            "use_peft": "true",
            "lora_r": 2,
            "lora_target_modules": ".*q_proj",
        } | settings
        return [part for name, value in settings.items() if value is not None for part in (f"--{name}", str(value))]

    def copy(self, tmp, source=None):
        """A run folder, or another, of one's own to break; with its base beside it."""
        source = source or self.run
        target = tmp / source.name
        shutil.copytree(source, target)
        return target


def edit_json(path, change):
    """Changes a JSON file by a function of its value, whose result, if any, replaces it."""
    value = json.loads(path.read_text(encoding="utf-8"))
    changed = change(value)
    path.write_text(json.dumps(value if changed is None else changed), encoding="utf-8")
