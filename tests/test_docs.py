# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
What README, guides and docstrings show is true: Python blocks run, page by page, in a folder with small stand-ins for
what they name; commands are parsed by the real parsers; tests and files that are named exist. A block with a comment
`# needs …` says to the reader, and here, that it is not run: Python is compiled then, and commands are still parsed.
"""

import argparse
import ast
import contextlib
import doctest
import importlib
import json
import re
import runpy
import shlex
import shutil
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
from accelerate.commands.launch import launch_command_parser
from datasets import DatasetDict
from transformers import training_args
from trl import TrlParser

from trl_dro.commands import cli

from .test_faults import TOKENIZER, make_trainer
from .tiny_models import tiny_llama
from .trainer.test_dro_trainer import make_dataset


ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = sorted((ROOT / "trl_dro").rglob("*.py"))
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
NEW_LINE = "\n"
# Commands of the system, which are taken to be known.
SYSTEM = {".", "cd", "curl", "git"}
# Pages whose commands are run too, one after the other with the Python blocks.
WALKTHROUGHS = {ROOT / "docs" / "index.md"}


class Block(NamedTuple):
    language: str
    code: str
    where: str

    @property
    def runs(self) -> bool:
        return "# needs " not in self.code


def blocks(text: str, where: str) -> list[Block]:
    return [
        Block(match[2], textwrap.dedent(match[3]), f"{where}, line {1 + text.count(NEW_LINE, 0, match.start())}")
        for match in FENCE.finditer(text)
    ]


def docstrings(path: Path) -> str:
    """All docstrings of a module, one after the other."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return "\n".join(ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds))


BLOCKS = {path: blocks(path.read_text(encoding="utf-8"), path.name) for path in PAGES}
BLOCKS |= {path: blocks(docstrings(path), path.name) for path in [*SOURCES, *sorted((ROOT / "examples").glob("*.py"))]}


