# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console

from trl_dro.model.sampling import PermutationSamples
from trl_dro.model.shared_prefix import TokenCount
from trl_dro.trainer.logs import RunningMeans, comparison_table, permutation_rows, permutation_table, save_permutations


@pytest.fixture
def means():
    return RunningMeans(Accelerator(cpu=True))


def test_means_are_weighted_by_their_counts_and_forgotten_once_read(means):
    means.add("loss", 3.0)
    means.add("loss", torch.tensor(5.0, requires_grad=True))
    means.add("speed", torch.tensor(100), 2.0)
    means.add("speed", 20, 4.0)
    assert means.pop() == {"loss": 4.0, "speed": 20.0}
    assert means.pop() == {}


def test_every_element_counts_alike(means):
    means.add_all("ess", torch.tensor([1.0, 2.0, 3.0]))
    means.add_all("ess", torch.tensor([10.0]))
    means.add_all("share", torch.tensor([True, False, False, True]))
    assert means.pop() == {"ess": 4.0, "share": 0.5}


def test_a_quantity_without_values_is_left_out(means):
    means.add_all("elbo", torch.zeros(0))
    assert means.pop() == {}
    means.add_all("elbo", torch.zeros(0))
    means.add_all("elbo", torch.tensor([2.0]))
    assert means.pop() == {"elbo": 2.0}


def test_totals_do_not_change_with_the_tensor_that_was_added(means):
    tokens = torch.tensor(7)
    means.add("tokens", tokens)
    tokens.zero_()
    assert means.pop() == {"tokens": 7.0}


def test_tokens_of_processes_add_up_and_their_seconds_do_not():
    two = SimpleNamespace(
        device=torch.device("cpu"), num_processes=2, reduce=lambda sums, reduction: {"sum": 2 * sums}[reduction]
    )
    means = RunningMeans(two)
    means.add_speed({"e_step": 1.0, "m_step": 3.0}, TokenCount(tokens=80, padded=100))
    assert means.pop() == {
        "e_step_seconds": 1.0,
        "m_step_seconds": 3.0,
        "tokens_per_second": 2 * 80 / 4.0,
        "padding_share": 0.2,
    }


def test_means_are_over_all_processes():
    doubled = SimpleNamespace(device=torch.device("cpu"), reduce=lambda sums, reduction: {"sum": 2 * sums}[reduction])
    means = RunningMeans(doubled)
    means.add("loss", 3.0, 2.0)
    assert means.pop() == {"loss": 1.5}


def make_rows():
    questions = [
        {
            "question": "who [bold]wrote[/bold] it?",
            "documents": [{"title": "[b]Anna[/b]", "text": "x"}, {"title": None, "text": "y"}, {"text": "z"}],
        },
        {"question": [{"role": "user", "content": "when?"}], "documents": [{"title": t, "text": t} for t in "abc"]},
    ]
    permutations = torch.tensor([[[1, 2], [3, 1]], [[2, 3], [1, 2]]])
    samples = PermutationSamples(permutations, torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]), torch.zeros(2, 2))
    weights = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    answer_logps = torch.tensor([[-5.0, -6.0], [-7.0, -8.0]])
    return permutation_rows(9, questions, [["Anna", "A."], ["1907"]], samples, answer_logps, weights)


def test_rows_join_question_permutation_and_weight():
    rows = make_rows()
    assert len(rows) == 4
    assert rows[1] == {
        "step": 9,
        "question": "who [bold]wrote[/bold] it?",
        "answer": "Anna",
        "permutation": "[3] > [1]",
        "titles": ["z", "[b]Anna[/b]"],
        "logp": -2.0,
        "answer_logp": -6.0,
        "weight": 0.75,
    }
    assert rows[2]["question"] == "User: when?" and rows[2]["titles"] == ["b", "c"]


def test_table_has_the_heaviest_permutation_first_and_shows_brackets():
    table = permutation_table(make_rows()[:2])
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    console.file.close()
    text = console.export_text()
    assert "who [bold]wrote[/bold] it?" in text and "A: Anna" in text and "Step 9" in text
    assert text.index("[3] > [1]") < text.index("[1] > [2]")
    heaviest = next(line for line in text.splitlines() if "[3] > [1]" in line)
    assert all(value in heaviest for value in ("0.750", "-2.00", "-6.00", ", [b]Anna[/b]"))


def test_permutations_are_kept_as_json_lines(tmp_path):
    rows = make_rows()
    save_permutations(rows, tmp_path, report_to=[])
    lines = (tmp_path / "_permutations" / "step-9.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows


@pytest.mark.parametrize("backend", ["wandb", "trackio"])
def test_permutations_go_to_the_trackers_that_are_reported_to(tmp_path, monkeypatch, backend):
    logged = []
    fake = SimpleNamespace(log=logged.append, Table=lambda dataframe: dataframe)
    monkeypatch.setitem(sys.modules, backend, fake)
    save_permutations(make_rows(), tmp_path, report_to=["tensorboard"])
    assert logged == []
    save_permutations(make_rows(), tmp_path, report_to=[backend])
    assert len(logged) == 1 and list(logged[0]["permutations"]["weight"]) == [0.25, 0.75, 1.0, 0.0]


def test_comparison_shows_percentages_bounds_and_the_retrievers_recall():
    before = {"eval_em": 0.1, "eval_f1": 0.2, "eval_contains": 0.25, "eval_elbo": -5.0}
    before |= {"eval_recall@1": 0.3, "eval_recall@5": 0.4}
    before |= {"eval_retriever_recall@1": 0.25, "eval_retriever_recall@5": 0.45, "eval_iwae_bound": -4.0}
    after = {name: value + 0.5 for name, value in before.items()}
    table = comparison_table(before, after)
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows == [
        ("exact match, %", "", "10.0", "60.0", "+50.0"),
        ("F1, %", "", "20.0", "70.0", "+50.0"),
        ("contains answer, %", "", "25.0", "75.0", "+50.0"),
        ("Recall@1, %", "25.0", "30.0", "80.0", "+50.0"),
        ("Recall@5, %", "45.0", "40.0", "90.0", "+50.0"),
        ("ELBO, nats", "", "-5.00", "-4.50", "+0.50"),
        ("IWAE bound, nats", "", "-4.00", "-3.50", "+0.50"),
    ]
