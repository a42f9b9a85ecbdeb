# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
Warms up both roles with TRL's SFTTrainer before DRO, as the paper does: the generator on retriever contexts, the
selector on a teacher's rankings. `--output_dir` gets `selector/` and `generator/`, two adapters to start DRO from.

```bash
accelerate launch examples/warmup_sft.py --model_name_or_path meta-llama/Meta-Llama-3-8B-Instruct \\
    --dataset_name nq-top20 --teacher relevant --output_dir sft --learning_rate 1e-4 --num_train_epochs 1
accelerate launch examples/train_nq.py --model_name_or_path meta-llama/Meta-Llama-3-8B-Instruct \\
    --dataset_name nq-top20 --selector_adapter sft/selector --generator_adapter sft/generator
```

`--teacher` is `retriever` (its order), `relevant` (documents that contain an answer first), or a file of rankings in
the form of `castorini/rank_zephyr_training_data`, jsonl or jsonl.gz.
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config, get_quantization_config

from trl_dro.data import load_records
from trl_dro.permutation import PermutationCodec
from trl_dro.prompts import GENERATOR_TEMPLATE, SELECTOR_TEMPLATE, PromptBuilder
from trl_dro.roles import ROLES
from trl_dro.warmup import generator_examples, read_listwise_rankings, relevant_first, selector_examples


@dataclass
class WarmUpArguments:
    """What the roles are warmed up on."""

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


def make_examples(args: WarmUpArguments, tokenizer, seed: int) -> dict[str, Dataset]:
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
    records = [
        {**record, "documents": record["documents"][: args.max_candidates]}
        for record in load_records(args.dataset_name, args.dataset_train_split)
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


def main(args: WarmUpArguments, sft_args: SFTConfig, model_args: ModelConfig) -> None:
    model_args.use_peft = True
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    folder = Path(sft_args.output_dir)
    sft_args.completion_only_loss = True
    sft_args.max_length = None  # prompts are cut document by document, never at an end
    sft_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "quantization_config": get_quantization_config(model_args),
    }
    for role, examples in make_examples(args, tokenizer, sft_args.seed).items():
        sft_args.output_dir = str(folder / role)
        trainer = SFTTrainer(
            model_args.model_name_or_path,
            sft_args,
            train_dataset=examples,
            processing_class=tokenizer,
            peft_config=get_peft_config(model_args),
        )
        trainer.train()
        trainer.save_model()


if __name__ == "__main__":
    main(*TrlParser((WarmUpArguments, SFTConfig, ModelConfig)).parse_args_and_config())
