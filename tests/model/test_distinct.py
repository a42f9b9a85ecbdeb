# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import collections
import itertools
import math

import pytest
import torch
from scipy.stats import chisquare

from trl_dro.model.codec import PermutationCodec
from trl_dro.model.distinct import log_inclusion, sample_distinct_permutations
from trl_dro.model.permutation import retriever_logits
from trl_dro.model.sampling import sample_permutations
from trl_dro.model.shared_prefix import PackedModel

from ..tiny_models import TOKENIZERS, bpe_tokenizer, tiny_llama, word_level_tokenizer
from .test_permutation import all_lengths, enumerate_logps


CPU = torch.device("cpu")
TEXTS = ("Question: who?", "Question: who wrote the book in Paris? " * 3)


def draw(model, codec, prompts, sizes, *args, **kwargs):
    packed = PackedModel(model, model.config, 0, CPU, model.dtype)
    with torch.no_grad():
        read = packed.read(prompts, [codec.forced_start(n) for n in sizes])
    return sample_distinct_permutations(packed, codec, read, sizes, *args, **kwargs)


def draw_often(kind, n, k, m, times, **kwargs):
    """Samples of one question by many seeds, all its permutations, and their log-probabilities."""
    tokenizer = TOKENIZERS[kind]()
    model = tiny_llama(tokenizer)
    codec = PermutationCodec(tokenizer, 12, num_selected=k)
    prompt = tokenizer(TEXTS[0]).input_ids
    samples = draw(model, codec, [prompt] * times, [n] * times, m, seeds=range(times), **kwargs)
    everything = list(itertools.permutations(range(1, n + 1), k))
    with torch.no_grad():
        return samples, everything, enumerate_logps(model, codec, prompt, everything, n)


# Ids of one and of several tokens: 12 documents are [1] to [12], of which four begin alike.
@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("n, k", [(4, 2), (12, 1)])
def test_pairs_are_drawn_as_without_replacement(kind, n, k):
    samples, everything, logps = draw_often(kind, n, k, 2, 1500)
    place = {z: i for i, z in enumerate(everything)}
    observed = torch.zeros(12, 12)
    for first, second in samples.permutations.tolist():
        observed[place[tuple(first)], place[tuple(second)]] += 1
    p = logps.exp()
    expected = 1500 * p.unsqueeze(1) * p / (1 - p.unsqueeze(1))  # p_i, then p_j among what is left
    assert observed.diagonal().sum() == 0
    expected.fill_diagonal_(0)
    likely = expected > 5
    rest = [expected[~likely].sum(), observed[~likely].sum()]
    statistic = chisquare([*observed[likely], rest[1]], [*expected[likely], rest[0]], sum_check=False)
    assert statistic.pvalue > 1e-3
    torch.testing.assert_close(
        samples.logps,
        logps[[[place[tuple(z)] for z in pair] for pair in samples.permutations.tolist()]],
        atol=2e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    "kind, temperature, prior",
    [*((kind, 1.0, None) for kind in TOKENIZERS), ("WordLevel", 2.0, None), ("SentencePiece", 0.7, 1.5)],
)
def test_corrected_sums_are_unbiased(kind, temperature, prior):
    """For f that is 1 at one permutation the sum estimates its probability, whatever was drawn from."""
    logits = (
        None
        if prior is None
        else [retriever_logits({"documents": [{}] * 4, "retrieval_ranks": [3, 1, 4, 2]}, prior)] * 1000
    )
    samples, everything, logps = draw_often(kind, 4, 2, 4, 1000, temperature=temperature, document_logits=logits)
    if prior is not None:
        tokenizer = TOKENIZERS[kind]()
        model, codec = tiny_llama(tokenizer), PermutationCodec(tokenizer, 12, num_selected=2)
        prompt = tokenizer(TEXTS[0]).input_ids
        with torch.no_grad():
            logps = enumerate_logps(model, codec, prompt, everything, 4, document_logits=logits[:12])
    weights = samples.correction.double().exp() / 4  # p/q of each sample
    for z, p in zip(everything, logps.double().exp().tolist(), strict=True):
        if p < 0.01:  # drawn too seldom to tell
            continue
        estimates = (weights * (samples.permutations == torch.tensor(z)).all(dim=-1)).sum(dim=-1)
        assert abs(estimates.mean().item() - p) < 4 * estimates.std().item() / math.sqrt(1000) + 1e-6


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_as_many_samples_as_permutations_are_all_of_them_with_their_probabilities(kind):
    for n, k, m in ((4, 2, 12), (12, 1, 12), (4, 2, 15)):
        samples, everything, logps = draw_often(kind, n, k, m, 2)
        for permutations, correction in zip(samples.permutations.tolist(), samples.correction, strict=True):
            assert {tuple(z) for z in permutations} == set(everything)
            found = {tuple(z): c for z, c in zip(permutations[:12], correction.tolist(), strict=False)}
            expected = dict(zip(everything, (logps + math.log(m)).tolist(), strict=True))
            assert found == pytest.approx(expected, abs=2e-5)
            # There are no more: what stands in has no weight.
            assert permutations[12:] == permutations[:1] * (m - 12) and (correction[12:] == -math.inf).all()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_greedy_ones_are_the_most_probable_in_order(kind):
    for n, k, m in ((4, 2, 12), (4, 2, 14), (12, 1, 3)):  # all of them, more than there are, and a single choice
        samples, everything, logps = draw_often(kind, n, k, m, 2, greedy=True)
        order = logps.argsort(descending=True)[:m].tolist()
        for permutations in samples.permutations.tolist():
            assert [tuple(z) for z in permutations[: len(order)]] == [everything[i] for i in order]
        torch.testing.assert_close(samples.logps[0, : len(order)], logps[order], atol=2e-5, rtol=1e-5)
        assert (samples.proposal_logps[:, : len(order)] == 0).all()
        assert (samples.proposal_logps[:, len(order) :] == math.inf).all()


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_log_probabilities_equal_scored_ones_in_a_ragged_batch(kind, attention):
    """Beams that go on from one another see what they go on from, and no other."""
    tokenizer = TOKENIZERS[kind]()
    model = tiny_llama(tokenizer, attn_implementation=attention)
    codec = PermutationCodec(tokenizer, 20, num_selected=4)
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    samples = draw(model, codec, prompts, [20, 13], 6, temperature=1.3)
    for i, n in enumerate((20, 13)):
        permutations = samples.permutations[i].tolist()
        assert len({tuple(z) for z in permutations}) == 6
        scored = enumerate_logps(model, codec, prompts[i], permutations, n).detach()
        torch.testing.assert_close(samples.logps[i], scored, atol=2e-5, rtol=1e-5)


