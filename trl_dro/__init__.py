# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Direct Retrieval-augmented Optimization (DRO) for TRL: both roles of a RAG system trained on the right answer."""

from .dro_config import DROConfig
from .dro_trainer import DROTrainer
from .pipeline import RAGPipeline
from .run_folder import LoadOptions


__version__ = "0.1.0.dev0"

__all__ = ["DROConfig", "DROTrainer", "LoadOptions", "RAGPipeline"]
