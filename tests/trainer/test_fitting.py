# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import itertools
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from trl_dro import DROConfig, DROTrainer
from trl_dro.model.sampling import PermutationSamples
from trl_dro.system.rag_config import RAGConfig
from trl_dro.trainer.fitting import (
    ScoredQuestions,
    ScoreWeights,
    answer_bound,
    choice_logps,
    fit_selector,
    fit_weights,
    fitting_rows,
    scored_questions,
)
from trl_dro.trainer.logs import log_line

from ..model.test_query_likelihood import make_rag
from ..tiny_models import bpe_tokenizer, tiny_llama
from .test_dro_trainer import make_dataset


QUESTION = {
    "question": "who built the mill",
    "documents": [
        {"title": "Mill", "text": "Ada Stone built the mill.", "score": 5.0},
        {"title": "Ada Stone", "text": "A builder of mills.", "score": 3.0},
        {"title": "Pond", "text": "The pond is deep.", "score": 2.5},
        {"title": "", "text": "who built the mill", "score": 0.5},
    ],
    "answers": ["Ada Stone"],
}
FEWER = QUESTION | {"documents": QUESTION["documents"][1:]}
SETTINGS = {"query_likelihood_scale": 0.3, "retriever_prior": 0.7, "retriever_prior_from": "score"}


def every_permutation(count, most, fewest):
    """All that may be drawn, zeros behind those that end early."""
    lengths = range(fewest, most + 1)
    chosen = [z for length in lengths for z in itertools.permutations(range(1, count + 1), length)]
    return torch.tensor([[*z, *[0] * (most - len(z))] for z in chosen])


def observed(rag, questions, permutations, answer_logps):
    """As after an E-step that drew these permutations, all at once."""
    with torch.no_grad():
        read = rag.read(questions)
        logps = rag.permutation_logps(questions, permutations, read=read)
    samples = PermutationSamples(permutations, logps, torch.full_like(logps, -math.log(logps.shape[1])))
    return scored_questions(rag, questions, read, samples, answer_logps), logps


@pytest.mark.parametrize("min_selected", [None, 0, 1])
def test_permutations_have_the_probability_that_the_system_gives_them_under_any_weights(min_selected):
    """The very weights that were read with, and others."""
    rag = make_rag(min_selected=min_selected, **SETTINGS)
    questions = [QUESTION, QUESTION | {"question": "what is deep"}]
    permutations = every_permutation(4, 2, 2 if min_selected is None else min_selected).expand(2, -1, -1)
    scored, logps = observed(rag, questions, permutations, torch.zeros(permutations.shape[:2]))
    others = ScoreWeights(1.1, 0.2), ScoreWeights(0.05, 3.0), ScoreWeights(0.3, 0.0)
    for weights in (ScoreWeights(0.3, 0.7), *others):
        rag.query_likelihood_scale, rag.retriever_prior = weights
        with torch.no_grad():
            expected = rag.permutation_logps(questions, permutations)
        found = choice_logps(weights, scored, min_selected)
        assert (found - expected).abs().max() < 1e-4
        assert found.exp().sum(dim=-1) == pytest.approx([1.0, 1.0], abs=1e-9)
    assert logps.exp().sum(dim=-1) == pytest.approx([1.0, 1.0], abs=1e-5)


def test_questions_of_different_numbers_of_documents_go_together():
    rag = make_rag(**SETTINGS)
    both = torch.stack([torch.tensor([[1, 2], [3, 1], [2, 3]])] * 2)
    together, _ = observed(rag, [QUESTION, FEWER], both, torch.zeros(2, 3))
    alone, _ = observed(rag, [FEWER], both[:1], torch.zeros(1, 3))
    weights = ScoreWeights(0.8, 0.4)
    assert (choice_logps(weights, together)[1] - choice_logps(weights, alone)[0]).abs().max() < 1e-5


