# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import pytest
from huggingface_hub import ModelCard

from trl_dro.system.model_card import build_model_card


def card(**changes):
    arguments = {
        "name": "llama3-dro",
        "repo_id": "me/llama3-dro",
        "bases": ["meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B"],
        "adapters": True,
        "dataset_name": "me/nq",
        "metrics": {"em": 0.4576, "f1": 0.5542, "recall@1": 0.6089, "retriever_recall@1": 0.4971, "loss": 1.0},
        "settings": {"num_selected": 5, "max_candidates": 20, "odd": "a|b\nc"},
        "tags": ["trl", "dro"],
        "paper_id": "2505.03075",
        "citation": "@article{…}",
    }
    return build_model_card(**arguments | changes)


def test_metadata_survives_writing_and_reading(tmp_path):
    card().save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == ["meta-llama/Meta-Llama-3-8B"] and data.datasets == ["me/nq"]
    assert {result.metric_name: result.metric_value for result in data.eval_results} == {
        "Exact match": 45.76,
        "F1": 55.42,
        "Recall@1 of the selection": 60.89,
    }


def test_results_stand_beside_those_of_the_retriever():
    assert "| Recall@1 of the selection | 60.9 | 49.7 |" in card().text and "| Exact match | 45.8 |  |" in card().text


def test_without_an_evaluation_there_are_no_results():
    plain = card(metrics={}, dataset_name=None)
    assert "## Results" not in plain.text and plain.data.eval_results is None and plain.data.datasets is None


@pytest.mark.parametrize(
    "changes, loading",
    [
        ({}, 'AutoModelForCausalLM.from_pretrained("meta-llama/Meta-Llama-3-8B")'),
        ({"bases": []}, 'from_pretrained("me/llama3-dro", subfolder="base")'),
        (
            {"adapters": False, "bases": []},
            'AutoModelForCausalLM.from_pretrained("me/llama3-dro", subfolder="selector")',
        ),
    ],
)
def test_the_card_says_how_to_load_a_role(changes, loading):
    assert loading in card(**changes).text


def test_a_folder_of_this_machine_is_not_told(tmp_path):
    (tmp_path / "llama").mkdir()
    local = card(bases=[str(tmp_path / "llama")], dataset_name=str(tmp_path))
    assert local.data.base_model is None and local.data.datasets is None
    assert str(tmp_path) not in str(local) and '"llama"' in local.text


def test_cells_do_not_break_the_table():
    assert "| `odd` | a\\|b⏎c |" in card().text
