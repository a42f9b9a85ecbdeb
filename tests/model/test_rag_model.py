# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import itertools
import random

import pytest
import torch
from peft import LoraConfig
from transformers import GenerationConfig

from trl_dro.model.codec import PermutationCodec
from trl_dro.model.likelihood import chunk_rows
from trl_dro.model.prompts import GENERATOR_TEMPLATE, SELECTOR_TEMPLATE, PromptBuilder, answer_ids
from trl_dro.model.rag_model import RAGModel
from trl_dro.model.roles import ROLES, Roles, prepare_role_model

from ..tiny_models import bpe_tokenizer, tiny_llama


CPU = torch.device("cpu")
TOKENIZER = bpe_tokenizer(split_digits=False)
QUESTIONS = [
    {
        "question": question,
        "documents": [{"title": f"number {i}", "text": f"born in {1900 + i} " * (i + 1)} for i in range(n)],
    }
    for question, n in (("who wrote the book?", 4), ("the year?", 3))
]


def make_rag():
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    roles = Roles(prepare_role_model(tiny_llama(TOKENIZER), peft_config=config))
    for role in ROLES:
        for _, parameter in roles.named_parameters(role):
            parameter.data.add_(0.2 * torch.randn(parameter.shape))
    roles.model.eval()
    templates = {"selector": SELECTOR_TEMPLATE, "generator": GENERATOR_TEMPLATE}
    prompts = {role: PromptBuilder(TOKENIZER, templates[role], 2) for role in ROLES}
    return RAGModel(roles, dict.fromkeys(ROLES, TOKENIZER), prompts, PermutationCodec(TOKENIZER, 4, 2), CPU)


@pytest.fixture
def rag():
    return make_rag()


@pytest.fixture
def shapes(rag, monkeypatch):
    """Role, rows and tokens of every forward."""
    seen = []
    forward = rag.roles.forward

    def recording(role, wrapped=None, **inputs):
        seen.append((role, len(inputs["input_ids"])))
        return forward(role, wrapped, **inputs)

    monkeypatch.setattr(rag.roles, "forward", recording)
    return seen


PERMUTATIONS = torch.tensor([[[1, 2], [1, 2], [2, 1], [1, 2]], [[3, 1], [3, 1], [3, 1], [3, 1]]])


def test_equal_permutations_are_computed_once(rag, shapes):
    with torch.no_grad():
        selector = rag.permutation_logps(QUESTIONS, PERMUTATIONS)
        generator = rag.answer_logps(QUESTIONS, [["Anna"], ["1907"]], PERMUTATIONS)
    # The selector's two prompts and then their permutations are a row each.
    assert shapes == [("selector", 2), ("selector", 2), ("generator", 3)]
    for logps in (selector, generator):
        assert logps.shape == (2, 4)
        assert logps[0, 0] == logps[0, 1] == logps[0, 3] != logps[0, 2]
        assert (logps[1] == logps[1, 0]).all()


def test_permutations_that_occur_often_have_as_large_a_gradient(rag):
    rag.permutation_logps(QUESTIONS[:1], torch.tensor([[[1, 2]] * 3])).sum().backward()
    repeated = [p.grad.clone() for _, p in rag.roles.named_parameters("selector")]
    rag.roles.model.zero_grad()
    (3 * rag.permutation_logps(QUESTIONS[:1], torch.tensor([[[1, 2]]]))).sum().backward()
    for (_, parameter), gradient in zip(rag.roles.named_parameters("selector"), repeated, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-6, rtol=1e-5)


