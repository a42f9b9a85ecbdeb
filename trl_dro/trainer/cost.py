# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""What a run needs of a device, computed from shapes alone: bytes and operations of training two roles.

Weights, gradients and optimizer states are exact: they are counted on a model without storage. Activations are those
of a decoder of gated MLPs (Llama, Mistral, Qwen, Gemma) whose attention keeps no matrix of scores. Left out is what no
shape tells: the context of the device, fragmentation, and buffers of its kernels.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ..model.likelihood import MAX_FLOAT_LOGITS
from ..model.roles import ROLES, Role, RolePair, Roles, prepare_role_model


# Bytes per weight of bitsandbytes: 4 bits and a float32 scale for each 64 weights, or an 8-bit one for each 64 and a
# float32 one for each 256 of these; 8 bits and a float32 scale for each row, which is next to nothing.
BYTES_4BIT, BYTES_4BIT_NESTED, BYTES_8BIT = 0.5 + 4 / 64, 0.5 + 1 / 64 + 4 / (64 * 256), 1.0

# DeepSpeed's defaults: gradients exchanged at a time, and trained weights that stage 3 steps at a time.
ZERO_BUCKET, ZERO3_GROUP = 5e8, 1e9


@dataclass
class Shape:
    """
    Sizes of a decoder.

    Args:
        layers (`int`):
            Layers.
        hidden (`int`):
            Channels of the residual stream.
        query (`int`):
            Channels of all query heads together.
        key (`int`):
            Channels of all key heads together, which are as many as of the value heads.
        intermediate (`int`):
            Channels inside of the MLP.
        vocabulary (`int`):
            Tokens.
    """

    layers: int
    hidden: int
    query: int
    key: int
    intermediate: int
    vocabulary: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Shape":
        """The sizes that a model's config gives."""
        text: Any = config.get_text_config()
        heads = text.num_attention_heads
        # Not all configs have these attributes.
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        key_heads = getattr(text, "num_key_value_heads", None) or heads
        intermediate = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
        return cls(
            text.num_hidden_layers,
            text.hidden_size,
            heads * head_dim,
            key_heads * head_dim,
            intermediate,
            text.vocab_size,
        )


@dataclass
class Work:
    """
    Tokens of one question, and how they go through the models.

    Args:
        selector_prompt (`int`):
            Tokens of the selector's prompt, P.
        permutation (`int`):
            Tokens of a permutation, c.
        generator_row (`int`):
            Tokens of a generator's prompt and its answer, G.
        answer (`int`):
            Tokens of the answer.
        num_permutations (`int`):
            Permutations, m.
        checkpointing (`bool`):
            Whether activations are computed again in the backward.
        estimates_serve_once (`bool`):
            Whether the generator's loss forward is its scoring forward.
        separate_choices (`int`):
            Choices of a permutation if the selector reads each in a row of its own, with the prompt and without a
            cache; 0 where rows share the prompt.
        scored_documents (`int`):
            Documents if the selector reads each by itself with the question, P being all of them together, and writes
            nothing; 0 where it writes.
    """

    selector_prompt: int
    permutation: int
    generator_row: int
    answer: int
    num_permutations: int
    checkpointing: bool
    estimates_serve_once: bool = True
    separate_choices: int = 0
    scored_documents: int = 0

    def tokens(self, role: Role) -> int:
        """Tokens that one forward of a role takes; nothing is shared between the generator's prompts."""
        if role == "selector" and self.scored_documents:
            return self.selector_prompt
        if role == "selector" and self.separate_choices:
            return self.num_permutations * (self.selector_prompt + self.permutation)
        if role == "selector":
            return self.selector_prompt + self.num_permutations * self.permutation
        return self.num_permutations * self.generator_row


def build_roles(
    config: PreTrainedConfig,
    selector_config: PreTrainedConfig | None,
    peft_config: PeftConfig | dict[str, PeftConfig] | None,
    dtype: torch.dtype,
    trained: Iterable[Role] = ROLES,
    trust_remote_code: bool = False,
) -> Roles:
    """Both roles as [`~roles.prepare_role_model`] makes them, on the meta device: modules and shapes, no storage."""

    def build(config: PreTrainedConfig) -> Any:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)

    with torch.device("meta"):
        selector = None if selector_config is None else build(selector_config)
        return Roles(prepare_role_model(build(config), selector, peft_config), trained)


