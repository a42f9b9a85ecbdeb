# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import json

import pytest

from trl_dro.commands import questions
from trl_dro.commands.cli import run
from trl_dro.commands.questions import QuestionWritingArguments, write_questions
from trl_dro.data import DatasetError, read_questions
from trl_dro.synthetic import gates
from trl_dro.synthetic.writers import Pair, Written

from ..synthetic.test_writers import chat  # noqa: F401
from ..tiny_models import TOKENIZERS, tiny_llama


@pytest.fixture
def documents(tmp_path):
    folder = tmp_path / "documents"
    folder.mkdir()
    for number in range(10, 18):
        # Asked by the endpoint of the tests: who is the last word? The first.
        (folder / f"{number}.txt").write_text(f"Person{number} built the old mill for the town called Town{number}")
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_endpoint_writes_what_can_be_trained_on_and_every_refusal_has_a_reason(
    chat,  # noqa: F811
    documents,
    tmp_path,
    monkeypatch,
    capsys,
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    tokenizer = TOKENIZERS["byte-level BPE, single digits"]()
    tiny_llama(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    # Without titles the first word of the passage would be that of its file.
    command = ["questions", str(documents), "--api_base", chat.address, "--api_model", "m", "--min_gain", "-100"]
    command += ["--model_name_or_path", str(tmp_path / "model"), "--device", "cpu"]
    command += ["--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache")]
    monkeypatch.setattr("tests.synthetic.test_writers.Chat.answer_word", 1)
    run(command)
    train, dev = read_questions(tmp_path / "out" / "train.jsonl"), read_questions(tmp_path / "out" / "dev.jsonl")
    assert len(train) == 6 and len(dev) == 2
    for row in [*train, *dev]:
        number = row["answers"][0].removeprefix("Person")
        assert row["question"] == f"Who is Town{number}?" and row["positive_ids"] == [f"{number}.txt#0"]
    refused = lines(tmp_path / "out" / "refused.jsonl")
    assert {row["refused"] for row in refused} == {gates.FORM} and len(refused) == 8
    out = capsys.readouterr().out
    assert "16 questions about 8 passages were written" in out and f"{gates.FORM:32}    -8" in out
    assert "(6 to train, 2 held out)" in out

    # Gates are moved without anything being written anew.
    asked = len(chat.seen)
    with pytest.raises(SystemExit, match="none of 16 questions can be trained on: .*refused.jsonl says why"):
        run([*command[:-1], str(tmp_path / "cache"), "--min_gain", "100"])
    assert len(chat.seen) == asked
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["refused"][gates.LOW_GAIN] == 8 and summary["num_train"] == 0
    assert not any("sk-secret" in path.read_text() for path in (tmp_path / "out").iterdir() if path.is_file())


def test_a_model_alone_writes_and_says_when_nothing_can_be_used(documents, tmp_path):
    tokenizer = TOKENIZERS["byte-level BPE, single digits"]()
    tiny_llama(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(DatasetError, match="wrote nothing in the form of a question .* about 2 passages: take a"):
        write_questions(
            QuestionWritingArguments(
                str(documents),
                str(tmp_path / "out"),
                str(tmp_path / "model"),
                max_passages=2,
                device="cpu",
                cache_dir=str(tmp_path / "cache"),
            )
        )
    assert len(lines(tmp_path / "out" / "candidates.jsonl")) == 2


class TownWriter:
    """Asks who built for a town, and of two towns for the one that has another's builder."""

    at_once = 4
    settings = {"name": "towns"}

    def write(self, sources, count):
        numbers = [[passage["title"] for passage in source] for source in sources]
        return [
            Written([Pair(f"Who built the old mill {' like Person'.join(of_one)}?", f"Person{of_one[0]}")], 1)
            for of_one in numbers
        ]


def test_questions_of_two_passages_name_both_and_none_joins_the_sides(documents, tmp_path, monkeypatch, capsys):
    for path in documents.iterdir():  # all share a name
        path.write_text(f"{path.read_text()} by order of Anna Brown")
    monkeypatch.setattr(questions, "Endpoint", lambda *arguments: TownWriter())
    command = ["questions", str(documents), "--api_base", "http://h/v1", "--api_model", "m", "--max_pairs", "6"]
    command += ["--cache_dir", str(tmp_path / "cache"), "--dev_share", "0.4"]
    run([*command, "--output_dir", str(tmp_path / "out")])
    assert "about 8 passages and 6 pairs were written" in capsys.readouterr().out
    train, dev = read_questions(tmp_path / "out" / "train.jsonl"), read_questions(tmp_path / "out" / "dev.jsonl")
    of_two = [row for row in [*train, *dev] if len(row["positive_ids"]) == 2]
    assert len(of_two) > 2
    for row in of_two:
        assert row["question"].split(" like Person")[1] == row["positive_ids"][1].removesuffix(".txt#0") + "?"
    held_out = {name for row in dev for name in row["positive_ids"]}
    assert held_out and not held_out & {name for row in train for name in row["positive_ids"]}

    crossing = lambda corpus, places, *others: [  # noqa: E731
        tuple(corpus.documents([one, other])) for one in places for other in places if one < other
    ]
    monkeypatch.setattr(questions, "choose_pairs", crossing)
    run([*command, "--output_dir", str(tmp_path / "all")])
    summary = json.loads((tmp_path / "all" / "summary.json").read_text())
    assert summary["num_pairs"] == 28 and summary["refused"][gates.BOTH_SIDES] > 5
    refused = [row for row in lines(tmp_path / "all" / "refused.jsonl") if row["refused"] == gates.BOTH_SIDES]
    held_out = {row["positive_ids"][0] for row in lines(tmp_path / "all" / "dev.jsonl")}
    assert all(len(held_out & set(row["passage_ids"])) == 1 for row in refused)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "nobody to write questions: pass --model_name_or_path, or"),
        ({"api_base": "http://h/v1"}, "--api_base and --api_model go together"),
        ({"model_name_or_path": "m", "max_passages": 0}, "--max_passages 0"),
        ({"model_name_or_path": "m", "max_pairs": -1}, "--max_pairs -1"),
        ({"model_name_or_path": "m", "dev_share": 1.0}, "--dev_share 1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        QuestionWritingArguments("documents", **settings)
