# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
Trains a document selector and an answer generator together with DRO, and compares the system before and after.

Natural Questions with Llama 3 8B, both roles as QLoRA adapters on one 4-bit base. Candidates are the top 20 of BM25.

```bash
accelerate launch examples/train_nq.py --config recipes/nq_llama3_8b_qlora.yaml \
    --questions train.jsonl --eval_questions dev.jsonl --corpus corpus.jsonl
```

From adapters that were trained before, by SFT say, on the base named by `--model_name_or_path`:

```bash
accelerate launch examples/train_nq.py --model_name_or_path meta-llama/Meta-Llama-3-8B-Instruct \
    --dataset_name nq-top20 --selector_adapter sft/selector --generator_adapter sft/generator
```

A dataset that has its candidates already (columns `question`, `answers`, `documents`), on disk or on the Hub:

```bash
accelerate launch examples/train_nq.py --config recipes/nq_llama3_8b_qlora.yaml \
    --dataset_name my-org/nq-top20 --dataset_test_split validation
```
"""

from dataclasses import dataclass, field

from datasets import Dataset
from transformers import set_seed
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from trl_dro import DROConfig, DROTrainer
from trl_dro.checkpoint import find_checkpoints
from trl_dro.data import load_records, read_corpus, read_questions
from trl_dro.loading import load_model
from trl_dro.logs import print_comparison
from trl_dro.retrieval import BM25Retriever, retrieve_candidates
from trl_dro.roles import load_role_adapters
from trl_dro.tiny import TINY_MODEL


@dataclass
class DataArguments:
    """Where the questions come from: a dataset with candidates, or files from which BM25 retrieves them."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Dataset with candidates: a Hub id, a `save_to_disk` folder, or a jsonl or parquet file."},
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(default=None, metadata={"help": "Split to evaluate on."})
    questions: str | None = field(
        default=None, metadata={"help": "Training questions, jsonl with `question` and `answers` or `golden_answers`."}
    )
    eval_questions: str | None = field(default=None, metadata={"help": "Evaluation questions, in the same form."})
    corpus: str | None = field(default=None, metadata={"help": "Passages, jsonl with `id`, `title` and `text`."})
    selector_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Base model of the selector, when it is not the generator's."}
    )
    selector_adapter: str | None = field(
        default=None, metadata={"help": "Adapter to start the selector from, e.g. one trained by SFT."}
    )
    generator_adapter: str | None = field(
        default=None, metadata={"help": "Adapter to start the generator from; goes with --selector_adapter."}
    )

    def __post_init__(self):
        if (self.selector_adapter is None) != (self.generator_adapter is None):
            raise ValueError("--selector_adapter and --generator_adapter go together: pass one for each role")
        if self.selector_adapter and self.selector_model_name_or_path:
            raise ValueError("--selector_adapter and --generator_adapter share one base: leave out the selector's")
        if (self.questions is None) != (self.corpus is None):
            raise ValueError("--questions and --corpus go together: questions need a corpus to retrieve from")
        if self.questions and self.dataset_name:
            raise ValueError("--dataset_name has candidates already: leave out --questions and --corpus")
        if not (self.questions or self.dataset_name):
            raise ValueError("give --dataset_name, or --questions and --corpus; examples/demo.py needs no data")


def load_data(args: DataArguments, max_candidates: int) -> tuple[Dataset, Dataset | None]:
    """Training set and, if there is one, evaluation set."""
    if args.dataset_name:
        test_split = args.dataset_test_split
        return (
            load_records(args.dataset_name, args.dataset_train_split),
            load_records(args.dataset_name, test_split) if test_split else None,
        )
    retriever = BM25Retriever(read_corpus(args.corpus))
    train_dataset = retrieve_candidates(read_questions(args.questions), retriever, max_candidates)
    if args.eval_questions is None:
        return train_dataset, None
    return train_dataset, retrieve_candidates(read_questions(args.eval_questions), retriever, max_candidates)


def checkpoint_to_resume(args: DROConfig) -> str | bool | None:
    """`--resume_from_checkpoint true` continues if there is a checkpoint, so that one command starts and restarts."""
    if args.resume_from_checkpoint and args.resume_from_checkpoint.lower() == "true":
        return bool(find_checkpoints(args.output_dir))
    return args.resume_from_checkpoint


def main(data_args: DataArguments, training_args: DROConfig, model_args: ModelConfig) -> None:
    set_seed(training_args.seed)
    train_dataset, eval_dataset = load_data(data_args, training_args.max_candidates)
    model = model_args.model_name_or_path
    if model is None:
        print("No --model_name_or_path: the tiny model of the demo stands in, to try out the data and the settings.")
        model = str(TINY_MODEL)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    peft_config, quantization_config = get_peft_config(model_args), get_quantization_config(model_args)
    if data_args.selector_adapter and data_args.generator_adapter:
        base = load_model(model, training_args, quantization_config, model_args.model_revision)
        model = load_role_adapters(base, data_args.selector_adapter, data_args.generator_adapter)
        peft_config = quantization_config = None
    trainer = DROTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=peft_config,
        quantization_config=quantization_config,
        selector_model=data_args.selector_model_name_or_path,
    )
    before = trainer.evaluate() if eval_dataset is not None else {}
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(training_args))
    after = trainer.evaluate() if eval_dataset is not None else {}
    trainer.save_model()
    if training_args.push_to_hub:
        trainer.push_to_hub()
    if eval_dataset is not None and trainer.is_world_process_zero():
        print_comparison(before, after)
        print(f"Both adapters are in {training_args.output_dir}/selector and {training_args.output_dir}/generator.")


if __name__ == "__main__":
    parser = TrlParser((DataArguments, DROConfig, ModelConfig))
    main(*parser.parse_args_and_config())
