# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import json
import shutil

import pytest

from trl_dro import LoadOptions, RAGPipeline
from trl_dro.commands.evaluate import EvaluationArguments, evaluate
from trl_dro.commands.predict import PredictArguments, predict
from trl_dro.data import DatasetError
from trl_dro.evaluation import evaluation

from ..test_faults import TOKENIZER, make_trainer
from ..tiny_models import tiny_llama
from ..trainer.test_dro_trainer import make_dataset


@pytest.fixture
def questions(tmp_path):
    """Questions with documents in a file, and nobody knows the answers."""
    rows = [{name: row[name] for name in ("question", "documents")} for row in make_dataset(7).to_list()]
    rows = [{"id": f"q{i}", **row} for i, row in enumerate(rows)]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(folder, tmp_path, **settings):
    return PredictArguments(model=str(folder), output_dir=str(tmp_path / "out"), device="cpu", **settings)


def test_answers_are_those_of_the_pipeline(folder, questions, tmp_path):
    predictions = predict(arguments(folder, tmp_path, questions=str(questions), tokens_per_batch=500))
    assert [
        json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    ] == predictions
    assert [row["id"] for row in predictions] == [f"q{i}" for i in range(7)]
    pipe = RAGPipeline.from_pretrained(folder, options=LoadOptions(device="cpu"))
    for row, line in zip(predictions, questions.read_text().splitlines(), strict=True):
        record = json.loads(line)
        output = pipe(record["question"], documents=record["documents"])
        assert row["answer"] == output.answer
        assert row["selected"] == [document.position for document in output.documents]
        for name in ("id", "title", "text"):
            assert row[f"selected_{name}s"] == [getattr(document, name) for document in output.documents]
        assert row["citations"] == [vars(citation) for citation in output.citations]
        assert row["probabilities"] == pytest.approx([document.probability for document in output.documents], abs=1e-4)


def test_answers_by_a_sum_are_those_of_the_pipeline(folder, questions, tmp_path):
    predictions = predict(arguments(folder, tmp_path, questions=str(questions), answer_permutations=5))
    pipe = RAGPipeline.from_pretrained(folder, options=LoadOptions(device="cpu"), answer_permutations=5)
    records = [json.loads(line) for line in questions.read_text().splitlines()]
    outputs = pipe([r["question"] for r in records], [r["documents"] for r in records])
    assert [(row["answer"], row["selected"]) for row in predictions] == [
        (output.answer, [document.position for document in output.documents]) for output in outputs
    ]
    assert [row["logp"] for row in predictions] == pytest.approx([output.logp for output in outputs], abs=1e-3)


def test_answers_without_support_are_marked_where_that_is_asked(folder, questions, tmp_path):
    plain = predict(arguments(folder, tmp_path / "plain", questions=str(questions)))
    assert not any("gain" in row or "abstained" in row for row in plain)
    marked = predict(arguments(folder, tmp_path, questions=str(questions), min_gain=1e9))
    assert all(row["abstained"] and row["gain"] < 1e9 for row in marked)
    assert [row["answer"] for row in marked] == [row["answer"] for row in plain]


def test_an_interrupted_call_goes_on_and_a_finished_one_loads_no_model(folder, questions, tmp_path, monkeypatch):
    original, asked = RAGPipeline.__call__, []

    def interrupted(self, questions, *args, **kwargs):
        if asked:
            raise KeyboardInterrupt
        asked.extend(questions)
        return original(self, questions, *args, **kwargs)

    args = arguments(folder, tmp_path, questions=str(questions), tokens_per_batch=400)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RAGPipeline, "__call__", interrupted)
        predict(args)
    kept = (tmp_path / "out" / "predictions.partial.jsonl").read_text().count("\n")
    assert 0 < kept == len(asked) < 7
    predictions = predict(args)
    monkeypatch.setattr(RAGPipeline, "from_pretrained", None)
    assert predict(args) == predictions and len(predictions) == 7


def changed_settings(folder, base):
    path = folder / "rag_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_document_length": 3}))


def changed_base(folder, base):
    tiny_llama(TOKENIZER, seed=9).save_pretrained(base)


