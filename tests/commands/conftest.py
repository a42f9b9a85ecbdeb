# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import pytest

from ..test_faults import make_trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder."""
    folder = tmp_path_factory.mktemp("trained")
    make_trainer(folder, max_answer_length=8).save_model()
    return folder
