# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import pytest

from trl_dro.data import DatasetError
from trl_dro.retrieval import interface
from trl_dro.retrieval.interface import checkpoint_key, query_text


def test_key_of_a_folder_is_that_of_its_files(tmp_path):
    for name in ("one", "two", "three"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "inner" / "weights").write_text("other" if name == "three" else "same")
    keys = [checkpoint_key(str(tmp_path / name)) for name in ("one", "two", "three")]
    assert keys[0] == keys[1] != keys[2]


def test_key_of_a_hub_checkpoint_is_its_commit(monkeypatch):
    path = "/cache/models--org--name/snapshots/abc123/config.json"
    monkeypatch.setattr(interface, "hf_hub_download", lambda repo, file: path)
    assert checkpoint_key("org/name") == "abc123"


def test_checkpoint_that_is_nowhere_is_refused():
    with pytest.raises(DatasetError, match="'someone/nothing' is no folder here") as info:
        checkpoint_key("someone/nothing")
    assert "\n" not in str(info.value)


def test_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="has no config.json"):
        checkpoint_key(str(tmp_path))


def test_dialogue_is_queried_with_one_turn_per_line():
    turns = [{"role": "user", "content": "bees?"}, {"role": "assistant", "content": "yes"}]
    assert query_text(turns) == "bees?\nyes"
    assert query_text("bees?") == "bees?"
