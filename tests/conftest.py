# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Settings and fixtures of all tests: offline, one thread, seeded."""

import os


# Read when the libraries are imported, so set before any import of them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CI", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import set_seed  # noqa: E402


torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    """Seeds Python, numpy and torch, so that a test does not depend on those that ran before it."""
    set_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with samples of real benchmarks, which is kept beside the repository and not in it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the real data samples, a folder shared/data beside the repository, which is absent")
    return folder
