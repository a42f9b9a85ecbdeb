# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import json
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
from datasets import Dataset, load_from_disk

from trl_dro import __version__
from trl_dro.commands import evaluate, train
from trl_dro.commands.arguments import CORPUS_HELP, LoadArguments
from trl_dro.commands.cli import COMMANDS, main, make_parser
from trl_dro.commands.serve import ServeArguments
from trl_dro.data import load_records, validate_dataset
from trl_dro.retrieval import BM25Retriever


@pytest.fixture
def files(tmp_path):
    """Six questions and thirty passages, the first six of which hold the answers."""
    questions = [{"id": f"q{i}", "question": f"who wrote book {i}", "golden_answers": [f"Anna {i}"]} for i in range(6)]
    corpus = [
        {"id": f"p{i}", "title": f"Book {i}", "text": f"The book {i} was written by Anna {i}."} for i in range(30)
    ]
    for name, rows in (("questions", questions), ("corpus", corpus)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def run(files, monkeypatch):
    """Runs `trl-dro retrieve`."""

    def run(*arguments, output="out", corpus="corpus.jsonl", questions="questions.jsonl"):
        arguments = ["--questions", files / questions, "--output_dir", files / output, *arguments]
        arguments += ["--cache_dir", files / "cache"]
        if corpus:
            arguments += ["--corpus", files / corpus]
        monkeypatch.setattr(sys, "argv", ["trl-dro", "retrieve", *map(str, arguments)])
        main()
        return files / output

    return run


def refused(run, capsys, *arguments, **settings):
    """The one line with which the command ends."""
    with pytest.raises(SystemExit) as info:
        run(*arguments, **settings)
    message = capsys.readouterr().err if info.value.code == 2 else str(info.value.code)
    assert "\n" not in message.rstrip("\n")
    return message


def test_files_give_a_dataset_for_training_and_a_table_of_recall(run, capsys):
    folder = run("--k", 5, "--split", "dev")
    dataset = load_records(folder, "dev")
    validate_dataset(dataset, num_selected=5)
    assert dataset["id"][:] == [f"q{i}" for i in range(6)]
    assert [row["documents"][0]["id"] for row in dataset] == [f"p{i}" for i in range(6)]
    shown = capsys.readouterr().out
    assert "Recall@1, %" in shown and "100.0" in shown and "6 questions with their top 5" in shown


def test_settings_can_stand_in_a_yaml_file_and_be_overridden(run, files):
    (files / "settings.yaml").write_text("k: 7\nb: 0.5\nsplit: validation\n")
    dataset = load_from_disk(run("--config", files / "settings.yaml", "--k", 4) / "validation")
    assert all(len(row["documents"]) == 4 for row in dataset)
    report = json.loads((files / "out" / "validation" / "retrieval.json").read_text())
    assert report["settings"]["retriever"]["b"] == 0.5


def test_second_call_searches_nothing_and_prints_the_same(run, capsys, monkeypatch):
    run("--k", 5)
    first = capsys.readouterr().out
    monkeypatch.setattr(BM25Retriever, "search", None)
    run("--k", 5)
    assert capsys.readouterr().out == first


def test_paragraphs_of_a_benchmark_need_no_corpus(run, shared_data, files, monkeypatch):
    source = shared_data / "raw" / "hotpotqa.json"
    arguments = ["--questions", "hotpotqa", "--split", "dev", "--source", source, "--output_dir", files / "out"]
    monkeypatch.setattr(
        sys, "argv", ["trl-dro", "retrieve", *map(str, arguments), "--retriever", "precomputed", "--k", "10"]
    )
    main()
    dataset = load_records(files / "out", "dev")
    assert [len(row["documents"]) for row in dataset] == [10] * 100
    report = json.loads((files / "out" / "dev" / "retrieval.json").read_text())
    assert report["recall"]["is a supporting passage"]["10"] == 1.0


def test_result_is_pushed_where_it_is_asked_for(run, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        Dataset, "push_to_hub", lambda dataset, name, split: pushed.append((len(dataset), name, split))
    )
    run("--k", 2, "--split", "dev", "--push_to_hub", "org/nq-top2")
    assert pushed == [(6, "org/nq-top2", "dev")]


def test_folder_of_documents_is_a_corpus(run, files):
    (files / "documents").mkdir()
    for number in range(6):
        (files / "documents" / f"book{number}.txt").write_text(f"Book {number} was written by Anna {number}.")
    dataset = load_from_disk(run("--k", 2, corpus="documents") / "train")
    assert [row["documents"][0]["id"] for row in dataset] == [f"book{i}.txt#0" for i in range(6)]


@pytest.mark.parametrize(
    "arguments, settings, parts",
    [
        (["--retriever", "bm26"], {}, ["--retriever bm26", "bm25, dense, colbert, precomputed"]),
        (["--retriever", "bm25", "bm25"], {}, ["name each retriever once"]),
        ([], {"corpus": None}, ["needs a corpus", "--corpus FILE"]),
        (["--retriever", "precomputed"], {}, ["leave out --corpus"]),
        (["--k", "0"], {}, ["--k 0"]),
        ([], {"corpus": "absent.jsonl"}, ["absent.jsonl", "no such file"]),
        (["--source", "x.json"], {}, ["--source belongs to a benchmark"]),
    ],
)
def test_mistakes_end_in_one_line_that_tells_the_cure(run, capsys, arguments, settings, parts):
    message = refused(run, capsys, *arguments, **settings)
    assert message.startswith("trl-dro retrieve: ")
    for part in parts:
        assert part in message


def test_broken_corpus_ends_in_one_line_with_file_and_line(run, files, capsys):
    with open(files / "corpus.jsonl", "a") as file:
        file.write('{"id": "p3", "text": "again"}\n')
    message = refused(run, capsys)
    assert "corpus.jsonl, line 31, key id: 'p3' is also the id of line 4" in message


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["trl-dro", *map(str, arguments)])
    main()


