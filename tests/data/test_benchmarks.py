# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import json
from collections import Counter

import pytest
from datasets import Dataset, DatasetDict

from trl_dro.data import DatasetError, load_benchmark, validate_dataset
from trl_dro.data import benchmarks as module
from trl_dro.data.benchmarks import BENCHMARKS, benchmark_summary


@pytest.fixture
def write(tmp_path):
    """Writes rows as a list (.json) or as lines (.jsonl)."""

    def write(rows, name="file.jsonl"):
        path = tmp_path / name
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(lines if name.endswith("jsonl") else json.dumps(rows))
        return path

    return write


HOTPOTQA = {
    "_id": "h1",
    "question": "Who sang in the band of Anna?",
    "answer": "Bert",
    "supporting_facts": [["Anna", 0], ["The Band", 1]],
    "context": [
        ["Anna", ["Anna plays. ", " In The Band."]],
        ["Fox", ["Red."]],
        ["The Band", ["A band.", "Bert sang."]],
    ],
    "type": "bridge",
    "level": "hard",
}
HOTPOTQA_HUB = {
    "id": "h1",
    "question": HOTPOTQA["question"],
    "answer": "Bert",
    "supporting_facts": {"title": ["Anna", "The Band"], "sent_id": [0, 1]},
    "context": {
        "title": [title for title, _ in HOTPOTQA["context"]],
        "sentences": [sentences for _, sentences in HOTPOTQA["context"]],
    },
    "type": "bridge",
    "level": "hard",
}
HOTPOTQA_FLASHRAG = {
    "id": "h1",
    "question": HOTPOTQA["question"],
    "golden_answers": ["Bert"],
    "metadata": {key: HOTPOTQA_HUB[key] for key in ("type", "level", "supporting_facts", "context")},
}
WIKI_FLASHRAG = HOTPOTQA_FLASHRAG | {
    "metadata": {
        "supporting_facts": HOTPOTQA_HUB["supporting_facts"],
        "context": {"title": HOTPOTQA_HUB["context"]["title"], "content": HOTPOTQA_HUB["context"]["sentences"]},
    }
}
MUSIQUE = {
    "id": "2hop__1_2",
    "question": "Where was the singer born?",
    "answer": "Rome",
    "answer_aliases": ["Roma", "Rome"],
    "answerable": True,
    "paragraphs": [
        {"idx": 0, "title": "Bert", "paragraph_text": "Bert sang.", "is_supporting": True},
        {"idx": 1, "title": "Bert", "paragraph_text": "Bert was born in Rome.", "is_supporting": True},
        {"idx": 2, "title": "Fox", "paragraph_text": "Red.", "is_supporting": False},
    ],
}
TEVATRON = {
    "query_id": "7",
    "query": "who sang",
    "answers": ["Bert", "Bertie"],
    "positive_passages": [{"docid": "11", "title": "Bert", "text": "Bert sang."}],
    "negative_passages": [{"docid": str(n), "title": "Fox", "text": f"Fox {n}."} for n in range(20, 25)],
}
DPR = {
    "dataset": "nq_dev_psgs_w100",
    "question": "who sang",
    "answers": ["Bert"],
    "positive_ctxs": [{"title": "Bert", "text": "Bert sang.", "score": 9, "title_score": 0, "passage_id": "11"}],
    "negative_ctxs": [{"title": "Fox", "text": "Red.", "score": 0, "title_score": 0, "passage_id": "12"}],
    "hard_negative_ctxs": [{"title": "Ant", "text": "Small.", "score": 0, "title_score": 0, "passage_id": "13"}],
}
KILT = {
    "id": "k1",
    "input": "who sang",
    "meta": {},
    "output": [
        {"answer": "Bert", "meta": {"score": 1}, "provenance": [{"wikipedia_id": "5", "title": "Bert"}]},
        {"answer": "Bertie", "meta": {"score": 1}, "provenance": []},
        {"answer": "", "meta": {"score": 1}, "provenance": [{"wikipedia_id": "6", "title": "Ant"}]},
        {"answer": "Bert", "meta": {"score": 1}, "provenance": None},
    ],
}
WOW_KILT = {
    "id": "w1",
    "input": "I love bees.\nThey make honey.\nHow much of it?",
    "output": [{"answer": "About a spoon in a life.", "provenance": [{"wikipedia_id": "9", "title": "Bee"}]}],
}
WOW_PARLAI = {
    "chosen_topic": "Bee",
    "persona": "i keep bees.",
    "wizard_eval": 5,
    "chosen_topic_passage": ["Bees fly.", "Bees make honey."],
    "dialog": [
        {
            "speaker": "0_Wizard",
            "text": "Did you know that bees make honey?",
            "checked_sentence": {"chosen_Bee_1": "Bees make honey."},
            "checked_passage": {"chosen_topic_0_Bee": "Bee"},
            "retrieved_passages": [{"Honey": ["Honey is sweet.", "It keeps."]}],
            "retrieved_topics": ["Honey"],
        },
        {
            "speaker": "1_Apprentice",
            "text": "Does it keep?",
            "retrieved_passages": [{"Keeping": ["Keepers keep."]}, {"Empty": [""]}],
            "retrieved_topics": ["Keeping", "Empty"],
        },
        {
            "speaker": "0_Wizard",
            "text": "For ever.",
            "checked_sentence": {"self_Honey_1": "It keeps."},
            "checked_passage": {"self_0_Honey": "Honey"},
            "retrieved_passages": [],
            "retrieved_topics": [],
        },
        {"speaker": "1_Apprentice", "text": "Good.", "retrieved_passages": [], "retrieved_topics": []},
        {
            "speaker": "0_Wizard",
            "text": "Indeed.",
            "checked_sentence": {"no_passages_used": "no_passages_used"},
            "checked_passage": {"no_passages_used": "no_passages_used"},
            "retrieved_passages": [],
            "retrieved_topics": [],
        },
    ],
}


