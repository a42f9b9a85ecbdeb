# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Bad inputs, one line each: what is broken, the command or call that meets it, and what its message must name."""

import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from trl_dro import DROConfig, DROTrainer, LoadOptions, RAGPipeline
from trl_dro.data import load_records, read_corpus, read_open_questions, read_questions, validate_dataset
from trl_dro.data.schema import build_dataset
from trl_dro.integrations.rewards import prompt_dataset
from trl_dro.model.codec import PermutationCodec
from trl_dro.model.prompts import PromptBuilder
from trl_dro.retrieval import BM25Retriever, retrieve_candidates
from trl_dro.system.rag_config import RAGConfig

from .world import World, edit_json, write_jsonl


class Case(NamedTuple):
    """
    A bad input.

    Args:
        area (`str`):
            What kind of input it is.
        name (`str`):
            What is wrong with it.
        make (`Callable`):
            Of the world and an empty folder: flags of a command, or a call.
        names (`tuple[str]`):
            What the message must name, any of these: the file, the setting, the column.
    """

    area: str
    name: str
    make: Callable[[World, Any], Any]
    names: tuple[str, ...]


# Values that are no text, number or list of what is asked for.
VALUES = {
    "null": None, "a number": 5, "NaN": float("nan"), "true": True, "an empty text": "", "spaces": " ",
    "an empty list": [], "a list in a list": [[]], "a list of null": [None], "a list of numbers": [5],
    "an object": {"a": 1}, "deep": [[[[[[[[{"a": [[]]}]]]]]]]],
}  # fmt: skip
TEXT_TOO = {"a lone surrogate": "\ud800"}


def broken(row, path, value):
    """A copy of a row with the value at a path, such as `("documents", 0, "text")`, replaced."""
    row = json.loads(json.dumps(row))
    place = row
    for key in path[:-1]:
        place = place[key]
    if value is MISSING:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return row


MISSING = object()


# Values of single keys in the lines of every kind of file


def lines() -> Iterator[Case]:
    """A value of a wrong kind in the second line of a file of records, questions or passages."""

    def train(value, path, world, tmp):
        rows = [world.records[0], broken(world.records[1], path, value), *world.records[2:]]
        data = write_jsonl(tmp / "broken.jsonl", rows)
        return ["train", *world.train_flags(tmp / "out"), "--dataset_name", str(data), "--dry_run", "true"]

    def predict(value, path, world, tmp):
        rows = [world.records[0], broken(world.records[1], path, value)]
        data = write_jsonl(tmp / "broken.jsonl", rows)
        return ["predict", str(world.run), *world.small, "--questions", str(data), "--output_dir", str(tmp / "out")]

    def retrieve(value, path, world, tmp):
        data = write_jsonl(tmp / "broken.jsonl", [world.questions[0], broken(world.questions[1], path, value)])
        return ["retrieve", str(data), "--corpus", str(world.corpus_file), "--output_dir", str(tmp / "out")] + [
            "--k", "4", "--cache_dir", str(tmp / "cache")]  # fmt: skip

    def corpus(value, path, world, tmp):
        data = write_jsonl(tmp / "broken.jsonl", [world.passages[0], broken(world.passages[1], path, value)])
        return ["retrieve", str(world.questions_file), "--corpus", str(data), "--output_dir", str(tmp / "out")] + [
            "--k", "2", "--cache_dir", str(tmp / "cache")]  # fmt: skip

    def warmup(value, path, world, tmp):
        data = write_jsonl(tmp / "broken.jsonl", [world.records[0], broken(world.records[1], path, value)])
        return warmup_flags(world, tmp, data)

    texts, all_values = VALUES | TEXT_TOO, VALUES | {"nothing": MISSING}
    fine = {
        ("title",): ("null", "an empty text", "spaces", "nothing"),
        ("id",): ("null", "a number", "nothing", "an empty text", "spaces"),
        ("positive_ids",): ("null", "an empty list", "nothing"),
    }
    for command, area, paths in (
        (train, "records (train)", [("question",), ("answers",), ("answers", 0), ("documents",), ("documents", 0)]
            + [("documents", 0, key) for key in ("text", "title", "id")] + [("positive_ids",), ("id",)]),
        (predict, "questions (predict)", [("question",), ("documents",), ("documents", 0), ("documents", 0, "text")]),
        (retrieve, "questions (retrieve)", [("question",), ("answers",), ("answers", 0), ("positive_ids",), ("id",)]),
        (corpus, "passages (retrieve)", [("id",), ("title",), ("text",)]),
        (warmup, "records (warmup)", [("question",), ("answers",), ("documents",)]),
    ):  # fmt: skip
        for path in paths:
            values = texts | all_values if isinstance(path[-1], str) else texts
            for name, value in values.items():
                if name in fine.get(path[-1:], ()) and not (area.startswith("passages") and path == ("id",)
                                                            and name in ("null", "nothing")):  # fmt: skip
                    continue
                what = ".".join(map(str, path))
                yield Case(area, f"{what}: {name}", partial(command, value, path), ("broken.jsonl, line 2", "row 1"))


def warmup_flags(world, tmp, data, **settings):
    """Flags of a dry warm-up."""
    flags = {
        "model_name_or_path": world.base, "dataset_name": data, "output_dir": tmp / "out", "num_selected": 2,
        "max_candidates": 4, "dry_run": "true", "report_to": "none", "use_cpu": "true",
    } | settings  # fmt: skip
    return ["warmup", *[part for name, value in flags.items() for part in (f"--{name}", str(value))]]


# Whole files


