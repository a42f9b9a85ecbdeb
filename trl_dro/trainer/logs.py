# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Averages between two logs, over all processes, and the table of permutations."""

import importlib
import json
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, Trainer

from ..data.storage import write_whole
from ..model.codec import PermutationCodec
from ..model.prompts import question_text
from ..model.sampling import PermutationSamples
from ..model.shared_prefix import TokenCount


# Not uploaded with the run: names with an underscore are not, and the questions may be private.
PERMUTATIONS_FOLDER = "_permutations"
QUESTIONS_PER_LOG = 4  # kept when log_permutations is off


class RunningMeans:
    """
    Means of named quantities since the last call of [`~RunningMeans.pop`]. Sums stay on the device: reading them at
    every step would wait for the GPU.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Device, and processes to sum over.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.totals: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        """Adds `total`, the sum of `count` values, to the quantity `name`."""
        pair = torch.stack(
            [torch.as_tensor(x, device=self.accelerator.device).detach().float() for x in (total, count)]
        )
        self.totals[name] = self.totals[name] + pair if name in self.totals else pair

    def add_all(self, name: str, values: Tensor) -> None:
        """Adds every element of `values`, which may be empty."""
        self.add(name, values.float().sum(), values.numel())

    def add_speed(self, seconds: dict[str, float], count: TokenCount) -> None:
        """Adds the seconds that each step took, and the tokens that went through a model in them."""
        for name, value in seconds.items():
            self.add(f"{name}_seconds", value)
        # Processes work side by side: their tokens add up, their seconds do not.
        self.add("tokens_per_second", count.tokens, sum(seconds.values()) / self.accelerator.num_processes)
        self.add("padding_share", count.padded - count.tokens, count.padded)

    def pop(self) -> dict[str, float]:
        """Means over all processes, which must have added the same names; forgets them."""
        if not self.totals:
            return {}
        names = sorted(self.totals)
        sums = self.accelerator.reduce(torch.stack([self.totals[name] for name in names]), reduction="sum")
        self.totals.clear()
        return {name: total / count for name, (total, count) in zip(names, sums.tolist(), strict=True) if count > 0}


def permutation_table(rows: Sequence[dict[str, Any]]) -> Table:
    """
    Table of the permutations of one question, the heaviest first.

    Args:
        rows (`list[dict]`):
            Output of [`permutation_rows`] for one question.

    Returns:
        [`~rich.table.Table`]
    """
    first = rows[0]
    title = Text(f"Step {first['step']}\nQ: {first['question']}\nA: {first['answer']}")
    table = Table(title=title, title_justify="left")
    for heading in ("permutation", "documents"):
        table.add_column(heading)
    for heading in ("log p(z|x)", "log p(y|x,z)", "weight"):
        table.add_column(heading, justify="right")
    for row in sorted(rows, key=lambda row: -row["weight"]):
        table.add_row(
            # Text, because rich reads brackets, of a title say, as markup.
            Text(row["permutation"]),
            Text(", ".join(row["titles"])),
            f"{row['logp']:.2f}",
            f"{row['answer_logp']:.2f}",
            f"{row['weight']:.3f}",
        )
    return table


def _heading(document: dict[str, Any]) -> str:
    """What a document is called: its title, its id, or how it begins."""
    return document.get("title") or document.get("id") or textwrap.shorten(document["text"], 40, placeholder=" …")


def permutation_rows(
    step: int,
    questions: Sequence[dict[str, Any]],
    targets: Sequence[Sequence[str]],
    samples: PermutationSamples,
    answer_logps: Tensor,
    weights: Tensor,
) -> list[dict[str, Any]]:
    """
    One dict per sampled permutation, for [`permutation_table`] and [`save_permutations`].

    Args:
        step (`int`):
            Update, from 1.
        questions (`list[dict]` of length `B`):
            Questions with their documents in the order that the permutations refer to.
        targets (`list[list[str]]` of length `B`):
            Answers of each question; the first is shown.
        samples ([`~sampling.PermutationSamples`]):
            Permutations and their log-probabilities.
        answer_logps (`Tensor` of shape `(B, m)`):
            Log-likelihoods of the answers, in nats.
        weights (`Tensor` of shape `(B, m)`):
            Weights of the permutations.

    Returns:
        `list[dict]` of length `B * m`: question by question.
    """
    columns = (samples.permutations, samples.logps, answer_logps, weights)
    return [
        {
            "step": step,
            "question": question_text(question["question"]),
            "answer": target[0],
            "permutation": PermutationCodec.text(permutation),
            "titles": [_heading(question["documents"][i - 1]) for i in permutation if i],
            "logp": logp,
            "answer_logp": answer_logp,
            "weight": weight,
        }
        for question, target, *samples_of_question in zip(
            questions, targets, *(column.tolist() for column in columns), strict=True
        )
        for permutation, logp, answer_logp, weight in zip(*samples_of_question, strict=True)
    ]


def print_permutations(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the permutations of one question to the terminal."""
    Console().print(permutation_table(rows))


def save_permutations(rows: Sequence[dict[str, Any]], output_dir: str | Path, report_to: Sequence[str]) -> None:
    """Writes rows to `_permutations/step-N.jsonl` in the output folder, and as a table to wandb or trackio."""
    folder = Path(output_dir) / PERMUTATIONS_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(folder / f"step-{rows[0]['step']}.jsonl", lines)
    for backend in {"wandb", "trackio"} & set(report_to):
        module = importlib.import_module(backend)
        module.log({"permutations": module.Table(dataframe=pandas.DataFrame(list(rows)))})


