# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""A run on one page: a self-contained HTML file, and its figures as PNG beside it."""

import json
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.lines import read_jsonl
from ..data.storage import as_path, make_folder, write_whole
from ..evaluation.evaluation import QUESTIONS_FILE, SUMMARY_FILE
from ..system.rag_config import CONFIG_FILE, RAGConfig
from ..trainer.log_history import permutation_files, read_lines, read_log_history
from .sections import (
    answers_section,
    errors_section,
    evaluations_of,
    examples_section,
    headline,
    learning_section,
    questions_of,
    selection_section,
    weights_section,
)


try:
    from jinja2 import Environment, StrictUndefined
except ImportError:
    raise ImportError("the report needs jinja2: pip install 'trl_dro[plots]'") from None


PAGE_FILE = "report.html"


def write_report(run: str | Path, output_dir: str | Path | None = None, evaluation: Sequence[str] = ()) -> Path:
    """
    Writes `report.html`, which holds everything it shows, and each figure as PNG.

    Args:
        run (`str` or `Path`):
            Output folder of a trainer, at the end of training or in the midst of it.
        output_dir (`str` or `Path`, *optional*):
            Folder of `report.html` and of the figures; `report` in the run's folder by default.
        evaluation (`list[str]`, *optional*):
            Folders of evaluations, whose causes of errors are shown too, and answers of the last one.

    Returns:
        `Path`: the page.

    Raises:
        `ImportError`: matplotlib is missing.
        `ValueError`: the folder is no run or has no logs yet, an evaluation is not finished, or a file is damaged.
    """
    run = as_path(run, "run")
    history = read_log_history(run)
    questions = questions_of([row for path, _ in permutation_files(run) for row in read_lines(path)])
    evaluated = {_name(folder, evaluation): _read_evaluation(Path(folder)) for folder in evaluation}
    answered = evaluated[_name(evaluation[-1], evaluation)][1] if evaluation else []
    evaluations = evaluations_of(history)
    num_permutations = max(map(len, questions), default=None)

    evaluating = (
        "is evaluated by trainer.evaluate(), before and after training, and in between with --eval_strategy steps "
        "--eval_steps N, given an eval_dataset"
    )
    training = "is logged by DROTrainer.train() every --logging_steps updates"
    outcomes = (
        f"come from trl-dro evaluate --model {run} --dataset_name DATASET --output_dir RESULTS, then trl-dro "
        f"report {run} --evaluation RESULTS"
    )
    sections = {
        f"Learning curves: what they show {training}.": learning_section(history, evaluations, num_permutations),
        f"Selection: Recall@k {evaluating}.": selection_section(evaluations),
        f"Answers: exact match and F1 {evaluating}.": answers_section(evaluations),
        f"Importance weights: a sample of them {training}.": weights_section(questions),
        f"Errors: their causes {outcomes}.": errors_section(evaluated),
        f"Examples: a sample of permutations {training}.": examples_section(questions, answered),
    }
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined).from_string(
        Path(__file__).with_name(PAGE_FILE).read_text(encoding="utf-8")
    )
    present = [section for section in sections.values() if section is not None]
    folder = run / "report" if output_dir is None else Path(output_dir)
    make_folder(folder)
    for picture in (picture for section in present for picture in section.pictures):
        (folder / f"{picture.name}.png").write_bytes(picture.png)
    path = folder / PAGE_FILE
    write_whole(
        path,
        page.render(
            name=run.resolve().name,
            facts=_facts(run, history, num_permutations),
            headline=headline(evaluations),
            sections=present,
            absent=[sentence for sentence, section in sections.items() if section is None],
            base64=lambda data: b64encode(data).decode("ascii"),
        ),
    )
    print(f"The report is {path}.")
    return path


def _facts(run: Path, history: Sequence[dict[str, Any]], num_permutations: int | None) -> list[str]:
    """How long the run was, and its sizes where they are known."""
    facts = [f"{max(row['step'] for row in history):,} updates"]
    epochs = [row["epoch"] for row in history if row.get("epoch") is not None]
    if epochs:
        facts.append(f"{max(epochs):.2f} epochs")
    if (run / CONFIG_FILE).is_file():
        values = RAGConfig.load(run / CONFIG_FILE, {"selector_template": "", "generator_template": ""})
        facts.append(f"K = {values.num_selected} documents selected of up to n = {values.max_candidates}")
    if num_permutations is not None:
        facts.append(f"m = {num_permutations} permutations per question")
    return facts


def _name(folder: str, folders: Sequence[str]) -> str:
    """Name of an evaluation: that of its folder, or the whole path where two folders have one name."""
    names = [Path(other).resolve().name for other in folders]
    name = Path(folder).resolve().name
    return name if names.count(name) == 1 else folder


def _read_evaluation(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Summary and questions of a finished evaluation."""
    for name in (SUMMARY_FILE, QUESTIONS_FILE):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} is not a finished evaluation, it has no {name}: run trl-dro evaluate --output_dir {folder}"
            )
    try:
        summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
        rows = [row for _, row in read_jsonl(folder / QUESTIONS_FILE)]
        if not rows or any("outcome" not in row for row in rows) or "metrics" not in summary:
            raise ValueError("fields are missing")
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"the evaluation in {folder} is damaged ({error}): delete the folder and run trl-dro evaluate again"
        ) from None
    return summary, rows
