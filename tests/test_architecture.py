# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""The rooms of the house, and imports that go one way between them: down, and never back."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import trl_dro


PACKAGE = Path(trl_dro.__file__).parent

# From the ground up: a room imports its own files and those of lower floors, and none beside it.
FLOORS = (
    {"data", "model"},
    {"metrics"},
    {"retrieval"},
    {"demo", "system"},
    {"evaluation", "integrations", "server", "synthetic"},
    {"trainer"},
    {"report"},
    {"commands"},
)
# The rooms of the method itself, and what their files import of others' packages.
MATHEMATICS = {"datasets", "jinja2", "numpy", "peft", "torch", "transformers"}
# What reads and measures data needs no model.
WITHOUT_MODELS = ("data", "metrics", "retrieval")


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
ROOMS = {name: name.split(".")[1] for name, path in MODULES.items() if path.parent != PACKAGE}


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


def test_every_file_but_the_package_and_its_view_of_trl_is_in_a_room():
    assert set(MODULES) - set(ROOMS) == {"trl_dro", "trl_dro._trl_compat"}
    assert set(ROOMS.values()) == set().union(*FLOORS)


@pytest.mark.parametrize("room", sorted(set().union(*FLOORS)))
def test_a_room_imports_lower_floors_and_no_other(room):
    below = set().union(*FLOORS[: next(i for i, floor in enumerate(FLOORS) if room in floor)])
    inside = [name for name, its_room in ROOMS.items() if its_room == room]
    found = {(name, other) for name in inside for other in imports(name) if other in ROOMS}
    assert {(name, other) for name, other in found if ROOMS[other] not in below | {room}} == set()


def test_no_module_is_imported_by_one_that_it_imports():
    TopologicalSorter({name: imports(name, everywhere=False) & MODULES.keys() for name in MODULES}).prepare()


@pytest.mark.parametrize("name", [name for name, room in ROOMS.items() if room == "model"])
def test_the_model_knows_no_trainer_no_config_and_nothing_of_trl(name):
    others = {module for module in imports(name) if not module.startswith("trl_dro.model")}
    assert others - sys.stdlib_module_names <= MATHEMATICS


def test_private_names_of_trl_are_imported_in_one_place():
    def modules_of_trl(path):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        found = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
        return {module for module in found if module.partition(".")[0] == "trl"}

    found = {name: modules for name, path in MODULES.items() if (modules := modules_of_trl(path))}
    # Beside it only the commands know trl, by what it exports: its parser, its arguments, SFTTrainer.
    assert all(module != "trl" for module in found.pop("trl_dro._trl_compat"))
    assert {ROOMS[name] for name in found} == {"commands"} and set().union(*found.values()) == {"trl"}


def test_only_the_trainer_and_the_commands_know_our_view_of_trl():
    knowing = {ROOMS.get(name) for name in MODULES if "trl_dro._trl_compat" in imports(name)}
    assert knowing <= {"trainer", "commands"}


def test_engines_are_told_apart_in_one_file():
    knowing = {name for name in MODULES if "trl_dro.trainer.sharding" in imports(name)}
    assert knowing == {"trl_dro.trainer.engines", "trl_dro.trainer.zero"}


@pytest.mark.parametrize("room", WITHOUT_MODELS)
def test_data_metrics_and_retrieval_import_no_model(room):
    inside = [name for name, its_room in ROOMS.items() if its_room == room]
    found = {module for name in inside for module in imports(name, everywhere=False)}
    assert not found & {"torch", "transformers", "peft", "trl"}
    assert not {ROOMS.get(module) for module in found} & {"model"}


def test_adapters_are_made_and_switched_in_one_file():
    switches = ("set_adapter", "add_adapter", "disable_adapter", "set_requires_grad")
    calls = {
        name
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in switches
    }
    assert calls == {"trl_dro.model.roles"}


def test_a_room_door_defines_nothing():
    for name, path in MODULES.items():
        if path.name == "__init__.py" and name != "trl_dro":
            body = ast.parse(path.read_text(encoding="utf-8")).body
            defined = [node for node in body if isinstance(node, ast.ClassDef)]
            assert not defined, f"{name} defines {defined[0].name}"
            functions = [node.name for node in body if isinstance(node, ast.FunctionDef)]
            assert functions in ([], ["__getattr__"]), name  # by which what takes seconds is imported at first use
