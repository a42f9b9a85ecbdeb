# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""`trl-dro warmup`: TRL's `SFTTrainer` warms up the two roles before DRO, in the very tokens that DRO uses."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

from ..data.files import load_records
from ..data.schema import validate_dataset
from ..demo.tiny import tiny_model_for
from ..model.codec import PermutationCodec
from ..model.prompts import GENERATOR_TEMPLATE, SELECTOR_TEMPLATE, PromptBuilder
from ..model.roles import ROLES
from ..trainer.ranges import check_numbers
from ..trainer.warmup import generator_examples, read_listwise_rankings, relevant_first, selector_examples
from .arguments import DATASET_HELP, LaunchArguments, check_range


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

    dataset_name: str = field(metadata={"help": DATASET_HELP})
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

    def __post_init__(self):
        super().__post_init__()
        check_range(self, ["rank_noise"], 0)
        check_range(self, ["num_selected", "max_document_length"], 1)
        check_range(self, ["max_candidates"], self.num_selected)


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
    check_numbers(sft_args)
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
