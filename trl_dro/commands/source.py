# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Settings by the source of a module, which is not imported: help in a second instead of six."""

import __future__

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple


# Packages whose source is read, and those that are imported because that takes no time.
READ = ("trl_dro", "trl", "transformers")
IMPORTED = sys.stdlib_module_names | {"huggingface_hub", "packaging", "yaml"}


class UnreadableError(Exception):
    """A name means what its source does not tell for certain: import the module to know."""


class Definition(NamedTuple):
    """Where a name is defined, what it is called there, and under which conditions."""

    node: ast.stmt
    original: str
    conditions: tuple[ast.expr, ...]


class Source(dict[str, Any]):
    """
    Names of a module, each made when it is asked for, by running its own definition and those that it needs. Of
    dataclasses that come of TRL or transformers the methods are left out.

    Args:
        module (`str`):
            Full name.

    Raises:
        [`UnreadableError`]: on asking for a name which is defined in several places or in other packages.
    """

    def __init__(self, module: str):
        self.module = module
        self.path = source_path(module)
        tree = ast.parse(self.path.read_text(encoding="utf-8"))
        super().__init__(__name__=module, __doc__=ast.get_docstring(tree))
        self.definitions: dict[str, list[Definition]] = {}
        for node, conditions in _statements(tree.body, ()):
            for name, original in _defined_names(node):
                self.definitions.setdefault(name, []).append(Definition(node, original, conditions))

    def __missing__(self, name: str) -> Any:
        found = self.definitions.get(name, [])
        if not found:
            raise KeyError(name)
        if all(isinstance(each.node, ast.Import) for each in found):  # importlib.util and importlib.metadata, say
            modules = [_module(each.original) for each in found]
            self[name] = sys.modules.get(name, modules[0])
            return self[name]
        if len(found) > 1:
            found = [each for each in found if all(self._evaluate(condition) for condition in each.conditions)]
        if len(found) != 1:
            raise UnreadableError(f"{self.module} defines {name} in {len(found)} places")
        [(node, original, _)] = found
        match node:
            case ast.ImportFrom():
                self[name] = self._imported(node, original)
            case ast.ClassDef():
                self._run(self._without_methods(node))
            case ast.FunctionDef():
                self._run(_Bare().visit(node), __future__.annotations.compiler_flag)
            case _:
                self._run(node)
        return self[name]

    def _imported(self, node: ast.ImportFrom, original: str) -> Any:
        package = self.module if self.path.name == "__init__.py" else self.module.rpartition(".")[0]
        parent = package.rsplit(".", node.level - 1)[0] if node.level else ""
        module = ".".join(part for part in (parent, node.module) if part)
        if module.split(".")[0] in IMPORTED:
            return getattr(importlib.import_module(module), original)
        names = read(module)
        if original in names.definitions:
            return names[original]
        return _module(f"{module}.{original}")

    def _without_methods(self, node: ast.ClassDef) -> ast.ClassDef:
        """The class as far as its fields are concerned, and with its methods if its bases have theirs."""
        kinds = ast.AnnAssign | ast.Assign | ast.Expr | ast.Pass | ast.If
        bases = [self._evaluate(base) for base in node.bases]
        own = self.module.startswith("trl_dro.") and not any(_is_foreign(base) for base in bases)
        fields = [each for each in node.body if isinstance(each, kinds)]
        if len(fields) + sum(isinstance(each, ast.FunctionDef) for each in node.body) < len(node.body):
            raise UnreadableError(f"{self.module}.{node.name} has statements of other kinds")
        for each in ast.walk(ast.Module([each for each in fields if isinstance(each, ast.If)], [])):
            if isinstance(each, ast.AnnAssign):
                raise UnreadableError(f"{self.module}.{node.name} has fields under a condition")
            if isinstance(each, ast.ImportFrom):  # what a condition imports
                for name, original in _defined_names(each):
                    self.definitions.setdefault(name, []).append(Definition(each, original, ()))
        fields = [_WithoutImports().visit(each) for each in fields if ast.unparse(each) != "__repr__ = __str__"]
        methods = [_Bare().visit(each) for each in node.body if own and isinstance(each, ast.FunctionDef)]
        node.body = [*fields, *methods] or [ast.Pass()]
        return node

    def _evaluate(self, expression: ast.expr) -> Any:
        self._resolve(expression)
        tree = ast.fix_missing_locations(ast.Expression(expression))
        return eval(compile(tree, str(self.path), "eval"), self)

    def _resolve_types(self, annotation: ast.expr) -> None:
        """Of a class of another package, a type does not need more than the name."""
        for node in ast.walk(annotation):
            if isinstance(node, ast.Name) and node.id in self.definitions and node.id not in self:
                try:
                    self[node.id]
                except UnreadableError:
                    if not all(isinstance(each.node, ast.ImportFrom) for each in self.definitions[node.id][:1]):
                        raise
                    self[node.id] = type(node.id, (), {})

    def _run(self, node: ast.stmt, flags: int = 0) -> None:
        self._resolve(node)
        tree = ast.fix_missing_locations(ast.Module([node], []))
        exec(compile(tree, str(self.path), "exec", flags, dont_inherit=True), self)

    def _resolve(self, node: ast.AST) -> None:
        """Makes the names that a definition needs at once: a class body does not ask for them itself."""
        if isinstance(node, ast.FunctionDef):  # its body asks when it runs
            return
        if isinstance(node, ast.AnnAssign):
            self._resolve_types(node.annotation)
        for child in ast.iter_child_nodes(node):
            self._resolve(child)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in self.definitions:
            self[node.id]