def one(name, path):
    dataset = load_benchmark(name, "dev", source=path)
    assert len(dataset) == 1
    return dataset[0]


@pytest.mark.parametrize(
    "name, row",
    [
        ("hotpotqa", HOTPOTQA),
        ("hotpotqa", HOTPOTQA_HUB),
        ("hotpotqa", HOTPOTQA_FLASHRAG),
        ("2wikimultihopqa", HOTPOTQA),
        ("2wikimultihopqa", WIKI_FLASHRAG),
    ],
    ids=["hotpotqa official", "hotpotqa Hub", "hotpotqa FlashRAG", "2wiki official", "2wiki FlashRAG"],
)
def test_every_form_of_a_multi_hop_question_gives_the_same_record(name, row, write):
    record = one(name, write([row], "file.json"))
    assert record == {
        "id": "h1",
        "question": "Who sang in the band of Anna?",
        "answers": ["Bert"],
        "documents": [
            {"id": "Anna", "title": "Anna", "text": "Anna plays. In The Band."},
            {"id": "Fox", "title": "Fox", "text": "Red."},
            {"id": "The Band", "title": "The Band", "text": "A band. Bert sang."},
        ],
        "positive_ids": ["Anna", "The Band"],
    }


def test_two_paragraphs_of_one_title_have_ids_of_their_own(write):
    row = HOTPOTQA | {"context": [*HOTPOTQA["context"], ["Anna", ["Another Anna."]]]}
    record = one("2wikimultihopqa", write([row]))
    assert [document["id"] for document in record["documents"]] == ["Anna", "Fox", "The Band", "Anna (2)"]
    assert record["positive_ids"] == ["Anna", "The Band", "Anna (2)"]


def test_musique_keeps_aliases_and_paragraphs_that_share_a_title(write):
    record = one("musique", write([MUSIQUE]))
    assert record["answers"] == ["Rome", "Roma"]
    assert record["positive_ids"] == ["2hop__1_2/0", "2hop__1_2/1"]
    assert [document["text"] for document in record["documents"]] == ["Bert sang.", "Bert was born in Rome.", "Red."]


def test_musique_without_an_answer_is_left_out_and_counted(write, caplog):
    rows = [MUSIQUE, MUSIQUE | {"answerable": False}, MUSIQUE | {"answerable": False, "id": "x"}]
    assert len(load_benchmark("musique", source=write(rows))) == 1
    assert "2 questions that cannot be answered are left out" in caplog.text


def test_aliases_of_2wikimultihopqa_are_read_beside_the_file(write, tmp_path):
    aliases = {"Q_id": "Q1", "aliases": ["Bertie"], "demonyms": ["Bertian"]}
    (tmp_path / "id_aliases.json").write_text(json.dumps(aliases) + "\n")
    assert one("2wikimultihopqa", write([HOTPOTQA | {"answer_id": "Q1"}]))["answers"] == ["Bert", "Bertie", "Bertian"]
    assert one("2wikimultihopqa", write([HOTPOTQA | {"answer_id": None}]))["answers"] == ["Bert"]