def damaged_files(good: bytes) -> dict[str, bytes]:
    """What can become of a file."""
    line = good.split(b"\n")[0]
    return {
        "empty": b"",
        "white space": b" \n\n ",
        "NUL bytes": b"\0" * 64,
        "NUL within a line": line[:12] + b"\0" + line[12:],
        "random bytes": bytes(range(256)) * 4,
        "cut short": good[: len(good) // 2 + 5],
        "UTF-16": good.decode().encode("utf-16"),
        "Latin-1": line.replace(b"B", "é".encode("latin-1")).replace(b"w", "é".encode("latin-1")),
        "a list": b"[" + line + b"]",
        "a text": b'"text"\n',
        "a number": b"7\n",
        "deep": b"[" * 100_000 + b"]" * 100_000 + b"\n",
        "a deep value": line[:-1] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
        "a number of 10,000 digits": line[:-1] + b', "x": ' + b"9" * 10_000 + b"}\n",
        "HTML": b"<!DOCTYPE html><html><body>404</body></html>",
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    }


def files() -> Iterator[Case]:
    """Every file that a command reads, damaged in every way."""

    def out(tmp):
        return ["--output_dir", str(tmp / "out")]

    def cache(tmp):
        return [*out(tmp), "--cache_dir", str(tmp / "cache"), "--k", "2"]

    readers: dict[str, tuple[str, Callable]] = {
        "records.jsonl (train)": ("records_file", lambda w, t, f: [
            "train", *w.train_flags(t / "out"), "--dataset_name", str(f), "--dry_run", "true"]),
        "questions.jsonl (retrieve)": ("questions_file", lambda w, t, f: [
            "retrieve", str(f), "--corpus", str(w.corpus_file), *cache(t)]),
        "corpus.jsonl (retrieve)": ("corpus_file", lambda w, t, f: [
            "retrieve", str(w.questions_file), "--corpus", str(f), *cache(t)]),
        "questions.jsonl (predict)": ("records_file", lambda w, t, f: [
            "predict", str(w.run), *w.small, "--questions", str(f), *out(t)]),
        "rankings (warmup)": ("records_file", lambda w, t, f: warmup_flags(w, t, w.records_file, teacher=f)),
    }  # fmt: skip

    def make(reader, attribute, name, world, tmp):
        path = tmp / "broken.jsonl"
        path.write_bytes(damaged_files(getattr(world, attribute).read_bytes())[name])
        return reader(world, tmp, path)

    def missing(reader, kind, world, tmp):
        path = tmp / "broken.jsonl"
        if kind == "a folder":
            path.mkdir()
        return reader(world, tmp, path)

    def bad_gzip(reader, attribute, kind, world, tmp):
        path = tmp / "broken.jsonl.gz"
        data = gzip.compress(getattr(world, attribute).read_bytes())
        path.write_bytes({"cut": data[:-20], "no gzip": b"{}\n", "bad": data[:30] + b"xxxx" + data[34:]}[kind])
        return reader(world, tmp, path)

    for area, (attribute, reader) in readers.items():
        for name in damaged_files(b"{}\n"):
            if name == "a deep value" and area.startswith("rankings"):
                continue
            yield Case(area, name, partial(make, reader, attribute, name), ("broken.jsonl",))
        for kind in ("missing", "a folder"):
            yield Case(area, kind, partial(missing, reader, kind), ("broken.jsonl",))
        if not area.startswith("records"):
            for kind in ("cut", "no gzip", "bad"):
                yield Case(area, f"gzip: {kind}", partial(bad_gzip, reader, attribute, kind), ("broken.jsonl.gz",))

    def parquet(data, world, tmp):
        path = tmp / "broken.parquet"
        path.write_bytes(data)
        return ["train", *world.train_flags(tmp / "out"), "--dataset_name", str(path), "--dry_run", "true"]

    for name, data in {"empty": b"", "no parquet": b"PAR1xxPAR1", "text": b"{}\n"}.items():
        yield Case("records.parquet (train)", name, partial(parquet, data), ("broken.parquet",))

    def saved(change, world, tmp):
        folder = world.copy(tmp, world.records_folder)
        change(folder)
        return ["train", *world.train_flags(tmp / "out"), "--dataset_name", str(folder), "--dry_run", "true"]

    changes = {
        "state.json missing": lambda f: (f / "state.json").unlink(),
        "state.json damaged": lambda f: (f / "state.json").write_text("{"),
        "dataset_info.json damaged": lambda f: (f / "dataset_info.json").write_text("[1"),
        "arrow cut": lambda f: os.truncate(next(f.glob("*.arrow")), 100),
        "arrow missing": lambda f: next(f.glob("*.arrow")).unlink(),
        "arrow empty": lambda f: os.truncate(next(f.glob("*.arrow")), 0),
    }
    for name, change in changes.items():
        yield Case("saved dataset (train)", name, partial(saved, change), ("/records",))


# Settings, on the command line and in YAML


def settings() -> Iterator[Case]:
    """Settings of wrong types, unknown, beyond their range or at odds with each other."""

    def flags(command, pairs, world, tmp):
        base = {
            "train": ["train", *world.train_flags(tmp / "out"), "--dataset_name", str(world.records_file)],
            "warmup": warmup_flags(world, tmp, world.records_file),
            "predict": ["predict", str(world.run), *world.small, "--questions", str(world.records_file)]
            + ["--output_dir", str(tmp / "out")],
            "evaluate": ["evaluate", str(world.run), *world.small, "--dataset_name", str(world.records_file)]
            + ["--output_dir", str(tmp / "out")],
            "retrieve": ["retrieve", str(world.questions_file), "--corpus", str(world.corpus_file)]
            + ["--output_dir", str(tmp / "out"), "--cache_dir", str(tmp / "cache"), "--k", "4"],
            "serve": ["serve", str(world.run), *world.small],
            "report": ["report", str(world.run), "--output_dir", str(tmp / "report")],
            "env": ["env"],
        }[command]
        return [*base, *(str(part).replace("TMP", str(tmp)) for part in pairs)]

    bad = {
        "train": [
            "--num_selected 0", "--num_selected -1", "--num_selected 9", "--num_selected two", "--num_selected 2.5",
            "--max_candidates 1", "--max_candidates 0", "--num_permutations 0", "--num_permutations x",
            "--temperature 0", "--temperature -1", "--temperature nan", "--top_p 0", "--top_p 2", "--top_p nan",
            "--weight_temperature 0", "--weight_temperature nan", "--answer_likelihood x", "--answer_target x",
            "--selector_estimator x", "--selector_likelihood x", "--steps_per_estimation 0",
            "--maximization_epochs 0", "--max_answer_length 0", "--max_answer_length 100000", "--max_answer_length 1",
            "--max_document_length -5", "--max_document_length 0", "--max_prompt_length 5", "--max_prompt_length -1",
            "--selector_learning_rate nan", "--generator_learning_rate -1", "--learning_rate nan",
            "--learning_rate inf", "--learning_rate -1", "--likelihood_floor nan", "--negligible_weight 2",
            "--negligible_weight nan", "--max_tokens_per_forward 0", "--retriever_prior nan", "--retriever_prior -1",
            "--selector_fit_questions -1", "--selector_fit_questions 5",
            "--max_grad_norm nan", "--weight_decay nan", "--per_device_train_batch_size 0", "--lora_r 0",
            "--lora_r -4", "--lora_alpha nan", "--lora_dropout 2", "--lora_target_modules no_such_proj",
            "--max_steps x", "--seed x", "--bf16 maybe", "--no_such_setting 1", "--numselected 2",
            "--selector_template x", "--generator_template {question}", "--selector_template {oops}{documents}",
            "--chat_template_kwargs x", "--chat_template_kwargs [1]", "--chat_template_kwargs {", "stray",
            "--model_name_or_path TMP/missing", "--model_name_or_path ./missing", "--model_name_or_path TMP",
            "--dataset_name TMP/missing.jsonl", "--dataset_name TMP", "--dataset_name no/such-dataset",
            "--corpus x", "--questions x", "--eval_questions TMP/missing", "--selector_adapter x",
            "--selector_adapter TMP/a --generator_adapter TMP/b", "--resume_from_checkpoint TMP/missing",
            "--resume_from_checkpoint TMP", "--dtype float7", "--attn_implementation nothing", "--num_processes 0",
            "--num_processes -1", "--num_processes x", "--accelerate_config TMP/missing.yaml",
            "--lr_scheduler_type x", "--optim x", "--output_dir /dev/null", "--output_dir /proc/x/y",
            "--train_selector false --train_generator false", "--max_eval_questions 0",
            "--label_smoothing_factor 0.1", "--config", "--config TMP/missing.yaml", "--config TMP",
            "--load_in_4bit true --load_in_8bit true", "--model_revision nowhere",
            "--gradient_accumulation_steps 0", "--logging_steps 0", "--save_steps 0", "--warmup_steps -1",
            "--dataset_test_split test", "--metric_for_best_model nothing --load_best_model_at_end true",
            "--report_to nothing", "--fsdp x", "--deepspeed TMP/missing.json",
        ],
        "warmup": [
            "--rank_noise nan", "--rank_noise -1", "--num_selected 0", "--num_selected 9", "--max_candidates 0",
            "--max_document_length -5", "--max_document_length 0", "--teacher TMP/missing", "--teacher nobody",
            "--selector_template x", "--generator_template {}", "--dataset_train_split nothing --dataset_name TMP",
            "--model_name_or_path TMP/missing", "--learning_rate nan", "--max_length 5", "--packing true",
        ],
        "predict": [
            "--max_questions 0", "--max_questions x", "--max_candidates 0", "--max_candidates 1",
            "--tokens_per_batch 0", "--tokens_per_batch -1", "--dtype float7", "--device nowhere", "--device cuda:99",
            "--selector TMP/missing", "--base_model TMP/missing", "--base_model no/such-model",
            "--attn_implementation nothing", "--corpus TMP/missing", "--dataset_name x", "--revision nowhere",
            "--output_dir /dev/null", "--output_dir /proc/x/y", "--questions TMP/missing", "--questions TMP",
            "--on_error x",
        ],
        "evaluate": [
            "--max_questions 0", "--num_selected 0", "--num_selected 9", "--max_candidates -1",
            "--max_answer_length 0", "--max_answer_length 100000", "--tokens_per_batch 0", "--baseline TMP/missing",
            "--baseline TMP", "--generator TMP/missing", "--selector TMP/missing", "--ranking_measures nDCG@5",
            "--ranking_measures nothing", "--context_reliance maybe", "--dataset_split nothing", "--questions x",
            "--output_dir /dev/null", "--device nowhere", "--revision x --generator x",
        ],
        "retrieve": [
            "--retriever nothing", "--k1 -1", "--k1 nan", "--b 5", "--b nan", "--k 0", "--k -1", "--k x",
            "--retriever bm25+nothing", "--output_dir /dev/null", "--output_dir /proc/x/y", "--cache_dir /dev/null",
            "--retriever precomputed", "--corpus TMP", "--corpus TMP/missing.tsv",
            "--questions TMP", "--questions no/such", "--shard_size 0", "--max_questions 0",
        ],
        "serve": [
            "--port 99999999", "--port -1", "--port x", "--host nowhere.invalid", "--timeout nan", "--timeout 0",
            "--timeout -1", "--max_waiting -1", "--max_body_bytes 0", "--body_timeout 0", "--corpus TMP/missing",
            "--corpus TMP", "--selector TMP/missing", "--device nowhere",
        ],
        "report": ["--evaluation TMP", "--evaluation TMP/missing", "--output_dir /dev/null", "--run TMP",
            "--run TMP/missing"],
        "env": ["--x 1", "x"],
    }  # fmt: skip
    for command, each in bad.items():
        for text in each:
            pairs = text.split(" ")
            names = (pairs[0].lstrip("-"), *(pair for pair in pairs[1:] if len(pair) > 2 and "TMP" not in pair))
            names += ("TMP",) if "TMP" in text else ()
            names += ("8 bit and 4 bit",) if "load_in_8bit" in text else ()
            yield Case(f"settings ({command})", text, partial(flags, command, pairs), names)
    for name, arguments in {
        "no such command": ["trian"], "no model": ["predict"], "no questions": ["retrieve"], "no run": ["report"],
        "nothing to evaluate": ["evaluate"], "nothing to serve": ["serve"], "no data": ["warmup"],
    }.items():  # fmt: skip
        yield Case("settings", name, lambda w, t, a=arguments: a, ("trl-dro",))


def yaml_values() -> Iterator[Case]:
    """Values of a wrong type in a YAML file, and files that are none."""

    def make(text, world, tmp):
        path = tmp / "settings.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        name = text.decode("latin-1") if isinstance(text, bytes) else text
        flags = world.train_flags(tmp / "out", **{name.partition(":")[0]: None})
        return ["train", *flags, "--dataset_name", str(world.records_file), "--config", str(path)]

    values = ["[1, 2]", "{a: 1}", "text", "null", "1.5", "true", ".nan", "2020-01-01", "''", "[[1]]"]
    fine = {("report_to", "null"), ("report_to", "text"), ("lora_alpha", "1.5")}
    for setting in ("num_selected", "max_answer_length", "lora_alpha", "max_steps", "use_peft"):
        for value in values:
            if (setting, value) not in fine and not (setting == "use_peft" and value in ("true", "null")):
                yield Case("YAML values", f"{setting}: {value}", partial(make, f"{setting}: {value}\n"), (setting,))
    for setting in ("temperature", "learning_rate"):
        for value in ("[1, 2]", "{a: 1}", "text", ".nan", ".inf", "-1", "true", "''"):
            yield Case("YAML values", f"{setting}: {value}", partial(make, f"{setting}: {value}\n"), (setting,))
    for setting in ("model_name_or_path", "output_dir", "selector_template", "answer_target", "optim",
                    "lr_scheduler_type", "dataset_train_split", "chat_template_kwargs",
                    "lora_target_modules"):  # fmt: skip
        for value in ("[1, 2]", "{a: 1}", "5", "true", "2020-01-01"):
            if (setting, value) in (("chat_template_kwargs", "{a: 1}"), ("output_dir", "true"), ("output_dir", "5")):
                continue
            yield Case(
                "YAML values",
                f"{setting}: {value}",
                partial(make, f"{setting}: {value}\n"),
                (setting, "tokenizer of 5", "is called '5'"),
            )
    for name, text in {
        "not YAML": b"a: [1\n", "a list": b"- 1\n", "a text": b"hello\n", "empty": b"", "NUL": b"a\0: 1\n",
        "random bytes": bytes(range(128, 256)), "a tab": b"\ta: 1\n", "an unknown setting": b"num_selectd: 2\n",
        "a number as a name": b"5: 2\n", "an anchor bomb": b"a: &a [x]\nb: [*a, *b]\n",
        "an object": b"!!python/object:os.x {}\n",
        "twice": b"max_steps: 1\nmax_steps: x\n", "env: a text": b"env: x\n", "no list of lists": b"? [a]\n: 1\n",
    }.items():  # fmt: skip
        if name == "empty":
            continue
        yield Case("YAML files", name, partial(make, text), ("settings.yaml", "num_selectd", "max_steps", "env"))


# The folders of a trained system


def systems() -> Iterator[Case]:
    """A run folder of which one file is broken, asked by `predict`."""

    def make(change, world, tmp):
        folder = world.copy(tmp)
        change(folder)
        return ["predict", str(folder), *world.small, "--questions", str(world.records_file)] + [
            "--output_dir", str(tmp / "out")]  # fmt: skip

    def case(area, name, change, *names):
        return Case(area, name, partial(make, change), names)

    config_values = {"null": None, "a text": "x", "0": 0, "-1": -1, "1.5": 1.5, "NaN": float("nan"), "true": True,
        "a list": [], "an object": {}}  # fmt: skip
    fine = {
        "max_prompt_length": ("null",), "max_document_length": ("null",),
        "chat_template_kwargs": ("null", "an object"), "retriever_prior": ("0", "1.5"),
    }  # fmt: skip
    for field in ("num_selected", "max_candidates", "max_answer_length", "max_prompt_length", "max_document_length",
                  "selector_template", "generator_template", "chat_template_kwargs", "retriever_prior"):  # fmt: skip
        for name, value in config_values.items():
            if name in fine.get(field, ()):
                continue
            change = partial(_set, "rag_config.json", field, value)
            yield case("rag_config.json", f"{field}: {name}", change, f"{field}")
    for name, data in damaged_files(b'{"num_selected": 2,\n "max_candidates": 4}').items():
        change = partial(_write, "rag_config.json", data)
        yield case("rag_config.json", name, change, "rag_config.json")
    yield case("rag_config.json", "an unknown field", partial(_set, "rag_config.json", "x", 1), "rag_config.json")
    yield case(
        "rag_config.json",
        "a field missing",
        partial(_drop, "rag_config.json", "selector_template"),
        "selector_template",
    )

    adapter = "selector/adapter_config.json"
    for name, data in damaged_files(b'{"r": 2,\n "peft_type": "LORA"}').items():
        yield case("adapter_config.json", name, partial(_write, adapter, data), "adapter_config.json", "selector")
    for name, (field, value) in {
        "rank of another": ("r", 4), "rank 0": ("r", 0), "rank -1": ("r", -1), "rank a text": ("r", "x"),
        "rank null": ("r", None), "targets of another": ("target_modules", ["k_proj"]),
        "targets not there": ("target_modules", ["nothing"]), "targets null": ("target_modules", None),
        "targets a number": ("target_modules", 5), "an unknown kind": ("peft_type", "NOTHING"),
        "no kind": ("peft_type", None), "another kind": ("peft_type", "PREFIX_TUNING"),
        "another task": ("task_type", "SEQ_CLS"),
        "base a number": ("base_model_name_or_path", 5), "base null": ("base_model_name_or_path", None),
        "base a list": ("base_model_name_or_path", []), "base missing": ("base_model_name_or_path", "/no/such"),
        "base not on the Hub": ("base_model_name_or_path", "no/such-model"),
        "base empty": ("base_model_name_or_path", ""), "alpha a text": ("lora_alpha", "x"),
        "alpha NaN": ("lora_alpha", float("nan")), "alpha null": ("lora_alpha", None),
        "dropout 2": ("lora_dropout", 2.0), "layers not there": ("layers_to_transform", [99]),
        "rank pattern": ("rank_pattern", {"q_proj": 8}), "revision a number": ("revision", 5),
    }.items():  # fmt: skip
        yield case("adapter_config.json", name, partial(_set, adapter, field, value), "adapter_config.json",
            "selector", "no/such", "adapter")  # fmt: skip
    weights = {
        "empty": lambda p: p.write_bytes(b""), "cut": lambda p: os.truncate(p, p.stat().st_size // 2),
        "NUL bytes": lambda p: p.write_bytes(b"\0" * 500), "text": lambda p: p.write_text("version https://git-lfs"),
        "header too long": lambda p: p.write_bytes(b"\xff" * 8 + b"{}"), "missing": lambda p: p.unlink(),
        "a tensor missing": partial(_tensors, lambda t: dict(list(t.items())[1:])),
        "a tensor too many": partial(_tensors, lambda t: t | {"x": torch.zeros(1)}),
        "another shape": partial(_tensors, lambda t: {n: torch.zeros(w.shape[0] + 1, w.shape[1]) if w.ndim == 2
                                                      else w for n, w in t.items()}),
        "NaN": partial(_tensors, lambda t: {n: w * float("nan") for n, w in t.items()}),
        "no tensors": partial(_tensors, lambda t: {}),
        "other names": partial(_tensors, lambda t: {f"y.{n}": w for n, w in t.items()}),
    }  # fmt: skip
    for role in ("selector", "generator"):
        for name, change in weights.items():
            yield case("adapter weights", f"{role}: {name}",
                lambda f, c=change, r=role: c(f / r / "adapter_model.safetensors"), role, "adapter_model")  # fmt: skip

    def with_base(change, world, tmp):
        base = world.copy(tmp, world.base)
        change(base)
        return ["predict", str(world.run), *world.small, "--questions", str(world.records_file)] + [
            "--output_dir", str(tmp / "out"), "--base_model", str(base)]  # fmt: skip

    for name, change in weights.items():
        if name == "a tensor too many":
            continue
        yield Case("base weights", name, partial(with_base, lambda f, c=change: c(f / "model.safetensors")), ("tiny",))
    for name, data in damaged_files(b'{"model_type": "llama",\n "x": 1}').items():
        yield Case("base config.json", name, partial(with_base, partial(_write, "config.json", data)), ("tiny",))
    for name, (field, value) in {
        "an unknown type": ("model_type", "nothing"), "no type": ("model_type", None),
        "hidden size": ("hidden_size", 64), "a text as a size": ("hidden_size", "x"),
        "another vocabulary": ("vocab_size", 7), "layers": ("num_hidden_layers", 3),
        "heads": ("num_attention_heads", 0), "an encoder-decoder": ("model_type", "t5"),
    }.items():  # fmt: skip
        yield Case("base config.json", name, partial(with_base, partial(_set, "config.json", field, value)), ("tiny",))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        for name, data in damaged_files(b"{}").items():
            if file == "tokenizer.json" or name in ("a list", "NUL bytes", "deep", "cut short", "random bytes"):
                change = partial(_all_tokenizers, file, data)
                yield Case("tokenizer", f"{file}: {name}", partial(make, change), ("tokenizer", "run"))
    yield case(
        "tokenizer", "missing", lambda f: [p.unlink() for p in f.rglob("tokenizer*")] and None, "tokenizer", "run"
    )
    yield case("roles", "swapped", _swap, "selector", "generator")
    for role in ("selector", "generator"):
        yield case("roles", f"{role} missing", lambda f, r=role: shutil.rmtree(f / r), role)
        yield case("roles", f"{role} a file", lambda f, r=role: (shutil.rmtree(f / r), (f / r).write_text("x")), role)
        yield case("roles", f"{role} empty", lambda f, r=role: (shutil.rmtree(f / r), (f / r).mkdir()), role)
    yield case("roles", "nothing there", lambda f: (shutil.rmtree(f), f.mkdir()), "run")
    yield case("roles", "base empty", lambda f: (f / "base").mkdir(), "base")

    def warm(kind, world, tmp):
        folder = world.copy(tmp)
        selector, generator = folder / "selector", folder / "generator"
        if kind == "another rank":
            edit_json(selector / "adapter_config.json", lambda c: c.update(r=4))
        elif kind == "cut":
            os.truncate(generator / "adapter_model.safetensors", 200)
        elif kind == "another base":
            edit_json(selector / "adapter_config.json", lambda c: c.update(base_model_name_or_path="other/base"))
        elif kind == "NaN":
            _tensors(lambda t: {n: w * float("nan") for n, w in t.items()}, selector / "adapter_model.safetensors")
        elif kind == "a model":
            selector = world.base
        elif kind == "swapped":
            selector, generator = generator, selector
        elif kind == "not JSON":
            (selector / "adapter_config.json").write_text("{")
        flags = world.train_flags(tmp / "out", lora_r=None, lora_target_modules=None, use_peft=None)
        return ["train", *flags, "--dataset_name", str(world.records_file), "--selector_adapter", str(selector),
            "--generator_adapter", str(generator)]  # fmt: skip

    for kind in ("another rank", "cut", "another base", "NaN", "a model", "swapped", "not JSON"):
        yield Case("adapters to start from", kind, partial(warm, kind), ("selector", "generator", "adapter"))


def _set(file, field, value, folder):
    edit_json(folder / file, lambda config: config.update({field: value}))


def _drop(file, field, folder):
    edit_json(folder / file, lambda config: config.pop(field) and None)


def _write(file, data, folder):
    (folder / file).write_bytes(data)


def _tensors(change, path):
    save_file(change(load_file(path)), path)


def _all_tokenizers(file, data, folder):
    for path in folder.rglob(file):
        path.write_bytes(data)


def _swap(folder):
    (folder / "selector").rename(folder / "x")
    (folder / "generator").rename(folder / "selector")
    (folder / "x").rename(folder / "generator")


# What runs leave


def leftovers() -> Iterator[Case]:
    """Results and checkpoints of an earlier call, damaged."""

    def resume(change, world, tmp):
        folder = world.copy(tmp)
        change(folder / "checkpoint-1")
        return ["train", *world.train_flags(folder, max_steps=2), "--dataset_name", str(world.records_file),
            "--resume_from_checkpoint", str(folder / "checkpoint-1")]  # fmt: skip

    for name, change in {
        "trainer_state.json cut": lambda f: os.truncate(f / "trainer_state.json", 50),
        "trainer_state.json a list": lambda f: (f / "trainer_state.json").write_text("[]"),
        "optimizer cut": lambda f: os.truncate(f / "optimizer.pt", 100),
        "optimizer missing": lambda f: (f / "optimizer.pt").unlink(),
        "scheduler cut": lambda f: os.truncate(f / "scheduler.pt", 10),
        "selector missing": lambda f: shutil.rmtree(f / "selector"),
        "adapter cut": lambda f: os.truncate(f / "generator" / "adapter_model.safetensors", 300),
        "empty": lambda f: (shutil.rmtree(f), f.mkdir()),
    }.items():
        yield Case("checkpoint (train)", name, partial(resume, change), ("checkpoint-1",))

    def baseline(change, world, tmp):
        folder = world.copy(tmp, world.evaluation)
        change(folder)
        return ["evaluate", str(world.run), *world.small, "--dataset_name", str(world.records_file), "--max_questions",
            "2", "--output_dir", str(tmp / "out"), "--baseline", str(folder)]  # fmt: skip

    def again(change, world, tmp):
        folder = world.copy(tmp, world.evaluation)
        change(folder)
        return ["evaluate", str(world.run), *world.small, "--dataset_name", str(world.records_file), "--max_questions",
            "2", "--output_dir", str(folder)]  # fmt: skip

    def page(change, world, tmp):
        folder = world.copy(tmp)
        change(folder)
        return ["report", str(folder), "--output_dir", str(tmp / "page")]

    for name, data in damaged_files(b'{"row": 0,\n "x": 1}').items():
        yield Case(
            "baseline (evaluate)",
            name,
            partial(baseline, partial(_write, "questions.jsonl", data)),
            ("questions.jsonl",),
        )
        yield Case(
            "results (evaluate)",
            name,
            partial(again, partial(_write, "questions.jsonl", data)),
            ("questions.jsonl", "evaluation"),
        )
    yield Case(
        "results (evaluate)",
        "settings.json a list",
        partial(again, partial(_write, "settings.json", b"[]")),
        ("settings.json", "evaluation"),
    )
    yield Case(
        "results (evaluate)",
        "settings.json cut",
        partial(again, partial(_write, "settings.json", b"{")),
        ("settings.json", "evaluation"),
    )
    for name, data in damaged_files(b'{"step": 1,\n "x": 1}').items():
        yield Case(
            "log_history.jsonl (report)",
            name,
            partial(page, partial(_write, "log_history.jsonl", data)),
            ("log_history", "run"),
        )

    def disk_full(size, world, tmp):
        return Limited(size, ["train", *world.train_flags(tmp / "out"), "--dataset_name", str(world.records_file)])

    for size in (1_000, 2_000, 4_000, 8_000, 16_000):
        yield Case(
            "disk full (train)",
            f"files end at {size:,} bytes",
            partial(disk_full, size),
            ("out", "space", "large", "written"),
        )

    def disk_full_predict(size, world, tmp):
        return Limited(size, ["predict", str(world.run), *world.small, "--questions", str(world.records_file),
            "--output_dir", str(tmp / "out")])  # fmt: skip

    for size in (10, 200):
        yield Case(
            "disk full (predict)", f"files end at {size:,} bytes", partial(disk_full_predict, size), ("out", "large")
        )


def permissions() -> Iterator[Case]:
    """Folders that cannot be written to, and files and folders that cannot be read."""

    def written(command, world, tmp):
        folder = tmp / "locked"
        folder.mkdir()
        out = folder / "out" if command.endswith("beneath") else folder
        folder.chmod(0o555)
        data = ["--dataset_name", str(world.records_file)]
        return Unable({
            "train": ["train", *world.train_flags(out), *data],
            "warmup": warmup_flags(world, tmp, world.records_file, output_dir=out, dry_run="false"),
            "predict": ["predict", str(world.run), *world.small, "--output_dir", str(out), *data],
            "evaluate": ["evaluate", str(world.run), *world.small, "--output_dir", str(out), *data],
            "retrieve": ["retrieve", str(world.questions_file), "--corpus", str(world.corpus_file), "--k", "2",
                "--output_dir", str(out), "--cache_dir", str(tmp / "cache")],
            "retrieve cache": ["retrieve", str(world.questions_file), "--corpus", str(world.corpus_file), "--k", "2",
                "--output_dir", str(tmp / "out"), "--cache_dir", str(out)],
            "report": ["report", str(world.run), "--output_dir", str(out)],
        }[command.removesuffix(" beneath")])  # fmt: skip

    for command in ("train", "warmup", "predict", "evaluate", "retrieve", "retrieve cache", "report"):
        for name in (command, f"{command} beneath"):
            yield Case("folders without permission", name, partial(written, name), ("locked",))

    def read(command, part, world, tmp):
        folder = world.copy(tmp)
        data = write_jsonl(tmp / "data.jsonl", world.records)
        passages = write_jsonl(tmp / "passages.jsonl", world.passages)
        settings = tmp / "settings.yaml"
        settings.write_text("num_selected: 2\n")
        place = {"data": data, "passages": passages, "settings": settings, "run": folder}.get(part, folder / part)
        place.chmod(0)
        return Unable({
            "train": ["train", *world.train_flags(tmp / "out"), "--dataset_name", str(data),
                "--config", str(settings)],
            "predict": ["predict", str(folder), *world.small, "--output_dir", str(tmp / "out"), "--dataset_name",
                str(data)],
            "retrieve": ["retrieve", str(world.questions_file), "--corpus", str(passages), "--k", "2",
                "--output_dir", str(tmp / "out"), "--cache_dir", str(tmp / "cache")],
            "report": ["report", str(folder), "--output_dir", str(tmp / "out")],
        }[command])  # fmt: skip

    for command, parts in {
        "train": ("data", "settings"),
        "predict": ("data", "run", "selector", "rag_config.json", "selector/adapter_config.json",
                    "selector/adapter_model.safetensors", "selector/tokenizer.json", "selector/tokenizer_config.json",
                    "generator/role.json"),
        "retrieve": ("passages",),
        "report": ("run", "log_history.jsonl", "rag_config.json"),
    }.items():  # fmt: skip
        for part in parts:
            names = {"data": "data.jsonl", "passages": "passages.jsonl", "settings": "settings.yaml"}
            yield Case("files without permission", f"{part} ({command})", partial(read, command, part),
                (names.get(part, part),))  # fmt: skip


class Unable(NamedTuple):
    """A command of somebody who must heed permissions, as root need not."""

    arguments: list[str]


class Limited(NamedTuple):
    """A command in which no file can grow beyond some bytes, as on a full disk."""

    size: int
    arguments: list[str]


# Calls from Python


def calls() -> Iterator[Case]:
    """The main Python entry points, called with what they cannot use."""

    def case(name, call, *names):
        return Case("Python", name, lambda world, tmp: partial(call, world, tmp), names)

    def pipe(world):
        return RAGPipeline.from_pretrained(world.run, options=LoadOptions(device="cpu"))

    documents = [{"text": "a"}, {"text": "b"}]
    for name, question in {"empty": "", "null": None, "a number": 5, "bytes": b"who", "an empty list": [],
                           "no messages": [{"a": 1}], "a role": [{"role": "x", "content": "y"}]}.items():  # fmt: skip
        if name == "an empty list":
            continue
        yield case(f"pipe(question): {name}", lambda w, t, q=question: pipe(w)(q, documents=documents), "question")
    for name, value in {"numbers": [1, 2], "null": [None], "empty": [], "no text": [{"id": "x"}], "a text": "abc",
                        "an empty text": [""], "twice": [{"id": "a", "text": "x"}] * 2}.items():  # fmt: skip
        yield case(f"pipe(documents): {name}", lambda w, t, d=value: pipe(w)("who?", documents=d), "document")
    yield case("pipe without documents", lambda w, t: pipe(w)("who?"), "documents", "retriever")
    yield case("pipe(batch_size=0)", lambda w, t: pipe(w)(["a"], [documents], batch_size=0), "batch_size")
    for name, path in {"null": None, "a number": 5, "missing": "/no/such", "empty": ""}.items():
        yield case(
            f"RAGPipeline.from_pretrained: {name}",
            lambda w, t, p=path: RAGPipeline.from_pretrained(p),
            "model",
            "folder",
            "/no/such",
        )
    yield case("from_pretrained(no such field)", lambda w, t: RAGPipeline.from_pretrained(w.run, x=1), "x")
    for field, value in {
        "num_selected": 0,
        "max_candidates": 1,
        "max_answer_length": -1,
        "selector_template": "x",
    }.items():
        yield case(f"from_pretrained({field}={value!r})",
            lambda w, t, f=field, v=value: RAGPipeline.from_pretrained(w.run, **{f: v}), field)  # fmt: skip
    for name, data in {"a list": [], "null": None, "a dict": {}, "no rows": Dataset.from_list([])}.items():
        yield case(f"validate_dataset: {name}", lambda w, t, d=data: validate_dataset(d, 2), "train_dataset")
    for name, data in {"null": None, "a number": 5, "texts": ["x"], "no question": [{}], "numbers": [5],
                       "texts as documents": [{"question": "a", "documents": ["x"]}]}.items():  # fmt: skip
        yield case(f"build_dataset: {name}", lambda w, t, d=data: build_dataset(d), "record", "row", "question")
    for reader in (read_questions, read_open_questions, read_corpus, load_records):
        for name, path in {
            "null": None,
            "a number": 5.5,
            "empty": "",
            "missing": "/no/such.jsonl",
            "a folder": tempfile.mkdtemp(),
        }.items():
            yield case(
                f"{reader.__name__}: {name}",
                lambda w, t, r=reader, p=path: list(r(p)),
                "path",
                "file",
                "folder",
                "/no/such",
                "''",
            )
    yield case("BM25Retriever of nothing", lambda w, t: BM25Retriever([]), "corpus", "passage")
    yield case("BM25Retriever of texts", lambda w, t: BM25Retriever(["a", "b"]), "passage", "document", "corpus")
    yield case(
        "BM25Retriever before it is built", lambda w, t: BM25Retriever().search(["a"], 2), "corpus", "index", "build"
    )
    yield case("search of k=0", lambda w, t: BM25Retriever(read_corpus(w.corpus_file)).search(["a"], 0), "k")
    yield case(
        "retrieve_candidates of no dataset",
        lambda w, t: retrieve_candidates([], BM25Retriever(read_corpus(w.corpus_file)), 2),
        "dataset",
        "questions",
    )
    yield case(
        "retrieve_candidates of k=0",
        lambda w, t: retrieve_candidates(
            read_questions(w.questions_file), BM25Retriever(read_corpus(w.corpus_file)), 0
        ),
        "k",
    )
    config = {"num_selected": 2, "max_candidates": 4, "use_cpu": True, "report_to": "none"}
    for field, value in {
        "num_selected": 0, "num_permutations": 1.5, "temperature": float("nan"), "top_p": 0, "selector_estimator": "x",
        "max_answer_length": None, "selector_template": 5, "weight_temperature": -1, "chat_template_kwargs": "x",
        "learning_rate": float("nan"), "selector_learning_rate": -1, "max_candidates": "x", "label_names": 5,
    }.items():  # fmt: skip
        yield case(
            f"DROConfig({field}={value!r})", lambda w, t, f=field, v=value: DROConfig(str(t), **config | {f: v}), field
        )

    def trainer(change, world, tmp):
        settings = {
            "model": str(world.base),
            "args": DROConfig(str(tmp), **config),
            "train_dataset": load_records(world.records_file),
        }
        return DROTrainer(**settings | change(world))

    for name, (change, *names) in {
        "no dataset": (lambda w: {"train_dataset": None}, "train_dataset"),
        "a list": (lambda w: {"train_dataset": []}, "train_dataset"),
        "an eval list": (lambda w: {"eval_dataset": [1]}, "eval_dataset"),
        "pandas": (lambda w: {"train_dataset": load_records(w.records_file).with_format("numpy")}, "train_dataset"),
        "no answers": (lambda w: {"train_dataset": load_records(w.records_file).remove_columns("answers")}, "answers"),
        "a model of None": (lambda w: {"model": None}, "model"),
        "a model of 5": (lambda w: {"model": 5}, "model"),
        "a missing model": (lambda w: {"model": "/no/such"}, "/no/such"),
        "args of TRL": (lambda w: {"args": {"output_dir": "x"}}, "args"),
        "a tokenizer of 5": (lambda w: {"processing_class": 5}, "processing_class"),
        "a peft_config of {}": (lambda w: {"peft_config": {}}, "peft_config"),
        "data_collator": (lambda w: {"data_collator": lambda rows: rows}, "data_collator"),
        "model_init": (lambda w: {"model_init": lambda: None}, "model_init"),
        "compute_loss_func": (lambda w: {"compute_loss_func": lambda *a: 0}, "compute_loss_func"),
        "a selector_model of 5": (lambda w: {"selector_model": 5}, "selector_model"),
        "callbacks of 5": (lambda w: {"callbacks": 5}, "callbacks"),
    }.items():  # fmt: skip
        if name == "pandas":
            continue
        yield case(f"DROTrainer: {name}", lambda w, t, c=change: trainer(c, w, t), *names)
    yield case("RAGConfig.load of a folder", lambda w, t: RAGConfig.load(t), "rag_config", "folder", "directory")
    yield case("prompt_dataset of a list", lambda w, t: prompt_dataset([], pipe(w)), "dataset")
    tokenizer = partial(_tokenizer)
    for name, values in {"K of 0": (4, 0), "K beyond n": (4, 5)}.items():
        yield case(
            f"PermutationCodec: {name}", lambda w, t, v=values: PermutationCodec(tokenizer(w), *v), "num_selected"
        )
    yield case("PromptBuilder of a bad template", lambda w, t: PromptBuilder(tokenizer(w), "{x}", 2), "template")
    yield case("PromptBuilder of no template", lambda w, t: PromptBuilder(tokenizer(w), 5, 2), "template")


def _tokenizer(world):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(world.base)


def all_cases() -> list[Case]:
    """All, in order."""
    return [
        case
        for make in (lines, files, settings, yaml_values, systems, leftovers, permissions, calls)
        for case in make()
    ]
