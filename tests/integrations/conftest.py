# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import pytest

from trl_dro import LoadOptions, RAGPipeline

from ..test_faults import make_trainer, save_run_that_selects_none
from ..trainer.test_dro_trainer import make_dataset


@pytest.fixture(scope="session")
def pipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("integrations")
    make_trainer(folder).save_model()
    return RAGPipeline.from_pretrained(folder, options=LoadOptions(device="cpu"))


@pytest.fixture(scope="session")
def pipe_of_none(tmp_path_factory, record):
    """A system whose selector selects nothing."""
    folder = tmp_path_factory.mktemp("none")
    save_run_that_selects_none(folder)
    pipe = RAGPipeline.from_pretrained(folder, options=LoadOptions(device="cpu"))
    assert pipe.select([record["question"]], [record["documents"]]) == [[]]
    return pipe


@pytest.fixture(scope="session")
def record():
    """A question whose selection is not the first documents in their order."""
    return make_dataset(1).to_list()[0]


@pytest.fixture(scope="session")
def selection(pipe, record):
    """What the pipeline itself selects, which the frameworks must show."""
    [selected] = pipe.select([record["question"]], [record["documents"]])
    assert [document.position for document in selected] != [1, 2]
    return selected
