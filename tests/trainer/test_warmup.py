# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import gzip
import json
from collections import Counter

import pytest

from trl_dro.data import DatasetError
from trl_dro.demo.tiny import GENERATOR_TEMPLATE, SELECTOR_TEMPLATE
from trl_dro.demo.world import synthetic_world
from trl_dro.model.codec import PermutationCodec
from trl_dro.model.prompts import PromptBuilder
from trl_dro.trainer.warmup import generator_examples, read_listwise_rankings, relevant_first, selector_examples

from ..tiny_models import TOKENIZERS


NUM_SELECTED = 3


@pytest.fixture(scope="module")
def records():
    return synthetic_world(40, 1, num_documents=8)[0].to_list()


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def completion(row):
    return [token for token, counts in zip(row["input_ids"], row["completion_mask"], strict=True) if counts]


def prompt(row):
    return row["input_ids"][: row["completion_mask"].index(1)]


def test_without_noise_the_teacher_is_the_retriever(tokenizer, records):
    codec = PermutationCodec(tokenizer, 8, NUM_SELECTED)
    prompts = PromptBuilder(tokenizer, SELECTOR_TEMPLATE, NUM_SELECTED)
    rows = selector_examples(records, prompts, codec, rank_noise=0.0, shuffle_candidates=False)
    assert all(codec.decode(completion(row)) == [1, 2, 3] for row in rows)


def test_the_selector_sees_the_prompt_of_the_candidates_in_the_order_that_the_ids_count(records):
    tokenizer = TOKENIZERS["byte-level BPE, whole numbers"]()
    codec = PermutationCodec(tokenizer, 8, NUM_SELECTED)
    prompts = PromptBuilder(tokenizer, SELECTOR_TEMPLATE, NUM_SELECTED)
    orders = []
    for record, row in zip(records, selector_examples(records, prompts, codec, rank_noise=0.0), strict=True):
        permutation = codec.decode(completion(row))
        text = tokenizer.decode(prompt(row))
        for rank, number in enumerate(permutation):
            assert f"[{number}] {record['documents'][rank]['title']}" in text
        orders.append(permutation)
    assert len(set(map(tuple, orders))) > 20  # shuffled


def test_a_selector_that_may_end_is_taught_to_end_anywhere(records):
    tokenizer = TOKENIZERS["byte-level BPE, whole numbers"]()
    codec = PermutationCodec(tokenizer, 8, NUM_SELECTED, min_selected=0)
    prompts = PromptBuilder(tokenizer, SELECTOR_TEMPLATE, NUM_SELECTED)
    rows = selector_examples(records * 5, prompts, codec, rank_noise=0.0, shuffle_candidates=False)
    taught = [codec.decode(completion(row)) for row in rows]
    assert all(permutation == [1, 2, 3][: len(permutation)] for permutation in taught)
    assert all(count > 30 for count in Counter(map(len, taught)).values()) and len(set(map(len, taught))) == 4


def test_noise_makes_the_teacher_mediocre_but_not_random(records):
    tokenizer = TOKENIZERS["byte-level BPE, whole numbers"]()
    codec = PermutationCodec(tokenizer, 8, NUM_SELECTED)
    prompts = PromptBuilder(tokenizer, SELECTOR_TEMPLATE, NUM_SELECTED)
    rows = selector_examples(records * 5, prompts, codec, rank_noise=4.0, shuffle_candidates=False)
    kept = [len({1, 2, 3} & set(codec.decode(completion(row)))) for row in rows]
    assert 3 * 3 / 8 < sum(kept) / len(kept) < 2.5


def test_the_generator_reads_the_retrievers_first_documents_and_answers(tokenizer, records):
    prompts = PromptBuilder(tokenizer, GENERATOR_TEMPLATE, NUM_SELECTED)
    for record, row in zip(records, generator_examples(records, prompts), strict=True):
        assert prompt(row) == prompts(record["question"], record["documents"][:NUM_SELECTED])
        answer = tokenizer(record["answers"][0], add_special_tokens=False).input_ids
        assert completion(row) == [*answer, tokenizer.eos_token_id]


def test_relevant_documents_come_first_and_the_others_keep_their_order(records):
    for record in records:
        documents = relevant_first(record)["documents"]
        positives = [document["id"] in record["positive_ids"] for document in documents]
        assert positives == sorted(positives, reverse=True)
        rest = [document for document in record["documents"] if document["id"] not in record["positive_ids"]]
        assert documents[sum(positives) :] == rest
    unlabelled = {**record, "positive_ids": None, "answers": [record["documents"][4]["text"]]}
    assert relevant_first(unlabelled)["documents"][0] == record["documents"][4]


PROMPT = (
    "I will provide you with 4 passages, each indicated by number identifier [].\n"
    "[1] about Paris\n[2] about Rome, [7] hills\n[3] about Oslo\n[4] about Bern\n"
    "Search Query: which city has hills?.\nRank the 4 passages above."
)


def conversation(ranking, prompt=PROMPT):
    turns = [("system", "You are a ranker."), ("human", prompt), ("gpt", ranking)]
    return {"id": "1", "conversations": [{"from": name, "value": value} for name, value in turns]}


@pytest.mark.parametrize("name", ["rankings.jsonl", "rankings.jsonl.gz"])
def test_rankings_of_another_reranker_become_records_in_its_order(tmp_path, tokenizer, name):
    lines = "".join(json.dumps(conversation(ranking)) + "\n" for ranking in ("[2] > [4] > [1] > [3]", "[3] > [1]"))
    with (gzip.open if name.endswith("gz") else open)(tmp_path / name, "wt") as file:
        file.write(lines)
    records = read_listwise_rankings(tmp_path / name)
    assert [record["question"] for record in records] == ["which city has hills?"] * 2
    assert records[0]["documents"][0]["text"] == "about Rome, [7] hills"
    assert [[document["id"] for document in record["documents"]] for record in records] == [
        ["2", "4", "1", "3"],
        ["3", "1", "2", "4"],
    ]
    codec = PermutationCodec(tokenizer, 4, NUM_SELECTED)
    prompts = PromptBuilder(tokenizer, SELECTOR_TEMPLATE, NUM_SELECTED)
    rows = selector_examples(records, prompts, codec, rank_noise=0.0, shuffle_candidates=False)
    assert all(codec.decode(completion(row)) == [1, 2, 3] for row in rows)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"conversations": []}, "line 1, key conversations: must have"),
        ({"messages": "no"}, "line 1, key conversations: must have"),
        (conversation("[2] > [1]", "Search Query: x\n[1] a\n[3] b"), "line 1: the human's turn needs"),
        (conversation("[2] > [1]", "[1] a\n[2] b"), "line 1: the human's turn needs"),
        (conversation("none of them"), "line 1: the assistant's turn ranks none of the 4 passages"),
    ],
)
def test_broken_rankings_are_named_by_file_and_line(tmp_path, row, message):
    (tmp_path / "rankings.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DatasetError, match=message):
        read_listwise_rankings(tmp_path / "rankings.jsonl")
