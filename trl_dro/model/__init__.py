# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""The latent-variable model: what is computed. Knows no trainer, no config object and nothing of TRL."""

from .codec import PermutationCodec, parse_permutation
from .prompts import PromptBuilder
from .roles import ROLES, load_role_adapters


__all__ = ["ROLES", "PermutationCodec", "PromptBuilder", "load_role_adapters", "parse_permutation"]
