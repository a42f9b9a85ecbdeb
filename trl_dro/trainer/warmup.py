# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Examples from which SFT warms up the two roles before DRO, in the very tokens that DRO uses."""

import hashlib
import os
import random
import re
from collections.abc import Iterable

from datasets import Dataset
from tqdm.auto import tqdm

from ..data.lines import read_jsonl
from ..data.schema import DatasetError, Document, Record
from ..evaluation.scoring import is_relevant
from ..model.codec import PermutationCodec, parse_permutation
from ..model.prompts import PromptBuilder, answer_ids


_PASSAGE = re.compile(r"^\[(\d+)\] *(.*\S) *$", re.MULTILINE)
_QUERY = re.compile(r"^Search Query: *(.+?) *$", re.MULTILINE)


def selector_examples(
    records: Iterable[Record],
    prompts: PromptBuilder,
    codec: PermutationCodec,
    rank_noise: float = 5.0,
    shuffle_candidates: bool = True,
    seed: int = 0,
) -> Dataset:
    """
    Permutations of a teacher: the order in which the records have their documents, with Gaussian noise on the ranks.
    Records as they are retrieved make the retriever the teacher; see [`relevant_first`] and
    [`read_listwise_rankings`] for better ones.

    Where permutations may end early, each is cut to a random length that is allowed: a selector that never saw an end
    before the last document would hardly ever end early, and DRO can only weigh what it draws.

    Args:
        records (`Iterable[Record]`):
            Records with as many candidates, in the teacher's order, as the selector is to see.
        prompts ([`~prompts.PromptBuilder`]):
            Prompts of the selector.
        codec ([`~codec.PermutationCodec`]):
            Form in which permutations are written, and their length K.
        rank_noise (`float`, *optional*, defaults to `5.0`):
            Standard deviation of the noise, in ranks. `0` teaches the order itself.
        shuffle_candidates (`bool`, *optional*, defaults to `True`):
            Show the candidates in random order, as DRO does in training, so that a place in the prompt means nothing.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the noise and of the order.

    Returns:
        `Dataset`: columns `input_ids` and `completion_mask`, for `SFTTrainer` with `completion_only_loss=True`.
    """
    rng = random.Random(seed)
    rows = []
    for record in tqdm(list(records), desc="Selector warm-up examples"):
        documents = record["documents"]
        order = list(range(len(documents)))
        if shuffle_candidates:
            rng.shuffle(order)
        noisy_ranks = {rank: rank + rng.gauss(0.0, rank_noise) for rank in order}
        length = rng.randint(codec.min_selected, codec.num_selected) if codec.may_end else codec.num_selected
        ranking = sorted(order, key=noisy_ranks.__getitem__)[:length]
        prompt = prompts(record["question"], [documents[rank] for rank in order])
        completion, _ = codec.encode([order.index(rank) + 1 for rank in ranking], len(documents))
        rows.append(_example(prompt, completion))
    return Dataset.from_list(rows)


def relevant_first(record: Record) -> Record:
    """
    A record whose relevant documents, see [`~scoring.is_relevant`], stand first, and the others behind them, both in
    their order.
    """
    documents = sorted(record["documents"], key=lambda document: not is_relevant(document, record))
    return {**record, "documents": documents}


def read_listwise_rankings(path: str | os.PathLike) -> list[Record]:
    """
    Reads rankings of another listwise reranker in the form that RankZephyr was trained on
    (`castorini/rank_zephyr_training_data`): `conversations` of a system's, a human's and an assistant's turn. The
    human's has a passage per line, `[1] …`, and `Search Query: …`; the assistant's ranks them, `[3] > [1] > …`.

    Args:
        path (`str` or `os.PathLike`):
            File, `.jsonl` or `.jsonl.gz`.

    Returns:
        `list[Record]`: `question`, `answers` (empty: there are none) and `documents`, the ranked ones first and those
        that the ranking leaves out behind them; for [`selector_examples`].

    Raises:
        `DatasetError`: a line has no such conversation; the message names the line.
    """
    records: list[Record] = []
    for where, row in read_jsonl(path, show_progress=True):
        values = [turn.get("value") for turn in row.get("conversations") or [] if isinstance(turn, dict)]
        turns = [value for value in values if isinstance(value, str)]
        if len(turns) < 3:
            raise DatasetError(f"{where}, key conversations: must have a system's, a human's and an assistant's turn")
        prompt, ranking = turns[-2:]
        passages = {int(number): text for number, text in _PASSAGE.findall(prompt)}
        query = _QUERY.search(prompt)
        if query is None or sorted(passages) != list(range(1, len(passages) + 1)) or not passages:
            raise DatasetError(f"{where}: the human's turn needs 'Search Query: …' and passages '[1] …', '[2] …'")
        ranked = parse_permutation(ranking, len(passages), len(passages)).permutation
        if not ranked:
            raise DatasetError(f"{where}: the assistant's turn ranks none of the {len(passages)} passages")
        order = [*ranked, *(number for number in passages if number not in ranked)]
        documents = [Document(id=str(number), title="", text=passages[number]) for number in order]
        records.append({"question": query[1].rstrip(".").strip(), "answers": [], "documents": documents})
    return records


def generator_examples(records: Iterable[Record], prompts: PromptBuilder) -> Dataset:
    """
    Answers to questions with the retriever's first K documents, whether or not these contain the answer.

    Args:
        records (`Iterable[Record]`):
            Records with their candidates in retrieval order.
        prompts ([`~prompts.PromptBuilder`]):
            Prompts of the generator, whose `num_selected` is K.

    Returns:
        `Dataset`: columns `input_ids` and `completion_mask`, for `SFTTrainer` with `completion_only_loss=True`.
    """
    return Dataset.from_list(
        [
            _example(
                prompts(record["question"], record["documents"][: prompts.num_selected]),
                answer_ids(prompts.tokenizer, record["answers"][0]),
            )
            for record in tqdm(list(records), desc="Generator warm-up examples")
        ]
    )


def _example(prompt: list[int], completion: list[int]) -> dict[str, list[int]]:
    return {"input_ids": prompt + completion, "completion_mask": [0] * len(prompt) + [1] * len(completion)}


def examples_key(examples: Dataset) -> str:
    """Key of what is learned: token ids and which of them count."""
    digest = hashlib.sha256()
    for batch in examples.with_format("arrow").iter(batch_size=1000):
        for column in ("input_ids", "completion_mask"):
            values = batch[column].combine_chunks()
            digest.update(values.value_lengths().to_numpy().tobytes() + values.flatten().to_numpy().tobytes())
    return digest.hexdigest()