def changed_adapter(folder, base):
    path = folder / "selector" / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 80'))


@pytest.mark.parametrize(
    "change, name", [(changed_settings, "rag_config"), (changed_base, "base"), (changed_adapter, "weights")]
)
@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_results_of_a_system_that_has_changed_since_are_not_taken_for_its_own(tmp_path, change, name, command):
    tiny_llama(TOKENIZER).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    run, output = tmp_path / "run", str(tmp_path / "out")
    make_trainer(run, model=str(tmp_path / "model"), max_answer_length=8).save_model()
    make_dataset(2).save_to_disk(tmp_path / "data")

    def ask():
        settings = {"dataset_name": str(tmp_path / "data"), "output_dir": output, "device": "cpu"}
        if command == "predict":
            return predict(PredictArguments(model=str(run), **settings))
        return evaluate(EvaluationArguments(model=str(run), **settings))

    ask()
    ask()
    change(run, tmp_path / "model")
    with pytest.raises(ValueError, match=f"holds results with another {name}, which has changed since: name another"):
        ask()


def test_a_mistyped_model_claims_no_folder(folder, questions, tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        predict(arguments(f"{folder}-mistyped", tmp_path, questions=str(questions)))
    assert len(predict(arguments(folder, tmp_path, questions=str(questions)))) == 7


def test_candidates_come_from_a_corpus_where_there_is_one(folder, tmp_path):
    (tmp_path / "questions.jsonl").write_text('{"question": "who wrote book 3"}\n{"question": "who wrote book 5"}\n')
    passages = [{"id": f"p{i}", "title": f"Book {i}", "text": f"Book {i} was written by Anna {i}."} for i in range(8)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(passage) + "\n" for passage in passages))
    settings = {"questions": str(tmp_path / "questions.jsonl"), "corpus": str(tmp_path / "corpus.jsonl")}
    first, second = predict(arguments(folder, tmp_path, max_candidates=4, **settings))
    assert first["id"] is None and set(first["selected"]) <= {1, 2, 3, 4}
    assert all(each.startswith("p") for each in first["selected_ids"] + second["selected_ids"])


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_as_many_candidates_are_retrieved_as_the_run_was_trained_on_or_as_there_are(
    folder, tmp_path, monkeypatch, command
):
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    settings = json.loads((run / "rag_config.json").read_text())
    (run / "rag_config.json").write_text(json.dumps(settings | {"max_candidates": 25}))
    (tmp_path / "questions.jsonl").write_text('{"question": "who wrote book 3", "answers": ["Anna"]}\n')
    seen = []
    for size in (30, 6):
        passages = [{"id": f"p{i}", "text": f"Book {i} of {size} was written by Anna {i}."} for i in range(size)]
        (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(passage) + "\n" for passage in passages))
        asked = {"questions": str(tmp_path / "questions.jsonl"), "corpus": str(tmp_path / "corpus.jsonl")}
        asked |= {"model": str(run), "output_dir": str(tmp_path / f"out-{size}"), "device": "cpu"}
        call = RAGPipeline._select if command == "predict" else evaluation._score_batch

        def counting(*given, call=call):
            seen.append(len(given[-1][0]["documents"]))
            return call(*given)

        with monkeypatch.context() as patch:
            if command == "predict":
                patch.setattr(RAGPipeline, "_select", counting)
                predict(PredictArguments(**asked))
            else:
                patch.setattr(evaluation, "_score_batch", counting)
                evaluate(EvaluationArguments(**asked))
    assert seen == [25, 6]


