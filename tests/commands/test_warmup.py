# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import os
import signal
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoTokenizer
from trl import ModelConfig, SFTConfig, TrlParser

from trl_dro import LoadOptions, RAGPipeline
from trl_dro.commands import warmup
from trl_dro.commands.warmup import WarmUpArguments, WarmUpTrainer, warm_up
from trl_dro.demo.tiny import SELECTOR_TEMPLATE, TINY_MODEL
from trl_dro.demo.world import synthetic_world
from trl_dro.model.prompts import PromptBuilder
from trl_dro.model.roles import ROLES

from ..trainer.test_dro_trainer import make_dataset


@pytest.fixture(scope="module")
def records():
    return synthetic_world(40, 1, num_documents=8)[0].to_list()


def prompt(row):
    return row["input_ids"][: row["completion_mask"].index(1)]


def test_dry_run_counts_what_it_would_train_on_and_trains_nothing(records, tmp_path, monkeypatch, capsys):
    Dataset.from_list(records).save_to_disk(tmp_path / "data")
    monkeypatch.setattr(warmup, "WarmUpTrainer", None)
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


def warm_up_into(folder, data, **settings):
    settings = {"max_steps": 4, "save_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3} | settings
    sft_args = SFTConfig(
        str(folder), bf16=False, use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1, **settings
    )
    args = WarmUpArguments(dataset_name=str(data), num_selected=3, max_candidates=8)
    warm_up(args, sft_args, ModelConfig(model_name_or_path=str(TINY_MODEL), lora_r=2, lora_dropout=0.1))


@pytest.fixture(scope="module")
def data(records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("warmup") / "data"
    Dataset.from_list(records[:8]).save_to_disk(folder)
    return folder


@pytest.fixture(scope="module")
def whole(data):
    warm_up_into(data.parent / "whole", data)
    return data.parent / "whole"


def adapters(folder):
    return {role: load_file(folder / role / "adapter_model.safetensors") for role in ROLES}


def count_updates(monkeypatch, stop_at=None, how=None):
    """Updates of each role, by its folder; one of them is interrupted."""
    step, done = WarmUpTrainer.training_step, []

    def counted(trainer, *args, **kwargs):
        if len(done) == stop_at:
            how()
        done.append(Path(trainer.args.output_dir).name)
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(WarmUpTrainer, "training_step", counted)
    return done


def cut_power():
    raise RuntimeError("power cut")


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("how, ends, left", [(cut_power, RuntimeError, 2), (terminate, SystemExit, 1)])
def test_a_warm_up_that_was_stopped_goes_on_in_the_role_and_update_where_it_was(
    whole, data, tmp_path, monkeypatch, how, ends, left
):
    with monkeypatch.context() as patch, pytest.raises(ends):
        count_updates(patch, stop_at=6, how=how)
        warm_up_into(tmp_path, data)
    done = count_updates(monkeypatch)
    warm_up_into(tmp_path, data)
    assert done == ["generator"] * left  # the finished role is not trained again
    expected = adapters(whole)
    for role, weights in adapters(tmp_path).items():
        assert all(torch.equal(weight, expected[role][name]) for name, weight in weights.items())
    warm_up_into(tmp_path, data)
    assert len(done) == left


def test_another_warm_up_is_not_taken_for_the_one_in_the_folder(whole, data, monkeypatch):
    done = count_updates(monkeypatch)
    with pytest.raises(ValueError, match="selector holds a warm-up with learning_rate=0.001, not 0.002: name another"):
        warm_up_into(whole, data, learning_rate=2e-3)
    assert not done


def test_a_warm_up_is_a_system_that_is_asked_as_it_was_warmed_up(whole):
    assert RAGPipeline.from_pretrained(whole, options=LoadOptions(device="cpu")).config.num_selected == 3


def parse(tmp_path, *arguments):
    make_dataset(4).save_to_disk(tmp_path / "data")
    parser = TrlParser((WarmUpArguments, SFTConfig, ModelConfig))
    flags = ["--dataset_name", str(tmp_path / "data"), "--num_selected", "2", "--dry_run", "--use_cpu", *arguments]
    return parser.parse_args_and_config([*flags, "--output_dir", str(tmp_path / "sft"), "--report_to", "none"])


def test_answers_are_limited_by_the_setting_that_dro_has(tmp_path, capsys):
    warm_up(*parse(tmp_path, "--max_answer_length", "64"))
    assert "Warm-up examples" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"row 0, column answers\[0\]: has \d+ tokens, more than max_answer_length=1"):
        warm_up(*parse(tmp_path, "--max_answer_length", "1"))


def test_long_answers_are_no_examples_where_that_is_asked_for(tmp_path, monkeypatch):
    shown = {}
    monkeypatch.setattr(warmup, "print_examples", shown.update)
    dataset = make_dataset(4)
    tokenizer = warmup.load_tokenizer(warmup.tiny_model_for(parse(tmp_path)[0]), None)
    longest = max(len(tokenizer(answers[0], add_special_tokens=False).input_ids) for answers in dataset["answers"])
    warm_up(*parse(tmp_path, "--max_answer_length", str(longest - 1), "--long_answers", "truncate"))
    assert len(shown["generator"]) == 4
    assert max(sum(mask) for mask in shown["generator"]["completion_mask"]) <= longest  # with the end of the turn
    with pytest.raises(ValueError, match="--long_answers drop: say which are too long, --max_answer_length"):
        parse(tmp_path, "--long_answers", "drop")


def test_rankings_are_of_any_length_that_is_allowed(tmp_path, monkeypatch):
    shown = {}
    monkeypatch.setattr(warmup, "print_examples", shown.update)
    for flags, num_lengths in (([], 1), (["--min_selected", "0"], 3)):
        warm_up(*parse(tmp_path, *flags, "--seed", "1"))
        assert len({sum(mask) for mask in shown["selector"]["completion_mask"]}) == num_lengths
    with pytest.raises(ValueError, match="--min_selected 3: it must be at least 0 and at most 2"):
        parse(tmp_path, "--min_selected", "3")


def test_a_length_that_would_be_overwritten_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--max_length 99 would cut .* set --max_document_length"):
        warm_up(*parse(tmp_path, "--max_length", "99"))
