# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
Trains tiny models in processes of their own, one after the other, each given as the arguments of [`train`]:

```bash
python -m tests.distributed.run_training '[{"output_dir": "outputs/one", "max_steps": 8}]'
torchrun --standalone --nproc_per_node 2 -m tests.distributed.run_training '[{"output_dir": "outputs/two"}]'
```

`ENGINES` has what the environment tells about an engine, as `accelerate launch` does with a config file.

A test that starts many uses [`start`], which forks a server that has imported everything and has run nothing.
"""

import json
import multiprocessing
import os
import sys
import time
import zlib
from collections.abc import Collection
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from trl_dro import DROConfig, DROTrainer
from trl_dro.model.roles import ROLES
from trl_dro.trainer.sharding import DataParallel

from ..tiny_models import bpe_tokenizer, tiny_llama
from ..trainer.test_dro_trainer import make_dataset, randomize_adapters


# Measured by the clock, or a matter of which rows stand in one batch: never twice the same.
MEASURED = {"tokens_per_second", "e_step_seconds", "m_step_seconds", "padding_share"}


ENGINES = {
    "ddp": {},
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    },
    **{
        f"zero{stage}": {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
            "DS_ACCELERATOR": "cpu",
        }
        for stage in (1, 2)
    },
    "zero3": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        # By itself it would leave weights as small as these whole.
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(Path(__file__).with_name("zero3.json")),
        "DS_ACCELERATOR": "cpu",
    },
}


def allow_fsdp_on_cpu() -> None:
    """accelerate drops FSDP in silence where processes have no accelerator."""
    init = AcceleratorState.__init__

    def init_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = init_with_fsdp


def spare_deepspeed_its_compiler() -> None:
    """Without an accelerator DeepSpeed first compiles a way of its own to add up tensors, which takes minutes."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import_module("deepspeed.comm.torch").build_shm_op = lambda: None


class Pause(TrainerCallback):
    """Makes every update last at least so many seconds, so that a signal meets one."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_step_begin(self, args, state, control, **kwargs):
        print(f"update {state.global_step + 1} begins", flush=True)
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            time.sleep(0.05)  # a signal just before a sleep begins is handled when it ends


def make_trainer(
    num_questions: int = 8,
    unusable: Collection[int] = (),
    pause: float = 0.0,
    peft: bool = True,
    num_eval: int = 0,
    two_bases: bool = False,
    deferred: bool = False,
    **settings,
) -> DROTrainer:
    """
    Trainer of a tiny Llama, or of two; the answers of the questions in `unusable` get NaN for their likelihoods.
    `deferred` has gradients exchanged in the last backward of an update alone, whatever the engine. `num_eval`
    questions to evaluate on are scored by [`own_scores`] too.
    """
    tokenizer = bpe_tokenizer(split_digits=False)
    settings = {
        "num_selected": 2,
        "max_candidates": 4,
        "num_permutations": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_steps": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    } | settings
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        settings |= {"use_cpu": False, "ddp_backend": "gloo"}  # of use_cpu accelerate makes plain data parallelism
    trainer = DROTrainer(
        model=tiny_llama(tokenizer),
        args=DROConfig(**settings),
        train_dataset=make_dataset(num_questions),
        eval_dataset=make_dataset(num_eval or 3) if num_eval or settings.get("eval_strategy") else None,
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear") if peft else None,
        selector_model=tiny_llama(tokenizer, seed=1) if two_bases else None,
        callbacks=[Pause(pause)] if pause else None,
        compute_metrics=own_scores if num_eval else None,
    )
    if deferred:
        trainer.engine.synced_backward = partial(DataParallel.synced_backward, trainer.engine)
        trainer.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = False
    randomize_adapters(trainer)
    if unusable:
        answer_logps = trainer.rag.answer_logps
        broken = {trainer.train_dataset[row]["question"] for row in unusable}

        def with_nan(questions, *args, **kwargs):
            factors = [float("nan") if question["question"] in broken else 1.0 for question in questions]
            return answer_logps(questions, *args, **kwargs) * torch.tensor(factors).unsqueeze(-1)

        trainer.rag.answer_logps = with_nan
    return trainer


def own_scores(predictions: list[str], records: list[dict[str, Any]]) -> dict[str, float]:
    """Scores that a wrong order or number of predictions or records would change."""
    assert len(predictions) == len(records)
    key = "\n".join(f"{record['question']}: {answer}" for record, answer in zip(records, predictions, strict=True))
    return {"questions": len(records), "key": zlib.crc32(key.encode())}


def train(output_dir: str, resume: bool | str = False, save: bool = False, **settings: Any) -> None:
    """Trains and writes what [`read_result`] reads; see [`make_trainer`] for `settings`."""
    trainer = make_trainer(output_dir=output_dir, **settings)
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=resume or None)
    if trainer.compute_metrics is not None:
        trainer.evaluate()
    if save:
        trainer.save_model()
    folder = result_folder(output_dir, trainer.args.process_index)
    folder.mkdir(parents=True, exist_ok=True)
    own = [(f"{role}.{name}", weight) for role in ROLES for name, weight in trainer.roles.named_parameters(role)]
    weights = {name: trainer.engine.full(weight).contiguous() for name, weight in own}
    save_file(weights, folder / "weights.safetensors")
    (folder / "logs.json").write_text(json.dumps(trainer.state.log_history), encoding="utf-8")


def result_folder(output_dir: str | Path, rank: int) -> Path:
    return Path(output_dir) / f"result-{rank}"


def read_result(output_dir: str | Path, rank: int = 0) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Logs of every update, without `MEASURED`, and final weights."""
    folder = result_folder(output_dir, rank)
    history = json.loads((folder / "logs.json").read_text(encoding="utf-8"))
    logs = [{k: v for k, v in row.items() if k not in MEASURED} for row in history if "loss" in row]
    return logs, load_file(folder / "weights.safetensors")


def start(jobs: list[dict[str, Any]], log: Path) -> multiprocessing.Process:
    """Starts a process that runs jobs one after the other, with its output in a file."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_run_with_log, args=(jobs, str(log)), daemon=True)
    process.start()
    return process


def _run_with_log(jobs: list[dict[str, Any]], log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    sys.stdout.reconfigure(line_buffering=True)
    run(jobs)


def run(jobs: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    allow_fsdp_on_cpu()
    spare_deepspeed_its_compiler()
    print(f"process {os.getpid()} is rank {os.environ.get('RANK', 0)}", flush=True)
    for job in jobs:
        train(**job)


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
