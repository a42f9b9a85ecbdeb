# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import json
import shutil

import pytest
import torch
from trl import TrlParser

from trl_dro import LoadOptions, RAGPipeline
from trl_dro.commands.evaluate import EvaluationArguments, evaluate
from trl_dro.data import DatasetError
from trl_dro.data.processes import ALONE, Processes
from trl_dro.evaluation import evaluation
from trl_dro.evaluation.abstention import count_answers, count_at_thresholds
from trl_dro.evaluation.evaluation import batches
from trl_dro.evaluation.evaluation import evaluate as run

from ..test_faults import make_trainer
from ..trainer.test_dro_trainer import make_dataset


CPU = LoadOptions(device="cpu")
DATASET = make_dataset(12)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder, a dataset with some of its own answers, and what its trainer says of both."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = make_trainer(folder, eval_dataset=DATASET, max_answer_length=8)
    trainer.save_model()
    answers = trainer.predict(DATASET).predictions
    # Some predictions are right and stand in a document, so that no score is all zeros.
    rows = DATASET.to_list()
    for i in (1, 4, 5):
        rows[i]["answers"] = [answers[i] or "x"]
        rows[i]["documents"][i % 4]["text"] += " " + answers[i]
    dataset = DATASET.from_list(rows)
    return folder, dataset, trainer.predict(dataset).metrics


def load(folder):
    return lambda: RAGPipeline.from_pretrained(folder, options=CPU)


def without_time(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_a_run_scores_as_its_trainer_says(trained, tmp_path):
    folder, dataset, metrics = trained
    rows = run(load(folder), dataset, tmp_path)
    assert [row["question"] for row in rows] == dataset["question"]
    for name in ("em", "f1", "recall@1", "recall@2", "retriever_recall@1"):
        assert sum(row[name] for row in rows) / len(rows) == pytest.approx(metrics[f"test_{name}"])
    assert 0 < metrics["test_em"] < 1
    assert [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()] == rows
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "questions.jsonl", "settings.json"]


def test_answers_by_a_sum_are_the_pipelines_and_all_that_was_read_is_counted(trained, tmp_path):
    folder, dataset, _ = trained
    pipe = RAGPipeline.from_pretrained(folder, options=CPU, answer_permutations=4)
    rows = run(lambda: pipe, dataset, tmp_path / "sum")
    outputs = pipe(dataset["question"], documents=dataset["documents"], batch_size=12)
    assert [row["prediction"] for row in rows] == [output.answer for output in outputs]
    assert [row["selected"] for row in rows] == [[d.position for d in output.documents] for output in outputs]
    assert [row["prediction_logp"] for row in rows] == pytest.approx([output.logp for output in outputs], abs=1e-3)
    for row, one in zip(rows, run(load(folder), dataset, tmp_path / "one"), strict=True):
        assert one["tokens"] < row["tokens"] < 4 * one["tokens"]
    # Without a selector there is one permutation.
    retrieved = run(lambda: pipe, dataset, tmp_path / "retriever", selection="retriever")
    assert all(row["selected"] == [1, 2] for row in retrieved)


def test_small_batches_score_as_one(trained, tmp_path):
    folder, dataset, _ = trained
    one = run(load(folder), dataset, tmp_path / "one")
    small = run(load(folder), dataset, tmp_path / "small", tokens_per_batch=1)
    for row, other in zip(without_time(one), without_time(small), strict=True):
        for name in ("answer_logp", "answer_logp_without_documents", "context_gain", "prediction_logp"):
            assert row.pop(name) == pytest.approx(other.pop(name), abs=1e-3)
        assert row == other


