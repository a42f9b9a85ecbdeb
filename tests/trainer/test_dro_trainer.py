# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import itertools
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, TrainerCallback

from trl_dro import DROConfig, DROTrainer, LoadOptions, RAGPipeline
from trl_dro._trl_compat import _BaseTrainer
from trl_dro.data.schema import DatasetError
from trl_dro.model.roles import ROLES, RolePair

from ..data.test_schema import MALFORMED
from ..tiny_models import CHAT_TEMPLATE, bpe_tokenizer, tiny_llama, word_level_tokenizer


ALL_12 = torch.tensor(list(itertools.permutations(range(1, 5), 2)))


def make_dataset(num_questions=8, num_documents=4):
    return Dataset.from_list(
        [
            {
                "question": f"who wrote number {i}?",
                "answers": [f"Anna {i}", f"Anna Brown {i}"],
                "documents": [
                    {
                        "id": f"{i}-{j}",
                        "title": f"number {j}",
                        "text": f"number {j} was born in {1900 + j} as Anna {j}.",
                    }
                    for j in range(num_documents)
                ],
            }
            for i in range(num_questions)
        ]
    )


@pytest.fixture(scope="module")
def tokenizer():
    return bpe_tokenizer(split_digits=False)


@pytest.fixture
def make_trainer(tmp_path, tokenizer):
    def make(dataset=None, model=None, peft=True, eval_dataset=None, callbacks=None, selector_model=None, **settings):
        settings = {
            "output_dir": str(tmp_path / "run"),
            "num_selected": 2,
            "max_candidates": 4,
            "num_permutations": 4,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "max_steps": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
        } | settings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            trainer = DROTrainer(
                model=tiny_llama(tokenizer) if model is None else model,
                args=DROConfig(**settings),
                train_dataset=make_dataset() if dataset is None else dataset,
                eval_dataset=eval_dataset,
                processing_class=tokenizer,
                peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear") if peft else None,
                selector_model=selector_model,
                callbacks=callbacks,
            )
        randomize_adapters(trainer)
        return trainer

    return make


def randomize_adapters(trainer):
    """LoRA starts at zero, where half of the gradients are: gives both roles weights of their own."""
    generator = torch.Generator().manual_seed(1)
    for role in ROLES:
        for name, parameter in trainer.roles.named_parameters(role):
            if "lora_" in name:
                parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def gradients(trainer, role):
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in trainer.roles.named_parameters(role)]
    return torch.cat([part.flatten() for part in parts])


def exact_gradients(trainer, record):
    """Gradient of minus log p(y|x) by enumeration of all 12 permutations, per role."""
    trainer.model.zero_grad()
    trainer.model.eval()
    logps = trainer.rag.permutation_logps([record], ALL_12[None])
    answer_logps = trainer.rag.answer_logps([record], [record["answers"][:1]], ALL_12[None])
    (-(logps + answer_logps).logsumexp(-1)).sum().backward()
    exact = {role: gradients(trainer, role) for role in ROLES}
    trainer.model.zero_grad()
    return exact


def run_step(trainer):
    """One micro-batch through E-step and M-step; gradients are left in place."""
    trainer._estimated_block = -1
    trainer.model.zero_grad()
    return trainer.training_step(trainer.model, next(iter(trainer.get_train_dataloader())))


def relative_error(estimate, exact):
    return ((estimate - exact).norm() / exact.norm()).item()


ONE_QUESTION = {
    "per_device_train_batch_size": 1,
    "shuffle_candidates": False,
    "gradient_checkpointing": False,
    "num_permutations": 4096,
}


@pytest.mark.parametrize("estimator", ["rws", "rws_centered", "vimco"])
@pytest.mark.parametrize("steps_per_estimation", [1, 2])
def test_gradient_matches_enumeration(make_trainer, estimator, steps_per_estimation):
    # vimco keeps an m x m tensor, so its sample is smaller.
    settings = ONE_QUESTION | {"selector_estimator": estimator, "steps_per_estimation": steps_per_estimation}
    if estimator == "vimco":
        settings |= {"num_permutations": 1024, "steps_per_estimation": 1}
    trainer = make_trainer(make_dataset(1), **settings)
    exact = exact_gradients(trainer, trainer.train_dataset[0])
    run_step(trainer)
    errors = {role: relative_error(gradients(trainer, role), exact[role]) for role in ROLES}
    print(f"{estimator}: relative error {errors}")
    assert errors["generator"] < 0.05 and errors["selector"] < 0.25


def test_squared_error_of_the_gradient_falls_like_one_over_m(make_trainer):
    sizes, repeats = (16, 64, 256), 24
    squared_errors = {role: [] for role in ROLES}
    for m in sizes:
        trainer = make_trainer(
            make_dataset(1), **ONE_QUESTION | {"num_permutations": m, "selector_estimator": "rws_centered"}
        )
        exact = exact_gradients(trainer, trainer.train_dataset[0])
        for role in ROLES:
            squared_errors[role].append(0.0)
        for repeat in range(repeats):
            trainer.args.seed = repeat
            run_step(trainer)
            for role in ROLES:
                squared_errors[role][-1] += relative_error(gradients(trainer, role), exact[role]) ** 2 / repeats
    for role in ROLES:
        print(f"{role}: mean squared error at m={sizes}: {', '.join(f'{e:.2e}' for e in squared_errors[role])}")
        slope = torch.tensor([squared_errors[role][0] / squared_errors[role][-1]]).log() / torch.tensor(16.0).log()
        assert 0.7 < slope.item() < 1.4  # 1 is exactly 1/m


@pytest.mark.parametrize("temperature, top_p", [(0.6, 1.0), (1.6, 1.0)])
def test_correction_removes_the_bias_of_a_tempered_proposal(make_trainer, monkeypatch, temperature, top_p):
    settings = ONE_QUESTION | {"temperature": temperature, "top_p": top_p, "selector_estimator": "rws_centered"}
    trainer = make_trainer(make_dataset(1), **settings)
    exact = exact_gradients(trainer, trainer.train_dataset[0])
    run_step(trainer)
    corrected = {role: relative_error(gradients(trainer, role), exact[role]) for role in ROLES}

    sample = trainer.rag.sample
    monkeypatch.setattr(trainer.rag, "sample", lambda *a, **k: (s := sample(*a, **k))._replace(proposal_logps=s.logps))
    run_step(trainer)
    biased = {role: relative_error(gradients(trainer, role), exact[role]) for role in ROLES}
    print(f"T={temperature}: relative error with the correction {corrected}, without {biased}")
    assert corrected["selector"] < 0.2 and corrected["generator"] < 0.05
    assert biased["selector"] > 2.5 * corrected["selector"]


