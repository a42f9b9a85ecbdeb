# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Faults injected on purpose: each ends in recovery, or in one line that says what to do, and never in lost data."""

import errno
import json
import logging
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import T5Config, T5ForConditionalGeneration, TrainerCallback

from trl_dro import DROConfig, DROTrainer
from trl_dro.data import read_questions
from trl_dro.model.roles import ROLES
from trl_dro.trainer.checkpoint import find_checkpoints, find_damage
from trl_dro.trainer.run import checkpoints_of_run

from .tiny_models import bpe_tokenizer, tiny_llama
from .trainer.test_dro_trainer import make_dataset, randomize_adapters, run_step


TOKENIZER = bpe_tokenizer(split_digits=False)
LOGS = {"log_history.jsonl", "_permutations", "run.json", ".lock"}  # what a run leaves without checkpoints
LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear"}


def make_trainer(folder, dataset=None, model=None, eval_dataset=None, callbacks=None, lora=None, **settings):
    settings = {
        "output_dir": str(folder),
        "num_selected": 2,
        "max_candidates": 4,
        "num_permutations": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    } | settings
    trainer = DROTrainer(
        tiny_llama(TOKENIZER) if model is None else model,
        DROConfig(**settings),
        make_dataset() if dataset is None else dataset,
        eval_dataset,
        TOKENIZER,
        LoraConfig(**LORA | (lora or {})),
        callbacks=callbacks,
    )
    randomize_adapters(trainer)
    return trainer


def save_run_that_selects_none(folder):
    """A selector that may end before its first document, and has learned to: documents cost more than any is worth."""
    few = {"min_selected": 0, "document_cost": 1e3, "sampling": "distinct", "num_permutations": 17}
    trainer = make_trainer(folder, **few, max_steps=12, logging_steps=12, max_answer_length=6, train_generator=False)
    trainer.train()
    trainer.save_model()


def weights_of(trainer):
    return {n: p.detach().clone() for role in ROLES for n, p in trainer.roles.named_parameters(role)}


def one_line(error):
    """The message of an error, which must not span lines."""
    message = str(error.value)
    assert message and "\n" not in message
    return message


def named_questions(num_questions=8):
    return make_dataset(num_questions).add_column("id", [f"q{i}" for i in range(num_questions)])


def history(trainer, name):
    return [logs[name] for logs in trainer.state.log_history if name in logs]


# Numerics


def break_likelihood_of(trainer, is_broken):
    """Makes the answer likelihoods of some questions NaN."""
    answer_logps = trainer.rag.answer_logps

    def broken(questions, *args, **kwargs):
        logps = answer_logps(questions, *args, **kwargs)
        nan = torch.tensor([is_broken(question) for question in questions])
        return logps * torch.where(nan, float("nan"), 1.0).unsqueeze(-1)

    trainer.rag.answer_logps = broken


@pytest.mark.parametrize("steps_per_estimation", [1, 2])
def test_a_question_of_nan_likelihood_is_left_out_and_named_while_the_others_train(
    tmp_path, caplog, steps_per_estimation
):
    trainer = make_trainer(tmp_path, named_questions(), steps_per_estimation=steps_per_estimation)
    break_likelihood_of(trainer, lambda question: question["id"] == "q3")
    before = weights_of(trainer)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    warned = [message for message in caplog.messages if "No finite likelihood" in message]
    assert len(warned) == 1 and warned[0].endswith("No finite likelihood for questions q3: left out.")
    assert sorted(history(trainer, "masked_question_share")) == [0, 0, 0, 0.5]
    assert sum(history(trainer, "skipped_update_share")) == 0
    after = weights_of(trainer)
    assert all(weight.isfinite().all() and not torch.equal(weight, before[name]) for name, weight in after.items())


@pytest.mark.parametrize("broken", ["NaN with a frozen generator", "zero under every permutation"])
def test_a_question_without_a_usable_weight_is_named_whatever_the_reason(tmp_path, caplog, broken):
    frozen = broken == "NaN with a frozen generator"
    trainer = make_trainer(tmp_path, named_questions(), train_generator=not frozen)
    answer_logps = trainer.rag.answer_logps

    def unusable(questions, *args, **kwargs):
        bad = torch.tensor([question["id"] == "q3" for question in questions]).unsqueeze(-1)
        logps = answer_logps(questions, *args, **kwargs)
        return logps.masked_fill(bad, float("nan" if frozen else "-inf"))

    trainer.rag.answer_logps = unusable
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert sum(history(trainer, "masked_question_share")) == 0.5
    assert any("q3" in message for message in caplog.messages)


