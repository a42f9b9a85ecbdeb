# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import itertools
import math

import pytest
import torch
from peft import LoraConfig

from trl_dro.model.codec import PermutationCodec
from trl_dro.model.likelihood import chunk_rows
from trl_dro.model.prompts import (
    GENERATOR_TEMPLATE,
    MIN_DOCUMENT_TOKENS,
    PassagePrompts,
    PromptBuilder,
    PromptTooLongError,
)
from trl_dro.model.query_likelihood import recomputed, significant_rows
from trl_dro.model.rag_model import RAGModel
from trl_dro.model.roles import ROLES, Roles, prepare_role_model
from trl_dro.system.selection import choice_probabilities

from ..tiny_models import TOKENIZERS, bpe_tokenizer, tiny_llama


CPU = torch.device("cpu")
QUESTIONS = [
    {
        "question": question,
        "documents": [
            {"title": f"number {i}", "text": f"born in {1900 + i} " * (i + 1), "score": 1.0 + i} for i in range(n)
        ],
    }
    for question, n in (("who wrote the book?", 4), ("the year?", 3))
]
ALL = [list(itertools.permutations(range(1, n + 1), 2)) for n in (4, 3)]


def make_rag(kind="bpe", min_selected=None, **settings):
    torch.manual_seed(0)
    tokenizer = TOKENIZERS[kind]() if kind in TOKENIZERS else bpe_tokenizer(split_digits=False)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    roles = Roles(prepare_role_model(tiny_llama(tokenizer), peft_config=config))
    for role in ROLES:
        for _, parameter in roles.named_parameters(role):
            parameter.data.add_(0.2 * torch.randn(parameter.shape))
    roles.model.eval()
    prompts = {"selector": PassagePrompts(tokenizer), "generator": PromptBuilder(tokenizer, GENERATOR_TEMPLATE, 2)}
    codec = PermutationCodec(None, 5, 2, min_selected)
    return RAGModel(roles, dict.fromkeys(ROLES, tokenizer), prompts, codec, CPU, **settings)


def likelihoods(rag, question, with_none=False):
    """log p(question | document) by one plain forward a row."""
    logps = []
    for prompt, asked in rag.prompts["selector"].rows(question["question"], question["documents"], with_none):
        logits = rag.roles.forward("selector", input_ids=torch.tensor([prompt + asked])).logits
        predicted = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        logps.append(predicted.gather(-1, torch.tensor(asked)[:, None]).sum())
    return torch.stack(logps)


def plackett_luce(scores, permutation, end=None):
    """log p of a permutation by its definition; one that stops before two documents has chosen the end."""
    left, logp = list(range(len(scores))), torch.zeros(())
    for place in permutation:
        options = [scores[i] for i in left] + ([] if end is None else [end])
        logp = logp + scores[place - 1] - torch.stack(options).logsumexp(0)
        left.remove(place - 1)
    if len(permutation) < 2:
        logp = logp + end - torch.stack([*(scores[i] for i in left), end]).logsumexp(0)
    return logp


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_probabilities_are_plackett_luce_over_likelihoods_of_the_question(kind):
    rag = make_rag(kind, query_likelihood_scale=0.7)
    with torch.no_grad():
        for question, permutations in zip(QUESTIONS, ALL, strict=True):
            actual = rag.permutation_logps([question], torch.tensor([permutations]))[0]
            scores = 0.7 * likelihoods(rag, question)
            expected = torch.stack([plackett_luce(scores, z) for z in permutations])
            torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)
            assert actual.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
            assert len({round(logp, 4) for logp in actual.tolist()}) == len(permutations)