def test_correction_under_top_p_gives_the_gradient_of_the_nucleus(make_trainer):
    settings = ONE_QUESTION | {"temperature": 1.3, "top_p": 0.8, "selector_estimator": "rws"}
    settings["steps_per_estimation"] = 2  # estimates are kept
    trainer = make_trainer(make_dataset(1), **settings)
    record = trainer.train_dataset[0]
    run_step(trainer)
    estimate = {role: gradients(trainer, role) for role in ROLES}
    drawn = {tuple(z) for z in trainer._estimates[0][0].samples.permutations[0].tolist()}
    nucleus = torch.tensor(sorted(drawn))
    assert len(nucleus) < 12  # what is never sampled cannot be corrected for
    trainer.model.zero_grad()
    trainer.model.eval()
    logps = trainer.rag.permutation_logps([record], nucleus[None])
    answer_logps = trainer.rag.answer_logps([record], [record["answers"][:1]], nucleus[None])
    (-(logps + answer_logps).logsumexp(-1)).sum().backward()
    for role in ROLES:
        assert relative_error(estimate[role], gradients(trainer, role)) < 0.2


def test_full_vocabulary_likelihood_matches_enumeration(make_trainer):
    settings = ONE_QUESTION | {"selector_likelihood": "full_vocabulary", "selector_estimator": "rws"}
    trainer = make_trainer(make_dataset(1), **settings)
    record = trainer.train_dataset[0]
    trainer.model.eval()
    logps = trainer.rag.permutation_logps([record], ALL_12[None], "full_vocabulary")
    answer_logps = trainer.rag.answer_logps([record], [record["answers"][:1]], ALL_12[None])
    (-(logps + answer_logps).logsumexp(-1)).sum().backward()
    exact = {role: gradients(trainer, role) for role in ROLES}
    run_step(trainer)
    for role in ROLES:
        assert relative_error(gradients(trainer, role), exact[role]) < 0.1


@pytest.mark.parametrize("peft", [True, False])
def test_checkpointed_gradients_equal_plain_ones(make_trainer, peft):
    results = []
    for checkpointing in (False, True):
        trainer = make_trainer(peft=peft, gradient_checkpointing=checkpointing)
        if checkpointing:
            trainer.model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        run_step(trainer)
        results.append({role: gradients(trainer, role) for role in ROLES})
    for role in ROLES:
        assert results[0][role].norm() > 0
        torch.testing.assert_close(results[1][role], results[0][role], atol=1e-6, rtol=1e-4)


def test_one_estimate_followed_for_many_updates_leads_the_centred_selector_to_its_weights(make_trainer):
    # With constant coefficients w - 1/m the loss has no minimum: log-probabilities fall and the gradient stays.
    trainer = make_trainer(
        make_dataset(1),
        **ONE_QUESTION | {"num_permutations": 6, "maximization_epochs": 80, "train_generator": False},
        max_steps=80,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        weight_temperature=5.0,
    )
    trainer.train()
    [[estimate]] = trainer._estimates
    with torch.no_grad():
        trainer.model.eval()
        logps = trainer.rag.permutation_logps(trainer._records([0]), estimate.samples.permutations)
    reached = (logps - estimate.samples.proposal_logps).softmax(dim=-1)
    torch.testing.assert_close(reached, trainer._weigh(estimate).importance, atol=0.02, rtol=0.1)
    norms = [logs["selector/grad_norm"] for logs in trainer.state.log_history if "selector/grad_norm" in logs]
    assert norms[-1] < 0.1 * norms[0]
    assert logps.amax(dim=-1) > estimate.samples.logps.amax(dim=-1) - 3


def test_scoring_in_the_loss_forward_equals_scoring_in_the_e_step(make_trainer):
    trainer = make_trainer(gradient_checkpointing=False)
    torch.manual_seed(5)
    run_step(trainer)
    fused = {role: gradients(trainer, role) for role in ROLES}
    trainer.args.maximization_epochs = 2  # the estimate now serves two updates, so the E-step scores it
    torch.manual_seed(5)
    run_step(trainer)
    for role in ROLES:
        torch.testing.assert_close(gradients(trainer, role), fused[role], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_role_reads_its_prompts_once_when_one_estimate_serves_one_update(
    make_trainer, monkeypatch, checkpointing
):
    trainer = make_trainer(gradient_checkpointing=checkpointing)
    if checkpointing:
        trainer.model.gradient_checkpointing_enable()
    calls = []
    forward = trainer.roles.forward

    def recording(role, wrapped=None, **inputs):
        calls.append((role, torch.is_grad_enabled(), inputs["input_ids"].shape[1] > 50))
        return forward(role, wrapped, **inputs)

    monkeypatch.setattr(trainer.roles, "forward", recording)
    run_step(trainer)
    assert [call for call in calls if call[0] == "generator"] == [("generator", True, True)]
    # Under checkpointing a cache keeps nothing that the backward could use.
    with_gradients = (
        [("selector", True, True)] if checkpointing else [("selector", True, True), ("selector", True, False)]
    )
    assert [call for call in calls if call[:2] == ("selector", True)] == with_gradients
    without_gradients = {call[2] for call in calls if call[:2] == ("selector", False)}
    assert without_gradients == ({True, False} if checkpointing else {False})


def test_going_on_from_the_e_steps_forward_gives_the_gradient_of_a_forward_of_its_own(make_trainer):
    trainer = make_trainer(gradient_checkpointing=False)
    run_step(trainer)
    once = {role: gradients(trainer, role) for role in ROLES}
    trainer.args.disable_dropout = False  # there is none, but now the M-step may differ from the E-step
    run_step(trainer)
    for role in ROLES:
        torch.testing.assert_close(gradients(trainer, role), once[role], atol=1e-6, rtol=1e-4)


def test_uneven_accumulation_gives_the_gradient_of_one_batch(make_trainer):
    # One question of five is alone in its micro-batch.
    settings = {"max_steps": 1, "learning_rate": 1e-12, "max_grad_norm": 0.0, "gradient_checkpointing": False}
    norms, losses = [], []
    for batch_size, accumulation in ((5, 1), (4, 2)):
        trainer = make_trainer(
            make_dataset(5),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            steps_per_estimation=-1,  # the same draws
            **settings,
        )
        trainer.train()
        logs = trainer.state.log_history[0]
        norms.append([logs[f"{role}/grad_norm"] for role in ROLES])
        losses.append([logs["loss"], *(logs[f"{role}/loss"] for role in ROLES)])
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4, abs=1e-5)


