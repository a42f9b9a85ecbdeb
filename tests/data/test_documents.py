# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import json
import sys

import pytest

from trl_dro.data import DatasetError
from trl_dro.data.documents import read_documents, without_running_lines


NEEDS = "pip install trl_dro[documents]"


def read(path, content=None):
    """Title and blocks of the only document of a file."""
    if content is not None:
        path.write_text(content)
    [(_, _, reading)] = read_documents(path)
    return reading.title, [(" > ".join(block.headings), block.text) for block in reading.blocks]


def test_markdown_has_headings_and_neither_front_matter_nor_marks(tmp_path):
    title, blocks = read(
        tmp_path / "hotels.md",
        "---\ntitle: 'Hotels'\ntags: [a, b]\n---\n\nBefore.\n\n# Travel\n\nBook *early*, see [rules](r.html).\n\n"
        "Prices\n------\n\n- Low\n- High\n\n```\n# no heading\n```\n<!-- hidden -->\n\n# Food #\n\nEat &amp; drink.\n",
    )
    assert title == "Hotels"
    assert blocks == [
        ("", "Before."),
        ("Travel", "Book early, see rules."),
        ("Travel > Prices", "- Low"),
        ("Travel > Prices", "- High"),
        ("Travel > Prices", "# no heading"),
        ("Food", "Eat & drink."),
    ]


@pytest.mark.parametrize(
    "text, title",
    [
        ("Preface.\n\n# Bees #\n\nFly.\n\n## Wings\n\nFour.\n", "Bees"),
        ("# Bees\n\nFly.\n\n# Wasps\n\nSting.\n", "insects"),  # none is that of the document
        ("Fly.\n", "insects"),
        ("---\ntitle: of nothing\n\n# Bees\n\nFly.", "Bees"),  # a line, which nothing closes
        ('+++\ntitle = "Bees"\n+++\n# Wasps\n\nSting.\n', "Bees"),
    ],
)
def test_title_is_that_of_the_document(text, title, tmp_path):
    assert read(tmp_path / "insects.md", text)[0] == title


ROWS = ["City: Rome; Limit: 120 EUR.", "City: Paris; Limit: 150 EUR."]
CELLS = [["City", "Limit"], ["Rome", "120 EUR"], ["Paris", "150 EUR"]]


def html_table(cells, head="td"):
    tags = [head, *["td"] * (len(cells) - 1)]
    rows = ["".join(f"<{tag}>{cell}</{tag}>" for cell in row) for tag, row in zip(tags, cells, strict=True)]
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def test_rows_of_tables_have_the_names_of_their_columns(tmp_path):
    markdown = "|City|Limit|\n|:--|--:|\n|Rome|120 EUR|\n|Paris|150 EUR|\n"
    (tmp_path / "a.csv").write_text("City;Limit\nRome;120 EUR\nParis;150 EUR\n")
    (tmp_path / "a.tsv").write_text("City\tLimit\nRome\t120 EUR\nParis\t150 EUR\n")
    rows = [dict(zip(CELLS[0], row, strict=True)) for row in CELLS[1:]]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    assert [text for _, text in read(tmp_path / "a.md", markdown)[1]] == ROWS
    for kind in ("csv", "tsv", "json"):
        found = [reading for _, _, reading in read_documents(tmp_path / f"a.{kind}")]
        assert [reading.blocks[0].text for reading in found] == ROWS, kind
        assert {reading.title for reading in found} == {"a"}
        assert all(reading.blocks[0].is_row for reading in found)


def test_rows_of_html_tables_have_the_names_of_their_columns(tmp_path):
    pytest.importorskip("bs4", reason=NEEDS)
    for head in ("td", "th"):
        assert [text for _, text in read(tmp_path / "a.html", html_table(CELLS, head))[1]] == ROWS
    by_row = "<table><tr><th>Phone</th><td>12</td></tr><tr><th>Fax</th><td>13</td></tr></table>"
    assert [text for _, text in read(tmp_path / "a.html", by_row)[1]] == ["Phone: 12.", "Fax: 13."]
    layout = f"<table><tr><td><h2>Travel</h2><p>Early.</p></td><td>{html_table(CELLS)}</td></tr></table>"
    assert read(tmp_path / "a.html", layout)[1] == [("Travel", "Early."), *[("Travel", row) for row in ROWS]]


