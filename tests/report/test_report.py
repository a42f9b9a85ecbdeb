# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import importlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from trl_dro.commands.evaluate import EvaluationArguments, evaluate
from trl_dro.trainer.log_history import LOG_FILE

from ..test_faults import make_trainer
from ..trainer.test_dro_trainer import make_dataset


pytest.importorskip("matplotlib", reason="needs matplotlib: pip install trl_dro[plots]")
from trl_dro.commands.report import ReportArguments, report  # noqa: E402


UNSAFE = "<script>alert(1)</script> & [b]"


def training(step):
    logged = {"loss": 3.0 - step, "selector/loss": -0.1 * step, "generator/loss": 3.0 - 0.9 * step, "ess": 2.5}
    return logged | {"elbo": -9.0 + step, "iwae_bound": -8.0 + step, "epoch": 0.5, "step": step}


def evaluated(step, em, prefix="eval_"):
    scores = {"em": em, "f1": em + 0.1, "contains": em + 0.15, "recall@1": em, "recall@3": em + 0.2}
    scores |= {"retriever_recall@1": 0.25, "retriever_recall@3": 0.35, "elbo": -7.0, "iwae_bound": -6.0 + step}
    return {prefix + name: value for name, value in scores.items()} | {"epoch": 0.5, "step": step}


def permutations(step):
    weights = (0.125, 0.75, 0.125, 0.0)
    return [
        {
            "step": step,
            "question": f"who wrote it at {step}? {UNSAFE}",
            "answer": "Anna",
            "permutation": f"[{i}] > [2]",
            "titles": [f"title {i}", "Ödön"],
            "logp": -1.0 - i,
            "answer_logp": float("nan") if i == 3 else -2.0 - i,
            "weight": weight,
        }
        for i, weight in enumerate(weights)
    ]


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def run(tmp_path):
    """What a run of three updates leaves, evaluated before and after."""
    folder = tmp_path / "run"
    write_lines(folder / LOG_FILE, [evaluated(0, 0.2), *(training(step) for step in (1, 2, 3)), evaluated(3, 0.4)])
    for step in (1, 2, 3):
        write_lines(folder / "_permutations" / f"step-{step}.jsonl", permutations(step))
    return folder


@pytest.fixture
def results(tmp_path):
    """Two finished evaluations of four questions."""
    outcomes = {"before": ["correct", "not_retrieved", "not_retrieved", "not_answered"]}
    outcomes["after"] = ["correct", "correct", "not_selected", "not_retrieved"]
    for name, of_questions in outcomes.items():
        rows = [
            {
                "row": i,
                "question": f"evaluated {i} {name}",
                "answers": ["Anna", "A."],
                "prediction": "" if outcome != "correct" else "Anna",
                "selected": [2, 1],
                "selected_ids": ["p2", None],
                "outcome": outcome,
            }
            for i, outcome in enumerate(of_questions)
        ]
        write_lines(tmp_path / name / "questions.jsonl", rows)
        gain = {"mean": -0.5, "low": -1.5, "high": 0.5, "count": 4}
        metrics = {"em": {"mean": 0.25, "low": 0.0, "high": 0.5, "count": 4}, "context_gain": gain}
        summary = {"num_questions": 4, "metrics": metrics}
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    return [str(tmp_path / name) for name in outcomes]


