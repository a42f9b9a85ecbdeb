# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Direct Retrieval-augmented Optimization (DRO) for TRL: both roles of a RAG system trained on the right answer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .system.pipeline import RAGPipeline
    from .system.run_folder import LoadOptions
    from .trainer.dro_config import DROConfig
    from .trainer.dro_trainer import DROTrainer


__version__ = "0.1.0.dev0"

__all__ = ["DROConfig", "DROTrainer", "LoadOptions", "RAGPipeline"]

# Imported at first use: data and retrieval need no torch, which takes seconds to import.
_MODULES = {
    "DROConfig": "trainer.dro_config",
    "DROTrainer": "trainer.dro_trainer",
    "LoadOptions": "system.run_folder",
    "RAGPipeline": "system.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
