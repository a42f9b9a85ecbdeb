# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Settings from flags and YAML files: TRL's parser, with help in groups and one line for each mistake."""

import dataclasses
import difflib
import inspect
import re
import sys
from argparse import Action
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml
from trl import TrlParser


_SECTION = re.compile(r"^ {4}> (.+)$")
_FIELD = re.compile(r"^ {4}(\w+) ?\(")


@dataclass
class LaunchArguments:
    """
    In how many processes `trl-dro` starts a command.

    Args:
        accelerate_config (`str`, *optional*):
            Config file of `accelerate launch`.
        num_processes (`int`, *optional*):
            Processes, one for each GPU; as many as there are GPUs by default.
    """

    accelerate_config: str | None = field(
        default=None,
        metadata={"help": "Config file of `accelerate launch`, e.g. recipes/accelerate/two_gpus.yaml."},
    )
    num_processes: int | None = field(
        default=None,
        metadata={
            "help": "Processes, one for each GPU; as many as there are GPUs by default. `accelerate launch` has a "
            "setting of its own, and pays no heed to this one."
        },
    )

    def __post_init__(self):
        if self.num_processes is not None and self.num_processes < 1:
            raise ValueError(f"--num_processes {self.num_processes}: it must be at least 1")


class Parser(TrlParser):
    """
    Parses flags and `--config FILE.yaml` into dataclasses. The first setting, where it must be given, may come first
    without its name. A mistake ends the program with exit code 2 and one line, which names the setting that was
    probably meant.

    Args:
        dataclass_types (`Iterable[type]`):
            Dataclasses, whose fields are the settings.
        kwargs:
            Passed to [`~argparse.ArgumentParser`].
    """

    def __init__(self, dataclass_types: Iterable[Any], **kwargs: Any):
        # An abbreviation would mean another setting as soon as one is added.
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self.first = next((each.dest for each in self._actions[1:2] if each.required), None)  # behind --help
        first = "" if self.first is None else f"{self.first.upper()} "
        self.usage = f"{self.prog} {first}[--config FILE.yaml] [--SETTING VALUE …]"
        for action in self._actions:
            if action.type is not None and action.choices is None:
                action.metavar = _type_name(action).upper()

    def parse_args_and_config(self, args=None, *positional, **kwargs):
        """The dataclasses, see [`~trl.TrlParser.parse_args_and_config`]."""
        if args is not None:
            if self.first is not None and args and not args[0].startswith("-"):
                args = [f"--{self.first}", *args]
            args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
            if args[-1:] == ["--config"]:
                self.error("--config needs a file: --config FILE.yaml")
        try:
            return super().parse_args_and_config(args, *positional, **kwargs)
        except yaml.MarkedYAMLError as error:
            mark: Any = error.problem_mark
            self.error(f"{mark.name}, line {mark.line + 1}: is no YAML ({error.problem}): write `setting: value`")
        except (OSError, TypeError, ValueError) as error:
            self.error(one_line(error))

    def parse_known_args(self, args=None, namespace=None):
        """As that of argparse, but nothing may be unknown, which is said before what is missing."""
        known = {option for action in self._actions for option in action.option_strings}
        for each in sys.argv[1:] if args is None else args:
            flag = each.partition("=")[0]
            if flag.startswith("--") and flag not in known:
                name = flag.lstrip("-").replace("-", "_")
                self.error(f"there is no setting {flag}{self._suggestion(name, '--')}")
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"{unknown[0]!r} belongs to no setting; a file of settings is passed with --config")
        return namespace, unknown

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """Settings of a YAML file, checked as those of the command line are."""
        actions = {action.dest: action for action in self._actions}
        for name, value in config.items():
            if name not in actions:
                self.error(f"the config file has {name!r}, which is no setting{self._suggestion(name)}")
            if actions[name].nargs == "+" and not isinstance(value, list):
                config[name] = [value]
            elif value is not None and _type_name(actions[name]) in ("int", "float"):
                config[name] = str(value)  # argparse converts and checks strings only
        return super().set_defaults_with_config(**config)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")

    def format_help(self) -> str:
        """Settings in groups: those of this package first, then what is inherited of transformers."""
        formatter: Any = self.formatter_class(prog=self.prog)
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        actions: dict[str, list[Action]] = {}
        for action in self._actions:
            actions.setdefault(action.dest, []).append(action)
        for title, names in self._sections():
            formatter.start_section(title)
            for name in names:
                formatter.add_arguments(actions[name])
            formatter.end_section()
        return formatter.format_help()

    def _sections(self) -> list[tuple[str, list[str]]]:
        """Titles and fields of the groups, which the docstrings of the dataclasses give."""
        own: list[tuple[str, list[str]]] = []
        inherited: list[tuple[str, list[str]]] = []
        for dataclass_type in self.dataclass_types:
            left = [each.name for each in dataclasses.fields(dataclass_type) if each.init]
            for base in dataclass_type.__mro__:
                for title, documented in _documented_sections(base).items():
                    if names := [name for name in documented if name in left]:
                        (own if base is dataclass_type else inherited).append((title, names))
                        left = [name for name in left if name not in names]
            if left:
                whole = len(left) == sum(each.init for each in dataclasses.fields(dataclass_type))
                title = inspect.cleandoc(dataclass_type.__doc__ or "").partition("\n")[0].rstrip(".")
                (own if whole else inherited).append((title if whole else "Other training arguments", left))
        return own + inherited

    def _suggestion(self, name: str, prefix: str = "") -> str:
        known = [action.dest for action in self._actions] + ["config"]
        close = difflib.get_close_matches(name, known, n=1)
        return f"; did you mean {prefix}{close[0]}?" if close else f"; see {self.prog} --help"


def one_line(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _type_name(action: Action) -> str:
    return getattr(action.type, "__name__", "value").replace("string_to_bool", "bool")


def _documented_sections(dataclass_type: type) -> dict[str, list[str]]:
    """Fields by section, as TRL and transformers write docstrings: `> Title`, then the fields."""
    sections: dict[str, list[str]] = {}
    names: list[str] | None = None
    for line in inspect.cleandoc(dataclass_type.__doc__ or "").splitlines():
        if section := _SECTION.match(line):
            names = sections.setdefault(section[1], [])
        elif (documented := _FIELD.match(line)) and names is not None:
            names.append(documented[1])
    return sections