class Page(HTMLParser):
    """What is on a page: elements with their attributes, and text by the element it is in."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = re.sub(r"\s+", " ", " ".join(text for tag, text in self.texts if tag != "style"))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and data.strip():
            self.texts.append((self.open[-1], data.strip()))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def headings(self):
        return [text for tag, text in self.texts if tag == "h2"]

    def cells(self):
        return [text for tag, text in self.texts if tag in ("td", "th")]


def test_the_page_has_a_section_for_all_that_is_known(run, results):
    path = report(ReportArguments(str(run), evaluation=results))
    assert path == run / "report" / "report.html"
    page = Page(path)
    titles = ["Learning curves", "Selection", "Answers", "Importance weights", "Errors", "Examples"]
    assert page.headings() == titles and page.open == []
    names = "answers bounds errors ess generator_loss recall selector_loss weights".split()
    assert sorted(file.stem for file in path.parent.glob("*.png")) == names
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in path.parent.glob("*.png"))
    assert "3 updates" in page.text and "m = 4 permutations" in page.text


def test_the_page_needs_nothing_from_elsewhere(run):
    page = Page(report(ReportArguments(str(run))))
    assert page.all("script") == page.all("link") == []
    assert page.all("img") and all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert not re.search(r"url\(|@import|\b(?:src|href)=[\"'](?!data:)", page.source)


def test_text_of_a_dataset_is_shown_and_not_obeyed(run):
    page = Page(report(ReportArguments(str(run))))
    assert "<script>" not in page.source
    assert f"who wrote it at 3? {UNSAFE}" in page.text and "[1] title 1 › [2] Ödön" in page.cells()


def test_figures_and_tables_can_be_read_without_seeing_them(run, results):
    page = Page(report(ReportArguments(str(run), evaluation=results)))
    assert page.all("html") == [{"lang": "en"}]
    alts = [image["alt"] for image in page.all("img")]
    assert "Recall@1: retriever 25.0, selector, before training 20.0, selector, update 3 40.0" in alts[4]
    assert "selector: -0.10 at update 1, -0.30 at update 3" in alts[0]
    assert len(page.all("figcaption")) == len(alts)
    assert len(page.all("caption")) == len(page.all("table")) == len(page.all("thead"))
    assert all(heading.get("scope") in ("row", "col") for heading in page.all("th"))


def test_scores_are_those_of_the_logs(run):
    page = Page(report(ReportArguments(str(run))))
    assert "20.0 → 40.0" in page.text and "−6.00 → −3.00" in page.text
    cells = page.cells()
    row = cells.index("Recall@3")
    assert cells[row : row + 4] == ["Recall@3", "35.0", "40.0", "60.0"]
    row = cells.index("contains, %") + 3  # bounds are in the columns behind
    assert cells[row + 2 : row + 5] == ["20.0", "30.0", "35.0"]
    row = cells.index("selector's loss, nats per question")
    assert cells[row + 1 : row + 3] == ["−0.100", "−0.300"]
    # A likelihood that is not a number has no place in a table.
    assert "nan" not in cells and "–" in cells


def test_permutations_of_the_last_log_are_shown_the_heaviest_first(run):
    page = Page(report(ReportArguments(str(run))))
    assert "who wrote it at 2?" not in page.text
    cells = page.cells()
    cells = cells[cells.index("weight") :]
    assert [cell for cell in cells if re.fullmatch(r"0\.\d{3}", cell)] == ["0.750", "0.125", "0.125", "0.000"]


def test_causes_of_errors_are_counted_by_evaluation(run, results):
    page = Page(report(ReportArguments(str(run), evaluation=results)))
    cells = page.cells()
    row = cells.index("not among candidates: no candidate contains the answer")
    assert cells[row + 1 : row + 3] == ["2 (50.0)", "1 (25.0)"]
    row = cells.index("gain by documents, nats")
    assert cells[row + 1].replace("\N{WORD JOINER}", "") == "−0.50 (−1.50–0.50)"
    assert "evaluated 0 after" in page.text and "evaluated 0 before" not in page.text
    assert "[2] p2 › [1]" in page.text and "(nothing)" in page.text


def test_evaluations_in_folders_of_one_name_are_told_apart(run, results, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "after").rename(tmp_path / "other" / "before")
    folders = [results[0], str(tmp_path / "other" / "before")]
    cells = Page(report(ReportArguments(str(run), evaluation=folders))).cells()
    assert set(folders) <= set(cells)


def test_what_is_not_known_is_left_out_with_the_command_that_would_tell(tmp_path):
    write_lines(tmp_path / "run" / LOG_FILE, [training(10)])
    page = Page(report(ReportArguments(str(tmp_path / "run"), str(tmp_path / "out"))))
    assert page.headings() == ["Learning curves", "Not in this report"]
    sentences = [text for tag, text in page.texts if tag == "li"]
    assert [sentence.split(":")[0] for sentence in sentences] == [
        *("Selection", "Answers", "Importance weights", "Errors", "Examples")
    ]
    assert "--eval_strategy steps" in sentences[0] and "--logging_steps" in sentences[2]
    assert f"trl-dro evaluate --model {tmp_path / 'run'}" in sentences[3]
    assert not (tmp_path / "run" / "report").exists()


def test_a_role_that_was_not_trained_has_no_curve(tmp_path):
    line = training(1)
    del line["selector/loss"]
    write_lines(tmp_path / LOG_FILE, [line])
    path = report(ReportArguments(str(tmp_path)))
    assert not (path.parent / "selector_loss.png").exists() and (path.parent / "generator_loss.png").exists()


def test_each_of_several_evaluation_sets_has_its_own_figures(tmp_path):
    sets = [evaluated(0, 0.1, "eval_nq_"), evaluated(0, 0.5, "eval_hot_pot_")]
    write_lines(tmp_path / LOG_FILE, [*sets, training(1)])
    page = Page(report(ReportArguments(str(tmp_path))))
    assert {"recall.png", "recall_2.png", "answers.png", "answers_2.png"} <= {
        file.name for file in (tmp_path / "report").iterdir()
    }
    assert "Recall@k on nq, %" in page.text and "Recall@k on hot_pot, %" in page.text


def test_a_run_under_way_is_reported_though_its_last_lines_are_cut_off(run):
    for path in (run / LOG_FILE, run / "_permutations" / "step-3.jsonl"):
        path.write_bytes(path.read_bytes()[:-20])
    page = Page(report(ReportArguments(str(run))))
    assert page.headings()[0] == "Learning curves"


def test_many_evaluations_are_thinned_out_in_the_table(tmp_path):
    write_lines(tmp_path / LOG_FILE, [line for step in range(101) for line in (training(step), evaluated(step, 0.5))])
    page = Page(report(ReportArguments(str(tmp_path))))
    assert "12 of 101" in page.text
    cells = page.cells()
    start = cells.index("IWAE bound, nats") + 1
    assert cells[start] == "0" and cells[start + 11 * 7] == "100"


def test_questions_with_line_separators_are_reported(run, results):
    path = Path(f"{results[0]}/questions.jsonl")
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"question": "', '"question": "\u2028\x85'), encoding="utf-8")
    assert report(ReportArguments(str(run), evaluation=results[:1])).is_file()


def test_evaluations_that_are_not_finished_or_damaged_are_refused(run, results, tmp_path):
    (tmp_path / "unfinished").mkdir()
    unfinished = str(tmp_path / "unfinished")
    with pytest.raises(ValueError, match=r"unfinished is not a finished evaluation, it has no summary\.json"):
        report(ReportArguments(str(run), evaluation=[unfinished]))
    with open(f"{results[0]}/questions.jsonl", "a") as file:
        file.write("{}\n")
    with pytest.raises(ValueError, match="the evaluation in .*before is damaged .*: delete the folder"):
        report(ReportArguments(str(run), evaluation=results))
    assert not (run / "report").exists()


@pytest.mark.parametrize("module, package", [("report.figures", "matplotlib"), ("report.report", "jinja2")])
def test_without_a_package_of_the_extra_the_extra_is_named(monkeypatch, module, package):
    monkeypatch.delitem(sys.modules, f"trl_dro.{module}")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"the report needs {package}: pip install 'trl_dro\[plots\]'"):
        importlib.import_module(f"trl_dro.{module}")


def test_a_real_run_and_its_evaluation_give_every_section(tmp_path):
    dataset = make_dataset(6)
    trainer = make_trainer(tmp_path / "run", eval_dataset=dataset, max_steps=2, max_answer_length=4)
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    dataset.save_to_disk(tmp_path / "dev")
    evaluate(
        EvaluationArguments(
            model=str(tmp_path / "run"),
            dataset_name=str(tmp_path / "dev"),
            output_dir=str(tmp_path / "results"),
            device="cpu",
        )
    )
    page = Page(report(ReportArguments(str(tmp_path / "run"), evaluation=[str(tmp_path / "results")])))
    assert "Not in this report" not in page.headings() and len(page.headings()) == 6
    assert "before training → update 2" in page.text and "K = 2 documents selected of up to n = 4" in page.text