def weight_bytes(roles: Roles, quantized: float | None = None) -> dict[str, float]:
    """
    Bytes of weights by what they are, without gradients.

    Args:
        roles ([`~roles.Roles`]):
            Both roles, with or without storage.
        quantized (`float`, *optional*):
            Bytes per weight of quantized linear layers; `None` for a base in its own precision.

    Returns:
        `dict[str, float]`: `"base"` (frozen, or full models) and `"adapters"`.
    """
    adapters = {id(p) for role in ROLES for _, p in roles.named_parameters(role)}
    models = [roles.model.get_submodule(role) for role in ROLES] if not roles.shared else [roles.model]
    total = {"base": 0.0, "adapters": 0.0}
    for model in models:
        small = _quantized_weights(model) if quantized is not None else set()
        for parameter in model.parameters():
            if isinstance(model, PeftModel) and id(parameter) in adapters:
                total["adapters"] += parameter.numel() * adapter_itemsize(parameter, quantized)
            elif id(parameter) in small:
                total["base"] += parameter.numel() * (quantized or 0.0)
            else:
                total["base"] += parameter.numel() * parameter.element_size()
    return total


def adapter_itemsize(parameter: nn.Parameter, quantized: float | None) -> int:
    """Bytes per weight of an adapter, which is bfloat16 on a quantized base."""
    return parameter.element_size() if quantized is None else 2


