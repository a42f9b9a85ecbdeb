# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import csv
import gzip
import json

import pytest
from datasets import Dataset, DatasetDict

from trl_dro.data import Corpus, DatasetError, open_corpus, read_corpus


PASSAGES = [
    {"id": "1", "title": "Red fox", "text": 'The "largest" of the true\tfoxes.'},
    {"id": "2", "title": "", "text": "Bees make honey."},
    {"id": "3", "title": "Café", "text": '"Quoted" from the first character.'},
]


def jsonl(path, rows=PASSAGES):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tsv(path, rows=PASSAGES, columns=("id", "text", "title")):
    """DPR's form: the columns id, text, title, quoted where they must be."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(columns)
        writer.writerows([row[column] for column in columns] for row in rows)
    return path


def zipped(path):
    target = path.with_name(path.name + ".gz")
    target.write_bytes(gzip.compress(path.read_bytes()))
    return target


def saved(path):
    Dataset.from_list(PASSAGES).save_to_disk(path)
    return path


def parquet(path):
    Dataset.from_list(PASSAGES).to_parquet(path)
    return path


FORMS = {
    "jsonl": lambda folder: jsonl(folder / "corpus.jsonl"),
    "jsonl.gz": lambda folder: zipped(jsonl(folder / "corpus.jsonl")),
    "tsv": lambda folder: tsv(folder / "corpus.tsv"),
    "tsv.gz": lambda folder: zipped(tsv(folder / "psgs_w100.tsv")),
    "parquet": lambda folder: parquet(folder / "corpus.parquet"),
    "saved dataset": lambda folder: saved(folder / "corpus"),
    "BEIR's columns": lambda folder: jsonl(
        folder / "corpus.jsonl", [{"_id": row["id"], "title": row["title"], "text": row["text"]} for row in PASSAGES]
    ),
    "Tevatron's columns": lambda folder: jsonl(
        folder / "corpus.jsonl", [{"docid": row["id"], "title": row["title"], "text": row["text"]} for row in PASSAGES]
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_passages(form, tmp_path):
    path = FORMS[form](tmp_path)
    corpus = open_corpus(path, tmp_path / "cache", show_progress=False)
    assert len(corpus) == 3
    assert corpus.documents([0, 1, 2]) == PASSAGES == read_corpus(path)


def test_passages_are_given_in_the_order_asked_for(tmp_path):
    corpus = open_corpus(jsonl(tmp_path / "corpus.jsonl"), tmp_path / "cache", show_progress=False)
    assert [passage["id"] for passage in corpus.documents([2, 0, 2])] == ["3", "1", "3"]
    assert corpus.texts(1, 3) == [" Bees make honey.", 'Café "Quoted" from the first character.']


def test_a_corpus_is_read_once_wherever_it_lies(tmp_path):
    first = open_corpus(jsonl(tmp_path / "corpus.jsonl"), tmp_path / "cache", show_progress=False)
    [copy] = (tmp_path / "cache" / "corpora").glob("*/passages.arrow")
    written = copy.stat().st_mtime_ns
    again = open_corpus(jsonl(tmp_path / "moved.jsonl"), tmp_path / "cache", show_progress=False)
    assert again.fingerprint == first.fingerprint and copy.stat().st_mtime_ns == written


def test_a_changed_passage_changes_the_fingerprint(tmp_path):
    first = open_corpus(jsonl(tmp_path / "corpus.jsonl"), tmp_path / "cache", show_progress=False)
    changed = [*PASSAGES[:2], PASSAGES[2] | {"text": "Another text."}]
    second = open_corpus(jsonl(tmp_path / "corpus.jsonl", changed), tmp_path / "cache", show_progress=False)
    assert second.fingerprint != first.fingerprint
    assert second.documents([2])[0]["text"] == "Another text."


def refused(path, *parts, read=None):
    """Refused by both readers with the same one line, and nothing is left that could be taken for a corpus."""
    messages = []
    for reader in (read_corpus, lambda path: open_corpus(path, path.parent / "cache", show_progress=False)):
        with pytest.raises(DatasetError) as info:
            reader(path)
        messages.append(str(info.value))
    assert messages[0] == messages[1]
    assert "\n" not in messages[0] and str(path) in messages[0]
    for part in parts:
        assert part in messages[0]
    assert not [place for place in (path.parent / "cache").glob("corpora/*") if place.is_dir()]


BROKEN = {
    "id repeated": ({"id": "1", "text": "again"}, ["line 4", "'1' is also the id of line 1", "remove"]),
    "text empty": ({"id": "4", "text": "  "}, ["line 4", "'4'", "non-empty"]),
    "wrong columns": ({"id": "4", "body": "text"}, ["line 4", "no key text", "'body'"]),
    "no id": ({"text": "text"}, ["line 4", "no key id", "'text'"]),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("pack", [lambda path: path, zipped], ids=["plain", "gzip"])
def test_broken_jsonl_is_refused_with_file_and_line(case, pack, tmp_path):
    row, parts = BROKEN[case]
    refused(pack(jsonl(tmp_path / "corpus.jsonl", [*PASSAGES, row])), *parts)


@pytest.mark.parametrize(
    "line, parts",
    [
        ("1\tagain\tt", ["line 5", "'1' is also the id of line 2"]),
        ("4\t\tt", ["line 5", "'4'", "non-empty"]),
        ("4\ttext", ["line 5", "2 columns", "'id', 'text', 'title'"]),
    ],
)
def test_broken_tsv_is_refused_with_file_and_line(line, parts, tmp_path):
    path = tsv(tmp_path / "corpus.tsv")
    path.write_text(path.read_text() + line + "\n")
    refused(path, *parts)


def test_a_quote_that_is_left_open_is_refused_where_it_opens_and_drops_no_passage(tmp_path):
    path = tmp_path / "corpus.tsv"
    rows = [[str(number), f'passage "{number}" of thirty', "title"] for number in range(30)]
    rows[3][1] = '"an open quote'
    rows[14][1] = 'it ends with "nothing"'
    path.write_text("".join("\t".join(row) + "\n" for row in [["id", "text", "title"], *rows]))
    refused(path, "line 5", "opens a quote that does not end before line 6", "close it")
    path.write_text('id\ttext\ttitle\n1\t"Quoted" only at first\ttitle\n')
    refused(path, "line 2", "quote a text that begins with a quote")


def test_a_quoted_text_may_have_tabs_and_line_breaks(tmp_path):
    texts = ["two\nlines", "a\ttab", 'three\n"quoted"\nlines']
    passages = [{"id": str(number), "text": text, "title": "t"} for number, text in enumerate(texts)]
    for columns in (("id", "text", "title"), ("text", "title", "id"), ("title", "id", "text")):
        assert [row["text"] for row in read_corpus(tsv(tmp_path / "corpus.tsv", passages, columns))] == texts


def test_tsv_without_names_of_columns_is_refused(tmp_path):
    path = tmp_path / "corpus.tsv"
    path.write_text("1\ttext\ttitle\n2\tother\ttitle\n")
    refused(path, "line 2", "no key id", "'1', 'text', 'title'")


def test_cut_and_damaged_gzip_are_refused_with_the_line(tmp_path):
    rows = [{"id": str(number), "title": "", "text": f"{number * 7919 % 10007} words"} for number in range(5000)]
    path = zipped(jsonl(tmp_path / "corpus.jsonl", rows))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, "line ", "gzip data is broken", "download")
    path.write_bytes(whole[:-8] + bytes(8))  # the checksum
    refused(path, "line 5001", "gzip data is broken")
    path.write_bytes(b"no gzip at all")
    refused(path, "line 1", "gzip data is broken")


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.tsv"])
def test_text_that_is_not_utf8_is_refused_with_the_line(name, tmp_path):
    path = (jsonl if name.endswith("jsonl") else tsv)(tmp_path / name)
    path.write_bytes(path.read_bytes() + '{"id": "caf\u00e9"}\n'.encode("latin-1"))
    refused(path, "line 4" if name.endswith("jsonl") else "line 5", "not UTF-8")


@pytest.mark.parametrize("name, content", [("a.jsonl", ""), ("a.tsv", ""), ("b.tsv", "id\ttext\n")])
def test_corpus_without_passages_is_refused(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    refused(tmp_path / name, "is empty")


def test_parquet_without_passages_or_broken_is_refused(tmp_path):
    Dataset.from_dict({"id": [], "text": []}).to_parquet(tmp_path / "none.parquet")
    refused(tmp_path / "none.parquet", "no passages")
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    refused(tmp_path / "broken.parquet", "cannot be read as Parquet")
    Dataset.from_list([*PASSAGES, {"id": "4", "title": "", "text": ""}]).to_parquet(tmp_path / "empty.parquet")
    refused(tmp_path / "empty.parquet", "row 3", "non-empty")


def test_missing_file_and_unreachable_hub_are_told_apart(tmp_path):
    refused(tmp_path / "absent.jsonl", "no such file")
    with pytest.raises(DatasetError, match="the Hub did not give it"):
        open_corpus("someone/something", tmp_path / "cache")


def test_dataset_of_several_splits_is_refused(tmp_path):
    DatasetDict(a=Dataset.from_list(PASSAGES), b=Dataset.from_list(PASSAGES)).save_to_disk(tmp_path / "corpus")
    with pytest.raises(DatasetError, match="splits a, b"):
        open_corpus(tmp_path / "corpus", tmp_path / "cache")


def test_corpus_of_nothing_is_refused():
    with pytest.raises(DatasetError, match="no passages"):
        Corpus.from_documents([])


def test_real_corpus_is_the_same_in_memory_and_on_disk(shared_data, tmp_path):
    path = shared_data / "nq" / "corpus.jsonl"
    corpus = open_corpus(path, tmp_path, show_progress=False)
    assert corpus.documents(range(len(corpus))) == read_corpus(path)
