# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import json
import runpy
import sys
from pathlib import Path

import pytest
from datasets import DatasetDict
from peft import PeftModel
from transformers import AutoModelForCausalLM

from trl_dro.model.roles import ROLES, load_role_adapters

from ..tiny_models import bpe_tokenizer, tiny_llama
from ..trainer.test_dro_trainer import make_dataset
from ..trainer.test_warmup import conversation


SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "warmup_sft.py"


@pytest.mark.parametrize("teacher", ["retriever", "relevant", "rankings.jsonl"])
def test_both_roles_get_an_adapter_that_training_can_start_from(tmp_path, monkeypatch, teacher):
    tokenizer = bpe_tokenizer(split_digits=False)
    tiny_llama(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    DatasetDict({"train": make_dataset(4)}).save_to_disk(tmp_path / "data")
    (tmp_path / "rankings.jsonl").write_text(json.dumps(conversation("[2] > [4] > [1] > [3]")) + "\n")
    if teacher.endswith("jsonl"):
        teacher = tmp_path / teacher
    arguments = ["--model_name_or_path", tmp_path / "base", "--dataset_name", tmp_path / "data", "--teacher", teacher]
    arguments += ["--output_dir", tmp_path / "sft", "--num_selected", 2, "--max_candidates", 4, "--max_steps", 1]
    arguments += ["--report_to", "none", "--bf16", "False", "--use_cpu", "True", "--lora_target_modules", "all-linear"]
    arguments += ["--save_strategy", "no"]
    monkeypatch.setattr(sys, "argv", ["warmup_sft.py", *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = load_role_adapters(base, tmp_path / "sft" / "selector", tmp_path / "sft" / "generator")
    assert isinstance(model, PeftModel) and set(model.peft_config) == set(ROLES)
