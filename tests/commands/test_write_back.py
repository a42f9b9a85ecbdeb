# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import json

import pytest

from trl_dro.commands.cli import run
from trl_dro.commands.predict import PredictArguments, predict
from trl_dro.commands.write_back import WriteBackArguments, write_back
from trl_dro.data import DatasetError
from trl_dro.system.pipeline import RAGPipeline


@pytest.fixture
def corpus(tmp_path):
    passages = [{"id": f"p{i}", "title": f"Book {i}", "text": f"Book {i} was written by Anna {i}."} for i in range(8)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(passage) + "\n" for passage in passages))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(folder, corpus, tmp_path, *more):
    words = ["write-back", str(tmp_path / "predictions" / "predictions.jsonl"), "--corpus", str(corpus)]
    words += ["--model", str(folder), "--device", "cpu", "--output_dir", str(tmp_path / "out")]
    run([*words, "--cache_dir", str(tmp_path / "cache"), *more])


def test_answers_of_predict_enter_the_corpus_and_leave_it(folder, corpus, tmp_path, monkeypatch, capsys):
    (tmp_path / "questions.jsonl").write_text("".join(f'{{"question": "who wrote book {i}"}}\n' for i in range(4)))
    answer = RAGPipeline._answer

    def right(self, records, watch=None):
        outputs = answer(self, records, watch)
        for output, record in zip(outputs, records, strict=True):
            output.answer = f"Anna {record['question'].split()[-1]}"
        return outputs

    monkeypatch.setattr(RAGPipeline, "_answer", right)
    asked = {"questions": str(tmp_path / "questions.jsonl"), "corpus": str(corpus), "max_candidates": 2}
    predict(PredictArguments(model=str(folder), output_dir=str(tmp_path / "predictions"), device="cpu", **asked))
    before = corpus.read_bytes()

    command(folder, corpus, tmp_path, "--min_gain", "1000")
    assert corpus.read_bytes() == before
    assert {row["gate"] for row in lines(tmp_path / "out" / "refused.jsonl")} == {"entailment"}
    command(folder, corpus, tmp_path, "--min_gain", "-1000")
    written = lines(corpus)[8:]
    assert [row["provenance"]["question"] for row in written] == [f"who wrote book {i}" for i in range(4)]
    assert all(row["provenance"]["system"]["model"] == str(folder) for row in written)
    assert written == lines(tmp_path / "out" / "written.jsonl")
    command(folder, corpus, tmp_path, "--min_gain", "-1000")  # nothing is new now
    assert [row["gate"] for row in lines(tmp_path / "out" / "refused.jsonl")] == ["novelty"] * 4
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["num_written"] == 0
    run(["write-back", "--corpus", str(corpus), "--remove"])
    assert corpus.read_bytes() == before
    out = capsys.readouterr().out
    assert "refused for entailment" in out and "4 passages that were written back are removed" in out


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"question": "who", "answer": "Anna"}', "line 1: has no key citations"),
        ('{"question": "who", "answer": 3, "citations": []}', "line 1: question and answer must be texts"),
        ('{"question": "who", "answer": "Anna", "citations": ["p1"]}', "line 1, key citations: must be a list of"),
        ('{"question": "who", "answer": "Anna", "citations": [{"id": 3}]}', "line 1, key citations: must be a list"),
    ],
)
def test_files_that_predict_did_not_write_are_refused_before_a_model_is_loaded(corpus, tmp_path, line, message):
    (tmp_path / "answers.jsonl").write_text(line + "\n")
    with pytest.raises(DatasetError, match=message):
        write_back(WriteBackArguments(predictions=str(tmp_path / "answers.jsonl"), corpus=str(corpus), model="absent"))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"corpus": "corpus.tsv"}, "only a .jsonl file can be added to"),
        ({"corpus": "c.jsonl"}, "nothing to write back"),
        ({"corpus": "c.jsonl", "predictions": "p"}, "pass either --model"),
        ({"corpus": "c.jsonl", "predictions": "p", "model": "m", "nli_model": "n"}, "pass either --model"),
        ({"corpus": "c.jsonl", "predictions": "p", "remove": True}, "--remove adds nothing"),
        ({"corpus": "c.jsonl", "predictions": "p", "model": "m", "min_entailment": 2.0}, "--min_entailment 2.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        WriteBackArguments(**settings)
