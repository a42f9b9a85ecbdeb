# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Training sets with which TRL's `SFTTrainer` warms up the two roles before DRO, in the very tokens that DRO uses."""

import random
from collections.abc import Iterable

from datasets import Dataset
from tqdm.auto import tqdm

from .data.schema import Record
from .permutation import PermutationCodec
from .prompts import PromptBuilder, answer_ids


def selector_examples(
    records: Iterable[Record],
    prompts: PromptBuilder,
    codec: PermutationCodec,
    rank_noise: float = 5.0,
    shuffle_candidates: bool = True,
    seed: int = 0,
) -> Dataset:
    """
    Permutations of a mediocre teacher, the retriever: its ranks with Gaussian noise on them.

    Args:
        records (`Iterable[Record]`):
            Records with as many candidates, in retrieval order, as the selector is to see.
        prompts ([`~prompts.PromptBuilder`]):
            Prompts of the selector.
        codec ([`~permutation.PermutationCodec`]):
            Form in which permutations are written, and their length K.
        rank_noise (`float`, *optional*, defaults to `5.0`):
            Standard deviation of the noise, in ranks. `0` teaches the retriever's order itself.
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
        ranking = sorted(order, key=noisy_ranks.__getitem__)[: codec.num_selected]
        prompt = prompts(record["question"], [documents[rank] for rank in order])
        completion, _ = codec.encode([order.index(rank) + 1 for rank in ranking], len(documents))
        rows.append(_example(prompt, completion))
    return Dataset.from_list(rows)


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