def test_answer_is_scored_after_the_selected_documents_in_their_order(rag):
    question = QUESTIONS[0]
    prompt = rag.prompts["generator"](question["question"], [question["documents"][2], question["documents"][0]])
    completion = answer_ids(TOKENIZER, "Anna Brown")
    with torch.no_grad():
        logits = rag.roles.forward("generator", input_ids=torch.tensor([prompt + completion])).logits
        expected = logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(completion)[:, None]).sum()
        actual = rag.answer_logps([question], [["Anna Brown"]], torch.tensor([[[3, 1]]]))
        other = rag.answer_logps([question], [["Anna Brown"]], torch.tensor([[[1, 3]]]))
    assert actual.item() == pytest.approx(expected.item(), abs=1e-4)
    assert abs(other.item() - expected.item()) > 1e-3


def test_aliases_are_added_up_question_by_question(rag, shapes):
    targets = [["Anna", "Anna Brown", "Brown"], ["1907"]]
    with torch.no_grad():
        total = rag.answer_logps(QUESTIONS, targets, PERMUTATIONS)
        parts = [rag.answer_logps(QUESTIONS[:1], [[alias]], PERMUTATIONS[:1]) for alias in targets[0]]
        last = rag.answer_logps(QUESTIONS[1:], [["1907"]], PERMUTATIONS[1:])
    assert shapes[0] == ("generator", 2)  # aliases share the prompts that they answer
    torch.testing.assert_close(total[:1], torch.stack(parts).logsumexp(0), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(total[1:], last, atol=1e-4, rtol=1e-5)


def test_questions_do_not_see_each_other_in_a_batch(rag):
    with torch.no_grad():
        together = rag.permutation_logps(QUESTIONS, PERMUTATIONS)
        alone = [rag.permutation_logps([QUESTIONS[i]], PERMUTATIONS[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-5, rtol=1e-5)


def test_sampled_permutations_stay_within_each_questions_documents(rag):
    samples = rag.sample(QUESTIONS, 64)
    assert samples.permutations.shape == (2, 64, 2)
    assert set(samples.permutations[0].flatten().tolist()) == {1, 2, 3, 4}
    assert set(samples.permutations[1].flatten().tolist()) <= {1, 2, 3}


def test_samples_have_the_likelihood_that_scoring_gives_them(rag):
    samples = rag.sample(QUESTIONS, 8, temperature=1.4)
    with torch.no_grad():
        scored = rag.permutation_logps(QUESTIONS, samples.permutations)
    torch.testing.assert_close(samples.logps, scored, atol=2e-5, rtol=1e-5)


def greedy_tokens(rag, question, permutation, max_answer_length):
    """Greedy answer by the book: one unpadded row, no cache."""
    tokens = rag.prompts["generator"](question["question"], [question["documents"][i - 1] for i in permutation])
    start = len(tokens)
    with torch.no_grad():
        while len(tokens) - start < max_answer_length and TOKENIZER.eos_token_id not in tokens[start:]:
            logits = rag.roles.forward("generator", input_ids=torch.tensor([tokens])).logits
            tokens.append(logits[0, -1].argmax().item())
    return tokens[start:]


def text_of(tokens):
    return TOKENIZER.decode(tokens, skip_special_tokens=True).strip()


@pytest.mark.parametrize("max_answer_length", [1, 12])
def test_answer_is_the_greedy_continuation(rag, max_answer_length):
    answers = rag.answer(QUESTIONS, torch.tensor([[3, 1], [2, 3]]), max_answer_length)
    assert answers == [
        text_of(greedy_tokens(rag, question, permutation, max_answer_length))
        for question, permutation in zip(QUESTIONS, ([3, 1], [2, 3]), strict=True)
    ]


@pytest.mark.parametrize("max_answer_length", [1, 12])
def test_a_written_answer_has_the_likelihood_of_its_tokens_and_of_its_end(rag, max_answer_length):
    permutations = [[3, 1], [2, 3]]
    written = [
        greedy_tokens(rag, question, permutation, 12)
        for question, permutation in zip(QUESTIONS, permutations, strict=True)
    ]
    # A row that ends is padded while the other goes on.
    rag.roles.model.generation_config = GenerationConfig(eos_token_id=written[0][2])
    written = [tokens[: tokens.index(written[0][2]) + 1] if i == 0 else tokens for i, tokens in enumerate(written)]
    written = [tokens[:max_answer_length] for tokens in written]
    answers = rag.write_answers(QUESTIONS, torch.tensor(permutations), max_answer_length)
    for question, permutation, tokens, answer in zip(QUESTIONS, permutations, written, answers, strict=True):
        prompt = rag.prompts["generator"](question["question"], [question["documents"][i - 1] for i in permutation])
        with torch.no_grad():
            logits = rag.roles.forward("generator", input_ids=torch.tensor([prompt + tokens])).logits
        logps = logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])
        assert answer.logp == pytest.approx(logps.sum().item(), abs=1e-4)


def test_answer_does_not_sample_though_the_models_own_config_does(rag):
    expected = rag.answer(QUESTIONS, torch.tensor([[3, 1], [2, 3]]), 12)
    rag.roles.model.generation_config.update(do_sample=True, temperature=5.0, top_k=0)
    for _ in range(3):
        assert rag.answer(QUESTIONS, torch.tensor([[3, 1], [2, 3]]), 12) == expected


def test_answer_ends_at_any_end_token_that_the_model_declares(rag):
    tokens = greedy_tokens(rag, QUESTIONS[0], [3, 1], 12)
    end = tokens[4]
    expected = text_of(tokens[: tokens.index(end) + 1])
    assert expected != text_of(tokens)
    for declared in (end, [end, TOKENIZER.eos_token_id]):
        rag.roles.model.generation_config = GenerationConfig(eos_token_id=declared)
        assert rag.answer(QUESTIONS[:1], torch.tensor([[3, 1]]), 12) == [expected]


def test_tokens_are_counted_without_padding(rag):
    prompts = [rag.prompts["generator"](q["question"], q["documents"][:2]) for q in QUESTIONS]
    assert len(prompts[0]) != len(prompts[1])
    targets = [["Anna"], ["Anna Brown"]]
    with torch.no_grad():
        rag.answer_logps(QUESTIONS, targets, torch.tensor([[[1, 2]], [[1, 2]]]))
    expected = sum(map(len, prompts)) + sum(len(answer_ids(TOKENIZER, target)) - 1 for [target] in targets)
    assert rag.count.tokens == expected


def test_rows_read_by_themselves_are_as_long_as_they_are_taken_to_be(rag):
    together = rag.question_lengths(QUESTIONS, 4)
    rag.roles.separate = {"selector"}
    prompts = [len(rag.prompts["selector"](q["question"], q["documents"])) for q in QUESTIONS]
    apart = rag.question_lengths(QUESTIONS, 4)
    assert apart == [4 * (length + rag.codec.max_length) for length in prompts] > together
    with torch.no_grad():
        rag.permutation_logps(QUESTIONS, torch.tensor([[[1, 2], [2, 1], [2, 3], [3, 1]]] * 2))
    assert 0.9 * sum(apart) < rag.count.tokens <= sum(apart) + sum(prompts)


def test_cached_steps_count_their_new_tokens_only(rag):
    rag.sample(QUESTIONS, 8)
    prompts = sum(len(rag.prompts["selector"](q["question"], q["documents"])) for q in QUESTIONS)
    longest = 8 * 2 * rag.codec.max_length
    assert prompts < rag.count.tokens < prompts + longest


def test_roles_use_their_own_adapter(rag):
    samples = rag.sample(QUESTIONS, 4)
    answer = rag.answer_logps(QUESTIONS, [["Anna"], ["1907"]], samples.permutations)
    for _, parameter in rag.roles.named_parameters("selector"):
        parameter.data.zero_()
    with torch.no_grad():
        assert torch.equal(rag.answer_logps(QUESTIONS, [["Anna"], ["1907"]], samples.permutations), answer)
        assert not torch.allclose(rag.permutation_logps(QUESTIONS, samples.permutations), samples.logps)


@pytest.mark.parametrize("own", [{"repetition_penalty": 1.5}, {"num_beams": 4}, {"no_repeat_ngram_size": 1}])
def test_answer_is_greedy_whatever_the_models_own_config_says(rag, own):
    permutations = torch.tensor([[1, 2]] * len(QUESTIONS))
    expected = rag.answer(QUESTIONS, permutations, 24)
    model = rag.roles.module("generator")
    model.generation_config.update(**own)
    assert rag.answer(QUESTIONS, permutations, 24) == expected
    assert all(getattr(model.generation_config, name) == value for name, value in own.items())


@pytest.mark.parametrize("seed", range(5))
def test_chunks_hold_every_row_once_by_length_within_the_budget_and_none_could_be_joined_to_the_next(seed):
    draw = random.Random(seed)
    lengths = [draw.randint(1, 100) for _ in range(draw.randint(1, 40))]
    for max_tokens in (None, 1, 30, 100, 250, 10**6):
        chunks = chunk_rows(lengths, max_tokens)
        rows = [row for chunk in chunks for row in chunk]
        by_length = rows if max_tokens is None else sorted(rows, key=lambda row: (lengths[row], row))
        assert sorted(rows) == list(range(len(lengths))) and rows == by_length
        padded = [len(chunk) * max(lengths[row] for row in chunk) for chunk in chunks]
        if max_tokens is None or max_tokens >= len(lengths) * max(lengths):
            assert len(chunks) == 1
            continue
        assert all(size <= max_tokens or len(chunk) == 1 for size, chunk in zip(padded, chunks, strict=True))
        for chunk, following in zip(chunks, chunks[1:], strict=False):
            longer = [*chunk, following[0]]
            assert len(longer) * max(lengths[row] for row in longer) > max_tokens


def test_no_rows_are_no_chunks():
    assert chunk_rows([], None) == chunk_rows([], 10) == []


TARGETS = [["Anna", "Anna Brown"], ["1907"]]


def results(rag):
    with torch.no_grad():
        samples = rag.sample(QUESTIONS, 6, temperature=1.3, seeds=[5, 9])
        scored = rag.permutation_logps(QUESTIONS, samples.permutations)
        return samples, scored, rag.answer_logps(QUESTIONS, TARGETS, samples.permutations)


@pytest.mark.parametrize("max_tokens", [1, 200, 600])
def test_chunks_give_the_draws_and_likelihoods_of_one_forward(rag, shapes, max_tokens):
    samples, scored, answer = results(rag)
    whole = len(shapes)
    rag.max_tokens = max_tokens
    chunked_samples, chunked_scored, chunked_answer = results(rag)
    assert len(shapes) > 2 * whole  # it was cut up
    assert torch.equal(chunked_samples.permutations, samples.permutations)
    for chunked, one in (
        (chunked_samples.logps, samples.logps),
        (chunked_samples.proposal_logps, samples.proposal_logps),
        (chunked_scored, scored),
        (chunked_answer, answer),
    ):
        torch.testing.assert_close(chunked, one, atol=2e-5, rtol=1e-5)


def test_a_forward_with_gradients_is_one_chunk_whatever_the_budget(rag, shapes):
    for max_tokens in (None, 1):
        rag.max_tokens = max_tokens
        rag.answer_logps(QUESTIONS, TARGETS, PERMUTATIONS).sum().backward()
        rag.permutation_logps(QUESTIONS, PERMUTATIONS).sum().backward()
    assert len(shapes) == 6 and shapes[:3] == shapes[3:]


def test_memory_that_runs_out_with_gradients_is_not_hidden(rag, monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(rag.roles, "forward", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        rag.answer_logps(QUESTIONS, TARGETS, PERMUTATIONS)
    assert rag.max_tokens is None


def test_the_budget_is_halved_until_a_chunk_fits_and_kept(rag, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    tried = []

    def run(chunk):
        tried.append(len(chunk))
        if len(chunk) > 3:
            raise torch.OutOfMemoryError("full")
        return chunk

    with torch.no_grad():
        assert rag._in_chunks(run, [10] * 16) == list(range(16))
        assert tried == [16, 8, 4, *[2] * 8] and rag.max_tokens == 20
        tried.clear()
        rag._in_chunks(run, [10] * 6)
        rag._in_chunks(run, [5] * 6)
    assert tried == [2, 2, 2, 4, 2, 2, 2] and rag.max_tokens == 10


def test_answers_are_written_in_as_many_forwards_as_fit_into_memory(rag, monkeypatch):
    questions, permutations = QUESTIONS * 3, torch.tensor([[3, 1], [2, 3]] * 3)
    expected = rag.answer(questions, permutations, 6)
    model = rag.roles.module("generator")
    generate, sizes = model.generate, []

    def small_memory(input_ids, **kwargs):
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("full")
        return generate(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "generate", small_memory)
    assert rag.answer(questions, permutations, 6) == expected
    assert sizes[0] == 6 and sizes[-1] <= 2


def test_other_errors_are_not_taken_for_a_lack_of_memory(rag):
    def run(chunk):
        raise RuntimeError("a bug")

    with torch.no_grad(), pytest.raises(RuntimeError, match="a bug"):
        rag._in_chunks(run, [10] * 4)
    assert rag.max_tokens is None


ALIKE = torch.tensor([[[4, 1], [4, 2], [4, 3], [4, 1]]])  # all begin with the longest document
UNLIKE = torch.tensor([[[1, 4], [2, 4], [3, 4], [2, 4]]])


@pytest.mark.parametrize("permutations, num_rows", [(ALIKE, 1), (UNLIKE, 3)])
def test_prompts_that_begin_alike_share_a_row_where_counted_tokens_say_so_and_score_the_same(
    rag, shapes, monkeypatch, permutations, num_rows
):
    def scores_and_gradients():
        rag.roles.model.zero_grad()
        logps = rag.answer_logps(QUESTIONS[:1], [["Anna Brown"]], permutations)
        (logps * torch.arange(1.0, 5.0)).sum().backward()
        return logps, [p.grad.clone() for _, p in rag.roles.named_parameters("generator")]

    chosen = scores_and_gradients()
    tokens = rag.count.tokens
    assert shapes == [("generator", num_rows)]
    # The other way round
    flops = rag._forward_flops
    monkeypatch.setattr(rag, "_forward_flops", lambda role, lengths: -flops(role, lengths))
    other = scores_and_gradients()
    assert shapes[1:] == [("generator", 4 - num_rows)]
    torch.testing.assert_close(other, chosen, atol=1e-4, rtol=1e-4)
    if permutations is ALIKE:
        assert tokens < 0.75 * (rag.count.tokens - tokens)


def test_a_rows_cost_is_counted_from_its_padded_tokens_and_their_pairs(rag):
    weights = sum(p.numel() for n, p in rag.roles.module("generator").named_parameters() if "embed_tokens" not in n)
    channels = 2 * 32  # layers, and heads times channels of each
    assert rag._forward_flops("generator", [5, 8, 3]) == 3 * 8 * (2 * weights + 4 * channels * 8)


def test_no_permutations_of_a_question_take_more_tokens_than_its_length_says(rag):
    lengths = rag.question_lengths(QUESTIONS, 6)
    for question, length in zip(QUESTIONS, lengths, strict=True):
        ids = range(1, len(question["documents"]) + 1)
        longest = max(len(rag._generator_prompt(question, list(z))) for z in itertools.permutations(ids, 2))
        selector = len(rag.prompts["selector"](question["question"], question["documents"]))
        assert length == max(6 * longest, selector + 6 * rag.codec.max_length)