def test_tevatron_and_dpr_passages_do_not_come_positives_first(write):
    rows = [TEVATRON | {"query_id": str(number)} for number in range(60)]
    dataset = load_benchmark("nq", source=write(rows))
    places = Counter([document["id"] for document in row["documents"]].index("11") for row in dataset)
    assert set(places) == set(range(6))  # at all six places, so the place tells nothing
    assert dataset[0]["answers"] == ["Bert", "Bertie"] and dataset[0]["positive_ids"] == ["11"]
    assert load_benchmark("nq", source=write(rows)).to_list() == dataset.to_list()
    record = one("nq", write([DPR], "biencoder-nq-dev.json"))
    assert {document["id"] for document in record["documents"]} == {"11", "12", "13"}
    assert record["positive_ids"] == ["11"]


def test_kilt_keeps_every_answer_and_page_once(write):
    record = one("nq", write([KILT]))
    assert record == {"id": "k1", "question": "who sang", "answers": ["Bert", "Bertie"], "positive_ids": ["5", "6"]}


def test_rows_without_an_answer_are_left_out_and_counted(write, caplog):
    assert len(load_benchmark("nq", source=write([KILT, KILT | {"output": []}]))) == 1
    assert "1 rows without an answer are left out" in caplog.text


@pytest.mark.parametrize(
    "row", [{"question": "who sang", "answer": ["Bert", "Bertie"]}, {"question": "who sang", "answers": ["Bert"]}]
)
def test_nq_open_is_read(row, write):
    record = one("nq", write([row], "NQ-open.dev.jsonl"))
    assert record["question"] == "who sang" and record["answers"][0] == "Bert" and record["id"]


def test_dialogue_of_kilt_is_chat_that_ends_with_the_user(write):
    record = one("wow", write([WOW_KILT]))
    assert record["question"] == [
        {"role": "user", "content": "I love bees."},
        {"role": "assistant", "content": "They make honey."},
        {"role": "user", "content": "How much of it?"},
    ]
    assert record["answers"] == ["About a spoon in a life."] and record["positive_ids"] == ["9"]


def test_dialogue_of_parlai_gives_a_record_per_turn_of_the_wizard(write):
    dataset = load_benchmark("wow", "train", source=write([WOW_PARLAI], "train.json"))
    validate_dataset(dataset, num_selected=1)
    opening, answer, last = dataset
    assert opening["question"] == [{"role": "user", "content": "Bee"}]
    assert opening["answers"] == ["Did you know that bees make honey?"]
    assert [document["id"] for document in opening["documents"]] == ["Bee"]
    assert opening["positive_ids"] == ["Bee"]
    assert [message["role"] for message in answer["question"]] == ["user", "assistant", "user"]
    assert answer["question"][-1]["content"] == "Does it keep?"
    assert [document["id"] for document in answer["documents"]] == ["Bee", "Keeping", "Honey"]
    assert answer["positive_ids"] == ["Honey"]
    assert len(last["question"]) == 5 and last["positive_ids"] == []


def test_saved_and_parquet_copies_are_read_like_files(write, tmp_path):
    expected = one("hotpotqa", write([HOTPOTQA_HUB]))
    rows = Dataset.from_list([HOTPOTQA_HUB])
    rows.to_parquet(tmp_path / "dev.parquet")
    DatasetDict(dev=rows, train=rows).save_to_disk(tmp_path / "saved")
    assert one("hotpotqa", tmp_path / "dev.parquet") == expected == one("hotpotqa", tmp_path / "saved")
    with pytest.raises(DatasetError, match="has the splits dev, train, not 'test'"):
        load_benchmark("hotpotqa", "test", source=tmp_path / "saved")


@pytest.mark.parametrize(
    "source, name, config",
    [
        (None, "2wikimultihopqa", "2wikimultihopqa"),
        ("Tevatron/wikipedia-nq", "nq", None),
        ("hotpotqa/hotpot_qa", "hotpotqa", "distractor"),
        ("facebook/kilt_tasks", "wow", "wow"),
    ],
)
def test_hub_sources_are_asked_for_the_right_configuration(source, name, config, monkeypatch):
    asked = []

    def load_dataset(path, configuration):
        asked.append((path, configuration))
        return DatasetDict(dev=Dataset.from_list([HOTPOTQA_FLASHRAG | {"metadata": None}]))

    monkeypatch.setattr(module, "load_dataset", load_dataset)
    load_benchmark(name, "dev", source=source)
    assert asked == [(source or "RUC-NLPIR/FlashRAG_datasets", config)]


