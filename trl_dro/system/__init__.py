# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""What a trained system is: its folder, its settings, its page on the Hub, and how it answers."""

from .pipeline import RAGPipeline
from .rag_config import RAGConfig
from .run_folder import LoadOptions, export_merged


__all__ = ["LoadOptions", "RAGConfig", "RAGPipeline", "export_merged"]
