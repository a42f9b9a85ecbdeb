# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
What one training step costs, side by side in one run, with the same random weights, questions and m:

- ours: [`DROTrainer`];
- unshared: the same step with every permutation in a row of its own, in sampling too, and answers scored once for the
  weights and once more for the loss;
- trl: TRL's `GRPOTrainer` for the selector, whose reward is the likelihood of the gold answer after the documents
  named, and a step of TRL's `SFTTrainer` for the generator on as many contexts.

Then how the parts of our step grow with the number of permutations m, of documents n, and of words per document.

```bash
.venv/bin/python benchmarks/step_cost.py --preset cpu-small --json step_cost.json
.venv/bin/python benchmarks/step_cost.py --preset gpu-llama8b  # a CUDA GPU, and 17 GB of disk under --folder
```
"""

import argparse
import contextlib
import gc
import json
import os
import random
import statistics
import tempfile
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import psutil
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from qlora import NF4, save_random_model
from rich.console import Console
from rich.table import Table
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from trl_dro import DROConfig, DROTrainer
from trl_dro.model.codec import parse_permutation
from trl_dro.model.likelihood import completion_logits, completion_logps
from trl_dro.model.permutation import permutation_logps
from trl_dro.model.prompts import answer_ids
from trl_dro.model.rag_model import RAGModel
from trl_dro.model.sampling import PermutationSamples, sample_permutations


@dataclass
class Preset:
    """
    Sizes of a run.

    Args:
        model (`dict`):
            Arguments of [`~transformers.LlamaConfig`].
        device (`str`):
            `"cpu"` or `"cuda"`.
        lora_rank (`int`):
            Rank of every adapter.
        steps (`int`):
            Steps of ours, of which the median is taken.
        peer_steps (`int`):
            Steps of each of the others.
        warm_up (`bool`):
            Run every trainer on small questions first. On the CPU this costs more time than it changes.
        scaling (`dict`):
            Values of m, n and words to vary, one at a time.
        quantized (`bool`):
            NF4 base; a base in the dtype of the device otherwise.
        checkpointing (`bool`):
            Gradient checkpointing.
    """

    model: dict[str, Any]
    device: str
    lora_rank: int
    steps: int
    peer_steps: int
    scaling: dict[str, list[int]]
    warm_up: bool = True
    quantized: bool = False
    checkpointing: bool = False
    num_documents: int = 20
    words: int = 100
    num_selected: int = 5
    num_permutations: int = 8


LLAMA = {"vocab_size": 128256, "max_position_embeddings": 16384, "initializer_range": 0.02}
GPU_SCALING = {"m": [1, 2, 4, 8, 16], "n": [5, 10, 20, 40], "words": [50, 100, 200]}

PRESETS = {
    "cpu-small": Preset(
        model={
            "vocab_size": 8192,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 16384,
        },
        device="cpu",
        lora_rank=16,
        steps=2,
        peer_steps=1,
        scaling={"m": [1, 16], "n": [5, 40], "words": [50]},
        warm_up=False,
    ),
    "gpu-llama1b": Preset(
        model=LLAMA
        | {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
        device="cuda",
        lora_rank=16,
        steps=5,
        peer_steps=3,
        scaling=GPU_SCALING,
    ),
    "gpu-llama8b": Preset(
        model=LLAMA
        | {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        device="cuda",
        lora_rank=16,
        steps=5,
        peer_steps=3,
        scaling=GPU_SCALING,
        quantized=True,
        checkpointing=True,
    ),
}


# Questions, tokenizer, models


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One token per word, number or sign: `w17` is a word."""
    signs = "[ ] > : ? . , \n Question Passages Answer Rank Write the of that help most to answer question best".split(
        " "
    )
    vocabulary = ["<unk>", "<s>", "</s>", *signs, *map(str, range(100))]
    vocabulary += [f"w{i}" for i in range(min(vocab_size, 8192) - len(vocabulary))]
    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(dict.fromkeys(vocabulary))}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def make_questions(num_questions: int, num_documents: int, words: int) -> Dataset:
    draw = random.Random(0)

    def text(length: int) -> str:
        return " ".join(f"w{draw.randrange(5000)}" for _ in range(length))

    return Dataset.from_list(
        [
            {
                "question": text(12) + "?",
                "answers": [text(4)],
                "documents": [{"id": f"{i}-{j}", "text": text(words)} for j in range(num_documents)],
            }
            for i in range(num_questions)
        ]
    )


