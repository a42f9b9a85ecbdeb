# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
from pathlib import Path

import pytest
import torch

from trl_dro.trainer.fitting import ScoredQuestions, ScoreWeights


BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    pytest.importorskip("matplotlib", reason="figures need trl_dro[plots]")
    monkeypatch.syspath_prepend(BENCHMARKS)


def test_a_document_is_ranked_by_both_numbers():
    from selector_fit import ranked

    questions = ScoredQuestions(
        torch.tensor([[0.0, -10.0, -20.0], [0.0, -10.0, -20.0]]),
        torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 3.0]]),
        torch.tensor([[[1], [2]]] * 2),
        torch.zeros(2, 2),
    )
    relevant = torch.tensor([[False, True], [False, True]])
    found, logp = ranked(ScoreWeights(0.1, 0.5), questions, relevant)
    assert found == [0.0, 1.0]
    expected = torch.tensor([[-1.0, -2.0 + 0.5], [-1.0, -2.0 + 1.5]]).log_softmax(dim=1)[:, 1].mean()
    assert logp == pytest.approx(expected.item())


def test_the_table_has_a_row_for_each_number_of_questions(capsys):
    from selector_fit import main

    main(["--quick"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [(row[0].strip("| "), int(row[1])) for row in rows] == [
        (s, k) for s in ("rank", "score") for k in (0, 4, 8)
    ]
    assert {tuple(row[2:4]) for row in rows if row[1] == "0"} == {("0.1", "1")}
    assert all(float(row[2]) != 0.1 for row in rows if row[1] != "0")