def test_a_second_pass_under_accumulation_is_an_update_of_its_own(make_trainer):
    trainer = make_trainer(
        make_dataset(6), maximization_epochs=2, gradient_accumulation_steps=2, max_steps=-1, num_train_epochs=1
    )
    updates, step = [[]], trainer._em_step

    def recorded(model, inputs):
        updates[-1] += inputs.block[inputs.position].rows if inputs.block else []
        return step(model, inputs)

    trainer._em_step = recorded
    trainer.add_callback(EndOfUpdate(lambda: updates.append([])))
    trainer.train()
    assert trainer.state.global_step == 4
    assert updates[0] == updates[1] and updates[2] == updates[3]  # two passes over each block
    assert sorted(updates[0] + updates[2]) == list(range(6))


class EndOfUpdate(TrainerCallback):
    def __init__(self, call):
        self.call = call

    def on_step_end(self, args, state, control, **kwargs):
        self.call()


@pytest.mark.parametrize("steps_per_estimation", [1, 2])
def test_a_budget_of_tokens_leaves_loss_and_gradient_alone(make_trainer, monkeypatch, steps_per_estimation):
    settings = {"per_device_train_batch_size": 4, "steps_per_estimation": steps_per_estimation}
    results, widths = [], []
    for budget in (None, 1000, 1):
        trainer = make_trainer(gradient_checkpointing=False, max_tokens_per_forward=budget, **settings)
        rows = []
        forward = trainer.roles.forward
        monkeypatch.setattr(
            trainer.roles, "forward", lambda *a, f=forward, r=rows, **k: r.append(len(k["input_ids"])) or f(*a, **k)
        )
        loss = run_step(trainer)
        logged = trainer._means.pop()
        assert logged["generator/loss"] + logged["selector/loss"] == pytest.approx(loss.item(), rel=1e-5)
        results.append((loss, *(gradients(trainer, role) for role in ROLES)))
        widths.append(max(rows))
    assert widths[0] > widths[1] >= widths[2]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-5, rtol=1e-4)


def test_leaving_out_negligible_weights_changes_the_generators_gradient_by_no_more_than_their_share(
    make_trainer, monkeypatch
):
    trainer = make_trainer(gradient_checkpointing=False, num_permutations=8, weight_temperature=0.05)
    results = {}
    for negligible in (0.0, 1e-6, 0.3):
        trainer.args.negligible_weight = negligible
        loss = run_step(trainer)
        results[negligible] = (loss, {role: gradients(trainer, role) for role in ROLES}, trainer._means.pop())
    exact_loss, exact, _ = results[0.0]
    for negligible in (1e-6, 0.3):
        loss, skipping, means = results[negligible]
        torch.testing.assert_close(loss, exact_loss, atol=1e-4, rtol=1e-4)  # the loss is logged whole
        torch.testing.assert_close(skipping["selector"], exact["selector"], atol=1e-6, rtol=1e-4)
        assert means["generator/skipped_weight"] <= negligible and means["generator/skipped_share"] > 0.2
        assert relative_error(skipping["generator"], exact["generator"]) < max(1e-4, 2 * negligible)
    assert relative_error(results[0.3][1]["generator"], exact["generator"]) > 1e-4


def test_both_roles_stay_trainable_and_in_the_optimizer_after_every_operation(make_trainer, tmp_path):
    trainer = make_trainer(eval_dataset=make_dataset(2))

    def check():
        for role in ROLES:
            parameters = trainer.roles.named_parameters(role)
            assert parameters and all(p.requires_grad for _, p in parameters)
        adapters = {id(p) for role in ROLES for _, p in trainer.roles.named_parameters(role)}
        assert {id(p) for p in trainer.model.parameters() if p.requires_grad} == adapters
        return adapters

    check()
    trainer.evaluate()
    check()
    trainer.train()
    adapters = check()
    assert {id(p) for group in trainer.optimizer.param_groups for p in group["params"]} == adapters
    trainer.save_model(str(tmp_path / "saved"))
    check()
    trainer.roles.load(tmp_path / "saved")
    assert check() == adapters


def test_training_moves_both_adapters_and_leaves_the_base_byte_identical(make_trainer):
    trainer = make_trainer()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        is_adapter = set(name.split(".")) & set(ROLES)
        assert torch.equal(parameter, before[name]) != bool(is_adapter), name


@pytest.mark.parametrize("frozen", ROLES)
def test_ablations_train_one_role_and_leave_the_other(make_trainer, frozen):
    trainer = make_trainer(**{f"train_{frozen}": False})
    before = {role: [p.detach().clone() for _, p in trainer.roles.named_parameters(role)] for role in ROLES}
    trainer.train()
    for role in ROLES:
        same = all(
            torch.equal(p, q) for (_, p), q in zip(trainer.roles.named_parameters(role), before[role], strict=True)
        )
        assert same == (role == frozen)
    logs = trainer.state.log_history[0]
    assert f"{frozen}/loss" not in logs and f"{frozen}/grad_norm" not in logs


def test_each_role_has_its_own_learning_rate(make_trainer):
    trainer = make_trainer(selector_learning_rate=3e-4, weight_decay=0.1)
    trainer.create_optimizer()
    rates = {
        role: {
            group["lr"]
            for group in trainer.optimizer.param_groups
            for p in group["params"]
            if any(p is q for _, q in trainer.roles.named_parameters(role))
        }
        for role in ROLES
    }
    assert rates == {"selector": {3e-4}, "generator": {1e-2}}


def test_accumulated_micro_batches_give_the_gradient_of_one_large_batch(make_trainer):
    trainer = make_trainer(make_dataset(4), per_device_train_batch_size=4, gradient_checkpointing=False)
    [micro_batch] = list(trainer.get_train_dataloader())
    estimate = trainer._estimate(micro_batch.block[0], micro_batch.block_index)
    trainer._maximization_step(trainer.model, estimate, micro_batch.update_size, last=True)
    whole = {role: gradients(trainer, role) for role in ROLES}

    trainer.model.zero_grad()
    for half in (slice(0, 3), slice(3, 4)):
        batch = type(estimate.batch)(estimate.batch.rows[half], estimate.batch.counted[half])
        part = type(estimate)(
            batch,
            estimate.orders[half],
            estimate.targets[half],
            type(estimate.samples)(*(tensor[half] for tensor in estimate.samples)),
        )
        trainer._maximization_step(trainer.model, part, micro_batch.update_size, last=True)
    for role in ROLES:
        torch.testing.assert_close(gradients(trainer, role), whole[role], atol=1e-6, rtol=1e-4)


def test_algorithm_1_estimates_the_whole_epoch_once_and_visits_it_as_often_as_asked(make_trainer, monkeypatch):
    trainer = make_trainer(steps_per_estimation=-1, maximization_epochs=2, max_steps=-1, num_train_epochs=2)
    events = []
    estimate, maximization_step = trainer._estimate, trainer._maximization_step
    monkeypatch.setattr(trainer, "_estimate", lambda *a: events.append("E") or estimate(*a))
    monkeypatch.setattr(
        trainer, "_maximization_step", lambda *a, **k: events.append("M") or maximization_step(*a, **k)
    )
    trainer.train()
    assert events == ["E"] * 4 + ["M"] * 8 + ["E"] * 4 + ["M"] * 8  # 8 questions, 2 at a time
    assert trainer.state.global_step == 2 * 4 * 2


