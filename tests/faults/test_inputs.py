# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""A part of `python -m tests.faults`, quick enough for every run of the tests."""

import itertools

import pytest

from trl_dro.commands import cli
from trl_dro.data.lines import parse_json, read_json_object
from trl_dro.data.schema import DatasetError

from .cases import all_cases, files, leftovers, lines, systems, yaml_values
from .outcome import outcome
from .world import World


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("faults"))


# What trains or answers before it ends takes seconds.
SAMPLE = [
    *itertools.islice(lines(), 0, None, 9),
    *itertools.islice(files(), 1, None, 6),
    *itertools.islice(yaml_values(), 2, None, 9),
    *itertools.islice((case for case in systems() if case.area.startswith(("rag", "adapter"))), 1, None, 9),
    *(case for case in leftovers() if case.name == "deep"),
]
# Each was accepted once, ended in a bare error of Python, or did not say what was wrong.
MENDED = (
    """
passages (retrieve): title: an empty list|settings (train): --lora_r 0|settings (train): --accelerate_config
settings (train): --save_steps 0|settings (train): --model_revision|settings (train): --dataset_test_split
settings (train): --chat_template_kwargs {|settings (train): --output_dir /proc|settings (warmup): --packing
settings (predict): --revision|settings (evaluate): --dataset_split|settings: no run|YAML files: a number as a name
YAML files: random bytes|adapter_config.json: dropout 2|tokenizer: missing|roles: swapped|roles: base empty
adapters to start from: swapped|results (evaluate): empty|results (evaluate): HTML|log_history.jsonl (report): HTML
disk full (train): files end at 16,000|disk full (predict): files end at 10|folders without permission: predict
folders without permission: report|folders without permission: retrieve|files without permission
Python: pipe(documents): a text|Python: pipe(batch_size=0)|Python: RAGPipeline.from_pretrained: n
Python: RAGPipeline.from_pretrained: a number|Python: build_dataset: null|Python: read_questions|Python: read_corpus
Python: load_records|Python: BM25Retriever of texts|Python: retrieve_candidates of no|Python: DROConfig
Python: DROTrainer: args|Python: DROTrainer: a selector_model|Python: DROTrainer: callbacks
Python: PromptBuilder of no
""".strip()
    .replace("\n", "|")
    .split("|")
)


def named(case):
    return f"{case.area}: {case.name}"


def test_bad_inputs_end_in_one_line_that_names_what_is_wrong(world):
    mended = [case for case in all_cases() if named(case).startswith(tuple(MENDED))]
    assert all(any(named(case).startswith(name) for case in mended) for name in MENDED)
    wrong = {}
    for case in {named(case): case for case in [*SAMPLE, *mended]}.values():
        kind, message = outcome(case, world)
        if kind != "one line":
            wrong[named(case)] = (kind, message[:200])
    assert not wrong


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a": ' + "9" * 10_000 + "}", "thousands of digits"),
        ('{"a": "\\ud800"}', "half of a character"),
        ('{"a": \0}', "Expecting value at line 1, character 7"),
    ],
)
def test_json_that_python_cannot_read_is_a_line_of_text(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_json(text)
    assert "\n" not in str(error.value)
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DatasetError, match=r"x\.json: is damaged"):
        read_json_object(tmp_path / "x.json")
    assert parse_json('{"a": "\\ud83d\\ude00 \\\\ud800"}') == {"a": "😀 \\ud800"}


@pytest.mark.parametrize(
    "said",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:40101",
        "NCCL error: remote process exited or there was a network error\nncclRemoteError: A call failed",
    ],
)
def test_a_process_that_is_lost_is_told_of_in_one_line(monkeypatch, said):
    def alone(*_):
        raise RuntimeError(said)

    monkeypatch.setattr(cli.command_module("env"), "print_environment", alone)
    with pytest.raises(SystemExit) as error:
        cli.run(["env"])
    assert error.value.code.startswith("trl-dro env: another process is gone") and "\n" not in error.value.code


def test_what_no_check_foresaw_ends_in_one_line_and_debug_shows_where(monkeypatch):
    def broken(*_):
        raise KeyError("unheard of")

    monkeypatch.setattr(cli.command_module("env"), "print_environment", broken)
    with pytest.raises(SystemExit) as error:
        cli.run(["env"])
    assert "KeyError: 'unheard of'; --debug shows where" in error.value.code and "\n" not in error.value.code
    with pytest.raises(KeyError):
        cli.run(["env", "--debug"])
