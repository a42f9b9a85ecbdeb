# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import pytest

from trl_dro.commands.cli import COMMANDS, make_parser, module_name
from trl_dro.commands.source import Source, UnreadableError, read


def settings(parser):
    """Everything that a parser knows of its settings; enumerations and other types by their names."""

    def plain(value):
        return value.value if hasattr(value, "value") else value

    return [
        {
            "flags": action.option_strings,
            "type": getattr(action.type, "__name__", None),
            "choices": None if action.choices is None else list(map(plain, action.choices)),
            "default": plain(action.default),
            **{name: getattr(action, name) for name in ("dest", "nargs", "const", "required", "help", "metavar")},
        }
        for action in parser._actions
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_settings_read_from_source_are_those_of_the_real_parser(name):
    by_source, real = make_parser(name, read(module_name(name))), make_parser(name)
    assert settings(by_source) == settings(real)
    assert by_source.format_help(everything=True) == real.format_help(everything=True)
    assert by_source.format_help() == real.format_help()


def write(tmp_path, monkeypatch, text):
    (tmp_path / "some.py").write_text(text)
    monkeypatch.setattr("trl_dro.commands.source.source_path", lambda module: tmp_path / "some.py")
    return Source("trl_dro.some")


def test_what_depends_on_a_condition_is_decided_by_it(tmp_path, monkeypatch):
    names = write(tmp_path, monkeypatch, "if 1 > 2:\n    size = 3\nelse:\n    size = 4\ndouble = 2 * size\n")
    assert names["double"] == 8


@pytest.mark.parametrize(
    "text, message",
    [
        ("name = 1\nname = 2\n", "defines name in 2 places"),
        ("class name:\n    if True:\n        size: int = 3\n", "fields under a condition"),
        ("class name:\n    for size in [3]:\n        pass\n", "statements of other kinds"),
    ],
)
def test_what_cannot_be_told_from_source_for_certain_is_not(text, message, tmp_path, monkeypatch):
    with pytest.raises(UnreadableError, match=message):
        write(tmp_path, monkeypatch, text)["name"]


def test_other_packages_are_not_read():
    with pytest.raises(UnreadableError, match="torch is not among the packages"):
        read("torch")