def test_a_nan_of_the_selector_alone_is_left_out_and_named_too(tmp_path, caplog):
    trainer = make_trainer(tmp_path, named_questions())
    permutation_logps = trainer.rag.permutation_logps

    def broken(questions, *args, **kwargs):
        nan = torch.tensor([question["id"] == "q3" for question in questions]).unsqueeze(-1)
        return permutation_logps(questions, *args, **kwargs) * torch.where(nan, float("nan"), 1.0)

    trainer.rag.permutation_logps = broken
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert sum(history(trainer, "skipped_update_share")) == 0
    assert any("No finite likelihood for questions q3" in message for message in caplog.messages)


def test_a_selector_that_is_nan_throughout_ends_in_the_same_error(tmp_path):
    trainer = make_trainer(tmp_path, max_skipped_updates=2)
    forward = trainer.roles.forward

    def broken(role, wrapped=None, **inputs):
        outputs = forward(role, wrapped, **inputs)
        outputs.logits = outputs.logits * (float("nan") if role == "selector" else 1.0)
        return outputs

    trainer.roles.forward = broken
    with pytest.raises(FloatingPointError, match="2 updates in a row") as error:
        trainer.train()
    one_line(error)


def test_every_call_of_train_counts_updates_left_out_anew(tmp_path):
    trainer = make_trainer(tmp_path, max_skipped_updates=2)
    break_likelihood_of(trainer, lambda question: True)
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="2 updates in a row"):
            trainer.train()


class Update(TrainerCallback):
    """Spoils a gradient before the clipping of one update; keeps weights and optimizer state after every update."""

    def __init__(self, spoilt_updates, value=float("nan")):
        self.spoilt_updates = spoilt_updates
        self.value = value
        self.after = []

    def attach(self, trainer):
        self.trainer = trainer
        clip = trainer._clip_grad_norm

        def spoil(model):
            if trainer.state.global_step in self.spoilt_updates:
                trainer.roles.named_parameters("selector")[0][1].grad.view(-1)[0] = self.value
            return clip(model)

        trainer._clip_grad_norm = spoil
        return self

    def on_step_end(self, args, state, control, **kwargs):
        moments = [
            {name: value.clone() for name, value in self.trainer.optimizer.state[parameter].items()}
            for role in ROLES
            for _, parameter in self.trainer.roles.named_parameters(role)
        ]
        self.after.append((weights_of(self.trainer), moments))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_with_a_broken_gradient_changes_neither_weights_nor_optimizer(tmp_path, caplog, value):
    update = Update({1}, value)
    trainer = make_trainer(tmp_path, named_questions(), callbacks=[update])
    update.attach(trainer)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert history(trainer, "skipped_update_share") == [0, 1, 0, 0]
    (weights, moments), (left_out_weights, left_out_moments), (next_weights, next_moments) = update.after[:3]
    assert all(torch.equal(weights[name], left_out_weights[name]) for name in weights)
    for before, after in zip(moments, left_out_moments, strict=True):
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(not torch.equal(weights[name], next_weights[name]) for name in weights)
    assert {int(state["step"]) for state in next_moments} == {2}
    assert all(weight.isfinite().all() for weight in update.after[-1][0].values())
    [message] = [message for message in caplog.messages if "left out: not finite" in message]
    assert "Update 2 left out" in message and "last questions: q" in message
    assert all(len(history(trainer, f"{role}/grad_norm")) == 3 for role in ROLES)  # the broken one is none


def test_an_update_with_a_broken_gradient_is_left_out_without_clipping_too(tmp_path):
    trainer = make_trainer(tmp_path, max_grad_norm=0.0, max_steps=2)
    get_grad_norm = trainer._get_grad_norm

    def spoil(model, grad_norm=None):
        trainer.roles.named_parameters("selector")[0][1].grad.fill_(float("nan"))
        return get_grad_norm(model, grad_norm)

    trainer._get_grad_norm = spoil
    before = weights_of(trainer)
    trainer.train()
    assert history(trainer, "skipped_update_share") == [1, 1]
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(trainer).items())