def with_blocks(language: str) -> list:
    pages = [path for path, found in BLOCKS.items() if any(block.language == language for block in found)]
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in pages]


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """What the pages name: models, adapters, a trained system, questions and passages, all tiny."""
    folder = tmp_path_factory.mktemp("template")
    trainer = make_trainer(folder / "llama3-dro", max_answer_length=8)
    trainer.save_model()
    base = folder / "meta-llama" / "Meta-Llama-3-8B-Instruct"
    for model in (base, folder / "generator", folder / "selector"):
        tiny_llama(TOKENIZER).save_pretrained(model)
        TOKENIZER.save_pretrained(model)
    for role in ("selector", "generator"):
        shutil.copytree(folder / "llama3-dro" / role, folder / "sft" / role)
    dataset = make_dataset(4, num_documents=20)
    DatasetDict({"train": dataset, "dev": dataset}).save_to_disk(folder / "nq-top20")
    questions = [{"id": f"q{i}", "question": f"who wrote number {i}?", "answers": [f"Anna {i}"]} for i in range(4)]
    passages = [{"id": f"p{i}", "title": f"Number {i}", "text": f"Number {i} was by Anna {i}."} for i in range(30)]
    for name, rows in (("train", questions), ("dev", questions), ("corpus", passages)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def workplace(template, tmp_path, monkeypatch) -> Path:
    """A copy of the stand-ins beside the repository's own folders, as the working directory."""
    folder = tmp_path / "workplace"
    shutil.copytree(template, folder)
    for name in ("benchmarks", "examples", "recipes", "trl_dro"):
        (folder / name).symlink_to(ROOT / name)
    monkeypatch.chdir(folder)
    return folder


@contextlib.contextmanager
def extras_may_be_missing():
    """Skips where a package of an extra is not installed."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").startswith("trl_dro") and "pip install" not in str(error):
            raise
        pytest.skip(f"needs an extra: {error}")


def check_imports(block: Block) -> None:
    """Names that a block imports from the package exist, though it is not run."""
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "trl_dro":
            module = importlib.import_module(node.module)
            assert all(getattr(module, alias.name) for alias in node.names), block.where


@pytest.mark.parametrize("path", with_blocks("python"))
def test_blocks_run_in_the_order_of_the_page(path, workplace, monkeypatch):
    names: dict = {"__name__": "__main__"}
    if path in SOURCES:  # as doctest does: an example may use what its module has
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        with extras_may_be_missing():
            names |= vars(importlib.import_module(module))
    for block in BLOCKS[path]:
        if block.language == "bash" and path in WALKTHROUGHS and block.runs:
            for words in commands(block.code):
                if words[0] == "trl-dro" or words[0] == "python":
                    # Corpora and indexes are kept in a folder of the user's, which is none of a test's.
                    more = ["--cache_dir", "cache"] if words[1] in ("retrieve", "quickstart") else []
                    check_command([*words, *more], monkeypatch)
        elif block.language == "python" and ">>>" in block.code:
            test = doctest.DocTestParser().get_doctest(block.code, names, block.where, str(path), 0)
            assert doctest.DocTestRunner().run(test).failed == 0, block.where
        elif block.language == "python" and block.runs:
            with extras_may_be_missing():
                exec(compile(block.code, block.where, "exec"), names)
        elif block.language == "python":
            check_imports(block)


class Parsed(BaseException):
    """The arguments of a command were understood. No error of the command itself, so that nothing catches it."""


def then_stop(parse):
    def parse_and_stop(self, *arguments, **settings):
        parse(self, *arguments, **settings)
        raise Parsed

    return parse_and_stop


@pytest.fixture
def parse_only(monkeypatch):
    """Parsers parse as on a machine with a GPU, and what would follow does not happen."""
    monkeypatch.setattr(training_args, "is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setattr(cli, "check_usage", lambda *_: None)  # which parses too, but builds no settings
    for owner, name in ((TrlParser, "parse_args_and_config"), (argparse.ArgumentParser, "parse_args")):
        monkeypatch.setattr(owner, name, then_stop(getattr(owner, name)))


def commands(code: str) -> list[list[str]]:
    """Words of each command, with lines that go on joined, and without comments, variables and assignments."""
    lines = re.sub(r"(^|\s)#.*", "", code, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        for part in re.split(r"\s&&\s", line):
            words = shlex.split(part)
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words = words[1:]
            if words:
                found.append(words)
    return found


def check_command(words: list[str], monkeypatch) -> None:
    """Ends in [`Parsed`] or returns if all is well."""
    name, *arguments = words
    name = name.removeprefix(".venv/bin/")
    if name == "trl-dro":
        monkeypatch.setattr(sys, "argv", words)
        cli.main()
    elif name == "make":
        targets = re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert all("=" in word or word in targets for word in arguments), words
    elif name == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        wanted = {extra for word in arguments for group in re.findall(r"\[(.+)\]", word) for extra in group.split(",")}
        assert wanted <= extras.keys(), words
    elif name == "accelerate":
        assert arguments[0] == "launch", words
        # accelerate's parser is an ArgumentParser too: it must not end here.
        launch = argparse.ArgumentParser.parse_known_args(launch_command_parser(), arguments[1:])[0]
        assert launch.config_file is None or Path(launch.config_file).is_file(), words
        if launch.module:
            assert launch.training_script == "trl_dro.commands.cli", words
            cli.run(launch.training_script_args)
        check_script(launch.training_script, launch.training_script_args, monkeypatch)
    elif name.startswith("python") and arguments[0] == "-m":
        assert arguments[1] in ("pytest", "venv"), words
        for file in (word for word in arguments if word.startswith("tests/")):
            tests = (ROOT / file).read_text()
            wanted = arguments[arguments.index("-k") + 1].split(" or ") if "-k" in arguments else []
            assert all(word in tests for word in wanted), words
    elif name.startswith("python"):
        check_script(arguments[0], arguments[1:], monkeypatch)
    else:
        assert name in SYSTEM, f"{words}: a command that the tests do not know"


def check_script(script: str, arguments: list[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.mark.parametrize("path", with_blocks("bash"))
def test_commands_exist_and_their_flags_are_understood(path, workplace, parse_only, monkeypatch):
    for block in BLOCKS[path]:
        if block.language != "bash":
            continue
        for words in commands(block.code):
            if words[0] == "cd":
                break  # what follows is said of another folder
            try:
                with extras_may_be_missing():
                    check_command(words, monkeypatch)
            except Parsed:
                pass
            except SystemExit as error:  # 0: --help
                assert error.code == 0, f"{block.where}: {shlex.join(words)}: {error}"


def test_every_block_is_of_a_language_that_is_checked_or_shown_only():
    shown_only = {"bibtex", "text", "yaml", "json"}
    for found in BLOCKS.values():
        for block in found:
            assert block.language in {"python", "bash"} | shown_only, block.where


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_tests_and_files_that_a_page_names_exist(path):
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("*.py"))
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, f"{path.name}: there is no {name}"
    for name in re.findall(r"`((?:tests|benchmarks|examples|recipes|scripts|trl_dro)/[\w/.*-]*)`", text):
        assert list(ROOT.glob(name)), f"{path.name}: there is no {name}"


def test_every_public_module_is_in_the_api_reference():
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    listed = set(re.findall(r"^::: (\S+)", pages, re.MULTILINE))
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES if path.name[0] != "_"}
    assert listed == modules
