import pytest

from trl_dro.demo.world import NATIONALITIES, RELATIONS, draw_world, synthetic_world
from trl_dro.metrics.text import recall_at_k


@pytest.fixture(scope="module")
def single_hop():
    return [split.to_list() for split in synthetic_world(400, 400, seed=7)]


@pytest.fixture(scope="module")
def two_hop():
    return [split.to_list() for split in synthetic_world(300, 300, seed=7, two_hop_share=1.0)]


def recall(records, k):
    texts = [[document["text"] for document in record["documents"]] for record in records]
    return sum(recall_at_k(t, record["answers"], k) for t, record in zip(texts, records, strict=True)) / len(records)


def nationality(record):
    [found] = set(NATIONALITIES) & set(record["question"].split())
    return found


def test_same_seed_gives_same_records():
    first, again = (synthetic_world(20, 10, seed=3) for _ in range(2))
    assert [split.to_list() for split in first] == [split.to_list() for split in again]
    assert first[0].to_list() != synthetic_world(20, 10, seed=4)[0].to_list()


def test_the_corpus_is_large_and_its_ids_are_unique():
    for split in ("train", "eval"):
        corpus = draw_world(0, split).corpus
        assert len({passage["id"] for passage in corpus}) == len(corpus) >= 5000


def test_train_and_eval_share_no_entity_even_if_their_seeds_differ():
    train, test = (draw_world(seed, split) for seed, split in ((1, "train"), (2, "eval")))
    names = [
        {passage["title"] for passage in world.corpus} | {q["answers"][0] for q in world.single_hop + world.two_hop}
        for world in (train, test)
    ]
    assert names[0].isdisjoint(names[1])


@pytest.mark.parametrize("seed", [0, 7, 123])
def test_the_retriever_finds_the_answer_among_its_first_five_for_half_of_the_questions(seed):
    for split in synthetic_world(400, 400, seed=seed):
        assert 0.48 < recall(split.to_list(), 5) < 0.64
        assert recall(split.to_list(), 20) > 0.9


def test_the_answer_stands_in_the_last_passage_that_is_needed(single_hop, two_hop):
    for split in ("train", "eval"):
        world = draw_world(7, split)
        texts = {passage["id"]: passage["text"] for passage in world.corpus}
        for question in world.single_hop[:500] + world.two_hop[:500]:
            assert question["answers"][0] in texts[question["positive_ids"][-1]]


def test_a_two_hop_question_names_the_first_passage_only_and_many_passages_are_as_likely_as_the_second():
    world = draw_world(7, "eval")
    passages = {passage["id"]: passage for passage in world.corpus}
    for question in world.two_hop[:300]:
        first, second = (passages[i] for i in question["positive_ids"])
        assert first["title"] in question["question"]
        assert second["title"] not in question["question"] and second["title"] in first["text"]
        assert nationality(question) in second["text"]


def test_two_hop_questions_have_distractors_that_only_the_first_passage_rules_out(two_hop):
    counts = []
    for record in two_hop[1]:
        counts.append(sum(nationality(record) in document["text"] for document in record["documents"]))
    assert sum(counts) / len(counts) > 5


def test_every_relation_is_worded_in_two_ways_with_a_common_stem():
    for relation in RELATIONS:
        stem = relation.participle.removesuffix("ed")
        assert relation.noun.startswith(stem) and relation.participle not in relation.noun.split()