def test_updates_that_are_never_finite_end_in_an_error_that_names_questions(tmp_path):
    trainer = make_trainer(tmp_path, named_questions(), max_steps=8, max_skipped_updates=3)
    break_likelihood_of(trainer, lambda question: True)
    before = weights_of(trainer)
    with pytest.raises(
        FloatingPointError, match=r"3 updates in a row were not finite \(last questions: q\d, q\d\)"
    ) as e:
        trainer.train()
    assert "lower the learning rate" in one_line(e)
    assert trainer.state.global_step == 2
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(trainer).items())


def test_updates_left_out_are_counted_in_a_row(tmp_path):
    update = Update({0, 1, 3, 4})
    trainer = make_trainer(tmp_path, callbacks=[update], max_steps=6, max_skipped_updates=3)
    update.attach(trainer)
    trainer.train()
    assert history(trainer, "skipped_update_share") == [1, 1, 0, 1, 1, 0]


# Checkpoints


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A run with checkpoints after updates 2 and 4, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    make_trainer(folder, save_strategy="steps", save_steps=2).train()
    return folder


@pytest.fixture
def damaged_run(finished_run, tmp_path):
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def half_written(write):
    def broken(data, path, *args, **kwargs):
        write(data, path, *args, **kwargs)
        truncate(Path(path))
        full_disk()

    return broken


FULL_DISK = {
    "weights": ("peft.peft_model.safe_save_file", True),
    "optimizer and training arguments": ("torch.save", True),
    "trainer state": ("transformers.trainer_callback.TrainerState.save_to_json", False),
    "tokenizer": ("transformers.PreTrainedTokenizerBase.save_pretrained", False),
}


@pytest.mark.parametrize("part", FULL_DISK)
def test_a_disk_that_fills_up_during_saving_leaves_the_older_checkpoint_whole(damaged_run, monkeypatch, part):
    newest = damaged_run / "checkpoint-4"
    older = {path: path.read_bytes() for path in newest.rglob("*") if path.is_file()}
    name, has_path = FULL_DISK[part]
    trainer = make_trainer(damaged_run, max_steps=8, save_strategy="steps", save_steps=2)
    with monkeypatch.context() as patch:
        module, _, attribute = name.rpartition(".")
        if has_path:
            write = torch.save if module == "torch" else __import__("safetensors.torch").torch.save_file
            patch.setattr(name, half_written(write))
        else:
            patch.setattr(name, full_disk)
        with pytest.raises(OSError, match="checkpoint-6 could not be written.*No space left on device") as error:
            trainer.train(resume_from_checkpoint=True)
    assert f"resume with resume_from_checkpoint=True (newest: {newest})" in one_line(error)
    assert {path.name for path in damaged_run.iterdir()} == {"checkpoint-2", "checkpoint-4"} | LOGS  # nothing partial
    assert {path: path.read_bytes() for path in newest.rglob("*") if path.is_file()} == older
    resumed = make_trainer(damaged_run, max_steps=6, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert find_checkpoints(damaged_run)[0].name == "checkpoint-6" and resumed.state.global_step == 6


@pytest.mark.parametrize("part, share", [("generator/adapter_model.safetensors", 0.5), ("optimizer.pt", 0.9)])
def test_a_write_that_the_system_cuts_short_is_one_line_whatever_library_wrote(finished_run, tmp_path, part, share):
    size = (finished_run / "checkpoint-2" / part).stat().st_size
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * size), hard))
    try:
        with pytest.raises(OSError, match="checkpoint-2 could not be written.*free space or mend the disk") as error:
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    one_line(error)
    assert {path.name for path in tmp_path.iterdir()} == LOGS


def test_a_full_disk_at_the_first_checkpoint_says_that_there_is_none(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=1)
    monkeypatch.setattr("peft.peft_model.safe_save_file", full_disk)
    with pytest.raises(OSError, match="no older one is left") as error:
        trainer.train()
    one_line(error)
    assert {path.name for path in tmp_path.iterdir()} == LOGS


DAMAGE = {
    "a truncated adapter": lambda folder: truncate(folder / "selector" / "adapter_model.safetensors"),
    "an empty adapter": lambda folder: (folder / "generator" / "adapter_model.safetensors").write_bytes(b""),
    "a missing adapter file": lambda folder: (folder / "generator" / "adapter_model.safetensors").unlink(),
    "a missing role": lambda folder: shutil.rmtree(folder / "selector"),
    "a truncated optimizer": lambda folder: truncate(folder / "optimizer.pt"),
    "truncated random states": lambda folder: truncate(folder / "rng_state.pth"),
    "garbage as trainer state": lambda folder: (folder / "trainer_state.json").write_bytes(b'{"epoch": \xff'),
    "no trainer state": lambda folder: (folder / "trainer_state.json").unlink(),
    "no optimizer": lambda folder: (folder / "optimizer.pt").unlink(),
    "a trainer state of another form": lambda folder: (folder / "trainer_state.json").write_text("[]"),
}


