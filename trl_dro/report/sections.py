# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""What each section of a report shows. A section that nothing is known for is `None`."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from ..evaluation.summary import ERRORS, metric_label
from .figures import COLOURS, bars, curves, histogram, stacked_shares


Row = dict[str, Any]
# Of one set of questions: metrics without prefix, by update.
Evaluations = dict[int, Row]

# Name in the logs, what it is with its unit, factor and digits.
QUANTITIES = (
    ("selector/loss", "selector's loss, nats per question", 1, 3),
    ("generator/loss", "generator's loss, nats per question", 1, 3),
    ("elbo", "ELBO, nats per question", 1, 2),
    ("iwae_bound", "IWAE bound, nats per question", 1, 2),
    ("ess", "effective sample size, permutations", 1, 2),
    ("unique_permutations", "distinct permutations per question", 1, 2),
    ("selector/documents", "documents per question", 1, 2),
    ("selector/entropy", "selector's entropy, nats", 1, 2),
    ("tiny_likelihood_share", "questions whose answer is unlikely under every permutation, %", 100, 1),
    ("masked_question_share", "questions left out for a likelihood that is not finite, %", 100, 1),
    ("skipped_update_share", "updates left out for a gradient that is not finite, %", 100, 1),
    ("tokens_per_second", "tokens per second, all processes", 1, 0),
)
# Outcomes of `scoring.score_question` in the order of the way from corpus to answer, and what they mean.
OUTCOMES = {
    "correct": ("correct", "exact match with a gold answer"),
    "not_answered": ("not answered", "a selected document contains the answer, the generator did not give it"),
    "not_selected": ("not selected", "a candidate contains the answer, no selected document does"),
    "not_retrieved": ("not among candidates", "no candidate contains the answer"),
}
SHOWN_QUESTIONS = 4
SHOWN_PERMUTATIONS = 8  # of a question, the heaviest
SHOWN_EVALUATIONS = 12


@dataclass
class Picture:
    """A figure, the name of its file, what it shows for those who do not see it, and its caption."""

    name: str
    png: bytes
    alt: str
    caption: str


@dataclass
class Table:
    """Rows of text below their headings; the first cell of a row is its heading."""

    caption: str
    columns: list[str]
    rows: list[list[str]]


@dataclass
class Sampled:
    """A training question with its permutations: documents, both log-probabilities in nats, and weight."""

    question: str
    answer: str
    step: int
    permutations: list[tuple[str, str, str, float]]
    left_out: int


@dataclass
class Section:
    """What is under one heading."""

    title: str
    text: str
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    sampled: list[Sampled] = field(default_factory=list)
    answered: list[dict[str, str]] = field(default_factory=list)  # heading and text of each part of a question


def evaluations_of(history: Iterable[Row]) -> dict[str, Evaluations]:
    """Evaluations while training by name of the dataset, empty if there is one, and update."""
    found: dict[str, Evaluations] = defaultdict(dict)
    for row in history:
        for key in row:
            if match := re.fullmatch(r"(eval_(?:(.+)_)?)em", key):
                metrics = {name.removeprefix(match[1]): value for name, value in row.items()}
                found[match[2] or ""][row["step"]] = metrics
    return {name: dict(sorted(rows.items())) for name, rows in found.items()}


def headline(evaluations: Mapping[str, Evaluations]) -> list[tuple[str, str, str]]:
    """Name with unit, value and update of the scores that matter most, first and last."""
    tiles = []
    for dataset, rows in evaluations.items():
        (first_step, first), (last_step, last) = list(rows.items())[0], list(rows.items())[-1]
        for name, label, shown in (
            ("em", "Exact match, %", _percent),
            ("f1", "F1, %", _percent),
            ("recall@1", "Recall@1, %", _percent),
            ("iwae_bound", "IWAE bound, nats", _nats),
        ):
            if name not in last:
                continue
            once = first_step == last_step
            value = shown(last[name]) if once else f"{shown(first.get(name))} → {shown(last[name])}"
            when = _when(last_step) if once else f"{_when(first_step)} → {_when(last_step)}"
            tiles.append((f"{label}{_of(dataset)}", value, when))
    return tiles