def test_candidates_are_shuffled_anew_in_training_and_never_in_evaluation(make_trainer, monkeypatch):
    dataset = make_dataset(2)
    trainer = make_trainer(dataset, eval_dataset=dataset, num_permutations=2, max_steps=-1, num_train_epochs=2)
    seen = []
    sample = trainer.rag.sample

    def recording(questions, *args, **kwargs):
        seen.append({question["question"]: [d["id"] for d in question["documents"]] for question in questions})
        return sample(questions, *args, **kwargs)

    monkeypatch.setattr(trainer.rag, "sample", recording)
    trainer.train()
    assert len(seen) == 2 and all(seen[0][question] != seen[1][question] for question in dataset["question"])
    seen.clear()
    trainer.evaluate()
    assert all(ids == sorted(ids) for questions in seen for ids in questions.values())


def test_the_retrievers_prior_follows_the_candidates_through_shuffling(make_trainer):
    trainer = make_trainer(retriever_prior=1e3, steps_per_estimation=4)
    run_step(trainer)
    estimates = [part for parts in trainer._estimates for part in parts]
    assert len({tuple(order) for estimate in estimates for order in estimate.orders}) > 3
    for estimate in estimates:
        for order, permutations in zip(estimate.orders, estimate.samples.permutations.tolist(), strict=True):
            assert [[order[i - 1] for i in z] for z in permutations] == [[0, 1]] * 4


def test_gradient_matches_enumeration_with_the_retrievers_prior(make_trainer):
    trainer = make_trainer(make_dataset(1), **ONE_QUESTION | {"retriever_prior": 1.0})
    exact = exact_gradients(trainer, trainer.train_dataset[0])
    run_step(trainer)
    errors = {role: relative_error(gradients(trainer, role), exact[role]) for role in ROLES}
    assert errors["generator"] < 0.05 and errors["selector"] < 0.25


def scored(dataset, scores):
    """Records whose candidates have these scores, in order."""

    def give(record):
        documents = [{**d, "score": score} for d, score in zip(record["documents"], scores, strict=True)]
        return {"documents": documents}

    return Dataset.from_list([record | give(record) for record in dataset.to_list()])


def test_a_prior_of_scores_follows_the_candidates_and_their_margins(make_trainer):
    settings = {"retriever_prior": 300.0, "retriever_prior_from": "score", "steps_per_estimation": 4}
    trainer = make_trainer(scored(make_dataset(4), [1.0, 9.0, 2.0, 8.0]), **settings)
    run_step(trainer)
    estimates = [part for parts in trainer._estimates for part in parts]
    assert len({tuple(order) for estimate in estimates for order in estimate.orders}) > 1
    for estimate in estimates:
        for order, permutations in zip(estimate.orders, estimate.samples.permutations.tolist(), strict=True):
            assert [[order[i - 1] for i in z] for z in permutations] == [[1, 3]] * 4


@pytest.mark.parametrize("score", [None, 0.0, -1.0])
def test_a_prior_of_scores_refuses_candidates_without_any(make_trainer, score):
    with pytest.raises(DatasetError, match="train_dataset, row 0: document 2 of question .*choose 'rank'"):
        make_trainer(
            scored(make_dataset(2), [3.0, score, 2.0, 1.0]), retriever_prior=1.0, retriever_prior_from="score"
        )


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.7}, {"selector_estimator": "rws", "num_permutations": 14}])
def test_distinct_permutations_give_the_exact_gradient_when_they_are_all_there_are(make_trainer, tokenizer, settings):
    settings = ONE_QUESTION | {"sampling": "distinct", "num_permutations": 12, "retriever_prior": 0.5} | settings
    trainer = make_trainer(make_dataset(1), tiny_llama(tokenizer).double(), **settings)
    exact = exact_gradients(trainer, trainer.train_dataset[0])
    run_step(trainer)
    errors = {role: relative_error(gradients(trainer, role), exact[role]) for role in ROLES}
    print(f"relative error {errors}")
    assert max(errors.values()) < 1e-6
    logs = trainer._means.pop()
    assert logs["unique_permutations"] == 12 and logs["elbo"] < logs["iwae_bound"]
    record = trainer.train_dataset[0]
    with torch.no_grad():
        logps = trainer.rag.permutation_logps([record], ALL_12[None])
        answer_logps = trainer.rag.answer_logps([record], [record["answers"][:1]], ALL_12[None])
    assert logs["iwae_bound"] == pytest.approx((logps + answer_logps).logsumexp(-1).item(), abs=1e-5)
    assert logs["elbo"] == pytest.approx((logps.exp() * answer_logps).sum().item(), abs=1e-4)
    assert logs["selector/entropy"] == pytest.approx(-(logps.exp() * logps).sum().item(), abs=1e-5)
    draws = settings["num_permutations"]
    assert logs["expected_unique"] == pytest.approx((1 - (1 - logps.exp()) ** draws).sum().item(), abs=1e-4)


@pytest.mark.parametrize("min_selected, document_cost, num_possible", [(0, 0.0, 17), (1, 0.3, 16), (0, 0.5, 17)])
def test_gradient_of_a_selector_that_may_end_matches_enumeration(
    make_trainer, tokenizer, min_selected, document_cost, num_possible
):
    """Of log sum_z p(z) p(y|z) exp(-cost |z|), over permutations of all lengths."""
    settings = {"sampling": "distinct", "num_permutations": num_possible, "min_selected": min_selected}
    trainer = make_trainer(
        make_dataset(1),
        tiny_llama(tokenizer).double(),
        **ONE_QUESTION | settings | {"document_cost": document_cost},
    )
    record = trainer.train_dataset[0]
    short = [[0, 0]] * (min_selected == 0) + [[i, 0] for i in range(1, 5)]
    everything = torch.cat([torch.tensor(short), ALL_12])[None]
    trainer.model.zero_grad()
    trainer.model.eval()
    logps = trainer.rag.permutation_logps([record], everything)
    assert logps.exp().sum().item() == pytest.approx(1, abs=1e-5)
    answer_logps = trainer.rag.answer_logps([record], [record["answers"][:1]], everything)
    costs = document_cost * (everything > 0).sum(dim=-1)
    (-(logps + answer_logps - costs).logsumexp(-1)).sum().backward()
    exact = {role: gradients(trainer, role) for role in ROLES}
    run_step(trainer)
    errors = {role: relative_error(gradients(trainer, role), exact[role]) for role in ROLES}
    print(errors)
    assert max(errors.values()) < 3e-6  # rounding: log-probabilities are float32
    documents = (logps.exp() * (everything > 0).sum(dim=-1)).sum().item()
    assert trainer._means.pop()["selector/documents"] == pytest.approx(documents, abs=1e-5)


