# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""`trl-dro warmup`: TRL's `SFTTrainer` warms up the two roles before DRO, in the very tokens that DRO uses."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import HfApi
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase, TrainingArguments
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

from ..data.files import load_records
from ..data.schema import validate_dataset
from ..data.storage import alone_in, different
from ..demo.tiny import tiny_model_for
from ..model.codec import PermutationCodec
from ..model.loading import load_tokenizer, refuse_file
from ..model.prompts import GENERATOR_TEMPLATE, SELECTOR_TEMPLATE, PromptBuilder, check_lengths, check_template
from ..model.roles import ROLES, Role, note_role
from ..system.rag_config import RAGConfig
from ..system.run_folder import files_key
from ..system.upload import upload_system
from ..trainer.inputs import LongAnswers, fit_answers
from ..trainer.ranges import check_model_settings, check_numbers
from ..trainer.run import Identity, RunTrainer, checkpoints_of_run, read_run
from ..trainer.warmup import (
    examples_key,
    generator_examples,
    read_listwise_rankings,
    relevant_first,
    selector_examples,
)
from .arguments import DATASET_HELP, LaunchArguments, check_range


# What a warm-up is known by, beside its examples and its base.
_IDENTIFYING_SETTINGS = (
    *("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("weight_decay", "max_grad_norm", "optim", "lr_scheduler_type", "warmup_steps", "seed", "data_seed"),
)
# Settings of TRL that a warm-up cannot follow: name, value that asks for nothing, reason.
_IGNORED = (
    ("packing", False, "examples are never cut, so there is no length to pack them to"),
    ("eval_packing", False, "nothing is evaluated"),
    ("padding_free", False, "examples are padded"),
    ("assistant_only_loss", False, "the completion alone is learned already"),
    ("completion_only_loss", True, "the prompt is never learned"),
    ("eval_strategy", "no", "a warm-up has no questions to evaluate on"),
    ("load_best_model_at_end", False, "a warm-up has no questions to tell the best by"),
)


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
        min_selected (`int`, *optional*):
            Fewest documents in a permutation, where DRO is to train a selector that may end early: its rankings are
            then cut to random lengths. As many as `num_selected` by default.
        max_candidates (`int`, *optional*, defaults to `20`):
            Candidates shown to the selector, n.
        max_document_length (`int`, *optional*):
            Longest document in tokens.
        max_answer_length (`int`, *optional*):
            Longest answer in tokens: a longer one is refused, as DRO will refuse it.
        long_answers (`str`, *optional*, defaults to `"error"`):
            What becomes of target answers longer than `max_answer_length`: an `"error"`, or `"drop"` or `"truncate"`,
            see [`~trainer.inputs.fit_answers`].
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
    min_selected: int | None = field(
        default=None, metadata={"help": "Fewest documents in a permutation; rankings are cut to random lengths."}
    )
    max_candidates: int = field(default=20, metadata={"help": "Candidates shown to the selector, n."})
    max_document_length: int | None = field(default=None, metadata={"help": "Longest document in tokens."})
    max_answer_length: int | None = field(
        default=None, metadata={"help": "Longest answer in tokens: a longer one is refused, as DRO will refuse it."}
    )
    long_answers: LongAnswers = field(
        default="error",
        metadata={"help": "Answers over max_answer_length: an error, or drop or truncate them and say how many."},
    )
    selector_template: str = field(default=SELECTOR_TEMPLATE, metadata={"help": "Selector prompt, as in DROConfig."})
    generator_template: str = field(default=GENERATOR_TEMPLATE, metadata={"help": "Generator prompt."})
    dry_run: bool = field(
        default=False, metadata={"help": "Write the examples, count their tokens, and load no weights."}
    )

    def stays(self) -> bool:
        return self.dry_run

    def __post_init__(self):
        super().__post_init__()
        check_range(self, ["rank_noise"], 0)
        check_range(self, ["num_selected", "max_document_length", "max_answer_length"], 1)
        if self.long_answers != "error" and self.max_answer_length is None:
            raise ValueError(f"--long_answers {self.long_answers}: say which are too long, --max_answer_length")
        if self.max_candidates < self.num_selected:
            raise ValueError(
                f"--max_candidates {self.max_candidates}: it must be at least {self.num_selected} (num_selected)"
            )
        for role in ROLES:
            check_template(getattr(self, f"{role}_template"), f"{role}_template")
        check_range(self, ["min_selected"], 0, self.num_selected)


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
    check_model_settings(model_args)
    for name, neutral, reason in _IGNORED:
        if (value := getattr(sft_args, name)) not in (neutral, None):
            raise ValueError(f"--{name} {value}: {reason}; leave it out")
    if sft_args.max_length not in (None, SFTConfig.max_length):
        raise ValueError(
            f"--max_length {sft_args.max_length} would cut examples at their end, where the answer is: set "
            "--max_document_length, which cuts documents"
        )
    model_args.use_peft = True
    refuse_file(model_args.model_name_or_path, model_args.model_revision)
    model = model_args.model_name_or_path or tiny_model_for(args)
    tokenizer = load_tokenizer(model, model_args.model_revision)
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
    peft_config = get_peft_config(model_args)
    # The token is kept from the trainers, which would write it into training_args.bin.
    pushes, token, sft_args.push_to_hub, sft_args.hub_token = sft_args.push_to_hub, sft_args.hub_token, False, None
    with alone_in(folder) if sft_args.should_save else nullcontext():
        for role in ROLES:
            sft_args.output_dir = str(folder / role)
            known_by = {
                "base": files_key([model]) or f"{model} {model_args.model_revision}",
                "adapter": peft_config.to_dict() if peft_config is not None else None,
                "examples": examples_key(examples[role]),
            }
            make = partial(
                WarmUpTrainer,
                known_by,
                model=model,
                args=sft_args,
                train_dataset=examples[role],
                processing_class=tokenizer,
                peft_config=get_peft_config(model_args),
            )
            warm_up_role(role, sft_args, known_by, make)
        if sft_args.should_save:
            names = {each.name for each in fields(RAGConfig)}
            set_here = {name: value for name, value in vars(args).items() if name in names and value is not None}
            RAGConfig(**set_here).save(folder)
            if pushes:
                name = sft_args.hub_model_id or folder.resolve().name
                repo = HfApi().create_repo(name, token=token, private=sft_args.hub_private_repo, exist_ok=True)
                upload_system(folder, repo.repo_id, "Warm-up of both roles", token, sft_args.hub_revision)
            print(f"Adapters to start DRO from are in {folder}/selector and {folder}/generator.")


def make_examples(args: WarmUpArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> dict[str, Dataset]:
    """Prompts and completions of each role, as token ids."""
    codec = PermutationCodec(tokenizer, args.max_candidates, args.num_selected, args.min_selected)
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
    if args.max_answer_length is not None:
        dataset = fit_answers(dataset, args.dataset_name, tokenizer, args.max_answer_length, args.long_answers)
        check_lengths(dataset, args.dataset_name, [], tokenizer, args.max_answer_length, all_answers=False)
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


class WarmUpTrainer(RunTrainer, SFTTrainer):
    """
    `SFTTrainer` of one role, which stops, resumes and is known as a run of DRO is.

    Args:
        known_by (`dict`):
            Beside the training arguments, what tells this warm-up from others.
        kwargs:
            Passed to [`~trl.SFTTrainer`].
    """

    weights_in = (".",)
    how_to_resume = "the same command goes on from there"

    def __init__(self, known_by: Identity, **kwargs: Any):
        self.known_by = known_by
        super().__init__(**kwargs)

    def identity(self) -> Identity:
        return warm_up_identity(self.args, self.known_by)


def warm_up_identity(args: TrainingArguments, known_by: Identity) -> Identity:
    """What a role's warm-up is known by, in its `run.json`."""
    settings = {name: getattr(args, name) for name in _IDENTIFYING_SETTINGS}

    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, set) else str(value)

    identity: Identity = json.loads(json.dumps({**settings, **known_by}, default=plain))
    return identity


def warm_up_role(role: Role, args: SFTConfig, known_by: Identity, make: Callable[[], WarmUpTrainer]) -> None:
    """
    Trains a role into `args.output_dir`, unless that is done, and from where it was stopped if it was.

    Args:
        role (`str`):
            The role.
        args ([`~trl.SFTConfig`]):
            Training.
        known_by (`dict`):
            See [`WarmUpTrainer`].
        make (`Callable`):
            Makes the trainer, which loads the model.

    Raises:
        `ValueError`: the folder holds another warm-up.
    """
    folder = Path(str(args.output_dir))
    before = read_run(folder)
    begun = bool(before.get("finished") or checkpoints_of_run(folder))
    identity = warm_up_identity(args, known_by)
    if begun and (difference := different({name: before.get(name) for name in identity}, identity)):
        raise ValueError(f"{folder} holds a warm-up with {difference}: name another output_dir, or delete that folder")
    if before.get("finished"):
        if args.should_save:
            print(f"{folder} is warmed up already.")
        return
    trainer = make()
    trainer.train(resume_from_checkpoint=begun or None)
    trainer.save_model()
    if args.should_save:
        note_role(folder, role)
    trainer.finish()