def test_wrong_name_lists_the_right_ones():
    with pytest.raises(DatasetError, match="'nqq'; choose one of nq, hotpotqa, musique, 2wikimultihopqa, wow"):
        load_benchmark("nqq")


def test_benchmark_that_a_source_lacks_is_refused():
    with pytest.raises(DatasetError, match="kilt_tasks has no musique, only nq, hotpotqa, wow"):
        load_benchmark("musique", source="facebook/kilt_tasks")


def test_missing_hub_offers_a_local_file():
    with pytest.raises(DatasetError, match="--source FILE") as info:
        load_benchmark("nq")
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    "rows, parts",
    [
        ([MUSIQUE, {"id": "x", "question": "?"}], ["line 2", "paragraphs"]),
        ([MUSIQUE, MUSIQUE | {"paragraphs": [{"idx": 0}]}], ["line 2", "not of the form", "title"]),
        ([MUSIQUE, MUSIQUE | {"question": " "}], ["line 2", "column question"]),
        ([{"prompt": "x"}], ["'prompt'", "no known form"]),
        ([HOTPOTQA | {"context": [["A", [""]]]}], ["line 1", "documents[0].text", "'A'"]),
    ],
)
def test_broken_rows_are_refused_with_the_place(rows, parts, write):
    path = write(rows)
    with pytest.raises(DatasetError) as info:
        load_benchmark("musique", source=path)
    for part in (str(path), *parts):
        assert part in str(info.value)


@pytest.mark.parametrize("content, part", [("[{", "line 1"), ("[1]", "row 0"), ("[]", "no rows")])
def test_broken_json_is_refused(content, part, tmp_path):
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(DatasetError, match=part):
        load_benchmark("hotpotqa", source=tmp_path / "file.json")


def test_summary_compares_with_the_paper():
    questions = Dataset.from_dict({"question": ["?"] * 2417})
    assert benchmark_summary("musique", "dev", questions).endswith(
        "2,417 questions (as many as in Table 1 of the paper)"
    )
    assert "3 questions (19,938 in Table 1" in benchmark_summary("musique", "train", questions.select(range(3)))
    assert set(BENCHMARKS) == {"nq", "hotpotqa", "musique", "2wikimultihopqa", "wow"}


# Counts of the real samples, taken from the files without any code of the package.


def test_real_musique_is_loaded_whole(shared_data, caplog):
    path = shared_data / "raw" / "musique.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    dataset = load_benchmark("musique", "dev", source=path)
    validate_dataset(dataset, num_selected=5)
    assert not caplog.records
    assert len(dataset) == len(rows) == 100
    assert sum(len(row["documents"]) for row in dataset) == sum(len(row["paragraphs"]) for row in rows)
    supporting = [sum(paragraph["is_supporting"] for paragraph in row["paragraphs"]) for row in rows]
    assert [len(row["positive_ids"]) for row in dataset] == supporting
    for row, record in zip(rows, dataset, strict=True):
        assert set(record["answers"]) == {row["answer"], *row["answer_aliases"]}
        texts = {document["id"]: document["text"] for document in record["documents"]}
        gold = {paragraph["paragraph_text"] for paragraph in row["paragraphs"] if paragraph["is_supporting"]}
        assert {texts[document_id] for document_id in record["positive_ids"]} == gold


@pytest.mark.parametrize("name, size", [("hotpotqa", 100), ("2wikimultihopqa", 82)])
def test_real_multi_hop_questions_are_loaded_whole(name, size, shared_data, caplog):
    path = shared_data / "raw" / f"{name}.json"
    rows = json.loads(path.read_text())
    dataset = load_benchmark(name, "dev", source=path)
    validate_dataset(dataset, num_selected=5)
    assert not caplog.records
    assert len(dataset) == len(rows) == size
    for row, record in zip(rows, dataset, strict=True):
        assert record["id"] == row["_id"] and record["answers"] == [row["answer"]]
        assert [document["title"] for document in record["documents"]] == [title for title, _ in row["context"]]
        for document, (_, sentences) in zip(record["documents"], row["context"], strict=True):
            assert document["text"].split() == " ".join(sentences).split()
        gold = {title for title, _ in row["supporting_facts"]}
        assert len(record["positive_ids"]) == sum(title in gold for title, _ in row["context"])