PAGE = """<!DOCTYPE html><html><head><title>Hotels | Example</title><style>p {}</style></head><body>
<header><h1>Example</h1></header><nav><ul><li><a href="/">Home</a></li></ul></nav>
<div class="side-menu"><a href="a">Trains</a> <a href="b">Planes</a></div><div class="page">
<article><header><h1>Hotels</h1></header><p>Book <b>ear</b>ly,<br>and cheap.</p>
<h2>Prices<a class="headerlink" href="#p">¶</a></h2>
<p>Low.</p><p hidden>No.</p><ul><li>One</li><li>Two</li></ul><!-- no --><div class="menu">Soup, bread and wine.</div>
</article></div><aside>Read this too.</aside><footer>Imprint</footer><script>var x;</script></body></html>"""


def test_html_is_read_without_what_leads_elsewhere(tmp_path):
    pytest.importorskip("bs4", reason=NEEDS)
    title, blocks = read(tmp_path / "page.html", PAGE)
    assert title == "Hotels | Example"
    assert blocks == [
        ("Hotels", "Book early, and cheap."),
        ("Hotels > Prices", "Low."),
        ("Hotels > Prices", "- One"),
        ("Hotels > Prices", "- Two"),
        ("Hotels > Prices", "Soup, bread and wine."),
    ]
    main = PAGE.replace("<article>", "<p>Cookies?</p><main>").replace("</article>", "</main>")
    assert read(tmp_path / "page.html", main)[1] == blocks


def test_word_document_has_headings_lists_and_tables(tmp_path):
    docx = pytest.importorskip("docx", reason=NEEDS)
    document = docx.Document()
    document.add_heading("Handbook", 0)
    document.add_heading("Travel", 1)
    document.add_paragraph("Book early.")
    document.add_heading("Hotels", 2)
    document.add_paragraph("Ritz", style="List Bullet")
    table = document.add_table(rows=3, cols=2)
    for row, cells in zip(table.rows, CELLS, strict=True):
        for cell, text in zip(row.cells, cells, strict=True):
            cell.text = text
    document.add_heading("Food", 1)
    document.add_paragraph("Eat.")
    document.save(str(tmp_path / "a.docx"))
    title, blocks = read(tmp_path / "a.docx")
    assert title == "Handbook"
    assert blocks == [
        ("Travel", "Book early."),
        ("Travel > Hotels", "- Ritz"),
        *[("Travel > Hotels", row) for row in ROWS],
        ("Food", "Eat."),
    ]


