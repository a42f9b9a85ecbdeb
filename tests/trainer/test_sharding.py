# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Sums over processes are precise. See `tests/distributed/test_sharding.py` for what FSDP2 computes."""

from types import SimpleNamespace

import torch

from trl_dro.trainer.sharding import FSDP2


def test_sums_over_processes_are_of_float32_under_bfloat16():
    policy = torch.distributed.fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    plugin = SimpleNamespace(mixed_precision_policy=policy)
    fake = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), gradient_state=SimpleNamespace(plugin_kwargs={}), prepare=None
    )
    engine = FSDP2(fake, roles=None)
    assert engine.lockstep and engine.plugin.mixed_precision_policy.reduce_dtype == torch.float32
    assert fake.gradient_state.plugin_kwargs == {"sync_each_batch": True}