def test_context_gain_is_the_likelihood_with_documents_less_that_without(trained, tmp_path):
    folder, dataset, _ = trained
    [row] = run(load(folder), dataset.select([1]), tmp_path)
    rag = load(folder)().rag
    record, prompts, tokenizer = dataset[1], rag.prompts["generator"], rag.tokenizers["generator"]

    def logp(documents):
        prompt = prompts(record["question"], documents)
        answer = [*tokenizer(record["answers"][0], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = rag.roles.forward("generator", input_ids=torch.tensor([prompt + answer])).logits[0]
        logps = logits[len(prompt) - 1 : -1].log_softmax(-1)
        return logps.gather(-1, torch.tensor(answer)[:, None]).sum().item()

    selected = [record["documents"][place - 1] for place in row["selected"]]
    assert row["answer_logp"] == pytest.approx(logp(selected), abs=1e-3)
    assert row["answer_logp_without_documents"] == pytest.approx(logp([]), abs=1e-3)
    assert row["context_gain"] == pytest.approx(logp(selected) - logp([]), abs=1e-3)
    written = len(rag.codec.encode(row["selected"], 4)[0])
    read = len(rag.prompts["selector"](record["question"], record["documents"]))
    read += len(prompts(record["question"], selected))
    assert row["tokens"] == read + written + len(tokenizer(row["prediction"], add_special_tokens=False).input_ids) + 1


def test_an_interrupted_evaluation_goes_on_where_it_stopped(trained, tmp_path, monkeypatch):
    folder, dataset, _ = trained
    whole = run(load(folder), dataset, tmp_path / "whole", tokens_per_batch=300)
    answer = "trl_dro.model.rag_model.RAGModel.write_answers"
    from trl_dro.model.rag_model import RAGModel

    original, asked = RAGModel.write_answers, []

    def interrupted(self, questions, *args, **kwargs):
        asked.extend(questions)
        if len(asked) > 6:
            raise KeyboardInterrupt
        return original(self, questions, *args, **kwargs)

    monkeypatch.setattr(answer, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(load(folder), dataset, tmp_path / "halves", tokens_per_batch=300)
    partial = tmp_path / "halves" / "questions.partial.jsonl"
    kept = partial.read_text().count("\n")
    assert 0 < kept <= 6 and not (tmp_path / "halves" / "questions.jsonl").exists()
    with open(partial, "a") as file:
        file.write('{"row": 11, "em"')  # the line that was being written

    asked.clear()

    def counted(self, questions, *args, **kwargs):
        asked.extend(questions)
        return original(self, questions, *args, **kwargs)

    monkeypatch.setattr(answer, counted)
    resumed = run(load(folder), dataset, tmp_path / "halves", tokens_per_batch=300)
    assert len(asked) == len(dataset) - kept
    assert without_time(resumed) == without_time(whole)


def test_batches_are_the_same_whoever_does_them_and_whatever_is_left(trained):
    folder, dataset, _ = trained
    pipe = load(folder)()

    def rows(left=range(12), processes=ALONE):
        return [rows for rows, _ in batches(pipe, dataset, left, 500, processes)]

    whole = rows()
    assert sorted(sum(whole, [])) == list(range(12)) and 2 < len(whole) < 12
    assert [rows(processes=Processes(rank, 2)) for rank in range(2)] == [whole[0::2], whole[1::2]]
    assert rows(left=[whole[0][0], whole[-1][-1]]) == [whole[0], whole[-1]]
    # Of what is left each process gets its share.
    assert rows(left=whole[0] + whole[2], processes=Processes(1, 2)) == [whole[2]]


def test_a_finished_evaluation_loads_no_model(trained, tmp_path):
    folder, dataset, _ = trained
    rows = run(load(folder), dataset, tmp_path)

    def fail():
        raise AssertionError("loaded")

    assert run(fail, dataset, tmp_path) == rows


@pytest.mark.parametrize("change", ["selection=", "another dataset"])
def test_another_evaluation_does_not_mix_with_the_one_in_the_folder(trained, tmp_path, change):
    folder, dataset, _ = trained
    run(load(folder), dataset.select(range(2)), tmp_path)
    with pytest.raises(ValueError, match=f"holds results with {change}.*name another output_dir"):
        if change == "selection=":
            run(load(folder), dataset.select(range(2)), tmp_path, selection="oracle")
        else:
            run(load(folder), dataset.select(range(3)), tmp_path)


def arguments(folder, dataset, tmp_path, **changes):
    if not (tmp_path / "data").exists():
        dataset.save_to_disk(tmp_path / "data")
    settings = {"model": str(folder), "dataset_name": str(tmp_path / "data"), "device": "cpu"} | changes
    return EvaluationArguments(**settings | {"output_dir": str(tmp_path / settings.get("output_dir", "out"))})


def test_the_command_compares_with_the_order_of_the_retriever(trained, tmp_path, capsys):
    folder, dataset, _ = trained
    baseline = arguments(folder, dataset, tmp_path, selector="retriever", output_dir="retriever")
    evaluate(baseline)
    before = [json.loads(line) for line in (tmp_path / "retriever" / "questions.jsonl").read_text().splitlines()]
    assert all(row["selected"] == [1, 2] for row in before)
    summary = evaluate(arguments(folder, dataset, tmp_path, baseline=str(tmp_path / "retriever")))
    em = summary["metrics"]["em"]
    assert em["baseline"] == pytest.approx(sum(row["em"] for row in before) / 12)
    assert em["low"] <= em["mean"] <= em["high"] and 0 < em["p_value"] <= 1
    assert em["difference"] == pytest.approx(em["mean"] - em["baseline"])
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["metrics"] == summary["metrics"]
    output = capsys.readouterr().out
    assert "exact match" in output and "error: selection" in output


def test_the_command_answers_by_a_sum_where_it_is_told_to(trained, tmp_path):
    folder, dataset, _ = trained
    evaluate(arguments(folder, dataset, tmp_path, answer_permutations=4))
    pipe = RAGPipeline.from_pretrained(folder, options=CPU, answer_permutations=4)
    expected = pipe(dataset["question"], documents=dataset["documents"], batch_size=12)
    lines = (tmp_path / "out" / "questions.jsonl").read_text().splitlines()
    logps = [json.loads(line)["prediction_logp"] for line in lines]
    assert logps == pytest.approx([output.logp for output in expected], abs=1e-3)


def test_the_command_shows_what_a_least_gain_would_leave(trained, tmp_path, capsys, monkeypatch):
    folder, dataset, _ = trained
    summary = evaluate(arguments(folder, dataset, tmp_path, prediction_gain=True))
    rows = [json.loads(line) for line in (tmp_path / "out" / "questions.jsonl").read_text().splitlines()]
    pipe = RAGPipeline.from_pretrained(folder, options=CPU, min_gain=0.0)
    expected = pipe(dataset["question"], documents=dataset["documents"], batch_size=12)
    assert [row["prediction_gain"] for row in rows] == pytest.approx([each.gain for each in expected], abs=1e-3)
    assert summary["thresholds"] == count_at_thresholds(rows) and summary["abstention"] is None
    assert "right of answered" in capsys.readouterr().out
    # Another threshold needs no model.
    monkeypatch.setattr(RAGPipeline, "from_pretrained", None)
    least = sorted(row["prediction_gain"] for row in rows)[6]
    summary = evaluate(arguments(folder, dataset, tmp_path, min_gain=least))
    assert summary["abstention"] == count_answers(rows, least) and summary["abstention"]["abstained"] == 6
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["abstention"] == summary["abstention"]
    assert f"With --min_gain {least:g}: " in capsys.readouterr().out


def test_the_oracle_selects_what_contains_the_answer(trained, tmp_path):
    folder, dataset, _ = trained
    summary = evaluate(arguments(folder, dataset, tmp_path, selector="oracle"))
    assert summary["metrics"]["recall@1"]["mean"] == 6 / 12  # numbers 0 to 3, and the changed rows 4 and 5
    assert summary["metrics"]["not_selected"]["mean"] == 0


def test_roles_may_come_from_different_places(trained, tmp_path):
    folder, dataset, _ = trained
    same = evaluate(arguments(folder, dataset, tmp_path))
    for role in ("selector", "generator"):
        shutil.copytree(folder / role, tmp_path / role / role)
        shutil.copytree(folder / "base", tmp_path / role / "base", dirs_exist_ok=True)
        shutil.copy(folder / "rag_config.json", tmp_path / role)
    parts = {"selector": str(tmp_path / "selector"), "generator": str(tmp_path / "generator")}
    data = str(tmp_path / "data")
    output_dir = str(tmp_path / "apart")
    apart = evaluate(EvaluationArguments(**parts, dataset_name=data, device="cpu", output_dir=output_dir))
    for name in ("em", "f1", "recall@1"):
        assert apart["metrics"][name] == same["metrics"][name]


def test_a_baseline_of_other_questions_is_refused(trained, tmp_path):
    folder, dataset, _ = trained
    evaluate(arguments(folder, dataset, tmp_path, max_questions=3, output_dir="three"))
    with pytest.raises(DatasetError, match="has 3 questions, not 12"):
        evaluate(arguments(folder, dataset, tmp_path, baseline=str(tmp_path / "three")))
    with pytest.raises(DatasetError, match="does not exist"):
        evaluate(arguments(folder, dataset, tmp_path, baseline=str(tmp_path / "nothing")))


def test_results_of_weights_that_were_trained_on_are_not_taken_for_those_of_the_new(trained, tmp_path):
    folder, dataset, _ = trained
    shutil.copytree(folder, tmp_path / "run")
    evaluate(arguments(tmp_path / "run", dataset, tmp_path))
    evaluate(arguments(tmp_path / "run", dataset, tmp_path))
    (tmp_path / "run" / "selector" / "adapter_model.safetensors").touch()
    with pytest.raises(ValueError, match="holds results with another weights"):
        evaluate(arguments(tmp_path / "run", dataset, tmp_path))


def test_ranking_measures_need_positives(trained, tmp_path):
    pytest.importorskip("ir_measures")
    folder, dataset, _ = trained
    with pytest.raises(DatasetError, match="need a column positive_ids"):
        evaluate(arguments(folder, dataset, tmp_path, ranking_measures=["RR@2"]))
    rows = dataset.to_list()
    for row in rows:
        row["positive_ids"] = [row["documents"][0]["id"]]
    (tmp_path / "other").mkdir()
    summary = evaluate(arguments(folder, dataset.from_list(rows), tmp_path / "other", ranking_measures=["R@2"]))
    assert summary["metrics"]["R@2"] == summary["metrics"]["support_recall@2"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"dataset_name": "d"}, "nothing to evaluate"),
        ({"generator": "g", "dataset_name": "d"}, "alone selects nothing"),
        ({"model": "m"}, "pass either --dataset_name"),
        ({"model": "m", "questions": "q"}, "go together"),
        ({"model": "m", "dataset_name": "d", "num_selected": 0}, "at least 1"),
        ({"model": "m", "dataset_name": "d", "answer_permutations": 0}, "at least 1"),
        ({"model": "m", "dataset_name": "d", "generator": "g", "revision": "r"}, "--revision is that of --model"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EvaluationArguments(**settings)


def test_arguments_come_from_the_command_line():
    [args] = TrlParser((EvaluationArguments,)).parse_args_and_config(
        ["--model", "m", "--dataset_name", "d", "--context_reliance", "False", "--ranking_measures", "RR", "nDCG@5"]
    )
    assert args.context_reliance is False and args.ranking_measures == ["RR", "nDCG@5"]


def test_bad_rows_are_skipped_and_counted_or_stop_before_weights_are_loaded(trained, tmp_path, monkeypatch, capsys):
    folder, dataset, _ = trained
    rows = dataset.to_list()
    rows[2]["question"] = "who wrote it " * 2000  # too long
    rows[5]["documents"] = rows[5]["documents"][:1]  # fewer than are selected
    rows[7]["answers"] = []
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = [row for row in range(12) if row not in (2, 5, 7)]

    def arguments(**settings):
        return EvaluationArguments(model=str(folder), device="cpu", **settings)

    whole = arguments(dataset_name=str(tmp_path / "data"), output_dir=str(tmp_path / "whole"))
    dataset.select(kept).save_to_disk(tmp_path / "data")
    expected = evaluate(whole)
    args = arguments(dataset_name=str(tmp_path / "data.jsonl"), output_dir=str(tmp_path / "out"), tokens_per_batch=400)
    with monkeypatch.context() as patch:
        patch.setattr(RAGPipeline, "from_pretrained", None)
        with pytest.raises(DatasetError, match="row 7: .*answers.*--on_error skip"):
            evaluate(args)
    args.on_error = "skip"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        score, scored = evaluation._score_batch, []

        def interrupted(*given):
            if scored:
                raise KeyboardInterrupt
            scored.append(given)
            return score(*given)

        patch.setattr(evaluation, "_score_batch", interrupted)
        evaluate(args)
    summary = evaluate(args)
    lines = [json.loads(line) for line in (tmp_path / "out" / "questions.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == kept
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [row["row"] for row in skipped] == [2, 5, 7]
    assert summary["num_skipped"] == 3 and expected["num_skipped"] == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["num_skipped"] == 3
    for name in ("em", "f1", "recall@2"):
        assert summary["metrics"][name] == expected["metrics"][name]
    out = capsys.readouterr().out
    assert "9 questions (3 skipped)" in out and "3 rows were skipped" in out
