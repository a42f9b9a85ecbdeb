import pytest

from trl_dro.data.synthetic import synthetic_world
from trl_dro.permutation import PermutationCodec
from trl_dro.prompts import PromptBuilder
from trl_dro.tiny import GENERATOR_TEMPLATE, SELECTOR_TEMPLATE
from trl_dro.warmup import generator_examples, selector_examples

from .tiny_models import TOKENIZERS


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
