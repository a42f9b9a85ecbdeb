# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""The results that `learning.py` collects: their file, tables and figures, with 95% intervals over seeds."""

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


try:
    import matplotlib
    from scipy.stats import t
except ImportError as error:
    raise ImportError(f"{error.name} is missing: pip install trl_dro[dev,plots]") from error

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import NullLocator  # noqa: E402


Row = dict[str, Any]

PERCENTAGES = {
    "em": "EM, %",
    "f1": "F1, %",
    "recall@1": "Recall@1, %",
    "recall@3": "Recall@3, %",
    "recall@5": "Recall@5, %",
}
NUM_PERMUTATIONS = (1, 2, 4, 8, 16)
VARIANCES = {
    "weight_variance": "importance weights",
    "likelihood_variance": "estimate of p(y|x)",
    "rws_gradient_variance": "selector's gradient, rws",
    "rws_centered_gradient_variance": "selector's gradient, rws_centered",
    "generator_gradient_variance": "generator's gradient",
}
RELIANCE = {"follows": "answers with the new name, %", "keeps": "keeps the true answer, %"}


class Results:
    """
    Rows of `results.jsonl`, appended one by one. Rows of runs that did not get to their last iteration are dropped,
    and so is a last line that was cut off.

    Args:
        path (`Path`): the file, which need not exist.

    Raises:
        `ValueError`: a line other than the last is not JSON.
    """

    def __init__(self, path: Path):
        self.path = path
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = text.splitlines()
        rows: list[Row] = []
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                if number < len(lines):
                    raise ValueError(f"{path}, line {number}: is not JSON ({error.msg}); remove the line") from None
        complete = {self._key(row) for row in rows if row["iteration"] == row["iterations"]}
        self.rows: list[Row] = [row for row in rows if self._key(row) in complete]
        if len(self.rows) < len(lines) or not text.endswith("\n"):
            mended = path.with_suffix(".tmp")
            mended.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
            os.replace(mended, path)

    @staticmethod
    def _key(row: Row) -> tuple[str, str, str]:
        return row["run"], row["experiment"], row["setting"]

    def add(self, row: Row) -> None:
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def of(self, run: str) -> dict[tuple[str, str], list[Row]]:
        """Rows of a run, by the experiment and the setting they were recorded for."""
        found = defaultdict(list)
        for row in self.rows:
            if row["run"] == run:
                found[row["experiment"], row["setting"]].append(row)
        return found


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95% interval by Student's t, which one value does not have (NaN)."""
    if len(values) < 2:
        return values[0], math.nan
    return mean(values), float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def cell(values: list[float], form: str = ".1f", scale: float = 1.0) -> str:
    if not values:
        return ""
    center, half = interval([scale * value for value in values])
    return f"{center:{form}}" + ("" if math.isnan(half) else f" ± {half:{form.lstrip('+')}}")


def write_report(rows: list[Row], out: Path) -> list[Path]:
    """
    Prints a table of every experiment and writes them to `tables.md`, with a figure of each beside it.

    Args:
        rows (`list[dict]`): rows of `results.jsonl`.
        out (`Path`): folder.

    Returns:
        `list[Path]`: what was written.
    """
    tables, written = [], []
    for experiment, world_seed in dict.fromkeys((row["experiment"], row["world_seed"]) for row in rows):
        chosen = [row for row in rows if (row["experiment"], row["world_seed"]) == (experiment, world_seed)]
        title = f"{experiment}, world {world_seed}, {len({row['seed'] for row in chosen})} seed(s)"
        tables.append((title, scores_table(chosen)))
        tables.append((f"{title}: IWAE bound in nats, then its rise in every iteration", bound_table(chosen)))
        figures: dict[str, Callable[[list[Row]], plt.Figure]] = {experiment: curves}
        if probed := [row for row in chosen if "weight_variance@4" in row]:
            tables.append((f"{title}: variances by iteration and m, at the weights of m=8", variance_table(probed)))
            figures["variance"] = variance_figure
        if any("follows" in row for row in chosen):
            tables.append((f"{title}: reliance on the documents", reliance_table(chosen)))
            figures["reliance"] = reliance_figure
        if len({row["documents"] for row in chosen if "documents" in row}) > 1:
            figures["documents"] = documents_figure
        for name, draw in figures.items():
            figure = draw(chosen)
            figure.suptitle(title, fontsize=10)
            written.append(out / f"{name}_world{world_seed}.png")
            figure.savefig(written[-1], dpi=130)
            plt.close(figure)
    with (out / "tables.md").open("w", encoding="utf-8") as file:
        for console in (Console(width=200), Console(file=file, width=200)):
            for title, table in tables:
                console.print(f"\n**{title}**\n", markup=False, highlight=False)
                console.print(table)
    return [out / "results.jsonl", out / "tables.md", *written]


