# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig

from trl_dro import DROConfig
from trl_dro.model.rag_model import RAGModel
from trl_dro.trainer.inputs import check_inputs
from trl_dro.trainer.plan import Lengths, Models, _count_steps, make_plan

from ..tiny_models import bpe_tokenizer, tiny_llama
from .test_cost import make_questions


TOKENIZER = bpe_tokenizer(split_digits=False)
MODEL = tiny_llama(TOKENIZER)
MODELS = Models(
    MODEL.config, None, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"), torch.float32, None
)


def config(tmp_path, **settings):
    defaults = {"num_selected": 3, "max_candidates": 8, "num_permutations": 4, "use_cpu": True, "report_to": "none"}
    return DROConfig(str(tmp_path), **(defaults | settings))


def rows(args, num_questions=20, num_processes=1):
    plan = make_plan(MODELS, args, Lengths.of_settings(args), num_questions, 5, num_processes)
    return dict(plan.rows)


def test_counted_lengths_are_those_that_the_trainer_goes_by(tmp_path):
    args, questions = config(tmp_path, max_answer_length=8), make_questions()
    _, codec, prompts = check_inputs(MODEL, None, TOKENIZER, args, questions, None)
    lengths = Lengths.of_data(questions, args, prompts, codec)
    rag = RAGModel(SimpleNamespace(separate=set()), {}, prompts, codec, torch.device("cpu"))
    answer = len(TOKENIZER("Anna Brown").input_ids) + 1
    for record, most in zip(questions.to_list(), rag.question_lengths(questions.to_list(), 1), strict=True):
        selector = len(prompts["selector"](record["question"], record["documents"]))
        assert most == selector + codec.max_length <= lengths.selector_prompt[1] + lengths.permutation
    assert lengths.counted == "counted" and lengths.selector_prompt[0] <= lengths.selector_prompt[1]
    assert lengths.generator_row[1] == answer + max(
        len(prompts["generator"](record["question"], record["documents"][:3])) for record in questions
    )


@pytest.mark.parametrize(
    "settings, num_processes, updates, blocks",
    [
        ({"num_train_epochs": 1, "per_device_train_batch_size": 4}, 1, 5, 5),
        ({"num_train_epochs": 2, "per_device_train_batch_size": 4}, 2, 6, 6),
        ({"num_train_epochs": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 5}, 1, 4, 20),
        ({"num_train_epochs": 3, "per_device_train_batch_size": 4, "steps_per_estimation": -1}, 1, 15, 3),
        ({"max_steps": 7, "per_device_train_batch_size": 4}, 1, 7, 7),
    ],
)
def test_updates_and_e_steps_are_counted(tmp_path, settings, num_processes, updates, blocks):
    shown = rows(config(tmp_path, **settings), num_processes=num_processes)
    assert shown["run"] == f"{updates} updates, {blocks} E-steps"
    assert shown["questions"] == "20 to train on, 5 to evaluate on"


@pytest.mark.parametrize(
    "settings, visits",
    [({"num_train_epochs": 3}, 60), ({"num_train_epochs": 1, "maximization_epochs": 2}, 40), ({"max_steps": 2}, 8)],
)
def test_work_of_a_run_is_that_of_every_visit_to_a_question(tmp_path, settings, visits):
    args = config(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=1, **settings)
    assert _count_steps(args, 20, 1)[2] == visits


def test_questions_that_the_selector_is_fitted_to_cost_an_e_step_each(tmp_path):
    """In every process."""
    scored = {"selector_form": "query_likelihood", "per_device_train_batch_size": 4, "max_steps": 2}

    def work(num_processes=1, **settings):
        args = config(tmp_path, **scored | settings)
        return make_plan(MODELS, args, Lengths.of_settings(args), 20, 5, num_processes).flops

    once = work(selector_fit_questions=5) - work()
    assert 0 < once < 5 / 8 * work()
    assert work(selector_fit_questions=99) - work() == pytest.approx(4 * once)
    assert work(2, selector_fit_questions=5) - work(2) == pytest.approx(2 * once)
    alone = work(selector_fit_questions=5, train_selector=False) - work(train_selector=False)
    assert alone == pytest.approx(once)
    assert "5 questions first" in rows(config(tmp_path, selector_fit_questions=5, **scored))["fit of the selector"]


