# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Documents in the forms that people have them in, as blocks of text under headings."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

from .lines import first_line, read_json_array, read_jsonl, read_lines, read_table, require_key
from .schema import DatasetError
from .sentences import ENDS, split_sentences


if TYPE_CHECKING:
    from bs4 import BeautifulSoup, Tag
    from docx.table import Table

ReadRows = Callable[[Path], Iterator[tuple[str, dict[str, Any]]]]

MOST_RUNNING_LINES = 3
HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")


class Block(NamedTuple):
    """
    A part of a document, which no passage has beside parts of other headings.

    Args:
        text (`str`):
            Its text.
        headings (`tuple[str, ...]`, *optional*, defaults to `()`):
            Headings above it, the highest first.
        page (`int`, *optional*):
            Page that it begins on, from 1, where documents have pages.
        is_row (`bool`, *optional*, defaults to `False`):
            Whether it is the row of a table, which is cut only if it is too long for a passage.
    """

    text: str
    headings: tuple[str, ...] = ()
    page: int | None = None
    is_row: bool = False


class Reading(NamedTuple):
    """Title, empty if a document tells none, and blocks of a document."""

    title: str
    blocks: list[Block]


def read_documents(path: Path) -> Iterator[tuple[str, str, Reading]]:
    """
    Yields of each document of a file its place for error messages, what follows the file's name in its id, and itself.

    Args:
        path (`Path`): file whose name ends in one of `SUFFIXES`.

    Raises:
        `DatasetError`: the file is damaged, or no UTF-8, or a row has no text where the first one has; the message
            names the file.
        `ImportError`: the form needs an extra that is not installed.
    """
    kind = path.suffix.lower()
    if kind in TABLES:
        yield from _rows(path, TABLES[kind])
        return
    try:
        title, blocks = WHOLE[kind](path)
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror or error}); check the file") from None
    yield str(path), "", Reading(" ".join(title.split()) or _title(path, blocks), blocks)


def _title(path: Path, blocks: list[Block]) -> str:
    """The one heading above all others, if there is one, else the name of the file."""
    highest = {block.headings[0] for block in blocks if block.headings}
    return highest.pop() if len(highest) == 1 else path.stem


def _rows(
    path: Path, read: Callable[[Path], Iterator[tuple[str, dict[str, Any]]]]
) -> Iterator[tuple[str, str, Reading]]:
    has_texts: bool | None = None
    for number, (where, row) in enumerate(read(path)):
        if has_texts is None:
            has_texts = "text" in row
        if not has_texts:
            cells = [(name, value if isinstance(value, str) else _shown(value)) for name, value in row.items()]
            yield where, f":{number}", Reading(path.stem, [Block(_row_text(cells), is_row=True)])
            continue
        require_key(row, "text", where)
        title, text = row.get("title") or path.stem, row["text"]
        if not isinstance(text, str) or not isinstance(title, str):
            raise DatasetError(f"{where}: title and text must be strings; convert them")
        own = number if row.get("id") in (None, "") else row["id"]
        yield where, f":{own}", Reading(title, [Block(text)])


def _shown(value: Any) -> str:
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def _row_text(cells: Iterable[tuple[str, str]]) -> str:
    """A row of a table with the names of its columns: `City: Rome; Limit: 120 EUR.`"""
    named = [f"{name}: {value}" if name else value for name, value in cells if value.strip()]
    text = "; ".join(" ".join(each.split()) for each in named)
    return text if not text or text.endswith(ENDS) else f"{text}."


