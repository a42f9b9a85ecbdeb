# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Runs a case in this process, or in a fork where it limits resources, and tells how it ended."""

import contextlib
import ctypes
import io
import logging
import os
import pickle
import re
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import NamedTuple

from trl_dro.commands import cli

from .cases import Case, Limited, Unable


KINDS = ("one line", "unclear", "unforeseen", "traceback", "accepted")
# What a message says to do, in one form or another.
CURE = re.compile(
    r"\b(must|pass|write|check|name|set|use|lower|raise|leave|add|drop|give|choose|copy|download|convert|rename|remove|"
    r"fill|retrieve|did you mean|see|build|is not|need|needs|cannot|install|save|free|mend|expected|invalid|no such|"
    r"there is no|correct|start|delete|make|train|put|cut|load|update|take|try|merge|not one of|should|call|"
    r"wait)\b",
    re.IGNORECASE,
)


class Outcome(NamedTuple):
    """How a case ended: one of `KINDS`, and what was said."""

    kind: str
    message: str


class Served(Exception):
    """The server would have listened."""


def outcome(case: Case, world) -> Outcome:
    """Runs a case in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="fault") as folder:
        tmp = Path(folder)
        what = case.make(world, tmp)
        names = tuple(folder if name == "TMP" else name for name in case.names)
        here = os.getcwd()
        os.chdir(tmp)
        try:
            if isinstance(what, Limited | Unable):
                return _in_fork(what, names)
            return _call(what, names) if callable(what) else _command(what, names)
        finally:
            os.chdir(here)


def _command(arguments, names) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _quiet():
            cli.run(arguments)
    except SystemExit as error:
        if error.code in (0, None):
            return Outcome("accepted", out.getvalue().strip()[-200:])
        said = error.code if isinstance(error.code, str) else err.getvalue().strip()
        lines = [line for line in said.splitlines() if not line.startswith("usage:")]
        return _judge("\n".join(lines), names)
    except BaseException as error:
        return Outcome("traceback", _where(error))
    return Outcome("accepted", out.getvalue().strip()[-200:])


def _call(call, names) -> Outcome:
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), _quiet():
            call()
    except (ValueError, TypeError, ImportError, OSError) as error:
        raised = traceback.extract_tb(error.__traceback__)[-1].filename
        # A TypeError that the interpreter raises speaks of the code, not of what was passed.
        if isinstance(error, TypeError) and "trl_dro" not in raised:
            return Outcome("traceback", _where(error))
        return _judge(str(error), names)
    except BaseException as error:
        return Outcome("traceback", _where(error))
    return Outcome("accepted", "")


def _judge(message, names) -> Outcome:
    message = message.strip()
    if cli.UNFORESEEN in message:
        return Outcome("unforeseen", message)
    clear = message and "\n" not in message and any(name in message for name in names) and CURE.search(message)
    return Outcome("one line" if clear else "unclear", message)


def _in_fork(limited, names) -> Outcome:
    """In a process of its own, whose limits and lost rights end with it."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            if isinstance(limited, Limited):
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limited.size, limited.size))
            else:
                drop_capabilities()
            result = _command(limited.arguments, names)
        except BaseException as error:
            result = Outcome("traceback", _where(error))
        os.write(write, pickle.dumps(tuple(result)))
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        result = Outcome(*pickle.load(file))
    os.waitpid(child, 0)
    return result


def drop_capabilities() -> bool:
    """Makes root heed permissions as others must; whether this process does now."""
    if os.geteuid() != 0:
        return True
    if not sys.platform.startswith("linux"):
        return False
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    return ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()) == 0


def _where(error) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({Path(last.filename).name}:{last.lineno})"


@contextlib.contextmanager
def _quiet():
    """Without warnings and logs, and without a server that listens."""
    import uvicorn

    def served(*args, **kwargs):
        raise Served

    before, uvicorn.run = uvicorn.run, served
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Served:
        pass
    finally:
        uvicorn.run = before
        logging.disable(level)
