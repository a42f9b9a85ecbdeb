# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""`trl-dro quickstart`: from a folder of documents to a trained, evaluated system and the command that serves it."""

import gc
import hashlib
import importlib.util
import math
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from ..data import read_questions
from ..data.corpus import open_corpus
from ..data.lines import read_json_object
from ..data.resumable import fingerprint, write_json
from ..data.schema import DatasetError
from ..data.storage import DEFAULT_CACHE_DIR, alone_in, different
from ..model.query_likelihood import SelectorForm
from ..system.rag_config import CONFIG_FILE, RAGConfig
from ..trainer.inputs import LongAnswers
from ..trainer.plan import read_config
from .arguments import CORPUS_HELP, CuttingArguments, check_range
from .questions import DEV_FILE, SUMMARY_FILE, TRAIN_FILE, write_lines


SETTINGS_FILE = "quickstart.json"
MOST_HELD_OUT = 500
# Bases of fewer weights cannot point to a passage by its number, but tell which one a question fits: see
# docs/experiments.md.
LEAST_TO_POINT = 1_000_000_000
# As in the recipes of such bases, but for a prior by ranks: in a small corpus BM25's scores can be 0. How much ranks
# count is fitted to the answers.
SCORING = {
    "selector_form": "query_likelihood",
    "query_likelihood_scale": 0.15,
    "retriever_prior": 1.0,
    "selector_fit_questions": 50,
    "sampling": "distinct",
    "negligible_weight": 0.05,
    "answer_permutations": 5,
    "use_peft": True,
}


