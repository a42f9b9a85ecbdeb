# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import collections
import itertools
import math

import pytest
import torch

from trl_dro.metrics.text import normalize_answer
from trl_dro.model.codec import PermutationCodec
from trl_dro.model.generation import WrittenAnswer
from trl_dro.system.mixture import answer_questions

from ..model.test_rag_model import QUESTIONS, TOKENIZER, make_rag


LENGTH = 5


@pytest.fixture
def rag():
    return make_rag()


def by_enumeration(rag, question, permutations):
    """Sum over permutations of p(z|x) p(y|x, z) for every answer, each term computed by itself."""
    sums = collections.Counter()
    for z in permutations:
        with torch.no_grad():
            prior = rag.permutation_logps([question], torch.tensor([[z]])).item()
        [answer] = rag.write_answers([question], torch.tensor([z]), LENGTH)
        sums[normalize_answer(answer.text)] += math.exp(prior + answer.logp)
    return sums


def every_permutation(question):
    return [list(z) for z in itertools.permutations(range(1, len(question["documents"]) + 1), 2)]


def test_the_answer_has_the_greatest_sum_by_enumeration(rag):
    answers = answer_questions(rag, QUESTIONS, 12, LENGTH)  # of 12 and of 6 permutations
    for question, answer in zip(QUESTIONS, answers, strict=True):
        sums = by_enumeration(rag, question, every_permutation(question))
        assert len(sums) > 1
        assert sums[normalize_answer(answer.text)] == pytest.approx(max(sums.values()), rel=1e-4)
        assert answer.logp == pytest.approx(math.log(max(sums.values())), abs=1e-4)
        assert sorted(z for z, _, _ in answer.written) == every_permutation(question)
        assert (answer.permutation, answer.text) in [(z, text) for z, text, _ in answer.written]


def test_permutations_that_may_end_early_are_added_up_too(rag):
    rag.codec = PermutationCodec(TOKENIZER, 4, 2, min_selected=1)
    question = QUESTIONS[1]
    [answer] = answer_questions(rag, [question], 20, LENGTH)
    permutations = [*every_permutation(question), *([i, 0] for i in (1, 2, 3))]
    assert sorted(z for z, _, _ in answer.written) == sorted(permutations)
    sums = by_enumeration(rag, question, permutations)
    assert answer.logp == pytest.approx(math.log(max(sums.values())), abs=1e-4)


def test_one_permutation_is_the_greedy_one(rag):
    samples = rag.sample(QUESTIONS, 1, greedy=True)
    written = rag.write_answers(QUESTIONS, samples.permutations[:, 0], LENGTH)
    answers = answer_questions(rag, QUESTIONS, 1, LENGTH)
    assert [answer.permutation for answer in answers] == samples.permutations[:, 0].tolist()
    assert [answer.text for answer in answers] == [answer.text for answer in written]
    expected = [s + answer.logp for s, answer in zip(samples.logps[:, 0].tolist(), written, strict=True)]
    assert [answer.logp for answer in answers] == pytest.approx(expected, abs=1e-5)


def test_several_weak_permutations_outvote_the_strongest(rag, monkeypatch):
    """Equal but for case and articles is equal; documents and wording are those of the strongest that agree."""
    samples = rag.sample(QUESTIONS[:1], 3, greedy=True, sampling="distinct")
    samples = samples._replace(logps=torch.tensor([[0.4, 0.35, 0.25]]).log())
    monkeypatch.setattr(rag, "sample", lambda *args, **kwargs: samples)
    texts = [WrittenAnswer("Rome", math.log(0.5)), WrittenAnswer("the Oslo", math.log(0.4)), WrittenAnswer("oslo", 0)]
    monkeypatch.setattr(rag, "write_answers", lambda *args, **kwargs: texts)
    [answer] = answer_questions(rag, QUESTIONS[:1], 3, LENGTH)
    assert answer.text == "oslo" and answer.permutation == samples.permutations[0, 2].tolist()
    assert answer.logp == pytest.approx(math.log(0.35 * 0.4 + 0.25))  # 0.39, against 0.2 for Rome


def test_whoever_watches_is_told_the_question_and_can_end_it(rag):
    seen = collections.Counter()

    def watch(question, text):
        seen[question] += 1
        return True

    answer_questions(rag, QUESTIONS, 6, LENGTH, watch=watch)
    assert seen == {0: 6, 1: 6}  # one token of each permutation
