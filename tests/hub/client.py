# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""What the tests do with a Hub, in a process of its own: its address is read when huggingface_hub is imported."""

import json
import os
import sys
import urllib.request
from pathlib import Path
from unittest.mock import patch

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.test_faults import TOKENIZER, make_trainer
from tests.tiny_models import tiny_llama
from tests.trainer.test_dro_trainer import make_dataset
from trl_dro import LoadOptions, RAGPipeline
from trl_dro.commands.cli import run
from trl_dro.demo import world
from trl_dro.demo.tiny import TINY_MODEL


RECORDS = make_dataset(4).to_list()
SETTINGS = {"max_answer_length": 6, "hub_model_id": "me/tiny-dro", "max_steps": 2}


def ask(pipe):
    outputs = pipe([r["question"] for r in RECORDS], documents=[r["documents"] for r in RECORDS])
    return [[output.answer, [document.position for document in output.documents]] for output in outputs]


def push(folder):
    """Trains and pushes at every step, trains on and pushes again; a private repo too."""
    trainer = make_trainer(
        folder,
        eval_dataset=make_dataset(4),
        push_to_hub=True,
        save_strategy="steps",
        save_steps=1,
        hub_always_push=True,
        hub_token="hf_loopback",
        **SETTINGS,
    )
    trainer.train()
    trainer.evaluate()
    first = trainer.push_to_hub(dataset_name="me/nq-top20")
    answers = ask(RAGPipeline.from_pretrained(folder, options=LoadOptions(device="cpu")))
    for _, parameter in trainer.roles.named_parameters("generator"):
        parameter.data.add_(0.3 * torch.randn(parameter.shape))
    trainer.push_to_hub(commit_message="Again")
    again = ask(RAGPipeline.from_pretrained(folder, options=LoadOptions(device="cpu")))
    for name in ("secret", "cut-twice", "cut-always"):
        trainer.hub_model_id, trainer.args.hub_model_id = None, f"me/{name}-dro"
        trainer.push_to_hub(private=name == "secret")
    return {"first": answers, "again": again, "revision": first.oid, "folder": str(folder)}


def push_from_folder(folder):
    """Pushes a run trained on a model in a folder of this machine, in whose folder other things lie."""
    folder = Path(folder)
    tiny_llama(TOKENIZER).save_pretrained(folder / "model")
    TOKENIZER.save_pretrained(folder / "model")
    output = folder / "run"
    (output / "report").mkdir(parents=True)
    for stray in (".env", "notes.txt", "questions.jsonl", "report/index.html", "selector/secrets.txt"):
        (output / stray).parent.mkdir(exist_ok=True)
        (output / stray).write_text("OPENAI_API_KEY=sk-secret")
    settings = SETTINGS | {"hub_model_id": "me/local-dro", "hub_strategy": "checkpoint", "save_strategy": "steps"}
    trainer = make_trainer(
        output, model=str(folder / "model"), push_to_hub=True, save_steps=1, hub_token="hf_loopback", **settings
    )
    trainer.train()
    trainer.save_model()
    trainer.push_to_hub()
    return {"stray": (output / ".env").is_file()}


def warm_up_and_push(folder):
    """Warms up both roles and pushes them."""
    folder = Path(folder)
    world.synthetic_world(8, 1, num_documents=4)[0].save_to_disk(folder / "data")
    flags = f"--dataset_name {folder}/data --num_selected 2 --max_candidates 4 --output_dir {folder}/sft --max_steps 1"
    flags += " --use_cpu --bf16 false --report_to none --push_to_hub --hub_model_id me/tiny-sft"
    run(["warmup", *flags.split(), "--hub_token", "hf_loopback", "--save_steps", "1"])
    pipe = RAGPipeline.from_pretrained("me/tiny-sft", base_model=str(TINY_MODEL), options=LoadOptions(device="cpu"))
    return {"num_selected": pipe.config.num_selected}


def push_everything(folder):
    """All that is pushed, in one process: most of its time is its imports."""
    folder = Path(folder)
    return {
        "run": push(folder / "run"),
        "from a folder": push_from_folder(folder / "local"),
        "warm-up": warm_up_and_push(folder / "warm"),
    }


def cut(number):
    urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/loopback/cuts/{number}", data=b"").close()


def download(revision):
    """Loads from the Hub in every way, and in ways that cannot work."""
    options = LoadOptions(device="cpu", token=False)
    results = {}
    for name, arguments in {
        "missing": {"path": "me/nothing"},
        "no token": {"path": "me/secret-dro"},
        "no revision": {"path": "me/tiny-dro", "revision": "v9"},
    }.items():
        try:
            RAGPipeline.from_pretrained(**arguments, options=options)
        except ValueError as error:
            results[name] = str(error)
    pipe = RAGPipeline.from_pretrained("me/tiny-dro", options=options)
    results["main"] = ask(pipe)
    results["pinned"] = ask(RAGPipeline.from_pretrained("me/tiny-dro", revision=revision, options=options))
    signed_in = LoadOptions(device="cpu", token="hf_loopback")
    results["private"] = ask(RAGPipeline.from_pretrained("me/secret-dro", options=signed_in))
    for role in ("selector", "generator"):
        base = AutoModelForCausalLM.from_pretrained("me/tiny-dro", subfolder="base")
        plain = PeftModel.from_pretrained(base, "me/tiny-dro", subfolder=role).eval()
        prompt = torch.tensor([pipe.rag.prompts[role]("who?", RECORDS[0]["documents"][:2])])
        with torch.no_grad():
            difference = plain(prompt).logits - pipe.rag.roles.forward(role, input_ids=prompt).logits
        results[f"plain {role}"] = difference.abs().max().item()
    with patch("time.sleep"):  # what is waited before every other try
        cut(2)
        results["cut twice"] = ask(RAGPipeline.from_pretrained("me/cut-twice-dro", options=options))
        cut(10**6)
        try:
            RAGPipeline.from_pretrained("me/cut-always-dro", options=options)
        except ValueError as error:
            results["cut always"] = str(error)
    cut(0)
    results["cut no more"] = ask(RAGPipeline.from_pretrained("me/cut-always-dro", options=options))
    return results


if __name__ == "__main__":
    result = globals()[sys.argv[1]](*sys.argv[2:])
    print("RESULT" + json.dumps(result))