def learning_section(
    history: Sequence[Row], evaluations: Mapping[str, Evaluations], num_permutations: int | None
) -> Section | None:
    """Losses, bounds and effective sample size over updates."""
    training = [row for row in history if "generator/loss" in row or "selector/loss" in row]
    if not training:
        return None
    text = (
        "Means over the updates since the log before. Bounds are on log p(answer | question), the quantity that "
        "training raises: the IWAE bound is never below the ELBO."
    )
    section = Section("Learning curves", text)

    def draw(name: str, lines: dict[str, list[tuple[float, float]]], ylabel: str, caption: str, limit=None) -> None:
        lines = {label: points for label, points in lines.items() if points}
        if lines:
            alt = f"Line chart, {ylabel}, over updates. {_course(lines)}."
            section.pictures.append(Picture(name, curves(lines, ylabel, limit), alt, caption))

    draw(
        "selector_loss",
        {"selector": _points(training, "selector/loss")},
        "selector's loss, nats",
        "Selector's loss in nats per question. Its weights change with every E-step, so it need not fall: with "
        "rws_centered or vimco it is near 0 throughout.",
    )
    draw(
        "generator_loss",
        {"generator": _points(training, "generator/loss")},
        "generator's loss, nats",
        "Generator's loss, the weighted negative log-likelihood of the answer, in nats per question.",
    )
    bounds = {"ELBO": _points(training, "elbo"), "IWAE bound": _points(training, "iwae_bound")}
    for dataset, rows in evaluations.items():
        held_out = [{"step": step, **row} for step, row in rows.items()]
        bounds[f"IWAE bound, {dataset or 'evaluation'}"] = _points(held_out, "iwae_bound")
    caption = "ELBO and IWAE bound in nats per question; higher is better."
    draw("bounds", dict(list(bounds.items())[: len(COLOURS)]), "nats per question", caption)
    limit = None if num_permutations is None else (num_permutations, f"m = {num_permutations}, all weigh alike")
    draw(
        "ess",
        {"effective sample size": _points(training, "ess")},
        "permutations",
        "Effective sample size in permutations: 1 if a single one has all the weight of its question.",
        limit,
    )
    table = [
        [label, _number(scale, training[0].get(name), digits), _number(scale, training[-1].get(name), digits)]
        for name, label, scale, digits in QUANTITIES
        if any(name in row for row in training)
    ]
    columns = ["quantity", f"update {training[0]['step']}", f"update {training[-1]['step']}"]
    section.tables.append(Table("First and last log of training; units beside each name", columns, table))
    return section


def selection_section(evaluations: Mapping[str, Evaluations]) -> Section | None:
    """Recall@k of the retriever and of the selector, at the first evaluation and at the last."""
    text = (
        "Recall@k is the share of questions for which one of the first k documents contains a gold answer: in the "
        "retriever's order, and in that of the selector."
    )
    if not all(0 in rows for rows in evaluations.values()):
        text += " Evaluate before training too (eval_on_start, or trainer.evaluate()) to see where it began."
    section = Section("Selection", text)
    for number, (dataset, rows) in enumerate(evaluations.items()):
        first, last = min(rows), max(rows)
        cutoffs = [name for name in rows[last] if re.fullmatch(r"recall@\d+", name)]
        if not cutoffs:
            continue
        groups = {"retriever": {name: rows[last][f"retriever_{name}"] for name in cutoffs}}
        for step in sorted({first, last}):
            groups[f"selector, {_when(step)}"] = {name: rows[step][name] for name in cutoffs}
        percentages = {
            who: {name.replace("recall", "Recall"): 100 * value for name, value in values.items()}
            for who, values in groups.items()
        }
        table = [
            [name, *(f"{values[name]:.1f}" for values in percentages.values())]
            for name in next(iter(percentages.values()))
        ]
        values_told = "; ".join(
            f"{row[0]}: " + ", ".join(f"{who} {value}" for who, value in zip(percentages, row[1:], strict=True))
            for row in table
        )
        section.pictures.append(
            Picture(
                _numbered("recall", number),
                bars(percentages, "% of questions"),
                f"Bar chart of Recall@k{_of(dataset)} in percent. {values_told}.",
                f"Recall@k of retriever and selector{_of(dataset)}, % of evaluation questions.",
            )
        )
        section.tables.append(Table(f"Recall@k{_of(dataset)}, %", ["", *percentages], table))
    return section if section.pictures else None


