# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import json
from pathlib import Path

import pytest
import torch


BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
QUICK = ["--quick", "--bound_permutations", "2"]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    pytest.importorskip("matplotlib", reason="figures need trl_dro[plots]")
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder in which the warm start and SFT on the retriever's documents have run."""
    pytest.importorskip("matplotlib", reason="figures need trl_dro[plots]")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        from real_models import main

        out = tmp_path_factory.mktemp("real_models")
        main([*QUICK, "--out", str(out), "--arms", "sft", "warm_start"])
    return out


def test_runs_start_from_one_warm_start_and_are_not_repeated(finished, monkeypatch):
    import real_models

    rows = [json.loads(line) for line in (finished / "results.jsonl").read_text().splitlines()]
    assert sorted(row["arm"] for row in rows) == ["sft", "warm_start"]
    assert all(row["questions"] == 3 and 0 <= row["em"] <= 1 and row["iwae_bound"] < 0 for row in rows)
    assert len(list((finished / "runs").iterdir())) == 2
    table = (finished / "table.md").read_text()
    assert all(0 <= row["posterior_recall"] <= 1 for row in rows) and "Recall@2 of the posterior" in table
    assert "EM against sft" in table and "| retriever" in table and (finished / "figure.png").stat().st_size > 5000
    monkeypatch.setattr(real_models.Run, "trained", None)  # would be an error
    real_models.main([*QUICK, "--out", str(finished), "--arms", "warm_start", "sft"])
    assert len((finished / "results.jsonl").read_text().splitlines()) == 2


def test_training_settings_do_not_make_another_warm_start(finished):
    from real_models import Settings

    before, after = Settings(), Settings(updates=9, generator_learning_rate=1.0, num_permutations=2)
    assert before.of_arm("warm_start") == after.of_arm("warm_start")
    assert before.of_arm("joint") != after.of_arm("joint")
    assert before.of_arm("warm_start") != Settings(warmup_teacher="retriever").of_arm("warm_start")


def test_taught_gradient_is_that_of_the_teachers_permutation_and_answer(finished):
    from real_models import QUICK as SMALL
    from real_models import Run, Settings, TaughtTrainer, load_data, teacher_ranking

    settings = Settings(quick=True, out=str(finished), **SMALL)
    train, evaluated = load_data(settings)
    record = train[0]
    texts = [record["documents"][rank]["text"] for rank in teacher_ranking(record, "relevant")]
    holds = [record["answers"][0] in text for text in texts]
    assert holds == sorted(holds, reverse=True)

    class Watched(TaughtTrainer):
        def _backward(self, logps):
            seen.append(logps.detach())
            return super()._backward(logps)

    seen: list = []
    run = Run(settings, "decoupled", 0, train, evaluated)
    trainer, _, _ = run.train(Watched, train, {}, None, "watched")
    assert len(seen) == 8 and all(torch.isfinite(logps).all() and (logps < 0).all() for logps in seen)
    # Of the adapters that began at zero, both have moved.
    for role in ("selector", "generator"):
        moved = [p for n, p in trainer.roles.named_parameters(role) if "lora_B" in n]
        assert any(p.abs().sum() > 0 for p in moved)


def test_a_question_without_a_relevant_candidate_teaches_the_selector_nothing(finished):
    from real_models import QUICK as SMALL
    from real_models import Run, Settings, TaughtTrainer, load_data

    settings = Settings(quick=True, out=str(finished), **SMALL | {"warmup_only_informative": True})
    train, evaluated = load_data(settings)
    relevant = [["none"] if row % 2 else [record["documents"][0]["id"]] for row, record in enumerate(train)]
    train = train.remove_columns("positive_ids").add_column("positive_ids", relevant)
    run = Run(settings, "decoupled", 0, train, evaluated)
    taught = {}

    class Watched(TaughtTrainer):
        def _em_step(self, model, inputs):
            seen.clear()
            loss = super()._em_step(model, inputs)
            [row] = inputs.block[inputs.position].rows
            taught[row] = [logps.abs().sum().item() for logps in seen]
            return loss

        def _backward(self, logps):
            seen.append(logps.detach())
            return super()._backward(logps)

    seen: list = []
    run.train(Watched, train, {}, None, "informative")
    assert {row % 2 for row in taught} == {0, 1}
    for row, (generator, selector) in taught.items():
        assert generator > 0 and (selector == 0) == bool(row % 2)


def test_only_arms_whose_selector_learns_from_weights_are_fitted(tmp_path, monkeypatch):
    """The others would have what the ablation is to be without."""
    import real_models

    monkeypatch.setattr(real_models.Run, "train", lambda self, kind, dataset, changes, start, name: (changes, 0.0, []))
    settings = real_models.Settings(quick=True, out=str(tmp_path), selector_fit_questions=5, **real_models.QUICK)
    data = real_models.load_data(settings)
    changes = {arm: real_models.Run(settings, arm, 0, *data).trained()[0] for arm in real_models.ARMS}
    fitted = {arm for arm in changes if (settings.of_arm(arm) | changes[arm]).get("selector_fit_questions")}
    assert fitted == {"joint", "without_generator"}


@pytest.mark.parametrize(
    "arguments, message", [(["--arms", "best"], "choose among warm_start"), (["--evaluate_on", "dev"], "report or")]
)
def test_wrong_settings_are_told_in_one_line(arguments, message):
    from real_models import main

    with pytest.raises(SystemExit, match=message):
        main(arguments)


def test_a_prior_acts_on_every_choice_and_a_large_one_is_the_retrievers_order():
    from real_models_report import found_with_prior

    # Three candidates, one of them chosen: 0.2, 0.3, 0.5; the prior divides by the rank to the power of its weight.
    row = {"relevant": [False, False, True], "selected": [1], "permutation_logps": torch.tensor([0.2, 0.3, 0.5]).log()}
    assert [found_with_prior(row, weight) for weight in (0.0, 0.8, 0.9, 9.0)] == [True, True, False, False]
    # Two chosen, all orders alike: the second choice is among those left.
    row = {"relevant": [False, True, False], "selected": [1, 2], "permutation_logps": [0.0] * 6}
    assert found_with_prior(row, 9.0) and not found_with_prior({**row, "relevant": [False, False, True]}, 9.0)


def test_the_posteriors_recall_is_that_of_its_heaviest_permutation():
    from real_models import recall_of_heaviest

    documents = [{"title": "", "text": text} for text in ("Bo.", "Cleo.", "Ada.")]
    question = {"question": "who", "answers": ["Ada"], "documents": documents}
    permutations = torch.tensor([[1, 2], [2, 3], [1, 0]])  # the last one ends early
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.3, 0.5, 0.2], [0.2, 0.3, 0.5]])
    assert [recall_of_heaviest(question, permutations, each) for each in weights] == [0.0, 1.0, 0.0]


def test_what_cut_documents_still_show_grows_to_all_of_it(tmp_path, capsys):
    from real_models import main

    main(["--quick", "--out", str(tmp_path), "--lengths", "1", "1000"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| 1")]
    assert [row[1] for row in rows] == ["0.0", "100.0"] and not (tmp_path / "results.jsonl").exists()
