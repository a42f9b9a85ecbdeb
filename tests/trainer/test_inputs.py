# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, set_seed

from trl_dro import DROConfig, DROTrainer
from trl_dro.data import DatasetError, build_dataset, validate_dataset
from trl_dro.trainer.inputs import disable_dropout, fit_answers, refuse_unsupported

from ..model.families import family_config
from ..tiny_models import bpe_tokenizer, tiny_llama, word_level_tokenizer
from .test_dro_trainer import gradients, make_dataset, relative_error, run_step


TOKENIZER = bpe_tokenizer(split_digits=False)
# Rates that no module of dropout has: attributes of layers, attention and routers, or of the config.
NOISY = {
    "opt": {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5},
    "xglm": {"dropout": 0.5, "attention_dropout": 0.5},
    "biogpt": {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5},
    "gpt_bigcode": {"attn_pdrop": 0.5, "resid_pdrop": 0.5},
    "seed_oss": {"residual_dropout": 0.5},
    "mixtral": {"router_jitter_noise": 0.5},
    "llama": {"attention_dropout": 0.5},
}


@pytest.mark.parametrize("family", NOISY)
def test_no_noise_is_left_in_training_mode(family):
    set_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(family, 100, **NOISY[family])).train()
    ids = torch.tensor([[*range(10, 40)]])
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)


def make_trainer(tmp_path, model, peft=True, **settings):
    settings = {
        "output_dir": str(tmp_path / "run"),
        **{"num_selected": 2, "max_candidates": 4, "num_permutations": 4, "per_device_train_batch_size": 2},
        **{"save_strategy": "no", "bf16": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True},
        **{"logging_steps": 1, "max_steps": 1, "gradient_checkpointing": False},
    } | settings
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    return DROTrainer(
        model, DROConfig(**settings), make_dataset(), processing_class=TOKENIZER, peft_config=lora if peft else None
    )


def step_gradients(trainer):
    run_step(trainer)
    return [gradients(trainer, role) for role in ("selector", "generator")]


def test_a_base_with_its_own_checkpointing_has_the_same_gradients(tmp_path):
    checkpointed = tiny_llama(TOKENIZER)
    checkpointed.gradient_checkpointing_enable()
    plain = step_gradients(make_trainer(tmp_path, tiny_llama(TOKENIZER)))
    for actual, expected in zip(step_gradients(make_trainer(tmp_path, checkpointed)), plain, strict=True):
        assert relative_error(actual, expected) < 1e-4


def test_a_step_with_rows_of_their_own_has_the_same_gradients(tmp_path):
    shared = step_gradients(make_trainer(tmp_path, tiny_llama(TOKENIZER)))
    separate = step_gradients(make_trainer(tmp_path, tiny_llama(TOKENIZER), shared_prefix="never"))
    for actual, expected in zip(separate, shared, strict=True):
        assert relative_error(actual, expected) < 1e-4


def test_a_family_that_cannot_share_trains_and_evaluates(tmp_path):
    set_seed(0)
    model = AutoModelForCausalLM.from_config(family_config("rwkv", len(TOKENIZER)))
    with pytest.warns(UserWarning, match="a row of its own"):
        trainer = make_trainer(tmp_path, model, peft=False)
    trainer.train()
    assert trainer.evaluate(make_dataset(2))["eval_loss"] > 0


def test_a_role_with_a_loss_and_no_gradient_is_an_error(tmp_path):
    trainer = make_trainer(tmp_path, tiny_llama(TOKENIZER))
    for _, parameter in trainer.roles.named_parameters("generator"):
        parameter.register_hook(torch.zeros_like)
    with pytest.raises(RuntimeError, match="update 1: the generator has a loss and no gradient"):
        trainer.train()


def test_flash_attention_is_refused_unless_no_prompt_is_shared(tmp_path):
    settings = {"output_dir": str(tmp_path), "model_init_kwargs": {"attn_implementation": "flash_attention_2"}}
    with pytest.raises(ValueError, match="shared_prefix='never'"):
        refuse_unsupported(DROConfig(**settings, use_cpu=True, bf16=False))
    refuse_unsupported(DROConfig(**settings, use_cpu=True, bf16=False, shared_prefix="never"))


def answers_of(dataset):
    return [row["answers"] for row in dataset]


LONG = "Anna Brown was born in Paris"
# Targets, with word_level_tokenizer: a word, a token.
ANSWERS = [["Anna", LONG], [LONG, "Anna"], ["Anna Brown"], [LONG]]


def fit(long_answers, all_answers=False, answers=ANSWERS, most=3):
    records = [
        {"id": str(row), "question": "who?", "answers": each, "documents": [{"text": "a"}]}
        for row, each in enumerate(answers)
    ]
    return fit_answers(build_dataset(records), "data", word_level_tokenizer(), most, long_answers, all_answers)


def test_long_answers_are_left_out_with_their_questions(caplog):
    dataset = fit("drop")
    assert dataset["id"][:] == ["0", "2"] and answers_of(dataset) == [ANSWERS[0], ANSWERS[2]]
    said = "questions, answers of over max_answer_length=3 tokens were left out"
    assert f"data: of 2 of 4 {said}, 2 of them with the question" in caplog.text
    dataset = fit("drop", all_answers=True)  # where another alias is a target, the question stays
    assert dataset["id"][:] == ["0", "1", "2"] and answers_of(dataset) == [["Anna"], ["Anna"], ["Anna Brown"]]
    assert f"data: of 3 of 4 {said}, 1 of them with the question" in caplog.text


def test_long_answers_are_cut_after_a_word(caplog):
    cut = "Anna Brown was"
    dataset = fit("truncate")
    assert answers_of(dataset) == [ANSWERS[0], [cut, "Anna"], ["Anna Brown"], [cut]]
    assert "of 2 of 4 questions" in caplog.text and "were cut" in caplog.text
    assert answers_of(fit("truncate", all_answers=True))[0] == ["Anna", cut]
    validate_dataset(dataset, 1)
    records = [{"question": "who?", "answers": ["a" * 500 + " b"], "documents": [{"text": "a"}]}]
    [[answer]] = answers_of(fit_answers(build_dataset(records), "data", TOKENIZER, 3, "truncate"))
    assert 1 <= len(TOKENIZER(answer, add_special_tokens=False).input_ids) <= 3 and set(answer) == {"a"}


def test_short_answers_are_left_alone(caplog):
    short = [["Anna", LONG], ["Anna Brown"]]
    for long_answers in ("error", "drop", "truncate"):
        assert answers_of(fit(long_answers, answers=short)) == short
    assert answers_of(fit("error")) == ANSWERS and not caplog.text  # an error of the check that follows
    with pytest.raises(DatasetError, match="data: no answer has as few tokens as max_answer_length=3; raise it"):
        fit("drop", answers=[[LONG]])
