# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Questions about the passages of a corpus: written passage by passage, sifted, and split by document."""

import hashlib
import random
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..data.corpus import Corpus
from ..data.resumable import complete_rows
from ..data.schema import DatasetError, Document
from ..data.storage import content_key
from ..data.words import count_words
from ..retrieval.interface import Retriever
from .gates import refuse_by_text
from .writers import LocalModel, Pair, Writer


CANDIDATES_FILE = "candidates.jsonl"
MIN_WORDS = 8  # of a passage worth asking about

Row = dict[str, Any]


def choose_passages(corpus: Corpus, most: int | None = None, seed: int = 0) -> list[int]:
    """
    Places of the passages to write about: those of some words, or as many of them as asked for, drawn at random.

    Args:
        corpus ([`~data.corpus.Corpus`]):
            The passages.
        most (`int`, *optional*):
            Passages at most; all by default.
        seed (`int`, *optional*, defaults to `0`):
            Of the draw.

    Raises:
        `DatasetError`: there is no such passage.
    """
    places = list(range(len(corpus)))
    random.Random(seed).shuffle(places)
    chosen: list[int] = []
    for start in range(0, len(places), 1000):
        part = places[start : start + 1000]
        documents = corpus.documents(part)
        found = zip(part, documents, strict=True)
        chosen += [place for place, each in found if count_words(each["text"]) >= MIN_WORDS]
        if most is not None and len(chosen) >= most:
            break
    if not chosen:
        raise DatasetError(f"no passage of the corpus has {MIN_WORDS} words to ask about: give longer documents")
    return sorted(chosen[:most])


def write_candidates(
    corpus: Corpus,
    places: Sequence[int],
    writer: Writer,
    judge: LocalModel | None,
    retriever: Retriever,
    output_dir: str | Path,
    count: int = 3,
    depth: int = 20,
) -> list[Row]:
    """
    Writes questions about passages and tells of each what the gates ask for, one line of `candidates.jsonl` for each
    passage. What an earlier call left of the same work is kept.

    Args:
        corpus ([`~data.corpus.Corpus`]):
            The passages.
        places (`list[int]`):
            Places of those to write about.
        writer ([`~writers.Writer`]):
            Writes the questions.
        judge ([`~writers.LocalModel`], *optional*):
            Tells how much likelier a passage makes its answers.
        retriever (`Retriever`):
            Looks for the passages, over the same corpus.
        output_dir (`str` or `Path`):
            Folder of the file.
        count (`int`, *optional*, defaults to `3`):
            Questions about each passage, at most.
        depth (`int`, *optional*, defaults to `20`):
            How far down the ranking is looked.

    Returns:
        `list[dict]`: of each passage `row`, `passage_id`, `document`, `seconds`, `tokens` and `candidates`, each with
        `id`, `question`, `answer`, `refused` (by its text), `rank` and `gain`.
    """
    depth = min(depth, len(corpus))

    def work(left: list[int]) -> Iterator[tuple[list[int], list[Row]]]:
        for start in range(0, len(left), writer.at_once):
            rows = left[start : start + writer.at_once]
            passages = corpus.documents([places[row] for row in rows])
            if isinstance(writer, LocalModel):
                writer.begin_at(rows[0])
            begin = time.perf_counter()
            written = writer.write(passages, count)
            judged = [
                _judge(passage, each.pairs, retriever, judge, depth)
                for passage, each in zip(passages, written, strict=True)
            ]
            seconds = (time.perf_counter() - begin) / len(rows)
            yield (
                rows,
                [
                    {
                        "passage_id": passage["id"],
                        "document": document_of(passage),
                        "seconds": round(seconds, 3),
                        "tokens": each.tokens,
                        "candidates": candidates,
                    }
                    for passage, each, candidates in zip(passages, written, judged, strict=True)
                ],
            )

    settings = {
        "corpus": corpus.fingerprint,
        "passages_sha256": content_key(list(places)),
        "writer": writer.settings,
        "judge": None if judge is None else judge.settings,
        "retriever": retriever.settings,
        "questions_per_passage": count,
        "depth": depth,
    }
    path = Path(output_dir) / CANDIDATES_FILE
    return complete_rows(path, len(places), settings, work, "Writing questions", unit="passage")


def _judge(
    passage: Document, pairs: Sequence[Pair], retriever: Retriever, judge: LocalModel | None, depth: int
) -> list[Row]:
    candidates: list[Row] = [
        {
            "id": f"{passage['id']}/q{number}",
            "question": pair.question,
            "answer": pair.answer,
            "refused": refuse_by_text(pair, passage),
            "rank": None,
            "gain": None,
        }
        for number, pair in enumerate(pairs)
    ]
    sound = [each for each in candidates if each["refused"] is None]
    rankings = retriever.search([each["question"] for each in sound], depth) if sound else []
    for each, ranking in zip(sound, rankings, strict=True):
        ids = [document["id"] for document in ranking]
        each["rank"] = ids.index(passage["id"]) + 1 if passage["id"] in ids else None
    found = [each for each in sound if each["rank"] is not None]
    if judge is not None:
        gains = judge.gains(passage, [Pair(each["question"], each["answer"]) for each in found])
        for each, gain in zip(found, gains, strict=True):
            each["gain"] = round(gain, 3)
    return candidates


def document_of(passage: Document) -> str:
    """The document that a passage was cut from: by its id, `guide/start.md#0`, else by its title, else itself."""
    if match := re.fullmatch(r"(.+)#\d+", passage.get("id") or ""):
        return match[1]
    return passage.get("title") or passage.get("id") or passage["text"]


def split_by_document(questions: Sequence[Row], dev_share: float) -> tuple[list[Row], list[Row]]:
    """
    Questions to train on and questions to hold out, of other documents. Where all are of one document, of other
    passages. A document's side depends on its name alone, as far as the shares allow.

    Args:
        questions (`list[dict]`):
            With `document` and `positive_ids`.
        dev_share (`float`):
            Share of the questions to hold out; at least one is, if there are two groups and it is above 0.
    """
    groups: dict[str, list[Row]] = defaultdict(list)
    for each in questions:
        groups[each["document"]].append(each)
    if len(groups) == 1:
        groups = defaultdict(list)
        for each in questions:
            groups[each["positive_ids"][0]].append(each)
    held_out: set[str] = set()
    wanted, found = dev_share * len(questions), 0
    for name in sorted(groups, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if found >= wanted or len(held_out) == len(groups) - 1:
            break
        held_out.add(name)
        found += len(groups[name])
    ids = {id(each) for name in held_out for each in groups[name]}
    return [each for each in questions if id(each) not in ids], [each for each in questions if id(each) in ids]
