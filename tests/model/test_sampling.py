# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import itertools
import random

import pytest
import torch
from scipy.stats import chisquare
from transformers import MistralConfig, MistralForCausalLM, set_seed

from trl_dro.model.codec import PermutationCodec
from trl_dro.model.permutation import retriever_logits
from trl_dro.model.sampling import sample_permutations, truncate_to_top_p
from trl_dro.model.shared_prefix import PackedModel

from ..tiny_models import TOKENIZERS, bpe_tokenizer, tiny_llama, word_level_tokenizer
from .test_permutation import enumerate_logps


CPU = torch.device("cpu")
ALL_12 = list(itertools.permutations(range(1, 5), 2))


def ranked(ranks, strength):
    ranks = list(ranks)
    return retriever_logits({"documents": [{}] * len(ranks), "retrieval_ranks": ranks}, strength)


def draw(model, codec, prompts, sizes, *args, forward=None, **kwargs):
    packed = PackedModel(forward or model, model.config, 0, CPU, model.dtype)
    with torch.no_grad():
        read = packed.read(prompts, [codec.forced_start(n) for n in sizes])
    return sample_permutations(packed, codec, read, sizes, *args, **kwargs)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 1.0), (1.5, 0.8)])
def test_sampled_frequencies_match_the_distribution_sampled_from(kind, temperature, top_p):
    tokenizer = TOKENIZERS[kind]()
    model = tiny_llama(tokenizer)
    codec = PermutationCodec(tokenizer, 20, num_selected=2)
    prompt = tokenizer("Question: who wrote the book?").input_ids
    samples = draw(model, codec, [prompt], [4], 4096, temperature, top_p)
    counts = torch.zeros(5, 5).index_put_(tuple(samples.permutations[0].T), torch.ones(4096), accumulate=True)
    with torch.no_grad():
        logps = enumerate_logps(model, codec, prompt, ALL_12, 4)
    observed = torch.tensor([counts[z] for z in ALL_12])
    # log q of each permutation, from the samples themselves: it must be a distribution, and be what was drawn from.
    log_q = {
        tuple(z): q for z, q in zip(samples.permutations[0].tolist(), samples.proposal_logps[0].tolist(), strict=True)
    }
    expected = torch.tensor([log_q.get(z, float("-inf")) for z in ALL_12]).exp()
    if (temperature, top_p) == (1.0, 1.0):
        torch.testing.assert_close(expected[observed > 0], logps.exp()[observed > 0], atol=1e-5, rtol=1e-4)
        expected = logps.exp()
    assert expected.sum().item() == pytest.approx(1.0, abs=1e-2)  # a permutation too rare to be drawn may be missing
    likely = expected * 4096 > 5
    assert observed[expected == 0].sum() == 0
    p_value = chisquare(observed[likely], expected[likely] / expected[likely].sum() * observed[likely].sum()).pvalue
    assert p_value > 1e-3


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_sampled_log_probabilities_equal_scored_ones_in_a_ragged_batch(kind, attention):
    tokenizer = TOKENIZERS[kind]()
    model = tiny_llama(tokenizer, attn_implementation=attention)
    codec = PermutationCodec(tokenizer, 20, num_selected=4)
    prompts = [tokenizer(text).input_ids for text in ("Question: who?", "Question: who wrote the book in Paris? " * 3)]
    sizes = [20, 13]
    samples = draw(model, codec, prompts, sizes, 6, temperature=1.3)
    for i in range(2):
        alone = enumerate_logps(model, codec, prompts[i], samples.permutations[i].tolist(), sizes[i])
        torch.testing.assert_close(samples.logps[i], alone.detach(), atol=2e-5, rtol=1e-5)
        for permutation in samples.permutations[i].tolist():
            assert len(set(permutation)) == 4 and max(permutation) <= sizes[i] and min(permutation) >= 1


@pytest.mark.parametrize("window", [8, 64])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_sampled_log_probabilities_are_exact_under_a_sliding_window(kind, window):
    tokenizer = TOKENIZERS[kind]()
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    set_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=len(tokenizer), num_key_value_heads=2, initializer_range=0.2, sliding_window=window, **sizes
        )
    ).eval()
    codec = PermutationCodec(tokenizer, 20, num_selected=4)
    prompt = tokenizer("Question: who wrote the book in Paris? " * 6).input_ids
    samples = draw(model, codec, [prompt], [20], 8)
    with torch.no_grad():
        scored = enumerate_logps(model, codec, prompt, samples.permutations[0].tolist(), 20)
    torch.testing.assert_close(samples.logps[0], scored, atol=2e-5, rtol=1e-5)


def test_broken_logits_are_seen_in_log_p_and_do_not_stop_the_batch():
    tokenizer = word_level_tokenizer()
    model = tiny_llama(tokenizer)
    codec = PermutationCodec(tokenizer, 4, num_selected=2)
    prompts = [tokenizer(text).input_ids for text in ("Question", "who")]
    model.get_input_embeddings().weight.data[prompts[1][-1]] = float("nan")
    samples = draw(model, codec, prompts, [4, 4], 3)
    assert samples.logps[0].isfinite().all() and samples.logps[1].isnan().all()


