# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import importlib.util
import json
from pathlib import Path

import pytest
from datasets import DatasetDict
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import ModelConfig, SFTConfig, TrlParser

from trl_dro.roles import ROLES, load_role_adapters

from ..test_dro_trainer import make_dataset
from ..test_warmup import conversation
from ..tiny_models import bpe_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).resolve().parents[2] / "examples" / "warmup_sft.py"
    spec = importlib.util.spec_from_file_location("warmup_sft", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("teacher", ["retriever", "relevant", "rankings.jsonl"])
def test_both_roles_get_an_adapter_that_training_can_start_from(script, tmp_path, teacher):
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
    parser = TrlParser((script.WarmUpArguments, SFTConfig, ModelConfig))
    script.main(*parser.parse_args_and_config([*map(str, arguments), "--save_strategy", "no"]))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = load_role_adapters(base, tmp_path / "sft" / "selector", tmp_path / "sft" / "generator")
    assert isinstance(model, PeftModel) and set(model.peft_config) == set(ROLES)
