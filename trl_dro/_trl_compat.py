# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Every name that TRL does not export publicly, imported in this one place."""

from trl.models.utils import add_hooks, remove_hooks
from trl.trainer.base_config import _BaseConfig
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.utils import create_model_from_path, disable_dropout_in_model, get_config_model_id


__all__ = [
    "_BaseConfig",
    "_BaseTrainer",
    "add_hooks",
    "create_model_from_path",
    "disable_dropout_in_model",
    "get_config_model_id",
    "remove_hooks",
]
