import pytest
import torch

from trl_dro.data.synthetic import synthetic_world
from trl_dro.tiny import MAX_ID, completion_loss, generator_pair, selector_pair, tiny_llama, tiny_tokenizer, warm_up


@pytest.fixture(scope="module")
def records():
    return synthetic_world(num_train=200, num_eval=1)[0].to_list()


@pytest.fixture(scope="module")
def tokenizer(records):
    return tiny_tokenizer(text for record in records for text in record_texts(record))


def record_texts(record):
    documents = [f"{document['title']} {document['text']}" for document in record["documents"]]
    return [record["question"], *record["answers"], *documents]


def reading_pairs(records):
    return [generator_pair(record["question"], record["documents"], record["answers"][0]) for record in records[:32]]


def test_every_id_is_one_token_of_its_own(tokenizer):
    ids = [tokenizer(f"[{i}]").input_ids for i in range(1, MAX_ID + 1)]
    assert all(len(tokens) == 1 for tokens in ids)
    assert len({tokens[0] for tokens in ids} | {tokenizer.unk_token_id}) == MAX_ID + 1
    assert tokenizer(" > ").input_ids != [tokenizer.unk_token_id]


def test_prompts_have_no_unknown_word(tokenizer, records):
    for record in records:
        for prompt, completion in [
            selector_pair(record["question"], record["documents"], [2, 0]),
            generator_pair(record["question"], record["documents"], record["answers"][0]),
        ]:
            assert tokenizer.unk_token_id not in tokenizer(prompt + " " + completion).input_ids


def test_permutation_is_written_with_ids_from_one(records):
    assert selector_pair("?", records[0]["documents"], [2, 0])[1] == "[3] > [1]"


def test_same_seed_gives_same_weights_and_leaves_the_random_state(tokenizer):
    state = torch.get_rng_state()
    first, again = (tiny_llama(tokenizer, seed=1).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), state)


def test_loss_does_not_depend_on_padding(tokenizer, records):
    model = tiny_llama(tokenizer)
    short = generator_pair(records[0]["question"], records[0]["documents"][:1], "Oslo")
    long = generator_pair(records[1]["question"], records[1]["documents"], "Oslo")
    apart = (completion_loss(model, tokenizer, [short]) + completion_loss(model, tokenizer, [long])) / 2
    torch.testing.assert_close(completion_loss(model, tokenizer, [short, long]), apart)


def test_warm_up_lowers_the_loss(tokenizer, records):
    model = tiny_llama(tokenizer)
    before = completion_loss(model, tokenizer, reading_pairs(records)).item()
    warm_up(model, tokenizer, records, finding_steps=5, reading_steps=15, teacher_steps=5, batch_size=16)
    after = completion_loss(model, tokenizer, reading_pairs(records)).item()
    assert after < before - 0.5
