# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""An adapter's files and its base held against each other before any weights of the base are loaded."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ..data.lines import first_line, read_json_object


ADAPTER_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """
    The settings of an adapter, of which PEFT can make its config.

    Args:
        folder (`str` or `Path`):
            Folder of the adapter.

    Raises:
        `ValueError`: they cannot be used; the message names file and setting.
    """
    path = Path(folder) / ADAPTER_FILE
    settings = read_json_object(path)
    for name, kinds in {"base_model_name_or_path": str, "revision": str, "peft_type": str}.items():
        if not isinstance(settings.get(name), kinds | None):
            raise ValueError(f"{path}: {name} must be a text, not {settings[name]!r}; correct it")
    if settings.get("peft_type") == "LORA":
        for name in ("r", "lora_alpha"):
            value = settings.get(name, 1)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"{path}: {name} must be a number above 0, not {value!r}; correct it")
        dropout = settings.get("lora_dropout", 0)
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise ValueError(f"{path}: lora_dropout must be a number from 0 to below 1, not {dropout!r}; correct it")
        if not isinstance(settings.get("target_modules"), str | list):
            raise ValueError(
                f"{path}: target_modules must be a text or a list, not {settings.get('target_modules')!r}; correct it"
            )
    return settings


def check_adapter(folder: str | Path, base: str, revision: str | None, trust_remote_code: bool = False) -> None:
    """
    Checks that a LoRA adapter is whole, has only finite weights, and fits its base, whose config alone is read.

    Args:
        folder (`str` or `Path`):
            Folder of the adapter.
        base (`str`):
            Folder or Hub id of its base.
        revision (`str`, *optional*):
            Revision of the base.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that ships with the base.

    Raises:
        `ValueError`: the adapter is damaged, or was made for another model; the message names file and tensor.
    """
    settings = read_adapter_config(folder)
    path = Path(folder) / WEIGHTS_FILE
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # whatever PEFT meets: an unknown kind of adapter, a field of a later version
        raise ValueError(
            f"{Path(folder) / ADAPTER_FILE}: PEFT cannot read it ({first_line(error)}); correct it"
        ) from None
    if config.is_prompt_learning:
        raise ValueError(f"{Path(folder) / ADAPTER_FILE}: {config.peft_type.value} adds virtual tokens: use LoRA")
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"{Path(folder) / ADAPTER_FILE}: task_type is {config.task_type!r}, not CAUSAL_LM; correct it"
        )
    if not isinstance(config, LoraConfig) or not path.is_file():
        if settings.get("peft_type") == "LORA" and not path.with_suffix(".bin").is_file():
            raise ValueError(f"{path} is missing: copy or download the adapter again")
        return  # other kinds and files are PEFT's to check
    shapes = _shapes(path)
    modules = _modules(base, revision, trust_remote_code)
    if modules is None:
        return
    expected = {name for name in modules if check_target_module_exists(config, name)}
    found = {key[len(_PREFIX) :].rpartition(".lora_A.")[0] for key in shapes if ".lora_A." in key}
    for name in sorted(found - expected):
        reason = "is no target of its adapter_config.json" if name in modules else "is no part of its base"
        raise ValueError(
            f"{path} was made for another model than {base}: {name} {reason}; name the base it was made on"
        )
    for name in sorted(expected - found):
        raise ValueError(
            f"{path} has no weights for {name}, a target of its {ADAPTER_FILE} on {base}: copy the adapter again"
        )
    if not found:
        raise ValueError(
            f"{Path(folder) / ADAPTER_FILE}: no module of {base} is among target_modules {config.target_modules!r}; "
            "name the base it was made on"
        )
    for key, shape in shapes.items():
        _check_shape(path, key, shape, config, base, modules)


def _check_shape(
    path: Path, key: str, shape: list[int], config: LoraConfig, base: str, modules: dict[str, nn.Module]
) -> None:
    name, _, part = key[len(_PREFIX) :].rpartition(".lora_")
    if not name:
        if not any(key.startswith(f"{_PREFIX}{module}.") for module in modules if module):
            raise ValueError(f"{path} has a tensor {key}, which is no part of {base}: copy the adapter again")
        return
    module = modules.get(name)
    plain = not config.rank_pattern and part in ("A.weight", "B.weight")
    rank = shape[0 if part.startswith("A") else -1]
    if plain and rank != config.r:
        raise ValueError(f"{path}: {key} has rank {rank}, but adapter_config.json says r={config.r}; correct one")
    if plain and isinstance(module, nn.Linear):
        size = module.in_features if part.startswith("A") else module.out_features
        if size not in shape:
            raise ValueError(
                f"{path} was made for another model than {base}: {key} has shape {shape}, its base {size}; name the "
                "base it was made on"
            )


def _shapes(path: Path) -> dict[str, list[int]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in list(file.keys())}
    except Exception as error:  # safetensors has an error of its own, which is no ValueError
        raise ValueError(f"{path} is damaged ({first_line(error)}): copy or download it again") from None
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path}: {key} holds NaN or infinity; take an earlier checkpoint")
    return {key: list(tensor.shape) for key, tensor in tensors.items()}


def _modules(base: str, revision: str | None, trust_remote_code: bool) -> dict[str, nn.Module] | None:
    """Modules of the base by name, without weights; `None` where its config alone does not make them."""
    try:
        config = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception:  # loading it will say what is wrong
        return None
    return dict(model.named_modules())