@pytest.mark.parametrize(
    "kind",
    list(DAMAGE),
)
def test_a_damaged_checkpoint_is_passed_over_for_the_older_one_and_refused_by_name(damaged_run, caplog, kind):
    newest, older = damaged_run / "checkpoint-4", damaged_run / "checkpoint-2"
    DAMAGE[kind](newest)
    trainer = make_trainer(damaged_run, max_steps=3)
    before = weights_of(trainer)
    with pytest.raises(ValueError, match=f"cannot resume from {newest}: .*name an older checkpoint") as error:
        trainer.train(resume_from_checkpoint=str(newest))
    one_line(error)
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(trainer).items())

    seen = []
    load = trainer.roles.load
    trainer.roles.load = lambda folder, *others: seen.append(str(folder)) or load(folder, *others)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=True)
    assert seen == [str(older)] and trainer.state.global_step == 3
    [warning] = [message for message in caplog.messages if "is passed over" in message]
    assert f"{newest} is passed over: " in warning and "\n" not in warning
    assert newest.is_dir()  # evidence is not destroyed


def test_a_run_without_any_whole_checkpoint_says_so(damaged_run):
    for step in (2, 4):
        DAMAGE["a missing role"](damaged_run / f"checkpoint-{step}")
    for folder in (damaged_run, damaged_run / "nowhere"):
        with pytest.raises(ValueError, match="no whole checkpoint to resume from: train without") as error:
            make_trainer(folder).train(resume_from_checkpoint=True)
        one_line(error)


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot resume from .*no such folder") as error:
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    one_line(error)


OTHER_RUNS = {
    "learning_rate=0.01, not 0.02": {"learning_rate": 0.02},
    "num_selected=2, not 1": {"num_selected": 1},
    "seed=42, not 7": {"seed": 7},
    "selector_template=.*, not .*": {"selector_template": "{documents}\n{question} {format}"},
    "another train_dataset, which has changed since": {"dataset": make_dataset(7)},
    "another base, which has changed since": {"model": lambda: tiny_llama(TOKENIZER, seed=9)},
}


@pytest.mark.parametrize("difference", OTHER_RUNS)
@pytest.mark.parametrize("by_name", [False, True])
def test_a_checkpoint_of_another_run_is_refused(damaged_run, difference, by_name):
    settings = {name: value() if callable(value) else value for name, value in OTHER_RUNS[difference].items()}
    trainer = make_trainer(damaged_run, max_steps=8, **settings)
    before = weights_of(trainer)
    newest = damaged_run / "checkpoint-4"
    with pytest.raises(ValueError, match=f"cannot resume from {newest}: it is of a run with {difference}") as error:
        trainer.train(resume_from_checkpoint=str(newest) if by_name else True)
    assert "name another output_dir to begin a new run" in one_line(error)
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(trainer).items())


