# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import itertools

import pytest
import torch

from trl_dro.model.codec import PermutationCodec
from trl_dro.model.likelihood import completion_logits
from trl_dro.model.permutation import permutation_logps, unique_permutations

from ..tiny_models import TOKENIZERS, bpe_tokenizer, tiny_llama


CPU = torch.device("cpu")


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
