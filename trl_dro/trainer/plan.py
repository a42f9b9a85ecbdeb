# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""`--dry_run`: what a run will do and need, before any weights are loaded."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, PreTrainedConfig

from ..model.codec import PermutationCodec
from ..model.prompts import PassagePrompts, Prompts
from ..model.roles import ROLES, Role, Roles
from . import cost
from .dro_config import DROConfig
from .schedule import EstimationSampler


# Where there are no data to count: tokens of a passage of 100 words, of the text around the documents, of an id with
# what separates it from the next.
PASSAGE_TOKENS, FRAME_TOKENS, ID_TOKENS = 160, 150, 5
QUESTION_TOKENS = 32  # of a question behind a document, with the words around both

# What a run's hours are told for: 40% of the peak of a card of 24 GB, a sixth of an A100's. Time goes in proportion.
SUSTAINED_FLOPS = 5e13

# With --use_cpu: two to four cores.
SUSTAINED_CPU_FLOPS = 1e11

# Questions whose tokens are counted: the longest ones for what must fit, others for the mean.
COUNTED_QUESTIONS = 200


@dataclass
class Lengths:
    """
    Tokens of a question: the mean, and the most.

    Args:
        selector_prompt (`tuple[float, int]`):
            Prompt of the selector.
        generator_row (`tuple[float, int]`):
            Prompt of the generator, its longest documents selected, with the answer.
        permutation (`int`):
            A permutation, at most; the question where the selector scores it behind each document.
        answer (`int`):
            An answer, at most.
        counted (`str`):
            How they are known.
    """

    selector_prompt: tuple[float, int]
    generator_row: tuple[float, int]
    permutation: int
    answer: int
    counted: str

    @classmethod
    def of_settings(cls, args: DROConfig) -> "Lengths":
        """Upper bounds, where there are no data or no tokenizer to count with."""
        document = args.max_document_length or PASSAGE_TOKENS
        prompts = [
            number * (document + ID_TOKENS) + FRAME_TOKENS for number in (args.max_candidates, args.num_selected)
        ]
        if args.max_prompt_length is not None:
            prompts = [min(prompt, args.max_prompt_length) for prompt in prompts]
        row = prompts[1] + args.max_answer_length
        counted = f"at most, with {document} tokens per document"
        permutation = ID_TOKENS * args.num_selected
        if args.selector_form == "query_likelihood":
            prompts[0] = args.max_candidates * (document + QUESTION_TOKENS)
            permutation = QUESTION_TOKENS
        return cls((prompts[0], prompts[0]), (row, row), permutation, args.max_answer_length, counted)

    @classmethod
    def of_data(
        cls, dataset: Dataset, args: DROConfig, prompts: dict[Role, Prompts], codec: PermutationCodec
    ) -> "Lengths":
        """Tokens of the questions with the longest documents, and of others for the mean."""
        sizes = [
            sum(len(each["text"]) for each in documents[: args.max_candidates])
            for batch in dataset.select_columns(["documents"]).iter(batch_size=1000)
            for documents in batch["documents"]
        ]
        order = sorted(range(len(dataset)), key=sizes.__getitem__)
        longest = order[-COUNTED_QUESTIONS // 4 :]
        others = order[:: math.ceil(len(order) / COUNTED_QUESTIONS)]

        def lengths(rows: Sequence[int]) -> list[tuple[int, int]]:
            return [_question_lengths(dataset[row], args, prompts) for row in rows]

        written, selector = codec.max_length, prompts["selector"]
        if isinstance(selector, PassagePrompts):
            written = max(len(selector.rows(dataset[row]["question"], [], True)[0][1]) for row in longest)
        most, usual = lengths(longest), lengths(others)
        ranges = [
            (sum(each[i] for each in usual) / len(usual), max(each[i] for each in most + usual)) for i in range(2)
        ]
        counted = "counted" if len(others) == len(dataset) else f"counted on {len({*longest, *others})} questions"
        return cls(ranges[0], ranges[1], written, args.max_answer_length, counted)


def _question_lengths(record: dict[str, Any], args: DROConfig, prompts: dict[Role, Prompts]) -> tuple[int, int]:
    documents = record["documents"][: args.max_candidates]
    longest = sorted(documents, key=lambda document: -len(document["text"]))[: args.num_selected]
    tokenizer = prompts["generator"].tokenizer
    answer = max(len(ids) for ids in tokenizer(record["answers"], add_special_tokens=False).input_ids) + 1
    selector = len(prompts["selector"](record["question"], documents))
    generator = len(prompts["generator"](record["question"], longest))
    return selector, generator + min(answer, args.max_answer_length + 1)


@dataclass
class Plan:
    """
    What a run will do and need.

    Args:
        rows (`list[tuple[str, str]]`):
            What is told about the run, in words.
        memory (`dict[str, float]`):
            Bytes on each device by what they are for.
        flops (`float`, *optional*):
            Operations of the whole run on all devices; `None` if its length is unknown.
    """

    rows: list[tuple[str, str]]
    memory: dict[str, float]
    flops: float | None

    @property
    def peak(self) -> float:
        """Bytes on each device at the most."""
        return sum(self.memory.values())


@dataclass
class Models:
    """
    What is trained, known by configs alone.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Base of both roles, or of the generator.
        selector_config ([`~transformers.PreTrainedConfig`], *optional*):
            Base of the selector alone.
        peft_config ([`~peft.PeftConfig`] or `dict`, *optional*):
            Adapters; `None` for full models.
        dtype (`torch.dtype`):
            Precision of the base.
        quantized (`float`, *optional*):
            Bytes per quantized weight.
    """

    config: PreTrainedConfig
    selector_config: PreTrainedConfig | None
    peft_config: PeftConfig | dict[str, PeftConfig] | None
    dtype: torch.dtype
    quantized: float | None


def make_plan(
    models: Models,
    args: DROConfig,
    lengths: Lengths,
    num_questions: int | None,
    num_eval: int,
    num_processes: int,
    engine: str = "data parallel",
) -> Plan:
    """
    The plan of a run.

    Args:
        models ([`Models`]):
            What is trained.
        args ([`DROConfig`]):
            How.
        lengths ([`Lengths`]):
            Tokens of the questions.
        num_questions (`int`, *optional*):
            Training questions, if they are known.
        num_eval (`int`):
            Evaluation questions.
        num_processes (`int`):
            Processes, each on a device of its own.
        engine (`str`, *optional*, defaults to `"data parallel"`):
            How they share the work, see [`~engines.engine_name`].

    Returns:
        [`Plan`]
    """
    trained: list[Role] = [role for role in ROLES if getattr(args, f"train_{role}")]
    roles = cost.build_roles(
        models.config, models.selector_config, models.peft_config, models.dtype, trained, args.trust_remote_code
    )
    shapes = cost.role_shapes(roles)
    largest = _work(args, lengths, lengths.selector_prompt[1], lengths.generator_row[1])
    mean = _work(args, lengths, lengths.selector_prompt[0], lengths.generator_row[0])
    memory = _memory(models, args, roles, shapes, largest, num_processes, engine)

    batch = args.per_device_train_batch_size
    per_update = batch * num_processes * args.gradient_accumulation_steps
    flops_per_question = _flops_per_question(args, roles, shapes, mean, roles.trained)
    per_update_tokens = per_update * sum(mean.tokens(role) for role in ROLES)
    shared = "" if engine == "data parallel" else f" under {engine}"
    rows = [
        ("models", _describe_models(models)),
        ("trained", f"{' and '.join(trained)}, {'full models' if models.peft_config is None else 'as adapters'}"),
        ("selector", f"prompts of {_range(lengths.selector_prompt)} tokens, {lengths.counted}"),
        ("generator", f"prompts with answers of {_range(lengths.generator_row)} tokens, {lengths.counted}"),
        ("processes", f"{num_processes}{shared}, {batch} questions at a time on each"),
        (
            "update",
            f"{per_update:,} questions, {args.num_permutations} permutations each: {per_update_tokens:,} tokens",
        ),
        ("work of an update", _operations(per_update * flops_per_question)),
    ]
    flops = None
    if num_questions is not None:
        updates, blocks, visits = _count_steps(args, num_questions, num_processes)
        fitted = min(args.selector_fit_questions, num_questions)
        # Each process goes through all of these.
        fitting = num_processes * fitted * _flops_per_question(args, roles, shapes, mean, ())
        flops = visits * flops_per_question + fitting
        device, sustained = ("process", SUSTAINED_CPU_FLOPS) if args.use_cpu else ("device", SUSTAINED_FLOPS)
        time = _duration(flops / num_processes / sustained)
        rows += [
            ("questions", f"{num_questions:,} to train on, {num_eval:,} to evaluate on"),
            ("run", f"{updates:,} updates, {blocks:,} E-steps"),
            *([("fit of the selector", f"{fitted:,} questions first, {_operations(fitting)}")] if fitted else []),
            ("work of the run", f"{_operations(flops)}, evaluation left out"),
            ("time of the run", f"{time} if each {device} sustains {sustained / 1e12:g} TFLOP/s"),
        ]
    return Plan(rows, memory, flops)


def _work(args: DROConfig, lengths: Lengths, prompt: float, row: float) -> cost.Work:
    """Work of a question whose prompts have these many tokens."""
    return cost.Work(
        round(prompt),
        lengths.permutation,
        round(row),
        lengths.answer,
        args.num_permutations,
        bool(args.gradient_checkpointing),
        args.steps_per_estimation == args.maximization_epochs == 1 and args.negligible_weight == 0,
        separate_choices=args.num_selected if args.shared_prefix == "never" else 0,
        scored_documents=args.max_candidates if args.selector_form == "query_likelihood" else 0,
    )


def _flops_per_question(
    args: DROConfig, roles: Roles, shapes: dict[Role, cost.Shape], mean: cost.Work, learning: Collection[Role]
) -> float:
    """Operations of both roles over a question of usual length: the E-step, and the M-step of those that learn."""
    parameters = cost.role_parameters(roles)
    rows_apart = mean.scored_documents or (args.num_permutations if mean.separate_choices else 1)
    row_lengths: dict[Role, int] = {
        "selector": mean.tokens("selector") // rows_apart,
        "generator": mean.generator_row,
    }
    total = 0.0
    for role in ROLES:
        trained = role in learning
        full = not isinstance(roles.module(role), PeftModel)
        equivalents = cost.forward_equivalents(role, mean, trained, full and trained)
        total += equivalents * cost.flops_per_token(shapes[role], parameters[role], row_lengths[role])
    return total


def _memory(
    models: Models,
    args: DROConfig,
    roles: Roles,
    shapes: dict[Role, cost.Shape],
    largest: cost.Work,
    num_processes: int,
    engine: str,
) -> dict[str, float]:
    """Bytes on each device by what they are for, when questions as long as the longest are computed together."""
    together = args.per_device_train_batch_size
    if args.max_tokens_per_forward is not None:
        together = max(1, min(together, args.max_tokens_per_forward // max(largest.tokens(role) for role in ROLES)))
    half = args.bf16 or args.fp16 or models.dtype.itemsize == 2
    trained = roles.trained
    optim = str(getattr(args.optim, "value", args.optim))
    memory: dict[str, float]
    if engine == "FSDP2":
        memory = cost.sharded_bytes(roles, optim, half, num_processes)
    elif engine.startswith("ZeRO"):
        memory = cost.zero_bytes(roles, optim, half, int(engine[-1]), num_processes, models.quantized)
    else:
        memory = {
            **cost.weight_bytes(roles, models.quantized),
            **cost.training_bytes(roles, optim, models.quantized, num_processes),
        }
    itemsize = 2 if half else 4
    steps = {
        role: cost.role_step_bytes(
            shapes[role], role, largest, together, itemsize, models.dtype.itemsize, models.peft_config is None
        )
        for role in trained
    }
    cache = cost.cache_bytes(shapes["selector"], together * largest.tokens("selector"), itemsize)
    sharded = engine in ("FSDP2", "ZeRO-3")
    kept = not (args.gradient_checkpointing or largest.scored_documents or sharded)
    if kept and largest.estimates_serve_once and len(trained) == 2:
        # The selector's graph is held while the generator's is built.
        memory["activations"] = sum(step["activations"] for step in steps.values()) + cache
        memory["logits"] = sum(step["logits"] for step in steps.values())
    else:
        peak = max(steps.values(), key=lambda step: sum(step.values()))
        memory |= peak if sum(peak.values()) > cache else {"activations": float(cache)}

    if half and engine == "data parallel":  # others compute with weights in half precision
        memory["autocast copies"] = cost.autocast_bytes(roles, models.quantized)
    return memory


def _count_steps(args: DROConfig, num_questions: int, num_processes: int) -> tuple[int, int, int]:
    """Updates, E-steps, and questions visited in a run."""
    sampler = EstimationSampler(
        num_questions,
        args.per_device_train_batch_size,
        args.steps_per_estimation,
        args.maximization_epochs,
        args.gradient_accumulation_steps,
        args.dataloader_drop_last,
        world_size=num_processes,
    )
    per_epoch = math.ceil(len(sampler) / args.gradient_accumulation_steps)
    updates = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    epochs, rest = divmod(updates, per_epoch)
    blocks_per_epoch = math.ceil(sampler.num_micro_batches / sampler.block_size)
    started = math.ceil(rest * args.gradient_accumulation_steps / sampler.steps_per_block)
    blocks = epochs * blocks_per_epoch + min(started, blocks_per_epoch)
    visited = round(num_questions * args.maximization_epochs * updates / per_epoch)
    return updates, blocks, visited


def print_plan(plan: Plan) -> None:
    """Prints the plan to the terminal."""
    console = Console()
    table = Table(title="The run", title_justify="left", show_header=False)
    for name, value in plan.rows:
        table.add_row(name, value)
    console.print(table)
    table = Table(title="Memory of each device", title_justify="left")
    table.add_column("for")
    table.add_column("GiB", justify="right")
    for name, number in plan.memory.items():
        if number:
            table.add_row(name, f"{number / 2**30:.2f}")
    table.add_section()
    table.add_row("at most", f"{plan.peak / 2**30:.2f}")
    console.print(table)
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        console.print(f"This machine's first device has {total / 2**30:.1f} GiB.")
    console.print("Leave 1 to 2 GiB for the device's context, its kernels' buffers and fragmentation.")


def read_config(model: str, revision: str | None, trust_remote_code: bool) -> PreTrainedConfig:
    """
    Config of a model.

    Raises:
        `ValueError`: there is none at this place, or the Hub did not give it.
    """
    try:
        return cast(
            PreTrainedConfig,
            AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code),
        )
    except OSError as error:
        raise ValueError(
            f"the config of {model} cannot be read ({str(error).splitlines()[0]}): check the name, the network, and "
            "whether you were given access; or name a folder with config.json"
        ) from None


def _describe_models(models: Models) -> str:
    precision = str(models.dtype).removeprefix("torch.")
    if models.quantized is not None:
        precision = f"{8 * models.quantized:.1f} bits per weight"
    names = dict.fromkeys(_name(config) for config in (models.selector_config, models.config) if config is not None)
    return f"{' and '.join(names)}, {precision}"


def _name(config: PreTrainedConfig) -> str:
    return config.name_or_path or config.model_type


def _operations(number: float) -> str:
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if number >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number / 1e9:,.2f} GFLOP"


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"


def _range(values: tuple[float, int]) -> str:
    mean, most = values
    return f"{most:,}" if round(mean) == most else f"{mean:,.0f} (at most {most:,})"