@dataclass
class QuickstartArguments(CuttingArguments):
    """
    Documents, questions if there are any, and a model; see also [`CuttingArguments`].

    Args:
        corpus (`str`):
            Passages, as for [`~data.corpus.open_corpus`].
        questions (`str`, *optional*):
            Questions with their answers, jsonl, of which a part is held out; by default a model writes some.
        output_dir (`str`, *optional*, defaults to `"quickstart"`):
            Folder of everything. What is done there is not done again.
        model_name_or_path (`str`, *optional*):
            Base model of both roles, which writes questions too; the tiny model of the demo by default.
        api_base (`str`, *optional*):
            OpenAI-compatible endpoint that writes the questions instead, see `trl-dro questions`.
        api_model (`str`, *optional*):
            Name of its model.
        max_passages (`int`, *optional*, defaults to `2000`):
            Passages that questions are written about.
        dev_share (`float`, *optional*, defaults to `0.2`):
            Share of the questions that is held out.
        max_steps (`int`, *optional*):
            Updates of training; by default three passes over the questions, 200 updates at most on a CPU and 2,000 on
            an accelerator.
        long_answers (`str`, *optional*, defaults to `"error"`):
            What becomes of answers of over 64 tokens: an `"error"`, or `"drop"` or `"truncate"`, see `trl-dro train`.
        use_cpu (`bool`, *optional*, defaults to `False`):
            Whether to leave accelerators alone.
        dry_run (`bool`, *optional*, defaults to `False`):
            Say what is decided, and run nothing that takes a model.
        cache_dir (`str`, *optional*, defaults to `$HF_HOME/trl_dro`):
            Where corpora and indexes are kept.
    """

    corpus: str = field(metadata={"help": CORPUS_HELP})
    questions: str | None = field(
        default=None, metadata={"help": "Questions with answers, jsonl; by default a model writes some."}
    )
    output_dir: str = field(
        default="quickstart", metadata={"help": "Folder of everything; what is done is not done again."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Base model of both roles; the tiny model of the demo by default."}
    )
    api_base: str | None = field(
        default=None, metadata={"help": "OpenAI-compatible endpoint that writes the questions instead."}
    )
    api_model: str | None = field(default=None, metadata={"help": "Name of the endpoint's model."})
    max_passages: int = field(default=2000, metadata={"help": "Passages that questions are written about."})
    dev_share: float = field(default=0.2, metadata={"help": "Share of the questions that is held out."})
    max_steps: int | None = field(default=None, metadata={"help": "Updates of training."})
    long_answers: LongAnswers = field(
        default="error", metadata={"help": "Answers of over 64 tokens: an error, or drop or truncate them."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Leave accelerators alone."})
    dry_run: bool = field(default=False, metadata={"help": "Say what is decided, and run nothing that takes a model."})
    cache_dir: str = field(
        default=str(DEFAULT_CACHE_DIR), metadata={"help": "Where corpora and indexes are kept, by their content."}
    )

    def __post_init__(self):
        if self.questions is None and self.model_name_or_path is None and self.api_base is None:
            raise ValueError(
                "no --questions, and nobody to write some: pass --questions FILE, or a model that writes them, "
                "--model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct or a larger one, or --api_base"
            )
        if self.questions is not None and self.api_base is not None:
            raise ValueError("--questions are there already: leave out --api_base")
        self.cut()
        check_range(self, ["max_passages", "max_steps"], 1)
        check_range(self, ["dev_share"], 0.01, 0.9)


@dataclass
class Sizes:
    """
    What is chosen for a run.

    Args:
        max_candidates (`int`):
            Passages that the selector chooses from, n.
        num_selected (`int`):
            Passages that it chooses, K.
        num_permutations (`int`):
            Permutations sampled for each question, m.
        batch_size (`int`):
            Questions in a forward.
        accumulation (`int`):
            Forwards in an update.
        warmup_steps (`int`):
            Updates of the warm-up of each role; 0 for a selector that scores, which needs none.
        max_steps (`int`):
            Updates of training.
        learning_rate (`float`):
            Of both.
        selector_form (`str`):
            As in [`~dro_config.DROConfig`].
    """

    max_candidates: int
    num_selected: int
    num_permutations: int
    batch_size: int
    accumulation: int
    warmup_steps: int
    max_steps: int
    learning_rate: float
    selector_form: SelectorForm


def choose_sizes(
    num_passages: int,
    num_questions: int,
    accelerated: bool,
    num_weights: int | None = None,
    steps: int | None = None,
) -> Sizes:
    """
    Sizes of a run: the paper's where there is an accelerator, and what a CPU can do in an hour or two where not.

    Args:
        num_passages (`int`):
            Passages of the corpus.
        num_questions (`int`):
            Questions to train on.
        accelerated (`bool`):
            Whether there is an accelerator.
        num_weights (`int`, *optional*):
            Weights of the base, where it is not the tiny model.
        steps (`int`, *optional*):
            Updates, if they are given.
    """
    scores = num_weights is not None and num_weights < LEAST_TO_POINT
    on_cpu = (5, 1, 5) if scores else (10, 2, 8)
    n, k, m = (20, 5, 8) if accelerated else on_cpu
    candidates = min(n, num_passages)
    batch = min(4 if accelerated else 1, num_questions)
    accumulation = min(8, num_questions) // batch or 1
    an_epoch = math.ceil(num_questions / (batch * accumulation))
    most = 2000 if accelerated else 200
    return Sizes(
        candidates,
        min(k, max(1, candidates // 2)),
        m,
        batch,
        accumulation,
        0 if scores else min(an_epoch, steps or most, most),
        steps or min(3 * an_epoch, most),
        1e-3 if num_weights is None else 1e-4 if accelerated else 3e-4,
        "query_likelihood" if scores else "permutation",
    )


def count_weights(model: str) -> int:
    """Weights of a base, by its config alone. Raises `ValueError` if there is none."""
    config = read_config(model, None, False)
    with torch.device("meta"):
        return int(AutoModelForCausalLM.from_config(config).num_parameters())


class Stage(NamedTuple):
    """A command, and how it is known to be done."""

    title: str
    words: list[str]
    is_done: Callable[[], bool]


def quickstart(args: QuickstartArguments) -> None:
    """
    Runs the commands from documents to a trained and evaluated system, one after the other, and says which one serves
    it. Each is printed, so that it can be repeated alone; one that is done is not run again.

    Args:
        args ([`QuickstartArguments`]):
            Documents, questions and model.

    Raises:
        `DatasetError`: the documents or questions cannot be used.
        `ValueError`: `output_dir` was begun with other settings.
        `SystemExit`: a command failed, and has said why.
    """
    folder = Path(args.output_dir)
    with alone_in(folder):
        corpus = open_corpus(args.corpus, args.cache_dir, *args.cut())
        settings = {name: value for name, value in asdict(args).items() if name not in _NOT_COMPARED}
        settings["corpus_sha256"] = corpus.fingerprint
        if args.questions is not None:
            settings["questions_sha256"] = fingerprint(read_questions(args.questions), ("question", "answers"))
        _claim(folder, settings)
        accelerated = torch.accelerator.is_available() and not args.use_cpu
        print(f"{len(corpus):,} passages; {'an accelerator' if accelerated else 'a CPU'} to train on.")
        questions = folder / "questions"
        if args.questions is not None:
            _split(args.questions, questions, args.dev_share)
        else:
            stage = Stage("write questions", _question_words(args, questions), (questions / SUMMARY_FILE).is_file)
            if args.dry_run:
                print(f"Questions would be written first, whose number decides the rest:\n  {_shown(stage)}")
                return
            _run(stage, "")
        num_train = len(read_questions(questions / TRAIN_FILE))
        if not (questions / DEV_FILE).read_text(encoding="utf-8").strip():
            raise DatasetError(f"{num_train} questions leave none to evaluate on: give more, or more documents")
        num_dev = len(read_questions(questions / DEV_FILE))
        num_weights = None if args.model_name_or_path is None else count_weights(args.model_name_or_path)
        sizes = choose_sizes(len(corpus), num_train, accelerated, num_weights, args.max_steps)
        warmup = f"{sizes.warmup_steps} updates of warm-up and " if sizes.warmup_steps else ""
        print(
            f"{num_train:,} questions to train on, {num_dev:,} held out. Chosen: {sizes.num_selected} of "
            f"{sizes.max_candidates} passages for each, {sizes.num_permutations} permutations, {warmup}"
            f"{sizes.max_steps} updates of training, each of {sizes.batch_size * sizes.accumulation} questions."
        )
        if num_weights is not None and sizes.selector_form == "query_likelihood":
            print(f"With {num_weights / 1e6:,.0f} million weights the selector scores passages, without warm-up.")
        stages = make_stages(args, sizes, accelerated)
        for number, stage in enumerate(stages, start=1):
            if args.dry_run:
                print(f"[{number}/{len(stages)}] {stage.title}\n  {_shown(stage)}")
            else:
                _run(stage, f"[{number}/{len(stages)}] ")
    if not args.dry_run:
        _print_gain(folder / "results")
    serve = shlex.join(["trl-dro", "serve", str(folder / "run"), "--corpus", args.corpus, *_cut_words(args)])
    when = "Afterwards this" if args.dry_run else "This"
    print(f"\n{when} answers questions over HTTP, with a page to try it:\n  {serve}")


# What changes nothing that is written, or only how much of it.
_NOT_COMPARED = ("output_dir", "cache_dir", "dry_run", "corpus", "questions", "use_cpu")


def make_stages(args: QuickstartArguments, sizes: Sizes, accelerated: bool) -> list[Stage]:
    """The commands from questions to a report."""
    folder = Path(args.output_dir)
    data, warm, run, results = folder / "data", folder / "warmup", folder / "run", folder / "results"
    model = [] if args.model_name_or_path is None else ["--model_name_or_path", args.model_name_or_path]
    device = ["--dtype", "bfloat16"] if accelerated else ["--dtype", "float32", "--bf16", "false", "--use_cpu", "true"]
    if not accelerated:
        device += ["--gradient_checkpointing", "false"]
    flags: dict[str, Any] = {
        "num_selected": sizes.num_selected,
        "max_candidates": sizes.max_candidates,
        "per_device_train_batch_size": sizes.batch_size,
        "gradient_accumulation_steps": sizes.accumulation,
        "learning_rate": sizes.learning_rate,
        "logging_steps": max(1, min(10, sizes.max_steps // 10)),
        "save_steps": 50,
        "save_total_limit": 2,
        "report_to": "none",
        "lora_target_modules": "all-linear",
    }
    if args.long_answers != "error":
        flags |= {"long_answers": args.long_answers, "max_answer_length": RAGConfig.max_answer_length}
    both = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    both += [*model, *device, "--dataset_name", str(data)]
    stages = [
        Stage(
            f"retrieve candidates, {split}",
            ["retrieve", "--questions", str(folder / "questions" / f"{split}.jsonl"), "--corpus", args.corpus]
            + ["--output_dir", str(data), "--split", split, "--cache_dir", args.cache_dir, *_cut_words(args)],
            (data / split / "retrieval.json").is_file,
        )
        for split in ("train", "dev")
    ]
    if sizes.selector_form == "query_likelihood":
        start = [word for name, value in SCORING.items() for word in (f"--{name}", str(value))]
    else:
        start = ["--selector_adapter", str(warm / "selector"), "--generator_adapter", str(warm / "generator")]
        warmup = ["warmup", *both, "--max_steps", str(sizes.warmup_steps), "--output_dir", str(warm)]
        stages.append(Stage("warm up both roles", warmup, (warm / CONFIG_FILE).is_file))
    train = ["train", *both, "--dataset_test_split", "dev", "--max_eval_questions", str(MOST_HELD_OUT)]
    train += ["--num_permutations", str(sizes.num_permutations), "--max_steps", str(sizes.max_steps)]
    train += [*start, "--output_dir", str(run)]

    is_trained = (run / CONFIG_FILE).is_file  # what is saved after the last update
    stages.append(Stage("what training will need", [*train, "--dry_run"], is_trained))
    stages.append(Stage("train both roles together", [*train, "--resume_from_checkpoint", "true"], is_trained))
    ask = ["evaluate", str(run), "--dataset_name", str(data / "dev"), "--max_questions", str(MOST_HELD_OUT)]
    ask += [] if accelerated else ["--device", "cpu", "--dtype", "float32"]
    for name, title, more in (
        ("retriever", "evaluate with the retriever's order", ["--selector", "retriever"]),
        ("dro", "evaluate with the selector", ["--baseline", str(results / "retriever")]),
    ):
        place = results / name
        stages.append(Stage(title, [*ask, "--output_dir", str(place), *more], (place / SUMMARY_FILE).is_file))
    if importlib.util.find_spec("matplotlib") and importlib.util.find_spec("jinja2"):
        words = ["report", str(run), "--evaluation", str(results / "retriever"), str(results / "dro")]
        stages.append(Stage("the run on one page", words, (run / "report" / "report.html").is_file))
    else:
        print("No report: that needs the extra plots, pip install 'trl_dro[plots]'.")
    return stages


def _question_words(args: QuickstartArguments, folder: Path) -> list[str]:
    words = ["questions", args.corpus, "--output_dir", str(folder), "--cache_dir", args.cache_dir]
    words += ["--max_passages", str(args.max_passages), "--dev_share", str(args.dev_share), *_cut_words(args)]
    for name in ("model_name_or_path", "api_base", "api_model"):
        if (value := getattr(args, name)) is not None:
            words += [f"--{name}", value]
    return words + (["--device", "cpu"] if args.use_cpu else [])


def _cut_words(args: QuickstartArguments) -> list[str]:
    """Flags of how documents are cut, where that is not the usual way."""
    flags = zip(fields(CuttingArguments), args.cut(), strict=True)
    return [word for flag, value in flags if value != flag.default for word in (f"--{flag.name}", str(value))]


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Says that a folder belongs to these settings. Raises `ValueError` if it belongs to others."""
    path = folder / SETTINGS_FILE
    if path.is_file() and (difference := different(read_json_object(path), settings)):
        raise ValueError(f"{folder} was begun with {difference}: name another output_dir, or delete that folder")
    write_json(path, settings)


def _split(questions: str, folder: Path, dev_share: float) -> None:
    """Holds out a part of the questions, by a hash of each: a question stays on its side when others come."""
    rows = read_questions(questions).to_list()
    if len(rows) < 2:
        raise DatasetError(f"{questions}: one question cannot be trained on and evaluated too: give more")
    order = sorted(range(len(rows)), key=lambda row: hashlib.sha256(str(rows[row]["question"]).encode()).digest())
    held_out = set(order[: min(MOST_HELD_OUT, max(1, round(dev_share * len(rows))))])
    folder.mkdir(exist_ok=True)
    write_lines(folder / TRAIN_FILE, [row for place, row in enumerate(rows) if place not in held_out])
    write_lines(folder / DEV_FILE, [row for place, row in enumerate(rows) if place in held_out])


def _print_gain(results: Path) -> None:
    """Prints what the held-out questions tell of the selector."""
    retriever, system = (read_json_object(results / name / SUMMARY_FILE) for name in ("retriever", "dro"))
    told = [
        f"{title} {100 * retriever['metrics'][name]['mean']:.1f} and {100 * system['metrics'][name]['mean']:.1f}"
        for title, name in (("exact match", "em"), ("contains answer", "contains"), ("Recall@1", "recall@1"))
    ]
    number = system["num_questions"]
    print(f"\nIn % of {number} questions, by the retriever's order and by the selector: {', '.join(told)}.")
    if system["metrics"]["recall@1"]["mean"] < retriever["metrics"]["recall@1"]["mean"]:
        print("The selector does not earn its place yet: give more questions, more --max_steps or a larger model.")


def _shown(stage: Stage) -> str:
    return shlex.join(["trl-dro", *stage.words])


def _run(stage: Stage, number: str) -> None:
    from .cli import run

    print(f"\n{number}{stage.title}\n  {_shown(stage)}", flush=True)
    if stage.is_done():
        print("  is done already.")
        return
    run(stage.words, may_launch=True)
    if "--dry_run" not in stage.words and not stage.is_done():
        raise ValueError(f"the stage `{stage.title}` ended before it was done: the same command goes on from there")
    gc.collect()  # trainers hold their models in circles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
