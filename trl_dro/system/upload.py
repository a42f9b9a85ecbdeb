# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""What of a run folder goes to the Hub: what a user of the system needs, and nothing else that may lie there."""

import json
import os
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi

from ..model.roles import ROLE_FILE, ROLES
from .rag_config import CONFIG_FILE
from .run_folder import BASE_FOLDER


FILES = ("README.md", CONFIG_FILE, "metrics.json")
FOLDERS = (*ROLES, BASE_FOLDER, *(f"{role}/{BASE_FOLDER}" for role in ROLES))
# A model, an adapter and a tokenizer.
FILES_OF_FOLDERS = (
    *(
        "*.safetensors",
        "*.safetensors.index.json",
        "config.json",
        "generation_config.json",
        "adapter_config.json",
        ROLE_FILE,
    ),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"),
)
# Fields of configs in which a model's folder on this machine may stand.
_PLACES = ("base_model_name_or_path", "_name_or_path", "name_or_path")


def files_to_upload(folder: str | Path) -> Iterator[tuple[str, Path]]:
    """Path in the repo and file of whatever of a run folder is uploaded."""
    folder = Path(folder)
    for name in FILES:
        if (folder / name).is_file():
            yield name, folder / name
    for part in FOLDERS:
        for path in sorted((folder / part).glob("*")):
            if path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in FILES_OF_FOLDERS):
                yield f"{part}/{path.name}", path


def upload_system(
    folder: str | Path,
    repo_id: str,
    commit_message: str,
    token: str | None = None,
    revision: str | None = None,
    blocking: bool = True,
) -> Any:
    """
    Uploads a trained system as one commit: both roles, `rag_config.json`, metrics and model card. Training arguments,
    checkpoints, logs, reports, evaluations and whatever else lies in the folder stay here, and so do the paths of this
    machine.

    Args:
        folder (`str` or `Path`):
            Run folder.
        repo_id (`str`):
            Repo, which exists.
        commit_message (`str`):
            Message.
        token (`str`, *optional*):
            Token; by default that of `hf auth login`.
        revision (`str`, *optional*):
            Branch.
        blocking (`bool`, *optional*, defaults to `True`):
            Whether to wait for the upload.

    Returns:
        [`~huggingface_hub.CommitInfo`], or a future of one.
    """
    return _commit(files_to_upload(folder), repo_id, commit_message, token, revision, blocking)


def upload_checkpoint(
    checkpoint: str | Path, place: str, repo_id: str, commit_message: str, token: str | None, revision: str | None
) -> Any:
    """
    Uploads what a run resumes from to a folder of the repo, for `hub_strategy="checkpoint"`, without training
    arguments and model cards, which name folders of this machine. Returns a future.
    """
    paths = [path for path in sorted(Path(checkpoint).rglob("*")) if path.is_file()]
    kept = [path for path in paths if path.name not in ("training_args.bin", "README.md")]
    files = [(f"{place}/{path.relative_to(checkpoint).as_posix()}", path) for path in kept]
    return _commit(files, repo_id, f"{commit_message}, checkpoint", token, revision, blocking=False)


def _commit(
    files: Iterable[tuple[str, Path]],
    repo_id: str,
    commit_message: str,
    token: str | None,
    revision: str | None,
    blocking: bool,
) -> Any:
    operations = [CommitOperationAdd(name, _without_places(path)) for name, path in files]
    api: Any = HfApi()
    return api.create_commit(
        repo_id,
        operations,
        commit_message=commit_message,
        token=token,
        revision=revision,
        run_as_future=not blocking,
    )


def _without_places(path: Path) -> bytes | str:
    """A file, or the content of a config without folders of this machine, which nobody else has."""
    if path.name not in ("config.json", "adapter_config.json", "tokenizer_config.json"):
        return str(path)
    values = json.loads(path.read_text(encoding="utf-8"))
    for name in _PLACES:
        if isinstance(place := values.get(name), str) and (os.path.isabs(place) or os.path.isdir(place)):
            values[name] = None
    return json.dumps(values, indent=2, ensure_ascii=False).encode()