def final(rows: Iterable[Row], setting: str) -> dict[int, Row]:
    """Last rows of a setting by seed."""
    return {row["seed"]: row for row in rows if row["setting"] == setting and row["iteration"] == row["iterations"]}


def settings_of(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["setting"] for row in rows))


def new_table(first: str, headings: Iterable[str]) -> Table:
    table = Table(box=box.MARKDOWN)
    table.add_column(first)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def scores_table(rows: list[Row]) -> Table:
    """Scores of the retriever, the warm start and every setting, and what the first setting has over the others."""
    reference, *others = settings_of(rows)
    names = {name: heading for name, heading in PERCENTAGES.items() if name in rows[0]}
    more = {"documents": "documents"} if len({row.get("documents") for row in rows}) > 1 else {}
    more |= {"seconds": "seconds"}
    headings = [*names.values(), "IWAE, nats", *more.values(), f"lead of {reference}, EM"]
    table = new_table("setting", headings)
    start = [row for row in rows if row["setting"] == reference and row["iteration"] == 0]
    retriever = [
        cell([row[f"retriever_{name}"] for row in start if f"retriever_{name}" in row], scale=100) for name in names
    ]
    table.add_row(f"retriever ({reference})", *retriever)

    def scores(chosen: Iterable[Row]) -> list[str]:
        chosen = list(chosen)
        percentages = [cell([row[name] for row in chosen if name in row], scale=100) for name in names]
        means = [cell([row[name] for row in chosen if name in row], ".2f") for name in ("iwae", *more)]
        return [*percentages, *means]

    table.add_row(f"warm start ({reference})", *scores(start))
    best = final(rows, reference)
    for setting in (reference, *others):
        last = final(rows, setting)
        pairs = [best[seed]["em"] - row["em"] for seed, row in last.items() if seed in best]
        table.add_row(setting, *scores(last.values()), "" if setting == reference else cell(pairs, "+.1f", 100))
    return table


def bound_table(rows: list[Row]) -> Table:
    """The bound before training and, paired by seed, how much each iteration raised it."""
    iterations = sorted({row["iteration"] for row in rows})
    table = new_table("setting", ["before", *(f"iteration {i}" for i in iterations[1:])])
    for setting in settings_of(rows):
        bounds = {(row["seed"], row["iteration"]): row["iwae"] for row in rows if row["setting"] == setting}
        seeds = sorted({seed for seed, _ in bounds})
        rises = [
            [bounds[seed, i] - bounds[seed, i - 1] for seed in seeds if (seed, i) in bounds] for i in iterations[1:]
        ]
        table.add_row(
            setting, cell([bounds[seed, 0] for seed in seeds], ".2f"), *(cell(values, "+.2f") for values in rises)
        )
    return table


def variance_table(rows: list[Row]) -> Table:
    table = new_table("variance of", ["iteration", *(f"m={m}" for m in NUM_PERMUTATIONS)])
    for name, label in VARIANCES.items():
        for iteration in sorted({row["iteration"] for row in rows}):
            chosen = [row for row in rows if row["iteration"] == iteration]
            means = [mean(row[f"{name}@{m}"] for row in chosen) for m in NUM_PERMUTATIONS]
            table.add_row(label, str(iteration), *(f"{value:.2g}" for value in means))
    return table


def reliance_table(rows: list[Row]) -> Table:
    table = new_table("setting", ["likelihood gain, nats", "questions changed, %", *RELIANCE.values()])
    first = settings_of(rows)[0]
    groups = {"warm start": [row for row in rows if row["setting"] == first and row["iteration"] == 0]}
    groups |= {setting: list(final(rows, setting).values()) for setting in settings_of(rows)}
    for name, chosen in groups.items():
        shares = [cell([row[key] for row in chosen], scale=100) for key in ("changed_share", *RELIANCE)]
        table.add_row(name, cell([row["likelihood_gain"] for row in chosen], ".2f"), *shares)
    return table


