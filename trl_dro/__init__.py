# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Direct Retrieval-augmented Optimization (DRO) for TRL: both roles of a RAG system trained on the right answer."""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .dro_config import DROConfig
    from .dro_trainer import DROTrainer


__version__ = "0.1.0.dev0"

__all__ = ["DROConfig", "DROTrainer"]


def __getattr__(name: str) -> Any:
    # Imported at first use: data and retrieval need no torch, which takes seconds to import.
    if name == "DROConfig":
        from .dro_config import DROConfig

        return DROConfig
    if name == "DROTrainer":
        from .dro_trainer import DROTrainer

        return DROTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