def test_a_selector_that_may_end_trains_is_evaluated_and_saved(make_trainer):
    trainer = make_trainer(eval_dataset=make_dataset(4), min_selected=0, document_cost=3.0, max_answer_length=4)
    trainer.train()
    logs = [each for each in trainer.state.log_history if "selector/documents" in each]
    assert len(logs) == 4 and all(0 <= each["selector/documents"] <= 2 for each in logs)
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_documents"] <= 2 and "eval_recall@2" in metrics
    trainer.save_model()
    pipe = RAGPipeline.from_pretrained(trainer.args.output_dir, options=LoadOptions(device="cpu"))
    records = make_dataset(4).to_list()
    assert pipe.config.min_selected == 0
    outputs = pipe([r["question"] for r in records], documents=[r["documents"] for r in records])
    counts = [len(output.documents) for output in outputs]
    assert sum(counts) / 4 == pytest.approx(metrics["eval_documents"])
    with torch.no_grad():
        alone = pipe.rag.answer(records, torch.zeros(4, 2, dtype=torch.long), 4)
    assert all(output.answer == answer for output, answer, n in zip(outputs, alone, counts, strict=True) if n == 0)
    assert len(pipe(records[0]["question"], documents=records[0]["documents"][:1]).documents) <= 1
    assert "".join(pipe.stream(records[0]["question"], records[0]["documents"]).pieces).strip() == outputs[0].answer


BY_LIKELIHOOD = {"selector_form": "query_likelihood", "query_likelihood_scale": 0.5}


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"steps_per_estimation": 2}])
def test_gradient_of_a_selector_of_query_likelihoods_matches_enumeration(make_trainer, tokenizer, settings):
    """Though nothing of its E-step is kept: what the loss needs is computed again in the backward."""
    settings = ONE_QUESTION | BY_LIKELIHOOD | {"sampling": "distinct", "num_permutations": 12} | settings
    trainer = make_trainer(make_dataset(1), tiny_llama(tokenizer).double(), **settings)
    exact = exact_gradients(trainer, trainer.train_dataset[0])
    assert exact["selector"].norm() > 0
    run_step(trainer)
    errors = {role: relative_error(gradients(trainer, role), exact[role]) for role in ROLES}
    print(errors)
    assert max(errors.values()) < 3e-6


def test_negligible_weight_leaves_out_documents_of_a_selector_of_query_likelihoods(make_trainer, monkeypatch):
    settings = ONE_QUESTION | BY_LIKELIHOOD | {"sampling": "distinct", "num_permutations": 12}
    norms, rows = [], []
    for negligible in (0.0, 0.3):
        trainer = make_trainer(make_dataset(1), **settings | {"negligible_weight": negligible})
        forward, seen = trainer.roles.forward, []

        def counting(role, wrapped=None, forward=forward, seen=seen, **inputs):
            if role == "selector" and torch.is_grad_enabled():
                seen.append(len(inputs["input_ids"]))
            return forward(role, wrapped, **inputs)

        monkeypatch.setattr(trainer.roles, "forward", counting)
        run_step(trainer)
        norms.append(gradients(trainer, "selector"))
        rows.append(sum(seen))
    assert rows[0] == 4 and 0 < rows[1] < 4
    assert 1e-6 < relative_error(norms[1], norms[0]) < 0.6


def test_a_selector_of_query_likelihoods_trains_resumes_is_evaluated_and_saved(make_trainer):
    trainer = make_trainer(eval_dataset=make_dataset(4), save_strategy="steps", save_steps=2, **BY_LIKELIHOOD)
    before = selector_weights(trainer)
    trainer.train()
    assert not torch.equal(before, selector_weights(trainer))
    resumed = make_trainer(eval_dataset=make_dataset(4), **BY_LIKELIHOOD)
    resumed.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2")
    assert torch.equal(selector_weights(resumed), selector_weights(trainer))
    metrics = trainer.evaluate()
    trainer.save_model()
    pipe = RAGPipeline.from_pretrained(trainer.args.output_dir, options=LoadOptions(device="cpu"))
    assert (pipe.config.selector_form, pipe.config.query_likelihood_scale) == ("query_likelihood", 0.5)
    records = make_dataset(4).to_list()
    outputs = pipe([r["question"] for r in records], documents=[r["documents"] for r in records])
    with trainer._inference():
        chosen = trainer.rag.sample(records, 1, greedy=True).permutations[:, 0].tolist()
    assert [[d.position for d in output.documents] for output in outputs] == chosen
    assert all(0 < d.probability <= 1 for output in outputs for d in output.documents)
    assert len(pipe(records[0]["question"], documents=records[0]["documents"][:1]).documents) == 1
    assert 0 <= metrics["eval_recall@2"] <= 1 and math.isfinite(metrics["eval_iwae_bound"])


def selector_weights(trainer):
    return torch.cat([p.detach().flatten().clone() for _, p in trainer.roles.named_parameters("selector")])


def test_training_and_evaluation_with_distinct_permutations(make_trainer):
    """Two candidates have two permutations, of which four samples are drawn."""
    trainer = make_trainer(make_dataset(8, 2), eval_dataset=make_dataset(3), sampling="distinct")
    trainer.train()
    logs = [each for each in trainer.state.log_history if "unique_permutations" in each]
    assert len(logs) == 4 and all(each["unique_permutations"] == 2 for each in logs)
    assert all(math.isfinite(value) for each in logs for value in each.values())
    metrics = trainer.evaluate()
    assert metrics["eval_elbo"] <= metrics["eval_iwae_bound"] + 1e-6 and math.isfinite(metrics["eval_elbo"])


def test_draws_of_a_question_do_not_depend_on_its_batch(make_trainer):
    trainer = make_trainer(make_dataset(4), per_device_train_batch_size=4)
    [micro_batch] = list(trainer.get_train_dataloader())
    together = trainer._estimate(micro_batch.block[0], micro_batch.block_index)
    batch = micro_batch.block[0]
    with torch.no_grad():
        trainer.model.eval()
        for i in range(4):
            alone = trainer._estimate(type(batch)([batch.rows[i]], [True]), micro_batch.block_index)
            assert alone.orders[0] == together.orders[i]
            assert torch.equal(alone.samples.permutations[0], together.samples.permutations[i])


