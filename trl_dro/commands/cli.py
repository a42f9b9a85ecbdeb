# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""The command line: `trl-dro COMMAND --help`."""

import difflib
import inspect
import logging
import re
import sys
import warnings
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

from .. import __version__
from .arguments import LaunchArguments
from .parser import Parser, one_line
from .source import read


class Command(NamedTuple):
    """
    A command. Models take seconds to import: its module only where it is used.

    Args:
        arguments (`str`):
            Dataclasses of its settings.
        function (`str`):
            What it calls.
        first (`str`, *optional*):
            Setting that may come first, without its name.
    """

    arguments: str
    function: str
    first: str | None = None


# Each in the module of its name.
COMMANDS = {
    "quickstart": Command("QuickstartArguments", "quickstart", "corpus"),
    "questions": Command("QuestionWritingArguments", "write_questions", "corpus"),
    "retrieve": Command("RetrieveArguments", "retrieve", "questions"),
    "warmup": Command("WarmUpArguments SFTConfig ModelConfig", "warm_up"),
    "train": Command("TrainArguments DROConfig ModelConfig", "train"),
    "evaluate": Command("EvaluationArguments", "evaluate", "model"),
    "predict": Command("PredictArguments", "predict", "model"),
    "serve": Command("ServeArguments", "serve", "model"),
    "write-back": Command("WriteBackArguments", "write_back", "predictions"),
    "report": Command("ReportArguments", "report", "run"),
    "env": Command("EnvironmentArguments", "print_environment"),
}
USAGE = f"usage: trl-dro {{{','.join(COMMANDS)}}} [--config FILE.yaml] [--debug] [--help] …"
UNFORESEEN = "ended by an error that is not foreseen,"


def main() -> None:
    """Entry point of `trl-dro`. Those with models are started in a process for each GPU where there are several."""
    run(sys.argv[1:], may_launch=True)


def run(arguments: list[str], may_launch: bool = False) -> None:
    """
    Runs a command.

    Args:
        arguments (`list[str]`):
            Command and its flags; with `--debug` among them an error shows its traceback.
        may_launch (`bool`, *optional*, defaults to `False`):
            Whether this process may start others, and is not one that was started so.

    Raises:
        `SystemExit`: with code 1 and one line if the command fails, with code 2 if it was called wrongly.
    """
    name, *arguments = arguments or ["--help"]
    if name in ("-h", "--help"):
        print_commands()
        return
    if name == "--version":
        print(f"trl-dro {__version__}")
        return
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        print(f"trl-dro: there is no command {name!r}{hint}\n{USAGE}", file=sys.stderr)
        sys.exit(2)
    hush_libraries()
    debug = "--debug" in arguments
    arguments = [each for each in arguments if each != "--debug"]
    check_usage(name, arguments)
    parsed: tuple[Any, ...] = ()
    try:
        parsed = make_parser(name).parse_args_and_config(arguments)
        if may_launch and isinstance(parsed[0], LaunchArguments) and launches(parsed[0]):
            launch(parsed[0], [name, *arguments, *(["--debug"] if debug else [])])
        else:
            getattr(command_module(name), COMMANDS[name].function)(*parsed)
    except (ValueError, ImportError, OSError, FloatingPointError) as error:  # a DatasetError is a ValueError
        if debug:
            raise
        sys.exit(f"trl-dro {name}: {one_line(error)}{_where_written(error, parsed)}")
    except Exception as error:  # what no check foresaw
        if debug:
            raise
        if written := _where_written(error, parsed):
            sys.exit(f"trl-dro {name}: {one_line(error)}{written}")
        if _LOST.search(str(error)):
            go_on = "go on with --resume_from_checkpoint true" if name == "train" else "the same command goes on"
            sys.exit(f"trl-dro {name}: another process is gone, look there for the reason; then {go_on}")
        sys.exit(
            f"trl-dro {name}: {UNFORESEEN} {type(error).__name__}: {one_line(error)}; --debug shows where, "
            "please report it with that"
        )
    except KeyboardInterrupt:
        sys.exit("\ninterrupted" if name == "train" else "\ninterrupted; the same command goes on where it stopped")