def test_greedy_takes_the_most_probable_choice_at_every_branch():
    tokenizer = word_level_tokenizer()
    model = tiny_llama(tokenizer)
    codec = PermutationCodec(tokenizer, 4, num_selected=2)
    prompt = tokenizer("Question: who wrote the book?").input_ids
    greedy = draw(model, codec, [prompt], [4], 1, greedy=True)
    with torch.no_grad():
        p = dict(zip(ALL_12, enumerate_logps(model, codec, prompt, ALL_12, 4).exp().tolist(), strict=True))
    first = max(range(1, 5), key=lambda i: sum(v for z, v in p.items() if z[0] == i))
    best = max((z for z in ALL_12 if z[0] == first), key=p.__getitem__)
    assert tuple(greedy.permutations[0, 0].tolist()) == best
    assert greedy.logps.item() == pytest.approx(torch.tensor(p[best]).log().item(), abs=1e-5)


def test_prompt_is_prefilled_once_and_forced_tokens_are_free():
    tokenizer = bpe_tokenizer(split_digits=False)  # one branch per id
    model = tiny_llama(tokenizer)
    shapes = []

    def forward(**inputs):
        shapes.append(tuple(inputs["input_ids"].shape))
        return model(**inputs)

    codec = PermutationCodec(tokenizer, 20, num_selected=5)
    prompts = [tokenizer("Question: who wrote the book?").input_ids] * 3
    draw(model, codec, prompts, [20] * 3, 8, forward=forward)
    # The prompts, and one step per further id, in which eight samples of a question stand in one row.
    assert shapes[0] == (3, len(prompts[0]) + len(codec.forced_start(20)))
    id_and_separator = len(codec.id_tokens[1]) + len(codec.separator)
    assert shapes[1:] == [(3, 8 * id_and_separator)] * 4


def test_a_single_possible_permutation_has_probability_one_and_stays_in_the_graph():
    tokenizer = word_level_tokenizer()
    model = tiny_llama(tokenizer)
    codec = PermutationCodec(tokenizer, 4, num_selected=1)
    prompt = tokenizer("Question").input_ids
    logps = enumerate_logps(model, codec, prompt, [[1]], 1)
    assert logps.item() == 0.0 and logps.requires_grad
    samples = draw(model, codec, [prompt], [1], 3)
    assert samples.permutations.tolist() == [[[1]] * 3] and samples.logps.abs().max() == 0


def test_top_p_keeps_the_smallest_sufficient_set():
    logps = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    torch.testing.assert_close(truncate_to_top_p(logps, 0.7).exp(), torch.tensor([[0, 2 / 3, 0, 1 / 3]]))
    torch.testing.assert_close(truncate_to_top_p(logps, 0.4).exp(), torch.tensor([[0.0, 1.0, 0.0, 0.0]]))
    assert truncate_to_top_p(logps, 1.0) is logps


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_with_a_prior_sampled_log_probabilities_equal_scored_ones(kind):
    tokenizer = TOKENIZERS[kind]()
    model = tiny_llama(tokenizer)
    codec = PermutationCodec(tokenizer, 20, num_selected=3)
    prompts = [tokenizer(text).input_ids for text in ("Question: who?", "Question: who wrote the book in Paris?")]
    priors = [ranked(random.Random(n).sample(range(1, n + 1), n), 1.5) for n in (20, 13)]
    samples = draw(model, codec, prompts, [20, 13], 6, temperature=1.3, document_logits=priors)
    for i, n in enumerate((20, 13)):
        permutations = samples.permutations[i].tolist()
        scored = enumerate_logps(model, codec, prompts[i], permutations, n, document_logits=[priors[i]] * 6)
        torch.testing.assert_close(samples.logps[i], scored.detach(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_strong_prior_is_the_retrievers_order(kind):
    tokenizer = TOKENIZERS[kind]()
    model = tiny_llama(tokenizer)
    codec = PermutationCodec(tokenizer, 20, num_selected=6)
    ranks = random.Random(0).sample(range(1, 21), 20)
    expected = sorted(range(1, 21), key=lambda i: ranks[i - 1])[:6]
    for greedy in (True, False):
        samples = draw(
            model,
            codec,
            [tokenizer("Question: who?").input_ids],
            [20],
            2,
            greedy=greedy,
            document_logits=[ranked(ranks, 1000.0)],
        )
        assert samples.permutations.tolist() == [[expected] * 2]


def test_a_prior_of_zero_draws_what_is_drawn_without():
    tokenizer = bpe_tokenizer(split_digits=True)
    model = tiny_llama(tokenizer)
    codec = PermutationCodec(tokenizer, 20, num_selected=4)
    prompt, zero = tokenizer("Question: who?").input_ids, ranked(range(1, 21), 0.0)
    without, with_zero = (
        draw(model, codec, [prompt], [20], 8, seeds=[3], document_logits=prior) for prior in (None, [zero])
    )
    assert all(torch.equal(a, b) for a, b in zip(without, with_zero, strict=True))
