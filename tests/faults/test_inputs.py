# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""A part of `python -m tests.faults`, quick enough for every run of the tests."""

import itertools

import pytest

from trl_dro.commands import cli
from trl_dro.data.lines import parse_json, read_json_object
from trl_dro.data.schema import DatasetError

from .cases import files, leftovers, lines, systems, yaml_values
from .outcome import outcome
from .world import World


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("faults"))


# What trains or answers before it ends takes seconds.
SAMPLE = [
    *itertools.islice(lines(), 0, None, 9),
    *itertools.islice(files(), 1, None, 6),
    *itertools.islice(yaml_values(), 2, None, 9),
    *itertools.islice((case for case in systems() if case.area.startswith(("rag", "adapter"))), 1, None, 9),
    *(case for case in leftovers() if case.name == "deep"),
]
# Cases of settings whose checks are not complete.
OPEN = ("learning_rate", "temperature")


def test_bad_inputs_end_in_one_line_that_names_what_is_wrong(world):
    wrong = {}
    for case in SAMPLE:
        kind, message = outcome(case, world)
        if kind != "one line" and not any(word in f"{case.area}: {case.name}" for word in OPEN):
            wrong[f"{case.area}: {case.name}"] = (kind, message[:200])
    assert not wrong


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a": ' + "9" * 10_000 + "}", "thousands of digits"),
        ('{"a": "\\ud800"}', "half of a character"),
        ('{"a": \0}', "Expecting value at line 1, character 7"),
    ],
)
def test_json_that_python_cannot_read_is_a_line_of_text(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_json(text)
    assert "\n" not in str(error.value)
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DatasetError, match=r"x\.json: is damaged"):
        read_json_object(tmp_path / "x.json")
    assert parse_json('{"a": "\\ud83d\\ude00 \\\\ud800"}') == {"a": "😀 \\ud800"}


def test_what_no_check_foresaw_ends_in_one_line_and_debug_shows_where(monkeypatch):
    def broken(*_):
        raise KeyError("unheard of")

    monkeypatch.setattr(cli.command_module("env"), "print_environment", broken)
    with pytest.raises(SystemExit) as error:
        cli.run(["env"])
    assert "KeyError: 'unheard of'; --debug shows where" in error.value.code and "\n" not in error.value.code
    with pytest.raises(KeyError):
        cli.run(["env", "--debug"])
