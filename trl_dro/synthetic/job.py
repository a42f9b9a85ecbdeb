# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Questions about the passages of a corpus: written passage by passage, or pair by pair, and split by document."""

import hashlib
import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import regex
from tqdm.auto import tqdm

from ..data.corpus import Corpus
from ..data.resumable import complete_rows
from ..data.schema import DatasetError, Document
from ..data.storage import content_key
from ..data.words import count_words
from ..metrics.text import has_answer
from ..retrieval.interface import Retriever
from .gates import refuse_by_text
from .writers import LocalModel, Pair, Source, Writer


CANDIDATES_FILE = "candidates.jsonl"
MIN_WORDS = 8  # of a passage worth asking about
MAX_NAMES = 12  # of a passage, that others are looked for by
LINK_DEPTH = 5  # passages looked at for each name

Row = dict[str, Any]

# Words with capitals in the middle of a sentence.
_NAMES = regex.compile(r"(?<=[\p{Ll}\p{N},(] )\p{Lu}[\w'’-]+(?: (?:(?:of|the|de|von|van) )*\p{Lu}[\w'’-]+)*")


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


def choose_pairs(
    corpus: Corpus, places: Sequence[int], retriever: Retriever, most: int, dev_share: float = 0.0, seed: int = 0
) -> list[Source]:
    """
    Pairs of passages of two documents that share a name: one that a passage has is the other's title, or stands in its
    text, if it is of several words.

    Args:
        corpus ([`~data.corpus.Corpus`]):
            The passages.
        places (`list[int]`):
            Places of the passages whose names are looked for.
        retriever (`Retriever`):
            Looks for the others, over the same corpus.
        most (`int`):
            Pairs at most, one for each passage.
        dev_share (`float`, *optional*, defaults to `0.0`):
            Share of the questions that will be held out, see [`split_by_document`]: no pair has one document there.
        seed (`int`, *optional*, defaults to `0`):
            Of the order in which passages get their turn.

    Returns:
        `list[tuple[dict, dict]]`
    """
    order = list(places)
    random.Random(seed).shuffle(order)
    pairs: dict[frozenset[str | None], Source] = {}
    for place in tqdm(order, "Looking for pairs", unit="passage", leave=False, disable=not most):
        if len(pairs) == most:
            break
        [passage] = corpus.documents([place])
        names = _names(passage)
        rankings = retriever.search(names, min(LINK_DEPTH, len(corpus))) if names else []
        linked = (
            other
            for name, ranking in zip(names, rankings, strict=True)
            for other in ranking
            if _shares(name, other)
            and document_of(other) != document_of(passage)
            and (_side(document_of(other)) < dev_share) == (_side(document_of(passage)) < dev_share)
            and count_words(other["text"]) >= MIN_WORDS
            and frozenset((passage["id"], other["id"])) not in pairs
        )
        if other := next(linked, None):
            pairs[frozenset((passage["id"], other["id"]))] = (passage, other)
    return list(pairs.values())


def _names(passage: Document) -> list[str]:
    """Names in a passage, its own title first."""
    found = [_without_brackets(passage.get("title") or ""), *_NAMES.findall(passage["text"])]
    return [name for name in dict.fromkeys(found) if name][:MAX_NAMES]


def _shares(name: str, passage: Document) -> bool:
    is_title = _without_brackets(passage.get("title") or "").lower() == name.lower()
    return is_title or (" " in name and has_answer(passage["text"], [name]))


def _without_brackets(title: str) -> str:
    return re.sub(r"\s*\([^)]*\)$", "", title).strip()


