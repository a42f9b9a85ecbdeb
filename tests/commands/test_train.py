# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import json
import re
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import ModelConfig, TrlParser

from trl_dro import DROConfig, DROTrainer
from trl_dro.commands import train as training
from trl_dro.commands.train import TrainArguments, train
from trl_dro.demo.tiny import GENERATOR_TEMPLATE, SELECTOR_TEMPLATE
from trl_dro.system.run_folder import find_role

from ..tiny_models import bpe_tokenizer, tiny_llama


def parse(*arguments):
    parser = TrlParser((TrainArguments, DROConfig, ModelConfig))
    return parser.parse_args_and_config([*map(str, arguments), "--report_to", "none", "--use_cpu"])


@pytest.fixture
def files(tmp_path):
    """Six questions and thirty passages in the jsonl form of the real samples."""
    questions = [{"id": f"q{i}", "question": f"who wrote book {i}", "golden_answers": [f"Anna {i}"]} for i in range(6)]
    corpus = [
        {"id": f"p{i}", "title": f"Book {i}", "text": f"The book {i} was written by Anna {i}."} for i in range(30)
    ]
    for name, rows in (("questions", questions), ("corpus", corpus)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_questions_and_a_corpus_train_and_evaluate(files, capsys):
    arguments = parse(
        *("--questions", files / "questions.jsonl", "--eval_questions", files / "questions.jsonl"),
        *("--corpus", files / "corpus.jsonl", "--output_dir", files / "run"),
        *("--max_steps", 2, "--logging_steps", 1, "--num_permutations", 2, "--use_peft", "--save_strategy", "no"),
        *("--max_candidates", 6, "--max_answer_length", 16),
    )
    train(*arguments)
    output = capsys.readouterr().out
    assert "Recall@5, %" in output and "update 2 of 2: loss" in output
    for role in ("selector", "generator"):
        assert (files / "run" / role / "adapter_model.safetensors").is_file()
    # The tiny model stands in, with the prompts that it was trained with.
    kept = json.loads((files / "run" / "rag_config.json").read_text())
    assert (kept["selector_template"], kept["generator_template"]) == (SELECTOR_TEMPLATE, GENERATOR_TEMPLATE)


def test_real_questions_train(shared_data, tmp_path, capsys):
    nq = shared_data / "nq"
    (tmp_path / "train.jsonl").write_text("".join((nq / "train.jsonl").open().readlines()[:8]))
    arguments = parse(
        *("--questions", tmp_path / "train.jsonl", "--corpus", nq / "corpus.jsonl", "--output_dir", tmp_path / "run"),
        *("--max_steps", 2, "--logging_steps", 1, "--num_permutations", 2, "--use_peft", "--save_strategy", "no"),
        *("--max_document_length", 40, "--per_device_train_batch_size", 2),
    )
    train(*arguments)
    assert ", bound " in capsys.readouterr().out


def test_the_same_command_starts_and_resumes(files, capsys):
    arguments = [
        *("--questions", files / "questions.jsonl", "--corpus", files / "corpus.jsonl", "--output_dir", files / "run"),
        *("--num_permutations", 2, "--use_peft", "--save_steps", 1, "--max_candidates", 6, "--max_answer_length", 16),
        *("--resume_from_checkpoint", "true"),
    ]
    train(*parse(*arguments, "--max_steps", 1))
    train(*parse(*arguments, "--max_steps", 2))
    state = json.loads((files / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert (files / "run" / "checkpoint-1").is_dir()


def test_prompts_of_ones_own_are_kept_without_a_model_too():
    data_args, args, model_args = parse("--dry_run", "--selector_template", "{documents} Pick for {question}:")
    train(data_args, args, model_args)
    assert args.selector_template == "{documents} Pick for {question}:"
    assert args.generator_template == GENERATOR_TEMPLATE


def test_half_given_data_is_refused():
    with pytest.raises(ValueError, match="--questions and --corpus go together"):
        TrainArguments(questions="train.jsonl")
    with pytest.raises(ValueError, match="has candidates already"):
        TrainArguments(dataset_name="nq", questions="train.jsonl", corpus="corpus.jsonl")
    with pytest.raises(ValueError, match="examples/demo.py needs no data"):
        TrainArguments()


def test_training_goes_on_from_adapters_made_elsewhere(files, monkeypatch):
    tokenizer = bpe_tokenizer(split_digits=False)
    tiny_llama(tokenizer).save_pretrained(files / "base")
    tokenizer.save_pretrained(files / "base")
    for role, seed in (("selector", 1), ("generator", 2)):
        torch.manual_seed(seed)
        config = LoraConfig(task_type="CAUSAL_LM", r=2 + seed, target_modules="all-linear", init_lora_weights=False)
        adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(files / "base"), config)
        adapter.save_pretrained(files / "sft" / role)
    trained = {}

    class Watched(DROTrainer):
        def train(self, *arguments, **settings):
            trained["before"] = get_peft_model_state_dict(self.model, adapter_name="selector")
            trained["before"] = {name: weight.clone() for name, weight in trained["before"].items()}
            trained["trainable"] = {n.split(".")[-2] for n, p in self.model.named_parameters() if p.requires_grad}
            return super().train(*arguments, **settings)

    monkeypatch.setattr(training, "DROTrainer", Watched)
    arguments = parse(
        *("--questions", files / "questions.jsonl", "--corpus", files / "corpus.jsonl"),
        *("--model_name_or_path", files / "base", "--output_dir", files / "run", "--max_steps", 1),
        *("--selector_adapter", files / "sft" / "selector", "--generator_adapter", files / "sft" / "generator"),
        *("--num_selected", 2, "--max_candidates", 4, "--learning_rate", 1e-2, "--save_strategy", "no"),
        *("--per_device_train_batch_size", 2, "--max_document_length", 30),
    )
    train(*arguments)
    sft = load_file(files / "sft" / "selector" / "adapter_model.safetensors")
    assert sft.keys() == trained["before"].keys() and trained["trainable"] == {"selector", "generator"}
    assert all(torch.equal(sft[name], trained["before"][name]) for name in sft)
    for role in ("selector", "generator"):
        before = load_file(files / "sft" / role / "adapter_model.safetensors")
        after = load_file(files / "run" / role / "adapter_model.safetensors")
        assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"selector_adapter": "s"}, "go together"),
        ({"selector_adapter": "s", "generator_adapter": "g", "selector_model_name_or_path": "m"}, "share one base"),
    ],
)
def test_adapters_that_cannot_be_used_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainArguments(**settings)