def test_a_dataset_can_be_asked_and_cut_short(folder, tmp_path):
    make_dataset(5).save_to_disk(tmp_path / "data")
    assert len(predict(arguments(folder, tmp_path, dataset_name=str(tmp_path / "data"), max_questions=2))) == 2


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"question": "who"}', "has no documents; pass --corpus"),
        ('{"question": "", "documents": [{"text": "a"}]}', "line 1, column question: is empty"),
        ('{"question": "who", "documents": []}', "line 1, column documents: must be a non-empty list"),
        ('{"query": "who"}', "line 1"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused_before_a_model_is_loaded(tmp_path, line, message):
    (tmp_path / "questions.jsonl").write_text(line + "\n")
    with pytest.raises(DatasetError, match=message):
        predict(arguments("absent", tmp_path, questions=str(tmp_path / "questions.jsonl")))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "pass either --questions"),
        ({"questions": "q", "dataset_name": "d"}, "pass either --questions"),
        ({"corpus": "c", "dataset_name": "d"}, "leave out --corpus"),
        ({"questions": "q", "max_questions": 0}, "--max_questions 0"),
    ],
)
def test_settings_that_cannot_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PredictArguments(model="run", **settings)


def with_bad_rows(path):
    """Seven questions with three bad ones between them, and the numbers of those."""
    lines = path.read_text().splitlines()
    record = json.loads(lines[0])
    lines.insert(1, '{"question": "cut sho')
    lines.insert(4, json.dumps({**record, "id": "empty", "question": " "}))
    lines.insert(6, json.dumps({**record, "id": "long", "question": "who wrote it " * 2000}))
    path.write_text("\n".join(lines) + "\n")
    return [1, 4, 6]


def test_a_bad_row_stops_before_weights_are_loaded_and_is_named(folder, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(RAGPipeline, "from_pretrained", None)
    bad = with_bad_rows(questions)
    left = questions.read_text().splitlines()
    names = ["row 1: .*line 2: is not valid JSON", r"row 3 \(id 'empty'\): .*", r"row 4 \(id"]
    for number, named in zip(bad, names, strict=True):
        with pytest.raises(DatasetError, match=f"{named}.*; or leave out such rows with --on_error skip") as error:
            predict(arguments(folder, tmp_path, questions=str(questions)))
        assert "\n" not in str(error.value)
        left.pop(number - bad.index(number))
        questions.write_text("\n".join(left) + "\n")
    assert "selector: the prompt has " in str(error.value)
    assert not (tmp_path / "out").exists()


def test_skipped_rows_are_listed_and_the_others_answered_across_a_kill(
    folder, questions, tmp_path, monkeypatch, capsys
):
    expected = predict(arguments(folder, tmp_path / "whole", questions=str(questions)))
    bad = with_bad_rows(questions)
    args = arguments(folder, tmp_path, questions=str(questions), tokens_per_batch=400, on_error="skip")
    original, asked = RAGPipeline.__call__, []

    def interrupted(self, questions, *args, **kwargs):
        if asked:
            raise KeyboardInterrupt
        asked.extend(questions)
        return original(self, questions, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RAGPipeline, "__call__", interrupted)
        predict(args)
    predictions = predict(args)
    assert [row["row"] for row in predictions] == [row for row in range(10) if row not in bad]
    assert [row["id"] for row in predictions] == [f"q{i}" for i in range(7)]
    assert [row["answer"] for row in predictions] == [row["answer"] for row in expected]
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(row["row"], row["id"]) for row in skipped] == [(1, None), (4, "empty"), (6, "long")]
    assert "is not valid JSON" in skipped[0]["reason"] and "raise max_prompt_length" in skipped[2]["reason"]
    assert "3 rows were skipped" in capsys.readouterr().out
    monkeypatch.setattr(RAGPipeline, "from_pretrained", None)
    assert predict(args) == predictions


def test_rows_of_a_saved_dataset_are_skipped_too_and_all_of_them_are_an_error(folder, tmp_path):
    rows = make_dataset(3).to_list()
    rows[1]["documents"] = []
    make_dataset(1).from_list(rows).save_to_disk(tmp_path / "data")
    args = arguments(folder, tmp_path, dataset_name=str(tmp_path / "data"), on_error="skip")
    assert [row["row"] for row in predict(args)] == [0, 2]
    make_dataset(1).from_list([{**row, "question": ""} for row in rows]).save_to_disk(tmp_path / "empty")
    with pytest.raises(DatasetError, match="none of the 3 rows of .* can be asked; row 0: "):
        predict(arguments(folder, tmp_path, dataset_name=str(tmp_path / "empty"), on_error="skip"))