def write_candidates(
    corpus: Corpus,
    places: Sequence[int],
    pairs: Sequence[Source],
    writer: Writer,
    judge: LocalModel | None,
    retriever: Retriever,
    output_dir: str | Path,
    count: int = 3,
    depth: int = 20,
) -> list[Row]:
    """
    Writes questions about passages and pairs of them, and tells of each what the gates ask for, one line of
    `candidates.jsonl` for each passage and pair. What an earlier call left of the same work is kept.

    Args:
        corpus ([`~data.corpus.Corpus`]):
            The passages.
        places (`list[int]`):
            Places of those to write about.
        pairs (`list[tuple[dict, dict]]`):
            Pairs to write about, too.
        writer ([`~writers.Writer`]):
            Writes the questions.
        judge ([`~writers.LocalModel`], *optional*):
            Tells how much likelier the passages make their answers.
        retriever (`Retriever`):
            Looks for the passages, over the same corpus.
        output_dir (`str` or `Path`):
            Folder of the file.
        count (`int`, *optional*, defaults to `3`):
            Questions about each, at most.
        depth (`int`, *optional*, defaults to `20`):
            How far down the ranking is looked.

    Returns:
        `list[dict]`: of each passage and pair `row`, `passage_ids`, `sources` (their documents), `seconds`, `tokens`
        and `candidates`, each with `id`, `question`, `answer`, `refused` (by its text), `rank` and `gain`.
    """
    depth = min(depth, len(corpus))

    def source_of(row: int) -> Source:
        return corpus.documents([places[row]]) if row < len(places) else pairs[row - len(places)]

    def work(left: list[int]) -> Iterator[tuple[list[int], list[Row]]]:
        for start in range(0, len(left), writer.at_once):
            rows = left[start : start + writer.at_once]
            sources = [source_of(row) for row in rows]
            if isinstance(writer, LocalModel):
                writer.begin_at(rows[0])
            begin = time.perf_counter()
            written = writer.write(sources, count)
            judged = [
                _judge(source, each.pairs, retriever, judge, depth)
                for source, each in zip(sources, written, strict=True)
            ]
            seconds = (time.perf_counter() - begin) / len(rows)
            yield (
                rows,
                [
                    {
                        "passage_ids": [passage["id"] for passage in source],
                        "sources": [document_of(passage) for passage in source],
                        "seconds": round(seconds, 3),
                        "tokens": each.tokens,
                        "candidates": candidates,
                    }
                    for source, each, candidates in zip(sources, written, judged, strict=True)
                ],
            )

    settings = {
        "corpus": corpus.fingerprint,
        "passages_sha256": content_key(list(places)),
        "pairs_sha256": content_key([[passage["id"] for passage in pair] for pair in pairs]),
        "writer": writer.settings,
        "judge": None if judge is None else judge.settings,
        "retriever": retriever.settings,
        "questions_per_passage": count,
        "depth": depth,
    }
    path = Path(output_dir) / CANDIDATES_FILE
    return complete_rows(path, len(places) + len(pairs), settings, work, "Writing questions", unit="passage")


def _judge(
    source: Source, pairs: Sequence[Pair], retriever: Retriever, judge: LocalModel | None, depth: int
) -> list[Row]:
    wanted = [passage["id"] for passage in source]
    candidates: list[Row] = [
        {
            "id": f"{'+'.join(map(str, wanted))}/q{number}",
            "question": pair.question,
            "answer": pair.answer,
            "refused": refuse_by_text(pair, source),
            "rank": None,
            "gain": None,
        }
        for number, pair in enumerate(pairs)
    ]
    sound = [each for each in candidates if each["refused"] is None]
    rankings = retriever.search([each["question"] for each in sound], depth) if sound else []
    for each, ranking in zip(sound, rankings, strict=True):
        ids = [document["id"] for document in ranking]
        each["rank"] = max(map(ids.index, wanted)) + 1 if set(wanted) <= set(ids) else None
    found = [each for each in sound if each["rank"] is not None]
    if judge is not None:
        gains = judge.gains(source, [Pair(each["question"], each["answer"]) for each in found])
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
    passages. A document's side depends on its name alone, as far as the shares allow. A question of two documents, one
    on either side, is in neither.

    Args:
        questions (`list[dict]`):
            With `sources`, the documents, and `positive_ids`.
        dev_share (`float`):
            Share of the questions to hold out; at least one is, if there are two groups and it is above 0.
    """
    by = "sources" if len({name for each in questions for name in each["sources"]}) > 1 else "positive_ids"
    counts = Counter(name for each in questions for name in each[by])
    held_out: set[str] = set()
    wanted, found = dev_share * counts.total(), 0
    for name in sorted(counts, key=_side):
        if found >= wanted or len(held_out) == len(counts) - 1:
            break
        held_out.add(name)
        found += counts[name]
    train = [each for each in questions if not held_out.intersection(each[by])]
    return train, [each for each in questions if held_out.issuperset(each[by])]


def _side(name: str) -> float:
    """A number from 0 to 1 for each name, evenly spread; the lowest are held out."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
