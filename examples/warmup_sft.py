# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
Warms up both roles with TRL's SFTTrainer before DRO, as the paper does: the generator on retriever contexts, the
selector on a teacher's rankings. The script of `trl-dro warmup`, to be copied and changed. `--output_dir` gets
`selector/` and `generator/`, two adapters to start DRO from.

```bash
accelerate launch examples/warmup_sft.py --model_name_or_path meta-llama/Meta-Llama-3-8B-Instruct \\
    --dataset_name nq-top20 --teacher relevant --output_dir sft --learning_rate 1e-4 --num_train_epochs 1
accelerate launch examples/train_nq.py --model_name_or_path meta-llama/Meta-Llama-3-8B-Instruct \\
    --dataset_name nq-top20 --selector_adapter sft/selector --generator_adapter sft/generator
```

`--teacher` is `retriever` (its order), `relevant` (documents that contain an answer first), or a file of rankings in
the form of `castorini/rank_zephyr_training_data`, jsonl or jsonl.gz.
"""

from trl import ModelConfig, SFTConfig, TrlParser

from trl_dro.commands.warmup import WarmUpArguments, warm_up


if __name__ == "__main__":
    warm_up(*TrlParser((WarmUpArguments, SFTConfig, ModelConfig)).parse_args_and_config())