def test_evaluation_reports_both_roles_and_the_retriever_and_repeats_exactly(make_trainer):
    trainer = make_trainer(eval_dataset=make_dataset(3))
    first = trainer.evaluate()
    bounds = ["elbo", "iwae_bound", "loss"]
    names = ["em", "f1", "contains", "recall@1", "recall@2", "retriever_recall@1", "retriever_recall@2", *bounds]
    assert {f"eval_{name}" for name in names} <= set(first)
    assert first["eval_elbo"] <= first["eval_iwae_bound"] + 1e-5
    second = trainer.evaluate()
    assert all(first[f"eval_{name}"] == second[f"eval_{name}"] for name in names)
    trainer.args.per_device_eval_batch_size = 1
    one_by_one = trainer.evaluate()
    assert all(one_by_one[f"eval_{name}"] == pytest.approx(first[f"eval_{name}"], abs=1e-4) for name in names)


def test_evaluation_by_a_sum_is_that_of_the_saved_system(make_trainer):
    dataset = make_dataset(6)
    trainer = make_trainer(eval_dataset=dataset, answer_permutations=6, max_answer_length=4)
    answers = trainer.predict(dataset).predictions.tolist()
    trainer.save_model()
    pipe = RAGPipeline.from_pretrained(trainer.args.output_dir, options=LoadOptions(device="cpu"))
    assert pipe.config.answer_permutations == 6
    outputs = pipe(dataset["question"], documents=dataset["documents"])
    assert [output.answer for output in outputs] == answers
    greedy = RAGPipeline.from_pretrained(
        trainer.args.output_dir, options=LoadOptions(device="cpu"), answer_permutations=1
    )
    outputs = greedy(dataset["question"], documents=dataset["documents"])
    assert [output.answer for output in outputs] != answers


def test_evaluation_leaves_trainings_draws_alone(make_trainer):
    losses = []
    for settings in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        trainer = make_trainer(eval_dataset=make_dataset(2), **settings)
        trainer.train()
        losses.append([logs["loss"] for logs in trainer.state.log_history if "loss" in logs])
    assert losses[0] == losses[1]


