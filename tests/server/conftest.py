# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import importlib.util

import pytest

from trl_dro import LoadOptions, RAGPipeline

from ..test_faults import make_trainer


# Without the extra `serve` there is nothing to import here but the limits.
if any(importlib.util.find_spec(name) is None for name in ("fastapi", "prometheus_client", "uvicorn")):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def pipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder, max_answer_length=12).save_model()
    return RAGPipeline.from_pretrained(folder, options=LoadOptions(device="cpu"), max_prompt_length=400)


@pytest.fixture(scope="module")
def server(pipe):
    from .serving import Server

    with Server(pipe) as running:
        yield running
