# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import re
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
from datasets import Dataset

from trl_dro.commands import train
from trl_dro.commands.cli import main, make_parser

from .hub_cache import fill_hub_cache
from .trainer.test_cost import make_questions


RECIPES = sorted(path for path in (Path(__file__).resolve().parents[1] / "recipes").glob("*_*.yaml"))
BENCHMARKS = ("nq", "hotpotqa", "musique", "2wiki", "wow")
SMALL = ("smollm2_135m", "gemma3_270m", "qwen3_0.6b", "llama3.2_1b", "qwen2.5_3b")
GIB = {"CPU": 16, "8 GB card": 6.5, "16 GB card": 13, "24 GB card": 20}  # with 1 to 2 GiB left to a card's context
SETTINGS = ("llama3_8b_qlora", "mistral_7b_qlora", "llama3_1b_8b_qlora", "llama3_8b_8gpu", "mistral_7b_8gpu")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def dry_run(monkeypatch, capsys, recipe, *arguments):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(recipe.parents[1])  # recipes of several cards name one of recipes/accelerate
    monkeypatch.setattr(sys, "argv", ["trl-dro", "train", "--config", str(recipe), "--dry_run", *map(str, arguments)])
    monkeypatch.setattr(train, "DROTrainer", None)  # no weights are loaded
    main()
    return capsys.readouterr().out


def test_every_benchmark_has_every_setting_and_nq_every_small_model():
    large = {f"{name}_{setting}" for name in BENCHMARKS for setting in SETTINGS}
    assert {path.stem for path in RECIPES} == large | {f"nq_{model}" for model in SMALL}


@pytest.mark.parametrize("model", SMALL)
def test_small_models_fit_the_devices_that_their_recipe_names(model, hub_cache, monkeypatch, capsys):
    fill_hub_cache(hub_cache)
    [recipe] = [path for path in RECIPES if path.stem == f"nq_{model}"]
    header = recipe.read_text().split("\nmodel_name_or_path")[0]
    devices = re.findall(r"^#   (.*), at most ([\d.]+) GiB:\n#     (--.*)$", header, re.MULTILINE)
    assert {device for device, *_ in devices} | {re.search("for an? (.*)\\.\n", header)[1]} == set(GIB)
    for device, peak, arguments in devices:
        shown = dry_run(monkeypatch, capsys, recipe, *arguments.split())
        estimate = re.search(r"at most *│ *([\d.]+) │", shown)[1]
        assert f"{float(estimate):.1f}" == peak and float(peak) < GIB[device]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_dry_runs_with_data_and_with_none(recipe, hub_cache, tmp_path, monkeypatch, capsys):
    fill_hub_cache(hub_cache)
    questions = make_questions(num_documents=20).to_list()
    for question in questions:  # as they are retrieved
        question["documents"] = [{**each, "score": 9.0 / (i + 1)} for i, each in enumerate(question["documents"])]
    Dataset.from_list(questions).save_to_disk(tmp_path / "data")
    shown = dry_run(monkeypatch, capsys, recipe, "--dataset_name", tmp_path / "data")
    assert "4 to train on" in shown and "counted" in shown and "updates" in shown

    shown = dry_run(monkeypatch, capsys, recipe)
    peak = re.search(r"at most *│ *([\d.]+) │", shown)[1]
    work = re.search(r"work of an update *│ *([\d.,]+ [GTPE]?FLOP)", shown)[1]
    header = " ".join(recipe.read_text().replace("# ", " ").split())
    assert f"At most {float(peak):.1f} GiB" in header and f"{work} per update" in header
    assert "Only the dry run was run: no GPU" in header
    assert ("under FSDP2" in shown) == ("8gpu" in recipe.stem)
    assert float(peak) < (74 if "8gpu" in recipe.stem else 22)  # GiB of a card of 80 GB or 24 GB


def test_all_weights_fit_eight_cards_under_each_engine_as_the_header_says(hub_cache, monkeypatch, capsys):
    fill_hub_cache(hub_cache)
    [recipe] = [path for path in RECIPES if path.stem == "nq_llama3_8b_8gpu"]
    header = " ".join(recipe.read_text().split("\nmodel_name_or_path")[0].replace("# ", " ").split())
    stated = re.findall(r"([\d.]+) GiB: (--accelerate_config .*?)(?:\. With|\.$)", header)
    assert len(stated) == 2 and "zero3.yaml" in stated[0][1] and "--use_peft true" in stated[1][1]
    for peak, arguments in stated:
        shown = dry_run(monkeypatch, capsys, recipe, *arguments.split())
        estimate = re.search(r"at most *│ *([\d.]+) │", shown)[1]
        assert f"{float(estimate):.1f}" == peak and float(peak) < 74


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_header_has_the_commands_that_run_the_recipe(recipe):
    header = recipe.read_text().split("\nmodel_name_or_path")[0].replace("\\\n#", "")
    commands = re.findall(r"^# +trl-dro (\w+) (.*)$", header, re.MULTILINE)
    assert [name for name, _ in commands] == ["retrieve", "retrieve", "train"]
    root = recipe.parents[1]
    for name, arguments in commands:
        words = [str(root / word) if word.startswith("recipes/") else word for word in arguments.split()]
        parsed, *others = make_parser(name).parse_args_and_config(words)
        if name == "train":
            assert words[1] == str(recipe)
            [training_args, _] = others
            shown = (training_args.max_candidates, training_args.num_selected)
            scored = training_args.selector_form == "query_likelihood"
            assert shown == ((5, 1 if scored else 2) if training_args.use_cpu else (20, 5))
            assert Path(training_args.output_dir).name == recipe.stem


def test_dry_run_without_a_tokenizer_says_so_and_takes_lengths_from_the_settings(
    hub_cache, tmp_path, monkeypatch, capsys
):
    fill_hub_cache(hub_cache, tokenizers=False)
    make_questions(num_documents=20).save_to_disk(tmp_path / "data")
    shown = dry_run(monkeypatch, capsys, RECIPES[0], "--dataset_name", tmp_path / "data")
    assert "tokens are not counted" in shown and "with 160 tokens per document" in shown and "4 to train on" in shown


def test_dry_run_refuses_data_and_models_that_are_not_there(hub_cache, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="the config of .* cannot be read"):
        dry_run(monkeypatch, capsys, RECIPES[0])
    fill_hub_cache(hub_cache)
    with pytest.raises(SystemExit, match="absent.jsonl"):
        dry_run(monkeypatch, capsys, RECIPES[0], "--dataset_name", tmp_path / "absent.jsonl")
