# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""The two roles on one base or two: the only code that creates, switches, freezes, saves or loads adapters.

peft freezes every adapter but the active one each time an adapter is added or switched; an optimizer built then would
silently miss a role. Gradient checkpointing recomputes with whichever adapter is active at backward time, so a role
must stay active until its backward is done. Both rules are kept here and in the order of the trainer's M-step.
"""

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel


ROLE_FILE = "role.json"
Role = Literal["selector", "generator"]
ROLES: tuple[Role, Role] = ("selector", "generator")


class RolePair(nn.Module):
    """
    Selector and generator as two models of their own, called as one module so that one optimizer, one wrapper and one
    checkpoint serve both. `forward(role, **inputs)` runs one of them.

    Args:
        selector ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model of the selector.
        generator ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model of the generator.
    """

    selector: PreTrainedModel | PeftModel
    generator: PreTrainedModel | PeftModel

    def __init__(self, selector: PreTrainedModel | PeftModel, generator: PreTrainedModel | PeftModel):
        super().__init__()
        self.selector = selector
        self.generator = generator

    @property
    def config(self):
        return self.generator.config

    @property
    def _no_split_modules(self) -> list[str]:
        """Classes of layers, of which FSDP makes a unit each."""
        models: list[Any] = [self.selector, self.generator]
        return sorted({name for model in models for name in model._no_split_modules or []})

    def tie_weights(self) -> None:
        """Ties again what FSDP untied when it replaced weights by their parts."""
        for model in (self.selector, self.generator):
            cast(Any, model).tie_weights()

    def forward(self, role: Role, **inputs):
        return self.get_submodule(role)(**inputs)

    def gradient_checkpointing_enable(self, **kwargs):
        for model in (self.selector, self.generator):
            model.gradient_checkpointing_enable(**kwargs)

    def activation_checkpointing_enable(self, **kwargs):
        for model in (self.selector, self.generator):
            model.activation_checkpointing_enable(**kwargs)


def prepare_role_model(
    model: PreTrainedModel | PeftModel,
    selector_model: PreTrainedModel | None = None,
    peft_config: PeftConfig | dict[str, PeftConfig] | None = None,
) -> PeftModel | RolePair:
    """
    Module that holds both roles.

    | `peft_config` | `selector_model` | result |
    | --- | --- | --- |
    | given | `None` | one base with adapters `selector` and `generator` |
    | given | given | two bases with one adapter each |
    | `None` | given | two full models |
    | `None` | `None` | two full models, the selector a copy of `model` (or `model` itself if it has both adapters) |

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Base of both roles, or of the generator when there is a `selector_model`.
        selector_model ([`~transformers.PreTrainedModel`], *optional*):
            Base of the selector alone.
        peft_config ([`~peft.PeftConfig`] or `dict`, *optional*):
            One config copied for both roles, or one per role: `{"selector": …, "generator": …}`.

    Returns:
        [`~peft.PeftModel`] or [`RolePair`]

    Raises:
        `ValueError`: a model already has adapters that are not the two roles', the base has modules named like a
            role, or `peft_config` does not name both roles.
    """
    if isinstance(model, PeftModel) or isinstance(selector_model, PeftModel):
        if (
            isinstance(model, PeftModel)
            and set(model.peft_config) == set(ROLES)
            and peft_config is selector_model is None
        ):
            return model
        raise ValueError(
            "a model passed with adapters must have exactly the adapters 'selector' and 'generator' and come without "
            "`peft_config` and `selector_model`: merge_and_unload() other adapters first, or load yours under these "
            "two names"
        )
    for name, base in (("model", model), ("selector_model", selector_model)):
        if base is not None and is_quantized(base) and peft_config is None:
            raise ValueError(
                f"quantized weights cannot be trained: pass `peft_config` along with the quantized {name}"
            )
    if peft_config is None:
        return RolePair(copy.deepcopy(model) if selector_model is None else selector_model, model)

    configs = peft_config if isinstance(peft_config, dict) else dict.fromkeys(ROLES, peft_config)
    if set(configs) != set(ROLES):
        raise ValueError(f"`peft_config` has the keys {sorted(configs)}: it needs 'selector' and 'generator'")
    if any(config.is_prompt_learning for config in configs.values()):
        raise ValueError("prompt learning adds virtual tokens that sampling would miss: use LoRA or another adapter")
    if selector_model is not None:
        # peft writes into the config it is given, so each role gets its own copy.
        return RolePair(
            get_peft_model(selector_model, copy.deepcopy(configs["selector"]), adapter_name="selector"),
            get_peft_model(model, copy.deepcopy(configs["generator"]), adapter_name="generator"),
        )
    for name, _ in model.named_modules():
        if set(name.split(".")) & set(ROLES):
            raise ValueError(
                f"module '{name}' of the base model is named like a role, so its parameters could not be told from "
                "the adapter's: rename it"
            )
    shared = get_peft_model(model, copy.deepcopy(configs["generator"]), adapter_name="generator")
    shared.add_adapter("selector", copy.deepcopy(configs["selector"]))
    return cast(PeftModel, shared)


def load_role_adapters(base: PreTrainedModel, selector: str | Path, generator: str | Path) -> PeftModel:
    """
    One base with two adapters that were trained elsewhere, by supervised fine-tuning say, for training to go on with.

    Args:
        base ([`~transformers.PreTrainedModel`]):
            Model that both adapters were trained on.
        selector (`str` or `Path`):
            Folder or Hub id of the selector's adapter.
        generator (`str` or `Path`):
            Folder or Hub id of the generator's adapter.

    Returns:
        [`~peft.PeftModel`]: to be passed to [`DROTrainer`] as `model`, without `peft_config`.

    Raises:
        `ValueError`: there is no adapter at one of the places, it was made for another model or as the other role, or
            it adds virtual tokens.
    """
    paths: dict[Role, str | Path] = {"selector": selector, "generator": generator}
    for role, path in paths.items():
        check_role(path, role)
        try:
            config = PeftConfig.from_pretrained(str(path))
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{path} holds no adapter for the {role} ({str(error).splitlines()[0]}): name a folder or Hub repo "
                "with adapter_config.json"
            ) from None
        if config.is_prompt_learning:
            raise ValueError(f"{path}: prompt learning adds virtual tokens that sampling would miss: use LoRA")
    try:
        model = PeftModel.from_pretrained(base, str(generator), adapter_name="generator", is_trainable=True)
        model.load_adapter(str(selector), adapter_name="selector", is_trainable=True)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{selector} and {generator} do not both fit the model {base.config.name_or_path} "
            f"({str(error).splitlines()[0]}): name the base that they were trained on"
        ) from error
    return model


def put_adapters_on(base: PreTrainedModel, paths: dict[Role, str | None]) -> PeftModel:
    """
    One base with a trained adapter for each role, to be asked and not trained further.

    Args:
        base ([`~transformers.PreTrainedModel`]):
            Model that the adapters were trained on.
        paths (`dict[str, str]`):
            Folder of each role's adapter; `None`, for one role at most, is the bare base.

    Returns:
        [`~peft.PeftModel`]
    """
    model: Any = None
    for role, path in paths.items():
        if path is not None and model is None:
            model = PeftModel.from_pretrained(base, path, adapter_name=role)
        elif path is not None:
            model.load_adapter(path, adapter_name=role, torch_device=str(base.device))
    for role, path in paths.items():
        if path is None:  # the bare base: a new adapter of LoRA changes nothing
            model.add_adapter(role, LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model


def note_role(folder: str | Path, role: Role) -> None:
    """Writes `role.json`, by which [`check_role`] tells the folders of the roles apart whatever they are called."""
    (Path(folder) / ROLE_FILE).write_text(json.dumps({"role": role}) + "\n", encoding="utf-8")


def check_role(folder: str | Path, role: Role) -> None:
    """
    Raises `ValueError` if a folder says that it holds the other role. Those of other trainers say nothing, and are
    taken for what they are given as.
    """
    path = Path(folder) / ROLE_FILE
    if not path.is_file():
        return
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))["role"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({type(error).__name__}): copy or download it again") from None
    if noted != role:
        raise ValueError(
            f"{folder} is asked to be the {role}, but holds the {noted} ({ROLE_FILE}): take the folder of the {role}; "
            f"if they were swapped, rename them, and if it is meant so, delete that file"
        )


class Roles:
    """
    Runs, freezes, saves and loads the roles of a module made by [`prepare_role_model`].

    Args:
        model ([`~peft.PeftModel`] or [`RolePair`]):
            Module that holds both roles.
        trained (`Iterable[str]`, *optional*, defaults to both roles):
            Roles to train; the other's parameters are frozen.
    """

    def __init__(self, model: PeftModel | RolePair, trained: Iterable[Role] = ROLES):
        self.model = model
        self.trained = tuple(trained)
        # Roles whose sequences each need a row of their own, see [`~self_check.check_rows`].
        self.separate: set[Role] = set()
        # Whether weights are spread over processes: their gradients do not flow through a cache then.
        self.sharded = False
        self._freeze()

    @property
    def shared(self) -> bool:
        """Whether both roles are adapters on one base."""
        return not isinstance(self.model, RolePair)

    def module(self, role: Role) -> nn.Module:
        """The role's model, ready to be called or to generate: its adapter is active."""
        if isinstance(self.model, RolePair):
            return self.model.get_submodule(role)
        if self.model.active_adapter != role:
            self.model.set_adapter(role)
            self._freeze()
        return self.model

    def is_checkpointed(self, role: Role) -> bool:
        """Whether layers recompute what the backward needs: in training mode they then leave the cache empty."""
        # Not all modules have the attribute.
        return any(getattr(module, "gradient_checkpointing", False) for module in self.module(role).modules())

    def forward(self, role: Role, wrapped: nn.Module | None = None, **inputs: Any) -> Any:
        """
        Forward of one role. Its backward must run before the other role is used: checkpointed layers are recomputed
        with the adapter that is active then.

        Args:
            role (`str`):
                `"selector"` or `"generator"`.
            wrapped (`nn.Module`, *optional*):
                The same module as the trainer wrapped it (DDP, …); gradients are only averaged through it.
            inputs:
                Passed to the model.

        Returns:
            [`~transformers.modeling_outputs.CausalLMOutputWithPast`]
        """
        self.module(role)
        called: Any = self.model if wrapped is None else wrapped
        # Two models as well are called as the one module that holds both, or their weights could not be sharded.
        return called(**inputs) if self.shared else called(role, **inputs)

    def named_parameters(self, role: Role) -> list[tuple[str, nn.Parameter]]:
        """The role's own parameters (its adapter or its full model), by their names in the module of both."""
        if self.shared:
            return [(n, p) for n, p in self.model.named_parameters() if role in n.split(".")]
        adapters = isinstance(self.model.get_submodule(role), PeftModel)
        return [
            (n, p)
            for n, p in self.model.named_parameters()
            if n.startswith(f"{role}.") and (not adapters or role in n.split(".")[1:])
        ]

    def enable_input_require_grads(self) -> None:
        """Lets gradients through a frozen, checkpointed base: its first layer's inputs otherwise need none."""
        modules = [self.model.get_submodule(role) for role in ROLES] if not self.shared else [self.model]
        for module in modules:
            if isinstance(module, PeftModel):
                module.enable_input_require_grads()

    def state_to_save(self) -> dict[str, Tensor]:
        """What [`~Roles.save`] and [`~Roles.save_unnamed_bases`] write, by the names in the module of both."""
        state = self.model.state_dict()
        if any(not base.config.name_or_path for _, base in self._bases()):
            return state
        frozen = {name for name, _ in self.model.named_parameters()}
        frozen -= {name for role in ROLES for name, _ in self.named_parameters(role)}
        return {name: weight for name, weight in state.items() if name not in frozen}

    def save(self, folder: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
        """
        Writes `folder/selector` and `folder/generator` as safetensors, each loadable on its own.

        Args:
            folder (`str` or `Path`):
                Where.
            state (`dict[str, Tensor]`, *optional*):
                Whole weights of [`~Roles.state_to_save`], if those of the model are sharded.
        """
        folder = Path(folder)
        if isinstance(self.model, RolePair):
            for role, module in (("selector", self.model.selector), ("generator", self.model.generator)):
                own = None
                if state is not None:
                    own = {n.removeprefix(f"{role}."): w for n, w in state.items() if n.startswith(f"{role}.")}
                # peft adds the adapter's name to the path by itself.
                module.save_pretrained(str(folder if isinstance(module, PeftModel) else folder / role), state_dict=own)
        else:
            self.model.save_pretrained(str(folder), selected_adapters=list(ROLES), state_dict=state)
        for role in ROLES:
            note_role(folder / role, role)

    def _bases(self) -> list[tuple[str, Any]]:
        """Bases that adapters are on, each with the name of its role, or without one if it is of both."""
        pairs = [(role, self.model.get_submodule(role)) for role in ROLES] if not self.shared else [("", self.model)]
        return [(role, module.get_base_model()) for role, module in pairs if isinstance(module, PeftModel)]

    def save_unnamed_bases(self, folder: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
        """
        Writes `folder/base` (`folder/{role}/base` for two bases) if the adapters' base was made in memory: an adapter
        is of no use without its base, and nobody else has it.
        """
        for role, base in self._bases():
            if base.config.name_or_path:
                continue
            weights = base.state_dict()
            if state is not None:
                inside = next(name for name, module in self.model.named_modules() if module is base) + "."
                weights = {n.removeprefix(inside): w for n, w in state.items() if n.startswith(inside)}
            own = {
                name.replace(".base_layer.", "."): weight
                for name, weight in weights.items()
                if not set(name.split(".")) & set(ROLES)
            }
            base.save_pretrained(Path(folder) / role / "base", state_dict=own)

    def load(self, folder: str | Path, fill: Callable[[Tensor, Tensor], None] | None = None) -> None:
        """
        Reads what [`~Roles.save`] wrote, into the parameters that are already there, so that an optimizer keeps them.

        Args:
            folder (`str` or `Path`):
                Where.
            fill (`Callable`, *optional*):
                Writes values into a weight that is sharded.

        Raises:
            `FileNotFoundError`: one of the two role folders is missing.
            `ValueError`: an adapter was made for other modules, or has another rank, or is the other role's.
        """
        for role in ROLES:
            source = Path(folder) / role
            check_role(source, role)
            if not source.is_dir():
                raise FileNotFoundError(
                    f"{source} does not exist: a checkpoint of both roles has the folders {' and '.join(ROLES)}"
                )
            module = self.model.get_submodule(role) if isinstance(self.model, RolePair) else self.model
            if isinstance(module, PeftModel):
                weights = load_peft_weights(str(source), device="cpu")
                expected = get_peft_model_state_dict(module, adapter_name=role)
                shapes = [{name: weight.shape for name, weight in w.items()} for w in (weights, expected)]
                if different := dict(shapes[0].items() ^ shapes[1].items()):
                    raise ValueError(
                        f"{source} holds an adapter for other modules or of another rank than this one (e.g. "
                        f"{min(different)}): use the peft_config that it was trained with"
                    )
                if fill is None:
                    set_peft_model_state_dict(module, weights, adapter_name=role)
                    continue
                held = expected
            else:
                weights = AutoModelForCausalLM.from_pretrained(source, dtype=module.dtype).state_dict()
                held = module.state_dict()
                if fill is None:
                    module.load_state_dict(weights)
                    continue
            for name, weight in held.items():
                fill(weight, weights[name])
        self._freeze()

    def _freeze(self) -> None:
        for role in ROLES:
            for _, parameter in self.named_parameters(role):
                if parameter.is_floating_point():
                    parameter.requires_grad_(role in self.trained)


def cast_adapters_for_quantized_base(roles: Roles) -> None:
    """
    Adapter weights in bfloat16 on a 4-bit or 8-bit base, as QLoRA recommends and TRL does for its trainers. DoRA's
    magnitude stays in float32: its updates are too small for bfloat16.
    """
    keep_gradients_of_quantized(roles.model)
    for role in ROLES:
        module = roles.model.get_submodule(role) if isinstance(roles.model, RolePair) else roles.model
        if not is_quantized(module):
            continue
        for name, parameter in roles.named_parameters(role):
            if "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)


def keep_gradients_of_quantized(model: nn.Module) -> None:
    """
    On a CPU with AVX512-BF16 bitsandbytes repacks 4-bit weights in the first forward without gradients, and adapters
    get none from then on: turns that off.
    """
    for linear in model.modules():
        if "support_avx512bf16_for_cpu" in vars(linear):  # bitsandbytes' layers of 4 bits alone have it
            linear.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def is_quantized(model: nn.Module) -> bool:
    """Whether the model was loaded in 4 or 8 bits; attributes that only quantized models have."""
    return getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
