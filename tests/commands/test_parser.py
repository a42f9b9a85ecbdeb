# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
from dataclasses import dataclass, field

import pytest
from trl import ModelConfig

from trl_dro import DROConfig
from trl_dro.commands.arguments import LaunchArguments
from trl_dro.commands.parser import Parser


@dataclass
class Settings:
    """Some settings."""

    size: int = field(default=3, metadata={"help": "How many."})
    rate: float | None = field(default=None, metadata={"help": "How fast."})
    names: list[str] = field(default_factory=list, metadata={"help": "Which."})

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"--size {self.size}: it must be at least 1")


def parse(*arguments):
    [settings] = Parser((Settings,), prog="program").parse_args_and_config(list(map(str, arguments)))
    return settings


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as info:
        parse(*arguments)
    message = capsys.readouterr().err
    assert info.value.code == 2 and message.startswith("program: ") and message.count("\n") == 1
    return message


@pytest.fixture
def config(tmp_path):
    def write(text):
        (tmp_path / "settings.yaml").write_text(text)
        return tmp_path / "settings.yaml"

    return write


def test_flags_override_the_file(config):
    path = config("size: 5\nrate: 1e-4\nnames: [a, b]\n")
    assert parse("--config", path) == Settings(5, 1e-4, ["a", "b"])
    assert parse(f"--config={path}", "--size", 7).size == 7


@dataclass
class Needed:
    """What must be given, and what need not."""

    run: str = field(metadata={"help": "Which."})
    size: int = field(default=3, metadata={"help": "How many."})


def test_a_first_word_needs_no_name(capsys):
    parser = Parser((Needed,), "run", prog="program")
    for arguments in (["folder", "--size", "4"], ["--size", "4", "--run", "folder"]):
        assert parser.parse_args_and_config(arguments) == (Needed("folder", 4),)
    assert parser.format_help().startswith("usage: program RUN [--config FILE.yaml] [--SETTING VALUE …]\n")
    assert "'3' belongs to no setting" in refused(capsys, "3")  # Settings have no first word


def test_one_value_in_the_file_stands_for_a_list_of_one(config):
    assert parse("--config", config("names: a\n")).names == ["a"]


@pytest.mark.parametrize(
    "text, parts",
    [
        ("siez: 5\n", ["'siez'", "did you mean size?"]),
        ("entirely_different: 5\n", ["'entirely_different'", "see program --help"]),
        ("size: 2.5\n", ["--size", "invalid int value: '2.5'"]),
        ("size: [1, 2]\n", ["--size", "invalid int value"]),
        ("rate: fast\n", ["--rate", "invalid float value: 'fast'"]),
        ("size: 0\n", ["--size 0: it must be at least 1"]),
        ("size: 5\n  rate: 3\n", ["settings.yaml, line 2", "is no YAML"]),
        ("- size\n", ["settings.yaml", "holds a list, not settings"]),
    ],
)
def test_mistakes_in_the_file_are_told_in_one_line(config, capsys, text, parts):
    message = refused(capsys, "--config", config(text))
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--config", "absent.yaml"], ["absent.yaml"]),
        (["--config"], ["--config FILE.yaml"]),
        (["settings.yaml"], ["'settings.yaml' belongs to no setting", "--config"]),
        (["--siz", 3], ["no setting --siz;", "did you mean --size?"]),
        (["--siez=3"], ["no setting --siez;", "did you mean --size?"]),
        (["--size", "many"], ["invalid int value: 'many'"]),
        (["--size", 0], ["--size 0: it must be at least 1"]),
    ],
)
def test_mistakes_on_the_command_line_are_told_in_one_line(capsys, arguments, parts):
    message = refused(capsys, *arguments)
    assert all(part in message for part in parts), message


def test_help_has_our_settings_in_their_groups_before_what_is_inherited():
    shown = Parser((LaunchArguments, DROConfig, ModelConfig), prog="program").format_help(everything=True)
    places = [
        shown.index(text)
        for text in (
            *("In how many processes", "--accelerate_config"),
            *("Parameters that control the prompts:", "--max_candidates"),
            *("Parameters that control the E-step:", "--num_permutations"),
            *("Parameters that control the M-step:", "--selector_estimator"),
            *("Optimizer:", "--adam_beta1"),
            *("Configuration class for the models:", "--lora_r "),
        )
    ]
    assert places == sorted(places)


def test_help_leaves_out_what_is_inherited_and_help_all_tells_it(capsys):
    parser = Parser((LaunchArguments, DROConfig, ModelConfig), prog="program")
    shown = parser.format_help()
    assert "--num_permutations" in shown and "(all: --help-all)" in shown and "--model_name_or_path" in shown
    assert "--adam_beta1" not in shown and "--lora_r " not in shown
    with pytest.raises(SystemExit) as info:
        parser.parse_args_and_config(["--help-all"])
    assert info.value.code == 0 and capsys.readouterr().out == parser.format_help(everything=True)
    assert "--help-all" not in Parser((Settings,), prog="program").format_help()  # nothing is left out
