# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Settings from flags and YAML files: TRL's parser, with help in groups and one line for each mistake."""

import dataclasses
import difflib
import inspect
import json
import math
import os
import re
import sys
from argparse import SUPPRESS, Action, ArgumentTypeError
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import yaml
from trl import TrlParser


if TYPE_CHECKING:
    from ..system.run_folder import LoadOptions


# What retrieves without a corpus, see [`~retrieval.services.open_service`].
SERVICE_HELP = (
    "Service that finds the candidates, instead of a corpus: elasticsearch+URL/INDEX, opensearch+URL/INDEX, "
    "qdrant+URL/COLLECTION, qdrant+file:FOLDER/COLLECTION, or MODULE:FUNCTION that returns a LangChain or LlamaIndex "
    "retriever."
)
DENSE_MODEL_HELP = "sentence-transformers model that encodes questions for a service that searches vectors."


# What every `--corpus` reads, see [`~data.corpus.open_corpus`].
CORPUS_HELP = (
    "Passages: jsonl, tsv, csv (each may be gz), json, parquet, Hub id (`id` or `id:config`); or a document, or a "
    "folder of them, to cut into passages."
)
DATASET_HELP = "Dataset with candidates: a Hub id, a `save_to_disk` folder, or a jsonl or parquet file."

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
        check_range(self, ["num_processes"], 1)
        if self.accelerate_config is not None and not os.path.isfile(self.accelerate_config):
            raise ValueError(f"--accelerate_config {self.accelerate_config}: there is no such file; check the path")

    def stays(self) -> bool:
        """Whether the command runs in the process that was called, be there several GPUs."""
        return False


@dataclass(kw_only=True)
class CuttingArguments:
    """
    How documents are cut into passages, see [`~data.chunking.DocumentFolder`].

    Args:
        words_per_passage (`int`, *optional*, defaults to `100`):
            Most words of a passage.
        overlap_words (`int`, *optional*, defaults to `0`):
            Most words of the sentences at the end of a passage with which the next one begins again.
    """

    words_per_passage: int = field(default=100, metadata={"help": "Most words of a passage cut from documents."})
    overlap_words: int = field(
        default=0, metadata={"help": "Most words, in whole sentences, that a passage repeats of the one before."}
    )

    def cut(self) -> tuple[int, int]:
        """Both. Raises `ValueError` if one is out of its range."""
        check_range(self, ["words_per_passage"], 1)
        check_range(self, ["overlap_words"], 0, self.words_per_passage - 1)
        return self.words_per_passage, self.overlap_words


