# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""`trl-dro train`: a whole run, from data to the trained system compared with what it was before."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedTokenizerBase, set_seed
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..data import load_records, read_corpus, read_questions, validate_dataset
from ..data.storage import alone_in
from ..demo.tiny import tiny_model_for
from ..model.loading import refuse_file
from ..model.roles import Role, check_role, load_role_adapters
from ..retrieval import BM25Retriever, retrieve_candidates
from ..system.adapter_check import ADAPTER_FILE, check_adapter, read_adapter_config
from ..trainer.cost import BYTES_4BIT, BYTES_4BIT_NESTED, BYTES_8BIT
from ..trainer.dro_config import DROConfig
from ..trainer.dro_trainer import DROTrainer
from ..trainer.engines import engine_name
from ..trainer.inputs import (
    LongAnswers,
    check_inputs,
    fit_answers,
    load_model,
    load_tokenizers,
    refuse_unsupported,
)
from ..trainer.logs import print_comparison
from ..trainer.plan import Lengths, Models, make_plan, print_plan, read_config
from ..trainer.ranges import check_model_settings
from ..trainer.run import checkpoints_of_run
from .arguments import CORPUS_HELP, DATASET_HELP, CuttingArguments, LaunchArguments, check_range


@dataclass
class TrainArguments(LaunchArguments, CuttingArguments):
    """
    Data, adapters to start from, and processes; see also [`CuttingArguments`].

    Args:
        dataset_name (`str`, *optional*):
            Dataset with candidates: a Hub id, a `save_to_disk` folder, or a jsonl or parquet file.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on.
        dataset_test_split (`str`, *optional*):
            Split to evaluate on.
        questions (`str`, *optional*):
            Training questions, jsonl, whose candidates BM25 retrieves from `corpus`.
        eval_questions (`str`, *optional*):
            Evaluation questions, in the same form.
        corpus (`str`, *optional*):
            Passages, as for [`~data.corpus.open_corpus`].
        long_answers (`str`, *optional*, defaults to `"error"`):
            What becomes of target answers longer than `max_answer_length`: an `"error"`, or `"drop"` or `"truncate"`,
            see [`~trainer.inputs.fit_answers`].
        max_eval_questions (`int`, *optional*):
            Evaluate on the first ones only.
        selector_model_name_or_path (`str`, *optional*):
            Base model of the selector, when it is not the generator's.
        selector_adapter (`str`, *optional*):
            Adapter to start the selector from.
        generator_adapter (`str`, *optional*):
            Adapter to start the generator from.
        dry_run (`bool`, *optional*, defaults to `False`):
            Check data and settings, print the plan of the run, and load no weights.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={"help": DATASET_HELP},
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(default=None, metadata={"help": "Split to evaluate on."})
    questions: str | None = field(
        default=None, metadata={"help": "Training questions, jsonl with `question` and `answers` or `golden_answers`."}
    )
    eval_questions: str | None = field(default=None, metadata={"help": "Evaluation questions, in the same form."})
    corpus: str | None = field(default=None, metadata={"help": CORPUS_HELP})
    long_answers: LongAnswers = field(
        default="error",
        metadata={"help": "Answers over max_answer_length: an error, or drop or truncate them and say how many."},
    )
    max_eval_questions: int | None = field(default=None, metadata={"help": "Evaluate on the first ones only."})
    selector_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Base model of the selector, when it is not the generator's."}
    )
    selector_adapter: str | None = field(
        default=None, metadata={"help": "Adapter to start the selector from, e.g. one trained by SFT."}
    )
    generator_adapter: str | None = field(
        default=None, metadata={"help": "Adapter to start the generator from; goes with --selector_adapter."}
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Check data and settings, print lengths, memory and work of the run, and load no weights."},
    )

    def stays(self) -> bool:
        return self.dry_run

    def __post_init__(self):
        super().__post_init__()
        if (self.selector_adapter is None) != (self.generator_adapter is None):
            raise ValueError("--selector_adapter and --generator_adapter go together: pass one for each role")
        if self.selector_adapter and self.selector_model_name_or_path:
            raise ValueError("--selector_adapter and --generator_adapter share one base: leave out the selector's")
        if (self.questions is None) != (self.corpus is None):
            raise ValueError("--questions and --corpus go together: questions need a corpus to retrieve from")
        if self.questions and self.dataset_name:
            raise ValueError("--dataset_name has candidates already: leave out --questions and --corpus")
        if self.eval_questions and not self.questions:
            raise ValueError(
                "--eval_questions go with --questions and --corpus; of a dataset pass --dataset_test_split"
            )
        if not (self.questions or self.dataset_name or self.dry_run):
            raise ValueError("give --dataset_name, or --questions and --corpus; examples/demo.py needs no data")
        self.cut()
        check_range(self, ["max_eval_questions"], 1)


def load_data(args: TrainArguments, max_candidates: int) -> tuple[Dataset, Dataset | None]:
    """Training set and, if there is one, evaluation set."""
    eval_dataset = None
    if args.dataset_name:
        train_dataset = load_records(args.dataset_name, args.dataset_train_split)
        if args.dataset_test_split:
            eval_dataset = load_records(args.dataset_name, args.dataset_test_split)
    else:
        retriever = BM25Retriever(read_corpus(str(args.corpus), *args.cut()))
        train_dataset = retrieve_candidates(read_questions(str(args.questions)), retriever, max_candidates)
        if args.eval_questions is not None:
            eval_dataset = retrieve_candidates(read_questions(args.eval_questions), retriever, max_candidates)
    if eval_dataset is not None and args.max_eval_questions is not None:
        eval_dataset = eval_dataset.select(range(min(args.max_eval_questions, len(eval_dataset))))
    return train_dataset, eval_dataset


def fit_data(
    args: TrainArguments,
    training_args: DROConfig,
    tokenizers: Mapping[Role, PreTrainedTokenizerBase],
    train_dataset: Dataset,
    eval_dataset: Dataset | None,
) -> tuple[Dataset, Dataset | None]:
    """Both sets without target answers that are too long, see [`~trainer.inputs.fit_answers`]."""
    limit = (tokenizers["generator"], training_args.max_answer_length, args.long_answers)
    all_answers = training_args.answer_target != "first"
    if eval_dataset is not None:
        eval_dataset = fit_answers(eval_dataset, "eval_dataset", *limit)
    return fit_answers(train_dataset, "train_dataset", *limit, all_answers), eval_dataset


def checkpoint_to_resume(args: DROConfig) -> str | bool | None:
    """`--resume_from_checkpoint true` continues if there is a checkpoint, so that one command starts and restarts."""
    if args.resume_from_checkpoint and args.resume_from_checkpoint.lower() == "true":
        return bool(checkpoints_of_run(str(args.output_dir)))
    return args.resume_from_checkpoint


def train(args: TrainArguments, training_args: DROConfig, model_args: ModelConfig) -> None:
    """
    Trains a system, evaluates it before and after if there is a set to evaluate on, and saves it.

    Args:
        args ([`TrainArguments`]):
            Data, adapters to start from.
        training_args ([`DROConfig`]):
            Training.
        model_args ([`~trl.ModelConfig`]):
            Base model, its precision, and the adapters.

    Raises:
        `DatasetError`: the data cannot be loaded, or is malformed.
        `ValueError`: settings cannot work together.
    """
    set_seed(training_args.seed)
    check_model_settings(model_args)
    refuse_file(model_args.model_name_or_path, model_args.model_revision)
    refuse_file(args.selector_model_name_or_path)
    model = model_args.model_name_or_path or tiny_model_for(training_args)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    if args.dry_run:
        dry_run(model, args, training_args, model_args)
        return
    # From here on, as the first evaluation can take long; the first process holds it for all of a launch.
    with alone_in(str(training_args.output_dir)) if training_args.should_save else nullcontext():
        _train(model, args, training_args, model_args)


def _train(model: str, args: TrainArguments, training_args: DROConfig, model_args: ModelConfig) -> None:
    train_dataset, eval_dataset = load_data(args, training_args.max_candidates)
    if args.long_answers != "error":
        tokenizers = load_tokenizers(model, args.selector_model_name_or_path, None, training_args)
        train_dataset, eval_dataset = fit_data(args, training_args, tokenizers, train_dataset, eval_dataset)
    peft_config, quantization_config = get_peft_config(model_args), get_quantization_config(model_args)
    starting_from: str | PeftModel = model
    if args.selector_adapter and args.generator_adapter:
        check_adapters(args.selector_adapter, args.generator_adapter, model, training_args, model_args)
        base = load_model(model, training_args, quantization_config, model_args.model_revision)
        starting_from = load_role_adapters(base, args.selector_adapter, args.generator_adapter)
        peft_config = quantization_config = None
    trainer = DROTrainer(
        model=starting_from,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=peft_config,
        quantization_config=quantization_config,
        selector_model=args.selector_model_name_or_path,
    )
    before = trainer.evaluate() if eval_dataset is not None else {}
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(training_args))
    after = trainer.evaluate() if eval_dataset is not None else {}
    trainer.save_model()
    if training_args.push_to_hub:
        trainer.push_to_hub()
    if eval_dataset is not None and trainer.is_world_process_zero():
        print_comparison(before, after)
        print(f"Both roles are in {training_args.output_dir}/selector and {training_args.output_dir}/generator.")


def check_adapters(
    selector: str, generator: str, model: str, training_args: DROConfig, model_args: ModelConfig
) -> None:
    """Checks adapters in folders against the base, before it is loaded; those of the Hub are checked by PEFT alone."""
    folders = [path for path in (selector, generator) if Path(path).is_dir() and (Path(path) / ADAPTER_FILE).is_file()]
    bases = {path: read_adapter_config(path).get("base_model_name_or_path") for path in folders}
    if len(set(bases.values())) > 1:
        told = " and ".join(f"{path} on {base}" for path, base in bases.items())
        raise ValueError(f"the adapters to start from were trained on different models ({told}): train both on one")
    check_role(selector, "selector")
    check_role(generator, "generator")
    for path in folders:
        check_adapter(path, model, model_args.model_revision, training_args.trust_remote_code)


def dry_run(model: str, args: TrainArguments, training_args: DROConfig, model_args: ModelConfig) -> None:
    """
    Checks settings and data, and prints the plan of the run. Without data, or without a tokenizer to count with, its
    lengths are the most that the settings allow.
    """
    refuse_unsupported(training_args)
    if args.selector_adapter and args.generator_adapter:
        check_adapters(args.selector_adapter, args.generator_adapter, model, training_args, model_args)
    models = describe_models(model, args, training_args, model_args)
    num_processes = max(training_args.world_size, args.num_processes or torch.cuda.device_count())
    engine = engine_name(args.accelerate_config, training_args)
    lengths = Lengths.of_settings(training_args)
    if not (args.dataset_name or args.questions):
        print_plan(make_plan(models, training_args, lengths, None, 0, num_processes, engine))
        return
    train_dataset, eval_dataset = load_data(args, training_args.max_candidates)
    selector_model = args.selector_model_name_or_path
    try:
        tokenizers = load_tokenizers(model, selector_model, None, training_args)
    except (OSError, ValueError) as error:
        print(f"The tokenizer cannot be loaded, so tokens are not counted ({str(error).splitlines()[0]}).")
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if dataset is not None:
                validate_dataset(dataset, training_args.num_selected, name)
    else:
        train_dataset, eval_dataset = fit_data(args, training_args, tokenizers, train_dataset, eval_dataset)
        _, codec, prompts = check_inputs(model, selector_model, None, training_args, train_dataset, eval_dataset)
        lengths = Lengths.of_data(train_dataset, training_args, prompts, codec)
    num_eval = 0 if eval_dataset is None else len(eval_dataset)
    print_plan(make_plan(models, training_args, lengths, len(train_dataset), num_eval, num_processes, engine))


def describe_models(model: str, args: TrainArguments, training_args: DROConfig, model_args: ModelConfig) -> Models:
    """What is trained, from configs alone."""
    peft_config: PeftConfig | dict[str, PeftConfig] | None = get_peft_config(model_args)
    if args.selector_adapter and args.generator_adapter:
        adapters = {"selector": args.selector_adapter, "generator": args.generator_adapter}
        peft_config = {role: PeftConfig.from_pretrained(path) for role, path in adapters.items()}
    quantized = None
    if model_args.load_in_4bit:
        quantized = BYTES_4BIT_NESTED if model_args.use_bnb_nested_quant else BYTES_4BIT
    elif model_args.load_in_8bit:
        quantized = BYTES_8BIT
    if quantized is not None and peft_config is None:
        raise ValueError("quantized weights cannot be trained: set --use_peft along with --load_in_4bit")
    trust = training_args.trust_remote_code
    config = read_config(model, model_args.model_revision, trust)
    selector_config = None
    if args.selector_model_name_or_path is not None:
        selector_config = read_config(args.selector_model_name_or_path, None, trust)
    named = config.dtype if model_args.dtype in ("auto", None) else model_args.dtype
    dtype = named if isinstance(named, torch.dtype) else getattr(torch, named or "float32")
    return Models(config, selector_config, peft_config, dtype, quantized)