def answers_section(evaluations: Mapping[str, Evaluations]) -> Section | None:
    """Exact match and F1 at every evaluation."""
    if not evaluations:
        return None
    text = "Answers, decoded greedily from the documents that the selector chose, compared with the gold answers."
    section = Section("Answers", text)
    for number, (dataset, rows) in enumerate(evaluations.items()):
        scored = [{"step": step, **row} for step, row in rows.items()]
        lines = {
            label: [(step, 100 * value) for step, value in _points(scored, name)]
            for name, label in (("em", "exact match"), ("f1", "F1"))
        }
        section.pictures.append(
            Picture(
                _numbered("answers", number),
                curves(lines, "%"),
                f"Line chart of exact match and F1{_of(dataset)} in percent over updates. {_course(lines)}.",
                f"Exact match and F1{_of(dataset)} by evaluation, % of evaluation questions.",
            )
        )
        shown = _evenly(scored, SHOWN_EVALUATIONS)
        caption = f"Evaluations{_of(dataset)}: scores of answers in %, bounds in nats per question"
        if len(shown) < len(scored):
            caption += f"; {len(shown)} of {len(scored)}"
        columns = ["update", "epoch", "exact match, %", "F1, %", "contains, %", "ELBO, nats", "IWAE bound, nats"]
        table = [
            [
                str(row["step"]),
                _number(1, row.get("epoch", 0.0), 2),
                _percent(row["em"]),
                _percent(row.get("f1")),
                _percent(row.get("contains")),
                _nats(row.get("elbo")),
                _nats(row.get("iwae_bound")),
            ]
            for row in shown
        ]
        section.tables.append(Table(caption, columns, table))
    return section


def questions_of(permutations: Sequence[Row]) -> list[list[Row]]:
    """Saved permutations question by question."""
    grouped = groupby(permutations, key=lambda row: (row["step"], row["question"], row["answer"]))
    return [list(rows) for _, rows in grouped]


def weights_section(questions: Sequence[Sequence[Row]]) -> Section | None:
    """Distribution of the importance weights, in the first and in the second half of the run."""
    weights: dict[int, list[float]] = defaultdict(list)
    for rows in questions:
        # A likelihood floor makes all of a question's weights smaller.
        total = sum(row["weight"] for row in rows)
        if total > 0:
            weights[rows[0]["step"]] += [row["weight"] / total for row in rows]
    if not weights:
        return None
    steps = sorted(weights)
    late = [step for step in steps if step > (steps[0] + steps[-1]) / 2]
    early = [step for step in steps if step not in late]
    samples = {_span(half): [weight for step in half for weight in weights[step]] for half in (early, late) if half}
    num_permutations = max(len(rows) for rows in questions)
    count = sum(map(len, samples.values()))
    extremes = "; ".join(
        f"{name}: {_percent(sum(w < 0.05 for w in values) / len(values))}% of the weights are below 0.05, "
        f"{_percent(sum(w >= 0.95 for w in values) / len(values))}% are 0.95 or more"
        for name, values in samples.items()
    )
    picture = Picture(
        "weights",
        histogram(
            samples,
            "importance weight",
            "% of permutations",
            (1 / num_permutations, f"1/m = {1 / num_permutations:.3g}"),
        ),
        f"Histogram of importance weights from 0 to 1. {extremes}.",
        f"Importance weights (without unit; those of a question add up to 1), % of permutations. {count:,} weights "
        f"of {len(questions):,} questions, saved at {len(steps):,} "
        f"{'log' if len(steps) == 1 else 'logs'}.",
    )
    text = (
        "How much each sampled permutation counts in the M-step: its share of the answer's likelihood. Weights at 1/m "
        "say that no permutation is better than another; weights at 0 and 1 that a single one decides."
    )
    return Section("Importance weights", text, [picture])


def examples_section(questions: Sequence[Sequence[Row]], answered: Sequence[Row]) -> Section | None:
    """Questions of the last log with their permutations, and an answered question of every outcome."""
    if not questions and not answered:
        return None
    section = Section(
        "Examples",
        "Training questions at the last log, with the permutations that the selector drew and what they weighed"
        + ("; an evaluation question of every outcome." if answered else "."),
    )
    last = [rows for rows in questions if rows[0]["step"] == questions[-1][0]["step"]]
    for rows in last[:SHOWN_QUESTIONS]:
        heaviest = sorted(rows, key=lambda row: -row["weight"])[:SHOWN_PERMUTATIONS]
        permutations = [
            (_documents(row), _nats(row["logp"]), _nats(row["answer_logp"]), row["weight"]) for row in heaviest
        ]
        first = rows[0]
        left_out = len(rows) - len(heaviest)
        section.sampled.append(Sampled(first["question"], first["answer"], first["step"], permutations, left_out))
    for outcome, (label, meaning) in OUTCOMES.items():
        row = next((row for row in answered if row["outcome"] == outcome), None)
        if row is not None:
            section.answered.append(
                {
                    "question": row["question"],
                    "gold answers": "; ".join(row["answers"]),
                    "prediction": row["prediction"] or "(nothing)",
                    "selected candidates": _selected(row),
                    "outcome": f"{label}: {meaning}",
                }
            )
    return section


