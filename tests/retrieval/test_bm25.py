# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import math
import random
import re
from collections import Counter

import bm25s
import pytest
from datasets import Dataset

from trl_dro.data import (
    Corpus,
    DatasetError,
    build_dataset,
    read_corpus,
    read_questions,
    validate_dataset,
)
from trl_dro.metrics import recall_at_k
from trl_dro.retrieval import BM25Retriever, retrieve_candidates


CORPUS = [
    {"id": "p0", "title": "Red fox", "text": "The largest of the true foxes."},
    {"id": "p1", "title": "Vitamin C", "text": "A vitamin found in food."},
    {"id": "p2", "title": "Vitamin K", "text": "A vitamin found in food."},
    {"id": "p3", "title": None, "text": "A thing of beauty is a joy for ever."},
    {"id": "p4", "text": "Bees make honey, and honey keeps: honey for ever."},
]


@pytest.fixture
def retriever():
    return BM25Retriever(CORPUS, show_progress=False)


@pytest.mark.parametrize(
    "query, best",
    [("joy of beauty", "p3"), ("red fox", "p0"), ("who found vitamin c", "p1"), ("what is vitamin k", "p2")],
)
def test_best_passage_comes_first_by_text_title_or_single_letter(retriever, query, best):
    [documents] = retriever.search([query], k=1)
    assert [document["id"] for document in documents] == [best]


UNSPACED_CORPUS = [
    {"id": "tower", "title": "東京タワー", "text": "東京タワーは1958年に竣工した電波塔である。"},
    {"id": "castle", "title": "姫路城", "text": "姫路城は兵庫県姫路市にある城である。"},
    {"id": "wall", "text": "长城是中国古代的军事防御工程。"},
    {"id": "rice", "text": "ข้าวเป็นอาหารหลักของคนไทย"},
    {"id": "bridge", "text": "สะพานพระราม ๘ ข้ามแม่น้ำเจ้าพระยา"},
    {"id": "river", "text": "गंगा भारत की सबसे लंबी नदी है।"},
    {"id": "well", "text": "यह गाँव के बीच का कुआँ था।"},
]


@pytest.mark.parametrize(
    "query, best",
    [
        ("電波塔の東京タワーはいつ竣工しましたか", "tower"),
        ("兵庫県にある城は何ですか", "castle"),
        ("中国古代修建了什么军事工程？", "wall"),
        ("คนไทยกินอะไรเป็นอาหาร", "rice"),
        ("แม่น้ำใดที่สะพานข้าม", "bridge"),
        ("भारत की नदी", "river"),
        ("１９５８年", "tower"),  # of full width
    ],
)
def test_questions_find_passages_in_scripts_without_spaces_and_with_marks(query, best):
    [ranking] = BM25Retriever(UNSPACED_CORPUS, show_progress=False).search([query], k=7)
    assert ranking[0]["id"] == best
    assert ranking[0]["score"] > ranking[1]["score"]


def test_a_vowel_sign_of_hindi_is_part_of_its_word():
    """`re` cuts there, so that की and के would both be क."""
    [ranking] = BM25Retriever(UNSPACED_CORPUS, show_progress=False).search(["की"], k=7)
    assert [row["id"] for row in ranking if row["score"] > 0] == ["river"]


def test_every_passage_is_ranked_once_whatever_the_query(retriever):
    for documents in retriever.search(["honey", "", "the", "xylophone"], k=5):
        assert sorted(document["id"] for document in documents) == ["p0", "p1", "p2", "p3", "p4"]


def test_ranking_does_not_depend_on_the_other_queries(retriever):
    queries = ["red fox", "vitamin", "honey for ever"]
    assert retriever.search(queries, k=3) == [retriever.search([query], k=3)[0] for query in queries]


def test_no_query_gives_no_ranking(retriever):
    assert retriever.search([], k=3) == []


def test_rare_word_outweighs_common_one(retriever):
    [documents] = retriever.search(["vitamin honey"], k=3)
    assert documents[0]["id"] == "p4"


def test_no_passages_at_all_are_refused(retriever):
    with pytest.raises(ValueError, match="k=0 .* set k to 1 or more"):
        retriever.search(["fox"], k=0)


def test_a_small_corpus_gives_all_it_has_and_says_so_once(caplog):
    small = BM25Retriever([*CORPUS, {"id": "small", "text": "Foxes eat honey."}], show_progress=False)
    first, second = small.search(["red fox", "honey"], k=20)
    assert {document["id"] for document in first} == {"p0", "p1", "p2", "p3", "p4", "small"}
    assert first == small.search(["red fox"], k=6)[0]
    assert len(second) == 6
    small.search(["vitamin"], k=20)
    assert [record.getMessage() for record in caplog.records] == [
        "the corpus has 6 passages, fewer than the 20 asked for: every question gets all of them"
    ]


