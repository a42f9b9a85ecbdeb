# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.

import pytest
from datasets import Dataset
from transformers import AutoTokenizer
from trl import ModelConfig, SFTConfig

from trl_dro.commands import warmup
from trl_dro.commands.warmup import WarmUpArguments, warm_up
from trl_dro.demo.tiny import SELECTOR_TEMPLATE, TINY_MODEL
from trl_dro.demo.world import synthetic_world
from trl_dro.model.prompts import PromptBuilder

from ..tiny_models import TOKENIZERS


NUM_SELECTED = 3


@pytest.fixture(scope="module")
def records():
    return synthetic_world(40, 1, num_documents=8)[0].to_list()


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def completion(row):
    return [token for token, counts in zip(row["input_ids"], row["completion_mask"], strict=True) if counts]


def prompt(row):
    return row["input_ids"][: row["completion_mask"].index(1)]


PROMPT = (
    "I will provide you with 4 passages, each indicated by number identifier [].\n"
    "[1] about Paris\n[2] about Rome, [7] hills\n[3] about Oslo\n[4] about Bern\n"
    "Search Query: which city has hills?.\nRank the 4 passages above."
)


def conversation(ranking, prompt=PROMPT):
    turns = [("system", "You are a ranker."), ("human", prompt), ("gpt", ranking)]
    return {"id": "1", "conversations": [{"from": name, "value": value} for name, value in turns]}


def test_dry_run_counts_what_it_would_train_on_and_trains_nothing(records, tmp_path, monkeypatch, capsys):
    Dataset.from_list(records).save_to_disk(tmp_path / "data")
    monkeypatch.setattr(warmup, "SFTTrainer", None)
    args = WarmUpArguments(dataset_name=str(tmp_path / "data"), num_selected=3, max_candidates=8, dry_run=True)
    sft_args = SFTConfig(str(tmp_path / "sft"), bf16=False, report_to="none")
    warm_up(args, sft_args, ModelConfig(model_name_or_path=str(TINY_MODEL)))
    shown = capsys.readouterr().out
    assert "selector" in shown and "generator" in shown and shown.count("40") >= 2
    assert not (tmp_path / "sft" / "selector").exists()


def test_without_a_model_the_tiny_one_learns_in_its_own_prompts(records, tmp_path, monkeypatch):
    Dataset.from_list(records).save_to_disk(tmp_path / "data")
    shown = {}
    monkeypatch.setattr(warmup, "print_examples", shown.update)
    args = WarmUpArguments(dataset_name=str(tmp_path / "data"), num_selected=3, max_candidates=8, dry_run=True)
    args.generator_template = "{documents} {question} ?!"
    warm_up(args, SFTConfig(str(tmp_path / "sft"), bf16=False, report_to="none"), ModelConfig())
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    expected = PromptBuilder(tokenizer, args.generator_template, 3)
    assert prompt(shown["generator"][0]) == expected(records[0]["question"], records[0]["documents"][:3])
    assert args.selector_template == SELECTOR_TEMPLATE
