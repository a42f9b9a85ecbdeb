# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
Trains both roles on one 4-bit base (NF4, double quantisation, bfloat16) and prints the losses, whether the base stayed
byte-identical, the peak memory and the seconds. The weights are random, so nothing is downloaded: memory and seconds
depend on shapes alone.

```bash
.venv/bin/python benchmarks/qlora.py --preset cpu-tiny
.venv/bin/python benchmarks/qlora.py --preset gpu-llama8b  # a CUDA GPU, and 17 GB of disk under --folder
```
"""

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from trl_dro import DROConfig, DROTrainer
from trl_dro.model.roles import ROLES


WORDS = [f"word{i}" for i in range(500)]
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>"]
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)


@dataclass
class Preset:
    """
    One benchmark.

    Args:
        model (`dict`):
            Arguments of [`~transformers.LlamaConfig`].
        settings (`dict`):
            Arguments of [`DROConfig`].
        num_questions (`int`):
            Size of the training set.
        document_words (`int`):
            Words of a document. As in English, there are about 1.3 tokens per word.
        lora_rank (`int`):
            Rank of both adapters.
        device (`str`):
            `"cpu"` or `"cuda"`.
        aim (`float`, *optional*):
            Peak memory to stay under, in GiB.
    """

    model: dict[str, Any]
    settings: dict[str, Any]
    num_questions: int
    document_words: int
    lora_rank: int
    device: str
    aim: float | None = None


PRESETS = {
    "cpu-tiny": Preset(
        model={
            "vocab_size": 1024,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "initializer_range": 0.2,
        },
        settings={
            "max_candidates": 4,
            "num_selected": 2,
            "num_permutations": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "max_steps": 30,
            "use_cpu": True,
        },
        num_questions=8,
        document_words=10,
        lora_rank=4,
        device="cpu",
    ),
    # The shape of Llama 3 8B.
    "gpu-llama8b": Preset(
        model={
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "initializer_range": 0.02,
        },
        settings={
            "max_candidates": 20,
            "num_selected": 5,
            "num_permutations": 8,
            "per_device_train_batch_size": 1,
            "learning_rate": 1e-4,
            "max_steps": 5,
            "max_answer_length": 32,
        },
        num_questions=16,
        document_words=100,
        lora_rank=16,
        device="cuda",
        aim=22.0,
    ),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, number or sign."""
    written = "Question Passages Answer who wrote Anna the question with passages above : ? . , > [ ] ' - ( )".split()
    vocabulary = [*SPECIAL_TOKENS, "\n", *map(str, range(130)), *written, *WORDS]
    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(dict.fromkeys(vocabulary))}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]|\n"), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def make_questions(preset: Preset) -> Dataset:
    """Questions whose answer stands in one of the documents, among random words."""
    draw = random.Random(0)
    num_documents = preset.settings["max_candidates"]

    def document(identity: str, fact: str) -> dict[str, str]:
        words = draw.choices(WORDS, k=preset.document_words - len(fact.split()))
        # A hyphenated word is three tokens: with 15 of them among 100 words there are 130.
        for i in draw.sample(range(len(words)), round(0.15 * preset.document_words)):
            words[i] += f"-{draw.choice(WORDS)}"
        return {"id": identity, "text": " ".join([fact, *words])}

    rows = []
    for i in range(preset.num_questions):
        positive = draw.randrange(num_documents)
        documents = [
            document(f"{i}-{j}", f"Anna wrote {i}" if j == positive else f"who wrote {j}")
            for j in range(num_documents)
        ]
        rows.append({"question": f"who wrote {i}?", "answers": [f"Anna {i}"], "documents": documents})
    return Dataset.from_list(rows)


def save_random_model(config: LlamaConfig, folder: Path, device: str) -> int:
    """
    Writes random bfloat16 weights layer by layer, so that no more than one layer is in memory; returns their bytes.

    Args:
        config ([`~transformers.LlamaConfig`]):
            Shapes.
        folder (`Path`):
            Where to write.
        device (`str`):
            Where the random numbers are drawn.
    """
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    draw = torch.Generator(device).manual_seed(0)
    # "model.layers.3.mlp.up_proj.weight" goes with its layer, anything else is a shard of its own.
    shards = groupby(shapes, key=lambda name: name.split(".")[2] if ".layers." in name else name)
    weight_map, total = {}, 0
    for number, (_, names) in enumerate(shards):
        shard = {}
        for name in names:
            weight = torch.ones(shapes[name], dtype=torch.bfloat16, device=device)
            if weight.dim() > 1:  # those of norms stay one
                weight.normal_(std=config.initializer_range, generator=draw)
            shard[name] = weight.cpu()
            weight_map[name] = f"model-{number:05d}.safetensors"
            total += weight.nbytes
        save_file(shard, folder / f"model-{number:05d}.safetensors", metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index))
    config.save_pretrained(folder)
    return total