def wrong_usage(monkeypatch, capsys, *arguments):
    """What is printed when the command line is wrong, which is one line and exit code 2."""
    with pytest.raises(SystemExit) as info:
        call(monkeypatch, *arguments)
    assert info.value.code == 2
    return capsys.readouterr().err


def test_unknown_command_and_no_command_show_the_usage(monkeypatch, capsys):
    message = wrong_usage(monkeypatch, capsys, "retreive")
    assert message.startswith("trl-dro: there is no command 'retreive'; did you mean retrieve?\nusage: trl-dro {")
    call(monkeypatch)
    assert f"usage: trl-dro {{{','.join(COMMANDS)}}}" in capsys.readouterr().out


def test_help_lists_each_command_with_what_it_does(monkeypatch, capsys):
    call(monkeypatch, "--help")
    listed = {line.split()[0]: line.split(None, 1)[1] for line in capsys.readouterr().out.splitlines()[2:-2]}
    assert listed.keys() == COMMANDS.keys() and all(len(summary) > 15 for summary in listed.values())
    call(monkeypatch, "--version")
    assert capsys.readouterr().out == f"trl-dro {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_tells_every_setting_and_what_it_does(name, monkeypatch, capsys):
    types = make_parser(name).dataclass_types
    flag = "--help-all" if name in ("train", "warmup") else "--help"
    with pytest.raises(SystemExit) as info:
        call(monkeypatch, name, flag)
    assert info.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for dataclass_type in types:
        for setting in fields(dataclass_type):
            if setting.init:
                assert len(setting.metadata["help"].strip()) > 5, setting.name
                assert f"--{setting.name} " in shown
                assert " ".join(setting.metadata["help"].replace("%%", "%").split()[:4]) in shown


@pytest.mark.parametrize(
    "arguments, meant",
    [
        (["retrieve", "--retreiver", "bm25"], "--retriever"),
        (["train", "--num_permutation", "4"], "--num_permutations"),
        (["train", "--learning-rat", "4"], "--learning_rate"),
        (["warmup", "--teecher", "relevant"], "--teacher"),
        (["evaluate", "--datset_name", "x"], "--dataset_name"),
        (["predict", "--question", "x"], "--questions"),
        (["serve", "--prot", "80"], "--port"),
    ],
)
def test_wrong_flags_suggest_the_right_ones(arguments, meant, monkeypatch, capsys):
    message = wrong_usage(monkeypatch, capsys, *arguments)
    assert f"there is no setting {arguments[1]}; did you mean {meant}?" in message and message.count("\n") == 1


