# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import json
from types import SimpleNamespace

import pytest

from trl_dro.system.rag_config import CONFIG_FILE
from trl_dro.trainer.log_history import LOG_FILE, LogHistory, permutation_files, read_lines, read_log_history

from ..test_faults import make_trainer
from .test_dro_trainer import make_dataset


EVALUATED = make_dataset(2)


def losses(folder):
    return [(line["step"], line["loss"]) for line in read_log_history(folder) if "loss" in line]


def steps_evaluated(folder):
    return [line["step"] for line in read_log_history(folder) if "eval_em" in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of four updates, with checkpoints, evaluated before and after."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = make_trainer(folder, eval_dataset=EVALUATED, save_strategy="steps", save_steps=2, max_answer_length=4)
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    return folder


def test_what_is_logged_before_in_and_after_training_is_kept(whole):
    assert steps_evaluated(whole) == [0, 4]
    assert [step for step, _ in losses(whole)] == [1, 2, 3, 4]
    assert {"elbo", "iwae_bound", "ess", "selector/loss", "generator/loss"} <= read_log_history(whole)[1].keys()


def test_a_few_questions_are_kept_at_every_log(whole):
    files = permutation_files(whole)
    assert [step for _, step in files] == [1, 2, 3, 4]
    for path, step in files:
        rows = read_lines(path)
        assert len(rows) == 2 * 4 and {row["step"] for row in rows} == {step}
        assert sum(row["weight"] for row in rows[:4]) == pytest.approx(1)


def test_no_more_than_four_questions_are_kept_unless_they_are_asked_for(tmp_path):
    for log_permutations, kept in ((False, 4), (True, 6)):
        settings = {"per_device_train_batch_size": 6, "max_steps": 1, "log_permutations": log_permutations}
        make_trainer(tmp_path / str(kept), **settings).train()
        [(path, _)] = permutation_files(tmp_path / str(kept))
        assert len(read_lines(path)) == kept * 4


def test_a_resumed_run_has_the_lines_of_an_uninterrupted_one(whole, tmp_path):
    settings = {"eval_dataset": EVALUATED, "save_strategy": "steps", "save_steps": 2, "max_answer_length": 4}
    first = make_trainer(tmp_path, **settings)
    first.evaluate()
    first.train()  # to the end; what is after the checkpoint is lost, as by a kill
    with open(tmp_path / LOG_FILE, "a", encoding="utf-8") as file:
        file.write('{"loss": 1.0, "st')
    again = make_trainer(tmp_path, **settings)
    again.evaluate()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    again.evaluate()
    assert losses(tmp_path) == losses(whole)
    assert steps_evaluated(tmp_path) == [0, 4]
    assert [step for _, step in permutation_files(tmp_path)] == [1, 2, 3, 4]


def test_a_damaged_history_does_not_keep_a_run_from_resuming(whole, tmp_path):
    (tmp_path / LOG_FILE).write_text("damaged\n")
    trainer = make_trainer(tmp_path, max_steps=4)
    trainer.train(resume_from_checkpoint=str(whole / "checkpoint-2"))
    assert losses(tmp_path) == losses(whole)


def test_a_new_run_replaces_the_history_of_an_older_one(tmp_path):
    make_trainer(tmp_path, max_steps=3).train()
    make_trainer(tmp_path, max_steps=1).train()
    assert [step for step, _ in losses(tmp_path)] == [1]
    assert [step for _, step in permutation_files(tmp_path)] == [1]


def test_the_same_weights_evaluated_again_are_one_line(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=EVALUATED, max_steps=1, max_answer_length=4)
    trainer.train()
    trainer.evaluate()
    trainer.evaluate()
    assert steps_evaluated(tmp_path) == [1]


def test_evaluating_alone_leaves_no_trace(tmp_path):
    make_trainer(tmp_path, eval_dataset=EVALUATED, max_answer_length=4).evaluate()
    assert not (tmp_path / LOG_FILE).exists()


def test_only_the_first_process_writes(tmp_path):
    history = LogHistory()
    args = SimpleNamespace(output_dir=str(tmp_path))
    state = SimpleNamespace(is_world_process_zero=False, log_history=[{"loss": 1.0, "step": 1}], global_step=0)
    history.on_train_begin(args, state, None)
    history.on_log(args, state, None)
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_the_file_is_read_from_its_newest_checkpoint(tmp_path):
    for step in (2, 10):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": [{"loss": 1.0, "step": step}]}))
    assert losses(tmp_path) == [(10, 1.0)]
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("{")
    with pytest.raises(ValueError, match="checkpoint-10/trainer_state.json is damaged .* remove that checkpoint"):
        read_log_history(tmp_path)


def test_folders_that_tell_nothing_are_refused_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match="there is no folder .*/absent: name the output_dir"):
        read_log_history(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"is not a training run: it has no log_history\.jsonl, no checkpoint"):
        read_log_history(tmp_path)
    (tmp_path / CONFIG_FILE).write_text("{}")
    with pytest.raises(ValueError, match="has no logs yet: the first comes after `logging_steps` updates"):
        read_log_history(tmp_path)
    (tmp_path / LOG_FILE).write_text("")
    with pytest.raises(ValueError, match="has no logs yet"):
        read_log_history(tmp_path)


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1.0}', '{"step": "1"}', "\xff"])
def test_a_damaged_line_is_named_and_one_that_was_cut_off_left_out(tmp_path, line):
    path = tmp_path / LOG_FILE
    path.write_bytes(b'{"step": 1}\n' + line.encode("latin-1"))
    assert read_lines(path) == [{"step": 1}]
    path.write_bytes(b'{"step": 1}\n' + line.encode("latin-1") + b'\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"log_history\.jsonl, line 2, is damaged .*: delete or mend the line"):
        read_lines(path)