def hash_of_base(trainer: DROTrainer) -> str:
    """Digest of all weights and quantisation constants that are not an adapter's."""
    digest = hashlib.sha256()
    for name, tensor in sorted(trainer.model.state_dict().items()):
        if not set(name.split(".")) & set(ROLES):
            digest.update(name.encode())
            digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def peak_memory(device: str) -> float:
    """GiB: of tensors on a GPU, of the whole process on the CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / 2 ** (30 if sys.platform == "darwin" else 20)


def make_trainer(preset: Preset, folder: Path, settings: dict[str, Any]) -> DROTrainer:
    """Trainer on a random base that is written to `folder`, loaded from it in 4 bits, and removed."""
    tokenizer = make_tokenizer()
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(**preset.model, **ids, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    base = folder / "base"
    base.mkdir()
    start = time.perf_counter()
    total = save_random_model(config, base, preset.device)
    tokenizer.save_pretrained(base)
    print(f"random base: {total / 2**30:.2f} GiB in bfloat16, written in {time.perf_counter() - start:.0f} s")
    start = time.perf_counter()
    args = DROConfig(
        **{
            "output_dir": str(folder / "run"),
            "selector_template": "{documents}\nQuestion: {question}\nPassages:",
            "generator_template": "{documents}\nQuestion: {question}\nAnswer:",
            "max_answer_length": 8,
            "optim": "paged_adamw_8bit",
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "model_init_kwargs": {"dtype": torch.bfloat16},
        }
        | preset.settings
        | settings
    )
    trainer = DROTrainer(
        str(base),
        args,
        make_questions(preset),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=preset.lora_rank, lora_alpha=2 * preset.lora_rank, target_modules="all-linear"
        ),
        quantization_config=NF4,
    )
    shutil.rmtree(base)
    trainer.remove_callback(PrinterCallback)
    if preset.device == "cpu":
        for module in trainer.model.modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                # On some CPUs a forward without gradients repacks the weights, and gradients are lost afterwards.
                module.support_avx512bf16_for_cpu = False
    print(f"loaded in {time.perf_counter() - start:.0f} s, peak memory {peak_memory(preset.device):.2f} GiB so far")
    return trainer


def run(preset: Preset, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Trains, prints what the module's description promises, and returns the figures."""
    trainer = make_trainer(preset, folder, settings)
    args = trainer.args
    record = trainer.train_dataset[0]
    documents = record["documents"]
    prompts = trainer.rag.prompts
    print(
        f"{len(documents)} documents of {preset.document_words} words, K={args.num_selected}, "
        f"m={args.num_permutations}, {args.per_device_train_batch_size} questions per step; prompts of "
        f"{len(prompts['selector'](record['question'], documents))} (selector) and "
        f"{len(prompts['generator'](record['question'], documents[: args.num_selected]))} (generator) tokens"
    )
    before = hash_of_base(trainer)
    if preset.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    trainer.train()
    if preset.device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = peak_memory(preset.device)  # hashing, below, is no part of it
    for logs in trainer.state.log_history:
        if "loss" in logs:
            print(
                f"update {logs['step']:3d}: loss {logs['loss']:8.3f}, selector {logs['selector/loss']:8.3f}, "
                f"generator {logs['generator/loss']:8.3f}, gradient norm {logs['grad_norm']:.3f}, "
                f"E-step {logs['e_step_seconds']:.2f} s, M-step {logs['m_step_seconds']:.2f} s"
            )
    after = hash_of_base(trainer)
    updates = trainer.state.global_step
    print(f"base before: {before}\nbase after:  {after} ({'equal' if before == after else 'DIFFERENT'})")
    print(f"seconds: {seconds:.1f} for {updates} updates, {seconds / updates:.2f} each")
    aim = "" if preset.aim is None else f" (aim: under {preset.aim:g}, {'met' if peak < preset.aim else 'MISSED'})"
    print(f"peak memory: {peak:.2f} GiB{aim}")
    if preset.device == "cuda":
        print(f"reserved by the allocator: {torch.cuda.max_memory_reserved() / 2**30:.2f} GiB")
    return {
        "updates": [logs for logs in trainer.state.log_history if "loss" in logs],
        "base_unchanged": before == after,
        "seconds_per_update": seconds / updates,
        "peak_gib": peak,
        "aim_gib": preset.aim,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="cpu-tiny")
    parser.add_argument("--updates", type=int, help="updates instead of the preset's")
    parser.add_argument("--folder", help="where a temporary folder is made; the system's place for them if not set")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    preset = PRESETS[arguments.preset]
    if preset.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--preset {arguments.preset} needs a CUDA GPU and this machine has none: try --preset cpu-tiny")
    os.environ["HF_HUB_OFFLINE"] = "1"
    if preset.device == "cpu":
        torch.set_num_threads(1)
    settings = {} if arguments.updates is None else {"max_steps": arguments.updates}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        result = run(preset, Path(folder), settings)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