def test_empty_corpus_is_refused():
    with pytest.raises(ValueError, match="no passages"):
        BM25Retriever([])


def test_candidates_are_valid_records_in_rank_order(retriever):
    questions = [{"id": f"q{i}", "question": "red fox", "answers": ["Vulpes vulpes"]} for i in range(5)]
    dataset = retrieve_candidates(Dataset.from_list(questions), retriever, k=3, batch_size=2)
    validate_dataset(dataset, num_selected=3)
    assert dataset["id"][:] == ["q0", "q1", "q2", "q3", "q4"]
    [ranking] = retriever.search(["red fox"], k=3)
    for row in dataset:
        assert [document["id"] for document in row["documents"]] == [document["id"] for document in ranking]


def test_dialogue_is_searched_with_all_its_turns(retriever):
    turns = [("user", "what do bees make?"), ("assistant", "honey"), ("user", "does it keep?")]
    question = [{"role": role, "content": content} for role, content in turns]
    questions = build_dataset([{"question": question, "answers": ["yes"]}])
    [row] = retrieve_candidates(questions, retriever, k=2)
    assert row["documents"][0]["id"] == "p4"
    assert row["question"] == question


def test_any_object_with_search_is_a_retriever():
    class Constant:
        def search(self, queries, k):
            return [CORPUS[:k] for _ in queries]

    questions = Dataset.from_list([{"question": "who?", "answers": ["she"]}])
    [row] = retrieve_candidates(questions, Constant(), k=2)
    assert [document["id"] for document in row["documents"]] == ["p0", "p1"]


def test_wrongly_named_column_is_refused_with_the_renaming(retriever):
    questions = Dataset.from_list([{"query": "who?", "answers": ["she"]}])
    with pytest.raises(DatasetError, match=r'rename_column\("query", "question"\)'):
        retrieve_candidates(questions, retriever, k=2)


WORDS = [f"z{first}{second}{third}" for first in "bdfgk" for second in "aeiou" for third in "prst"]


@pytest.fixture(scope="module")
def random_corpus():
    """200 passages of 5 to 30 words, of which some are frequent."""
    rng = random.Random(0)
    weights = [1 / rank for rank in range(1, len(WORDS) + 1)]
    texts = [" ".join(rng.choices(WORDS, weights, k=rng.randint(5, 30))) for _ in range(200)]
    return Corpus.from_documents([{"id": f"p{n}", "title": "", "text": text} for n, text in enumerate(texts)])


def random_queries(size):
    rng = random.Random(1)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 6))) for _ in range(size)]


def lucene_scores(texts, query, k1, b):
    """BM25 as its formula says, word by word."""
    words = [re.findall(r"\w+", text.lower()) for text in texts]
    mean_length = sum(map(len, words)) / len(words)
    scores = [0.0] * len(texts)
    for word in query.split():
        frequency = sum(word in of_text for of_text in words)
        idf = math.log(1 + (len(texts) - frequency + 0.5) / (frequency + 0.5))
        for position, of_text in enumerate(words):
            times = Counter(of_text)[word]
            scores[position] += idf * times / (times + k1 * (1 - b + b * len(of_text) / mean_length))
    return scores


@pytest.mark.parametrize("shard_size", [1000, 64, 7])
def test_scores_and_order_are_those_of_the_formula_whatever_the_shards(shard_size, random_corpus, tmp_path):
    retriever = BM25Retriever(k1=1.2, b=0.6, shard_size=shard_size, show_progress=False)
    retriever.index(random_corpus, tmp_path)
    texts = [passage["text"] for passage in random_corpus.documents(range(200))]
    queries = random_queries(30)
    for query, ranking in zip(queries, retriever.search(queries, k=20), strict=True):
        scores = lucene_scores(texts, query, k1=1.2, b=0.6)
        assert [row["score"] for row in ranking] == pytest.approx(sorted(scores, reverse=True)[:20], rel=1e-5)
        for row in ranking:
            assert row["score"] == pytest.approx(scores[int(row["id"][1:])], rel=1e-5)


def test_scores_are_those_of_bm25s(random_corpus, tmp_path):
    retriever = BM25Retriever(shard_size=64, show_progress=False)
    retriever.index(random_corpus, tmp_path)
    library = bm25s.BM25(k1=1.5, b=0.75)
    library.index(bm25s.tokenize(random_corpus.texts(0, 200), show_progress=False), show_progress=False)
    for query in random_queries(20):
        found = library.retrieve(bm25s.tokenize([query], show_progress=False), k=10, show_progress=False)
        [ranking] = retriever.search([query], k=10)
        assert [row["score"] for row in ranking] == pytest.approx(found.scores[0].tolist(), rel=1e-5)


