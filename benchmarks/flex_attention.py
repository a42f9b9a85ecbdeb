# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
flex_attention, compiled, against sdpa on rows that share a prompt: log-probabilities and, on a GPU, gradients, for
prompts of changing lengths, with the seconds of both and how many graphs were compiled. torch compiles for the first
length, again for the second with lengths that may change, and should not for any other.

```bash
.venv/bin/python benchmarks/flex_attention.py --device cuda  # needs a CUDA GPU
.venv/bin/python benchmarks/flex_attention.py --device cpu   # needs a C++ compiler and AVX-512; has no backward
```
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, LlamaConfig, set_seed

from trl_dro.model.likelihood import completion_logps
from trl_dro.model.shared_prefix import PackedModel


# In float32, of sums in another order; in bfloat16, of 8 bits.
TOLERANCES = {"cpu": 1e-3, "cuda": 0.1}
LENGTHS = {"cpu": [40, 61, 90], "cuda": [700, 1100, 1501, 2600, 3300]}
NUM_COMPLETIONS, COMPLETION = 8, 25


def groups(length: int, vocab_size: int) -> list[list[tuple[list[int], list[int]]]]:
    """One prompt with several completions."""
    draw = torch.Generator().manual_seed(length)
    prompt, *completions = (
        torch.randint(3, vocab_size, (size,), generator=draw).tolist()
        for size in (length, *[COMPLETION] * NUM_COMPLETIONS)
    )
    return [[(prompt, completion) for completion in completions]]


def measure(attention: str, device: torch.device, config: LlamaConfig) -> dict[str, Any]:
    """Log-probabilities and gradients at every length, then the seconds of once more."""
    set_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype).to(device)
    packed = PackedModel(model, model.config, 0, device, dtype)
    weight = model.model.layers[0].self_attn.q_proj.weight

    def once(length: int) -> tuple[Tensor, Tensor | None]:
        with torch.set_grad_enabled(device.type != "cpu"):
            logps = completion_logps(packed.completion_logits(groups(length, config.vocab_size)))
        if device.type == "cpu":
            return logps, None
        model.zero_grad()
        logps.sum().backward()
        torch.cuda.synchronize()
        return logps.detach().float().cpu(), weight.grad.float().cpu()

    counters.clear()
    found: dict[str, Any] = {"logps": [], "gradients": [], "graphs": [], "seconds": []}
    for length in LENGTHS[device.type]:
        logps, gradient = once(length)
        found["logps"].append(logps)
        found["gradients"].append(gradient)
        found["graphs"].append(counters["stats"]["unique_graphs"])
    for length in LENGTHS[device.type]:
        start = time.perf_counter()
        once(length)
        found["seconds"].append(time.perf_counter() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(LENGTHS), default="cuda")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA GPU and this machine has none: try --device cpu")
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=8192,
    )
    flex, sdpa = (
        measure(attention, torch.device(arguments.device), config) for attention in ("flex_attention", "sdpa")
    )
    rows = []
    for i, length in enumerate(LENGTHS[arguments.device]):
        logps = float((flex["logps"][i] - sdpa["logps"][i]).norm() / sdpa["logps"][i].norm())
        gradients = None
        if sdpa["gradients"][i] is not None:
            gradients = float((flex["gradients"][i] - sdpa["gradients"][i]).norm() / sdpa["gradients"][i].norm())
        row = {"length": length, "logps": logps, "gradients": gradients, "graphs": flex["graphs"][i]}
        rows.append(row | {"seconds": flex["seconds"][i], "sdpa_seconds": sdpa["seconds"][i]})
        print(
            f"prompt of {length} tokens: relative difference of log-probabilities {logps:.1e}, of gradients "
            f"{'not computed' if gradients is None else f'{gradients:.1e}'}; {row['graphs']} graphs so far; "
            f"{flex['seconds'][i]:.3f} s, sdpa {sdpa['seconds'][i]:.3f} s"
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    worst = max(value for row in rows for value in (row["logps"], row["gradients"]) if value is not None)
    if not worst < TOLERANCES[arguments.device]:
        sys.exit(f"flex_attention differs from sdpa by {worst:.1e}")


if __name__ == "__main__":
    main()
