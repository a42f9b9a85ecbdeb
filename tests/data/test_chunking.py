# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import json
import sys

import pytest

from trl_dro.data import DatasetError, open_corpus, read_corpus
from trl_dro.data.chunking import DocumentFolder


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "documents"
    (folder / "guide").mkdir(parents=True)
    (folder / "notes.txt").write_text(" ".join(f"word{number}" for number in range(250)))
    (folder / "guide" / "start.md").write_text("Preface.\n\n# First steps #\n\nOpen the box.\n\n## Later\n")
    rows = [{"id": "a", "title": "Bees", "text": "Bees make honey."}, {"text": "Wasps do not."}]
    (folder / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def by_id(folder, **settings):
    return {row["id"]: row for _, row in DocumentFolder(folder, **settings).passages(show_progress=False)}


def test_documents_are_cut_into_passages_of_equal_length_without_loss(folder):
    passages = by_id(folder)
    notes = [passages[f"notes.txt#{number}"]["text"] for number in range(3)]
    assert [len(text.split()) for text in notes] == [100, 100, 50]
    assert " ".join(notes) == (folder / "notes.txt").read_text()


def test_ids_and_titles_tell_where_a_passage_comes_from(folder):
    titles = {passage_id: row["title"] for passage_id, row in by_id(folder).items()}
    assert titles == {
        "facts.jsonl:a#0": "Bees",
        "facts.jsonl:1#0": "facts",
        "guide/start.md#0": "First steps",
        "notes.txt#0": "notes",
        "notes.txt#1": "notes",
        "notes.txt#2": "notes",
    }


def test_ids_stay_when_other_documents_come_and_go(folder):
    before = by_id(folder)
    (folder / "a_new_one.txt").write_text("New.")
    (folder / "facts.jsonl").unlink()
    after = by_id(folder)
    assert {key: row for key, row in before.items() if not key.startswith("facts")} == {
        key: row for key, row in after.items() if not key.startswith("a_new")
    }


def test_length_of_a_passage_can_be_set(folder, tmp_path):
    corpus = open_corpus(folder, tmp_path / "cache", words_per_passage=60, show_progress=False)
    assert sum(row["id"].startswith("notes") for row in corpus.passages) == 5
    assert corpus.fingerprint != open_corpus(folder, tmp_path / "cache", show_progress=False).fingerprint
    with pytest.raises(DatasetError, match="words_per_passage=0"):
        DocumentFolder(folder, words_per_passage=0)


def test_fingerprint_is_that_of_names_and_contents(folder):
    before = DocumentFolder(folder).fingerprint()
    (folder / ".hidden.txt").write_text("Not read.")
    assert DocumentFolder(folder).fingerprint() == before
    (folder / "notes.txt").rename(folder / "renamed.txt")
    assert DocumentFolder(folder).fingerprint() != before


def test_what_is_left_out_is_said(folder, caplog):
    (folder / "blank.txt").write_text(" \n")
    (folder / "table.xlsx").write_bytes(b"\x00")
    (folder / "picture.png").write_bytes(b"\x00")
    by_id(folder)
    assert "2 files are of no known kind and left out (1 .png, 1 .xlsx)" in caplog.text
    assert "1 documents have no words" in caplog.text and "blank.txt" in caplog.text


def test_folder_without_documents_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="has no documents"):
        read_corpus(tmp_path)


def test_broken_document_is_refused_with_file_and_line(folder):
    (folder / "facts.jsonl").write_text('{"text": "good"}\n{"body": "bad"}\n')
    with pytest.raises(DatasetError, match=r"facts\.jsonl, line 2: has no key text"):
        by_id(folder)
    (folder / "facts.jsonl").unlink()
    (folder / "old.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(DatasetError, match=r"old\.txt, line 1: is not UTF-8"):
        by_id(folder)


def test_html_gives_title_and_visible_text(tmp_path):
    pytest.importorskip("bs4", reason="needs beautifulsoup4: pip install trl_dro[documents]")
    page = "<html><head><title>Bees</title><script>var x;</script></head><body><p>Bees <b>make</b></p><p>honey.</p>"
    (tmp_path / "page.html").write_text(page)
    [passage] = by_id(tmp_path).values()
    assert passage == {"id": "page.html#0", "title": "Bees", "text": "Bees make honey."}


def test_pdf_gives_its_text(tmp_path):
    pypdf = pytest.importorskip("pypdf", reason="needs pypdf: pip install trl_dro[documents]")
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    writer = pypdf.PdfWriter()
    page = writer.add_blank_page(width=200, height=200)
    font = DictionaryObject(
        {
            NameObject("/Type"): NameObject("/Font"),
            NameObject("/Subtype"): NameObject("/Type1"),
            NameObject("/BaseFont"): NameObject("/Helvetica"),
        }
    )
    page[NameObject("/Resources")] = DictionaryObject(
        {NameObject("/Font"): DictionaryObject({NameObject("/F1"): writer._add_object(font)})}
    )
    content = DecodedStreamObject()
    content.set_data(b"BT /F1 12 Tf 20 100 Td (Bees make honey.) Tj ET")
    page[NameObject("/Contents")] = writer._add_object(content)
    writer.add_metadata({"/Title": "Bees"})
    writer.write(tmp_path / "bees.pdf")
    [passage] = by_id(tmp_path).values()
    assert passage == {"id": "bees.pdf#0", "title": "Bees", "text": "Bees make honey."}
    (tmp_path / "bees.pdf").write_bytes(b"no PDF")
    with pytest.raises(DatasetError, match="cannot be read as PDF"):
        by_id(tmp_path)


@pytest.mark.parametrize("name, package", [("page.html", "bs4"), ("file.pdf", "pypdf")])
def test_missing_extra_is_named(name, package, tmp_path, monkeypatch):
    (tmp_path / name).write_text("x")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install trl_dro\[documents\]"):
        by_id(tmp_path)