def test_equal_scores_are_ranked_by_position_whatever_the_shards(tmp_path):
    corpus = Corpus.from_documents([{"id": str(n), "text": "same words" if n % 3 else "others"} for n in range(50)])
    for shard_size in (100, 8):
        retriever = BM25Retriever(shard_size=shard_size, show_progress=False)
        retriever.index(corpus, tmp_path / str(shard_size))
        [ranking] = retriever.search(["same"], k=6)
        assert [row["id"] for row in ranking] == ["1", "2", "4", "5", "7", "8"]
        [ranking] = retriever.search(["nothing"], k=3)
        assert [row["id"] for row in ranking] == ["0", "1", "2"]


def test_an_index_loaded_from_disk_answers_as_the_one_that_was_built(random_corpus, tmp_path):
    built = BM25Retriever(shard_size=64, show_progress=False)
    built.index(random_corpus, tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    loaded = BM25Retriever(show_progress=False)
    loaded.index(random_corpus, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")} == files and files
    assert loaded.search(random_queries(20), k=10) == built.search(random_queries(20), k=10)


def test_indexes_of_other_settings_and_corpora_lie_side_by_side(random_corpus, tmp_path):
    changed = Corpus.from_documents(random_corpus.documents(range(1, 200)))
    for corpus, settings in ((random_corpus, {}), (random_corpus, {"b": 0.1}), (changed, {})):
        BM25Retriever(show_progress=False, **settings).index(corpus, tmp_path)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 3


def test_indexing_that_was_killed_goes_on_at_its_shard(random_corpus, tmp_path, monkeypatch):
    whole = BM25Retriever(shard_size=50, show_progress=False)
    whole.index(random_corpus, tmp_path / "whole")
    texts, read = Corpus.texts, []

    def killed_at_120(corpus, start, stop):
        if start >= 100 and not read:
            raise KeyboardInterrupt
        return texts(corpus, start, stop)

    monkeypatch.setattr(Corpus, "texts", killed_at_120)
    retriever = BM25Retriever(shard_size=50, show_progress=False)
    with pytest.raises(KeyboardInterrupt):
        retriever.index(random_corpus, tmp_path / "killed")

    def counted(corpus, start, stop):
        read.append(start)
        return texts(corpus, start, stop)

    monkeypatch.setattr(Corpus, "texts", counted)
    retriever.index(random_corpus, tmp_path / "killed")
    assert read == [100, 150]
    assert retriever.search(random_queries(20), k=10) == whole.search(random_queries(20), k=10)


def test_an_index_built_with_another_shard_size_after_a_kill_has_every_passage_once(
    random_corpus, tmp_path, monkeypatch
):
    scored, built = BM25Retriever._scored, []

    def killed_at_the_sixth_shard(retriever, *arguments):
        if len(built) == 5:
            raise KeyboardInterrupt
        built.append(arguments)
        return scored(retriever, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(BM25Retriever, "_scored", killed_at_the_sixth_shard)
        BM25Retriever(shard_size=20, show_progress=False).index(random_corpus, tmp_path / "killed")
    retriever = BM25Retriever(shard_size=150, show_progress=False)
    retriever.index(random_corpus, tmp_path / "killed")
    assert sum(shard.scores["num_docs"] for shard in retriever.shards) == len(random_corpus)
    whole = BM25Retriever(show_progress=False)
    whole.index(random_corpus, tmp_path / "whole")
    assert retriever.search(random_queries(20), k=10) == whole.search(random_queries(20), k=10)


def test_search_before_index_is_refused():
    with pytest.raises(ValueError, match="call index"):
        BM25Retriever().search(["fox"], k=1)


def test_corpus_of_stop_words_is_searched(tmp_path):
    retriever = BM25Retriever([{"id": "a", "text": "the of"}, {"id": "b", "text": "and"}], show_progress=False)
    assert [row["id"] for row in retriever.search(["the fox"], k=2)[0]] == ["a", "b"]


@pytest.mark.parametrize("split", ["train", "dev"])
def test_recall_on_real_questions_is_plausible(shared_data, split):
    retriever = BM25Retriever(read_corpus(shared_data / "nq" / "corpus.jsonl"), show_progress=False)
    dataset = retrieve_candidates(read_questions(shared_data / "nq" / f"{split}.jsonl"), retriever, k=20)
    validate_dataset(dataset, num_selected=5)
    recall = {
        k: sum(recall_at_k([document["text"] for document in row["documents"]], row["answers"], k) for row in dataset)
        / len(dataset)
        for k in (1, 5, 20)
    }
    print(f"BM25 on nq/{split}: " + ", ".join(f"Recall@{k} {value:.3f}" for k, value in recall.items()))
    assert 0.34 < recall[1] < 0.42
    assert 0.63 < recall[5] < 0.71
    assert 0.69 < recall[20] < 0.77
