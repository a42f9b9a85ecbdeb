# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""A short version of `kills.py`: every resumable command, killed twice, then twice at once."""

import random

import pytest

from .kills import COMMANDS, RESULTS, kill_and_compare, make_data, two_at_once


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    make_data(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(COMMANDS, "warmup", f"{COMMANDS['warmup']} --max_steps 2")  # of either role
        yield folder


@pytest.mark.parametrize("command", ["warmup", *sorted(RESULTS.keys() - {"warmup"})])  # whose system the others ask
def test_a_killed_command_ends_as_an_undisturbed_one_and_two_never_mix(folder, command):
    counts = kill_and_compare(command, folder, kills=2, draw=random.Random(1))
    assert counts["kills"] == 2 and counts["equal"] == counts["folders"]
    assert two_at_once(command, folder) in ("one is refused", "one waits")