def _table_texts(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows of a table, each with the names of the columns, which stand in the first one; a single row as it is."""
    if len(rows) < 2:
        return [_row_text(("", cell) for cell in row) for row in rows]
    names, *others = rows
    padded = [*names, *[""] * max(len(row) for row in rows)]
    return [_row_text(zip(padded, row, strict=False)) for row in others]


class _Outline:
    """Blocks under the headings that stand above them."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.above: list[tuple[int, str]] = []

    def heading(self, level: int, text: str) -> None:
        if text := " ".join(text.split()):
            self.above = [*takewhile(lambda above: above[0] < level, self.above), (level, text)]

    def add(self, text: str, is_row: bool = False) -> None:
        if text := " ".join(text.split()):
            self.blocks.append(Block(text, tuple(heading for _, heading in self.above), None, is_row))


def _plain(path: Path) -> Reading:
    return Reading("", [Block("".join(text for _, text in read_lines(path)))])


_FRONT_MATTER = re.compile(
    r"\A(---|\+\+\+)[ \t]*\n(?=\s*[\w\"-]+ *[:=])(.*?)^(?:\1|\.\.\.)[ \t]*(?:\n|\Z)", re.S | re.M
)
_FRONT_TITLE = re.compile(r"^title *[:=] *(.+?)\s*$", re.M)
_MARKUP = re.compile(r"<!--.*?-->|</?[a-zA-Z][^>]*>", re.S)


def _markdown(path: Path) -> Reading:
    text = "".join(text for _, text in read_lines(path)).replace("\r\n", "\n")
    title = ""
    if front_matter := _FRONT_MATTER.match(text):
        text = text[front_matter.end() :]
        if found := _FRONT_TITLE.search(front_matter[2]):
            title = found[1].strip("\"'")
    outline = _Outline()
    level, marker = 0, ""
    table: list[list[str]] | None = None
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        match token.type:
            case "heading_open":
                level = int(token.tag[1])
            case "inline" if level:
                outline.heading(level, _inline_text(token))
                level = 0
            case "inline" if table is not None:
                table[-1].append(_inline_text(token))
            case "inline":
                outline.add(marker + _inline_text(token))
                marker = ""
            case "list_item_open":
                marker = f"{token.info}{token.markup} "
            case "fence" | "code_block":
                outline.add(token.content)
            case "html_block":
                outline.add(_MARKUP.sub(" ", token.content))
            case "table_open":
                table = []
            case "tr_open" if table is not None:
                table.append([])
            case "table_close" if table is not None:
                for row in _table_texts(table):
                    outline.add(row, is_row=True)
                table = None
    return Reading(title, outline.blocks)


def _inline_text(token: Token) -> str:
    """Text without marks of emphasis, links and HTML; of pictures what stands for them."""
    parts = []
    for child in token.children or []:
        is_break = child.type in ("softbreak", "hardbreak") or child.content.lower().startswith("<br")
        parts.append(" " if is_break else "" if child.type == "html_inline" else child.content)
    return "".join(parts)


_BLOCKS = frozenset(
    "address article aside blockquote body caption center dd details dialog div dl dt fieldset figcaption figure "
    "footer form h1 h2 h3 h4 h5 h6 header hr li main ol p pre section summary table tbody td tfoot th thead tr "
    "ul".split()
)
# Of no page the text, and parts of pages that are about other pages, or lead to themselves (¶ of Sphinx and MkDocs).
_NO_TEXT = "script style template title noscript iframe svg button select textarea [hidden] [aria-hidden=true]"
_ELSEWHERE = "nav aside menu a.headerlink [role=navigation] [role=banner] [role=contentinfo] [role=search] [role=menu]"
_MENU = re.compile(r"(?:^|[-_])(?:nav|navbar|navigation|menu|sidebar|breadcrumbs?|footer)(?:$|[-_])", re.I)


def _html(path: Path) -> Reading:
    try:
        from bs4 import BeautifulSoup, ParserRejectedMarkup
        from bs4.element import PreformattedString
    except ImportError:
        raise ImportError(f"{path}: HTML needs beautifulsoup4: pip install trl_dro[documents]") from None
    try:
        # As bytes, because a page declares its own encoding.
        page = BeautifulSoup(path.read_bytes(), "html.parser")
    except ParserRejectedMarkup as error:
        raise DatasetError(f"{path}: cannot be read as HTML ({first_line(error)}); save it again") from None
    heading = page.title or page.h1
    title = heading.get_text() if heading else ""
    outline = _Outline()
    block: Tag | None = None
    name = ""
    words: list[str] = []

    def end_block() -> None:
        text = "".join(words)
        words.clear()
        if name in HEADINGS:
            outline.heading(int(name[1]), text)
        else:
            outline.add(f"- {text}" if name == "li" and text.strip() else text, is_row=name == "tr")

    for text in _content(page).find_all(string=True):
        if isinstance(text, PreformattedString):  # comments and declarations
            continue
        parent = next((parent for parent in text.parents if parent.name in _BLOCKS), None)
        if parent is not block:
            end_block()
            block, name = parent, parent.name if parent else ""
        words.append(text)
    end_block()
    return Reading(title, outline.blocks)


def _content(page: "BeautifulSoup") -> "Tag":
    """What a page is about, without what leads elsewhere; rows of tables as text, breaks as white space."""
    for element in page.select(", ".join(f"{_NO_TEXT} {_ELSEWHERE}".split())):
        element.decompose()
    for element in page(["header", "footer"]):
        # Those of an article are its own.
        if not element.decomposed and not element.find_parent(["main", "article", "section"]):
            element.decompose()
    for element in page(["div", "ul", "ol", "p", "section", "table"]):
        names = [] if element.decomposed else [*element.get_attribute_list("class"), element.get("id")]
        if any(_MENU.search(str(name)) for name in names if name):
            links = sum(len(link.get_text().split()) for link in element("a"))
            if 2 * links > len(element.get_text(" ").split()):  # and not the menu of a restaurant
                element.decompose()
    for element in page("br"):
        element.replace_with("\n")
    for table in page("table"):
        rows = [row(["td", "th"]) for row in table("tr")]
        cells = [[cell.get_text(" ") for cell in row] for row in rows]
        # Tables within tables, with headings, or of one column lay out a page.
        if table.find(["table", *HEADINGS]) or all(len(row) < 2 for row in rows):
            continue
        if any(cell.name == "td" for cell in rows[0]) and table.th:  # each row has a heading of its own
            texts = [_row_text([(row[0], "; ".join(row[1:]))]) if row else "" for row in cells]
        else:
            texts = _table_texts(cells)
        for row, text in zip(reversed(table("tr")), [*reversed(texts), *[""] * len(rows)], strict=False):
            row.string = text
    main = [element for element in page.select("main, [role=main]") if element.get_text(strip=True)]
    return main[0] if len(main) == 1 else page


def _docx(path: Path) -> Reading:
    try:
        from docx import Document
        from docx.table import Table
    except ImportError:
        raise ImportError(f"{path}: Word documents need python-docx: pip install trl_dro[documents]") from None
    outline = _Outline()
    title = ""
    try:
        document = Document(str(path))
        for part in document.iter_inner_content():
            if isinstance(part, Table):
                for text in _table_texts(_cells(part)):
                    outline.add(text, is_row=True)
                continue
            style = (part.style.name if part.style is not None else None) or ""
            if style == "Title" and not title:
                title = part.text
            elif match := re.fullmatch(r"Heading (\d)", style):
                outline.heading(int(match[1]), part.text)
            else:
                outline.add(f"- {part.text}" if style.startswith("List ") and part.text.strip() else part.text)
        title = title or document.core_properties.title or ""
    except Exception as error:  # whatever a damaged archive raises in zipfile, lxml or docx
        raise DatasetError(
            f"{path}: cannot be read as a Word document ({first_line(error)}); save it again as .docx or remove it"
        ) from None
    return Reading(title, outline.blocks)


def _cells(table: "Table") -> list[list[str]]:
    return [[cell.text for cell in row.cells] for row in table.rows]


def _pdf(path: Path) -> Reading:
    try:
        from pypdf import PdfReader
    except ImportError:
        raise ImportError(f"{path}: PDF needs pypdf: pip install trl_dro[documents]") from None
    try:
        reader = PdfReader(path)
        pages = without_running_lines([page.extract_text() for page in reader.pages])
        title = (reader.metadata.title if reader.metadata else None) or ""
    except Exception as error:  # whatever a damaged or locked file raises in pypdf
        raise DatasetError(
            f"{path}: cannot be read as PDF ({first_line(error)}); save it again or remove it"
        ) from None
    blocks: list[Block] = []
    for number, text in enumerate(pages, start=1):
        sentences = split_sentences(text)
        if blocks and sentences and sentences[0][0].islower():  # a sentence that began on an earlier page
            last = blocks.pop()
            blocks.append(last._replace(text=f"{last.text} {sentences.pop(0)}"))
        blocks += [Block(sentence, page=number) for sentence in sentences]
    return Reading(title, blocks)


def without_running_lines(pages: Sequence[str]) -> list[str]:
    """
    Texts of pages without their running heads and feet: up to three lines at the top and the bottom that more than
    half of at least three pages have in common, but for numbers, `Annual report, page 3`. A page keeps its last line.

    Args:
        pages (`list[str]`): text of each page.
    """
    lines = [page.strip().split("\n") for page in pages]
    if len(lines) < 3:
        return list(pages)
    for end, rest in ((0, slice(1, None)), (-1, slice(None, -1))):
        for _ in range(MOST_RUNNING_LINES):
            at_end = [re.sub(r"\d+", "#", each[end]).strip() for each in lines]
            # A row of numbers is no page's number.
            common = {
                text
                for text, count in Counter(at_end).items()
                if count > len(lines) / 2 and (re.search(r"[^\W\d_]", text) or text.count("#") < 2)
            }
            lines = [
                each[rest] if text in common and len(each) > 1 else each
                for each, text in zip(lines, at_end, strict=True)
            ]
    return ["\n".join(each) for each in lines]


WHOLE: dict[str, Callable[[Path], Reading]] = {
    ".txt": _plain,
    ".md": _markdown,
    ".html": _html,
    ".htm": _html,
    ".pdf": _pdf,
    ".docx": _docx,
}
TABLES: dict[str, ReadRows] = {
    ".csv": read_table,
    ".tsv": read_table,
    ".jsonl": read_jsonl,
    ".json": read_json_array,
}
SUFFIXES = (*WHOLE, *TABLES)
