# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
Kills every resumable command at random moments, runs it again, and compares what it leaves with what an undisturbed
call leaves; then starts it twice at once into one folder:

```bash
python -m tests.faults.kills --kills 20
```
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from datasets import load_from_disk
from safetensors.torch import load_file

import trl_dro.commands.evaluate
import trl_dro.commands.predict
import trl_dro.commands.retrieve
import trl_dro.commands.train
import trl_dro.commands.warmup  # noqa: F401 (imported before processes are forked)
from trl_dro.commands.cli import run
from trl_dro.demo.tiny import TINY_MODEL
from trl_dro.demo.world import synthetic_world


SIZES = "--num_selected 2 --max_candidates 4"
TRAINING = "--use_cpu --bf16 false --report_to none --save_steps 1 --per_device_train_batch_size 2 --lora_r 2"
COMMANDS = {
    "train": f"train --dataset_name DATA --output_dir OUT --use_peft --max_steps 6 --num_permutations 2 {SIZES} "
    f"{TRAINING} --steps_per_estimation 3 --resume_from_checkpoint true",
    "warmup": f"warmup --dataset_name DATA --output_dir OUT --max_steps 4 {SIZES} {TRAINING}",
    "evaluate": "evaluate SYSTEM --dataset_name BAD --output_dir OUT --tokens_per_batch 500 --device cpu "
    "--on_error skip",
    "predict": "predict SYSTEM --dataset_name BAD --output_dir OUT --tokens_per_batch 500 --device cpu "
    "--on_error skip",
    "retrieve": "retrieve --questions QUESTIONS --corpus CORPUS --output_dir OUT --k 4 --cache_dir OUT-cache "
    "--shard_size 4 --batch_size 2",
}
# Those that another process makes wait, as both make the same; the others are refused.
WAITS = ("retrieve",)


def weights(out: Path) -> dict:
    files = {role: load_file(out / role / "adapter_model.safetensors") for role in ("selector", "generator")}
    return {f"{role}.{name}": each.tolist() for role, tensors in files.items() for name, each in tensors.items()}


def lines(out: Path, name: str) -> list[dict]:
    rows = [json.loads(line) for line in (out / name).read_bytes().split(b"\n")[:-1]]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


RESULTS = {
    "train": weights,
    "warmup": weights,
    "evaluate": lambda out: lines(out, "questions.jsonl"),
    "predict": lambda out: lines(out, "predictions.jsonl"),
    "retrieve": lambda out: load_from_disk(out / "train").to_list(),
}


def make_data(folder: Path) -> None:
    """A dataset with candidates, the same with bad rows in between, and the same as questions and a corpus."""
    train, _, *_ = synthetic_world(16, 1, num_documents=4)
    train.save_to_disk(folder / "data")
    rows = train.to_list()
    bad = [rows[0], {**rows[1], "question": ""}, *rows[2:9], {**rows[9], "answers": []}, *rows[10:]]
    passages = {document["id"]: document for row in rows for document in row["documents"]}
    questions = [{"question": row["question"], "answers": row["answers"]} for row in rows]
    for name, values in (("questions", questions), ("corpus", passages.values()), ("bad", bad)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))


def arguments(command: str, folder: Path, out: Path) -> list[str]:
    places = {
        "DATA": "data",
        "BAD": "bad.jsonl",
        "QUESTIONS": "questions.jsonl",
        "CORPUS": "corpus.jsonl",
        "SYSTEM": "warmup",
    }
    words = COMMANDS[command].replace("OUT", str(out)).split()
    words += ["--base_model", str(TINY_MODEL)] if command in ("evaluate", "predict") else []
    return [str(folder / places[word]) if word in places else word for word in words]


def start(words: list[str], log: Path) -> multiprocessing.Process:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__ if __name__ != "__main__" else "tests.faults.kills"])
    process = context.Process(target=child, args=(words, str(log)), daemon=True)
    process.start()
    return process


def child(words: list[str], log: str) -> None:
    import torch

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    sys.stdout.reconfigure(line_buffering=True)
    torch.set_num_threads(1)
    run(words)


def finish(process: multiprocessing.Process, log: Path) -> None:
    process.join(600)
    if process.exitcode != 0:
        raise AssertionError(f"exit code {process.exitcode}: {log.read_text()[-2000:]}")


def kill_and_compare(command: str, folder: Path, kills: int, draw: random.Random) -> dict[str, int]:
    """
    Kills a command at random moments and runs it again, in a new folder whenever it comes to its end in between: how
    many folders there were, and how many of them hold the undisturbed result.
    """
    reference, log = folder / command, folder / f"{command}.log"
    begin = time.monotonic()
    finish(start(arguments(command, folder, reference), log), log)
    seconds = time.monotonic() - begin
    expected = RESULTS[command](reference)
    counts = {"kills": 0, "folders": 0, "equal": 0}
    while counts["kills"] < kills:
        counts["folders"] += 1
        words = arguments(command, folder, folder / f"{command}-{counts['folders']}")
        while counts["kills"] < kills:
            process = start(words, log)
            process.join(draw.uniform(0, seconds))
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            counts["kills"] += 1
        finish(start(words, log), log)
        counts["equal"] += RESULTS[command](folder / f"{command}-{counts['folders']}") == expected
    return counts


def two_at_once(command: str, folder: Path) -> str:
    """What becomes of two calls into one folder: one is refused in one line, or waits for the other."""
    out, logs = folder / f"{command}-twice", [folder / f"{command}-{which}.log" for which in ("first", "second")]
    processes = [start(arguments(command, folder, out), log) for log in logs]
    for process in processes:
        process.join(600)
    refused = [log for process, log in zip(processes, logs, strict=True) if process.exitcode != 0]
    equal = RESULTS[command](out) == RESULTS[command](folder / command)
    if not refused and command in WAITS:
        return "one waits" if equal else "WRONG RESULT"
    if len(refused) == 1 and "another process is writing to" in refused[0].read_text().splitlines()[-1]:
        return "one is refused" if equal else "WRONG RESULT"
    return f"NOT REFUSED ({[process.exitcode for process in processes]})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="+", default=["warmup", "train", "evaluate", "predict", "retrieve"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder)
        print("| command | kills | equal results | two at once |\n|---|---|---|---|", flush=True)
        for command in dict.fromkeys(["warmup", *args.commands]):  # whose system the others ask
            if command not in args.commands:
                log = folder / "warmup.log"
                finish(start(arguments("warmup", folder, folder / "warmup"), log), log)
                continue
            counts = kill_and_compare(command, folder, args.kills, random.Random(args.seed))
            twice = two_at_once(command, folder)
            print(
                f"| {command} | {counts['kills']} | {counts['equal']} of {counts['folders']} | {twice} |", flush=True
            )


if __name__ == "__main__":
    main()
