# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import asyncio

import pytest


schema = pytest.importorskip("llama_index.core.schema", reason="needs the extra llama-index")

from llama_index.core.base.base_retriever import BaseRetriever  # noqa: E402
from llama_index.core.llms import MockLLM  # noqa: E402
from llama_index.core.query_engine import RetrieverQueryEngine  # noqa: E402

from trl_dro.integrations.llama_index import DROPostprocessor  # noqa: E402


@pytest.fixture
def nodes(record):
    return [
        schema.NodeWithScore(
            node=schema.TextNode(text=d["text"], id_=d["id"], metadata={"title": d["title"]}), score=0.5
        )
        for d in record["documents"]
    ]


def test_nodes_are_those_selected_in_that_order(pipe, record, selection, nodes):
    kept = DROPostprocessor(pipeline=pipe).postprocess_nodes(nodes, query_str=record["question"])
    assert [node.node.node_id for node in kept] == [chosen.id for chosen in selection]
    assert [node.score for node in kept] == pytest.approx([chosen.probability for chosen in selection])
    assert {node.score for node in nodes} == {0.5}


def test_a_query_engine_answers_from_the_selected_nodes(pipe, record, selection, nodes):
    class Retriever(BaseRetriever):
        def _retrieve(self, query_bundle):
            return nodes

    engine = RetrieverQueryEngine.from_args(
        Retriever(), llm=MockLLM(), node_postprocessors=[DROPostprocessor(pipeline=pipe)]
    )
    response = engine.query(record["question"])
    assert [node.node.node_id for node in response.source_nodes] == [chosen.id for chosen in selection]
    assert all(chosen.text in str(response) for chosen in selection)  # this model repeats its prompt


def test_it_runs_asynchronously(pipe, record, selection, nodes):
    kept = asyncio.run(DROPostprocessor(pipeline=pipe).apostprocess_nodes(nodes, query_str=record["question"]))
    assert [node.node.node_id for node in kept] == [chosen.id for chosen in selection]


def test_no_question_is_an_error_and_no_node_is_none(pipe, nodes):
    with pytest.raises(ValueError, match="needs the question"):
        DROPostprocessor(pipeline=pipe).postprocess_nodes(nodes)
    assert DROPostprocessor(pipeline=pipe).postprocess_nodes([], query_str="who?") == []


def test_a_selector_that_selects_none_keeps_none(pipe_of_none, record, nodes):
    assert DROPostprocessor(pipeline=pipe_of_none).postprocess_nodes(nodes, query_str=record["question"]) == []
