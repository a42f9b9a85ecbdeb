# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
from pathlib import Path

import evaluate
import pytest

import trl_dro.metrics
from trl_dro.metrics import KILTF1, KILTExactMatch, PassageRecall, exact_match, f1


FOLDER = Path(trl_dro.metrics.__file__).parent
PREDICTIONS = ["The Beatles", "Anna Brown", "", "in 1907"]
ANSWERS = [["Queen", "Beatles"], ["Anna"], ["nothing"], ["1907", "1908"]]
DOCUMENTS = [["Queen", "a band"], ["Carl", "by Anna"], ["x", "y"], ["in 1906", "in 1909", "in 1908"]]


def test_modules_report_means_of_the_pure_functions_and_each_example():
    for metric, function, name in ((KILTExactMatch(), exact_match, "em"), (KILTF1(), f1, "f1")):
        expected = [function(*pair) for pair in zip(PREDICTIONS, ANSWERS, strict=True)]
        results = metric.compute(predictions=PREDICTIONS, references=ANSWERS, per_example=True)
        assert results == {name: pytest.approx(sum(expected) / 4), f"{name}_per_example": expected}
        assert metric.compute(predictions=PREDICTIONS, references=ANSWERS).keys() == {name}


def test_a_single_gold_answer_needs_no_list():
    assert KILTExactMatch().compute(predictions=["Anna", "Bob"], references=["anna", "Carl"]) == {"em": 0.5}


def test_batches_add_up():
    metric = KILTF1()
    for prediction, answers in zip(PREDICTIONS, ANSWERS, strict=True):
        metric.add(prediction=prediction, reference=answers)
    assert metric.compute() == KILTF1().compute(predictions=PREDICTIONS, references=ANSWERS)


def test_recall_by_answer_at_every_cutoff():
    results = PassageRecall().compute(documents=DOCUMENTS, references=ANSWERS, ks=[1, 2, 3], per_example=True)
    assert [results[f"recall@{k}"] for k in (1, 2, 3)] == [0.25, 0.5, 0.75]
    assert results["recall@2_per_example"] == [1.0, 1.0, 0.0, 0.0]


def test_recall_by_supporting_id_is_the_share_found():
    recall = PassageRecall("supporting_ids")
    results = recall.compute(documents=[["a", "b", "c"]], references=[["c", "b", "z", "b"]], ks=[1, 2, 3])
    assert results == {"recall@1": 0.0, "recall@2": pytest.approx(1 / 3), "recall@3": pytest.approx(2 / 3)}


def test_recall_of_no_supporting_document_is_refused():
    with pytest.raises(ValueError, match="leave the question out"):
        PassageRecall("supporting_ids").compute(documents=[["a"]], references=[[]])
    with pytest.raises(ValueError, match="choose answers or supporting_ids"):
        PassageRecall("ids")


def test_answers_are_scored_together_by_combine():
    combined = evaluate.combine([KILTExactMatch(), KILTF1()])
    assert combined.compute(predictions=["a dog"], references=[["dog", "cat"]]) == {"em": 1.0, "f1": 1.0}


def test_answers_and_documents_are_scored_together_by_combine():
    combined = evaluate.combine([KILTExactMatch(), KILTF1(), PassageRecall()])
    combined.add_batch(predictions=PREDICTIONS, references=ANSWERS, documents=DOCUMENTS)
    assert combined.compute() == {
        **KILTExactMatch().compute(predictions=PREDICTIONS, references=ANSWERS),
        **KILTF1().compute(predictions=PREDICTIONS, references=ANSWERS),
        **PassageRecall().compute(documents=DOCUMENTS, references=ANSWERS),
    }


@pytest.mark.parametrize("name", ["kilt_exact_match", "kilt_f1"])
def test_answer_metrics_load_by_path(name):
    metric = evaluate.load(str(FOLDER / f"{name}.py"))
    assert list(metric.compute(predictions=["Anna"], references=[["anna"]]).values()) == [1.0]


@pytest.mark.parametrize("config, expected", [(None, 1.0), ("answers", 1.0), ("supporting_ids", 0.5)])
def test_recall_loads_by_path_with_its_configurations(config, expected):
    metric = evaluate.load(str(FOLDER / "passage_recall.py"), config)
    assert metric.compute(documents=[["a"]], references=[["b", "a"]], ks=[1]) == {"recall@1": expected}


def test_results_are_saved_with_evaluate(tmp_path):
    results = KILTExactMatch().compute(predictions=PREDICTIONS, references=ANSWERS)
    assert evaluate.save(tmp_path / "results.json", **results).exists()