def made_up(count, scale, prior, seed=0):
    """
    Questions of four documents, one of which the answer follows from, drawn as a selector of these weights would: of
    all models of this form its is the one under which answers are likeliest.
    """
    generator = torch.Generator().manual_seed(seed)
    logps = torch.cat([torch.zeros(count, 1), 6 * torch.randn(count, 4, generator=generator) - 30], dim=1).double()
    retriever = torch.cat([torch.zeros(count, 1), torch.randn(count, 4, generator=generator)], dim=1).double()
    right = (scale * logps + prior * retriever)[:, 1:].softmax(dim=-1).multinomial(1, generator=generator)
    answers = torch.full((count, 4), -12.0).double().scatter(1, right, -1.0)
    permutations = torch.arange(1, 5)[None, :, None].expand(count, 4, 1)
    return ScoredQuestions(logps, retriever, permutations, answers)


@pytest.mark.parametrize(("scale", "prior"), [(0.15, 2.0), (0.4, 0.5)])
def test_the_weights_that_made_the_answers_are_found_from_anywhere(scale, prior):
    questions = made_up(4000, scale, prior)
    found = [fit_weights(ScoreWeights(*start), questions) for start in ((0.1, 1.0), (1.0, 0.1))]
    for weights in found:
        assert weights.query_likelihood_scale == pytest.approx(scale, rel=0.1)
        assert weights.retriever_prior == pytest.approx(prior, rel=0.1)
    assert found[0] == pytest.approx(found[1], rel=0.01)


@pytest.mark.parametrize("num_selected", [1, 2])
def test_a_few_draws_find_most_of_what_all_permutations_would(num_selected):
    """Of the likelihood, by all permutations. The bound of few draws is not the likelihood, and errs somewhat."""
    one, start = made_up(400, 0.3, 2.0), ScoreWeights(0.1, 1.0)
    every = every_permutation(4, num_selected, num_selected).expand(400, -1, -1)
    right = (every == one.log_weights.argmax(dim=1)[:, None, None] + 1).any(dim=-1)
    full = one._replace(permutations=every, log_weights=torch.where(right, -1.0, -12.0).double())
    logps = choice_logps(start, full)
    drawn = logps.exp().multinomial(4, replacement=True, generator=torch.Generator().manual_seed(0))
    few = full._replace(
        permutations=every.gather(1, drawn[..., None].expand(-1, -1, num_selected)),
        log_weights=(full.log_weights - logps).gather(1, drawn),
    )
    found, best, before = (
        answer_bound(weights, full).mean().item()
        for weights in (fit_weights(start, few), fit_weights(start, full), start)
    )
    assert best > before + 0.05 and found > before + 0.6 * (best - before)


def test_no_weights_nearby_make_the_answers_likelier():
    questions = made_up(300, 0.2, 1.0)
    best = fit_weights(ScoreWeights(0.1, 1.0), questions)
    most = answer_bound(best, questions).mean()
    assert most > answer_bound(ScoreWeights(0.1, 1.0), questions).mean()
    for factors in itertools.product((0.8, 1.0, 1.25), repeat=2):
        other = ScoreWeights(*(factor * value for factor, value in zip(factors, best, strict=True)))
        assert answer_bound(other, questions).mean() <= most + 1e-4


def test_a_prior_of_zero_stays_zero():
    weights = fit_weights(ScoreWeights(0.1, 0.0), made_up(300, 0.3, 2.0))
    assert weights.retriever_prior == 0 and weights.query_likelihood_scale != 0.1


def test_a_handful_of_questions_cannot_carry_a_weight_away():
    """The right document is always the likeliest one: without a prior nothing would bound the scale."""
    questions = made_up(3, 50.0, 0.0)
    assert 0.1 < fit_weights(ScoreWeights(0.1, 0.0), questions).query_likelihood_scale < 2


def test_answers_that_no_document_changes_leave_the_weights_as_they_are():
    questions = made_up(50, 0.2, 1.0)
    same = questions._replace(log_weights=torch.full_like(questions.log_weights, -3.0))
    assert fit_weights(ScoreWeights(0.123, 0.5), same) == pytest.approx((0.123, 0.5), rel=1e-3)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_questions_that_cannot_be_answered_are_left_out(value):
    questions = made_up(200, 0.2, 1.0)
    broken = questions.log_weights.clone()
    broken[50:] = value
    few = ScoredQuestions(*(tensor[:50] for tensor in questions))
    start = ScoreWeights(0.1, 1.0)
    assert fit_weights(start, questions._replace(log_weights=broken)) == fit_weights(start, few)
    nothing = questions._replace(log_weights=torch.full_like(broken, value))
    assert fit_weights(start, nothing) == start


