# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import itertools
import json
import math
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console

from trl_dro import DROConfig, DROTrainer

from ..tiny_models import bpe_tokenizer, tiny_llama


BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    pytest.importorskip("matplotlib", reason="figures need trl_dro[plots]")
    pytest.importorskip("scipy", reason="intervals need trl_dro[dev]")
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture
def make_trainer(tmp_path):
    def make(trainer=DROTrainer, **settings):
        settings = {
            "num_selected": 2,
            "max_candidates": 4,
            "num_permutations": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "max_steps": 2,
            "save_strategy": "no",
            "logging_strategy": "no",
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
        } | settings
        tokenizer = bpe_tokenizer(split_digits=False)
        documents = [{"title": f"number {j}", "text": f"number {j} was born as Anna {j}."} for j in range(4)]
        records = [
            {"question": f"who wrote number {i}?", "answers": [f"Anna {i}"], "documents": documents} for i in range(4)
        ]
        torch.manual_seed(0)
        return trainer(
            tiny_llama(tokenizer),
            DROConfig(output_dir=str(tmp_path / "run"), **settings),
            Dataset.from_list(records),
            Dataset.from_list(records),
            tokenizer,
            LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False),
        )

    return make


def row(iteration, run="a", experiment="iterations", setting="joint", **more):
    return {
        "experiment": experiment,
        "setting": setting,
        "world_seed": 0,
        "seed": 0,
        "iteration": iteration,
        "iterations": 1,
        "run": run,
        **more,
    }


def test_a_line_cut_off_and_rows_of_a_run_cut_short_are_dropped(tmp_path):
    from learning_report import Results

    path = tmp_path / "results.jsonl"
    rows = [row(0), row(1), row(0, run="b")]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"experiment": "iter')
    assert Results(path).rows == rows[:2]
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows[:2]


def test_a_last_line_without_its_end_is_not_written_on(tmp_path):
    from learning_report import Results

    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(row(0)) + "\n" + json.dumps(row(1)))
    Results(path).add(row(0, run="b"))
    assert [json.loads(line) for line in path.read_text().splitlines()] == [row(0), row(1), row(0, run="b")]


def test_a_broken_line_amid_results_is_named(tmp_path):
    from learning_report import Results

    path = tmp_path / "results.jsonl"
    path.write_text("{broken\n" + json.dumps(row(0)) + "\n")
    with pytest.raises(ValueError, match="line 1: is not JSON .* remove the line"):
        Results(path)


def test_a_run_is_executed_once_for_all_experiments_and_calls(tmp_path, monkeypatch):
    import learning

    executed = []

    class FakeRun:
        def __init__(self, setting, *_):
            self.setting = setting

        def execute(self, record):
            executed.append(self.setting.name)
            for iteration in range(6):
                record(iteration, {"em": 0.5, "recall@1": 0.5, "iwae_bound": -1.0})

    monkeypatch.setattr(learning, "Run", FakeRun)
    monkeypatch.setattr(learning, "data_digest", lambda *world: str(world))
    size = learning.Size()
    experiments = {name: learning.all_experiments(size)[name] for name in ("iterations", "estimators", "estimation")}
    for _ in range(2):
        rows = learning.run_all(experiments, size, 1, 0, tmp_path)
    assert sorted(executed) == sorted(
        ["joint", "w/o selector", "w/o generator", "SFT only", "decoupled", "decoupled, documents labelled"]
        + ["rws", "vimco", "distinct", "rws_centered, m=2", "rws, m=2", "mean likelihood", "T=0.7"]
        + ["T=0.7, not corrected", "E-step per 4 updates", "Algorithm 1", "Algorithm 1, rws"]
    )
    counts = Counter((r["experiment"], r["setting"]) for r in rows)
    assert counts["iterations", "joint"] == counts["estimators", "rws_centered"] == 6


def test_runs_are_told_apart_by_all_that_changes_them(monkeypatch):
    import learning

    monkeypatch.setattr(learning, "data_digest", lambda *world: str(world))

    size = learning.Size()
    settings = [setting for settings in learning.all_experiments(size).values() for setting in settings]
    joint = [s.name for s in settings if learning.run_id(s, size, 0, 0) == learning.run_id(settings[0], size, 0, 0)]
    assert joint == ["joint", *2 * ["rws_centered"], "permutations, single-hop", "top 10", "all K documents"]
    ids = {learning.run_id(settings[0], s, w, seed) for s in (size, learning.QUICK) for w in (0, 1) for seed in (0, 1)}
    assert len(ids) == 8


def test_settings_that_select_fewer_documents_are_shown_by_their_number(tmp_path):
    from learning_report import write_report

    scores = {"em": 0.5, "recall@1": 0.5, "iwae": -1.0, "seconds": 1.0}
    rows = [
        row(i, setting=setting, documents=documents - i, **scores)
        for setting, documents in (("all", 3.0), ("cost 0.5", 2.0))
        for i in (0, 1)
    ]
    assert tmp_path / "documents_world0.png" in write_report(rows, tmp_path)
    assert re.search(r"\| cost 0.5 .* 1.00 \|    1.00 \| ", (tmp_path / "tables.md").read_text())
    assert tmp_path / "documents_world0.png" not in write_report([r | {"documents": 3.0} for r in rows], tmp_path)


def test_the_size_is_changed_by_name(tmp_path, monkeypatch, capsys):
    import learning

    sizes = []
    monkeypatch.setattr(learning, "run_all", lambda experiments, size, *_: sizes.append(size) or [])
    learning.main(["--quick", "--size", "updates=3", "num_eval=7", "--out", str(tmp_path)])
    assert sizes == [replace(learning.QUICK, updates=3, num_eval=7)]
    with pytest.raises(SystemExit):
        learning.main(["--size", "batch=3", "--out", str(tmp_path)])
    assert "--size batch=3: must be NAME=NUMBER, of Size(num_candidates=10" in capsys.readouterr().err