def lora(preset: Preset) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=preset.lora_rank, target_modules="all-linear")


def load_base(preset: Preset, base: Path) -> Any:
    quantization = NF4 if preset.quantized else None
    dtype = torch.float32 if preset.device == "cpu" else torch.bfloat16
    kwargs = {} if preset.device == "cpu" else {"device_map": {"": 0}}
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=quantization, **kwargs)


def common_settings(preset: Preset, folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "run"),
        "max_steps": preset.steps,
        "learning_rate": 1e-5,
        "gradient_checkpointing": preset.checkpointing,
        "bf16": preset.device == "cuda",
        "use_cpu": preset.device == "cpu",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


# Measuring


@dataclass
class Meter:
    """Seconds and tokens of each phase of each step, and the peak of memory."""

    device: str
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    tokens: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    peak_bytes: int = 0
    num_tokens: int = 0

    def count_tokens_of(self, model: Any) -> None:
        """Counts whatever goes through the embeddings, padding included."""

        def count(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            self.num_tokens += args[0].numel()

        model.get_input_embeddings().register_forward_pre_hook(count)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start, before = self.now(), self.num_tokens
        yield
        self.seconds[name].append(self.now() - start)
        self.tokens[name].append(self.num_tokens - before)

    def now(self) -> float:
        """Seconds: by the clock on a GPU, of the processor on a CPU, where one thread runs and others may disturb."""
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    @contextlib.contextmanager
    def peak(self) -> Iterator[None]:
        """Tensors on a GPU; what the process takes more than before on the CPU."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            yield
            self.peak_bytes = torch.cuda.max_memory_allocated()
            return
        process, done = psutil.Process(), threading.Event()
        before = process.memory_info().rss

        def watch() -> None:
            while not done.wait(0.005):
                self.peak_bytes = max(self.peak_bytes, process.memory_info().rss - before)

        watcher = threading.Thread(target=watch)
        watcher.start()
        yield
        done.set()
        watcher.join()


class StepTimer(TrainerCallback):
    """Times whole steps, from the first question read to the weights updated."""

    def __init__(self, meter: Meter):
        self.meter = meter

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = self.meter.now()
        self.before = self.meter.num_tokens

    def on_step_end(self, args, state, control, **kwargs):
        self.meter.seconds["step"].append(self.meter.now() - self.start)
        self.meter.tokens["step"].append(self.meter.num_tokens - self.before)


def train(trainer: Any, meter: Meter) -> None:
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(StepTimer(meter))
    with meter.peak():
        trainer.train()


# (a) ours and (b) unshared


class MeteredTrainer(DROTrainer):
    meter: Meter

    def _estimate(self, *args):
        with self.meter.phase("E"):
            return super()._estimate(*args)

    def _maximization_step(self, *args, **kwargs):
        with self.meter.phase("M"):
            return super()._maximization_step(*args, **kwargs)

    def _answer_logps(self, *args, **kwargs):
        with self.meter.phase("loss forward" if torch.is_grad_enabled() else "scoring"):
            return super()._answer_logps(*args, **kwargs)

    def _update(self, role, *args, **kwargs):
        with self.meter.phase(f"{role} update"):
            return super()._update(role, *args, **kwargs)


class UnsharedTrainer(MeteredTrainer):
    """Answers are scored in the E-step and again in the M-step, whose forward starts from nothing."""

    _estimates_serve_once = False


class UnsharedRAG(RAGModel):
    """Every permutation in a row of its own, prompt included, from the sampling on."""

    def sample(
        self,
        questions,
        num_permutations,
        temperature=1.0,
        top_p=1.0,
        greedy=False,
        seeds=None,
        read=None,
        sampling="independent",
    ):
        repeated = [question for question in questions for _ in range(num_permutations)]
        with torch.no_grad():
            samples = sample_permutations(
                self.reader("selector"),
                self.codec,
                self.read(repeated),
                [len(question["documents"]) for question in repeated],
                1,
                temperature,
                top_p,
                greedy,
            )
        shape = (len(questions), num_permutations)
        permutations, logps, proposal_logps = samples
        return PermutationSamples(permutations.view(*shape, -1), logps.view(shape), proposal_logps.view(shape))

    def permutation_logps(self, questions, permutations, likelihood="constrained", wrapped=None, read=None):
        m = permutations.shape[1]
        prompts = [prompt for prompt in self._selector_prompts(questions) for _ in range(m)]
        sizes = [len(question["documents"]) for question in questions for _ in range(m)]

        def complete(tokens):
            return completion_logits(self._forward("selector"), prompts, tokens, self._pad, self.device)

        logps = permutation_logps(complete, self.codec, permutations.flatten(0, 1).tolist(), sizes, likelihood)
        return logps.view(-1, m)

    def answer_logps(self, questions, targets, permutations, mean=False, wrapped=None):
        prompts = [
            self._generator_prompt(question, permutation)
            for question, group in zip(questions, permutations.tolist(), strict=True)
            for permutation in group
        ]
        answers = [answer_ids(self.tokenizers["generator"], target) for [target] in targets]
        answers = [answer for answer in answers for _ in range(permutations.shape[1])]
        logits = completion_logits(self._forward("generator"), prompts, answers, self._pad, self.device)
        return completion_logps(logits, mean).view(permutations.shape[:2])

    def _forward(self, role):
        return lambda **inputs: self.roles.forward(role, **inputs)

    @property
    def _pad(self) -> int:
        return self.tokenizers["selector"].pad_token_id


def make_trainer(cls: type, preset: Preset, base: Path, folder: Path, tokenizer: Any) -> Any:
    """A trainer of one question per step."""
    args = DROConfig(
        **common_settings(preset, folder),
        max_candidates=preset.num_documents,
        num_selected=preset.num_selected,
        num_permutations=preset.num_permutations,
        per_device_train_batch_size=1,
        max_answer_length=16,
    )
    questions = make_questions(preset.steps, preset.num_documents, preset.words)
    return cls(load_base(preset, base), args, questions, processing_class=tokenizer, peft_config=lora(preset))


def run_dro(cls: type, preset: Preset, base: Path, folder: Path, tokenizer: Any) -> Meter:
    trainer = make_trainer(cls, preset, base, folder, tokenizer)
    trainer.meter = meter = Meter(preset.device)
    meter.count_tokens_of(trainer.model)
    if cls is UnsharedTrainer:
        rag = trainer.rag
        trainer.rag = UnsharedRAG(rag.roles, rag.tokenizers, rag.prompts, rag.codec, rag.device)
    train(trainer, meter)
    scoring = meter.seconds["scoring"] or [0.0] * preset.steps  # ours scores answers in the generator's update
    parts = zip(meter.seconds["E"], scoring, meter.seconds["selector update"], strict=True)
    meter.seconds["selector"] = [e - s + update for e, s, update in parts]
    return meter


# (c) TRL


class MeteredGRPOTrainer(GRPOTrainer):
    meter: Meter

    def _generate_and_score_completions(self, inputs):
        with self.meter.phase("E"):
            return super()._generate_and_score_completions(inputs)


def run_trl(preset: Preset, base: Path, folder: Path, tokenizer: Any) -> Meter:
    """A step of GRPO and one of SFT, added up."""
    # Ours only lends its prompts and its codec.
    lender = make_trainer(DROTrainer, preset, base, folder, tokenizer)
    prompts, codec = lender.rag.prompts, lender.rag.codec
    questions = [lender.train_dataset[i] for i in range(len(lender.train_dataset))]
    length = len(codec.encode(list(range(1, preset.num_selected + 1)))[0])
    del lender
    grpo = run_grpo(preset, base, folder, tokenizer, prompts, questions, length)
    gc.collect()
    sft = run_sft(preset, base, folder, tokenizer, prompts, questions)
    both = Meter(preset.device, peak_bytes=max(grpo.peak_bytes, sft.peak_bytes))
    for name in ("seconds", "tokens"):
        ours, theirs = getattr(grpo, name), getattr(sft, name)
        steps = [a + b for a, b in zip(ours["step"], theirs["step"], strict=True)]
        rest = [step - e for step, e in zip(steps, ours["E"], strict=True)]
        getattr(both, name).update(E=ours["E"], M=rest, step=steps)
    return both


def run_grpo(
    preset: Preset, base: Path, folder: Path, tokenizer: Any, prompts: Any, questions: list[Any], length: int
) -> Meter:
    model = get_peft_model(load_base(preset, base), lora(preset))

    def reward(completions, question, documents, answers, **kwargs):
        rows, targets = [], []
        for completion, x, candidates, y in zip(completions, question, documents, answers, strict=True):
            named = parse_permutation(completion, len(candidates), preset.num_selected).permutation
            # A random model seldom writes ids: others fill up, so that the reward costs what it would.
            named += [i for i in range(1, len(candidates) + 1) if i not in named][: preset.num_selected - len(named)]
            rows.append(prompts["generator"](x, [candidates[i - 1] for i in named]))
            targets.append(answer_ids(tokenizer, y[0]))
        # The generator's adapter starts at zero: without an adapter the base is the same generator.
        with torch.no_grad(), model.disable_adapter():
            logits = completion_logits(model, rows, targets, tokenizer.pad_token_id, model.device)
        return completion_logps(logits).tolist()

    trainer = MeteredGRPOTrainer(
        model,
        reward,
        GRPOConfig(
            **common_settings(preset, folder),
            per_device_train_batch_size=preset.num_permutations,
            num_generations=preset.num_permutations,
            max_completion_length=length,
            generation_kwargs={"min_new_tokens": length},
            temperature=1.0,
        ),
        Dataset.from_list(
            [{"prompt": tokenizer.decode(prompts["selector"](q["question"], q["documents"])), **q} for q in questions]
        ),
        processing_class=tokenizer,
    )
    trainer.meter = meter = Meter(preset.device)
    meter.count_tokens_of(trainer.model)
    train(trainer, meter)
    return meter


def run_sft(preset: Preset, base: Path, folder: Path, tokenizer: Any, prompts: Any, questions: list[Any]) -> Meter:
    draw = random.Random(0)
    pairs = []
    for question in questions:
        for _ in range(preset.num_permutations):
            documents = draw.sample(question["documents"], preset.num_selected)
            prompt = tokenizer.decode(prompts["generator"](question["question"], documents))
            pairs.append({"prompt": prompt, "completion": " " + question["answers"][0]})
    trainer = SFTTrainer(
        load_base(preset, base),
        SFTConfig(
            **common_settings(preset, folder), per_device_train_batch_size=preset.num_permutations, max_length=None
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=lora(preset),
    )
    meter = Meter(preset.device)
    meter.count_tokens_of(trainer.model)
    train(trainer, meter)
    return meter


# Parts of our step, and how they grow


def time_parts(
    trainer: DROTrainer, meter: Meter, question: dict[str, Any], num_permutations: int, repeats: int
) -> dict[str, float]:
    """Seconds of the selector's and the generator's share of one step on one question, least of `repeats`."""
    rag = trainer.rag
    seconds = defaultdict(list)
    for _ in range(repeats):
        trainer.model.eval()
        start = meter.now()
        with trainer.accelerator.autocast():
            read = None if trainer.args.gradient_checkpointing else rag.read([question])
        with trainer.accelerator.autocast():
            samples = rag.sample([question], num_permutations, seeds=[0], read=read)
        trainer.model.train()
        with trainer.accelerator.autocast():
            logps = rag.permutation_logps([question], samples.permutations, read=read)
        logps.sum().backward()
        middle = meter.now()
        with trainer.accelerator.autocast():
            answer = rag.answer_logps([question], [question["answers"][:1]], samples.permutations)
        answer.sum().backward()
        seconds["generator"].append(meter.now() - middle)
        seconds["selector"].append(middle - start)
        del read, logps, answer
        trainer.model.zero_grad()
    return {name: min(values) for name, values in seconds.items()}


def measure_scaling(preset: Preset, base: Path, folder: Path, tokenizer: Any) -> list[dict[str, Any]]:
    defaults = {"m": preset.num_permutations, "n": preset.num_documents, "words": preset.words}
    points = []
    for name, values in preset.scaling.items():
        points += [point for value in values if (point := defaults | {name: value}) not in points]
    if defaults not in points:
        points.append(defaults)
    most = replace(preset, num_documents=max(point["n"] for point in points))
    trainer = make_trainer(DROTrainer, most, base, folder, tokenizer)
    rows = []
    for point in points:
        question = make_questions(1, point["n"], point["words"])[0]
        parts = time_parts(trainer, Meter(preset.device), question, point["m"], preset.peer_steps)
        rows.append({**point, "seconds": sum(parts.values()), **{f"{k}_seconds": v for k, v in parts.items()}})
    return rows


def matrix_ceiling() -> float:
    """Operations per second of a large bfloat16 matrix product."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        a @ a
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * 8192**3 / best


def utilisation(preset: Preset, base: Path, folder: Path, tokenizer: Any) -> dict[str, float]:
    """Share of the matrix ceiling that the prompt's forward and the selector's M-step reach."""
    trainer = make_trainer(DROTrainer, preset, base, folder, tokenizer)
    meter, rag, question = Meter(preset.device), trainer.rag, trainer.train_dataset[0]
    ceiling = matrix_ceiling()
    with trainer.accelerator.autocast(), torch.no_grad():
        samples = rag.sample([question], trainer.args.num_permutations, seeds=[0])
    seconds = defaultdict(list)
    for _ in range(1 + preset.steps):
        trainer.model.eval()
        start = meter.now()
        with trainer.accelerator.autocast(), torch.no_grad():
            rag.read([question])
        seconds["prefill"].append(meter.now() - start)
        trainer.model.train()
        start = meter.now()
        with trainer.accelerator.autocast():
            logps = rag.permutation_logps([question], samples.permutations)
        logps.sum().backward()
        seconds["M"].append(meter.now() - start)
    model = trainer.model.get_base_model()
    length = rag._selector_lengths([question], 0)[0]
    packed = rag._selector_lengths([question], trainer.args.num_permutations)[0]
    # Forward, backward to the inputs (frozen weights get no gradient), and recomputation under checkpointing.
    passes = 3 if preset.checkpointing else 2
    config = model.config
    weights = model.num_parameters(exclude_embeddings=True) - config.vocab_size * config.hidden_size * (
        not config.tie_word_embeddings
    )

    def flops(tokens: int) -> float:  # of causal attention, half of the pairs
        return tokens * (2 * weights + 2 * config.num_hidden_layers * config.hidden_size * tokens)

    return {
        "ceiling_tflops": ceiling / 1e12,
        "prefill": flops(length) / min(seconds["prefill"]) / ceiling,
        "M": passes * flops(packed) / min(seconds["M"]) / ceiling,
    }


# Report


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    result = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        result.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        result.add_row(*row)
    return result


def measure_sampling(preset: Preset, base: Path, folder: Path, tokenizer: Any) -> dict[str, float]:
    """Seconds to read a selector prompt and draw its permutations, independent and distinct ones."""
    trainer = make_trainer(DROTrainer, replace(preset, steps=1), base, folder, tokenizer)
    meter, rag, question = Meter(preset.device), trainer.rag, trainer.train_dataset[0]
    trainer.model.eval()
    seconds = defaultdict(list)
    for seed in range(1 + 3 * preset.peer_steps):
        for sampling in ("independent", "distinct"):
            start = meter.now()
            with trainer.accelerator.autocast(), torch.no_grad():
                rag.sample([question], preset.num_permutations, seeds=[seed], sampling=sampling)
            seconds[sampling].append(meter.now() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def run(preset: Preset, folder: Path) -> dict[str, Any]:
    console = Console(width=110)
    tokenizer = make_tokenizer(preset.model["vocab_size"])
    ids = {"pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(**preset.model, **ids, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    base = folder / "base"
    base.mkdir()
    save_random_model(config, base, preset.device)
    tokenizer.save_pretrained(base)

    meters = {}
    for name, measure, steps in (
        ("ours", partial(run_dro, MeteredTrainer), preset.steps),
        ("unshared", partial(run_dro, UnsharedTrainer), preset.peer_steps),
        ("trl", run_trl, preset.peer_steps),
    ):
        console.print(f"measuring {name} …")
        if preset.warm_up:
            measure(replace(preset, num_documents=preset.num_selected, words=8, steps=1), base, folder, tokenizer)
        meters[name] = measure(replace(preset, steps=steps), base, folder, tokenizer)
    seconds = {
        name: {phase: statistics.median(m.seconds[phase]) for phase in ("E", "M", "step")}
        for name, m in meters.items()
    }
    tokens = {
        name: {phase: statistics.median(m.tokens[phase]) for phase in ("E", "M", "step")} for name, m in meters.items()
    }
    peak_bytes = {name: meter.peak_bytes for name, meter in meters.items()}
    for name in ("ours", "unshared"):
        seconds[name]["selector"] = statistics.median(meters[name].seconds["selector"])
    speedup = {name: seconds[name]["step"] / seconds["ours"]["step"] for name in ("unshared", "trl")}
    speedup["selector_unshared"] = seconds["unshared"]["selector"] / seconds["ours"]["selector"]
    console.print(
        table(
            f"One step: {preset.num_documents} documents of {preset.words} words, K={preset.num_selected}, "
            f"m={preset.num_permutations}, 1 question",
            ["", "E-step s", "M-step s", "step s", "E tokens", "M tokens", "peak MiB", "step vs ours"],
            [
                [
                    name,
                    *(f"{seconds[name][phase]:.3f}" for phase in ("E", "M", "step")),
                    *(f"{tokens[name][phase]:,.0f}" for phase in ("E", "M")),
                    f"{peak_bytes[name] / 2**20:,.0f}",
                    f"{seconds[name]['step'] / seconds['ours']['step']:.2f}x",
                ]
                for name in meters
            ],
        )
    )
    console.print(
        f"selector's part: ours {seconds['ours']['selector']:.3f} s, "
        f"unshared {seconds['unshared']['selector']:.3f} s, {speedup['selector_unshared']:.2f}x"
    )
    console.print("measuring growth …")
    scaling = measure_scaling(preset, base, folder, tokenizer)
    console.print(
        table(
            "How our step grows",
            ["m", "n", "words", "selector s", "generator s", "both s"],
            [
                [
                    *(str(row[name]) for name in ("m", "n", "words")),
                    *(f"{row[name]:.3f}" for name in ("selector_seconds", "generator_seconds", "seconds")),
                ]
                for row in scaling
            ],
        )
    )
    sampling = measure_sampling(preset, base, folder, tokenizer)
    console.print(
        f"selector's E-step: {sampling['independent']:.3f} s for {preset.num_permutations} independent permutations, "
        f"{sampling['distinct']:.3f} s for distinct ones, {sampling['distinct'] / sampling['independent']:.2f}x"
    )
    result = {
        "sampling_seconds": sampling,
        "speedup": speedup,
        "seconds": seconds,
        "tokens": tokens,
        "peak_bytes": peak_bytes,
        "scaling": scaling,
    }
    if preset.device == "cuda":
        result["utilisation"] = utilisation(preset, base, folder, tokenizer)
        console.print(
            f"matrix ceiling {result['utilisation']['ceiling_tflops']:.0f} TFLOP/s; "
            f"prefill {result['utilisation']['prefill']:.0%}, selector's M-step "
            f"{result['utilisation']['M']:.0%} of it; "
            f"{1 / seconds['ours']['step']:.2f} questions/s"
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="cpu-small")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--folder", help="where a temporary folder is made; the system's place for them if not set")
    arguments = parser.parse_args()
    preset = PRESETS[arguments.preset]
    if preset.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--preset {arguments.preset} needs a CUDA GPU and this machine has none: try --preset cpu-small")
    os.environ["HF_HUB_OFFLINE"] = "1"
    if preset.device == "cpu":
        torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        result = run(preset, Path(folder))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written to {arguments.json}")


if __name__ == "__main__":
    main()