def test_the_bound_of_all_distinct_permutations_is_the_log_likelihood_of_the_answer():
    """Under weights that were not drawn with."""
    rag = make_rag(**SETTINGS)
    with torch.no_grad():
        read = rag.read([QUESTION])
        samples = rag.sample([QUESTION], 12, seeds=[1], read=read, sampling="distinct")
        answers = rag.answer_logps([QUESTION], [QUESTION["answers"]], samples.permutations)
    scored = scored_questions(rag, [QUESTION], read, samples, answers)
    rag.query_likelihood_scale, rag.retriever_prior = 0.9, 0.1
    every = every_permutation(4, 2, 2)[None]
    with torch.no_grad():
        logps = rag.permutation_logps([QUESTION], every)
        exact = (logps + rag.answer_logps([QUESTION], [QUESTION["answers"]], every)).logsumexp(dim=-1)
    assert answer_bound(ScoreWeights(0.9, 0.1), scored).item() == pytest.approx(exact.item(), abs=1e-4)


def test_permutations_that_are_missing_count_for_nothing():
    rag = make_rag(**SETTINGS)
    with torch.no_grad():
        read = rag.read([FEWER])
        samples = rag.sample([FEWER], 9, seeds=[1], read=read, sampling="distinct")  # there are six
        answers = rag.answer_logps([FEWER], [FEWER["answers"]], samples.permutations)
    scored = scored_questions(rag, [FEWER], read, samples, answers)
    assert scored.log_weights.isneginf().sum() == 3
    weights = ScoreWeights(0.9, 0.1)
    kept = ScoredQuestions(*scored[:2], *(tensor[:, :6] for tensor in scored[2:]))
    assert answer_bound(weights, scored).item() + math.log(9 / 6) == pytest.approx(answer_bound(weights, kept).item())
    leaf = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    answer_bound(ScoreWeights(leaf, 0.1), scored).sum().backward()
    assert leaf.grad.isfinite()


def test_documents_cost_what_they_cost_in_training():
    rag = make_rag(min_selected=0, **SETTINGS)
    permutations = torch.tensor([[[1, 2], [1, 0], [0, 0]]])
    with torch.no_grad():
        read = rag.read([QUESTION])
    logps = rag.permutation_logps([QUESTION], permutations, read=read).detach()
    samples = PermutationSamples(permutations, logps, torch.zeros_like(logps))
    scored = scored_questions(rag, [QUESTION], read, samples, torch.tensor([[-1.0, -1.0, -1.0]]), document_cost=0.5)
    assert scored.log_weights.tolist() == [[-2.0, -1.5, -1.0]]


def config(**settings):
    values = {"selector_form": "query_likelihood", "num_selected": 2, "num_permutations": 4} | settings
    return DROConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, **values)


def test_fitting_is_the_same_for_the_same_seed_whatever_was_drawn_before():
    records = [QUESTION, FEWER, QUESTION | {"question": "what is deep", "answers": ["The pond"]}]
    found = []
    for noise in (0, 1):
        torch.manual_seed(noise)
        random.seed(noise)
        rag = make_rag(**SETTINGS)
        with torch.no_grad():
            found.append(fit_selector(rag, records, config(per_device_train_batch_size=2)))
    assert found[0] == found[1] != ScoreWeights(0.3, 0.7)


def test_rows_to_fit_are_drawn_once_each():
    args = config(selector_fit_questions=5, seed=3)
    rows = fitting_rows(args, 20)
    assert rows == fitting_rows(args, 20) != fitting_rows(replace_seed(args, 4), 20)
    assert len(set(rows)) == 5 and set(rows) <= set(range(20))
    assert sorted(fitting_rows(args, 3)) == [0, 1, 2]


def replace_seed(args, seed):
    args = replace(args)
    args.seed = seed
    return args


