# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Files and folders that are whole or not there, the latter named by what they were made from."""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HOME


logger = logging.getLogger(__name__)

DEFAULT_CACHE_DIR = Path(HF_HOME) / "trl_dro"
LOCK_FILE = ".lock"
_KEY = re.compile("'[0-9a-f]{32,64}'")  # of content


def content_key(*parts: Any) -> str:
    """Key of values that JSON can hold: equal values give equal keys, on every machine."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


def file_key(path: str | os.PathLike) -> str:
    """Key of the bytes of a file, wherever it lies and whatever it is called."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def as_path(value: Any, what: str = "path") -> Path:
    """
    A path that was passed, as one.

    Raises:
        `ValueError`: it is no path but `None`, a number, an empty text and so on.
    """
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ValueError(f"{what} must be a text or a Path, not {value!r}: name a file or folder")
    if "\0" in str(value):
        raise ValueError(f"{what} {str(value)!r} holds a NUL, which no name can: correct it")
    return Path(value)


def make_folder(folder: str | os.PathLike) -> Path:
    """
    Makes a folder to write to, and those above it, unless it is there.

    Raises:
        `ValueError`: it cannot be made or written to; the message names it.
    """
    path = as_path(folder, "output_dir")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):  # permissions alone tell nothing of disks that are read only
            pass
    except OSError as error:
        raise ValueError(
            f"{path} is no folder that can be written to ({error.strerror or error}): name another output_dir, or "
            "mend its permissions"
        ) from None
    return path


def write_whole(path: Path, text: str) -> None:
    """Writes a file, over an older one if there is one, so that a reader or a kill never sees half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock that ends with the process, so that two processes never write one folder."""
    make_folder(path.parent)
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("another process is making %s; waiting for it", path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def alone_in(folder: str | os.PathLike) -> Iterator[None]:
    """
    Holds a folder for this process, so that two never mix their results in it. The lock ends with the process, however
    that ends. In one process it may be held twice.

    Raises:
        `ValueError`: another process holds it, or it cannot be written to.
    """
    lock = FileLock(make_folder(folder).resolve() / LOCK_FILE, is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"another process is writing to {folder}: wait until it ends or stop it, or name another output_dir"
        ) from None
    try:
        yield
    finally:
        lock.release()


def different(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first setting that differs, as `name=before, not now`; `None` if none does."""
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            values = [repr(values.get(name)) for values in (before, now)]
            if any(_KEY.fullmatch(value) for value in values):
                return f"another {name.removesuffix('_sha256')}, which has changed since"
            return f"{name}={_shortened(values[0])}, not {_shortened(values[1])}"
    return None


def _shortened(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


@contextmanager
def build_once(folder: Path) -> Iterator[Path | None]:
    """
    Gives a folder to write into, which becomes `folder` when the block ends, or `None` where `folder` is there. What
    a killed process wrote is still in it, for the block to continue.
    """
    with locked(folder):
        if folder.is_dir():
            yield None
        else:
            partial = folder.with_name(folder.name + ".partial")
            partial.mkdir(exist_ok=True)
            yield partial
            partial.rename(folder)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Gives an empty folder to write into, which becomes `folder` when the block ends."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    temporary.rename(folder)