def _quantized_weights(model: nn.Module) -> set[int]:
    """Weights of the linear layers of a base, its head left out, as bitsandbytes replaces them."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    head = base.get_output_embeddings()
    return {
        id(module.weight)
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not set(name.split(".")) & set(ROLES)
    }


def training_bytes(
    roles: Roles, optim: str, quantized: float | None = None, num_processes: int = 1
) -> dict[str, float]:
    """
    Bytes that trained weights need beside themselves, on each device.

    Args:
        roles ([`~roles.Roles`]):
            Both roles.
        optim (`str`):
            Optimizer, as transformers names it. Those of names that are not Adafactor's, Lion's or SGD's are taken to
            keep two states, as AdamW does.
        quantized (`float`, *optional*):
            Bytes per weight of a quantized base, on which adapters are bfloat16.
        num_processes (`int`, *optional*, defaults to `1`):
            Processes. Several keep the gradients a second time, in the buckets in which they are averaged.

    Returns:
        `dict[str, float]`: `"gradients"`, `"buckets"` and `"optimizer"`.
    """
    gradients = states = 0.0
    for role in roles.trained:
        for _, parameter in roles.named_parameters(role):
            count, itemsize = parameter.numel(), adapter_itemsize(parameter, quantized)
            gradients += count * itemsize
            if "adafactor" in optim:
                rows = (
                    [*parameter.shape[:-2], parameter.shape[-2] + parameter.shape[-1]]
                    if parameter.dim() > 1
                    else [count]
                )
                states += 4 * torch.Size(rows).numel()
            elif "8bit" in optim:
                # Small ones keep float32; the others a float32 scale for each 256.
                states += (1 if "lion" in optim else 2) * count * (4 if count < 4096 else 1 + 4 / 256)
            else:
                states += {"sgd": 0, "lion": 1}.get(optim.split("_")[0], 2) * count * itemsize
    return {"gradients": gradients, "buckets": gradients if num_processes > 1 else 0.0, "optimizer": states}


def sharded_bytes(roles: Roles, optim: str, half: bool, num_processes: int) -> dict[str, float]:
    """
    Bytes of weights, gradients and optimizer states on each device under FSDP2, which spreads all of them evenly.

    Args:
        roles ([`~roles.Roles`]):
            Both roles, without storage; in half precision their trained weights become float32, as in training.
        optim (`str`):
            Optimizer, see [`training_bytes`].
        half (`bool`):
            Whether layers compute in half precision.
        num_processes (`int`):
            Processes.

    Returns:
        `dict[str, float]`: as of [`weight_bytes`] and [`training_bytes`], and `"gathered for sampling"`: all weights
        of the larger role, or of the base that both share.
    """
    for role in roles.trained:
        for _, parameter in roles.named_parameters(role):
            if half:
                parameter.data = parameter.data.float()
    shared = {**weight_bytes(roles), **training_bytes(roles, optim)}
    models = [roles.model.get_submodule(role) for role in ROLES] if not roles.shared else [roles.model]
    sizes = [sum(p.numel() * (2 if half else p.element_size()) for p in model.parameters()) for model in models]
    return {name: number / num_processes for name, number in shared.items()} | {"gathered for sampling": max(sizes)}


def zero_bytes(
    roles: Roles, optim: str, half: bool, stage: int, num_processes: int, quantized: float | None = None
) -> dict[str, float]:
    """
    Bytes of weights, gradients and optimizer states on each device under DeepSpeed's ZeRO [1], which spreads what the
    optimizer keeps, from stage 2 gradients too, and in stage 3 weights. Weights and gradients have the precision of
    layers; the optimizer keeps a float32 copy of the weights that it trains, and makes one of their gradients, of a
    group of weights at a time.

    Args:
        roles ([`~roles.Roles`]):
            Both roles, without storage; all their weights take the precision of layers.
        optim (`str`):
            Optimizer, see [`training_bytes`].
        half (`bool`):
            Whether layers compute in half precision.
        stage (`int`):
            Stage, from 1 to 3.
        num_processes (`int`):
            Processes.
        quantized (`float`, *optional*):
            Bytes per weight of a quantized base, which stays whole.

    Returns:
        `dict[str, float]`: as of [`weight_bytes`] and [`training_bytes`], and in stage 3 `"gathered for sampling"`:
        all weights of the larger role, or of the base that both share.

    References:
        [1] Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, 2020,
            https://huggingface.co/papers/1910.02054
    """
    trained = {role: sum(p.numel() for _, p in roles.named_parameters(role)) for role in roles.trained}
    for parameter in roles.model.parameters():
        parameter.data = parameter.data.float()
    states = training_bytes(roles, optim)["optimizer"] + 4 * sum(trained.values())
    itemsize = 2 if half else 4
    for parameter in roles.model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16 if half else torch.float32)
    gradients = itemsize * sum(trained.values())
    group = max(trained.values()) / num_processes
    memory = weight_bytes(roles, quantized)
    if stage == 3:
        models = [roles.model.get_submodule(role) for role in ROLES] if not roles.shared else [roles.model]
        sizes = [sum(itemsize * p.numel() for p in model.parameters()) for model in models]
        memory = {name: number / num_processes for name, number in memory.items()}
        memory["gathered for sampling"] = max(sizes)
        group = min(group, ZERO3_GROUP)
    return memory | {
        "gradients": gradients / (num_processes if stage > 1 else 1) + 4 * group,
        "buckets": itemsize * min(ZERO_BUCKET, sum(trained.values())),
        "optimizer": states / num_processes,
    }


def autocast_bytes(roles: Roles, quantized: float | None = None) -> float:
    """Bytes of the half precision copies of float32 weights that autocast keeps until a role's backward begins."""
    copied = [
        sum(p.numel() for _, p in roles.named_parameters(role) if adapter_itemsize(p, quantized) == 4)
        for role in roles.trained
    ]
    return 2.0 * max(copied)


def cache_bytes(shape: Shape, tokens: int, itemsize: int) -> int:
    """Bytes of the keys and values of `tokens` tokens, from which permutations are sampled."""
    return 2 * shape.layers * shape.key * itemsize * tokens


def layer_bytes(shape: Shape, itemsize: int, trained_weights: bool) -> int:
    """
    Bytes per token that one layer keeps for its backward.

    The two norms keep their input in float32; the inputs of the linear layers are kept for the adapters or for the
    weights themselves; attention keeps query, key, value (repeated for each head) and output, and its output once more
    in the order in which the projection reads it; the MLP keeps the gate before and after its activation, its other
    half, and their product. Norms that are trained keep what they multiply.
    """
    kept = 2 * shape.hidden + 5 * shape.query + 4 * shape.intermediate
    if trained_weights:
        kept += 2 * shape.hidden
    return 2 * 4 * shape.hidden + itemsize * kept