def keep_permutations(
    rows: Sequence[dict[str, Any]],
    num_permutations: int,
    show: bool,
    output_dir: str | Path,
    report_to: Sequence[str],
) -> None:
    """Shows the first question's permutations and saves those of all, or else saves a few for `trl-dro report`."""
    if show:
        print_permutations(rows[:num_permutations])
        save_permutations(rows, output_dir, report_to)
    else:
        save_permutations(rows[: QUESTIONS_PER_LOG * num_permutations], output_dir, [])


def warn_of_collapse(unique_share: float, step: int) -> None:
    """Warns that few of the sampled permutations, this share of them, are distinct at an update."""
    warnings.warn(
        f"only {unique_share:.0%} of the sampled permutations are distinct at step {step}: the selector repeats "
        "itself and has little left to compare. If its recall is not yet good, raise `temperature`, lower its "
        "learning rate, or stop it with train_selector=False.",
        stacklevel=3,
    )


class LogLine(PrinterCallback):
    """Prints what matters of each log in one line; all of it is in `log_history.jsonl`."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_local_process_zero and logs:
            print(log_line(logs, state.global_step, state.max_steps), flush=True)


class LogLineAboveProgress(ProgressCallback):
    """The same above a progress bar."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and logs:
            self.training_bar.write(log_line(logs, state.global_step, state.max_steps))


def show_readable_logs(trainer: Trainer) -> None:
    """Has a trainer show one line of each log, where it would show a dict of all numbers."""
    for usual, readable in ((PrinterCallback, LogLine), (ProgressCallback, LogLineAboveProgress)):
        if trainer.pop_callback(usual) is not None:
            trainer.add_callback(readable)


def log_line(logs: Mapping[str, Any], step: int, max_steps: int) -> str:
    """
    What matters of a log in one readable line.

    Args:
        logs (`dict[str, float]`):
            What the trainer logs: means of training, scores of an evaluation, or totals at the end.
        step (`int`):
            Update, from 1.
        max_steps (`int`):
            Updates of the run.

    Returns:
        `str`
    """
    if "loss" in logs:
        start = f"update {step} of {max_steps}"
        shown = {"loss": ("loss", "{:.3f}"), "iwae_bound": ("bound", "{:.2f} nats"), "ess": ("ESS", "{:.1f}")}
        shown |= {"unique_permutations": ("distinct", "{:.1f}"), "grad_norm": ("gradient", "{:.2g}")}
        shown |= {"learning_rate": ("rate", "{:.1e}"), "skipped_update_share": ("left out", "{:.0%}")}
        logs = {name: value for name, value in logs.items() if name != "skipped_update_share" or value}
    elif "eval_em" in logs:
        start = f"evaluation at update {step}"
        shown = {"eval_em": ("EM", "{:.1%}"), "eval_f1": ("F1", "{:.1%}"), "eval_contains": ("contains", "{:.1%}")}
        recalls = [name for name in logs if name.startswith("eval_recall@")]
        shown |= {name: (name.removeprefix("eval_").capitalize(), "{:.1%}") for name in recalls}
        shown |= {"eval_iwae_bound": ("bound", "{:.2f} nats")}
    elif "selector/query_likelihood_scale" in logs:
        start = "selector fitted to the answers"
        names = ("query_likelihood_scale", "retriever_prior")
        shown = {f"selector/{name}": (name, "{:.3g}") for name in names}
    elif "train_runtime" in logs:
        return f"trained for {logs['train_runtime']:.0f} s"
    else:
        return ", ".join(f"{name} {value:.4g}" for name, value in logs.items())
    parts = [f"{label} {form.format(logs[name])}" for name, (label, form) in shown.items() if name in logs]
    return f"{start}: {', '.join(parts)}"


def comparison_table(before: dict[str, float], after: dict[str, float]) -> Table:
    """
    Table of two evaluations of the same questions, with the retriever's own recall beside the selector's.

    Args:
        before (`dict[str, float]`):
            Output of `DROTrainer.evaluate` before training.
        after (`dict[str, float]`):
            The same after training.

    Returns:
        [`~rich.table.Table`]: percentages, and bounds in nats.
    """
    table = Table(title="Evaluation", title_justify="left")
    table.add_column("")
    for heading in ("retriever", "before", "after", "change"):
        table.add_column(heading, justify="right")
    shares = {"em": "exact match, %", "f1": "F1, %", "contains": "contains answer, %"}
    before, after = ({name.removeprefix("eval_"): value for name, value in m.items()} for m in (before, after))
    shares |= {name: f"Recall{name.removeprefix('recall')}, %" for name in before if name.startswith("recall@")}
    for name, label in shares.items():
        retriever = before.get(f"retriever_{name}")
        old, new = 100 * before[name], 100 * after[name]
        first = "" if retriever is None else f"{100 * retriever:.1f}"
        table.add_row(label, first, f"{old:.1f}", f"{new:.1f}", f"{new - old:+.1f}")
    for name, label in (("elbo", "ELBO, nats"), ("iwae_bound", "IWAE bound, nats")):
        old, new = before[name], after[name]
        table.add_row(label, "", f"{old:.2f}", f"{new:.2f}", f"{new - old:+.2f}")
    return table


def print_comparison(before: dict[str, float], after: dict[str, float]) -> None:
    """Prints [`comparison_table`] to the terminal."""
    Console().print(comparison_table(before, after))
