# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import json
import shlex

import pytest

from trl_dro.commands import cli
from trl_dro.commands.quickstart import QuickstartArguments, choose_sizes, quickstart
from trl_dro.data import DatasetError, read_questions
from trl_dro.demo.tiny import TINY_MODEL


NAMES = "Ada Bo Cleo Dan Eve Finn Gus Hana Ivo Jo".split()


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Documents and questions about them, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "documents").mkdir()
    for number, name in enumerate(NAMES):
        (tmp_path / "documents" / f"{number}.txt").write_text(f"{name} Stone founded the bakery number {number}.")
    questions = [
        {"question": f"Who founded the bakery number {number}?", "answers": [f"{name} Stone"]}
        for number, name in enumerate(NAMES)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    return tmp_path


def arguments(**settings):
    return QuickstartArguments("documents", "questions.jsonl", "out", use_cpu=True, cache_dir="cache", **settings)


@pytest.fixture
def executed(monkeypatch):
    """Commands that were run; the list's last element may say which one is to be interrupted."""
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    run, seen = cli.run, []

    def watched(words, may_launch=False):
        if seen and seen[0] == words[0] and "--dry_run" not in words:
            raise KeyboardInterrupt
        seen.append(words[0] + (" --dry_run" if "--dry_run" in words else ""))
        run(words)

    monkeypatch.setattr(cli, "run", watched)
    return seen


@pytest.mark.slow
def test_a_killed_quickstart_goes_on_at_its_stage_and_ends_with_a_system_that_can_be_served(world, executed, capsys):
    executed.append("train")
    with pytest.raises(KeyboardInterrupt):
        quickstart(arguments(max_steps=2))
    assert executed[1:] == ["retrieve", "retrieve", "warmup", "train --dry_run"]
    executed.clear()
    quickstart(arguments(max_steps=2))
    assert executed == ["train --dry_run", "train", "evaluate", "evaluate", "report"]
    executed.clear()
    out = capsys.readouterr().out
    assert "8 questions to train on, 2 held out" in out
    assert "In % of 2 questions, by the retriever's order and by the selector: exact match" in out
    assert "2 of 10 passages" in out and "trl-dro serve out/run --corpus documents" in out
    for name in ("retriever", "dro"):
        summary = json.loads((world / "out" / "results" / name / "summary.json").read_text())
        assert summary["num_questions"] == 2
    assert (world / "out" / "run" / "report" / "report.html").is_file()
    assert json.loads((world / "out" / "run" / "rag_config.json").read_text())["num_selected"] == 2

    quickstart(arguments(max_steps=2))
    assert executed == []
    # Every line is a command that can be typed.
    for line in out.splitlines():
        if line.startswith("  trl-dro "):
            name, *words = shlex.split(line)[1:]
            cli.make_parser(name).parse_args_and_config(words)
    with pytest.raises(ValueError, match="out was begun with max_steps=2, not 3: name another output_dir"):
        quickstart(arguments(max_steps=3))


def test_a_dry_run_tells_every_command_and_runs_none(world, executed, capsys):
    quickstart(arguments(dry_run=True))
    assert executed == []
    out = capsys.readouterr().out
    for command in ("retrieve --questions", "warmup", "train", "evaluate out/run", "report out/run", "serve out/run"):
        assert f"trl-dro {command}" in out
    # The same questions are held out when others come.
    dev = set(read_questions("out/questions/dev.jsonl")["question"])
    with open("questions.jsonl", "a") as file:
        file.writelines(json.dumps({"question": f"Who is number {i}?", "answers": ["x"]}) + "\n" for i in range(5))
    quickstart(QuickstartArguments("documents", "questions.jsonl", "again", cache_dir="cache", dry_run=True))
    again = set(read_questions("again/questions/train.jsonl")["question"])
    assert len(dev) == 2 and len(dev & again) < 2


def test_without_questions_a_model_is_asked_to_write_some(world, capsys):
    quickstart(
        QuickstartArguments(
            "documents", None, "out", model_name_or_path="some-model", cache_dir="cache", dry_run=True, use_cpu=True
        )
    )
    assert "trl-dro questions documents --output_dir out/questions" in capsys.readouterr().out


def test_every_command_cuts_the_documents_alike(world, capsys):
    quickstart(arguments(dry_run=True, words_per_passage=4, overlap_words=1))
    flags = "--words_per_passage 4 --overlap_words 1"
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if flags in line] == ["retrieve", "retrieve", "serve"]
    written = {"api_base": "http://h/v1", "api_model": "m", "cache_dir": "cache", "dry_run": True}
    quickstart(QuickstartArguments("documents", None, "b", overlap_words=1, **written))
    assert "--overlap_words 1" in capsys.readouterr().out


def test_both_trainings_do_the_same_with_long_answers(world, capsys):
    quickstart(arguments(dry_run=True, long_answers="drop"))
    flags = "--long_answers drop --max_answer_length 64"
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if flags in line] == ["warmup", "train", "train"]


def test_a_base_too_small_to_point_to_passages_scores_them_and_is_not_warmed_up(world, capsys):
    quickstart(arguments(dry_run=True, model_name_or_path=str(TINY_MODEL)))
    out = capsys.readouterr().out
    commands = [shlex.split(line)[1:] for line in out.splitlines() if line.startswith("  trl-dro ")]
    assert "warmup" not in [name for name, *_ in commands] and "the selector scores passages" in out
    _, settings, model = next(
        cli.make_parser(name).parse_args_and_config(words) for name, *words in commands if name == "train"
    )
    assert settings.selector_form == "query_likelihood" and model.use_peft
    assert (settings.max_candidates, settings.num_selected, settings.num_permutations) == (5, 1, 5)


def test_one_question_is_too_few(world):
    (world / "questions.jsonl").write_text('{"question": "Who?", "answers": ["Ada"]}\n')
    with pytest.raises(DatasetError, match="one question cannot be trained on and evaluated too"):
        quickstart(arguments())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "no --questions, and nobody to write some"),
        ({"questions": "q", "api_base": "http://h/v1"}, "--questions are there already"),
        ({"questions": "q", "dev_share": 0.0}, "--dev_share 0.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        QuickstartArguments("documents", **settings)


@pytest.mark.parametrize("num_passages", [1, 2, 3, 6, 30, 5000])
@pytest.mark.parametrize("num_questions", [1, 3, 9, 100, 100_000])
@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("num_weights", [None, 135_000_000, 8_000_000_000])
def test_sizes_fit_whatever_there_is(num_passages, num_questions, accelerated, num_weights):
    sizes = choose_sizes(num_passages, num_questions, accelerated, num_weights)
    assert 1 <= sizes.num_selected <= sizes.max_candidates <= num_passages
    assert 1 <= sizes.batch_size * sizes.accumulation <= min(8, num_questions)
    assert sizes.warmup_steps <= sizes.max_steps <= (2000 if accelerated else 200)
    assert (sizes.warmup_steps == 0) == (sizes.selector_form == "query_likelihood") == (num_weights == 135_000_000)
    scores_on_cpu = not accelerated and num_weights == 135_000_000  # draws all five documents, each once
    assert sizes.num_permutations == (5 if scores_on_cpu else 8)
    assert choose_sizes(num_passages, num_questions, accelerated, num_weights, 7).max_steps == 7