def test_a_run_of_unknown_length_has_the_work_of_an_update_alone(tmp_path):
    shown = rows(config(tmp_path), num_questions=None)
    assert "work of an update" in shown and not {"run", "questions", "time of the run"} & shown.keys()


def test_what_lowers_memory_lowers_the_estimate(tmp_path):
    def peak(**settings):
        args = config(tmp_path, per_device_train_batch_size=4, **settings)
        return make_plan(MODELS, args, Lengths.of_settings(args), 20, 5, 1).peak

    usual = peak()
    for settings in (
        {"gradient_checkpointing": True},
        {"num_permutations": 2},
        {"max_document_length": 40},
        {"max_candidates": 4},
        {"max_tokens_per_forward": 3000},
        {"train_selector": False},
        {"train_generator": False},
    ):
        lower = {"gradient_checkpointing": False} | settings
        assert peak(**lower) < peak(gradient_checkpointing=False), settings
    assert usual == peak(gradient_checkpointing=True)


def test_rows_that_share_no_prompt_are_counted_each_with_its_own(tmp_path):
    shared, separate = (rows(config(tmp_path, shared_prefix=value)) for value in ("auto", "never"))

    def tokens(shown):
        return int(shown["update"].split(": ")[1].split()[0].replace(",", ""))

    assert tokens(separate) > 2 * tokens(shared)
    assert separate["work of an update"] != shared["work of an update"]


def test_fsdp2_spreads_sixteen_bytes_a_trained_weight_and_gathers_two_of_the_larger_role(tmp_path):
    models = Models(MODEL.config, MODEL.config, None, torch.bfloat16, None)
    args = config(tmp_path, bf16=True)
    count = sum(p.numel() for p in MODEL.parameters())
    plan = make_plan(models, args, Lengths.of_settings(args), 20, 5, 8, "FSDP2")
    spread = sum(plan.memory[name] for name in ("base", "gradients", "optimizer"))
    assert spread == 16 * 2 * count / 8 and plan.memory["gathered for sampling"] == 2 * count
    assert plan.memory["adapters"] == plan.memory["buckets"] == 0
    assert plan.peak < make_plan(models, args, Lengths.of_settings(args), 20, 5, 8).peak
    # One base of both roles: frozen weights stay in bfloat16, and all of them are gathered.
    shared = Models(MODEL.config, None, MODELS.peft_config, torch.bfloat16, None)
    plan = make_plan(shared, args, Lengths.of_settings(args), 20, 5, 2, "FSDP2")
    assert plan.memory["base"] == 2 * count / 2 and plan.memory["optimizer"] == 2 * plan.memory["adapters"]


def test_zero_spreads_what_its_stage_says(tmp_path):
    models = Models(MODEL.config, MODEL.config, None, torch.bfloat16, None)
    args = config(tmp_path, bf16=True)
    count = sum(p.numel() for p in MODEL.parameters())
    plans = [make_plan(models, args, Lengths.of_settings(args), 20, 5, 8, f"ZeRO-{stage}") for stage in (1, 2, 3)]
    weights, trained = 2 * 2 * count, 2 * count
    for stage, plan in enumerate(plans, start=1):
        # Two moments and a float32 copy of each weight; one of the gradients of a role at a time.
        assert plan.memory["optimizer"] == 12 * trained / 8 and plan.memory["buckets"] == 2 * trained
        assert plan.memory["gradients"] == 2 * trained / (8 if stage > 1 else 1) + 4 * count / 8
        assert plan.memory["base"] == (weights / 8 if stage == 3 else weights)
        assert plan.memory.get("autocast copies", 0) == 0
    assert plans[2].memory["gathered for sampling"] == 2 * count
    assert plans[0].peak > plans[1].peak
    # A base of both roles whose weights are not trained is 16 bits wide, and whole but in stage 3.
    shared = Models(MODEL.config, None, MODELS.peft_config, torch.bfloat16, None)
    peaks = [make_plan(shared, args, Lengths.of_settings(args), 20, 5, 8, f"ZeRO-{n}").memory for n in (2, 3)]
    assert peaks[0]["base"] == 2 * count == 8 * peaks[1]["base"]
    assert peaks[0]["optimizer"] == 6 * peaks[0]["adapters"] / 8