def activation_bytes(
    shape: Shape, tokens: int, itemsize: int, residual_itemsize: int, checkpointing: bool, trained_weights: bool
) -> float:
    """
    Most bytes that the layers hold between a forward and the end of its backward.

    Args:
        shape ([`Shape`]):
            The model.
        tokens (`int`):
            Tokens of the forward.
        itemsize (`int`):
            Bytes per number in which linear layers compute.
        residual_itemsize (`int`):
            Bytes per number of the residual stream: those of the weights, whatever autocast does.
        checkpointing (`bool`):
            Whether each layer keeps its input alone; one layer at a time is then computed again.
        trained_weights (`bool`):
            Whether the weights themselves are trained, and not adapters.
    """
    one_layer = tokens * layer_bytes(shape, itemsize, trained_weights)
    # The layer under way also holds gradients: of both halves of the MLP, of their product and of its input.
    under_way = tokens * (3 * itemsize * shape.intermediate + 2 * residual_itemsize * shape.hidden)
    if not checkpointing:
        return shape.layers * one_layer + under_way
    return shape.layers * tokens * shape.hidden * residual_itemsize + one_layer + under_way


def logit_bytes(shape: Shape, scored_tokens: int, itemsize: int) -> float:
    """Bytes of the logits of scored tokens with their gradients, and of the part of them that is float32."""
    numbers = scored_tokens * shape.vocabulary
    return 2 * itemsize * numbers + 3 * 4 * min(numbers, MAX_FLOAT_LOGITS)


def role_step_bytes(
    shape: Shape,
    role: Role,
    work: Work,
    num_questions: int,
    itemsize: int,
    residual_itemsize: int,
    trained_weights: bool,
) -> dict[str, float]:
    """
    Bytes of a role's forward and backward over some questions.

    Returns:
        `dict[str, float]`: `"activations"` and `"logits"`.
    """
    scored = work.num_permutations * (work.permutation if role == "selector" else work.answer)
    if role == "selector" and work.scored_documents:
        scored = work.scored_documents * work.permutation
    tokens = num_questions * work.tokens(role)
    return {
        "activations": activation_bytes(
            shape, tokens, itemsize, residual_itemsize, work.checkpointing, trained_weights
        ),
        "logits": logit_bytes(shape, num_questions * scored, itemsize),
    }


def forward_equivalents(role: Role, work: Work, trained: bool, trained_weights: bool) -> float:
    """
    Tokens that one question sends through a role's model in a training step, a backward counted as the forwards that
    it costs: one through frozen weights, two through trained ones.
    """
    tokens, written = work.tokens(role), work.num_permutations * work.permutation
    backward = (2 if trained_weights else 1) + work.checkpointing
    if role == "selector" and work.scored_documents:  # the backward reads again what it needs, all of it at most
        return tokens + trained * (1 + backward) * tokens
    if role == "selector" and work.separate_choices:
        # The first choice follows the prompt; each further one reads it again, and half a permutation on average.
        again = work.num_permutations * (work.separate_choices - 1)
        drawn = work.selector_prompt + again * (work.selector_prompt + work.permutation / 2)
        return drawn + trained * (1 + backward) * tokens
    if role == "selector":
        goes_on = not work.checkpointing and work.estimates_serve_once  # from the cache of the prompts
        return tokens + trained * ((written if goes_on else tokens) + backward * tokens)
    estimate = 0 if trained and work.estimates_serve_once else tokens
    return estimate + trained * (1 + backward) * tokens


def flops_per_token(shape: Shape, num_parameters: int, length: int) -> int:
    """Operations of a forward per token: two per weight, and four per channel of each pair of tokens."""
    return 2 * num_parameters + 4 * shape.layers * shape.query * length


def role_shapes(roles: Roles) -> dict[Role, Shape]:
    """Sizes of each role's model."""
    return {role: Shape.of(_base(roles, role).config) for role in ROLES}


def role_parameters(roles: Roles) -> dict[Role, int]:
    """Weights of each role's base that a token is multiplied by: all but the embeddings."""
    return {role: _base(roles, role).num_parameters(exclude_embeddings=True) for role in ROLES}


def _base(roles: Roles, role: Role) -> Any:
    model: Any = roles.model.get_submodule(role) if isinstance(roles.model, RolePair) else roles.model
    return model.get_base_model() if isinstance(model, PeftModel) else model
