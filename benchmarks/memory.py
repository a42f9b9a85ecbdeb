# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
Is `--dry_run` right about memory? Trains a few updates of the longest questions of real data and compares the most
memory that the process had with what the dry run says, for each base with and without checkpointing.

```bash
.venv/bin/python benchmarks/memory.py --bases SMOLLM2 GEMMA --data outputs/nq/train
.venv/bin/python benchmarks/memory.py --quick      # the tiny model and an invented world
.venv/bin/python benchmarks/memory.py --gpu --random gpu-llama1b --dtype bfloat16 --candidates 20 --selected 5 \\
    --permutations 8                               # random weights of that shape, on a CUDA GPU
```

On a CPU, "measured" is the peak of resident memory less what was resident before the model was loaded; on a GPU, the
allocator's peak. Each setting runs in a process of its own, since a peak cannot be taken back, with glibc told to
return large blocks when they are freed: by default it keeps them, and what is measured is then its habit.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from peft import LoraConfig
from rich import box
from rich.console import Console
from rich.table import Table
from step_cost import PRESETS, make_questions, make_tokenizer, save_random_model
from transformers import AutoConfig, LlamaConfig, set_seed

from trl_dro import DROConfig, DROTrainer
from trl_dro.demo.tiny import TINY_MODEL
from trl_dro.demo.world import synthetic_world
from trl_dro.trainer.plan import Lengths, Models, make_plan


GIB = 2**30
RETURN_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}


def write_random(name: str, folder: Path, num_candidates: int) -> None:
    """Writes a base of random weights, its tokenizer and questions, of a preset of `step_cost.py`."""
    preset = PRESETS[name]
    tokenizer = make_tokenizer(preset.model["vocab_size"])
    ids = {"pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(**preset.model, **ids, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    base = folder / name
    base.mkdir()
    save_random_model(config, base, preset.device)
    tokenizer.save_pretrained(base)
    make_questions(8, num_candidates, preset.words).save_to_disk(folder / "questions")


def longest(dataset: Dataset, number: int, max_candidates: int) -> Dataset:
    """The questions whose candidates have the most characters."""
    sizes = [sum(len(d["text"]) for d in documents[:max_candidates]) for documents in dataset["documents"]]
    return dataset.select(sorted(range(len(sizes)), key=sizes.__getitem__)[-number:])


def measure(options: argparse.Namespace, base: str, checkpointing: bool) -> dict[str, float]:
    """Bytes estimated and measured, and seconds of an update; in this process."""
    if options.quick:
        dataset, _ = synthetic_world(24, 8, 0, 0.0, options.candidates)
    else:
        dataset = load_from_disk(options.data)
    dataset = longest(dataset, options.batch * options.updates, options.candidates)
    dtype = getattr(torch, options.dtype)
    peft_config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    with tempfile.TemporaryDirectory() as folder:
        args = DROConfig(
            output_dir=folder,
            max_steps=options.updates,
            per_device_train_batch_size=options.batch,
            gradient_accumulation_steps=1,
            gradient_checkpointing=checkpointing,
            max_candidates=options.candidates,
            num_selected=options.selected,
            num_permutations=options.permutations,
            max_document_length=160,
            max_answer_length=16,
            model_init_kwargs={"dtype": options.dtype},
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not options.gpu,
            bf16=False,
        )
        set_seed(0)
        before = resident()
        trainer = DROTrainer(base, args, dataset, peft_config=peft_config)
        lengths = Lengths.of_data(dataset, args, trainer.rag.prompts, trainer.rag.codec)
        models = Models(AutoConfig.from_pretrained(base), None, peft_config, dtype, None)
        plan = make_plan(models, args, lengths, len(dataset), 0, 1)
        trainer.train()
    if options.gpu:
        measured = torch.cuda.max_memory_allocated()
    else:
        measured = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"estimate": plan.peak, "measured": measured, "weights": plan.memory["base"]}


def resident() -> int:
    """Bytes of memory that this process holds now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", default=[str(TINY_MODEL)], help="Folders or Hub ids.")
    parser.add_argument("--data", default="outputs/nq/train", help="A dataset that trl-dro retrieve wrote.")
    parser.add_argument("--dtype", default="float32", help="Precision of the base.")
    parser.add_argument("--candidates", type=int, default=5, help="n")
    parser.add_argument("--selected", type=int, default=2, help="K")
    parser.add_argument("--permutations", type=int, default=4, help="m")
    parser.add_argument("--batch", type=int, default=1, help="Questions of a forward.")
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--random", choices=list(PRESETS), help="Random weights and questions of this shape instead.")
    parser.add_argument("--json", type=Path, help="File to write the numbers to.")
    parser.add_argument("--one", help="Only this setting, as JSON, in this process.")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.one:
        print(json.dumps(measure(options, **json.loads(options.one))))
        return
    arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        if options.random:
            write_random(options.random, Path(folder), options.candidates)
            options.bases = [f"{folder}/{options.random}"]
            arguments += ["--data", f"{folder}/questions"]
        compare(options, arguments)


def compare(options: argparse.Namespace, arguments: list[str]) -> None:
    """Measures every setting in a process of its own, and prints the table."""
    table = Table(box=box.MARKDOWN)
    for heading in ("base", "checkpointing", "weights, GiB", "estimate, GiB", "measured, GiB", "measured / estimate"):
        table.add_column(heading, justify="left" if heading == "base" else "right")
    rows = []
    for base in options.bases:
        for checkpointing in (False, True):
            setting: dict[str, Any] = {"base": base, "checkpointing": checkpointing}
            command = [sys.executable, __file__, *arguments, "--one", json.dumps(setting)]
            environment = os.environ | RETURN_BLOCKS
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            found = json.loads(run.stdout.splitlines()[-1])
            rows.append({"base": base.rstrip("/").split("/")[-1], "checkpointing": checkpointing, **found})
            numbers = [f"{found[name] / GIB:.2f}" for name in ("weights", "estimate", "measured")]
            ratio = f"{found['measured'] / found['estimate']:.2f}"
            table.add_row(rows[-1]["base"], "yes" if checkpointing else "no", *numbers, ratio)
            print(f"{base}, checkpointing {checkpointing}: {found}", file=sys.stderr, flush=True)
    Console(width=160).print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
