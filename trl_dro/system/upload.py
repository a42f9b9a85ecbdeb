# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""What of a run folder goes to the Hub: what a user of the system needs, and nothing else that may lie there."""

import json
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi

from ..model.roles import ROLES
from .rag_config import CONFIG_FILE
from .run_folder import BASE_FOLDER


FILES = ("README.md", CONFIG_FILE, "metrics.json")
FOLDERS = (*ROLES, BASE_FOLDER, *(f"{role}/{BASE_FOLDER}" for role in ROLES))
# A model, an adapter and a tokenizer.
FILES_OF_FOLDERS = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json"),
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
    operations = [
        CommitOperationAdd(name, _without_places(path) if path.suffix == ".json" else str(path))
        for name, path in files_to_upload(folder)
    ]
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
    """A JSON file, in which no folder of this machine is named: nobody else has it."""
    if path.name not in ("config.json", "adapter_config.json", "tokenizer_config.json"):
        return str(path)
    values = json.loads(path.read_text(encoding="utf-8"))
    for name in _PLACES:
        if isinstance(place := values.get(name), str) and (os.path.isabs(place) or os.path.isdir(place)):
            values[name] = None
    return json.dumps(values, indent=2, ensure_ascii=False).encode()
