# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
Docstrings in TRL's form as Markdown, for the API reference: an extension of griffe, which mkdocs.yml names. Arguments
become definition lists, references links, formulas MathML, which browsers draw without a script.
"""

import re
from typing import Any

import griffe
from latex2mathml.converter import convert


SECTION = re.compile(r"(Args|Parameters|Returns|Raises|Example|References):")
# `name (type): description`, or `type: description` where errors are listed.
ITEM = re.compile(r"(?P<name>[\w, *]+?)(?: \((?P<type>.+?)\))?:(?: (?P<text>.*))?")
ERROR = re.compile(r"(?P<name>\[?`[^:]+`\]?):(?: (?P<text>.*))?")
FORMULA = re.compile(r"\\\\\(\s*(.+?)\s*\\\\\)", re.DOTALL)
REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\]")
FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


class TRLDocstrings(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        self._convert(pkg)

    def _convert(self, obj: griffe.Object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value, obj)
        for member in obj.members.values():
            if not member.is_alias:
                self._convert(member)


def markdown(docstring: str, obj: griffe.Object) -> str:
    """Markdown of a docstring of `obj`."""
    sections: list[tuple[str, list[str]]] = [("", [])]
    fenced = False
    for line in docstring.splitlines():
        fenced ^= line.lstrip().startswith("```")
        if not fenced and SECTION.fullmatch(line):
            sections.append((line[:-1], []))
        elif line.strip() and line[0] != " " and not fenced and sections[-1][0] not in ("", "Example"):
            sections.append(("", [line]))  # prose goes on behind a section
        else:
            sections[-1][1].append(line)
    return "\n\n".join(_inline(_section(title, lines), obj) for title, lines in sections)


def _section(title: str, lines: list[str]) -> str:
    if title == "":
        return "\n".join(_notes(lines))
    indent = 0 if title == "Example" else 4
    lines = [line[indent:] if line[:indent].isspace() else line for line in lines]
    if title in ("Args", "Parameters"):
        lines = _definitions(lines, ITEM)
    elif title == "Raises":
        lines = _definitions(lines, ERROR)
    elif title == "References":
        lines = [re.sub(r"^\[(\d+)\]", r"\1.", line) for line in lines]
    return "\n".join([f"**{title}**", "", *lines])


def _definitions(lines: list[str], item: re.Pattern) -> list[str]:
    """A definition list; lines that begin with `>` are headings within it."""
    written: list[str] = []
    for line in lines:
        match = item.fullmatch(line)
        if match is not None and line[0] != " ":
            name = match["name"] if "`" in match["name"] else f"`{match['name']}`"
            kind = match.groupdict().get("type")
            written += ["", name + (f" ({kind})" if kind else ""), f":   {match['text'] or ''}"]
        elif line.startswith("> "):
            written += ["", f"*{line[2:]}*", ""]
        else:
            written.append("    " + line.strip() if line.strip() else "")
    return written


def _notes(lines: list[str]) -> list[str]:
    """GitHub's notes as admonitions."""
    written, inside = [], False
    for line in lines:
        if line.startswith("> [!NOTE]"):
            inside = True
            written.append("!!! note\n")
        elif inside and line.startswith(">"):
            written.append("    " + line[2:])
        else:
            inside = False
            written.append(line)
    return written


def _inline(text: str, obj: griffe.Object) -> str:
    parts = FENCE.split(text)
    for i in range(0, len(parts), 2):  # between the code blocks
        parts[i] = FORMULA.sub(lambda match: convert(" ".join(match[1].split())), parts[i])
        parts[i] = REFERENCE.sub(lambda match: _link(match[2], bool(match[1]), obj), parts[i])
    return "".join(parts)


def _link(name: str, short: bool, obj: griffe.Object) -> str:
    """A link to a name of ours, from the package, a room of it or the module of `obj`; other names are only shown."""
    shown = f"<code>{name.rsplit('.', 1)[-1] if short else name}</code>"
    rooms = [member for member in obj.package.members.values() if not member.is_alias and member.is_module]
    for module in (obj.package, obj.module, *rooms):
        target: griffe.Object | griffe.Alias = module
        try:
            for part in name.split("."):
                target = target.members[part]
            path = target.canonical_path
        except (KeyError, griffe.AliasResolutionError):
            continue
        return f'<autoref optional identifier="{path}">{shown}</autoref>'
    return shown