def test_best_model_is_loaded_for_both_roles_and_early_stopping_stops(make_trainer):
    trainer = make_trainer(
        eval_dataset=make_dataset(2),
        max_steps=12,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="em",  # stays zero, so the first evaluation is the best and patience runs out
        greater_is_better=True,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for step, same in ((1, True), (3, False)):
        trainer.roles.load(f"{trainer.args.output_dir}/checkpoint-{step}")
        for role in ROLES:
            assert same == all(torch.equal(p, weights[name]) for name, p in trainer.roles.named_parameters(role))


def test_checkpoint_roles_load_in_plain_peft(make_trainer, tokenizer, tmp_path):
    trainer = make_trainer(save_strategy="steps", save_steps=4)
    trainer.train()
    folder = f"{trainer.args.output_dir}/checkpoint-4"
    inputs = torch.tensor([tokenizer("Question: who?").input_ids])
    for role in ROLES:
        loaded = PeftModel.from_pretrained(tiny_llama(tokenizer), f"{folder}/{role}")
        with torch.no_grad():
            torch.testing.assert_close(loaded(inputs).logits, trainer.roles.module(role).eval()(inputs).logits)
        AutoTokenizer.from_pretrained(f"{folder}/{role}")


def test_training_resumes_from_a_checkpoint_with_both_roles(make_trainer):
    trainer = make_trainer(save_strategy="steps", save_steps=2)
    trainer.train()
    saved = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    resumed = make_trainer(save_strategy="no", max_steps=4)
    resumed.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-4")
    assert all(torch.equal(p, saved[name]) for name, p in resumed.model.named_parameters())
    continued = make_trainer(max_steps=6)
    continued.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2")
    assert continued.state.global_step == 6
    assert all(len(continued.optimizer.state[p]) for role in ROLES for _, p in continued.roles.named_parameters(role))


@pytest.mark.parametrize("peft", [True, False])
def test_two_bases_train_and_reload(make_trainer, tokenizer, peft, tmp_path):
    smaller = tiny_llama(tokenizer, seed=1, hidden_size=16, num_hidden_layers=1)
    trainer = make_trainer(peft=peft, selector_model=smaller, max_steps=2)
    assert isinstance(trainer.model, RolePair)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for role in ROLES:
        for _, parameter in trainer.roles.named_parameters(role):
            parameter.data.zero_()
    trainer.roles.load(tmp_path / "saved")
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    if not peft:
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved" / "selector")


def test_roles_without_adapters_are_two_full_models(make_trainer):
    trainer = make_trainer(peft=False, max_steps=2)
    trainer.train()
    pairs = zip(trainer.model.selector.parameters(), trainer.model.generator.parameters(), strict=True)
    assert any(not torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("target", ["random", "all"])
def test_answer_targets_use_the_aliases(make_trainer, target):
    trainer = make_trainer(make_dataset(20), answer_target=target, steps_per_estimation=-1)
    assert torch.isfinite(run_step(trainer))
    targets = [answers for [estimate] in trainer._estimates for answers in estimate.targets]
    assert any(answers[-1].startswith("Anna Brown") for answers in targets)
    assert {len(answers) for answers in targets} == {1 if target == "random" else 2}


def test_all_aliases_add_their_likelihoods(make_trainer):
    trainer = make_trainer()
    record = trainer.train_dataset[0]
    with torch.no_grad():
        parts = [trainer.rag.answer_logps([record], [[answer]], ALL_12[None]) for answer in record["answers"]]
        total = trainer.rag.answer_logps([record], [record["answers"]], ALL_12[None])
    torch.testing.assert_close(total, torch.stack(parts).logsumexp(0), atol=1e-5, rtol=1e-5)


def test_mean_likelihood_divides_by_the_answers_tokens(make_trainer, tokenizer):
    trainer = make_trainer()
    record = trainer.train_dataset[0]
    length = len(tokenizer(record["answers"][0], add_special_tokens=False).input_ids) + 1
    with torch.no_grad():
        total = trainer.rag.answer_logps([record], [record["answers"][:1]], ALL_12[None])
        mean = trainer.rag.answer_logps([record], [record["answers"][:1]], ALL_12[None], mean=True)
    torch.testing.assert_close(mean * length, total, atol=1e-5, rtol=1e-5)


def test_unusable_questions_are_masked_and_counted(make_trainer, monkeypatch):
    trainer = make_trainer(gradient_checkpointing=False, selector_estimator="rws")
    torch.manual_seed(5)
    answer_logps = trainer.rag.answer_logps

    def broken(questions, targets, permutations, *args, **kwargs):
        logps = answer_logps(questions, targets, permutations, *args, **kwargs)
        return torch.cat([logps[:1], torch.full_like(logps[1:], float("-inf"))])

    monkeypatch.setattr(trainer.rag, "answer_logps", broken)
    run_step(trainer)
    assert trainer._means.pop()["masked_question_share"] == 0.5
    assert all(gradients(trainer, role).isfinite().all() and gradients(trainer, role).norm() > 0 for role in ROLES)


def test_logs_name_every_quantity(make_trainer):
    trainer = make_trainer()
    trainer.train()
    expected = {
        *("loss", "selector/loss", "generator/loss", "grad_norm", "selector/grad_norm", "generator/grad_norm"),
        *("elbo", "iwae_bound", "ess", "weight_entropy", "unique_permutations", "selector/entropy", "learning_rate"),
        *("tiny_likelihood_share", "masked_question_share", "tokens_per_second", "e_step_seconds", "m_step_seconds"),
        "padding_share",
    }
    for logs in trainer.state.log_history[:4]:
        assert expected <= set(logs)
        assert logs["loss"] == pytest.approx(logs["selector/loss"] + logs["generator/loss"], rel=1e-4)
        assert logs["grad_norm"] == pytest.approx(
            (logs["selector/grad_norm"] ** 2 + logs["generator/grad_norm"] ** 2) ** 0.5, rel=1e-4
        )
        assert 1 <= logs["ess"] <= 4 and logs["elbo"] <= logs["iwae_bound"]


def test_permutations_are_shown_and_kept(make_trainer, capsys):
    trainer = make_trainer(log_permutations=True, max_steps=1)
    trainer.train()
    assert "weight" in capsys.readouterr().out
    text = Path(trainer.args.output_dir, "_permutations", "step-1.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == 2 * 4
    assert sum(row["weight"] for row in rows[:4]) == pytest.approx(1)


def test_collapse_is_warned_of_once(make_trainer):
    trainer = make_trainer(temperature=1e-3, max_steps=3, collapse_threshold=0.3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    messages = [str(w.message) for w in caught if "permutations are distinct" in str(w.message)]
    assert len(messages) == 1 and "raise `temperature`" in messages[0]


def test_a_single_permutation_is_warned_of(make_trainer):
    with pytest.warns(UserWarning, match="expected gradient of the selector is zero"):
        make_trainer(num_permutations=1)


def test_dropout_is_off_unless_asked_for(make_trainer, tokenizer):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.5, target_modules="all-linear")
    for disable in (True, False):
        trainer = make_trainer(disable_dropout=disable)
        trainer = DROTrainer(
            tiny_llama(tokenizer), trainer.args, make_dataset(), processing_class=tokenizer, peft_config=config
        )
        randomize_adapters(trainer)
        trainer.model.train()
        record = trainer.train_dataset[0]
        with torch.no_grad():
            first, second = (trainer.rag.answer_logps([record], [["Anna"]], ALL_12[None]) for _ in range(2))
        assert torch.equal(first, second) == disable


def test_chat_template_and_dialogue_questions_train(tmp_path):
    tokenizer = word_level_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    dialogue = [{"role": "user", "content": "who wrote the book?"}]
    dataset = make_dataset().remove_columns("question").add_column("question", [dialogue] * 8)
    args = DROConfig(
        output_dir=str(tmp_path),
        num_selected=2,
        max_candidates=4,
        max_steps=1,
        bf16=False,
        use_cpu=True,
        report_to="none",
    )
    trainer = DROTrainer(
        tiny_llama(tokenizer), args, dataset, dataset, tokenizer, LoraConfig(task_type="CAUSAL_LM", r=4)
    )
    trainer.train()
    assert trainer.evaluate()["eval_runtime"] > 0


def test_model_is_loaded_from_a_folder_with_its_tokenizer(tokenizer, tmp_path):
    tiny_llama(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    args = DROConfig(
        output_dir=str(tmp_path / "run"),
        num_selected=2,
        max_candidates=4,
        max_steps=1,
        bf16=False,
        use_cpu=True,
        report_to="none",
    )
    trainer = DROTrainer(
        str(tmp_path / "base"), args, make_dataset(), peft_config=LoraConfig(task_type="CAUSAL_LM", r=4)
    )
    assert isinstance(trainer, _BaseTrainer) and isinstance(trainer.model, PeftModel)
    trainer.train()


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_datasets_fail_at_once_before_any_model_is_loaded(tmp_path, case):
    build, _ = MALFORMED[case]
    args = DROConfig(str(tmp_path), num_selected=3, use_cpu=True)
    with pytest.raises(ValueError) as error:
        DROTrainer("no/such-model", args, build(), peft_config=LoraConfig())
    assert "train_dataset" in str(error.value) and "\n" not in str(error.value)


BAD_SETTINGS = [
    ({"max_prompt_length": 2048}, "max_prompt_length=2048 and a completion of"),
    ({"max_prompt_length": 60}, "train_dataset, row 7, column question: the prompt has"),
    ({"max_answer_length": 5000}, "lower max_answer_length"),
    ({"max_answer_length": 1}, r"train_dataset, row 0, column answers\[0\]: has"),
    ({"num_selected": 5, "max_candidates": 5}, "fewer than num_selected=5"),
    ({"max_candidates": 200000}, "cannot tell document ids"),
]


@pytest.mark.parametrize("settings, message", BAD_SETTINGS)
def test_impossible_settings_fail_at_once_before_any_model_is_loaded(tmp_path, tokenizer, settings, message):
    if settings.get("max_candidates") == 200000:
        tokenizer, settings = word_level_tokenizer(), {"max_candidates": 4000}
    folder = tmp_path / "base"
    tiny_llama(tokenizer).config.save_pretrained(folder)  # no weights: loading them would fail otherwise
    tokenizer.save_pretrained(folder)
    args = {"output_dir": str(tmp_path), "num_selected": 2, "max_candidates": 4, "use_cpu": True, "bf16": False}
    with pytest.raises(ValueError, match=message) as error:
        DROTrainer(str(folder), DROConfig(**args | settings), make_dataset(), peft_config=LoraConfig())
    assert "\n" not in str(error.value)


def test_a_nan_question_leaves_the_gradient_of_the_others_alone(make_trainer):
    rows = make_dataset(2).to_list()
    rows[1]["answers"] = ["zebra"]
    trainer = make_trainer(Dataset.from_list(rows), gradient_checkpointing=False)
    [micro_batch] = list(trainer.get_train_dataloader())
    estimate = trainer._estimate(micro_batch.block[0], micro_batch.block_index)
    healthy = estimate.batch.rows.index(0)
    alone = type(estimate)(
        type(estimate.batch)([0], [True]),
        [estimate.orders[healthy]],
        [estimate.targets[healthy]],
        type(estimate.samples)(*(tensor[healthy : healthy + 1] for tensor in estimate.samples)),
    )
    trainer._maximization_step(trainer.model, alone, micro_batch.update_size, last=True)
    expected = {role: gradients(trainer, role) for role in ROLES}
    trainer._means.pop()

    trainer.model.zero_grad()
    answer_logps = trainer.rag.answer_logps

    def broken(questions, *args, **kwargs):
        logps = answer_logps(questions, *args, **kwargs)
        is_zebra = torch.tensor([question["answers"] == ["zebra"] for question in questions])
        return logps * torch.where(is_zebra, float("nan"), 1.0).unsqueeze(-1)

    trainer.rag.answer_logps = broken
    trainer._maximization_step(trainer.model, estimate, micro_batch.update_size, last=True)
    assert trainer._means.pop()["masked_question_share"] == 0.5
    for role in ROLES:
        torch.testing.assert_close(gradients(trainer, role), expected[role], atol=1e-6, rtol=1e-4)


def test_a_micro_batch_of_nan_questions_changes_nothing(make_trainer, monkeypatch):
    trainer = make_trainer(gradient_checkpointing=False)
    answer_logps = trainer.rag.answer_logps
    monkeypatch.setattr(trainer.rag, "answer_logps", lambda *a, **k: answer_logps(*a, **k) * float("nan"))
    assert run_step(trainer) == 0
    assert all(gradients(trainer, role).abs().sum() == 0 for role in ROLES)


def test_a_permutation_of_likelihood_zero_is_a_weight_of_zero(make_trainer, monkeypatch):
    trainer = make_trainer(gradient_checkpointing=False)
    answer_logps = trainer.rag.answer_logps

    def one_impossible(*args, **kwargs):
        logps = answer_logps(*args, **kwargs)
        return torch.cat([torch.full_like(logps[:, :1], float("-inf")), logps[:, 1:]], dim=1)

    monkeypatch.setattr(trainer.rag, "answer_logps", one_impossible)
    run_step(trainer)
    assert trainer._means.pop()["masked_question_share"] == 0
    assert all(gradients(trainer, role).isfinite().all() and gradients(trainer, role).norm() > 0 for role in ROLES)


def test_every_call_of_train_estimates_anew(make_trainer, monkeypatch):
    trainer = make_trainer(steps_per_estimation=-1, max_steps=-1, num_train_epochs=1)
    calls = []
    estimate = trainer._estimate
    monkeypatch.setattr(trainer, "_estimate", lambda *a: calls.append(1) or estimate(*a))
    trainer.train()
    trainer.train()
    assert len(calls) == 2 * 4


def test_scaled_gradients_are_unscaled_once_and_logged_unscaled(make_trainer, monkeypatch):
    trainer = make_trainer(max_steps=1)
    accelerator = trainer.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu")
    accelerator.native_amp = True
    monkeypatch.setattr(type(accelerator), "mixed_precision", property(lambda self: "fp16"))
    accelerator._optimizers = [trainer.create_optimizer()]
    parameter = trainer.roles.named_parameters("selector")[0][1]
    accelerator.scaler.scale(parameter.sum()).backward()
    trainer._usable_questions = 1
    trainer._clip_grad_norm(trainer.model)
    assert trainer._means.pop()["selector/grad_norm"] == pytest.approx(parameter.numel() ** 0.5, rel=1e-4)


def test_collapse_is_not_warned_of_where_no_other_permutation_exists(make_trainer):
    trainer = make_trainer(make_dataset(4, 1), num_selected=1, max_candidates=1, num_permutations=8)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*are distinct")
        trainer.train()
    assert trainer.state.global_step == 4


def test_datasets_given_later_are_validated_and_predictions_are_the_answers(make_trainer):
    trainer = make_trainer()
    for call in (trainer.evaluate, trainer.predict):
        with pytest.raises(ValueError, match="has no column answers"):
            call(make_dataset(2).remove_columns("answers"))
    output = trainer.predict(make_dataset(3))
    assert output.predictions.shape == (3,) and all(isinstance(answer, str) for answer in output.predictions)
    assert "test_em" in output.metrics


def test_functional_dropout_of_attention_is_off_too(make_trainer, tokenizer):
    trainer = make_trainer(model=tiny_llama(tokenizer, attention_dropout=0.5))
    trainer.model.train()
    record = trainer.train_dataset[0]
    with torch.no_grad():
        first, second = (trainer.rag.answer_logps([record], [["Anna"]], ALL_12[None]) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("estimator", ["rws", "rws_centered", "vimco"])
def test_selector_is_trained_with_the_estimator_asked_for(make_trainer, monkeypatch, estimator):
    trainer = make_trainer(selector_estimator=estimator, gradient_checkpointing=False)
    answer_logps = trainer.rag.answer_logps
    # All permutations equally good: only the plain estimator still pushes the selector, by its noise.
    monkeypatch.setattr(trainer.rag, "answer_logps", lambda *a, **k: 0.0 * answer_logps(*a, **k))
    run_step(trainer)
    norm = gradients(trainer, "selector").norm().item()
    assert norm > 0.1 if estimator == "rws" else norm < 1e-4


def test_an_alias_of_the_same_tokens_counts_once(make_trainer):
    trainer = make_trainer()
    record = trainer.train_dataset[0]
    with torch.no_grad():
        once, again = (
            trainer.rag.answer_logps([record], [targets], ALL_12[None]) for targets in (["Anna"], ["Anna", "Anna"])
        )
    torch.testing.assert_close(again, once)


@pytest.mark.parametrize("name", ["data_collator", "model_init", "compute_loss_func", "preprocess_logits_for_metrics"])
def test_arguments_without_a_meaning_here_are_refused_with_the_reason(name):
    with pytest.raises(TypeError, match=f"DROTrainer takes no `{name}`: ") as error:
        DROTrainer("no/such-model", **{name: print})
    assert "\n" not in str(error.value)


def test_scores_of_ones_own_stand_beside_the_others(make_trainer, tokenizer):
    dataset = make_dataset(3)

    def length(predictions, records):
        assert [record["question"] for record in records] == dataset["question"]
        return {"characters": sum(map(len, predictions)) / len(records)}

    trainer = make_trainer(eval_dataset=dataset)
    trainer.compute_metrics = length
    metrics = trainer.evaluate()
    answers = trainer.predict(dataset).predictions
    assert metrics["eval_characters"] == pytest.approx(sum(map(len, answers)) / 3) and "eval_em" in metrics
    for returned, message in (({"em": 1.0}, "'em', which"), ([1.0], "returned list"), ({"a": "b"}, "a='b': it must")):
        trainer.compute_metrics = lambda predictions, records, returned=returned: returned
        with pytest.raises(ValueError, match=message):
            trainer.evaluate()


def test_operations_that_are_not_counted_are_not_logged_as_none(make_trainer):
    trainer = make_trainer(max_steps=1)
    assert "total_flos" not in trainer.train().metrics
    assert not any("total_flos" in row for row in trainer.state.log_history)
