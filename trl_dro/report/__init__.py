# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""A run on one page."""

from .report import write_report


__all__ = ["write_report"]
