import pytest

from trl_dro.data.synthetic import synthetic_world


def test_same_seed_gives_same_records():
    first = synthetic_world(num_train=20, num_eval=10, seed=3)
    again = synthetic_world(num_train=20, num_eval=10, seed=3)
    assert [split.to_list() for split in first] == [split.to_list() for split in again]
    assert first[0].to_list() != synthetic_world(num_train=20, num_eval=10, seed=4)[0].to_list()


def test_train_and_eval_share_no_person():
    train, test = synthetic_world(num_train=400, num_eval=200)
    titles = [{document["title"] for record in split for document in record["documents"]} for split in (train, test)]
    assert titles[0].isdisjoint(titles[1])


@pytest.mark.parametrize("num_documents", [2, 5, 20])
def test_only_the_positive_document_contains_the_answer(num_documents):
    for split in synthetic_world(num_train=50, num_eval=20, num_documents=num_documents):
        for record in split:
            assert len(record["documents"]) == num_documents
            containing = [
                document["id"] for document in record["documents"] if record["answers"][0] in document["text"]
            ]
            assert containing == record["positive_ids"]


def test_document_ids_are_unique():
    documents = [document for split in synthetic_world(30, 30) for record in split for document in record["documents"]]
    assert len({document["id"] for document in documents}) == len(documents)


def test_retriever_is_better_than_chance_but_poor():
    train, _ = synthetic_world(num_train=1000, num_eval=1, num_documents=5)
    first = sum(record["documents"][0]["id"] in record["positive_ids"] for record in train) / len(train)
    assert 0.2 < first < 0.5


@pytest.mark.parametrize("num_documents", [1, 21])
def test_unsupported_number_of_documents_raises(num_documents):
    with pytest.raises(ValueError, match="between 2 and 20"):
        synthetic_world(num_train=1, num_eval=1, num_documents=num_documents)
