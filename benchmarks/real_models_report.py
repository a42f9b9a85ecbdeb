# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
Table and figure of what `real_models.py` collects. Seeds answer the same questions, so that a question is one
observation, with the mean of its seeds: tests over the runs of all seeds would take them for independent.
"""

import itertools
import json
import math
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
from rich import box
from rich.console import Console
from rich.table import Table


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from trl_dro.metrics import bootstrap_interval, paired_permutation_test  # noqa: E402


Row = dict[str, Any]

PRIORS = (0.0, 0.5, 1.0, 2.0)


def read_rows(out: Path) -> list[Row]:
    """Lines of `results.jsonl` in `out`."""
    path = out / "results.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def system(arm: str, name: str) -> str:
    """Score of the system as it would be used: `sft` has no selector of its own."""
    return f"{name}_retriever" if arm == "sft" else name


def by_arm(rows: list[Row], out: Path) -> dict[str, dict[int, list[Row]]]:
    """Rows of questions by arm and seed."""
    found: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        path = out / "runs" / row["run"] / "questions.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines()
        found.setdefault(row["arm"], {})[row["seed"]] = [json.loads(line) for line in lines]
    return found


def compared(ours: list[float], baseline: list[float]) -> str:
    """Difference of two ourss on the same questions in points, its 95% interval, and p."""
    differences = [100 * (a - b) for a, b in zip(ours, baseline, strict=True)]
    low, high = bootstrap_interval(differences)
    p = paired_permutation_test(ours, baseline)
    return f"{mean(differences):+.1f} [{low:+.1f}, {high:+.1f}] p={p:.3f}"


def scores(questions: dict[int, list[Row]], seeds: list[int], name: str) -> list[float]:
    """A score of every question, the mean over seeds."""
    return [mean(float(row[name]) for row in rows) for rows in zip(*(questions[seed] for seed in seeds), strict=True)]


def result_table(rows: list[Row], out: Path) -> Table:
    """One line per arm: means over questions and seeds, EM against `sft`, Recall@K against the retriever."""
    questions = by_arm(rows, out)
    top = max(int(name.split("@")[1]) for name in rows[0] if name.startswith("recall@"))
    table = Table(box=box.MARKDOWN)
    for heading in (
        *("arm", "seeds", "EM", "F1", "EM, retriever's order", "EM, mixture", "Recall@1", f"Recall@{top}"),
        *(f"Recall@{top} against the retriever", "EM against sft", "EM, mixture, against sft"),
        *("EM, mixture, against that of sft", "bound", "ESS", f"Recall@{top} of the posterior", "processor min"),
    ):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for arm, of_seed in questions.items():
        seeds = sorted(of_seed)
        own = [row for row in rows if row["arm"] == arm]

        def percent(name: str, of_seed=of_seed, seeds=seeds) -> str:
            return f"{100 * mean(scores(of_seed, seeds, name)):.1f}"

        def against(name: str, other: str, arm=arm, of_seed=of_seed) -> str:
            """A score compared with one of `sft`, on the questions that have both."""
            sft = questions.get("sft", {})
            both = sorted(of_seed.keys() & sft.keys())
            if (
                not both
                or name not in of_seed[both[0]][0]
                or other not in sft[both[0]][0]
                or (arm, name) == ("sft", other)
            ):
                return ""
            return compared(scores(of_seed, both, name), scores(sft, both, other))

        recall, retriever = (scores(of_seed, seeds, f"{who}recall@{top}") for who in ("", "retriever_"))
        table.add_row(
            *(arm, str(len(seeds)), percent(system(arm, "em")), percent(system(arm, "f1")), percent("em_retriever")),
            percent("em_mixture") if "em_mixture" in next(iter(of_seed.values()))[0] else "",
            *("" if arm == "sft" else percent(f"recall@{k}") for k in (1, top)),
            "" if arm == "sft" else compared(recall, retriever),
            against(system(arm, "em"), system("sft", "em")),
            against("em_mixture", system("sft", "em")),
            against("em_mixture", "em_mixture"),
            *(f"{mean(row[name] for row in own):.2f}" if name in own[0] else "" for name in ("iwae_bound", "ess")),
            percent("posterior_recall") if "posterior_recall" in own[0] else "",
            f"{mean(row['train_seconds'] + row['eval_seconds'] for row in own) / 60:.1f}",
        )
    first = next(iter(questions.values()))
    recalls = [f"{100 * mean(scores(first, sorted(first), f'retriever_recall@{k}')):.1f}" for k in (1, top)]
    table.add_row("retriever", *[""] * 5, *recalls, *[""] * 8)
    return table


def prior_table(rows: list[Row], out: Path) -> Table | None:
    """
    Recall@K of the greedy selection if a retriever's prior were added to the selectors as they are, by its weight.
    Exact: the probabilities of all permutations give those of every choice. `None` where they were not kept.
    """
    table = Table(box=box.MARKDOWN)
    for heading in ("arm", *(f"prior {weight}" for weight in PRIORS), "retriever"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for arm, of_seed in by_arm(rows, out).items():
        kept = [row for questions in of_seed.values() for row in questions if "permutation_logps" in row]
        if not kept:
            return None
        top = len(kept[0]["selected"])
        cells = [mean(found_with_prior(row, weight) for row in kept) for weight in PRIORS]
        cells.append(mean(any(row["relevant"][:top]) for row in kept))
        table.add_row(arm, *(f"{100 * cell:.1f}" for cell in cells))
    return table


def found_with_prior(row: Row, weight: float) -> bool:
    """Whether a relevant document is among those chosen one by one with `weight` times log 1/rank added."""
    number, length = len(row["relevant"]), len(row["selected"])
    every = list(itertools.permutations(range(number), length))
    mass = dict(zip(every, (math.exp(logp) for logp in row["permutation_logps"]), strict=True))
    chosen: tuple[int, ...] = ()
    while len(chosen) < length:
        left = [place for place in range(number) if place not in chosen]
        # The mass of a place is up to a constant its probability after those chosen; the prior multiplies it.
        scores = {
            place: sum(p for z, p in mass.items() if z[: len(chosen) + 1] == (*chosen, place)) / (place + 1) ** weight
            for place in left
        }
        chosen = (*chosen, max(left, key=scores.__getitem__))
    return any(row["relevant"][place] for place in chosen)


def result_figure(rows: list[Row], out: Path) -> plt.Figure:
    """Bound of the training questions by update, and EM and recall of every arm."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5))
    for row in rows:
        curve = [(point["step"], point["iwae_bound"]) for point in row["curve"] if "iwae_bound" in point]
        if curve:
            left.plot(*zip(*curve, strict=True), label=f"{row['arm']}, seed {row['seed']}")
    left.set(xlabel="update", ylabel="bound of training questions, nats")
    if left.lines:
        left.legend(fontsize=7)
    questions = by_arm(rows, out)
    for i, (arm, of_seed) in enumerate(questions.items()):
        values = [100 * v for v in scores(of_seed, sorted(of_seed), system(arm, "em"))]
        low, high = bootstrap_interval(values)
        error = [[mean(values) - low], [high - mean(values)]]
        right.bar(i, mean(values), yerr=error, capsize=3)
    right.set(ylabel="EM, % (95% interval over questions)")
    right.set_xticks(range(len(questions)), list(questions), rotation=20, fontsize=7)
    figure.tight_layout()
    return figure


def write_report(rows: list[Row], out: Path) -> list[Path]:
    """
    Prints the table and writes `table.md` and `figure.png`.

    Args:
        rows (`list[dict]`): lines of `results.jsonl`, at least one.
        out (`Path`): folder, with the rows of each run's questions in `runs/`.

    Returns:
        `list[Path]`: what was written.
    """
    tables = [table for table in (result_table(rows, out), prior_table(rows, out)) if table is not None]
    with (out / "table.md").open("w", encoding="utf-8") as file:
        for console in (Console(width=320), Console(file=file, width=320)):
            for table in tables:
                console.print(table)
    figure = result_figure(rows, out)
    figure.savefig(out / "figure.png", dpi=130)
    plt.close(figure)
    return [out / "table.md", out / "figure.png"]