def test_intervals_are_students():
    from learning_report import cell, interval

    center, half = interval([1.0, 2.0, 3.0])
    assert center == 2.0
    assert half == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)  # t of two degrees of freedom, from a table
    assert cell([0.5], scale=100) == "50.0"


def test_the_rise_of_the_bound_is_paired_by_seed(tmp_path):
    from learning_report import bound_table

    rows = [row(i, iwae=-9.0 + seed + rise) | {"seed": seed} for seed in (0, 1) for i, rise in ((0, 0), (1, 2))]
    console = Console(width=100, record=True, file=(tmp_path / "table").open("w"))
    console.print(bound_table(rows))
    # Seeds that differ by a nat both gained two: the mean is uncertain, the rise is not.
    assert "-8.50 ± 6.35" in console.export_text() and "+2.00 ± 0.00" in (tmp_path / "table").read_text()


def test_documents_scored_alone_are_drawn_without_repetition_with_the_probabilities_given(make_trainer):
    from learning_variants import DocumentwiseTrainer

    trainer = make_trainer(DocumentwiseTrainer)
    questions = [trainer.train_dataset[0]]
    trainer.model.eval()
    with torch.no_grad():
        alone = trainer.rag.document_logps(questions)[0].exp()
    assert alone.sum().item() == pytest.approx(1, abs=1e-5)
    samples = trainer.rag.sample(questions, 20000, seeds=[1])
    drawn = Counter(map(tuple, samples.permutations[0].tolist()))
    for first, second in itertools.permutations(range(4), 2):
        expected = (alone[first] * alone[second] / (1 - alone[first])).item()
        assert drawn[first + 1, second + 1] / 20000 == pytest.approx(expected, abs=0.015)
    of_first = (samples.permutations[0] == samples.permutations[0, 0]).all(-1)
    first, second = (samples.permutations[0, 0] - 1).tolist()
    expected = (alone[first] * alone[second] / (1 - alone[first])).log().item()
    assert samples.logps[0][of_first].tolist() == pytest.approx([expected] * int(of_first.sum()), abs=1e-4)
    greedy = trainer.rag.sample(questions, 1, greedy=True).permutations[0, 0]
    assert (greedy - 1).tolist() == alone.topk(2).indices.tolist()


def test_scoring_documents_alone_draws_the_selector_towards_their_likelihoods(make_trainer):
    from learning_variants import DocumentwiseTrainer

    trainer = make_trainer(DocumentwiseTrainer, max_steps=30, generator_learning_rate=0.0)
    questions = list(trainer.train_dataset)
    targets = [question["answers"] for question in questions]

    def divergence():
        trainer.model.eval()
        with torch.no_grad():
            documents = torch.arange(1, len(questions[0]["documents"]) + 1).expand(len(questions), -1).unsqueeze(-1)
            likelihoods = trainer.rag.answer_logps(questions, targets, documents)
            aim = likelihoods.log_softmax(-1)
            return (aim.exp() * (aim - trainer.rag.document_logps(questions))).sum(-1).mean().item()

    before = divergence()
    trainer.train()
    assert divergence() < 0.75 * before


def test_gradient_variance_falls_with_m_and_leaves_no_gradient_behind(make_trainer):
    from learning_variants import estimator_variance

    trainer = make_trainer()
    variances = estimator_variance(trainer, repeats=20, num_questions=2)
    assert variances["weight_variance@1"] == variances["rws_centered_gradient_variance@1"] == 0
    assert variances["generator_gradient_variance@16"] < 0.5 * variances["generator_gradient_variance@1"]
    assert variances["rws_centered_gradient_variance@16"] < variances["rws_gradient_variance@1"]
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_reliance_asks_with_another_name_of_the_same_kind_in_the_passages(make_trainer, monkeypatch):
    from learning_variants import context_reliance

    trainer = make_trainer()
    shown = []

    def answer(questions, permutations, *_):
        shown.extend(questions)
        return [question["documents"][0]["text"].split()[-1] for question in questions]

    monkeypatch.setattr(trainer.rag, "answer", answer)
    reliance = context_reliance(trainer, repeats=1)
    assert reliance["changed_share"] == len(shown) / 4 > 0
    for question in shown:
        assert not any(question["answers"][0] in document["text"] for document in question["documents"])
    assert reliance["keeps"] == 0


def test_two_hop_questions_have_both_passages_and_rivals_of_the_second_among_their_candidates():
    from learning import Size, load_world

    size = Size(num_train=4, num_eval=20)
    rivals = 0
    for dataset in load_world(size, 0, True, 6, 1.0, False):
        for record in dataset:
            texts = {document["id"]: set(document["text"].split()) for document in record["documents"]}
            assert len(texts) == 6
            first, second = (texts[passage] for passage in record["positive_ids"])
            # "The Finnish poet was educated by …": the nationality and the relation, and the words around.
            rivals += sum(len(text & second) >= 4 for text in texts.values()) - 1
            assert first != second
    assert rivals / 24 > 2.5
    assert [len(dataset) for dataset in load_world(size, 0, False, 10, 0.5, False)] == [4, 20]


def test_shuffled_answers_are_the_same_answers_elsewhere():
    from learning import shuffle_answers

    rng = random.Random(0)
    dataset = Dataset.from_list([{"question": f"{i}", "answers": [f"{rng.random()}"]} for i in range(50)])
    shuffled = shuffle_answers(dataset, seed=0)
    assert sorted(shuffled["answers"]) == sorted(dataset["answers"])
    assert sum(a == b for a, b in zip(shuffled["answers"], dataset["answers"], strict=True)) < 10