def test_the_prior_of_the_retriever_is_added_to_the_likelihoods():
    rag = make_rag(retriever_prior=2.0, retriever_prior_from="score")
    with torch.no_grad():
        actual = rag.permutation_logps(QUESTIONS[:1], torch.tensor([ALL[0]]))[0]
        scores = likelihoods(rag, QUESTIONS[0]) + 2.0 * torch.tensor([1.0, 2.0, 3.0, 4.0]).log()
    expected = torch.stack([plackett_luce(scores, z) for z in ALL[0]])
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("min_selected", [0, 1])
def test_the_end_competes_with_the_likelihood_without_any_document(min_selected):
    rag = make_rag(min_selected=min_selected)
    question = QUESTIONS[0]
    shorter = [(i,) for i in range(1, 5)] + [()] * (min_selected == 0)
    every = [*ALL[0], *shorter]
    padded = torch.tensor([[[*z, *[0] * (2 - len(z))] for z in every]])
    with torch.no_grad():
        actual = rag.permutation_logps([question], padded)[0]
        *scores, end = likelihoods(rag, question, with_none=True)
    assert actual.exp().sum().item() == pytest.approx(1.0, abs=1e-5)

    def expected(z):
        may_end = min_selected == 0
        first = torch.zeros(())
        if not may_end and z:  # the first choice knows no end
            first = scores[z[0] - 1] - torch.stack(scores).logsumexp(0)
            rest = [each for i, each in enumerate(scores, start=1) if i != z[0]]
            options = torch.stack([*rest, end]).logsumexp(0)
            return first + (end if len(z) == 1 else scores[z[1] - 1]) - options
        return plackett_luce(scores, z, end)

    torch.testing.assert_close(actual, torch.stack([expected(z) for z in every]), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("sampling", ["independent", "distinct"])
def test_samples_have_their_probabilities_and_their_frequencies(sampling):
    rag = make_rag(query_likelihood_scale=0.5)
    with torch.no_grad():
        exact = rag.permutation_logps(QUESTIONS[:1], torch.tensor([ALL[0]]))[0]
    logp_of = dict(zip(ALL[0], exact.tolist(), strict=True))
    counts, correct = dict.fromkeys(ALL[0], 0.0), 0.0
    draws, m = (300, 8) if sampling == "independent" else (300, 3)
    for seed in range(draws):
        samples = rag.sample(QUESTIONS[:1], m, seeds=[seed], sampling=sampling)
        for z, logp, correction in zip(
            samples.permutations[0].tolist(), samples.logps[0].tolist(), samples.correction[0].tolist(), strict=True
        ):
            assert logp == pytest.approx(logp_of[tuple(z)], abs=2e-5)
            counts[tuple(z)] += math.exp(correction) / (draws * m)
            correct += math.exp(correction) / (draws * m)
        if sampling == "distinct":
            assert len({tuple(z) for z in samples.permutations[0].tolist()}) == m
    assert correct == pytest.approx(1.0, abs=0.05)
    for z, logp in logp_of.items():
        assert counts[z] == pytest.approx(math.exp(logp), abs=0.05), z


def test_greedy_takes_the_documents_that_make_the_question_most_likely():
    rag = make_rag()
    with torch.no_grad():
        greedy = rag.sample(QUESTIONS, 1, greedy=True).permutations[:, 0].tolist()
        for question, chosen in zip(QUESTIONS, greedy, strict=True):
            order = likelihoods(rag, question).argsort(descending=True) + 1
            assert chosen == order[:2].tolist()


def test_a_question_is_scored_alike_in_any_batch_and_any_chunks():
    rag = make_rag()
    permutations = torch.tensor([[[1, 2], [3, 1]], [[2, 1], [3, 2]]])
    with torch.no_grad():
        together = rag.permutation_logps(QUESTIONS, permutations)
        alone = torch.cat([rag.permutation_logps([QUESTIONS[i]], permutations[i : i + 1]) for i in range(2)])
        rag.max_tokens = 60
        chunked = rag.permutation_logps(QUESTIONS, permutations)
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(together, chunked, atol=2e-5, rtol=1e-5)
    # What was read is read of all questions, however many fit.
    with torch.no_grad():
        rag.max_tokens = 1
        read = rag.permutation_logps(QUESTIONS, permutations, read=rag.read(QUESTIONS))
    torch.testing.assert_close(together, read, atol=2e-5, rtol=1e-5)


def gradients(rag, loss):
    rag.roles.model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in rag.roles.named_parameters("selector")}


COEFFICIENTS = torch.tensor([[0.5, -0.2, 0.4], [0.1, 0.3, -1.0]])
DRAWN = torch.tensor([[[1, 2], [3, 1], [4, 2]], [[2, 1], [3, 2], [1, 3]]])


@pytest.mark.parametrize("max_tokens", [None, 60])
def test_gradient_is_that_of_the_definition_whether_computed_again_or_kept(max_tokens):
    rag = make_rag(query_likelihood_scale=0.7)
    rag.roles.model.train()
    rag.max_tokens = max_tokens
    terms = [
        plackett_luce(0.7 * likelihoods(rag, question), z)
        for question, drawn in zip(QUESTIONS, DRAWN.tolist(), strict=True)
        for z in drawn
    ]
    expected = gradients(rag, (COEFFICIENTS.flatten() * torch.stack(terms)).sum())
    read = rag.read(QUESTIONS)
    shared = Shared(rag.roles.model)
    cases = {
        "computed again": (COEFFICIENTS * rag.permutation_logps(QUESTIONS, DRAWN)).sum(),
        "read before": (COEFFICIENTS * rag.permutation_logps(QUESTIONS, DRAWN, read=read)).sum(),
        # A module of another identity is one that processes share: nothing is computed again.
        "kept": (COEFFICIENTS * rag.permutation_logps(QUESTIONS, DRAWN, wrapped=shared)).sum(),
    }
    assert shared.with_gradients == 1
    for name, loss in cases.items():
        for key, gradient in gradients(rag, loss).items():
            torch.testing.assert_close(gradient, expected[key], atol=1e-5, rtol=1e-4, msg=f"{name}, {key}")