@pytest.fixture
def make_trainer(tmp_path):
    def make(**settings):
        folder = tmp_path / "run"
        args = {"max_candidates": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "max_steps": 4}
        args |= {"save_strategy": "no", "logging_steps": 1, "gradient_checkpointing": False} | settings
        peft_config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
        tokenizer = bpe_tokenizer(split_digits=False)
        args = replace(config(**args), output_dir=str(folder))
        return DROTrainer(tiny_llama(tokenizer), args, make_dataset(), None, tokenizer, peft_config)

    return make


FIT = {
    "selector_form": "query_likelihood",
    "query_likelihood_scale": 0.5,
    "retriever_prior": 1.0,
    "selector_fit_questions": 4,
}


def test_a_run_fits_its_selector_first_and_keeps_what_it_found(make_trainer):
    trainer = make_trainer(**FIT, save_strategy="steps", save_steps=2)
    records = [trainer._with_candidates(trainer.train_dataset[row]) for row in fitting_rows(trainer.args, 8)]
    with trainer._inference():
        expected = fit_selector(trainer.rag, records, trainer.args)
    assert expected != ScoreWeights(0.5, 1.0)
    trainer.train()
    folder = Path(trainer.args.output_dir)
    trainer.save_model()
    for place in (folder, folder / "checkpoint-2"):
        saved = RAGConfig.load(place / "rag_config.json")
        assert (saved.query_likelihood_scale, saved.retriever_prior) == expected
    [logged] = [row for row in trainer.state.log_history if "selector/retriever_prior" in row]
    assert (logged["selector/query_likelihood_scale"], logged["selector/retriever_prior"]) == expected
    values = f"query_likelihood_scale {expected[0]:.3g}, retriever_prior {expected[1]:.3g}"
    assert log_line(logged, 0, 4) == f"selector fitted to the answers: {values}"
    assert trainer.args.query_likelihood_scale == 0.5  # what the run was asked for, by which it is known


def test_a_run_that_resumes_has_the_fitted_weights_and_ends_as_one_left_alone(make_trainer):
    trainer = make_trainer(**FIT, save_strategy="steps", save_steps=2)
    trainer.train()
    resumed = make_trainer(**FIT)
    resumed.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2")
    assert (resumed.rag.query_likelihood_scale, resumed.rag.retriever_prior) == (
        trainer.rag.query_likelihood_scale,
        trainer.rag.retriever_prior,
    )
    assert not any(
        "selector/retriever_prior" in row for row in resumed.state.log_history[len(trainer.state.log_history) :]
    )
    for (name, one), (_, other) in zip(
        trainer.roles.named_parameters("selector"), resumed.roles.named_parameters("selector"), strict=True
    ):
        assert torch.equal(one, other), name


def test_a_run_that_resumes_with_no_update_left_keeps_the_fitted_weights(make_trainer):
    """As one that was killed between its last checkpoint and its end."""
    trainer = make_trainer(**FIT, save_strategy="steps", save_steps=4)
    trainer.train()
    resumed = make_trainer(**FIT)
    resumed.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-4")
    assert resumed.rag_config() == trainer.rag_config()
    assert resumed.rag_config().query_likelihood_scale != 0.5


def test_of_a_selector_whose_weights_are_not_trained_the_two_numbers_are_fitted_all_the_same(make_trainer):
    both, alone = make_trainer(**FIT), make_trainer(**FIT, train_selector=False)
    before = [weight.clone() for _, weight in alone.roles.named_parameters("selector")]
    for trainer in (both, alone):
        trainer.train()
    assert alone.rag.query_likelihood_scale == both.rag.query_likelihood_scale != 0.5
    assert alone.rag.retriever_prior == both.rag.retriever_prior != 1.0
    for old, (name, new) in zip(before, alone.roles.named_parameters("selector"), strict=True):
        assert torch.equal(old, new), name


@pytest.mark.parametrize("settings", [{"selector_form": "permutation"}, {"query_likelihood_scale": 0.0}])
def test_what_has_no_weights_to_fit_is_refused(make_trainer, settings):
    with pytest.raises(ValueError, match="selector_fit_questions=4 fits the weights of selector_form='query_likelih"):
        make_trainer(**FIT | settings)