def curves(rows: list[Row]) -> plt.Figure:
    """EM, Recall@1 and the IWAE bound against the iteration, with intervals over seeds."""
    metrics = {"em": ("EM, %", 100), "recall@1": ("Recall@1, %", 100), "iwae": ("IWAE bound, nats", 1)}
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    for axis, (name, (label, scale)) in zip(axes, metrics.items(), strict=True):
        for setting in settings_of(rows):
            chosen = [row for row in rows if row["setting"] == setting]
            iterations = sorted({row["iteration"] for row in chosen})
            values = [
                interval([scale * row[name] for row in chosen if row["iteration"] == iteration])
                for iteration in iterations
            ]
            centers = [center for center, _ in values]
            [line] = axis.plot(iterations, centers, marker="o", markersize=3, label=setting)
            low, high = [c - h for c, h in values], [c + h for c, h in values]
            axis.fill_between(iterations, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set(xlabel="iteration", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure


def documents_figure(rows: list[Row]) -> plt.Figure:
    """EM against the documents that the selector lets the generator read, before training and after each iteration."""
    figure, axis = plt.subplots(figsize=(6, 4.2), constrained_layout=True)
    for place, setting in enumerate(settings_of(rows)):
        chosen = [row for row in rows if row["setting"] == setting]
        iterations = sorted({row["iteration"] for row in chosen})
        points = [
            tuple(mean(scale * row[name] for row in chosen if row["iteration"] == i) for i in iterations)
            for name, scale in (("documents", 1), ("em", 100))
        ]
        [line] = axis.plot(*points, marker=".", alpha=0.5)
        # Rings of several sizes, so that equal results do not hide each other.
        ring = {"markersize": 20 - 3 * place, "markeredgewidth": 1.5, "fillstyle": "none"}
        axis.plot(points[0][-1], points[1][-1], "o", color=line.get_color(), label=setting, **ring)
    most = max(row["documents"] for row in rows)
    top = 110 * max(row["em"] for row in rows)
    axis.set(xlabel="documents per question", ylabel="EM, %", xlim=(-0.1, 1.1 * most), ylim=(0, top))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, title="after the last iteration", loc="lower left", markerscale=0.5)
    return figure


def variance_figure(rows: list[Row]) -> plt.Figure:
    """Variances against m by iteration, and final EM against m."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), constrained_layout=True)
    probed = [row for row in rows if "weight_variance@4" in row]
    colors = plt.get_cmap("viridis")
    last = max(row["iteration"] for row in probed)
    for axis, (name, label) in zip(axes.flat, VARIANCES.items(), strict=False):
        for iteration in sorted({row["iteration"] for row in probed}):
            chosen = [row for row in probed if row["iteration"] == iteration]
            points = [(m, mean(row[f"{name}@{m}"] for row in chosen)) for m in NUM_PERMUTATIONS]
            # m = 1 has one weight of 1, and no gradient once centred: a logarithm has no place for either.
            points = [(m, value) for m, value in points if value > 0]
            axis.plot(*zip(*points, strict=True), marker="o", color=colors(iteration / max(1, last)), label=iteration)
        axis.set(xscale="log", yscale="log", xlabel="m", title=f"variance of {label}")
    axes.flat[0].legend(title="iteration", fontsize=7, frameon=False)
    by_m = {int(s.removeprefix("m=")): s for s in settings_of(rows)}
    results = {m: interval([100 * row["em"] for row in final(rows, by_m[m]).values()]) for m in sorted(by_m)}
    centers, halves = zip(*results.values(), strict=True)
    axes.flat[5].errorbar(list(results), centers, halves, marker="o", capsize=3)
    axes.flat[5].set(xscale="log", xlabel="m", ylabel="EM, %", title="after the last iteration")
    for axis in axes.flat:
        axis.set_xticks(NUM_PERMUTATIONS, NUM_PERMUTATIONS)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def reliance_figure(rows: list[Row]) -> plt.Figure:
    """Likelihood gain of the documents, and answers to changed passages, against the iteration."""
    panels = {"likelihood_gain": ("likelihood gain over empty documents, nats", 1)}
    panels |= {name: (label, 100) for name, label in RELIANCE.items()}
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    for axis, (name, (label, scale)) in zip(axes, panels.items(), strict=True):
        for setting in settings_of(rows):
            chosen = [row for row in rows if row["setting"] == setting]
            iterations = sorted({row["iteration"] for row in chosen})
            values = [
                interval([scale * row[name] for row in chosen if row["iteration"] == iteration])
                for iteration in iterations
            ]
            centers, halves = zip(*values, strict=True)
            axis.errorbar(iterations, centers, halves, marker="o", markersize=3, capsize=3, label=setting)
        axis.set(xlabel="iteration", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    return figure