def test_failure_and_wrong_usage_have_exit_codes_of_their_own():
    command = [
        sys.executable,
        "-m",
        "trl_dro.commands.cli",
        "retrieve",
        "absent.jsonl",
        "--corpus",
        "c",
        "--output_dir",
        "out",
    ]
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("trl-dro retrieve: absent.jsonl")
    assert subprocess.run([*command, "--k", "0"], capture_output=True).returncode == 2


def test_training_is_launched_in_as_many_processes_as_are_asked_for(monkeypatch):
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    flags = ["train", "--dataset_name", "data", "--output_dir", "out", "--use_cpu", "--num_processes", "2"]
    call(monkeypatch, *flags)
    config = Path(__file__).resolve().parents[2] / "recipes" / "accelerate" / "two_cpu_processes.yaml"
    call(monkeypatch, *flags[:6], "--accelerate_config", config)
    first, second = launched
    assert (first.num_processes, first.multi_gpu, first.module) == (2, True, True)
    assert (first.training_script, first.training_script_args) == ("trl_dro.commands.cli", flags)
    assert second.config_file == str(config) and second.num_processes is None


@pytest.mark.parametrize("command", ["predict", "evaluate"])
@pytest.mark.parametrize(
    "flags, num_gpus, processes",
    [
        ("", 1, None),
        ("", 2, "one for each GPU"),
        ("--device cuda:1", 2, None),
        ("--device cpu", 2, None),
        ("--device cpu --num_processes 2", 0, 2),
        ("--num_processes 1", 2, None),
    ],
)
def test_questions_are_answered_by_a_process_for_each_gpu(command, flags, num_gpus, processes, monkeypatch):
    launched, called = [], []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    monkeypatch.setattr("torch.cuda.device_count", lambda: num_gpus)
    monkeypatch.setattr(f"trl_dro.commands.{command}.{command}", called.append)
    call(monkeypatch, command, "run", "--dataset_name", "data", *flags.split())
    assert [len(launched), len(called)] == ([0, 1] if processes is None else [1, 0])
    if processes == 2:
        assert (launched[0].num_processes, launched[0].multi_gpu) == (2, True)


def test_one_process_trains_without_a_launcher(monkeypatch):
    trained = []
    monkeypatch.setattr(train, "train", lambda *args: trained.append(args))
    call(monkeypatch, "train", "--dataset_name", "data", "--use_cpu", "--num_permutations", 3)
    assert trained[0][0].dataset_name == "data" and trained[0][1].num_permutations == 3


def test_a_commands_first_word_needs_no_name(files, monkeypatch):
    flags = ["--corpus", files / "corpus.jsonl", "--output_dir", files / "out", "--cache_dir", files / "cache"]
    call(monkeypatch, "retrieve", files / "questions.jsonl", *flags)
    assert len(load_from_disk(files / "out" / "train")) == 6


@pytest.mark.parametrize(
    "name, flag, rest",
    [
        ("report", "--run", ["--evaluation", "results"]),
        ("evaluate", "--model", ["--dataset_name", "data"]),
        ("predict", "--model", ["--questions", "asked.jsonl"]),
        ("serve", "--model", ["--port", "80"]),
    ],
)
def test_evaluate_serve_predict_and_report_take_the_run_as_their_first_word(name, flag, rest, monkeypatch):
    called = []
    monkeypatch.setattr(import_module(f"trl_dro.commands.{name}"), COMMANDS[name].function, called.append)
    call(monkeypatch, name, "my-run", *rest)
    call(monkeypatch, name, flag, "my-run", *rest)
    assert called[0] == called[1] and getattr(called[0], flag[2:]) == "my-run"


def test_commands_that_load_a_system_load_it_alike(capsys):
    loading = [each.name for each in fields(LoadArguments)]
    shared = ["load_in_4bit", "attn_implementation", "base_model", "revision"]
    assert set(shared) < set(loading)
    for name in ("evaluate", "predict", "serve"):
        actions = {action.dest: action for action in make_parser(name)._actions}
        assert all(actions[each].help == LoadArguments.__dataclass_fields__[each].metadata["help"] for each in shared)
    options = ServeArguments(model="run", load_in_4bit=True, attn_implementation="eager", device="cpu").load_options()
    assert options.quantization_config.load_in_4bit and options.attn_implementation == "eager"