def test_dry_run_plans_the_run_and_loads_no_weights(files, monkeypatch, capsys):
    monkeypatch.setattr(training, "DROTrainer", None)
    arguments = [
        *("--questions", files / "questions.jsonl", "--eval_questions", files / "questions.jsonl"),
        *("--corpus", files / "corpus.jsonl", "--output_dir", files / "run", "--max_candidates", 6, "--use_peft"),
        *("--max_eval_questions", 2, "--num_train_epochs", 3, "--per_device_train_batch_size", 2, "--dry_run"),
    ]
    train(*parse(*arguments))
    shown = capsys.readouterr().out
    assert "6 to train on, 2 to evaluate on" in shown and "9 updates, 9 E-steps" in shown and "at most" in shown
    assert not (files / "run").exists()


def test_dry_run_finds_what_the_run_would_end_with(files):
    arguments = [
        *("--questions", files / "questions.jsonl", "--corpus", files / "corpus.jsonl", "--max_candidates", 6),
        *("--output_dir", files / "run", "--use_peft", "--dry_run"),
    ]
    with pytest.raises(ValueError, match="max_answer_length=1"):
        train(*parse(*arguments, "--max_answer_length", 1))
    with pytest.raises(ValueError, match="quantized weights cannot be trained: set --use_peft"):
        train(*parse(*arguments[:-2], "--load_in_4bit", "--dry_run"))


@pytest.mark.parametrize("long_answers, num_questions", [("drop", 5), ("truncate", 6)])
def test_long_answers_are_dropped_or_cut_where_that_is_asked_for(
    long_answers, num_questions, files, monkeypatch, capsys
):
    rows = (files / "questions.jsonl").read_text().splitlines(keepends=True)
    rows[0] = rows[0].replace("Anna 0", "Anna " * 40)
    (files / "questions.jsonl").write_text("".join(rows))
    arguments = [
        *("--questions", files / "questions.jsonl", "--eval_questions", files / "questions.jsonl"),
        *("--corpus", files / "corpus.jsonl", "--max_candidates", 6, "--max_answer_length", 24),
        *("--output_dir", files / "run", "--use_peft"),
    ]
    with pytest.raises(ValueError, match=r"answers\[0\]: has \d+ tokens, .* \(--long_answers drop\)"):
        train(*parse(*arguments, "--dry_run"))
    arguments += ["--long_answers", long_answers]
    train(*parse(*arguments, "--dry_run"))
    assert f"{num_questions} to train on, {num_questions} to evaluate on" in capsys.readouterr().out
    given = {}
    monkeypatch.setattr(training, "DROTrainer", lambda **kwargs: given.update(kwargs) or sys.exit())
    with pytest.raises(SystemExit):
        train(*parse(*arguments))
    for name in ("train_dataset", "eval_dataset"):
        assert len(given[name]) == num_questions
        assert max(len(answers[0]) for answers in given[name]["answers"]) < 100


def test_a_small_run_is_told_in_units_that_fit_it_and_for_a_cpu(files, capsys):
    data = ("--questions", files / "questions.jsonl", "--corpus", files / "corpus.jsonl", "--max_candidates", 6)
    train(*parse(*data, "--output_dir", files / "run", "--use_peft", "--max_steps", 2, "--dry_run"))
    shown = capsys.readouterr().out
    assert re.search(r"work of an update *│ *[1-9][\d,.]* [GT]FLOP", shown)
    assert re.search(r"time of the run *│ *[\d.]+ s if each process sustains 0.1 TFLOP/s", shown)


@pytest.mark.parametrize("flag", ["--model_name_or_path", "--selector_model_name_or_path"])
def test_a_file_in_place_of_a_model_is_refused_in_one_line(flag, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="model.gguf is a GGUF file, for llama.cpp: name the model it was made from"):
        train(*parse("--dry_run", flag, tmp_path / "model.gguf"))
    with pytest.raises(ValueError, match="model.gguf is a GGUF file"):
        find_role(tmp_path / "model.gguf", "generator")