def write_pdf(path, pages, title=None):
    """A PDF with a line of text on each page."""
    pypdf = pytest.importorskip("pypdf", reason=NEEDS)
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    writer = pypdf.PdfWriter()
    font = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica"}
    font = DictionaryObject({NameObject(key): NameObject(value) for key, value in font.items()})
    for text in pages:
        page = writer.add_blank_page(width=400, height=200)
        fonts = DictionaryObject({NameObject("/F1"): writer._add_object(font)})
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
        content = DecodedStreamObject()
        content.set_data(f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET".encode())
        page[NameObject("/Contents")] = writer._add_object(content)
    if title is not None:
        writer.add_metadata({"/Title": title})
    path.parent.mkdir(exist_ok=True)
    writer.write(path)
    return path


def test_pdf_tells_the_page_on_which_a_sentence_begins(tmp_path):
    path = write_pdf(tmp_path / "bees.pdf", ["Bees fly. They make", "honey. Wasps sting.", "", "Ants"], "Bees")
    [(_, _, reading)] = read_documents(path)
    assert reading.title == "Bees"
    assert [(block.text, block.page) for block in reading.blocks] == [
        ("Bees fly.", 1),
        ("They make honey.", 1),
        ("Wasps sting.", 2),
        ("Ants", 4),
    ]


def test_running_heads_and_feet_of_pages_are_left_out():
    pages = [
        f"Report 2024\n\nBees fly {word}.\n3 {number} 7\nPage {number} of 4" for number, word in enumerate("abcd")
    ]
    pages[2] = "Contents\nBees 3\n2"  # half of the pages are not most of them
    assert without_running_lines(pages) == [
        *("Bees fly a.\n3 0 7", "Bees fly b.\n3 1 7"),
        "Contents\nBees 3\n2",
        "Bees fly d.\n3 3 7",
    ]
    assert without_running_lines(pages[:2]) == pages[:2]
    assert without_running_lines(["Slide 1", "Slide 2", "Slide 3"]) == ["Slide 1", "Slide 2", "Slide 3"]
    assert without_running_lines([f"{word}\n{page}" for page, word in enumerate("abc")]) == ["a", "b", "c"]


def test_rows_with_a_text_are_documents_of_their_own(tmp_path):
    (tmp_path / "a.csv").write_text('id,title,text\nx,Bees,"Bees, which fly."\n,,Wasps.\n')
    (tmp_path / "a.json").write_text('[{"id": "x", "title": "Bees", "text": "Bees, which fly."}, {"text": "Wasps."}]')
    for kind in ("csv", "json"):
        found = [
            (own_id, reading.title, reading.blocks[0].text)
            for _, own_id, reading in read_documents(tmp_path / f"a.{kind}")
        ]
        assert found == [(":x", "Bees", "Bees, which fly."), (":1", "a", "Wasps.")]


def test_values_of_any_type_are_written_out(tmp_path):
    (tmp_path / "a.json").write_text('[{"name": "Ada", "born": 1815, "died": null, "tags": ["a"], "note": " "}]')
    assert read(tmp_path / "a.json")[1] == [("", 'name: Ada; born: 1815; tags: ["a"].')]
    (tmp_path / "full.json").write_text('[{"name": "Ada", "note": "She counts."}]')
    assert read(tmp_path / "full.json")[1] == [("", "name: Ada; note: She counts.")]
    (tmp_path / "lines.json").write_text('{"name": "Ada"}\n{"name": "Bo"}\n')  # many a file of lines is called so
    assert [reading.blocks[0].text for _, _, reading in read_documents(tmp_path / "lines.json")] == [
        "name: Ada.",
        "name: Bo.",
    ]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "a,b\n1,2\n1,2,3\n", "a.csv, line 3: has 3 columns, but the first line has 2"),
        ("a.csv", 'a,b\n1,"2\n3,4\n', "a.csv, line 2: cannot be read as comma-separated values"),
        ("a.csv", "a,a\n1,2\n", "a.csv, line 1: calls several columns 'a'; give each a name"),
        ("a.csv", "a,b\n", "a.csv: is empty; write the names"),
        ("a.csv", b"a,b\ncaf\xe9,2\n", "a.csv, line 2: is not UTF-8"),
        ("a.json", "[1]", "a.json, item 0: is a int, not an object"),
        ("a.json", "[{}", "a.json: holds no array of objects"),
        ("a.json", "[]", "a.json: is empty"),
        ("a.json", " ", "a.json: is empty"),
        ("a.json", '[{"text": "a"}, {"body": "b"}]', "a.json, item 1: has no key text, only 'body'"),
        ("a.json", '{\n"a": 1}', "a.json: holds no array of objects, nor one on each line .*; write one of these"),
        ("a.docx", "no archive", "a.docx: cannot be read as a Word document .*; save it again"),
        ("a.pdf", "no PDF", "a.pdf: cannot be read as PDF .*; save it again"),
        ("a.html", "<![x]>", "a.html: cannot be read as HTML .*; save it again"),
    ],
)
def test_broken_files_are_refused_by_name_in_one_line(name, content, message, tmp_path):
    for package in {"a.docx": ["docx"], "a.pdf": ["pypdf"], "a.html": ["bs4"]}.get(name, []):
        pytest.importorskip(package, reason=NEEDS)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DatasetError, match=message) as caught:
        list(read_documents(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, package", [("page.html", "bs4"), ("file.pdf", "pypdf"), ("file.docx", "docx")])
def test_missing_extra_is_named(name, package, tmp_path, monkeypatch):
    (tmp_path / name).write_text("x")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install trl_dro\[documents\]"):
        list(read_documents(tmp_path / name))