class Shared(torch.nn.Module):
    """As DDP wraps a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.with_gradients = 0

    def forward(self, **inputs):
        self.with_gradients += torch.is_grad_enabled()
        return self.module(**inputs)


def test_nothing_of_the_selector_is_kept_while_the_generator_goes_on():
    """What was read brings its gradient though the other role went forward and backward in between."""
    rag = make_rag()
    rag.roles.model.train()
    expected = gradients(rag, rag.permutation_logps(QUESTIONS, DRAWN).sum())
    read = rag.read(QUESTIONS)
    rag.answer_logps(QUESTIONS, [["Anna"], ["1907"]], DRAWN).sum().backward()
    for key, gradient in gradients(rag, rag.permutation_logps(QUESTIONS, DRAWN, read=read).sum()).items():
        torch.testing.assert_close(gradient, expected[key], atol=1e-6, rtol=1e-5)
    assert any(gradient.abs().max() > 0 for gradient in expected.values())


@pytest.mark.parametrize("max_tokens", [None, 60])
def test_gradient_without_negligible_documents_is_that_of_the_others(max_tokens):
    rag = make_rag(negligible_weight=0.3)
    rag.roles.model.train()
    rag.max_tokens = max_tokens
    scores = [likelihoods(rag, question) for question in QUESTIONS]
    leaves = [each.detach().requires_grad_() for each in scores]
    logps = [plackett_luce(leaf, z) for leaf, drawn in zip(leaves, DRAWN.tolist(), strict=True) for z in drawn]
    (COEFFICIENTS.flatten() * torch.stack(logps)).sum().backward()
    wanted = torch.cat([leaf.grad for leaf in leaves])
    kept = significant_rows(wanted, [4, 3], 0.3)
    assert 0 < len(kept) < 7 and kept != list(range(len(kept)))
    expected = gradients(rag, (torch.cat(scores) * wanted)[kept].sum())
    for key, gradient in gradients(rag, (COEFFICIENTS * rag.permutation_logps(QUESTIONS, DRAWN)).sum()).items():
        torch.testing.assert_close(gradient, expected[key], atol=1e-5, rtol=1e-4, msg=key)


def test_only_documents_that_matter_are_computed_again():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    weights = torch.ones(5, requires_grad=True)
    asked = []

    def compute(rows):
        asked.append(list(rows))
        return (weights * values)[list(rows)]

    def chunks(rows):
        return [rows[:2], rows[2:]]

    coefficients = torch.tensor([1.0, -0.6, -0.02, 0.0, 0.3])
    (coefficients * recomputed(values, compute, [3, 2], 0.05, chunks)).sum().backward()
    assert asked == [[0, 1], [4]]
    torch.testing.assert_close(weights.grad, torch.tensor([1.0, -1.2, 0.0, 0.0, 1.5]))


def test_rows_without_any_gradient_and_broken_ones():
    assert significant_rows(torch.tensor([0.0, 0.0, 1.0]), [2, 1], 0.0) == [2]
    assert significant_rows(torch.tensor([math.nan, 0.5, 0.1]), [3], 0.5) == [0, 1, 2]


def test_probabilities_of_choices_multiply_to_that_of_the_permutation():
    rag = make_rag(min_selected=1)
    permutations = [[2, 4], [3, 1]]
    with torch.no_grad():
        logps = rag.permutation_logps(QUESTIONS, torch.tensor(permutations)[:, None])[:, 0]
    for chosen, logp in zip(choice_probabilities(rag, QUESTIONS, permutations), logps.tolist(), strict=True):
        assert math.prod(chosen) == pytest.approx(math.exp(logp), rel=1e-4)


def test_documents_are_cut_and_questions_that_leave_no_room_refused():
    tokenizer = bpe_tokenizer(split_digits=False)
    documents = [{"title": "long", "text": "born in 1907 " * 50}, {"text": "x"}]
    free = PassagePrompts(tokenizer).rows("the year?", documents)
    cut = PassagePrompts(tokenizer, max_document_length=10).rows("the year?", documents)
    overhead = len(free[1][0]) - len(tokenizer(" x", add_special_tokens=False).input_ids)
    assert len(cut[0][0]) == overhead + 10 and cut[1] == free[1] and cut[0][1] == free[0][1]
    limit = overhead + len(free[0][1]) + MIN_DOCUMENT_TOKENS
    whole = PassagePrompts(tokenizer, limit, max_document_length=100)
    assert max(len(prompt) + len(asked) for prompt, asked in whole.rows("the year?", documents)) == limit
    whole.check_fits("the year?", 20)
    with pytest.raises(PromptTooLongError, match="leaves no room for 8 tokens of a document"):
        PassagePrompts(tokenizer, limit - 1).check_fits("the year?", 1)
    with pytest.raises(PromptTooLongError, match="leaves no room"):
        PassagePrompts(tokenizer, limit - 1).rows("the year?", documents)


def test_all_that_is_read_is_counted():
    rag = make_rag()
    with torch.no_grad():
        rag.sample(QUESTIONS, 4)
    rows = [sum(map(len, row)) - 1 for q in QUESTIONS for row in rag.prompts["selector"].rows(*q.values())]
    assert rag.count.tokens == sum(rows)
    assert chunk_rows(rows, None) == [list(range(7))]
    lengths = [len(rag.prompts["selector"](*question.values())) for question in QUESTIONS]
    assert rag.question_lengths(QUESTIONS, 4)[0] >= lengths[0]
