# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import asyncio

import pytest


pytest.importorskip("rerankers", reason="needs the extra rerankers")

from trl_dro.integrations.rerankers import DRORanker  # noqa: E402


@pytest.fixture
def arguments(record):
    return {
        "query": record["question"],
        "docs": [d["text"] for d in record["documents"]],
        "doc_ids": [d["id"] for d in record["documents"]],
        "metadata": [{"title": d["title"]} for d in record["documents"]],
    }


def test_selected_documents_come_first_and_the_others_follow_as_they_came(pipe, selection, arguments):
    results = DRORanker(pipe).rank(**arguments)
    chosen = [document.id for document in selection]
    assert [result.doc_id for result in results] == chosen + [i for i in arguments["doc_ids"] if i not in chosen]
    assert [result.rank for result in results] == [1, 2, 3, 4]
    assert [result.doc_id for result in results.top_k(2)] == chosen
    for document in selection:
        assert results.get_score_by_docid(document.id) == pytest.approx(document.probability)
    assert results[3].score is None


def test_it_runs_asynchronously_and_without_ids(pipe, arguments):
    texts = arguments["docs"]
    results = asyncio.run(_rank(DRORanker(pipe), arguments["query"], texts))
    assert sorted(result.text for result in results) == sorted(texts)


async def _rank(ranker, query, texts):
    return await ranker.rank_async(query, texts)


def test_nothing_is_ranked_to_nothing_and_one_document_has_no_score(pipe):
    assert DRORanker(pipe).rank("who?", []).results_count() == 0
    with pytest.raises(ValueError, match="use rank"):
        DRORanker(pipe).score("who?", "a text")


def test_where_none_is_selected_all_follow_as_they_came_without_scores(pipe_of_none, arguments):
    results = DRORanker(pipe_of_none).rank(**arguments)
    assert [result.doc_id for result in results] == arguments["doc_ids"]
    assert [result.rank for result in results] == [1, 2, 3, 4] and {result.score for result in results} == {None}
