# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import random

import pytest

from trl_dro.model.codec import PermutationCodec, parse_permutation

from ..tiny_models import TOKENIZERS, bpe_tokenizer, word_level_tokenizer


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("max_documents", [20, 120])
def test_codec_round_trips_every_id(kind, max_documents):
    codec = PermutationCodec(TOKENIZERS[kind](), max_documents, num_selected=3)
    for i in range(1, max_documents + 1):
        others = random.sample([j for j in range(1, max_documents + 1) if j != i], 2)
        for permutation in ([i, *others], [*others, i]):
            tokens, _ = codec.encode(permutation)
            assert codec.decode(tokens) == permutation
            assert codec.decode(tokens[:-1]) == permutation  # without eos
            assert len(tokens) <= codec.max_length


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_written_permutation_reads_as_text(kind):
    tokenizer = TOKENIZERS[kind]()
    codec = PermutationCodec(tokenizer, 20, num_selected=3)
    tokens, _ = codec.encode([3, 12, 1])
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert parse_permutation(text, 20, 3) == ([3, 12, 1], 0)


def test_branches_are_where_a_choice_is_left():
    codec = PermutationCodec(bpe_tokenizer(split_digits=True), max_documents=12, num_selected=2)
    tokens, branches = codec.encode([1, 12])
    # "1" against "2".."9", then "]" against "0", "1", "2"; again, and then without the "]" of the used [1].
    assert [len(branch.allowed) for branch in branches] == [9, 4, 9, 3]
    assert [tokens[branch.position] for branch in branches] == [b.allowed[b.chosen] for b in branches]
    _, branches = codec.encode([2, 1], num_documents=2)
    assert [len(branch.allowed) for branch in branches] == [2]  # the second id is all that is left


@pytest.mark.parametrize(
    "permutation, message",
    [([1], "2 distinct"), ([1, 1], "2 distinct"), ([1, 5], "outside 1..4"), ([0, 1], "outside")],
)
def test_encoding_refuses_what_is_no_permutation(permutation, message):
    codec = PermutationCodec(word_level_tokenizer(), 4, num_selected=2)
    with pytest.raises(ValueError, match=message):
        codec.encode(permutation)


def test_decoding_refuses_broken_tokens():
    codec = PermutationCodec(bpe_tokenizer(split_digits=True), 12, num_selected=2)
    tokens, _ = codec.encode([1, 12])
    repeated = codec.encode([1, 2])[0]
    for broken in (tokens[:-3], tokens + tokens[:1], [0, *tokens], repeated[:-3] + codec.encode([1, 2])[0][1:2] * 3):
        with pytest.raises(ValueError, match="do not write a permutation"):
            codec.decode(broken)


def test_ids_that_look_alike_to_the_tokenizer_are_refused():
    tokenizer = word_level_tokenizer()
    with pytest.raises(ValueError, match="cannot tell document ids"):
        PermutationCodec(tokenizer, 4000, num_selected=2)


def test_constructor_refuses_impossible_sizes_and_a_missing_eos():
    tokenizer = word_level_tokenizer()
    with pytest.raises(ValueError, match="num_selected=5 must lie between 1 and the number of documents, 4"):
        PermutationCodec(tokenizer, 4, num_selected=5)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos token"):
        PermutationCodec(tokenizer, 4, num_selected=2)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("[3] > [1] > [17]", ([3, 1, 17], 0)),
        ("[3] > [3] > [1]", ([3, 1], 1)),
        ("The 2 best are [4] and [2].", ([4, 2], 0)),
        ("3, 1, 99, 0", ([3, 1], 2)),
        ("[1] > [2] > [3] > [4]", ([1, 2, 3], 1)),
        ("I cannot rank these.", ([], 0)),
        ("", ([], 0)),
        ("9" * 5000, ([], 0)),
    ],
)
def test_parser_drops_what_is_invalid_and_counts_it(text, expected):
    assert parse_permutation(text, num_documents=20, num_selected=3) == expected