class _Bare(ast.NodeTransformer):
    """Functions without types, which may come from any package."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)


class _WithoutImports(ast.NodeTransformer):
    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        return ast.Pass()


@cache
def read(module: str) -> Source:
    """The names of a module."""
    return Source(module)


@cache
def source_path(module: str) -> Path:
    """The file of a module, found without importing its package."""
    package, *parts = module.split(".")
    spec = importlib.util.find_spec(package) if package in READ else None
    if spec is None or spec.origin is None:
        raise UnreadableError(f"{module} is not among the packages whose source is read")
    path = Path(spec.origin).parent.joinpath(*parts)
    for file in (path / "__init__.py", path.with_suffix(".py")):
        if file.is_file():
            return file
    raise UnreadableError(f"there is no source of {module}")


def _module(name: str) -> Any:
    if name.split(".")[0] in IMPORTED:
        return importlib.import_module(name)
    names = read(name)

    class Names(SimpleNamespace):
        def __getattr__(self, attribute: str) -> Any:
            return names[attribute]

    return Names()


def _is_foreign(base: Any) -> bool:
    """Whether a class has its fields, but not its methods."""
    return any(each.__module__.startswith(("trl.", "transformers.")) for each in base.__mro__)


def _statements(
    body: list[ast.stmt], conditions: tuple[ast.expr, ...]
) -> Iterator[tuple[ast.stmt, tuple[ast.expr, ...]]]:
    """Statements of a module with their conditions. `TYPE_CHECKING` is taken to hold: what it imports can be read."""
    for node in body:
        yield node, conditions
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from _statements(node.body, conditions)
        elif isinstance(node, ast.If):
            yield from _statements(node.body, (*conditions, node.test))
            yield from _statements(node.orelse, (*conditions, ast.UnaryOp(ast.Not(), node.test)))
        elif isinstance(node, ast.Try):
            handled = [each for handler in node.handlers for each in handler.body]
            yield from _statements([*node.body, *node.orelse, *handled, *node.finalbody], conditions)


def _defined_names(node: ast.stmt) -> Iterator[tuple[str, str]]:
    """Names that a statement defines, and what they are called where they come from."""
    match node:
        case ast.Import() | ast.ImportFrom():
            for alias in node.names:
                yield alias.asname or alias.name.split(".")[0], alias.name
        case ast.ClassDef() | ast.FunctionDef():
            yield node.name, node.name
        case ast.Assign() | ast.AnnAssign() | ast.AugAssign():
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for each in ast.walk(target):
                    if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store):
                        yield each.id, each.id
