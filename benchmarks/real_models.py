# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
Does DRO beat what one would do instead, on a real model and real questions? What one would do instead is `sft`: the
generator fine-tuned on the retriever's first K documents, with as many updates, from the same warm start.

| arm | selector learns from | generator learns from |
|---|---|---|
| `warm_start` | a teacher's permutations | the retriever's first K documents |
| `sft` | nothing | the retriever's first K documents |
| `joint` | importance weights | its selector's documents |
| `without_selector` | nothing | the warm selector's documents |
| `without_generator` | importance weights | nothing |
| `decoupled` | permutations with the documents that contain an answer first | the retriever's first K documents |

```bash
trl-dro retrieve --questions train.jsonl --split train --corpus corpus.jsonl --output_dir outputs/nq
trl-dro retrieve --questions dev.jsonl --split dev --corpus corpus.jsonl --output_dir outputs/nq
.venv/bin/python benchmarks/real_models.py --base HuggingFaceTB/SmolLM2-135M-Instruct --data outputs/nq --seeds 0 1 2
.venv/bin/python benchmarks/real_models.py --quick      # the tiny model and an invented world: whether it runs
```

All arms are `DROTrainer` or a subclass with its data order, optimizer and schedule. The last `tuning_questions` of the
training split are never trained on: settings are chosen there, with `--evaluate_on tuning`. Each run has a folder
named by its settings, goes on from its last checkpoint and question, and ends as a line of `results.jsonl`; several
processes can share `--out`.
"""

import fcntl
import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from peft import LoraConfig
from real_models_report import read_rows, write_report
from torch import Tensor, nn
from transformers import AutoTokenizer, HfArgumentParser, PrinterCallback, TrainerCallback, set_seed

from trl_dro import DROConfig, DROTrainer
from trl_dro.data.resumable import complete_rows
from trl_dro.demo.tiny import TINY_MODEL
from trl_dro.demo.world import synthetic_world
from trl_dro.evaluation.scoring import is_relevant, score_bounds, score_prediction, select
from trl_dro.metrics.text import exact_match, f1, has_answer, recall_at_k
from trl_dro.model.importance import effective_sample_size, importance_weights
from trl_dro.model.prompts import document_body
from trl_dro.system.mixture import answer_questions
from trl_dro.trainer.estimation import draw, reordered
from trl_dro.trainer.fitting import saved_weights
from trl_dro.trainer.schedule import MicroBatch


# No part of training
EVALUATION = ("eval_split", "evaluate_on", "eval_questions", "bound_permutations", "oracle", "mixture")
MOST_PERMUTATIONS = 100  # whose probabilities are kept for the curve of the retriever's prior
ARMS = ("warm_start", "sft", "joint", "without_selector", "without_generator", "decoupled")


def setting(default: Any, text: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class Settings:
    """The one table of defaults: two cores and SmolLM2-135M. Another machine and model differ in these only."""

    # What runs, which says nothing of a run's result
    out: str = setting("outputs/real_models", "Folder of runs, results, table and figure.")
    arms: list[str] = setting(list(ARMS), f"Any of {', '.join(ARMS)}.")
    seeds: list[int] = setting([0], "Seeds of adapters, order of questions and permutations.")
    quick: bool = setting(False, "The tiny model, an invented world and few questions, to see that it runs.")
    lengths: list[int] = setting([], "Run nothing: say how many answers documents of so many tokens still show.")
    use_cpu: bool = setting(True, "false takes the accelerator.")
    # Questions and model
    base: str = setting("HuggingFaceTB/SmolLM2-135M-Instruct", "Base of both roles, a Hub id or a folder.")
    data: str = setting("outputs/nq", "Output of trl-dro retrieve, with a folder per split.")
    train_split: str = setting("train", "Split to train on.")
    eval_split: str = setting("dev", "Split to report on.")
    tuning_questions: int = setting(100, "Questions at the end of the training split that are kept for tuning.")
    evaluate_on: str = setting("report", "report: the split to report on; tuning: the questions kept for tuning.")
    eval_questions: int = setting(0, "First questions to evaluate; 0 takes all.")
    bound_permutations: int = setting(4, "Permutations sampled per evaluated question for bound and ESS; 0: none.")
    oracle: bool = setting(False, "Also answer from the candidates that contain an answer.")
    mixture: int = setting(
        0, "Also answer by the sum over so many permutations, answer_permutations of DROConfig; 0: no."
    )
    dtype: str = setting("float32", "Precision of the base. bfloat16 where the processor computes in it.")
    lora_r: int = setting(16, "Rank of the adapters; alpha is twice that.")
    max_candidates: int = setting(5, "Candidates, n.")
    num_selected: int = setting(2, "Documents in a permutation, K.")
    selector_form: str = setting("permutation", "As in DROConfig.")
    query_likelihood_scale: float = setting(0.1, "As in DROConfig.")
    retriever_prior: float = setting(0.0, "Weight of the retriever in the selector, from the warm start on.")
    retriever_prior_from: str = setting("rank", "As in DROConfig.")
    max_document_length: int = setting(160, "Tokens of a document.")
    max_answer_length: int = setting(16, "Tokens of an answer.")
    questions_per_update: int = setting(4, "Questions in an update.")
    questions_per_forward: int = setting(1, "Questions that go through a model together.")
    # Warm start
    warmup_selector_questions: int = setting(500, "Training questions of the selector's warm start; 0: none.")
    warmup_generator_questions: int = setting(100, "Training questions of the generator's warm start.")
    warmup_teacher: str = setting("relevant", "relevant: candidates with an answer first; retriever: its order.")
    warmup_only_informative: bool = setting(
        True, "relevant: teach the selector no question none of whose candidates has one."
    )
    warmup_learning_rate: float = setting(5e-4, "Learning rate of the warm start.")
    # Training
    updates: int = setting(125, "Updates of every arm.")
    selector_learning_rate: float = setting(3e-4, "Selector's learning rate.")
    generator_learning_rate: float = setting(3e-4, "Generator's learning rate.")
    selector_fit_questions: int = setting(0, "As in DROConfig, for the arms that train the selector by weights.")
    num_permutations: int = setting(4, "Permutations per question, m.")
    sampling: str = setting("independent", "As in DROConfig.")
    selector_estimator: str = setting("rws_centered", "As in DROConfig.")
    answer_target: str = setting("first", "As in DROConfig.")
    answer_likelihood: str = setting("sum", "As in DROConfig.")
    likelihood_floor: float = setting(0.0, "As in DROConfig.")
    negligible_weight: float = setting(0.0, "As in DROConfig.")
    save_every: int = setting(10, "Updates from checkpoint to checkpoint.")

    def __post_init__(self) -> None:
        if unknown := set(self.arms) - set(ARMS):
            raise SystemExit(f"--arms {min(unknown)}: choose among {', '.join(ARMS)}")
        for name, allowed in (("evaluate_on", ("report", "tuning")), ("warmup_teacher", ("relevant", "retriever"))):
            if getattr(self, name) not in allowed:
                raise SystemExit(f"--{name} {getattr(self, name)}: choose {' or '.join(allowed)}")

    def of_arm(self, arm: str) -> dict[str, Any]:
        """All that decides what training this arm gives, but the seed."""
        values = asdict(self)
        for name in ("out", "arms", "seeds", "lengths", "use_cpu", "save_every", "questions_per_forward", *EVALUATION):
            del values[name]
        if arm == "warm_start":  # is the same whatever follows
            for item in fields(self)[[f.name for f in fields(self)].index("updates") :]:
                values.pop(item.name, None)
        return values


QUICK: dict[str, Any] = {
    "base": str(TINY_MODEL),
    "dtype": "float32",
    "tuning_questions": 8,
    "eval_questions": 3,
    "warmup_selector_questions": 4,
    "warmup_generator_questions": 4,
    "warmup_only_informative": False,
    "updates": 2,
    "questions_per_update": 2,
    "oracle": True,
    "mixture": 3,
}


# Trainers


class TaughtTrainer(DROTrainer):
    """
    Teaches the roles what is known beforehand: the generator the answer from the retriever's first K documents, the
    selector the permutation of a teacher. Nothing is sampled or weighed; all else is as in [`DROTrainer`].
    """

    teacher = "relevant"
    only_informative = True  # the selector learns nothing of questions without a relevant candidate

    def _em_step(self, model: nn.Module, inputs: MicroBatch) -> Tensor:
        rows = inputs.block[inputs.position].rows
        records, num_selected = self._records(rows), self.args.num_selected
        keys = [f"{self.args.seed}, block {inputs.block_index}, row {row}" for row in rows]
        orders, targets, _ = draw(records, keys, self.args.shuffle_candidates, self.args.answer_target)
        losses = []
        if self.args.train_generator:
            first = torch.arange(1, num_selected + 1).expand(len(rows), 1, -1)
            logps = self.rag.answer_logps(records, targets, first, wrapped=model)
            losses.append(self._backward(logps))
        if self.args.train_selector:
            rankings = [teacher_ranking(record, self.teacher)[:num_selected] for record in records]
            places = [[order.index(i) + 1 for i in ranks] for order, ranks in zip(orders, rankings, strict=True)]
            permutations = torch.tensor(places).unsqueeze(1)
            logps = self.rag.permutation_logps(reordered(records, orders), permutations, wrapped=model)
            if self.teacher == "relevant" and self.only_informative:
                logps = logps * torch.tensor([[any_relevant(record)] for record in records]).to(logps)
            losses.append(self._backward(logps))
        self._last_rows, self._usable_questions = rows, self._usable_questions + len(rows)
        return torch.stack(losses).sum()

    def _backward(self, logps: Tensor) -> Tensor:
        loss = -logps.mean() / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


def any_relevant(record: dict[str, Any]) -> bool:
    """Whether the candidates tell the teacher `relevant` anything."""
    return any(is_relevant(document, record) for document in record["documents"])


def teacher_ranking(record: dict[str, Any], teacher: str) -> list[int]:
    """Ranks of the candidates, from 0, best first."""
    ranks = list(range(len(record["documents"])))
    if teacher == "relevant":
        ranks.sort(key=lambda rank: not is_relevant(record["documents"][rank], record))
    return ranks


class Clock(TrainerCallback):
    """Adds the processor seconds since the last checkpoint to a file, so that they survive an interruption."""

    def __init__(self, path: Path):
        self.path, self.start = path, time.process_time()

    def on_save(self, args, state, control, **kwargs):
        now = time.process_time()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{now - self.start:.1f}\n")
        self.start = now

    def seconds(self) -> float:
        return sum(map(float, self.path.read_text(encoding="utf-8").split())) if self.path.exists() else 0.0


# Runs


@dataclass
class Run:
    """One arm with one seed."""

    settings: Settings
    arm: str
    seed: int
    train_dataset: Dataset
    eval_dataset: Dataset

    @property
    def id(self) -> str:
        values = json.dumps(self.settings.of_arm(self.arm), sort_keys=True)
        return f"{self.arm}-seed{self.seed}-{hashlib.sha256(values.encode()).hexdigest()[:8]}"

    @property
    def folder(self) -> Path:
        """Of its training, which every evaluation starts from."""
        return Path(self.settings.out) / "runs" / self.id

    @property
    def name(self) -> str:
        values = json.dumps([getattr(self.settings, name) for name in EVALUATION])
        return f"{self.id}/{self.settings.evaluate_on}-{hashlib.sha256(values.encode()).hexdigest()[:8]}"

    @property
    def evaluation(self) -> Path:
        return Path(self.settings.out) / "runs" / self.name

    def execute(self) -> dict[str, Any]:
        """Trains and evaluates; returns the line of the results."""
        self.evaluation.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / "lock"):
            if (self.evaluation / "result.json").is_file():  # another process's
                return json.loads((self.evaluation / "result.json").read_text(encoding="utf-8"))
            trainer, seconds, history = self.trained()
            result = {"run": self.name, "arm": self.arm, "seed": self.seed, "train_seconds": round(seconds, 1)}
            result |= self.evaluate(trainer)
            evaluated = {name: getattr(self.settings, name) for name in EVALUATION}
            result |= {"curve": history, "settings": self.settings.of_arm(self.arm) | evaluated}
            (self.evaluation / "result.json").write_text(json.dumps(result), encoding="utf-8")
        with locked(Path(self.settings.out) / "lock"), (Path(self.settings.out) / "results.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")
        return result

    @property
    def warm_stages(self) -> int:
        """Roles that a warm start teaches: the generator, and the selector if it has questions."""
        return 2 if self.settings.warmup_selector_questions else 1

    def trained(self) -> tuple[DROTrainer, float, list[dict[str, float]]]:
        s = self.settings
        if self.arm == "warm_start":
            generator = self.train_dataset.select(range(s.warmup_generator_questions))
            selector = self.train_dataset.select(range(s.warmup_selector_questions))
            if s.warmup_teacher == "relevant" and s.warmup_only_informative:
                selector = selector.filter(
                    lambda record: any_relevant(record | {"documents": record["documents"][: s.max_candidates]})
                )
            rate = {f"{role}_learning_rate": s.warmup_learning_rate for role in ("selector", "generator")}
            seconds, history, start = 0.0, [], None
            for role, dataset in (("generator", generator), ("selector", selector))[: self.warm_stages]:
                other = "selector" if role == "generator" else "generator"
                steps = max(1, len(dataset) // s.questions_per_update)
                settings = rate | {f"train_{other}": False, "max_steps": steps}
                trainer, more, rows = self.train(TaughtTrainer, dataset, settings, start, role)
                seconds, history, start = seconds + more, history + rows, self.folder / role / "final"
            return trainer, seconds, history
        warm = Run(s, "warm_start", self.seed, self.train_dataset, self.eval_dataset)
        start = warm.folder / ("generator", "selector")[self.warm_stages - 1] / "final"
        if not start.is_dir():
            warm.folder.mkdir(parents=True, exist_ok=True)
            with locked(warm.folder / "lock"):
                warm.trained()
        changes = {
            "sft": {"train_selector": False, "selector_fit_questions": 0},
            "without_selector": {"train_selector": False, "selector_fit_questions": 0},
            "without_generator": {"train_generator": False},
            "decoupled": {"selector_fit_questions": 0},
        }.get(self.arm, {})
        trainer_type = TaughtTrainer if self.arm in ("sft", "decoupled") else DROTrainer
        return self.train(trainer_type, self.train_dataset, changes, start, "both")

    def train(
        self, trainer_type: type[DROTrainer], dataset: Dataset, changes: dict[str, Any], start: Path | None, name: str
    ) -> tuple[DROTrainer, float, list[dict[str, float]]]:
        """A trainer whose roles went from the adapters in `start` through all updates, processor seconds, logs."""
        s, folder = self.settings, self.folder / name
        settings: dict[str, Any] = {
            "output_dir": str(folder),
            "seed": self.seed,
            "max_steps": s.updates,
            "per_device_train_batch_size": s.questions_per_forward,
            "gradient_accumulation_steps": s.questions_per_update // s.questions_per_forward,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 4,
            "save_steps": s.save_every,
            "save_total_limit": 1,
            "logging_steps": 5,
            "disable_tqdm": True,
            "report_to": "none",
            "use_cpu": s.use_cpu,
            "bf16": False,
            "gradient_checkpointing": False,
            "model_init_kwargs": {"dtype": s.dtype},
        }
        own = {item.name for item in fields(DROConfig)}
        settings |= {key: value for key, value in self.settings.of_arm(self.arm).items() if key in own}
        set_seed(self.seed)
        trainer = trainer_type(
            s.base,
            DROConfig(**settings | changes),
            dataset,
            peft_config=LoraConfig(
                task_type="CAUSAL_LM", r=s.lora_r, lora_alpha=2 * s.lora_r, target_modules="all-linear"
            ),
        )
        if isinstance(trainer, TaughtTrainer):
            trainer.only_informative = s.warmup_only_informative
            if self.arm == "warm_start":
                trainer.teacher = s.warmup_teacher
        trainer.remove_callback(PrinterCallback)
        clock = Clock(folder / "processor_seconds")
        trainer.add_callback(clock)
        history = folder / "history.json"
        if (folder / "final").is_dir():
            trainer.roles.load(folder / "final")
            weights = saved_weights(folder / "final")
            trainer.rag.query_likelihood_scale, trainer.rag.retriever_prior = weights
        else:
            if start is not None:
                trainer.roles.load(start)
            trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")) or None)
            history.write_text(json.dumps(trainer.state.log_history), encoding="utf-8")
            trainer.roles.save(folder / "making")
            trainer.rag_config().save(folder / "making")
            os.replace(folder / "making", folder / "final")
        kept = ("step", "loss", "iwae_bound", "ess", "unique_permutations", "selector/entropy")
        rows = [
            {key: round(row[key], 4) for key in kept if key in row} | {"trained": name}
            for row in json.loads(history.read_text(encoding="utf-8"))
            if "loss" in row
        ]
        return trainer, clock.seconds(), rows

    def evaluate(self, trainer: DROTrainer) -> dict[str, Any]:
        """Scores and rows of all questions, kept in `questions.jsonl`; processor seconds."""
        start = time.process_time()

        def work(left: list[int]) -> Iterator[tuple[list[int], list[dict[str, Any]]]]:
            trainer.model.eval()
            for row in left:
                with torch.no_grad():
                    yield [row], [self.score(trainer, trainer._with_candidates(self.eval_dataset[row]))]

        path = self.evaluation / "questions.jsonl"
        own = self.settings.of_arm(self.arm) | {"seed": self.seed}
        rows = complete_rows(path, len(self.eval_dataset), own, work, f"{self.arm}, seed {self.seed}")
        names = [name for name, value in rows[0].items() if isinstance(value, float)]
        means = {name: sum(row[name] for row in rows) / len(rows) for name in names}
        return means | {"questions": len(rows), "eval_seconds": round(time.process_time() - start, 1)}

    def score(self, trainer: DROTrainer, question: dict[str, Any]) -> dict[str, Any]:
        """EM and F1 with the selector's and the retriever's documents, recalls, bound and ESS."""
        rag, s = trainer.rag, self.settings
        row: dict[str, Any] = {"id": question.get("id")}
        read = rag.read([question])  # the selector's prompt, once for all that is asked of it
        seed = [int.from_bytes(question["question"].encode()[-6:])]
        used = {"selector": rag.sample([question], 1, greedy=True, read=read).permutations[0, 0].tolist()}
        for selection in ("retriever", *(["oracle"] if s.oracle else [])):
            used[selection] = select(rag, [question], selection)[0].tolist()
        [mixed] = answer_questions(rag, [question], s.mixture, s.max_answer_length, read) if s.mixture else [None]
        answers = {tuple(permutation): text for permutation, text, _ in mixed.written} if mixed else {}
        asked = sorted({tuple(permutation) for permutation in used.values()} - answers.keys())
        texts = rag.answer([question] * len(asked), torch.tensor(asked), s.max_answer_length) if asked else []
        answers |= dict(zip(asked, texts, strict=True))
        for selection, permutation in used.items():
            answer, chosen = answers[tuple(permutation)], [question["documents"][place - 1] for place in permutation]
            scores = score_prediction(answer, chosen, question["documents"], question["answers"])
            end = "" if selection == "selector" else f"_{selection}"
            row |= {f"em{end}": scores["em"], f"f1{end}": scores["f1"], f"answer{end}": answer}
            if selection == "selector":
                row |= {name: value for name, value in scores.items() if "recall" in name} | {"selected": permutation}
        if mixed:
            row |= {
                "em_mixture": float(exact_match(mixed.text, question["answers"])),
                "f1_mixture": f1(mixed.text, question["answers"]),
                "answer_mixture": mixed.text,
                "written": [(permutation, text, round(logp, 3)) for permutation, text, logp in mixed.written],
            }
        every = list(itertools.permutations(range(1, len(question["documents"]) + 1), s.num_selected))
        if len(every) <= MOST_PERMUTATIONS:
            logps = rag.permutation_logps([question], torch.tensor([every]), read=read)
            row["permutation_logps"] = [round(logp, 3) for logp in logps[0].tolist()]
            row["relevant"] = [is_relevant(document, question) for document in question["documents"]]
        if s.bound_permutations:
            samples = rag.sample([question], s.bound_permutations, seeds=seed, read=read, sampling=s.sampling)
            logps = rag.answer_logps([question], [question["answers"][:1]], samples.permutations)
            row["iwae_bound"] = score_bounds(logps, samples.correction, s.sampling)["iwae_bound"].item()
            weights = importance_weights(logps, samples.correction)
            row["ess"] = effective_sample_size(weights).item()
            row["posterior_recall"] = recall_of_heaviest(question, samples.permutations[0], weights[0])
        return row


def recall_of_heaviest(question: dict[str, Any], permutations: Tensor, weights: Tensor) -> float:
    """Whether the permutation of the largest weight, of shape `(m, K)` and `(m,)`, has a relevant document."""
    best = permutations[weights.argmax()].tolist()
    return float(any(is_relevant(question["documents"][place - 1], question) for place in best if place))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits until no other process has this file."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def load_data(s: Settings) -> tuple[Dataset, Dataset]:
    """Questions to train on and to evaluate."""
    if s.quick:
        train, report = synthetic_world(24, 8, 0, 0.0, s.max_candidates)
    else:
        train = load_from_disk(str(Path(s.data) / s.train_split))
        report = load_from_disk(str(Path(s.data) / s.eval_split))
    kept = len(train) - s.tuning_questions
    chosen = report if s.evaluate_on == "report" else train.select(range(kept, len(train)))
    return train.select(range(kept)), chosen.select(range(min(len(chosen), s.eval_questions or len(chosen))))


def print_visible(s: Settings, dataset: Dataset) -> None:
    """Prints what is left to see of the candidates that contain an answer when documents are cut."""
    tokenizer = AutoTokenizer.from_pretrained(s.base)
    print("| tokens of a document | candidates with an answer that show it | ", end="")
    print(f"Recall@1 | Recall@{s.num_selected} | Recall@{s.max_candidates} |\n|---|---|---|---|---|")
    for length in s.lengths:
        shown, recalls = [], []
        for record in dataset:
            documents, answers = record["documents"][: s.max_candidates], record["answers"]
            cut = tokenizer([document_body(document) for document in documents], add_special_tokens=False).input_ids
            texts = [tokenizer.decode(ids[:length]) for ids in cut]
            shown += [has_answer(t, answers) for t, d in zip(texts, documents, strict=True) if is_relevant(d, record)]
            recalls.append([recall_at_k(texts, answers, k) for k in (1, s.num_selected, s.max_candidates)])
        numbers = [sum(shown) / len(shown), *(sum(column) / len(column) for column in zip(*recalls, strict=True))]
        print(f"| {length} | " + " | ".join(f"{100 * number:.1f}" for number in numbers) + " |")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = HfArgumentParser(Settings, description=__doc__)
    s = Settings(**vars(parser.parse_args(arguments)))
    if s.quick:
        s = Settings(**asdict(s) | QUICK)
    out = Path(s.out)
    out.mkdir(parents=True, exist_ok=True)
    train_dataset, eval_dataset = load_data(s)
    if s.lengths:
        print_visible(s, train_dataset)
        return
    runs = [Run(s, arm, seed, train_dataset, eval_dataset) for seed in s.seeds for arm in s.arms]
    done = {row["run"] for row in read_rows(out)}
    for run in runs:
        if run.name not in done:
            result = run.execute()
            scores = ", ".join(f"{name} {100 * result[name]:.1f}" for name in ("em", "em_retriever", "recall@1"))
            print(f"{run.name}: {scores}", flush=True)
    wanted = {run.name for run in runs}
    for path in write_report([row for row in read_rows(out) if row["run"] in wanted], out):
        print(path)


if __name__ == "__main__":
    main()
