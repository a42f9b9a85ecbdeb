# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import asyncio

import pytest


documents = pytest.importorskip("langchain_core.documents", reason="needs the extra langchain")

from langchain_core.runnables import RunnableLambda  # noqa: E402

from trl_dro.integrations.langchain import DROCompressor  # noqa: E402


@pytest.fixture
def retrieved(record):
    return [
        documents.Document(page_content=d["text"], metadata={"title": d["title"], "source": f"page {i}"}, id=d["id"])
        for i, d in enumerate(record["documents"])
    ]


def test_documents_are_those_selected_in_that_order_with_all_they_had(pipe, record, selection, retrieved):
    compressed = DROCompressor(pipeline=pipe).compress_documents(retrieved, record["question"])
    assert [d.page_content for d in compressed] == [chosen.text for chosen in selection]
    assert [d.id for d in compressed] == [chosen.id for chosen in selection]
    for document, chosen in zip(compressed, selection, strict=True):
        assert document.metadata["relevance_score"] == pytest.approx(chosen.probability)
        assert document.metadata["source"] == f"page {chosen.position - 1}"
    assert not any("relevance_score" in d.metadata for d in retrieved)  # what came in is left alone


def test_it_runs_in_a_chain_and_asynchronously(pipe, record, selection, retrieved):
    compressor = DROCompressor(pipeline=pipe)
    chain = RunnableLambda(lambda query: compressor.compress_documents(retrieved, query)) | (
        lambda kept: [d.page_content for d in kept]
    )
    expected = [chosen.text for chosen in selection]
    assert chain.invoke(record["question"]) == expected
    kept = asyncio.run(compressor.acompress_documents(retrieved, record["question"]))
    assert [d.page_content for d in kept] == expected


def test_nothing_retrieved_is_nothing_kept(pipe):
    assert DROCompressor(pipeline=pipe).compress_documents([], "who?") == []


def test_a_selector_that_selects_none_keeps_none(pipe_of_none, record, retrieved):
    assert DROCompressor(pipeline=pipe_of_none).compress_documents(retrieved, record["question"]) == []
