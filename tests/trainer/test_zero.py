# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Models are whole while they are loaded. See `tests/distributed/test_zero.py` for what ZeRO computes."""

import pytest
from accelerate.utils import DeepSpeedPlugin
from transformers.integrations import is_deepspeed_zero3_enabled

from trl_dro.trainer.zero import load_whole


def test_zero3_of_the_launcher_does_not_spread_weights_while_they_are_loaded(monkeypatch):
    # Without it a config is left half made, which every later load in this process would stumble over.
    pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install -c constraints.txt -e '.[deepspeed]'")
    for name, value in {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}.items():
        monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    plugin.set_deepspeed_weakref()
    assert is_deepspeed_zero3_enabled()  # by which from_pretrained goes
    load_whole()
    assert not is_deepspeed_zero3_enabled()
