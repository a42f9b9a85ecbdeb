import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_dro.demo.tiny import GENERATOR_TEMPLATE, SELECTOR_TEMPLATE, TINY_MODEL
from trl_dro.demo.world import draw_world, synthetic_world
from trl_dro.model.codec import PermutationCodec
from trl_dro.model.prompts import PromptBuilder


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY_MODEL).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_MODEL)


@pytest.fixture(scope="module")
def records():
    """Questions whose answer was retrieved."""
    rows = synthetic_world(1, 80, seed=11)[1].to_list()
    return [row for row in rows if row["positive_ids"][0] in [document["id"] for document in row["documents"]]]


def test_it_is_small(model, tokenizer):
    assert model.num_parameters() <= 8e6 and len(tokenizer) <= 4096
    assert sum(path.stat().st_size for path in TINY_MODEL.iterdir()) < 16 * 2**20


def test_a_document_id_is_one_token(tokenizer):
    codec = PermutationCodec(tokenizer, 20, 5)
    assert all(len(tokens) == 1 for tokens in [codec.separator, *codec.id_tokens.values()])


@pytest.mark.parametrize("text", ["Ada Lind", "Amber Guild", "Kaltthal", "naïve café, 東京 1907"])
def test_a_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids).strip() == text


def test_it_finds_the_right_passage_of_twenty_more_often_than_the_retriever(model, tokenizer, records):
    """Relations that it never saw: the skill is general."""
    prompts = PromptBuilder(tokenizer, SELECTOR_TEMPLATE, 5)
    ids = [tokenizer.convert_tokens_to_ids(f"[{i}]") for i in range(1, 21)]
    hits, retriever_hits = 0, 0
    for record in records:
        positive = [document["id"] for document in record["documents"]].index(record["positive_ids"][0])
        with torch.no_grad():
            logits = model(torch.tensor([prompts(record["question"], record["documents"])])).logits[0, -1, ids]
        hits += positive in logits.topk(5).indices
        retriever_hits += positive < 5
    assert hits > retriever_hits + 0.1 * len(records)


def test_it_reads_the_right_one_of_five_passages_wherever_it_stands(model, tokenizer, records):
    prompts = PromptBuilder(tokenizer, GENERATOR_TEMPLATE, 5)
    rng = random.Random(0)
    right = {0: 0, 3: 0}
    for record in records:
        [positive] = [document for document in record["documents"] if document["id"] == record["positive_ids"][0]]
        others = rng.sample([document for document in record["documents"] if document is not positive], 4)
        for place in right:
            prompt = prompts(record["question"], [*others[:place], positive, *others[place:]])
            with torch.no_grad():
                output = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
            answer = tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).strip()
            right[place] += answer == record["answers"][0]
    # Names of one kind are drawn from a hundred: chance is a fifth at best.
    assert min(right.values()) > 0.4 * len(records), right


def test_it_follows_a_name_to_the_passage_that_only_the_first_one_tells_apart(model, tokenizer):
    """Of the others, three say the same of persons of that nationality: a guess is right once in four times."""
    world = draw_world(3, "eval")
    passages = {passage["id"]: passage for passage in world.corpus}
    prompts, codec, rng = (
        PromptBuilder(tokenizer, SELECTOR_TEMPLATE, 2),
        PermutationCodec(tokenizer, 5, 2),
        random.Random(0),
    )
    ids = [tokenizer.convert_tokens_to_ids(f"[{i}]") for i in range(1, 6)]
    right = 0
    for question in rng.sample(world.two_hop, 60):
        first, second = (passages[i] for i in question["positive_ids"])
        words = set(second["text"].split())
        rivals = sorted(world.corpus, key=lambda p: len(words & set(p["text"].split())) if p is not second else -1)[
            -3:
        ]
        documents = rng.sample([first, second, *rivals], 5)
        prompt = [*prompts(question["question"], documents), ids[documents.index(first)], *codec.separator]
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, -1, ids]
        right += documents[logits.argmax()] is second
    assert right > 0.6 * 60
