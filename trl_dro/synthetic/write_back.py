# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Answers that become passages: what they must pass, and how they enter a corpus and leave it."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch

from ..data.corpus import ID_KEYS, Corpus
from ..data.schema import Document
from ..data.sentences import ENDS
from ..data.storage import content_key, locked
from ..metrics.text import has_answer
from ..model.rag_model import RAGModel
from ..retrieval.interface import Retriever
from ..system.abstention import answer_logps
from .gates import near_duplicates


MARKER = "write-back/"  # with which the ids of what was written begin, and no other ones
ATTRIBUTION, ENTAILMENT, NOVELTY = "attribution", "entailment", "novelty"
GATES = (ATTRIBUTION, ENTAILMENT, NOVELTY)
NEIGHBOURS = 10  # passages that a new one is compared with

Row = dict[str, Any]


class Support(Protocol):
    """Tells how far passages make an answer likely."""

    name: str  # of what is told
    least: float

    def __call__(self, question: str, answer: str, passages: Sequence[Document]) -> list[float]:
        """A number for each passage, of which `least` is enough."""
        ...


class GeneratorSupport:
    """
    How much likelier a passage makes an answer to a system's own generator, see [`~abstention.AnswerLogps`].

    Args:
        rag ([`~rag_model.RAGModel`]):
            The models.
        least (`float`):
            Least gain, in nats.
    """

    name = "gain"

    def __init__(self, rag: RAGModel, least: float):
        self.rag = rag
        self.least = least

    def __call__(self, question: str, answer: str, passages: Sequence[Document]) -> list[float]:
        """Gains in nats."""
        records = [{"question": question, "documents": [passage]} for passage in passages]
        alone = torch.tensor([self.rag.codec.padded([1])] * len(passages))
        return [logps.gain for logps in answer_logps(self.rag, records, [answer] * len(passages), alone)]


class EntailmentSupport:
    """
    Probability with which a cross-encoder trained on natural language inference says that a passage entails an answer.

    Args:
        model (`str`):
            Folder or Hub id of a cross-encoder of sentence-transformers, such as
            `cross-encoder/nli-deberta-v3-base`.
        least (`float`):
            Least probability.
        device (`str`, *optional*):
            Device.

    Raises:
        `ImportError`: sentence-transformers is not installed.
        `ValueError`: none of the model's labels is entailment.
    """

    name = "entailment"

    def __init__(self, model: str, least: float, device: str | None = None):
        try:
            from sentence_transformers import CrossEncoder
        except ImportError:
            raise ImportError("--nli_model needs sentence-transformers: pip install trl_dro[dense]") from None
        self.model = CrossEncoder(model, device=device)
        self.least = least
        labels = {label.lower(): place for label, place in self.model.config.label2id.items()}
        if "entailment" not in labels:
            raise ValueError(
                f"--nli_model {model} knows {', '.join(labels)} and no entailment: name one trained on inference"
            )
        self.label = labels["entailment"]

    def __call__(self, question: str, answer: str, passages: Sequence[Document]) -> list[float]:
        """Probabilities."""
        pairs = [(passage["text"], statement(question, answer)) for passage in passages]
        return [float(each[self.label]) for each in self.model.predict(pairs, apply_softmax=True)]


def statement(question: str, answer: str) -> str:
    """A question and its answer as a text: `Who built the mill? Ada Stone.`"""
    question, answer = " ".join(question.split()), " ".join(answer.split())
    asked = f"{question[:1].upper()}{question[1:]}"
    asked += "" if asked.endswith(("?", "？")) else "?"
    return f"{asked} {answer}{'' if answer.endswith(ENDS) else '.'}"


def sift_pairs(
    rows: Sequence[Row], corpus: Corpus, retriever: Retriever, support: Support, provenance: Row
) -> tuple[list[Row], list[Row]]:
    """
    Passages of the answers that pass three gates, and the others.

    | gate | refused is an answer |
    | --- | --- |
    | attribution | that stands in none of the passages of the corpus that it cites, but for those written back |
    | entailment | that no such passage makes likely enough |
    | novelty | that is a near-duplicate of a passage, or of another answer; see [`~synthetic.gates.near_duplicates`] |

    Args:
        rows (`list[dict]`):
            Lines of `predictions.jsonl`: `question`, `answer`, `citations`, and `abstained` if that was told.
        corpus ([`~data.corpus.Corpus`]):
            Passages.
        retriever (`Retriever`):
            Finds passages of the corpus that could be duplicates.
        support ([`Support`]):
            Tells whether passages make answers likely.
        provenance (`dict`):
            Added to the provenance of each passage: date and system.

    Returns:
        `tuple[list[dict], list[dict]]`: passages, each with `id`, `title`, `text` and `provenance` (`question`,
        `answer`, `cited_ids`, and what the support says); and refused lines, each with `question`, `answer`, `gate`
        and `reason`.
    """
    passages = _cited_passages(rows, corpus)
    written: list[Row] = []
    refused: list[Row] = []
    for row in rows:
        question, answer = row["question"], row["answer"]
        cited = [passages[each["id"]] for each in row["citations"] if each["id"] in passages]
        stating = [passage for passage in cited if has_answer(passage["text"], [answer])]
        if reason := _unattributed(row, cited, stating):
            refused.append({"question": question, "answer": answer, "gate": ATTRIBUTION, "reason": reason})
            continue
        scores = dict(zip([passage["id"] for passage in stating], support(question, answer, stating), strict=True))
        best = max(scores.values())
        if best < support.least:
            reason = f"{support.name} {best:.2f} is below {support.least:g}"
            refused.append({"question": question, "answer": answer, "gate": ENTAILMENT, "reason": reason})
            continue
        entailing = [passage for passage in stating if scores[passage["id"]] >= support.least]
        told = {"question": question, "answer": answer, "cited_ids": [passage["id"] for passage in entailing]}
        written.append(
            {
                "id": f"{MARKER}{content_key(question, answer)[:16]}",
                "title": entailing[0].get("title") or "",
                "text": statement(question, answer),
                "provenance": {**told, support.name: round(best, 3), **provenance},
            }
        )
    duplicates = _duplicates(written, retriever)
    for place, other in duplicates.items():
        told = written[place]["provenance"]
        reason = f"near-duplicate of {other}"
        refused.append({"question": told["question"], "answer": told["answer"], "gate": NOVELTY, "reason": reason})
    return [each for place, each in enumerate(written) if place not in duplicates], refused


