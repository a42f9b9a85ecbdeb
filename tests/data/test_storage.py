# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import threading
import time

import pytest

from trl_dro.data.storage import build_once, content_key, file_key, whole_folder


def test_equal_values_have_equal_keys_and_others_do_not():
    assert content_key({"a": 1, "b": [2]}) == content_key({"b": [2], "a": 1})
    keys = {
        content_key(*parts) for parts in (("ab", "c"), ("a", "bc"), ("abc",), (1,), ("1",), (1.5,), (None,), ([],))
    }
    assert len(keys) == 8


def test_key_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "a").write_text("same")
    (tmp_path / "b").write_text("same")
    (tmp_path / "c").write_text("same ")
    assert file_key(tmp_path / "a") == file_key(tmp_path / "b") != file_key(tmp_path / "c")


def test_a_folder_is_there_only_when_it_is_whole(tmp_path):
    with pytest.raises(KeyboardInterrupt), build_once(tmp_path / "folder") as partial:
        (partial / "first").write_text("1")
        raise KeyboardInterrupt
    assert not (tmp_path / "folder").exists()
    with build_once(tmp_path / "folder") as partial:
        assert [path.name for path in partial.iterdir()] == ["first"]  # to go on from
        (partial / "second").write_text("2")
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["first", "second"]
    with build_once(tmp_path / "folder") as partial:
        assert partial is None


def test_what_a_killed_process_left_is_not_in_a_whole_folder(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "shard") as temporary:
        (temporary / "torn").write_text("1")
        raise KeyboardInterrupt
    assert not (tmp_path / "shard").exists()
    with whole_folder(tmp_path / "shard") as temporary:
        (temporary / "good").write_text("1")
    assert [path.name for path in (tmp_path / "shard").iterdir()] == ["good"]


def test_two_that_build_the_same_folder_take_turns(tmp_path, caplog):
    built = []

    def build():
        with build_once(tmp_path / "folder") as partial:
            if partial is not None:
                built.append(partial)
                time.sleep(0.3)

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1 and (tmp_path / "folder").is_dir()
    assert "waiting for it" in caplog.text
