# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Settings from flags and YAML files: TRL's parser, with help in groups and one line for each mistake."""

import dataclasses
import difflib
import inspect
import json
import math
import re
import sys
from argparse import SUPPRESS, Action, ArgumentTypeError
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import yaml
from trl import TrlParser


# Of the many settings that come with TRL and transformers, those that a first run asks for.
OFTEN_SET = (
    "model_name_or_path",
    "output_dir",
    "use_peft",
    "load_in_4bit",
    "dtype",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "logging_steps",
    "save_steps",
    "resume_from_checkpoint",
    "report_to",
    "push_to_hub",
    "use_cpu",
    "seed",
)

_SECTION = re.compile(r"^ {4}> (.+)$")
Section = tuple[str, list[str]]  # title and names of the settings

_FIELD = re.compile(r"^ {4}(\w+) ?\(")


class Parser(TrlParser):
    """
    Parses flags and `--config FILE.yaml` into dataclasses. A mistake ends the program with exit code 2 and one line,
    which names the setting that was probably meant.

    Args:
        dataclass_types (`Iterable[type]`):
            Dataclasses, whose fields are the settings.
        first (`str`, *optional*):
            Setting that may come first, without its name.
        kwargs:
            Passed to [`~argparse.ArgumentParser`].
    """

    def __init__(self, dataclass_types: Iterable[Any], first: str | None = None, **kwargs: Any):
        # An abbreviation would mean another setting as soon as one is added.
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self.first = first
        if any(_is_foreign(dataclass_type) for dataclass_type in self.dataclass_types):
            self.add_argument(
                "--help-all",
                action=_HelpAll,
                nargs=0,
                dest=SUPPRESS,
                default=SUPPRESS,
                help="show the settings of TRL and transformers too, and exit",
            )
        first = "" if self.first is None else f"{self.first.upper()} "
        self.usage = f"{self.prog} {first}[--config FILE.yaml] [--SETTING VALUE …]"
        for action in self._actions:
            if _type_name(action) == "float":
                action.type = _finite(action.type)
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
            if "--config" in args:
                self._check_config_file(args[args.index("--config") + 1])
        try:
            return super().parse_args_and_config(args, *positional, **kwargs)
        except (OSError, TypeError, ValueError) as error:
            self.error(one_line(error))

    def _check_config_file(self, path: str) -> None:
        """What TRL's parser would stumble over."""
        try:
            with open(path, encoding="utf-8") as file:
                config = yaml.safe_load(file)
        except OSError as error:
            self.error(one_line(error))
        except yaml.MarkedYAMLError as error:
            mark: Any = error.problem_mark
            self.error(f"{path}, line {mark.line + 1}: is no YAML ({error.problem}): write `setting: value`")
        except (yaml.YAMLError, ValueError) as error:  # UnicodeDecodeError, and dates that are none
            self.error(f"{path}: is no YAML ({one_line(error)}): write `setting: value`")
        except RecursionError:
            self.error(f"{path}: is nested too deeply to be read: write `setting: value`")
        if not isinstance(config, dict):
            self.error(f"{path}: holds a {type(config).__name__}, not settings: write `setting: value`")
        for name in config:
            if not isinstance(name, str):
                self.error(f"{path}: {name!r} is no setting but a {type(name).__name__}: write its name")
        if not isinstance(config.get("env", {}), dict):
            self.error(f"{path}: env holds a {type(config['env']).__name__}: write `NAME: value` in it")

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
            self.error(
                f"{unknown[0]!r} belongs to no setting: leave it out; a file of settings is passed with --config"
            )
        for kind in self.dataclass_types:
            for each in dataclasses.fields(kind):
                value: Any = getattr(namespace, each.name, None)
                # Parsed in `__post_init__`, where an error would not tell the setting.
                is_json = isinstance(value, str) and value.startswith("{")
                if is_json and each.name.endswith(("_kwargs", "_config", "_args")):
                    try:
                        json.loads(value)
                    except (ValueError, RecursionError) as error:
                        self.error(f"--{each.name} {value[:60]}: is no valid JSON ({one_line(error)}); correct it")
        return namespace, unknown

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """Settings of a YAML file, checked as those of the command line are."""
        actions = {action.dest: action for action in reversed(self._actions)}  # not the `--no_…` of a switch
        types = {each.name: str(each.type) for kind in self.dataclass_types for each in dataclasses.fields(kind)}
        for name, value in config.items():
            if name not in actions:
                self.error(f"the config file has {name!r}, which is no setting{self._suggestion(str(name))}")
            config[name] = self._config_value(actions[name], types.get(name, ""), value)
        return super().set_defaults_with_config(**config)

    def _config_value(self, action: Action, declared: str, value: Any) -> Any:
        """A value of a YAML file as argparse takes it, of which it converts and checks strings only."""

        def refuse(cure: str) -> NoReturn:
            self.error(f"the config file has {action.dest}: {str(value)[:60]!r}, a {type(value).__name__}; {cure}")

        kind = _type_name(action)
        if value is None:
            if action.default is not None or action.required:
                refuse("give it a value, or leave the setting out")
        elif action.nargs == "+":
            value = value if isinstance(value, list) else [value]
            if not all(isinstance(each, str | (bool if kind == "bool" else int | float)) for each in value):
                refuse("write a list of texts or numbers")
            if kind == "str" and not all(isinstance(each, str) for each in value):
                refuse("write a list of texts")
        elif kind in ("int", "float"):
            value = str(value)
        elif isinstance(value, dict | list):
            if type(value).__name__ not in declared.lower():
                refuse(f"write one {'text' if kind == 'str' else kind}")
        elif kind == "bool":
            if not isinstance(value, bool | str):
                refuse("write true or false")
        elif isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        elif not isinstance(value, str):
            refuse("write it in quotes if it is a text")
        if action.choices is not None and isinstance(value, str) and value not in action.choices:
            refuse(f"choose from {', '.join(map(str, action.choices))}")
        return value

    def error(self, message: str) -> NoReturn:
        message = message.replace("the following arguments are required:", "something is missing: pass")
        self.exit(2, f"{self.prog}: {message}\n")

    def format_help(self, everything: bool = False) -> str:
        """Settings in groups: those of this package, and then, if `everything` is asked for, what is inherited."""
        formatter: Any = self.formatter_class(prog=self.prog)
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        actions: dict[str, list[Action]] = {}
        for action in self._actions:
            actions.setdefault(action.dest, []).append(action)
        own, inherited = self._sections()
        hidden = sum(len(names) for _, names in inherited)
        if inherited and not everything:
            shown = [name for name in OFTEN_SET if any(name in names for _, names in inherited)]
            inherited = [(f"Often set, of {hidden} that come with TRL and transformers (all: --help-all)", shown)]
        for title, names in own + inherited:
            formatter.start_section(title)
            for name in names:
                formatter.add_arguments(actions[name])
            formatter.end_section()
        return formatter.format_help()

    def _sections(self) -> tuple[list[Section], list[Section]]:
        """Groups of this package and of others, by the docstrings of the dataclasses."""
        own: list[Section] = []
        inherited: list[Section] = []
        for dataclass_type in self.dataclass_types:
            left = [each.name for each in dataclasses.fields(dataclass_type) if each.init]
            for base in dataclass_type.__mro__:
                sections = inherited if _is_foreign(base) else own
                for title, documented in _documented_sections(base).items():
                    if names := [name for name in documented if name in left]:
                        sections.append((title, names))
                        left = [name for name in left if name not in names]
            for base in dataclass_type.__mro__:  # what is in no section
                if names := [name for name in left if name in base.__dict__.get("__annotations__", {})]:
                    title = inspect.cleandoc(base.__doc__ or "").partition("\n")[0].partition(";")[0].rstrip(".")
                    (inherited if _is_foreign(base) else own).append((title, names))
                    left = [name for name in left if name not in names]
        return own, inherited

    def _suggestion(self, name: str, prefix: str = "") -> str:
        known = [action.dest for action in self._actions] + ["config"]
        close = difflib.get_close_matches(name, known, n=1)
        return f"; did you mean {prefix}{close[0]}?" if close else f"; see {self.prog} --help"


class _HelpAll(Action):
    def __call__(self, parser: Any, *arguments: Any) -> None:
        print(parser.format_help(everything=True), end="")
        parser.exit()


def _finite(parse: Any) -> Callable[[str], float | None]:
    """Reads a number that can be computed with: NaN in one setting would be NaN in every weight."""

    def parse_finite(text: str) -> float | None:
        value = parse(text)
        if value is not None and not math.isfinite(value):
            raise ArgumentTypeError(f"{text!r} is not a finite number")
        return value

    parse_finite.__name__ = "float"
    return parse_finite


def one_line(error: Exception) -> str:
    """What an error says, in one line; of an error of the system, the file first."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}; check the path, its permissions and the space left"
    return " ".join(str(error).split()) or type(error).__name__


def _type_name(action: Action) -> str:
    return getattr(action.type, "__name__", "value").replace("string_to_bool", "bool")


def _is_foreign(dataclass_type: type) -> bool:
    return dataclass_type.__module__.startswith(("trl.", "transformers."))


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
