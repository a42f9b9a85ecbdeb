# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
Trains a document selector and an answer generator together with DRO, and compares the system before and after: the
script of `trl-dro train`, to be copied and changed.

Natural Questions with Llama 3 8B, both roles as QLoRA adapters on one 4-bit base. The dataset has its candidates
already (columns `question`, `answers`, `documents`), on disk or on the Hub:

```bash
accelerate launch examples/train_nq.py --config recipes/nq_llama3_8b_qlora.yaml --dataset_name nq-top20 \
    --dataset_test_split dev
```

Questions and a corpus of one's own, from which BM25 retrieves in memory:

```bash
accelerate launch examples/train_nq.py --model_name_or_path meta-llama/Meta-Llama-3-8B-Instruct --use_peft \
    --questions train.jsonl --eval_questions dev.jsonl --corpus corpus.jsonl
```

From adapters that were trained before, by SFT say, on the base named by `--model_name_or_path`:

```bash
accelerate launch examples/train_nq.py --model_name_or_path meta-llama/Meta-Llama-3-8B-Instruct \
    --dataset_name nq-top20 --selector_adapter sft/selector --generator_adapter sft/generator
```

What it will do and need, without loading weights:

```bash
python examples/train_nq.py --config recipes/nq_llama3_8b_qlora.yaml --dataset_name nq-top20 --dry_run
```
"""

from trl import ModelConfig, TrlParser

from trl_dro import DROConfig
from trl_dro.commands.train import TrainArguments, train


if __name__ == "__main__":
    parser = TrlParser((TrainArguments, DROConfig, ModelConfig))
    train(*parser.parse_args_and_config())
