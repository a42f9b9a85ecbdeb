# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Imports go one way: from the trainer to the method's mathematics, and never back."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import trl_dro


PACKAGE = Path(trl_dro.__file__).parent

# All that a file of the method imports, beside the standard library. What it has of ours is below it.
CORE = {
    "importance": {"torch"},
    "likelihood": {"torch"},
    "schedule": {"torch"},
    # Masks and caches are transformers'; what is packed is scored as what is not.
    "shared_prefix": {"torch", "transformers", "trl_dro.model.likelihood"},
    # A permutation is written in a tokenizer's tokens, and all of a question are read behind one prompt.
    "permutation": {"torch", "transformers", "trl_dro.model.likelihood", "trl_dro.model.shared_prefix"},
    # An estimate holds what was sampled, for which questions, and weighs it.
    "estimation": {
        "torch",
        *(f"trl_dro.{name}" for name in ("importance", "permutation", "schedule", "shared_prefix")),
    },
    "prompts": {"datasets", "transformers"},
    "roles": {"torch", "transformers", "peft"},
}


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name, everywhere=True):
    """Modules that a module imports: ours by their full names, others by their packages'."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(part for part in (parent, node.module) if part)
            found |= {full if (full := f"{base}.{alias.name}") in MODULES else base for alias in node.names}
    return {module if module in MODULES else module.partition(".")[0] for module in found}


@pytest.mark.parametrize("name", CORE)
def test_the_method_imports_what_it_needs_and_nothing_of_trainer_trl_or_config(name):
    assert imports(f"trl_dro.{name}") - sys.stdlib_module_names == CORE[name]


def test_no_module_is_imported_by_one_that_it_imports():
    TopologicalSorter({name: imports(name, everywhere=False) & MODULES.keys() for name in MODULES}).prepare()


def test_private_names_of_trl_are_imported_in_one_place():
    def modules_of_trl(path):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        found = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
        return {module for module in found if module.partition(".")[0] == "trl"}

    found = {name: modules for name, path in MODULES.items() if (modules := modules_of_trl(path))}
    # Beside it only the commands know trl, by what it exports: its parser, its arguments, SFTTrainer.
    assert all(module != "trl" for module in found.pop("trl_dro._trl_compat"))
    assert found == {f"trl_dro.{name}": {"trl"} for name in ("arguments", "training", "warmup")}


def test_nothing_but_the_command_and_the_package_imports_the_trainer():
    assert [name for name in MODULES if "trl_dro.trainer.dro_trainer" in imports(name)] == [
        "trl_dro",
        "trl_dro.commands.train",
    ]


@pytest.mark.parametrize("folder", ["data", "metrics"])
def test_data_and_metrics_do_not_know_what_is_trained(folder):
    inside = [name for name in MODULES if name.startswith(f"trl_dro.{folder}")]
    others = {name for module in inside for name in imports(module) if name.startswith("trl_dro.")} - set(inside)
    # The invented world comes with its candidates.
    assert others == ({"trl_dro.retrieval"} if folder == "data" else set())
