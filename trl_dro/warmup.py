# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""`trl-dro warmup`: TRL's `SFTTrainer` warms up the two roles before DRO, in the very tokens that DRO uses."""

import os
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

from .arguments import LaunchArguments
from .data.files import load_records
from .data.lines import read_jsonl
from .data.schema import DatasetError, Document, Record, validate_dataset
from .loading import tiny_model_for
from .permutation import PermutationCodec, parse_permutation
from .prompts import GENERATOR_TEMPLATE, SELECTOR_TEMPLATE, PromptBuilder, answer_ids
from .roles import ROLES
from .scoring import is_relevant


_PASSAGE = re.compile(r"^\[(\d+)\] *(.*\S) *$", re.MULTILINE)
_QUERY = re.compile(r"^Search Query: *(.+?) *$", re.MULTILINE)


@dataclass(kw_only=True)
class WarmUpArguments(LaunchArguments):
    """
    Data, teacher, prompts, and processes.

    Args:
        dataset_name (`str`):
            Dataset with candidates: a Hub id, a `save_to_disk` folder, or a jsonl or parquet file.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Its split.
        teacher (`str`, *optional*, defaults to `"relevant"`):
            Whose rankings the selector learns: `"retriever"` (its order), `"relevant"` (documents with an answer
            first), or a file of rankings, see [`read_listwise_rankings`].
        rank_noise (`float`, *optional*, defaults to `0.0`):
            Noise in the teacher's ranks.
        num_selected (`int`, *optional*, defaults to `5`):
            Documents in a permutation, K.
        max_candidates (`int`, *optional*, defaults to `20`):
            Candidates shown to the selector, n.
        max_document_length (`int`, *optional*):
            Longest document in tokens.
        selector_template (`str`):
            Selector prompt, as in [`~dro_config.DROConfig`].
        generator_template (`str`):
            Generator prompt.
        dry_run (`bool`, *optional*, defaults to `False`):
            Write the examples, count their tokens, and load no weights.
    """

    dataset_name: str = field(
        metadata={"help": "Dataset with candidates: a Hub id, a `save_to_disk` folder, or a jsonl or parquet file."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Its split."})
    teacher: str = field(
        default="relevant", metadata={"help": "Whose rankings the selector learns: retriever, relevant, or a file."}
    )
    rank_noise: float = field(default=0.0, metadata={"help": "Noise in the teacher's ranks."})
    num_selected: int = field(default=5, metadata={"help": "Documents in a permutation, K."})
    max_candidates: int = field(default=20, metadata={"help": "Candidates shown to the selector, n."})
    max_document_length: int | None = field(default=None, metadata={"help": "Longest document in tokens."})
    selector_template: str = field(default=SELECTOR_TEMPLATE, metadata={"help": "Selector prompt, as in DROConfig."})
    generator_template: str = field(default=GENERATOR_TEMPLATE, metadata={"help": "Generator prompt."})
    dry_run: bool = field(
        default=False, metadata={"help": "Write the examples, count their tokens, and load no weights."}
    )


def warm_up(args: WarmUpArguments, sft_args: SFTConfig, model_args: ModelConfig) -> None:
    """
    Trains an adapter for each role by SFT, from which DRO starts: `output_dir` gets `selector/` and `generator/`.
    Without a base model the tiny one that ships with the package stands in.

    Args:
        args ([`WarmUpArguments`]):
            Data, teacher and prompts.
        sft_args ([`~trl.SFTConfig`]):
            Training of either role.
        model_args ([`~trl.ModelConfig`]):
            Base model, its precision, and the adapters.

    Raises:
        `DatasetError`: the data or the teacher's rankings cannot be used.
    """
    model_args.use_peft = True
    model = model_args.model_name_or_path or tiny_model_for(args)
    tokenizer = AutoTokenizer.from_pretrained(model, revision=model_args.model_revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    examples = make_examples(args, tokenizer, sft_args.seed)
    if args.dry_run:
        print_examples(examples)
        return
    folder = Path(str(sft_args.output_dir))
    sft_args.completion_only_loss = True
    sft_args.max_length = None  # prompts are cut document by document, never at an end
    sft_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "quantization_config": get_quantization_config(model_args),
    }
    for role in ROLES:
        sft_args.output_dir = str(folder / role)
        trainer = SFTTrainer(
            model,
            sft_args,
            train_dataset=examples[role],
            processing_class=tokenizer,
            peft_config=get_peft_config(model_args),
        )
        trainer.train()
        trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"Adapters to start DRO from are in {folder}/selector and {folder}/generator.")


def make_examples(args: WarmUpArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> dict[str, Dataset]:
    """Prompts and completions of each role, as token ids."""
    codec = PermutationCodec(tokenizer, args.max_candidates, args.num_selected)
    prompts = {
        role: PromptBuilder(
            tokenizer,
            getattr(args, f"{role}_template"),
            args.num_selected,
            max_document_length=args.max_document_length,
        )
        for role in ROLES
    }
    dataset = load_records(args.dataset_name, args.dataset_train_split)
    validate_dataset(dataset, args.num_selected, args.dataset_name)
    records: list[Any] = [
        {**record, "documents": record["documents"][: args.max_candidates]} for record in dataset.to_list()
    ]
    ranked = records
    if args.teacher == "relevant":
        ranked = [relevant_first(record) for record in records]
    elif args.teacher != "retriever":
        ranked = read_listwise_rankings(args.teacher)
    return {
        "selector": selector_examples(ranked, prompts["selector"], codec, args.rank_noise, seed=seed),
        "generator": generator_examples(records, prompts["generator"]),
    }


def print_examples(examples: dict[str, Dataset]) -> None:
    """Prints how many examples each role has, and their tokens."""
    table = Table(title="Warm-up examples", title_justify="left")
    for heading in ("", "examples", "tokens in all", "longest", "learned from"):
        table.add_column(heading, justify="left" if heading == "" else "right")
    for role, dataset in examples.items():
        lengths = [len(ids) for ids in dataset["input_ids"]]
        learned = sum(sum(mask) for mask in dataset["completion_mask"])
        table.add_row(role, *(f"{number:,}" for number in (len(lengths), sum(lengths), max(lengths), learned)))
    Console().print(table)


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

    Args:
        records (`Iterable[Record]`):
            Records with as many candidates, in the teacher's order, as the selector is to see.
        prompts ([`~prompts.PromptBuilder`]):
            Prompts of the selector.
        codec ([`~permutation.PermutationCodec`]):
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
        ranking = sorted(order, key=noisy_ranks.__getitem__)[: codec.num_selected]
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
