# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import json
import subprocess
import sys

import pytest
from datasets import Dataset

from trl_dro.data.processes import Processes
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
    assert sorted(each.name for each in path.parent.iterdir()) == [".lock", "rows.jsonl", "settings.json"]
    assert complete_rows(path, 5, {"a": 1}, None, "Squaring") == rows


def test_results_of_other_settings_are_not_mixed(tmp_path):
    complete_rows(tmp_path / "rows.jsonl", 1, {"a": 1}, squares([]), "Squaring")
    with pytest.raises(ValueError, match="holds results with a=1, not 2: name another output_dir"):
        complete_rows(tmp_path / "rows.jsonl", 1, {"a": 2}, squares([]), "Squaring")
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match="results without settings.json"):
        complete_rows(tmp_path / "rows.jsonl", 1, {"a": 1}, squares([]), "Squaring")


def test_an_attempt_that_failed_claims_no_folder(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        complete_rows(tmp_path / "rows.jsonl", 2, {"a": "mistyped"}, squares([], stop_at=0), "Squaring")
    assert len(complete_rows(tmp_path / "rows.jsonl", 2, {"a": 1}, squares([]), "Squaring")) == 2
    assert json.loads((tmp_path / "settings.json").read_text()) == {"a": 1}


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
def test_a_line_separator_in_a_question_ends_no_line(tmp_path, separator):
    def work(left):
        for row in left:
            if row == 2 and len(left) == 3:
                raise KeyboardInterrupt
            yield [row], [{"question": f"who{separator}wrote it?"}]

    path = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        complete_rows(path, 3, {}, work, "Asking")
    rows = complete_rows(path, 3, {}, work, "Asking")
    assert complete_rows(path, 3, {}, None, "Asking") == rows and len(rows) == 3


def test_a_second_process_is_refused_while_the_first_writes_and_none_is_once_it_is_gone(tmp_path):
    code = (
        "import sys, time; from trl_dro.data.storage import alone_in\n"
        "with alone_in(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another process is writing to .*: wait until it ends or stop it"):
            complete_rows(tmp_path / "rows.jsonl", 1, {}, squares([]), "Squaring")
        other.kill()
    assert len(complete_rows(tmp_path / "rows.jsonl", 1, {}, squares([]), "Squaring")) == 1


def test_fingerprint_is_that_of_the_columns_asked_for():
    rows = [{"question": "a", "documents": ["x"], "id": 1}]
    same, other = [{**rows[0], "id": 2}], [{**rows[0], "question": "b"}]
    prints = [fingerprint(Dataset.from_list(each), ("question", "documents")) for each in (rows, same, other)]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_json_does_not_have_are_refused_with_their_row(number, tmp_path):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(ValueError, match=r"row 0 \(id 'q7'\) gave a number that is not finite"):
        complete_rows(path, 1, {}, lambda left: [(left, [{"id": "q7", "probabilities": [number]}])], "Asking")
    assert not path.exists() and (tmp_path / "rows.partial.jsonl").read_text() == ""


def test_what_earlier_processes_left_is_kept_however_many_they_were(tmp_path):
    path, asked = tmp_path / "rows.jsonl", []
    (tmp_path / "settings.json").write_text('{"a": 1}')
    for rank, text in (("", '{"row": 2, "square": 4}\n'), ("-1", '{"row": 0, "square": 0}\n{"ro'), ("-12", "")):
        (tmp_path / f"rows.partial{rank}.jsonl").write_text(text)
    with pytest.raises(KeyboardInterrupt):
        complete_rows(path, 5, {"a": 1}, squares(asked, stop_at=3), "Squaring")
    assert asked == [1, 3]
    # One file from then on, as one process writes it.
    assert [each.name for each in tmp_path.glob("*.partial*")] == ["rows.partial.jsonl"]
    rows = complete_rows(path, 5, {"a": 1}, squares(asked), "Squaring")
    assert rows == [{"row": row, "square": row * row} for row in range(5)] and asked == [1, 3, 3, 4]
    assert sorted(each.name for each in tmp_path.iterdir()) == [".lock", "rows.jsonl", "settings.json"]


def test_results_that_are_there_are_not_replaced_when_a_batch_is_done_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "rows.partial.jsonl").write_text('{"row": 1, "square": "kept"}\n')
    rows = complete_rows(path, 2, {}, lambda left: [([0, 1], [{"square": 0}, {"square": "new"}])], "Squaring")
    assert rows == [{"row": 0, "square": 0}, {"row": 1, "square": "kept"}]


def test_processes_that_do_not_see_one_folder_are_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(Processes, "share", lambda self, make: make())
    monkeypatch.setattr(Processes, "wait", lambda self: None)
    work = squares([])
    with pytest.raises(ValueError, match="3 of 5 results are not in .*, the first of row 2: all processes must write"):
        complete_rows(tmp_path / "rows.jsonl", 5, {}, lambda left: work(left[:2]), "Squaring", (), Processes(0, 2))
