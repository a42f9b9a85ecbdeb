# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import contextlib
import io
import json
import math

import pytest
import torch
from trl import TrlParser

from trl_dro import DROConfig
from trl_dro.model.prompts import GENERATOR_TEMPLATE, SELECTOR_TEMPLATE


def make_config(tmp_path, **settings):
    return DROConfig(**{"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"} | settings)


IMPOSSIBLE = [
    ({"num_selected": 0}, "num_selected=0: it must be at least 1"),
    ({"num_permutations": 0}, "num_permutations=0: it must be at least 1"),
    ({"max_answer_length": 0}, "max_answer_length=0: it must be at least 1"),
    ({"answer_permutations": 0}, "answer_permutations=0: it must be at least 1"),
    ({"maximization_epochs": 0}, "maximization_epochs=0: it must be at least 1"),
    ({"max_candidates": 4}, r"max_candidates=4: it must be at least 5 \(num_selected\)"),
    ({"temperature": 0.0}, "temperature=0.0: it must be above 0"),
    ({"temperature": float("nan")}, "temperature=nan: it must be a finite number"),
    ({"weight_temperature": -1.0}, "weight_temperature=-1.0: it must be above 0"),
    ({"max_prompt_length": 0}, "max_prompt_length=0: it must be at least 1"),
    ({"max_document_length": 0}, "max_document_length=0: it must be at least 1"),
    ({"tiny_likelihood": 0.0}, "tiny_likelihood=0.0: it must lie between 0 and 1"),
    ({"generator_template": "{question.foo} {documents}"}, "AttributeError"),
    ({"generator_template": "{question[x]} {documents}"}, "TypeError"),
    ({"top_p": 0.0}, "top_p=0.0: it must lie above 0"),
    ({"top_p": 1.1}, "top_p=1.1: it must lie above 0 and not above 1"),
    ({"steps_per_estimation": 0}, "steps_per_estimation=0: it must be at least 1, or -1"),
    ({"steps_per_estimation": -2}, "steps_per_estimation=-2"),
    ({"answer_likelihood": "max"}, "answer_likelihood='max': choose one of sum, mean"),
    ({"answer_target": "last"}, "answer_target='last': choose one of first, random, all"),
    ({"selector_estimator": "reinforce"}, "selector_estimator='reinforce': choose one of rws, rws_centered, vimco"),
    ({"selector_likelihood": "free"}, "selector_likelihood='free': choose one of constrained, full_vocabulary"),
    ({"sampling": "unlike"}, "sampling='unlike': choose one of independent, distinct"),
    ({"min_selected": 6}, "min_selected=6: it must lie between 0 and num_selected=5"),
    ({"document_cost": -0.1}, "document_cost=-0.1: it must be a finite number of at least 0"),
    ({"retriever_prior": -0.5}, "retriever_prior=-0.5: it must be a finite number of at least 0"),
    ({"retriever_prior": math.inf}, "retriever_prior=inf: it must be a finite number"),
    ({"query_likelihood_scale": -0.1}, "query_likelihood_scale=-0.1: it must be a finite number of at least 0"),
    ({"selector_form": "list"}, "selector_form='list': choose one of permutation, query_likelihood"),
    ({"retriever_prior_from": "order"}, "retriever_prior_from='order': choose one of rank, score"),
    ({"selector_template": "{question}"}, "does not show the documents"),
    ({"generator_template": "{documents} {answer} {question}"}, "'answer'.*its fields are"),
]


@pytest.mark.parametrize("settings, message", IMPOSSIBLE, ids=[str(settings) for settings, _ in IMPOSSIBLE])
def test_an_impossible_setting_is_one_line_that_names_it(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        make_config(tmp_path, **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_candidates": 5},
        {"steps_per_estimation": -1},
        {"selector_estimator": "vimco", "num_permutations": 2},
        {"selector_estimator": "rws_centered", "temperature": 0.7, "top_p": 0.9},
        {"selector_likelihood": "full_vocabulary", "selector_estimator": "rws", "temperature": 0.7},
        {"train_selector": False, "num_permutations": 1},
        {"answer_target": "random", "answer_likelihood": "mean"},
    ],
)
def test_what_is_possible_is_let_through(tmp_path, settings):
    args = make_config(tmp_path, **settings)
    assert all(getattr(args, name) == value for name, value in settings.items())


