# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Whether a loaded model computes rows that share a prompt as it computes each sequence alone.

A model may bind its attention to places in the row instead of positions (MPT, local layers of GPT-Neo), keep a state
that runs through the row (RWKV, Mamba), or ignore what it does not know: nothing in its config tells. So a few short
sequences go through it alone, which is the definition, and then in every way that training and answering use.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from .likelihood import CompletionLogits, completion_logps
from .rag_model import RAGModel
from .roles import ROLES, Role, is_quantized
from .shared_prefix import PackedModel


SharedPrefix = Literal["auto", "always", "never"]

# Largest difference that rounding makes, relative to the size of what is compared. Seen on some 50 families: up to
# 2e-6 in float32 and 0.02 in bfloat16 where rows may share tokens, from 0.3 where they may not.
TOLERANCE, LOW_PRECISION_TOLERANCE = 1e-3, 0.15
# Prompts of the probe are longer than a window, if that has at most this many tokens.
LONGEST_WINDOW = 512


def check_rows(rag: RAGModel, shared_prefix: SharedPrefix = "auto", noiseless: bool = False) -> None:
    """
    Finds out which roles' models can share a prompt's tokens between permutations, and has the others read every
    sequence in a row of its own. Costs some forwards of 20 to 60 tokens, and one backward if a role is trained.

    Args:
        rag ([`~rag_model.RAGModel`]):
            Both roles. `rag.roles.separate` is set.
        shared_prefix (`str`, *optional*, defaults to `"auto"`):
            `"auto"` warns of a model that cannot share tokens, `"always"` refuses it, `"never"` shares none.
        noiseless (`bool`, *optional*, defaults to `False`):
            Whether training is to be without dropout, which is checked too.

    Raises:
        `ValueError`: a model cannot share tokens and `shared_prefix` is `"always"`, is not exact in rows of its own
            either, or is noisy in training mode though that was to be without dropout.
    """
    reasons: dict[int, str | None] = {}
    for role in ROLES:
        module: Any = rag.roles.module(role)
        training = module.training
        base = module.get_base_model() if rag.roles.shared else module
        if id(base) not in reasons:
            with torch.random.fork_rng([rag.device] if rag.device.type == "cuda" else []):
                try:
                    reasons[id(base)] = _why_separate(rag, role, shared_prefix, noiseless)
                finally:
                    module.train(training)
        if shared_prefix == "never" or reasons[id(base)] is not None:
            rag.roles.separate.add(role)


def _why_separate(rag: RAGModel, role: Role, shared_prefix: SharedPrefix, noiseless: bool) -> str | None:
    """Why a role's rows cannot share tokens; `None` if they can. Raises `ValueError` as [`check_rows`] does."""
    module: Any = rag.roles.module(role)
    config = module.config
    name = config.name_or_path or f"the {role}'s model ({config.model_type})"
    special = {*rag.tokenizers[role].all_special_ids, *rag.tokenizers[role].added_tokens_decoder}
    size = min(len(rag.tokenizers[role]), config.get_text_config().vocab_size)
    window = _window(config)
    # Without ordinary tokens any will do.
    tokens = [token for token in range(size) if token not in special] or list(range(size))
    probe = make_probe(tokens, 24 if window is None or window > LONGEST_WINDOW else max(24, window + 8))
    exact = module.dtype == torch.float32 and not is_quantized(module)
    tolerance = TOLERANCE if exact else LOW_PRECISION_TOLERANCE
    parameters = [p for _, p in rag.roles.named_parameters(role) if p.requires_grad]
    why = None
    module.eval()
    if shared_prefix != "never":
        why = _why_wrong(rag.reader(role), probe, parameters, tolerance)
        if window is not None and window > LONGEST_WINDOW:
            why = why or f"its window of {window} tokens is longer than could be tried"
        if why is not None and shared_prefix == "always":
            raise ValueError(
                f"{name} cannot share a prompt's tokens between permutations ({why}): set shared_prefix to 'auto'"
            )
    if why is not None or shared_prefix == "never":
        rag.roles.separate.add(role)
        wrong = _why_wrong(rag.reader(role), probe, parameters, tolerance)
        if wrong is not None:
            raise ValueError(
                f"{name} is not exact in rows of their own either ({wrong}): use another causal language model"
            )
    if why is not None:
        warnings.warn(
            f"{name} cannot share a prompt's tokens between permutations ({why}): every sequence gets a row of its "
            "own, which is exact and takes several times as long (shared_prefix='never' does the same unasked)",
            stacklevel=4,
        )
    if noiseless:
        module.train()
        left = noise(rag.reader(role), probe)
        if not left <= tolerance / 10:
            raise ValueError(
                f"{name} is noisy in training mode (two forwards differ by {left:.1e}) though disable_dropout=True: "
                "turn off its dropout, or set disable_dropout=False"
            )
    return why


def _why_wrong(model: PackedModel, probe: "Probe", parameters: Sequence[Tensor], tolerance: float) -> str | None:
    """What is wrong with what a model computes of a probe; `None` if nothing is."""
    try:
        difference = largest_difference(model, probe, parameters)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model raises for what it does not know
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if difference <= tolerance:
        return None
    return f"it differs by {difference:.1e} from separate sequences, where {tolerance} is rounding"


def _window(config: PreTrainedConfig) -> int | None:
    """Longest window that a config names in a way of its own: `sliding_window` alone is known to masks."""
    known = ("sliding_window", "max_window_layers")
    values = {n: v for n, v in config.get_text_config().to_dict().items() if "window" in n and n not in known}
    return max((v for n, v in values.items() if type(v) is int and "pattern" not in n and v > 0), default=None)


