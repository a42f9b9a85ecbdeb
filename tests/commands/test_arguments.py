# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import pytest

from trl_dro.commands.arguments import AnswerArguments, LaunchArguments, QuestionArguments


def test_only_what_is_set_changes_how_a_system_answers():
    assert AnswerArguments(model="m").changes() == {}
    assert AnswerArguments(model="m", min_gain=0.0).changes() == {"min_gain": 0.0}
    asked = QuestionArguments(model="m", answer_permutations=3, max_candidates=7)
    assert asked.changes("max_candidates") == {"answer_permutations": 3, "max_candidates": 7}


def test_no_process_cannot_be_asked_for():
    with pytest.raises(ValueError, match="--num_processes 0: it must be at least 1"):
        LaunchArguments(num_processes=0)