def test_a_new_run_in_an_old_folder_says_so_and_never_resumes_the_old_one(damaged_run, caplog):
    first = make_trainer(damaged_run, max_steps=1, save_strategy="steps", save_steps=1)
    with caplog.at_level(logging.WARNING):
        first.train()
    [warning] = [message for message in caplog.messages if "of an earlier run" in message]
    assert "checkpoint-4" in warning and "\n" not in warning
    assert [path.name for path in find_checkpoints(damaged_run)] == ["checkpoint-4", "checkpoint-2", "checkpoint-1"]
    assert [path.name for path in checkpoints_of_run(damaged_run)] == ["checkpoint-1"]
    resumed = make_trainer(damaged_run, max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert len(history(resumed, "loss")) == 3  # the first update is the new run's own
    make_trainer(damaged_run).train()
    assert not checkpoints_of_run(damaged_run)  # so that the command starts anew


def test_two_trainings_into_one_folder_are_refused(tmp_path):
    code = (
        "import sys, time; from trl_dro.data.storage import alone_in\n"
        "with alone_in(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    )
    trainer = make_trainer(tmp_path, max_steps=1)
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another process is writing to .*name another output_dir") as error:
            trainer.train()
        one_line(error)
        other.kill()
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_checkpoint_of_an_earlier_version_is_resumed(damaged_run):
    for folder in (damaged_run, damaged_run / "checkpoint-2", damaged_run / "checkpoint-4"):
        (folder / "run.json").unlink()
    trainer = make_trainer(damaged_run, max_steps=5)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 5


@pytest.mark.parametrize(
    "lora",
    [
        {"r": 8},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
)
def test_a_checkpoint_of_another_adapter_is_refused(finished_run, tmp_path, lora):
    trainer = make_trainer(tmp_path, lora=lora)
    before = weights_of(trainer)
    with pytest.raises(ValueError, match="peft_config") as error:
        trainer.train(resume_from_checkpoint=str(finished_run / "checkpoint-4"))
    one_line(error)
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(trainer).items())


# Data and models


@pytest.mark.parametrize("cut", [30, 65, 75])
def test_a_truncated_file_of_questions_names_its_line(tmp_path, cut):
    path = tmp_path / "questions.jsonl"
    lines = [json.dumps({"id": f"q{i}", "question": f"who wrote number {i}?", "answers": ["Anna"]}) for i in range(3)]
    assert len(lines[0]) in range(66, 75)
    path.write_text("\n".join([*lines[:2], lines[2][: min(cut, len(lines[2]) - 1)]]))
    with pytest.raises(ValueError, match="line 3|:3") as error:
        read_questions(path)
    one_line(error)


def test_a_tokenizer_without_eos_is_refused_before_any_model_is_loaded(tmp_path):
    tokenizer = bpe_tokenizer(split_digits=False)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos token.*set tokenizer.eos_token") as error:
        DROTrainer(
            "no/such-model",
            DROConfig(str(tmp_path), num_selected=2, max_candidates=4, use_cpu=True),
            make_dataset(),
            processing_class=tokenizer,
            peft_config=LoraConfig(**LORA),
        )
    one_line(error)


@pytest.mark.parametrize("source", ["folder", "instance"])
def test_an_encoder_decoder_model_is_refused(tmp_path, source):
    config = T5Config(vocab_size=len(TOKENIZER), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    config.architectures = ["T5ForConditionalGeneration"]
    if source == "folder":
        config.save_pretrained(tmp_path / "t5")  # no weights: loading them would fail otherwise
        TOKENIZER.save_pretrained(tmp_path / "t5")
    model = str(tmp_path / "t5") if source == "folder" else T5ForConditionalGeneration(config)
    with pytest.raises(ValueError, match="encoder-decoder") as error:
        make_trainer(tmp_path, model=model)
    one_line(error)


def test_a_context_shorter_than_the_prompt_names_row_and_cure(tmp_path):
    with pytest.raises(ValueError, match="train_dataset, row 7, column question: the prompt has") as error:
        make_trainer(tmp_path, model=tiny_llama(TOKENIZER, max_position_embeddings=100), max_answer_length=32)
    one_line(error)


def test_documents_are_shortened_to_a_context_that_holds_the_question(tmp_path):
    rows = make_dataset().to_list()
    for row in rows:
        row["documents"] = [{"text": "number 7 was born " * 50}] * 4
    model = tiny_llama(TOKENIZER, max_position_embeddings=256)
    trainer = make_trainer(tmp_path, Dataset.from_list(rows), model, max_steps=1, max_answer_length=16)
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_module_named_like_a_role_is_refused(tmp_path):
    model = tiny_llama(TOKENIZER)
    model.model.selector = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="module 'model.selector' of the base model is named like a role") as error:
        make_trainer(tmp_path, model=model)
    assert one_line(error).endswith("rename it")


@pytest.mark.parametrize("name", ["default", "selector"])
def test_a_model_with_adapters_of_its_own_is_refused(tmp_path, name):
    model = get_peft_model(tiny_llama(TOKENIZER), LoraConfig(**LORA), adapter_name=name)
    with pytest.raises(ValueError, match=r"exactly the adapters 'selector' and 'generator'.*merge_and_unload") as e:
        make_trainer(tmp_path, model=model)
    one_line(e)


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_on_the_output_layer_has_the_right_gradient_and_is_resumed(tmp_path, tied):
    lora = {"target_modules": ["q_proj", "lm_head"]}
    settings = {"num_permutations": 2048, "per_device_train_batch_size": 1, "shuffle_candidates": False}

    def make(**settings):
        return make_trainer(tmp_path, model=tiny_llama(TOKENIZER, tie_word_embeddings=tied), lora=lora, **settings)

    trainer = make(dataset=make_dataset(1), **settings)
    record = trainer.train_dataset[0]
    permutations = torch.cartesian_prod(*[torch.arange(1, 5)] * 2)
    permutations = permutations[permutations[:, 0] != permutations[:, 1]].unsqueeze(0)
    trainer.model.eval()
    logps = trainer.rag.permutation_logps([record], permutations)
    answer_logps = trainer.rag.answer_logps([record], [record["answers"][:1]], permutations)
    (-(logps + answer_logps).logsumexp(-1)).sum().backward()
    exact = {n: p.grad.clone() for role in ROLES for n, p in trainer.roles.named_parameters(role) if "lm_head" in n}
    run_step(trainer)
    assert len(exact) == 4
    for name, parameter in trainer.model.named_parameters():
        if name in exact:
            error = (parameter.grad - exact[name]).norm() / exact[name].norm()
            assert exact[name].norm() > 0 and error < (0.05 if "generator" in name else 0.3), name

    trainer = make(max_steps=2, save_strategy="steps", save_steps=1)
    base = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_" not in n}
    trainer.train()
    assert all(torch.equal(p, base[n]) for n, p in trainer.model.named_parameters() if n in base)
    resumed = make(max_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    expected = weights_of(trainer)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights_of(resumed).items())


# Memory


def test_memory_that_runs_out_in_the_m_step_is_met_with_the_sizes_at_hand(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    answer_logps = trainer.rag.answer_logps

    def out_of_memory(*args, **kwargs):
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation.")
        return answer_logps(*args, **kwargs)

    trainer.rag.answer_logps = out_of_memory
    with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory. Tried to allocate 2.00 GiB. ") as error:
        trainer.train()
    message = one_line(error)
    for part in ("2 questions", "4 candidates", "4 permutations of 2", "per_device_train_batch_size", "in 4 bits"):
        assert part in message


def limit_rows(trainer, most):
    """Lets memory run out in forwards without gradients that have more than `most` rows."""
    forward = trainer.roles.forward
    sizes = []

    def limited(role, wrapped=None, **inputs):
        rows = len(inputs["input_ids"])
        if not torch.is_grad_enabled():
            if rows > most:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            sizes.append(rows)
        return forward(role, wrapped, **inputs)

    trainer.roles.forward = limited
    return sizes


def test_an_e_step_that_does_not_fit_is_halved_until_it_does_and_gives_the_same(tmp_path):
    settings = {"per_device_train_batch_size": 8, "steps_per_estimation": 2, "maximization_epochs": 2}
    whole, halved = (make_trainer(tmp_path, **settings) for _ in range(2))
    sizes = limit_rows(halved, 8)  # two questions of four permutations
    estimates = []
    for trainer in (whole, halved):
        micro_batch = next(iter(trainer.get_train_dataloader()))
        estimate = trainer._estimate(micro_batch.block[0], micro_batch.block_index)
        estimates.append(estimate)
    assert torch.equal(estimates[0].samples.permutations, estimates[1].samples.permutations)
    torch.testing.assert_close(estimates[0].samples.logps, estimates[1].samples.logps, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(estimates[0].answer_logps, estimates[1].answer_logps, atol=1e-4, rtol=1e-5)
    assert whole.rag.max_tokens is None
    budget = halved.rag.max_tokens
    assert budget > 0 and max(sizes) <= 8
    halved._estimate(micro_batch.block[0], micro_batch.block_index)
    assert halved.rag.max_tokens == budget  # found once
    halved.train()
    assert halved.state.global_step == 4 and halved.rag.max_tokens == budget


def test_an_e_step_that_does_not_fit_row_by_row_is_met_with_advice(tmp_path):
    trainer = make_trainer(tmp_path)
    limit_rows(trainer, 0)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory. A micro-batch of 2 questions") as error:
        trainer.train()
    assert "lower max_document_length" in one_line(error)


def test_an_evaluation_that_does_not_fit_row_by_row_is_met_with_advice(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=make_dataset(2))
    limit_rows(trainer, 0)
    with pytest.raises(torch.OutOfMemoryError, match="max_document_length") as error:
        trainer.evaluate()
    one_line(error)


def test_a_finished_run_is_whole(finished_run):
    assert [find_damage(path) for path in find_checkpoints(finished_run)] == [None, None]