def test_defaults_are_the_papers(tmp_path):
    args = make_config(tmp_path)
    paper = {
        "num_permutations": 8,
        "num_selected": 5,
        "max_candidates": 20,
        "learning_rate": 1e-5,
        "weight_decay": 0.01,
        "num_train_epochs": 5,
        "temperature": 1.0,
        "top_p": 1.0,
        "weight_temperature": 1.0,
        "answer_likelihood": "sum",
        "answer_target": "first",
        "train_selector": True,
        "train_generator": True,
    }
    assert {name: getattr(args, name) for name in paper} == paper
    # Measured to be better, see docs/how_it_works.md.
    assert (args.selector_estimator, args.steps_per_estimation) == ("rws_centered", 1)
    assert (args.selector_template, args.generator_template) == (SELECTOR_TEMPLATE, GENERATOR_TEMPLATE)


def test_bf16_is_off_without_an_accelerator_and_as_asked_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert make_config(tmp_path).bf16 is False
    assert make_config(tmp_path, bf16=True).bf16 is True


def test_every_setting_has_help_that_can_be_shown():
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as stop:
        TrlParser(DROConfig).parse_args_and_config(["--help"])
    assert stop.value.code == 0
    own = set(DROConfig.__dataclass_fields__) - set(DROConfig.__mro__[1].__dataclass_fields__)
    assert len(own) > 20
    for name in own:
        assert DROConfig.__dataclass_fields__[name].metadata["help"].strip()
        assert f"--{name}" in shown.getvalue()
        assert f"\n        {name} (`" in DROConfig.__doc__  # documented too


def test_settings_come_from_yaml_and_flags_win(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"output_dir: {tmp_path}\n"
        "use_cpu: true\n"
        "num_permutations: 4\n"
        "temperature: 0.7\n"
        "steps_per_estimation: -1\n"
        "selector_learning_rate: 3.0e-5\n"
        "train_generator: false\n"
        "max_prompt_length: 512\n"
        "chat_template_kwargs:\n  enable_thinking: false\n"
        'selector_template: "{documents}\\nQ: {question}\\n"\n'
    )
    arguments = ["--config", str(recipe), "--num_permutations", "6", "--model_init_kwargs", '{"revision": "x"}']
    [args] = TrlParser(DROConfig).parse_args_and_config(arguments)
    assert args.num_permutations == 6 and args.temperature == 0.7 and args.steps_per_estimation == -1
    assert args.selector_learning_rate == 3e-5 and args.train_generator is False and args.max_prompt_length == 512
    assert args.chat_template_kwargs == {"enable_thinking": False} and args.model_init_kwargs == {"revision": "x"}
    assert args.selector_template == "{documents}\nQ: {question}\n"


def test_flags_refuse_values_outside_the_choices():
    with contextlib.redirect_stderr(io.StringIO()), pytest.raises(SystemExit):
        TrlParser(DROConfig).parse_args_and_config(["--output_dir", "x", "--selector_estimator", "reinforce"])


def own_template(question, documents, **_):
    return f"{documents} {question}"


def test_a_template_can_be_a_function_that_is_saved_and_shown(tmp_path):
    args = make_config(tmp_path, selector_template=own_template)
    torch.save(args, tmp_path / "training_args.bin")
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).selector_template is own_template
    assert json.loads(args.to_json_string())["selector_template"] == "own_template"


def test_a_function_that_cannot_be_saved_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="selector_template is a function that cannot be saved"):
        make_config(tmp_path, selector_template=lambda question, documents, **_: question)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"likelihood_floor": -1e-9}, "likelihood_floor=-1e-09: it must be at least 0 and below 1"),
        ({"likelihood_floor": 1.0}, "likelihood_floor=1.0: it must be at least 0 and below 1"),
        ({"likelihood_floor": float("nan")}, "likelihood_floor=nan: it must be a finite number"),
        ({"max_skipped_updates": 0}, "max_skipped_updates=0: it must be at least 1"),
    ],
)
def test_an_impossible_safeguard_is_one_line_that_names_it(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        make_config(tmp_path, **settings)
    assert "\n" not in str(error.value)


def test_safeguards_that_change_the_gradient_are_off_by_default(tmp_path):
    args = make_config(tmp_path)
    assert args.likelihood_floor == 0 and args.max_skipped_updates == 10
    args = make_config(tmp_path, likelihood_floor=1e-9, max_skipped_updates=1)
    assert args.likelihood_floor == 1e-9 and args.max_skipped_updates == 1