# What tokenizers, safetensors and torch say of a full disk, each with an error of its own.
_SYSTEM = re.compile(r"os error \d+|iostream error|PytorchStreamWriter|inline_container")

# What gloo and NCCL say of a process that they cannot reach any more.
_LOST = re.compile(r"Connection (closed|reset) by peer|ncclRemoteError|Timed out waiting \d+ms")


def _where_written(error: Exception, parsed: tuple[Any, ...]) -> str:
    """Of an error of the system that names no file: the folders that are written to, and what to look for in them."""
    unnamed = isinstance(error, OSError) and error.errno is not None and error.filename is None
    if not unnamed and not _SYSTEM.search(str(error)):
        return ""
    folders = [vars(each)[key] for each in parsed for key in ("output_dir", "cache_dir") if vars(each).get(key)]
    return f"; free space, or mend the permissions, in {' and '.join(map(str, folders)) or 'the folders written to'}"


def hush_libraries() -> None:
    """Silences what libraries tell their own callers, and that a faster 4-bit product for CPUs could be installed."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl")
    warnings.filterwarnings("ignore", "'pin_memory' argument", category=UserWarning)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def print_commands() -> None:
    """Prints what each command does."""
    print(f"{USAGE}\n")
    for name in COMMANDS:
        summary = str(read(module_name(name))["__doc__"]).partition("\n")[0].partition(": ")[2]
        print(f"  {name:12}{summary}")
    print("\ntrl-dro COMMAND --help tells its settings, trl-dro --version the version of this package.")


def check_usage(name: str, arguments: list[str]) -> None:
    """
    Answers help and mistakes by the source of a command, as importing it takes seconds.

    Raises:
        `SystemExit`: with code 0 after help, with code 2 if the command was called wrongly.
    """
    # What the source does not tell, in whichever way, the module will.
    with suppress(Exception):
        make_parser(name, read(module_name(name))).parse_args_and_config(arguments)


def make_parser(name: str, names: Mapping[str, Any] | None = None) -> Parser:
    """The parser of a command, by the names of its module, which is imported if they are not given."""
    command, names = COMMANDS[name], names or vars(command_module(name))
    types = [names[each] for each in command.arguments.split()]
    description = (inspect.getdoc(names[command.function]) or "").partition("\n\n")[0]
    return Parser(types, command.first, prog=f"trl-dro {name}", description=description)


def module_name(name: str) -> str:
    """Full name of the module of a command."""
    return f"trl_dro.commands.{name.replace('-', '_')}"


def command_module(name: str) -> ModuleType:
    """The module of a command, imported."""
    return import_module(module_name(name))


def launches(args: LaunchArguments) -> bool:
    """Whether a command is to run in processes of their own."""
    import torch

    if args.stays():
        return False
    return args.accelerate_config is not None or (args.num_processes or torch.cuda.device_count()) > 1


def launch(args: LaunchArguments, arguments: list[str]) -> None:
    """Starts a command in several processes, as `accelerate launch -m trl_dro.commands.cli` does."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    flags = ["--quiet"]  # the process that failed has told why
    if args.accelerate_config is not None:
        flags += ["--config_file", args.accelerate_config]
    if args.num_processes is not None:
        flags += ["--num_processes", str(args.num_processes)]
        if args.accelerate_config is None and args.num_processes > 1:
            flags.append("--multi_gpu")
    parsed = launch_command_parser().parse_args([*flags, "-m", "trl_dro.commands.cli", *arguments])
    try:
        launch_command(parsed)
    except ChildFailedError:  # which has said why
        sys.exit(1)


if __name__ == "__main__":
    run(sys.argv[1:])
