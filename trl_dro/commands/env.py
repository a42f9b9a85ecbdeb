# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""`trl-dro env`: versions, devices and extras, as a bug report needs them."""

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

import torch
from packaging.requirements import Requirement

from .. import __version__


PACKAGES = ("torch", "trl", "transformers", "peft", "accelerate", "datasets", "evaluate")

# What each extra of pyproject.toml adds.
EXTRAS = {
    "quantization": "bases in 4 or 8 bits (QLoRA), 8-bit optimizers",
    "colbert": "retrieval with ColBERT",
    "deepspeed": "optimizer states spread over GPUs by ZeRO",
    "dense": "retrieval with sentence-transformers",
    "documents": "corpora of HTML and PDF files",
    "plots": "figures of the demo and of the benchmarks, `trl-dro report`",
    "docs": "`make docs`",
    "ranking": "measures of rankings, e.g. nDCG@5",
    "qdrant": "candidates from a collection of Qdrant",
    "langchain": "the selector as a LangChain document compressor",
    "llama-index": "the selector as a LlamaIndex node postprocessor",
    "rerankers": "the selector as a ranker of rerankers",
    "serve": "`trl-dro serve`",
    "dev": "tests, types and lint",
}


@dataclass
class EnvironmentArguments:
    """No settings."""


def print_environment(args: EnvironmentArguments | None = None) -> None:
    """Prints versions, devices, and which extras are installed: paste it into a bug report."""
    lines = [("platform", platform.platform()), ("python", platform.python_version()), ("trl_dro", __version__)]
    lines += [(name, installed(name) or "not installed") for name in PACKAGES]
    lines += [("devices", devices())]
    for extra, adds in EXTRAS.items():
        found = {name: installed(name) for name in extra_packages(extra)}
        missing = [name for name, number in found.items() if number is None]
        state = f"not installed ({', '.join(missing)})" if missing else ", ".join(f"{n} {v}" for n, v in found.items())
        lines.append((f"[{extra}]", f"{adds}: {state}"))
    width = max(len(name) for name, _ in lines)
    print("\n".join(f"{name:{width}}  {value}" for name, value in lines))


def installed(package: str) -> str | None:
    """Version of a package, or `None` if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def extra_packages(extra: str) -> list[str]:
    """Packages that an extra of this package asks for."""
    asked = [Requirement(each) for each in requires("trl_dro") or []]
    return [each.name for each in asked if each.marker and each.marker.evaluate({"extra": extra})]


def devices() -> str:
    """Accelerators with their memory, or the CPU."""
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        return ", ".join(f"{each.name} ({each.total_memory / 2**30:.0f} GiB)" for each in found)
    if torch.accelerator.is_available():
        return f"{torch.accelerator.device_count()} x {torch.accelerator.current_accelerator()}"
    return f"CPU, {torch.get_num_threads()} threads"