@dataclass(kw_only=True)
class LoadArguments:
    """
    Which system to load, and how.

    Args:
        model (`str`, *optional*):
            Run folder or Hub repo with both roles, or the generator alone.
        selector (`str`, *optional*):
            Selector, if not that of `model`: a run, adapter or model.
        revision (`str`, *optional*):
            Branch, tag or commit of a Hub repo given as `model`.
        base_model (`str`, *optional*):
            Base of the adapters, instead of the one they name.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Precision; `"auto"` takes that in which the base is stored.
        device (`str`, *optional*):
            Device; the accelerator if there is one.
        attn_implementation (`str`, *optional*):
            Attention of transformers.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Load the base in 4 bits (NF4, double quantization).
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that ships with a model.
    """

    model: str | None = field(
        default=None, metadata={"help": "Run folder or Hub repo with both roles, or the generator alone."}
    )
    selector: str | None = field(
        default=None, metadata={"help": "Selector, if not the model's: a run, adapter or model."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model's Hub repo."})
    base_model: str | None = field(default=None, metadata={"help": "Base of the adapters, if not the one they name."})
    dtype: str = field(default="auto", metadata={"help": "Precision; auto takes that in which the base is stored."})
    device: str | None = field(default=None, metadata={"help": "Device; the accelerator if there is one."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention of transformers."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Load the base in 4 bits (NF4)."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether to run code that ships with a model."})

    def load_options(self) -> "LoadOptions":
        """Precision, device and quantization."""
        import torch
        from transformers import BitsAndBytesConfig

        from ..system.run_folder import LoadOptions

        four_bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        return LoadOptions(
            dtype=self.dtype,
            device=self.device,
            quantization_config=four_bits if self.load_in_4bit else None,
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass(kw_only=True)
class AnswerArguments(LoadArguments):
    """
    How a system answers, where that is not as its `rag_config.json` says; see also [`LoadArguments`].

    Args:
        answer_permutations (`int`, *optional*):
            Permutations whose answers are added up, see [`~mixture.answer_questions`].
        min_gain (`float`, *optional*):
            Nats by which documents must make an answer likelier, or it is marked as abstained from.
    """

    answer_permutations: int | None = field(
        default=None,
        metadata={"help": "Answer from so many permutations, and take the answer with the most probability over all."},
    )
    min_gain: float | None = field(
        default=None,
        metadata={"help": "Nats by which documents must make an answer likelier, or it is marked as abstained from."},
    )

    def changes(self, *names: str) -> dict[str, Any]:
        """Fields of [`~rag_config.RAGConfig`] that are set here: these, and those of `names`."""
        names = ("answer_permutations", "min_gain", *names)
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(kw_only=True)
class QuestionArguments(AnswerArguments, LaunchArguments, CuttingArguments):
    """
    Questions that a system is asked, see also [`LoadArguments`], [`LaunchArguments`] and [`CuttingArguments`].

    Args:
        questions (`str`, *optional*):
            Questions, jsonl, whose candidates BM25 retrieves from `corpus`.
        corpus (`str`, *optional*):
            Passages, as for [`~data.corpus.open_corpus`].
        retriever (`str`, *optional*):
            Service that retrieves them instead of BM25, see [`~retrieval.services.open_service`].
        dense_model (`str`, *optional*):
            Model that encodes questions for it, if it searches vectors.
        dataset_name (`str`, *optional*):
            Dataset with candidates, instead: a Hub id, a `save_to_disk` folder, or a jsonl or parquet file.
        dataset_split (`str`, *optional*):
            Its split.
        max_questions (`int`, *optional*):
            Ask the first ones only.
        max_candidates (`int`, *optional*):
            Candidates per question, n, instead of the trained system's.
        tokens_per_batch (`int`, *optional*, defaults to `16384`):
            Prompt tokens computed at a time; halved where memory runs out.
        on_error (`str`, *optional*, defaults to `"stop"`):
            What becomes of rows that cannot be asked, as they are broken or too long: `"stop"` for an error before any
            weights are loaded, `"skip"` to list them in `skipped.jsonl` and do the others.
    """

    questions: str | None = field(
        default=None, metadata={"help": "Questions, jsonl, whose candidates BM25 retrieves from the corpus."}
    )
    corpus: str | None = field(default=None, metadata={"help": CORPUS_HELP})
    retriever: str | None = field(default=None, metadata={"help": SERVICE_HELP})
    dense_model: str | None = field(default=None, metadata={"help": DENSE_MODEL_HELP})
    dataset_name: str | None = field(default=None, metadata={"help": DATASET_HELP})
    dataset_split: str | None = field(default=None, metadata={"help": "Its split."})
    max_questions: int | None = field(default=None, metadata={"help": "Ask the first ones only."})
    max_candidates: int | None = field(default=None, metadata={"help": "Candidates per question, n."})
    tokens_per_batch: int = field(default=16384, metadata={"help": "Prompt tokens computed at a time."})
    on_error: Literal["stop", "skip"] = field(
        default="stop",
        metadata={"help": "Rows that cannot be asked: stop before loading, or skip and list them in skipped.jsonl."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.cut()
        check_range(self, ["max_questions", "max_candidates", "answer_permutations", "tokens_per_batch"], 1)
        if self.num_processes is not None and self.num_processes > 1 and ":" in (self.device or ""):
            raise ValueError(f"--device {self.device} is one device, for which processes would queue: leave it out")

    def stays(self) -> bool:
        """A device that is named is that of one process, unless more are asked for."""
        return self.device is not None and self.num_processes is None and self.accelerate_config is None


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


def check_range(args: Any, names: Iterable[str], lowest: float, highest: float = math.inf) -> None:
    """Raises `ValueError` if one of these settings is given and out of its range, whose ends are allowed."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not (lowest <= value <= highest and math.isfinite(value)):
            most = "" if highest == math.inf else f" and at most {highest:g}"
            raise ValueError(f"--{name} {value}: it must be at least {lowest:g}{most}")


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