def errors_section(evaluations: Mapping[str, tuple[Row, list[Row]]]) -> Section | None:
    """Outcomes and metrics of whole evaluations."""
    if not evaluations:
        return None
    counts = {name: Counter(row["outcome"] for row in rows) for name, (_, rows) in evaluations.items()}
    shares = {
        name: {label: 100 * counts[name][outcome] / len(rows) for outcome, (label, _) in OUTCOMES.items()}
        for name, (_, rows) in evaluations.items()
    }
    told = "; ".join(
        f"{name}: " + ", ".join(f"{label} {value:.1f}%" for label, value in row.items())
        for name, row in shares.items()
    )
    picture = Picture(
        "errors",
        stacked_shares(shares, "% of questions"),
        f"Bar chart of outcomes in percent of questions. {told}.",
        "Outcome of each question, % of questions.",
    )
    causes = [
        [f"{label}: {meaning}", *(f"{counts[name][outcome]} ({shares[name][label]:.1f})" for name in evaluations)]
        for outcome, (label, meaning) in OUTCOMES.items()
    ]
    metrics = {name: summary["metrics"] for name, (summary, _) in evaluations.items()}
    names = [name for name in next(iter(metrics.values())) if name not in ERRORS]
    scores = [
        [_label_with_unit(name), *(_interval(name, metrics[who].get(name)) for who in metrics)] for name in names
    ]
    sizes = ", ".join(f"{len(rows):,} questions in {name}" for name, (_, rows) in evaluations.items())
    return Section(
        "Errors",
        "The first cause of each wrong answer on its way from the corpus. Answers that documents state otherwise "
        '("yes") count as not among candidates.',
        [picture],
        [
            Table(f"Outcomes: questions, and % of questions in brackets ({sizes})", ["outcome", *evaluations], causes),
            Table("Scores with bootstrap 95% intervals in brackets", ["metric", *evaluations], scores),
        ],
    )


def _label_with_unit(name: str) -> str:
    label, scale, _ = metric_label(name)
    unit = ", %" if scale == 100.0 else ", nats" if name == "context_gain" else ""
    return label + unit


def _interval(name: str, values: Row | None) -> str:
    if values is None:
        return "–"
    _, scale, digits = metric_label(name)
    mean, low, high = (_number(scale, values[key], digits) for key in ("mean", "low", "high"))
    return f"{mean} ({low}–\N{WORD JOINER}{high})"  # no line ends within an interval


def _points(rows: Iterable[Row], name: str) -> list[tuple[float, float]]:
    return [(row["step"], row[name]) for row in rows if name in row and math.isfinite(row[name])]


def _course(lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """First and last point of each line, in words."""
    told = []
    for name, points in lines.items():
        (first, start), (last, end) = points[0], points[-1]
        until = "" if first == last else f", {end:.2f} at update {last}"
        told.append(f"{name}: {start:.2f} at update {first}{until}")
    return "; ".join(told)


def _documents(row: Row) -> str:
    """Places and titles of a permutation's documents."""
    places = row["permutation"].split(" > ") if row["permutation"] else []
    return " › ".join(f"{place} {title}".strip() for place, title in zip(places, row["titles"], strict=True))


def _selected(row: Row) -> str:
    """Places and ids of an answered question's documents."""
    pairs = zip(row["selected"], row["selected_ids"], strict=True)
    return " › ".join(f"[{place}]" if name is None else f"[{place}] {name}" for place, name in pairs)


def _evenly(rows: list[Row], most: int) -> list[Row]:
    """At most so many rows, the first and the last among them."""
    if len(rows) <= most:
        return rows
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def _span(steps: list[int]) -> str:
    return f"update {steps[0]}" if len(steps) == 1 else f"updates {steps[0]} to {steps[-1]}"


def _when(step: int) -> str:
    return "before training" if step == 0 else f"update {step}"


def _of(dataset: str) -> str:
    return f" on {dataset}" if dataset else ""


def _numbered(name: str, number: int) -> str:
    return name if number == 0 else f"{name}_{number + 1}"


def _number(scale: float, value: float | None, digits: int) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{scale * value:,.{digits}f}".replace("-", "−")


def _percent(value: float | None) -> str:
    return _number(100, value, 1)


def _nats(value: float | None) -> str:
    return _number(1, value, 2)
