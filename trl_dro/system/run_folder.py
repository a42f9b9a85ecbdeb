# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""What a trained system leaves in a folder or on the Hub, and how it becomes a model again.

A run folder has `selector/` and `generator/`, each an adapter or a full model with its tokenizer, `rag_config.json`
with what the prompts were made of, and `base/` if the base model has no place of its own to be loaded from: then the
adapters name no base, and only then a folder of that name is one.
"""

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data.lines import first_line
from ..data.storage import as_path, content_key, file_key
from ..model.control_tokens import end_token_ids
from ..model.loading import context_length, load_tokenizer, longest_sequence, prepare_tokenizer, refuse_file
from ..model.prompts import Prompts
from ..model.rag_model import RAGModel
from ..model.roles import ROLE_FILE, ROLES, Role, RolePair, Roles, check_role, put_adapters_on
from ..model.self_check import SharedPrefix, check_rows
from .adapter_check import ADAPTER_FILE, check_adapter, read_adapter_config
from .rag_config import CONFIG_FILE, RAGConfig


BASE_FOLDER = "base"
# What tells a repo with roles or an adapter from a plain model's.
_MARKS = (CONFIG_FILE, f"generator/{ADAPTER_FILE}", f"selector/{ADAPTER_FILE}", ADAPTER_FILE)


@dataclass
class RoleSource:
    """
    Where one role's weights are.

    Args:
        path (`str`):
            Folder of an adapter or a model, or the Hub id of a model.
        base (`str`, *optional*):
            Base model of an adapter; `None` for a full model.
        revision (`str`, *optional*):
            Revision of the base, or of a model on the Hub.
        config (`str`, *optional*):
            `rag_config.json` that comes with it.
    """

    path: str
    base: str | None = None
    revision: str | None = None
    config: str | None = None

    @property
    def model(self) -> str:
        """The full model to load: the base of an adapter, or the model itself."""
        return self.base or self.path


def find_role(
    name: str | Path,
    role: Role,
    revision: str | None = None,
    token: str | bool | None = None,
    base_model: str | None = None,
) -> RoleSource:
    """
    Finds one role by the name of a run folder, an adapter folder or a model folder, or of a Hub repo with either.

    Of a Hub repo with roles or an adapter everything is downloaded first, so that nothing is loaded by halves.

    Args:
        name (`str` or `Path`):
            Folder, or id of a repo.
        role (`str`):
            `"selector"` or `"generator"`.
        revision (`str`, *optional*):
            Branch, tag or commit of the repo.
        token (`str` or `bool`, *optional*):
            Token for a private repo; by default that of `hf auth login`.
        base_model (`str`, *optional*):
            Base of the adapter, instead of the one it names.

    Returns:
        [`RoleSource`]

    Raises:
        `ValueError`: there is no such folder or repo, it cannot be reached, or the adapter's base is unknown.
    """
    folder = as_path(name, f"the {role}'s model")
    refuse_file(name, revision)
    if not folder.is_dir():
        if folder.is_absolute() or str(name).startswith(("./", "../", "~")):
            raise ValueError(f"there is no folder {name}: check the path")
        downloaded = _download(str(name), revision, token)
        if downloaded is None:
            return RoleSource(str(name), revision=revision)
        folder = downloaded
    role_folder = folder / role if (folder / role).is_dir() else folder
    check_role(role_folder, role)
    config = next((str(f / CONFIG_FILE) for f in (folder, role_folder) if (f / CONFIG_FILE).is_file()), None)
    adapter = role_folder / ADAPTER_FILE
    if not adapter.is_file():
        if not (role_folder / "config.json").is_file():
            raise ValueError(
                f"{role_folder} holds neither a model (config.json) nor an adapter ({ADAPTER_FILE}): name a folder "
                f"with {' and '.join(ROLES)}, or a model's"
            )
        return RoleSource(str(role_folder), config=config)
    settings = read_adapter_config(role_folder)
    if base_model is not None:
        return RoleSource(str(role_folder), base_model, config=config)
    base = settings.get("base_model_name_or_path")
    unused = folder / BASE_FOLDER
    if base and role_folder != folder and unused.is_dir() and not any(unused.iterdir()):
        raise ValueError(f"{unused} is empty: copy the run again, or delete that folder if it never held a base")
    if not base and (own := _own_base(folder, role)):
        return RoleSource(str(role_folder), str(own), config=config)
    if not base or (os.path.isabs(base) and not os.path.isdir(base)):
        raise ValueError(
            f"the adapter in {role_folder} was trained on a model that is not here ({base or 'unnamed'}): "
            "pass its folder or Hub id as base_model"
        )
    return RoleSource(str(role_folder), base, settings.get("revision"), config)


def _own_base(folder: Path, role: Role) -> Path | None:
    """
    The base that a run keeps because it has no place of its own: its adapters name none. Another folder of that name,
    beside the run, is nobody's base.
    """
    runs = [folder.resolve()]
    if runs[-1].name in ROLES:
        runs.append(runs[-1].parent)
    if runs[-1].name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
        runs.append(runs[-1].parent)
    places = [place for run in runs for place in (run / role / BASE_FOLDER, run / BASE_FOLDER)]
    return next((place for place in places if place.is_dir()), None)


def system_stamp(selector: str | None, generator: str, base_model: str | None = None) -> dict[str, str | None]:
    """
    Tells a system in local folders from another that is written to the same folders later.

    Args:
        selector (`str`, *optional*):
            Selector, or a run with one; `None` if no model selects.
        generator (`str`):
            Generator, or a run with one.
        base_model (`str`, *optional*):
            Base of the adapters, instead of the one they name.

    Returns:
        `dict[str, str]`: keys of the `weights`, of the weights of their `base` and of `rag_config`; `None` for what is
        on the Hub, or is not there.

    Raises:
        `ValueError`: a folder holds no such role, or its base is unknown.
    """
    named: list[tuple[Role, str | None]] = [("selector", selector), ("generator", generator)]
    sources = [find_role(name, role, base_model=base_model) for role, name in named if name and Path(name).is_dir()]
    configs = {source.config for source in sources if source.config}
    return {
        "weights": files_key([source.path for source in sources]),
        "base": files_key([source.base for source in sources if source.base]),
        "rag_config": content_key([file_key(path) for path in sorted(configs)]) if configs else None,
    }


def files_key(folders: Sequence[str]) -> str | None:
    """Key of weights, by size and time, and of the settings and the tokenizer beside them, by content."""
    stamps = []
    for folder in dict.fromkeys(folders):
        for path in sorted(Path(folder).glob("*")):
            if path.suffix in (".safetensors", ".bin") and path.name != "training_args.bin":
                stamps.append([path.name, path.stat().st_size, path.stat().st_mtime_ns])
            elif path.name.endswith("config.json") or path.name.startswith(("tokenizer", "vocab", "chat_template")):
                stamps.append([path.name, file_key(path)])
    return content_key(stamps) if stamps else None


def _download(repo_id: str, revision: str | None, token: str | bool | None) -> Path | None:
    """Snapshot of a repo with roles or an adapter; `None` for any other, which transformers loads by its id."""
    where = f"{repo_id}" + (f" at revision {revision}" if revision else "")
    try:
        for file in _MARKS:
            try:
                hf_hub_download(repo_id, file, revision=revision, token=token)
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                continue
            return Path(
                snapshot_download(
                    repo_id, revision=revision, token=token, ignore_patterns=["checkpoint-*", "*.bin", "*.pt"]
                )
            )
    except RevisionNotFoundError:
        raise ValueError(f"{repo_id} has no revision {revision}: name a branch, tag or commit of it") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"there is no folder or Hub repo {repo_id}, or it is private: check the name, and `hf auth login` or pass "
            "a token"
        ) from None
    except LocalEntryNotFoundError as error:
        # Offline, a file that a cached repo does not have looks like one that was not downloaded.
        with suppress(LocalEntryNotFoundError):
            cached = Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
            return cached if any((cached / file).is_file() for file in _MARKS) else None
        raise ValueError(
            f"{where} is no folder here, not in the cache, and the Hub cannot be reached "
            f"({first_line(error.__cause__ or error)}): check the name and the network"
        ) from error
    except HFValidationError as error:
        raise ValueError(f"{repo_id} is neither a folder nor a Hub id ({first_line(error)})") from None
    except Exception as error:  # a status, a timeout, a connection cut: whatever the HTTP client raises
        raise ValueError(
            f"{where} could not be downloaded ({first_line(error)}): try again, it goes on where it stopped"
        ) from error
    return None


@dataclass
class LoadOptions:
    """
    How models are loaded.

    Args:
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Precision; `"auto"` takes that in which the base is stored.
        device (`str` or `torch.device`, *optional*):
            Device; the accelerator if there is one.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization of the base.
        attn_implementation (`str`, *optional*):
            Attention of transformers.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that ships with a model.
        token (`str` or `bool`, *optional*):
            Token for private repos.
        shared_prefix (`str`, *optional*, defaults to `"auto"`):
            As in [`DROConfig`].
    """

    dtype: str | torch.dtype = "auto"
    device: str | torch.device | None = None
    quantization_config: Any = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    token: str | bool | None = None
    shared_prefix: SharedPrefix = "auto"
    target: torch.device = field(init=False)

    def __post_init__(self):
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        try:
            self.target = torch.device(self.device or accelerator or "cpu")
        except RuntimeError:
            raise ValueError(f"there is no device {self.device!r}: name cpu, cuda or cuda:0, say") from None
        if self.target.type not in ("cpu", "meta", getattr(accelerator, "type", "cpu")) or (
            self.target.index is not None
            and self.target.type != "cpu"
            and self.target.index >= torch.accelerator.device_count()
        ):
            raise ValueError(f"device {self.device!r} is not here: leave it out, or name one that `trl-dro env` lists")
        if (
            isinstance(self.dtype, str)
            and self.dtype != "auto"
            and not isinstance(getattr(torch, self.dtype, None), torch.dtype)
        ):
            raise ValueError(f"there is no dtype {self.dtype!r}: name auto, float32, bfloat16 or float16")

    def load(self, source: RoleSource) -> PreTrainedModel:
        """The full model of a role, or the base of its adapter. Raises `ValueError` if it cannot be loaded."""
        kwargs: dict[str, Any] = {}
        if self.quantization_config is not None:
            kwargs = {"quantization_config": self.quantization_config, "device_map": {"": self.target}}
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.model,
                output_loading_info=True,
                revision=source.revision,
                dtype=self.dtype,
                attn_implementation=self.attn_implementation,
                trust_remote_code=self.trust_remote_code,
                token=self.token,
                **kwargs,
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a damaged file raises in transformers, safetensors or torch
            raise ValueError(
                f"model {source.model} cannot be loaded ({first_line(error)}): check its files, or download it again"
            ) from error
        model, report = loaded
        if missing := sorted(report["missing_keys"]):
            raise ValueError(
                f"model {source.model} has no weights for {missing[0]} and {len(missing) - 1} others: download "
                "it again"
            )
        return model if self.quantization_config is not None else model.to(self.target)


class FoundSystem(NamedTuple):
    """Where each role is, and what its prompts are made of."""

    sources: dict[Role, RoleSource]
    config: RAGConfig

    def load_prompts(self, options: LoadOptions) -> dict[Role, Prompts]:
        """
        Prompt builder of each role, from tokenizers and configs alone, without any weights.

        Raises:
            `ValueError`: a tokenizer or config cannot be loaded, or the prompts cannot fit.
        """
        tokenizers = {role: prepare_tokenizer(_load_tokenizer(each, options)) for role, each in self.sources.items()}
        contexts = {
            role: context_length(each.model, each.revision, options.trust_remote_code)
            for role, each in self.sources.items()
        }
        return self.config.build_prompts(tokenizers, self.config.build_codec(tokenizers), contexts)


def find_system(
    path: str | Path,
    selector: str | Path | None = None,
    revision: str | None = None,
    base_model: str | None = None,
    options: LoadOptions | None = None,
    **config: Any,
) -> FoundSystem:
    """Finds both roles of a system and its settings; see [`~pipeline.RAGPipeline.from_pretrained`]."""
    token = None if options is None else options.token
    generator = find_role(path, "generator", revision, token, base_model)
    selected = (path, revision) if selector is None else (selector, None)
    sources: dict[Role, RoleSource] = {
        "selector": find_role(selected[0], "selector", selected[1], token, base_model),
        "generator": generator,
    }
    saved = generator.config or sources["selector"].config
    rag_config = RAGConfig.load(saved, config) if saved else RAGConfig(**config)
    rag_config.check(saved or "the settings")
    return FoundSystem(sources, rag_config)


def load_rag(selector: RoleSource, generator: RoleSource, config: RAGConfig, options: LoadOptions) -> RAGModel:
    """
    Both roles, with one base in memory if they share it.

    Args:
        selector ([`RoleSource`]):
            Where the selector is.
        generator ([`RoleSource`]):
            Where the generator is.
        config ([`RAGConfig`]):
            Prompts and sizes.
        options ([`LoadOptions`]):
            Precision, device and so on.

    Returns:
        [`~rag_model.RAGModel`]: in evaluation mode, frozen.

    Raises:
        `ValueError`: a model cannot be loaded, or the prompts cannot fit.
    """
    sources: dict[Role, RoleSource] = {"selector": selector, "generator": generator}
    for source in sources.values():
        if source.base is not None:
            check_adapter(source.path, source.model, source.revision, options.trust_remote_code)
    # An adapter on a 4-bit or 8-bit base, or any other, keeps the precision it was saved in.
    generator_model = options.load(generator)
    shared = (selector.model, selector.revision) == (generator.model, generator.revision)
    role_model: PeftModel | RolePair
    if shared and selector.base is generator.base is None:
        role_model = RolePair(generator_model, generator_model)
    elif shared:
        paths = {role: None if source.base is None else source.path for role, source in sources.items()}
        try:
            role_model = put_adapters_on(generator_model, paths)
        except (RuntimeError, TypeError, KeyError, ValueError) as error:  # what PEFT meets beyond `check_adapter`
            folders = " and ".join(path for path in paths.values() if path)
            raise ValueError(
                f"the adapters in {folders} do not fit {generator.model} ({first_line(error)}): name the base that "
                "they were trained on"
            ) from error
    else:
        role_model = RolePair(
            _with_adapter(options.load(selector), selector, "selector"),
            _with_adapter(generator_model, generator, "generator"),
        )
    role_model.eval()
    roles = Roles(role_model, trained=())
    tokenizers = {role: prepare_tokenizer(_load_tokenizer(source, options)) for role, source in sources.items()}
    contexts = _contexts(roles)
    codec = config.build_codec(tokenizers)
    prompts = config.build_prompts(tokenizers, codec, contexts)
    rag = RAGModel(roles, tokenizers, prompts, codec, options.target, **config.selector())
    check_rows(rag, options.shared_prefix)
    return rag


def with_num_selected(rag: RAGModel, config: RAGConfig, num_selected: int) -> RAGModel:
    """The same models asked for another number of documents, for questions that have fewer candidates than that."""
    min_selected = min(rag.codec.min_selected, num_selected)
    config = replace(config, num_selected=num_selected, min_selected=min_selected)
    codec = config.build_codec(rag.tokenizers)
    prompts = config.build_prompts(rag.tokenizers, codec, _contexts(rag.roles))
    return RAGModel(rag.roles, rag.tokenizers, prompts, codec, rag.device, **config.selector())


def export_merged(source: RoleSource, folder: str | Path, options: LoadOptions) -> None:
    """
    Writes one role as a plain model folder, its adapter merged into its base, with its tokenizer and
    `rag_config.json`: what vLLM, TGI or llama.cpp's converter read. A base that was quantized in training is merged in
    its own precision.

    Args:
        source ([`RoleSource`]):
            The role.
        folder (`str` or `Path`):
            Folder to write, made if it is missing.
        options ([`LoadOptions`]):
            Precision and device; merging needs one copy of the base.

    Raises:
        `ValueError`: the base was asked for in 4 or 8 bits, or the folder has files already.
    """
    folder = Path(folder)
    if options.quantization_config is not None:
        raise ValueError("weights cannot be merged exactly into a quantized base: leave out quantization_config")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: name a new folder for the merged model")
    model: Any = options.load(source)
    if source.base is not None:
        model = PeftModel.from_pretrained(model, source.path).merge_and_unload(safe_merge=True)
    tokenizer = _load_tokenizer(source, options)
    # Those who serve the folder stop where answers ended in training, whatever the base declares.
    model.generation_config.eos_token_id = end_token_ids(tokenizer, model.generation_config.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if source.config is not None:
        shutil.copyfile(source.config, folder / CONFIG_FILE)


def _with_adapter(model: PreTrainedModel, source: RoleSource, role: Role) -> PreTrainedModel | PeftModel:
    return model if source.base is None else PeftModel.from_pretrained(model, source.path, adapter_name=role)


def _load_tokenizer(source: RoleSource, options: LoadOptions) -> Any:
    own = (Path(source.path) / "tokenizer_config.json").is_file()
    if not own and (Path(source.path) / ROLE_FILE).is_file():  # the base's may be another one
        raise ValueError(f"{source.path} has lost the tokenizer that it was saved with: copy or download it again")
    folder = source.path if own else source.model
    return load_tokenizer(
        folder,
        None if own else source.revision,
        trust_remote_code=options.trust_remote_code,
        token=options.token,
    )


def _contexts(roles: Roles) -> dict[Role, int | None]:
    models: dict[Role, Any] = {role: roles.module(role) for role in ROLES}
    return {role: longest_sequence(model.config) for role, model in models.items()}
