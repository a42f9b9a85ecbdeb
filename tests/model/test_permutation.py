# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import itertools
import math
import random

import pytest
import torch

from trl_dro.model.codec import PermutationCodec
from trl_dro.model.likelihood import completion_logits
from trl_dro.model.permutation import permutation_logps, retriever_logits, unique_permutations

from ..tiny_models import TOKENIZERS, bpe_tokenizer, tiny_llama, word_level_tokenizer


CPU = torch.device("cpu")


def ranked_logits(ranks, strength):
    ranks = list(ranks)
    return retriever_logits({"documents": [{}] * len(ranks), "retrieval_ranks": ranks}, strength)


def enumerate_logps(model, codec, prompt, permutations, num_documents, **kwargs):
    rows = len(permutations)

    def complete(tokens):
        return completion_logits(model, [prompt] * rows, tokens, 0, CPU)

    return permutation_logps(complete, codec, permutations, [num_documents] * rows, **kwargs)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_probabilities_of_all_permutations_sum_to_one(kind):
    tokenizer = TOKENIZERS[kind]()
    model = tiny_llama(tokenizer)
    prompt = tokenizer("Question: who wrote the book?").input_ids
    with torch.no_grad():
        for n, k in ((4, 2), (11, 2), (3, 3)):
            codec = PermutationCodec(tokenizer, 12, num_selected=k)
            everything = list(itertools.permutations(range(1, n + 1), k))
            logps = enumerate_logps(model, codec, prompt, everything, n)
            assert logps.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
            full = enumerate_logps(model, codec, prompt, everything, n, likelihood="full_vocabulary")
            assert (full < logps + 1e-5).all()


def test_full_vocabulary_likelihood_is_that_of_the_written_tokens():
    tokenizer = bpe_tokenizer(split_digits=True)
    model = tiny_llama(tokenizer)
    codec = PermutationCodec(tokenizer, 12, num_selected=2)
    prompt = tokenizer("Question: who wrote the book?").input_ids
    tokens, _ = codec.encode([12, 3])
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None]).sum()
        actual = enumerate_logps(model, codec, prompt, [[12, 3]], 12, likelihood="full_vocabulary")
    assert actual.item() == pytest.approx(expected.item(), abs=1e-4)


def test_unique_permutations_map_every_sample_to_its_pair():
    permutations = torch.tensor([[[1, 2], [2, 1], [1, 2]], [[1, 2], [1, 2], [1, 2]]])
    pairs, inverse = unique_permutations(permutations)
    assert pairs == [(0, [1, 2]), (0, [2, 1]), (1, [1, 2])]
    assert inverse.tolist() == [[0, 1, 0], [2, 2, 2]]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_with_a_prior_probabilities_of_all_permutations_still_sum_to_one(kind):
    tokenizer = TOKENIZERS[kind]()
    model = tiny_llama(tokenizer)
    prompt = tokenizer("Question: who wrote the book?").input_ids
    for n, k, strength in ((12, 2, 1.0), (12, 2, 40.0), (4, 3, 2.5)):
        codec = PermutationCodec(tokenizer, 12, num_selected=k)
        prior = ranked_logits(random.Random(n).sample(range(1, n + 1), n), strength)
        everything = list(itertools.permutations(range(1, n + 1), k))
        with torch.no_grad():
            logps = enumerate_logps(
                model, codec, prompt, everything, n, document_logits=[prior] * len(everything)
            ).double()
        assert logps.exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_a_prior_multiplies_the_models_own_choice_where_an_id_is_one_choice():
    tokenizer = bpe_tokenizer(split_digits=False)
    model = tiny_llama(tokenizer)
    codec = PermutationCodec(tokenizer, 12, num_selected=1)
    prompt, everything = tokenizer("Question: who?").input_ids, [[i] for i in range(1, 13)]
    prior = ranked_logits(range(12, 0, -1), 1.5)
    with torch.no_grad():
        alone = enumerate_logps(model, codec, prompt, everything, 12)
        actual = enumerate_logps(model, codec, prompt, everything, 12, document_logits=[prior] * 12)
    torch.testing.assert_close(actual, (alone + torch.tensor(prior)).log_softmax(dim=0))


def test_an_id_of_several_tokens_gets_its_prior_where_the_model_is_indifferent_among_those_that_begin_alike():
    """A token's prior is the mean over what it can become, so that the parts multiply to that of the id."""
    codec = PermutationCodec(bpe_tokenizer(split_digits=True), 12, num_selected=1)
    prior = ranked_logits(random.Random(0).sample(range(1, 13), 12), 2.0)
    logps = []
    for i in range(1, 13):
        _, branches = codec.encode([i], 12, prior)
        logp = 0.0
        for branch in branches:
            # Ids that each token can become: a model indifferent among ids gives it their number.
            begun = next(
                begun for begun, ids in codec.continuations.items() if sorted({*ids.values()}) == branch.allowed
            )
            ids = [[i for i, token in codec.continuations[begun].items() if token == each] for each in branch.allowed]
            logits = torch.tensor([math.log(len(each)) for each in ids]) + torch.tensor(branch.prior)
            logp += logits.log_softmax(dim=-1)[branch.chosen].item()
        logps.append(logp)
    assert len(branches) == 2
    torch.testing.assert_close(torch.tensor(logps), torch.tensor(prior).log_softmax(dim=0))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_prior_of_zero_is_the_model_alone_bit_for_bit(kind):
    tokenizer = TOKENIZERS[kind]()
    model = tiny_llama(tokenizer)
    codec = PermutationCodec(tokenizer, 12, num_selected=3)
    prompt, permutations = tokenizer("Question: who?").input_ids, [[1, 12, 3], [11, 1, 10]]
    prior = ranked_logits(range(1, 13), 0.0)
    alone = enumerate_logps(model, codec, prompt, permutations, 12)
    assert torch.equal(alone, enumerate_logps(model, codec, prompt, permutations, 12, document_logits=[prior] * 2))