class Probe(NamedTuple):
    """
    Sequences that begin alike, as they are scored and as they are written.

    Args:
        groups (`list[list[tuple[list[int], list[int]]]]` of length `2`):
            Prompts and completions; those of the first group begin alike, two of them with the same prompt.
        rows (`list[list[int]]` of length `4`):
            All prompts with their completions.
    """

    groups: list[list[tuple[list[int], list[int]]]]

    @property
    def rows(self) -> list[list[int]]:
        return [[*prompt, *completion] for group in self.groups for prompt, completion in group]


def make_probe(tokens: Sequence[int], prompt_length: int) -> Probe:
    """
    A probe of some tokens.

    Args:
        tokens (`list[int]`):
            Ordinary token ids of the model's vocabulary.
        prompt_length (`int`):
            Tokens of the longest prompt, at least 20.
    """
    stride = max(1, len(tokens) // 97)
    ids = [tokens[(stride * 7 * i + i) % len(tokens)] for i in range(prompt_length + 40)]
    prompt, rest = ids[:prompt_length], ids[prompt_length:]
    same = [(prompt, [rest[0], *rest[1:4]]), (prompt, [rest[0], *rest[5:7]])]
    other = ([*prompt[: prompt_length // 2], *rest[7:21]], rest[21:24])
    return Probe([[*same, other], [(rest[24:35], rest[35:38])]])


def largest_difference(model: PackedModel, probe: Probe, parameters: Sequence[Tensor]) -> float:
    """
    Largest difference between what a model computes of a probe and what it computes of each sequence alone.

    Args:
        model ([`~shared_prefix.PackedModel`]):
            The model, as rows are given to it.
        probe ([`Probe`]):
            What to compute.
        parameters (`list[Tensor]`):
            Parameters whose gradients are compared too; none if none is trained.

    Returns:
        `float`: relative to the size of what is compared; `inf` if something is not finite.
    """
    expected = [model.forward(input_ids=_row(row, model), use_cache=False).logits[0] for row in probe.rows]
    completions = [completion for group in probe.groups for _, completion in group]
    wanted = torch.cat([logits[-len(c) - 1 : -1] for logits, c in zip(expected, completions, strict=True)])
    together = model.completion_logits(probe.groups)
    found = [_difference(together.logits, wanted)]
    if parameters:
        exact = CompletionLogits(wanted, together.tokens, together.lengths)
        gradients = [_gradient(completion, parameters) for completion in (together, exact)]
        # In low precision their rounding is more than twice that of values: 0.07 against 0.03 on SmolLM2-135M.
        found.append(_relative(*gradients) / 2)
    with torch.no_grad():
        alone = model.completion_logits([[row] for group in probe.groups for row in group])
        found.append(_difference(alone.logits, wanted))
        found += _cached_differences(model, probe, expected)
    return max(difference if difference == difference else float("inf") for difference in found)


def _cached_differences(model: PackedModel, probe: Probe, expected: Sequence[Tensor]) -> Iterator[float]:
    """Differences of prompts read once and continued, at once and token by token."""
    (first, second, _), (last,) = probe.groups
    begun = [first[1][:1], []]
    read = model.read([first[0], last[0]], begun)
    ends = [expected[0][len(first[0])], expected[3][len(last[0]) - 1]]
    yield _difference(read.logits, torch.stack(ends))
    continued = model.completion_logits([[first, second], [last]], read)
    rows = [(expected[0], first), (expected[1], second), (expected[3], last)]
    yield _difference(continued.logits, torch.cat([logits[-len(c) - 1 : -1] for logits, (_, c) in rows]))
    written = [[1, 1], [0]]
    for step in (1, 2):
        new = [[first[1][step : step + 1], second[1][step : step + 1]], [last[1][step - 1 : step]]]
        starts = [[len(first[0]) + w for w in written[0]], [len(last[0]) + w for w in written[1]]]
        written = [[w + len(t) for w, t in zip(*pair, strict=True)] for pair in zip(written, new, strict=True)]
        logits, read = model.extend(read, new, starts)
        lengths = [len(first[0]) + written[0][0], len(second[0]) + written[0][1], len(last[0]) + written[1][0]]
        yield _difference(logits, torch.stack([row[n - 1] for (row, _), n in zip(rows, lengths, strict=True)]))


def noise(model: PackedModel, probe: Probe) -> float:
    """Relative difference of two forwards of the same sequence: that of dropout, if any is left in training mode."""
    row = _row(probe.rows[0], model)
    return _difference(*(model.forward(input_ids=row, use_cache=False).logits[0] for _ in range(2)))


def _row(tokens: Sequence[int], model: PackedModel) -> Tensor:
    return torch.tensor([tokens], device=model.device)


def _gradient(completion: CompletionLogits, parameters: Sequence[Tensor]) -> Tensor:
    logps = completion_logps(completion)
    weighted = (logps * torch.arange(1.0, len(logps) + 1, device=logps.device)).sum()
    gradients: Any = torch.autograd.grad(weighted, parameters, allow_unused=True)
    return torch.cat([g.float().flatten() for g in gradients if g is not None])


def _difference(logits: Tensor, expected: Tensor) -> float:
    """Of what a softmax sees: logits up to a constant."""
    return _relative(*(each.detach().float() - each.detach().float().mean(-1, True) for each in (logits, expected)))


def _relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))