def test_draws_of_a_question_depend_on_its_seed_alone():
    tokenizer = bpe_tokenizer(split_digits=True)
    model = tiny_llama(tokenizer)
    codec = PermutationCodec(tokenizer, 20, num_selected=3)
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    both = draw(model, codec, prompts, [20, 13], 5, seeds=[7, 8])
    for i, n in enumerate((20, 13)):
        alone = draw(model, codec, prompts[i : i + 1], [n], 5, seeds=[7 + i])
        assert torch.equal(alone.permutations[0], both.permutations[i])
        torch.testing.assert_close(alone.proposal_logps[0], both.proposal_logps[i], atol=1e-4, rtol=1e-4)


def test_nothing_outside_the_nucleus_is_drawn():
    samples, everything, _ = draw_often("WordLevel", 4, 2, 12, 4, top_p=0.6)
    drawn = samples.correction > -math.inf
    assert (drawn.sum(dim=-1) < 12).all() and (drawn.sum(dim=-1) == drawn[0].sum()).all()
    proposal = (samples.proposal_logps + math.log(12))[drawn]
    torch.testing.assert_close(proposal, torch.zeros_like(proposal), atol=1e-6, rtol=0)  # all there are


def test_broken_logits_are_seen_in_log_p_and_do_not_stop_the_batch():
    tokenizer = word_level_tokenizer()
    model = tiny_llama(tokenizer)
    codec = PermutationCodec(tokenizer, 4, num_selected=2)
    prompts = [tokenizer(text).input_ids for text in ("Question", "who")]
    model.get_input_embeddings().weight.data[prompts[1][-1]] = float("nan")
    samples = draw(model, codec, prompts, [4, 4], 3)
    assert samples.logps[0].isfinite().all() and samples.logps[1].isnan().all()


def test_inclusion_is_exact_where_rounding_would_lose_it():
    logps, threshold = torch.tensor([-800.0, -60.0, -1.0, 0.0], dtype=torch.double), 0.5
    expected = [-800.5, -60.5, math.log(1 - math.exp(-math.exp(-1.5))), math.log(1 - math.exp(-math.exp(-0.5)))]
    torch.testing.assert_close(log_inclusion(logps, threshold), torch.tensor(expected, dtype=torch.double))
    assert (log_inclusion(logps, -math.inf) == 0).all()


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("min_selected", [0, 1])
def test_permutations_that_may_end_early_are_drawn_with_their_probabilities(kind, min_selected):
    tokenizer = TOKENIZERS[kind]()
    model = tiny_llama(tokenizer)
    codec = PermutationCodec(tokenizer, 12, 2, min_selected)
    prompt = tokenizer(TEXTS[0]).input_ids
    everything = all_lengths(4, min_selected, 2)
    with torch.no_grad():
        logps = enumerate_logps(model, codec, prompt, everything, 4)
        packed = PackedModel(model, model.config, 0, CPU, model.dtype)
        read = packed.read([prompt] * 600, [codec.forced_start(4)] * 600)
        independent = sample_permutations(packed, codec, read, [4] * 600, 4, seeds=range(600))
    distinct = draw(model, codec, [prompt], [4], len(everything))
    expected = {tuple(codec.padded(z)): p for z, p in zip(everything, logps.exp().tolist(), strict=True)}
    found = dict(zip(map(tuple, distinct.permutations[0].tolist()), distinct.logps[0].exp().tolist(), strict=True))
    assert found == pytest.approx(expected, abs=2e-5)
    torch.testing.assert_close(distinct.correction[0], distinct.logps[0] + math.log(len(everything)))
    counts = collections.Counter(map(tuple, independent.permutations.flatten(0, 1).tolist()))
    likely = [z for z, p in expected.items() if 2400 * p > 5]
    rest = 1 - sum(expected[z] for z in likely)
    observed = [*(counts[z] for z in likely), 2400 - sum(counts[z] for z in likely)]
    keep = slice(None) if 2400 * rest > 1 else slice(-1)
    statistic = chisquare(observed[keep], [*(2400 * expected[z] for z in likely), 2400 * rest][keep], sum_check=False)
    assert statistic.pvalue > 1e-3
