# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Callbacks and trackers that users of TRL know."""

import pytest
from trl import RichProgressCallback

from .test_faults import make_trainer
from .trainer.test_dro_trainer import make_dataset


def test_the_rich_progress_callback_follows_training_and_evaluation(tmp_path, capsys):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    make_trainer(tmp_path, eval_dataset=make_dataset(4), callbacks=[RichProgressCallback()], **settings).train()
    output = capsys.readouterr().out
    assert "Training" in output and "100%" in output and "Step 2" in output


def test_tensorboard_gets_every_metric(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    trainer = make_trainer(tmp_path, eval_dataset=make_dataset(4), report_to="tensorboard", max_steps=2)
    trainer.train()
    trainer.evaluate()
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/selector/loss", "train/generator/loss", "train/ess", "eval/em", "eval/recall@1"} <= tags
    assert [event.step for event in events.Scalars("train/ess")] == [1, 2]
