# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""A whole system evaluated on a dataset: any selector or none, any generator, resumable, one line per question."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from ..data import validate_dataset
from ..data.processes import ALONE, Processes
from ..data.resumable import complete_rows, fingerprint
from ..data.schema import BadRow
from ..model.likelihood import chunk_rows
from ..model.prompts import question_text
from ..model.rag_model import RAGModel
from ..system.abstention import AnswerLogps, answer_logps
from ..system.mixture import MixtureAnswer
from ..system.pipeline import RAGPipeline
from ..system.rag_config import RAGConfig
from .scoring import Selection, answer_from, score_question


QUESTIONS_FILE = "questions.jsonl"
SUMMARY_FILE = "summary.json"

Scored = dict[str, Any]


def evaluate(
    load: Callable[[], RAGPipeline],
    dataset: Dataset,
    output_dir: str | Path,
    selection: Selection = "selector",
    context_reliance: bool = True,
    tokens_per_batch: int = 16384,
    settings: dict[str, Any] | None = None,
    skipped: Sequence[BadRow] = (),
    processes: Processes = ALONE,
    prediction_gain: bool = False,
) -> list[Scored]:
    """
    Answers and scores every question of a dataset, one line of `questions.jsonl` each.

    Args:
        load (`Callable`):
            Loads the system; called only if questions are left.
        dataset (`Dataset`):
            Questions with `question`, `answers` and `documents`; `id` and `positive_ids` are used if they are there.
        output_dir (`str` or `Path`):
            Folder of the results. Questions that are answered there already are not asked again.
        selection (`str`, *optional*, defaults to `"selector"`):
            Who selects, see [`~scoring.select`].
        context_reliance (`bool`, *optional*, defaults to `True`):
            Whether to score the gold answer with and without the documents.
        tokens_per_batch (`int`, *optional*, defaults to `16384`):
            Prompt tokens computed at a time.
        settings (`dict`, *optional*):
            What tells this evaluation from others; a folder that was begun with other settings is refused.
        skipped (`list[BadRow]`, *optional*):
            Rows of the source that `dataset` leaves out, listed in `skipped.jsonl`.
        processes ([`~processes.Processes`], *optional*):
            Those that call this function together: batches are dealt out to them.
        prediction_gain (`bool`, *optional*, defaults to `False`):
            Whether to score the predicted answer with and without the documents too.

    Returns:
        `list[dict]`: one dict per question in the order of the dataset, as in the file.

    Raises:
        `DatasetError`: the dataset is malformed.
        `ValueError`: `output_dir` holds another evaluation.
    """
    validate_dataset(dataset, 1, "dataset")
    asked = fingerprint(dataset, ("question", "answers", "documents"))

    def work(left: list[int]) -> Iterator[tuple[list[int], list[Scored]]]:
        pipe = load()
        validate_dataset(dataset, pipe.config.num_selected, "dataset")
        for rows, records in batches(pipe, dataset, left, tokens_per_batch, processes):
            yield rows, _score_batch(pipe.rag, pipe.config, selection, context_reliance, prediction_gain, records)

    own = {"selection": selection, "dataset_sha256": asked, **(settings or {})}
    return complete_rows(Path(output_dir) / QUESTIONS_FILE, len(dataset), own, work, "Evaluating", skipped, processes)


def batches(
    pipe: RAGPipeline,
    dataset: Dataset,
    left: Sequence[int],
    tokens_per_batch: int,
    processes: Processes = ALONE,
) -> Iterator[tuple[list[int], list[dict[str, Any]]]]:
    """
    Rows and their records in batches of similar length, the longest first: too little memory shows at once.

    Which rows stand in one batch changes the last digits of what is computed for them. So batches are the same however
    many processes share them, and whatever an earlier call left of them: one of which a row is left is done again.

    Args:
        pipe ([`RAGPipeline`]):
            Whose prompts are counted.
        dataset (`Dataset`):
            Questions with their documents.
        left (`list[int]`):
            Rows to do; batches without any are left out.
        tokens_per_batch (`int`):
            Prompt tokens of a batch.
        processes ([`~processes.Processes`], *optional*):
            Those that the batches are dealt out to; this one gets its own.

    Returns:
        `Iterator[tuple[list[int], list[dict]]]`: batches of rows and their records.
    """
    wanted = set(left)
    rows = sorted(
        range(len(dataset)), key=lambda row: -sum(len(document["text"]) for document in dataset[row]["documents"])
    )
    number = 0
    for start in range(0, len(rows), 256):
        block = rows[start : start + 256]
        if wanted.isdisjoint(block):
            continue
        records = [
            {**record, "documents": record["documents"][: pipe.config.max_candidates]}
            for record in (dataset[row] for row in block)
        ]
        lengths = [len(pipe.rag.prompts["selector"](record["question"], record["documents"])) for record in records]
        for chunk in chunk_rows(lengths, tokens_per_batch):
            if wanted.isdisjoint(block[i] for i in chunk):
                continue
            if number % processes.count == processes.rank:
                yield [block[i] for i in chunk], [records[i] for i in chunk]
            number += 1


@torch.no_grad()
def _score_batch(
    rag: RAGModel,
    config: RAGConfig,
    selection: Selection,
    context_reliance: bool,
    prediction_gain: bool,
    records: list[dict[str, Any]],
) -> list[Scored]:
    start = time.perf_counter()
    answers = answer_from(rag, records, selection, config.max_answer_length, config.answer_permutations)
    permutations = torch.tensor([answer.permutation for answer in answers])  # [B, K]
    seconds = (time.perf_counter() - start) / len(records)
    logps: list[AnswerLogps] = []
    if context_reliance:
        logps = answer_logps(rag, records, [record["answers"][0] for record in records], permutations)
    predicted: list[AnswerLogps] = []
    if prediction_gain:
        predicted = answer_logps(rag, records, [answer.text for answer in answers], permutations)
    rows = []
    selected = [[place for place in row if place] for row in permutations.tolist()]
    for i, (record, permutation, answer) in enumerate(zip(records, selected, answers, strict=True)):
        row: Scored = {
            "id": record.get("id"),
            "question": question_text(record["question"]),
            "answers": record["answers"],
            "prediction": answer.text,
            "selected": permutation,
            "selected_ids": [record["documents"][place - 1].get("id") for place in permutation],
            "positive_ids": record.get("positive_ids"),
            **score_question(record, permutation, answer.text, permutations.shape[1]),
        }
        if rag.codec.may_end:
            row["documents"] = len(permutation)
        if context_reliance:
            row["answer_logp"], row["answer_logp_without_documents"] = logps[i]
            row["context_gain"] = logps[i].gain
        if prediction_gain:
            row["prediction_gain"] = predicted[i].gain
        tokens = _count_tokens(rag, record, answer, selection)
        rows.append(row | {"prediction_logp": answer.logp, "seconds": seconds, "tokens": tokens})
    return rows


def _count_tokens(rag: RAGModel, record: dict[str, Any], answer: MixtureAnswer, selection: Selection) -> int:
    """Tokens read and written for one question, padding and the scoring of the gold answer left out."""
    tokens = len(rag.prompts["selector"](record["question"], record["documents"])) if selection == "selector" else 0
    for permutation, text, _ in answer.written:
        places = [place for place in permutation if place]
        documents = [record["documents"][place - 1] for place in places]
        tokens += len(rag.prompts["generator"](record["question"], documents))
        tokens += len(rag.tokenizers["generator"](text, add_special_tokens=False).input_ids) + 1
        if selection == "selector":
            tokens += len(rag.codec.encode(places, len(record["documents"]))[0])
    return tokens
