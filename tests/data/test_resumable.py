# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import json

import pytest
from datasets import Dataset

from trl_dro.data.resumable import complete_rows, fingerprint


def squares(asked, stop_at=None):
    """Work on rows one at a time, which is interrupted at one of them."""

    def work(left):
        for row in left:
            asked.append(row)
            if row == stop_at:
                raise KeyboardInterrupt
            yield [row], [{"square": row * row}]

    return work


def test_rows_are_made_once_whatever_interrupts(tmp_path):
    path, asked = tmp_path / "out" / "rows.jsonl", []
    with pytest.raises(KeyboardInterrupt):
        complete_rows(path, 5, {"a": 1}, squares(asked, stop_at=3), "Squaring")
    assert not path.exists()
    with open(tmp_path / "out" / "rows.partial.jsonl", "a") as file:
        file.write('{"row": 3, "squ')  # a line that a kill cut
    rows = complete_rows(path, 5, {"a": 1}, squares(asked), "Squaring")
    assert asked == [0, 1, 2, 3, 3, 4]
    assert rows == [{"row": row, "square": row * row} for row in range(5)]
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    assert sorted(each.name for each in path.parent.iterdir()) == ["rows.jsonl", "settings.json"]
    assert complete_rows(path, 5, {"a": 1}, None, "Squaring") == rows


def test_results_of_other_settings_are_not_mixed(tmp_path):
    complete_rows(tmp_path / "rows.jsonl", 1, {"a": 1}, squares([]), "Squaring")
    with pytest.raises(ValueError, match="holds results with a=1, not 2: name another output_dir"):
        complete_rows(tmp_path / "rows.jsonl", 1, {"a": 2}, squares([]), "Squaring")
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match="results without settings.json"):
        complete_rows(tmp_path / "rows.jsonl", 1, {"a": 1}, squares([]), "Squaring")


def test_fingerprint_is_that_of_the_columns_asked_for():
    rows = [{"question": "a", "documents": ["x"], "id": 1}]
    same, other = [{**rows[0], "id": 2}], [{**rows[0], "question": "b"}]
    prints = [fingerprint(Dataset.from_list(each), ("question", "documents")) for each in (rows, same, other)]
    assert prints[0] == prints[1] != prints[2]
