# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""trl's private names can move with any release: each is checked for what we use of it."""

import inspect
from dataclasses import is_dataclass
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainingArguments

from trl_dro import _trl_compat

from .tiny_models import tiny_llama, word_level_tokenizer


@pytest.mark.parametrize("name", _trl_compat.__all__)
def test_every_private_name_exists(name):
    assert callable(getattr(_trl_compat, name))


def test_base_config_is_a_dataclass_of_training_arguments():
    assert is_dataclass(_trl_compat._BaseConfig) and issubclass(_trl_compat._BaseConfig, TrainingArguments)
    assert isinstance(_trl_compat._BaseConfig._VALID_DICT_FIELDS, list)


def test_base_trainer_is_a_trainer_with_the_attributes_we_set():
    assert issubclass(_trl_compat._BaseTrainer, Trainer)
    for attribute in ("_tag_names", "_name", "_paper", "loss_is_scaled_for_ga"):
        assert hasattr(_trl_compat._BaseTrainer, attribute)


@pytest.mark.parametrize(
    "method, parameters",
    [
        ("training_step", ["self", "model", "inputs", "num_items_in_batch"]),
        ("create_optimizer", ["self", "model"]),
        ("evaluation_loop", None),
        ("log", ["self", "logs", "start_time"]),
        ("_clip_grad_norm", ["self", "model"]),
        ("_get_grad_norm", ["self", "model", "grad_norm"]),
        ("_save", ["self", "output_dir", "state_dict"]),
        ("_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"]),
        ("_load_best_model", ["self"]),
    ],
)
def test_overridden_trainer_methods_still_have_their_signature(method, parameters):
    from trl_dro import DROTrainer

    ours, theirs = getattr(DROTrainer, method), getattr(Trainer, method)
    assert ours is not theirs
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)
    assert parameters is None or list(inspect.signature(theirs).parameters) == parameters


def test_model_is_created_from_a_folder_in_the_precision_asked_for(tmp_path):
    tiny_llama(word_level_tokenizer()).save_pretrained(tmp_path)
    model = _trl_compat.create_model_from_path(str(tmp_path), dtype="bfloat16", device_map=None)
    assert model.dtype == torch.bfloat16
    assert _trl_compat.get_config_model_id(model.config) == str(tmp_path)
    assert not _trl_compat.get_config_model_id(SimpleNamespace())


def test_dropout_is_disabled_in_every_module():
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Sequential(torch.nn.Dropout(0.1)))
    _trl_compat.disable_dropout_in_model(model)
    assert [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)] == [0, 0]