def test_a_prior_and_the_likelihood_of_free_text_are_refused_together():
    codec = PermutationCodec(word_level_tokenizer(), 4, num_selected=2)
    with pytest.raises(ValueError, match="knows no prior"):
        permutation_logps(lambda tokens: None, codec, [[1, 2]], [4], "full_vocabulary", [[0.0] * 4])


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_gradient_with_a_prior_is_that_of_the_enumerated_distribution(kind):
    """The score function has mean zero under the distribution with the prior, and not under the one without."""
    tokenizer = TOKENIZERS[kind]()
    model = tiny_llama(tokenizer).double()
    codec = PermutationCodec(tokenizer, 12, num_selected=2)
    prompt, everything = tokenizer("Question: who?").input_ids, list(itertools.permutations(range(1, 12), 2))
    prior = ranked_logits(random.Random(1).sample(range(1, 12), 11), 1.0)
    logps = enumerate_logps(model, codec, prompt, everything, 11, document_logits=[prior] * len(everything))
    weight = model.get_output_embeddings().weight

    def mean_score(probabilities):
        [gradient] = torch.autograd.grad((probabilities.detach() * logps).sum(), weight, retain_graph=True)
        return gradient.abs().max().item()

    without = enumerate_logps(model, codec, prompt, everything, 11).exp()
    assert mean_score(logps.exp()) < 1e-5 < 1e-2 < mean_score(without)


def all_lengths(n, min_selected, num_selected):
    return [z for size in range(min_selected, num_selected + 1) for z in itertools.permutations(range(1, n + 1), size)]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("min_selected", [0, 1])
def test_probabilities_of_permutations_of_all_lengths_sum_to_one(kind, min_selected):
    tokenizer = TOKENIZERS[kind]()
    model = tiny_llama(tokenizer)
    prompt = tokenizer("Question: who wrote the book?").input_ids
    for n, k, strength in ((4, 3, 0.0), (12, 2, 0.0), (12, 2, 1.5), (2, 2, 0.0)):
        codec = PermutationCodec(tokenizer, 12, k, min_selected)
        everything = all_lengths(n, min_selected, k)
        assert len(everything) == codec.num_permutations(n)
        prior = [ranked_logits(range(n, 0, -1), strength)] * len(everything)
        with torch.no_grad():
            logps = enumerate_logps(model, codec, prompt, everything, n, document_logits=prior)
        assert logps.double().exp().sum().item() == pytest.approx(1.0, abs=1e-5)
        assert min_selected > 0 or logps[0] < 0  # none at all is one of the choices


def test_a_prior_says_which_documents_and_not_how_many():
    tokenizer = word_level_tokenizer()
    model = tiny_llama(tokenizer)
    codec = PermutationCodec(tokenizer, 4, 2, 0)
    prompt, everything = tokenizer("Question: who?").input_ids, all_lengths(4, 0, 2)
    prior = [ranked_logits([3, 1, 4, 2], 2.0)] * len(everything)
    with torch.no_grad():
        alone = enumerate_logps(model, codec, prompt, everything, 4)
        actual = enumerate_logps(model, codec, prompt, everything, 4, document_logits=prior)
    assert actual[0].item() == pytest.approx(alone[0].item(), abs=1e-5)  # none
    assert (actual - alone).abs().max() > 0.1


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_permutations_of_every_length_round_trip(kind):
    codec = PermutationCodec(TOKENIZERS[kind](), 12, 3, 0)
    for permutation in ([], [12], [1, 12], [12, 1, 3]):
        tokens, branches = codec.encode(permutation)
        assert codec.decode(tokens) == permutation and len(tokens) <= codec.max_length
        assert codec.decode(tokens[:-1]) == permutation
        assert [tokens[b.position] for b in branches] == [b.allowed[b.chosen] for b in branches]
        assert len(codec.padded(permutation)) == 3
    with pytest.raises(ValueError, match="is not 0 to 3 distinct ids"):
        codec.encode([1, 2, 3, 4])
    with pytest.raises(ValueError, match="min_selected=4 must lie between 0 and num_selected, 3"):
        PermutationCodec(word_level_tokenizer(), 12, 3, 4)


def test_the_retrievers_prior_is_one_over_the_rank_to_the_power_of_its_strength():
    weights = torch.tensor(ranked_logits([3, 1, 2], strength=2.0)).exp()
    torch.testing.assert_close(weights, torch.tensor([1 / 9, 1.0, 1 / 4]))