@pytest.mark.parametrize("name", ["retrieve", "train", "evaluate", "predict", "serve"])
def test_every_corpus_is_told_of_alike(name):
    [action] = [action for action in make_parser(name)._actions if action.dest == "corpus"]
    assert action.help.startswith(CORPUS_HELP)


@pytest.mark.parametrize(
    "arguments, code",
    [
        *((["--help"], 0), (["--version"], 0)),
        *(([name, "--help"], 0) for name in COMMANDS),
        *(([name, "--nosuch"], 2) for name in COMMANDS),
        (["serve", "run", "--timeout", "0"], 2),
    ],
    ids=str,
)
def test_help_and_mistakes_are_answered_without_torch(arguments, code, tmp_path):
    # It takes seconds to import. What would import it, or transformers, fails here.
    for package in ("torch", "datasets", "numpy"):
        (tmp_path / f"{package}.py").write_text("raise SystemExit(99)")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from trl_dro.commands.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == (code == 2)


def test_evaluate_takes_its_settings_from_flags_and_ends_mistakes_in_one_line(monkeypatch, capsys):
    evaluated = []
    monkeypatch.setattr(evaluate, "evaluate", evaluated.append)
    flags = ["--model", "run", "--dataset_name", "data", "--ranking_measures", "nDCG@5", "RR@5"]
    monkeypatch.setattr(sys, "argv", ["trl-dro", "evaluate", *flags])
    main()
    [args] = evaluated
    assert (args.model, args.dataset_name, args.ranking_measures) == ("run", "data", ["nDCG@5", "RR@5"])
    message = wrong_usage(monkeypatch, capsys, "evaluate", "--generator", "run", "--dataset_name", "data")
    assert "trl-dro evaluate: --generator alone selects nothing: pass --selector" in message


def test_serve_names_the_extra_that_it_needs(monkeypatch):
    monkeypatch.delitem(sys.modules, "trl_dro.server.app", raising=False)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.setattr(sys, "argv", ["trl-dro", "serve", "--model", "run"])
    with pytest.raises(SystemExit, match=r"pip install 'trl_dro\[serve\]'"):
        main()


@pytest.mark.parametrize(
    "command, message",
    [
        ("retrieve q --corpus c --output_dir o --k1 -1", "--k1 -1.0: it must be at least 0"),
        ("retrieve q --corpus c --output_dir o --b 5", "--b 5.0: it must be at least 0 and at most 1"),
        ("retrieve q --corpus c --output_dir o --words_per_passage 0", "--words_per_passage 0: it must be at least 1"),
        ("serve run --corpus c --overlap_words 100", "--overlap_words 100: it must be at least 0 and at most 99"),
        ("train --questions q --corpus c --words_per_passage 0", "--words_per_passage 0: it must be at least 1"),
        ("warmup --dataset_name d --rank_noise nan", "'nan' is not a finite number"),
        ("warmup --dataset_name d --max_document_length -5", "--max_document_length -5: it must be at least 1"),
        ("warmup --dataset_name d --max_candidates 3", "--max_candidates 3: it must be at least 5"),
        ("serve run --port 99999999", "--port 99999999: it must be at least 0 and at most 65535"),
        ("train --dry_run --selector_learning_rate nan", "'nan' is not a finite number"),
        ("train --dry_run --learning_rate inf", "'inf' is not a finite number"),
        ("train --dry_run --weight_decay -1", "weight_decay=-1.0: it must be at least 0"),
        ("train --dry_run --per_device_train_batch_size 0", "per_device_train_batch_size=0: it must be at least 1"),
        ("train --dry_run --max_document_length -5", "max_document_length=-5: it must be at least 1"),
        ("predict run --questions q --tokens_per_batch 0", "--tokens_per_batch 0: it must be at least 1"),
    ],
)
def test_numbers_that_cannot_be_computed_with_are_refused_in_one_line(command, message, monkeypatch, capsys):
    shown = wrong_usage(monkeypatch, capsys, *command.split())
    assert message in shown and shown.count("\n") == 1
