# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import json
import random

import pytest

from trl_dro.data import Corpus, DatasetError, open_corpus, read_corpus
from trl_dro.data.chunking import DocumentFolder, cut_document
from trl_dro.data.documents import Block, Reading

from .test_documents import write_pdf


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


def test_texts_without_spaces_are_cut_into_passages_too():
    sentences = [
        "青函トンネルは、本州と北海道を結ぶ鉄道トンネルである。",
        "全長は53.85キロメートルで、1988年に開業した。",
        "「世界で一番長い。」と言われたが、2016年に抜かれた。",
        "工事には二十四年かかった。",
    ]
    document = Reading("青函", [Block("".join(sentences))])
    passages = [text for _, text, _ in cut_document(document, words_per_passage=23)]
    assert passages == [sentences[0], "".join(sentences[1:3]), sentences[3]]
    overlapping = [text for _, text, _ in cut_document(document, words_per_passage=30, overlap_words=16)]
    assert overlapping == ["".join(sentences[:2]), "".join(sentences[1:])]
    long = "长江发源于青藏高原" * 30
    pieces = [text for _, text, _ in cut_document(Reading("长江", [Block(long)]))]
    assert [len(piece) for piece in pieces] == [200, 70] and "".join(pieces) == long


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
    (folder / "~$notes.txt").write_text("The lock of a document that is open elsewhere.")
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


def test_passages_end_where_sentences_do(tmp_path):
    sentences = [f"Sentence {number} has these six words." for number in range(5)]
    (tmp_path / "a.txt").write_text(" ".join(sentences))
    texts = [row["text"] for row in by_id(tmp_path, words_per_passage=16).values()]
    assert texts == [" ".join(sentences[:2]), " ".join(sentences[2:4]), sentences[4]]


def test_a_passage_begins_with_the_last_sentences_of_the_one_before(tmp_path):
    sentences = [f"Sentence {number} has these six words." for number in range(4)]
    (tmp_path / "a.txt").write_text(" ".join(sentences))
    texts = [row["text"] for row in by_id(tmp_path, words_per_passage=13, overlap_words=7).values()]
    assert texts == [" ".join(sentences[number : number + 2]) for number in range(3)]
    assert len(by_id(tmp_path, words_per_passage=13, overlap_words=5)) == 2  # no sentence is as short
    assert DocumentFolder(tmp_path, 13, 7).fingerprint() != DocumentFolder(tmp_path, 13).fingerprint()
    with pytest.raises(DatasetError, match="overlap_words=13 must be at least 0 and below words_per_passage=13"):
        DocumentFolder(tmp_path, 13, 13)


def test_overlap_never_makes_a_passage_longer(tmp_path):
    rng = random.Random(0)
    sentences = [" ".join(["Word"] * rng.randint(1, 30)) + "." for _ in range(100)]
    (tmp_path / "a.txt").write_text(" ".join(sentences))
    texts = [row["text"] for row in by_id(tmp_path, words_per_passage=20, overlap_words=12).values()]
    assert max(len(text.split()) for text in texts) == 20


def test_titles_are_the_path_of_headings(tmp_path):
    text = "# Handbook\n\nAll.\n\n## Travel\n\nFar.\n\n### Hotels\n\nRitz.\n\n## Food\n\nEat.\n"
    (tmp_path / "a.md").write_text(text)
    assert [(row["title"], row["text"]) for row in by_id(tmp_path).values()] == [
        ("Handbook", "All."),
        ("Handbook > Travel", "Far."),
        ("Handbook > Travel > Hotels", "Ritz."),
        ("Handbook > Food", "Eat."),
    ]


def test_a_title_that_holds_the_highest_heading_is_not_followed_by_it():
    document = Reading("Travel | Example Inc", [Block("Far.", ("Travel", "Hotels"))])
    assert list(cut_document(document)) == [("Travel | Example Inc > Hotels", "Far.", None)]


def test_rows_of_a_table_are_not_cut(tmp_path):
    rows = [Block(f"City: Rome. Old {number}; Limit: 100.", is_row=True) for number in range(3)]  # 6 words
    texts = [text for _, text, _ in cut_document(Reading("a", rows), words_per_passage=15)]
    assert texts == [f"{rows[0].text} {rows[1].text}", rows[2].text]


def test_passages_have_the_page_on_which_they_begin(tmp_path):
    write_pdf(tmp_path / "bees.pdf", ["Bees fly. They make", "honey. Wasps sting."], "Bees")
    (tmp_path / "a.txt").write_text("Ants.")
    rows = [(key, row["text"], row["page"]) for key, row in by_id(tmp_path, words_per_passage=3).items()]
    expected = [("a.txt#0", "Ants.", None), ("bees.pdf#0", "Bees fly.", 1), ("bees.pdf#1", "They make honey.", 1)]
    assert rows == [*expected, ("bees.pdf#2", "Wasps sting.", 2)]
    corpus = open_corpus(tmp_path, tmp_path / "cache", show_progress=False)
    assert [passage["page"] for passage in corpus.documents([1, 0])] == [1, None]
    passages = read_corpus(tmp_path)
    for again in (corpus, Corpus.from_documents(passages)):
        assert again.documents(range(len(again))) == passages and len(passages) == 3


def test_no_passage_goes_over_the_end_of_a_page(tmp_path):
    write_pdf(tmp_path / "bees.pdf", ["Bees fly. They", "sting. Wasps too.", "Ants walk."])
    assert [(row["text"], row["page"]) for row in by_id(tmp_path, overlap_words=20).values()] == [
        ("Bees fly. They sting.", 1),
        ("Wasps too.", 2),
        ("Ants walk.", 3),
    ]


def test_one_document_is_a_corpus(tmp_path):
    (tmp_path / "a.md").write_text("# Bees\n\nBees fly.\n")
    (tmp_path / "b.md").write_text("No.")
    assert read_corpus(tmp_path / "a.md") == [{"id": "a.md#0", "title": "Bees", "text": "Bees fly."}]