def _cited_passages(rows: Sequence[Row], corpus: Corpus) -> dict[Any, Document]:
    """Passages of the corpus by their ids, of those that are cited and were not written back."""
    wanted = {each["id"] for row in rows for each in row["citations"] if each["id"] is not None}
    wanted = {each for each in wanted if not each.startswith(MARKER)}
    ids = corpus.passages.select_columns("id")  # without texts, of which there may be gigabytes
    places: list[int] = []
    for start in range(0, len(ids), 10_000):
        places += [start + place for place, own in enumerate(ids[start : start + 10_000]["id"]) if own in wanted]
    return {passage["id"]: passage for passage in corpus.documents(places)} if places else {}


def _unattributed(row: Row, cited: Sequence[Document], stating: Sequence[Document]) -> str | None:
    """Why an answer is owed to no passage; `None` if it is."""
    if not isinstance(row["question"], str):
        return "is a turn of a dialogue, which nobody could look for alone"
    if not row["answer"].strip():
        return "is no answer"
    if row.get("abstained"):
        return "the system abstained"
    if not row["citations"]:
        return "cites nothing"
    if not cited:
        return "cites no passage of the corpus that was not written back itself"
    return None if stating else f"does not stand in {', '.join(str(passage['id']) for passage in cited)}"


def _duplicates(written: Sequence[Row], retriever: Retriever) -> dict[int, str]:
    """Of what says nothing new its place, and the id of what says it."""
    texts = [each["text"] for each in written]
    found: dict[int, str] = {}
    for place, ranking in enumerate(retriever.search(texts, NEIGHBOURS) if texts else []):
        for passage in ranking:
            if near_duplicates([passage["text"], texts[place]], [1.0, 0.0]):
                found.setdefault(place, str(passage["id"]))
    new = [place for place in range(len(texts)) if place not in found]
    for one, other in near_duplicates([texts[place] for place in new], [0.0] * len(new)).items():
        found[new[one]] = written[new[other]]["id"]
    return found


def add_passages(path: Path, passages: Sequence[Row]) -> None:
    """
    Adds passages to the end of a jsonl file, which is replaced when all are there.

    Args:
        path (`Path`):
            The file. What is in it stays as it is, byte by byte.
        passages (`list[dict]`):
            Passages.
    """
    lines = "\n".join(json.dumps(each, ensure_ascii=False) for each in passages).encode()
    with _replacing(path) as (source, sink):
        shutil.copyfileobj(source, sink)
        source.seek(-1, os.SEEK_END)
        # A file without a line break at its end has none afterwards, so that it can become what it was.
        sink.write(lines + b"\n" if source.read(1) == b"\n" else b"\n" + lines)


def remove_passages(path: Path) -> int:
    """
    Removes what was written back from a jsonl file, which then is what it was before, byte by byte.

    Args:
        path (`Path`):
            The file.

    Returns:
        `int`: the number of passages removed.
    """
    removed = 0
    with _replacing(path) as (source, sink):
        line_break = b""  # behind the last line that stays
        for line in source:
            if _was_written_back(line):
                removed += 1
            else:
                sink.write(line_break + line.rstrip(b"\n"))
                line_break = b"\n"
        source.seek(-1, os.SEEK_END)
        sink.write(line_break if source.read(1) == b"\n" else b"")
    return removed


def _was_written_back(line: bytes) -> bool:
    if MARKER.encode() not in line:  # of millions of lines few need to be parsed
        return False
    try:
        row = json.loads(line)
    except ValueError:
        return False
    own = next((row[key] for key in ID_KEYS if key in row), None) if isinstance(row, dict) else None
    return isinstance(own, str) and own.startswith(MARKER)


@contextmanager
def _replacing(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A file to read, and one to write that takes its place when the block ends."""
    path = path.resolve()
    partial = path.with_name(f".{path.name}.partial")
    with locked(path), open(path, "rb") as source:
        with open(partial, "wb") as sink:
            yield source, sink
        shutil.copymode(path, partial)
        os.replace(partial, path)
