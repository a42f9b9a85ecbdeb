# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Candidates from services: a search engine on loopback, Qdrant in a folder, LangChain and LlamaIndex."""

import http.server
import json
import math
import operator
import sys
import threading

import pytest

from trl_dro.data import DatasetError, read_questions
from trl_dro.retrieval import FrameworkRetriever, QdrantRetriever, SearchEngineRetriever, open_service
from trl_dro.retrieval.job import read_report, retrieve_to_folder


DOCUMENTS = [
    {"id": f"p{n}", "title": f"number {n}", "text": f"number {n} was born in {1900 + n}", "vector": [n, 1.0, 2.0]}
    for n in range(8)
]


class Engine(http.server.BaseHTTPRequestHandler):
    """Answers as Elasticsearch does to `/`, `_count` and `_msearch`: one response per pair of lines, hits by score."""

    def do_GET(self):
        if self.path == "/":
            version = {"number": "2.0", "distribution": "opensearch"} if self.server.opensearch else {"number": "8.0"}
            self.reply({"version": version})
        elif self.path == "/passages/_count":
            self.reply({"count": len(DOCUMENTS)})
        else:
            error = {"type": "index_not_found_exception", "reason": f"no such index [{self.path.split('/')[1]}]"}
            self.reply({"error": error, "status": 404}, 404)

    def do_POST(self):
        self.server.requests += 1
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        assert body.endswith("\n") and self.headers["Content-Type"] == "application/x-ndjson"
        bodies = [json.loads(line) for line in body.splitlines()][1::2]
        self.server.bodies = bodies
        if self.server.busy:
            self.server.busy -= 1
            return self.reply({"error": {"reason": "too many requests"}, "status": 429}, 429)
        return self.reply({"responses": [self.hits(body) for body in bodies]})

    def hits(self, body):
        query = body.get("query", {})
        if "multi_match" in query:
            words = query["multi_match"]["query"].split()
            scores = [sum(word in d["text"].split() for word in words) for d in DOCUMENTS]
        else:
            vector = body["knn"]["query_vector"] if "knn" in body else query["knn"]["vector"]["vector"]
            scores = [-sum((a - b) ** 2 for a, b in zip(vector, d["vector"], strict=True)) for d in DOCUMENTS]
        best = sorted(range(len(DOCUMENTS)), key=lambda n: (-scores[n], n))[: body["size"]]
        source = [{name: DOCUMENTS[n].get(name) for name in body["_source"]} for n in best]
        hits = [{"_id": f"es-{n}", "_score": scores[n], "_source": s} for n, s in zip(best, source, strict=True)]
        return {"hits": {"hits": hits}, "status": 200}

    def reply(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def engine():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Engine)
    server.requests, server.busy, server.opensearch = 0, 0, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield server
    server.shutdown()
    server.server_close()


def nearest(queries):
    return [[float(query.split()[-1]), 1.0, 2.0] for query in queries]


QUERIES = [f"who is number {n % 8}" for n in range(70)]


def test_search_engine_keeps_ids_titles_and_scores_and_asks_in_batches(engine):
    retriever = SearchEngineRetriever(engine.url, "passages")
    rankings = retriever.search(QUERIES, k=3)
    assert len(rankings) == 70 and engine.requests == 2
    best = {"text": "number 5 was born in 1905", "id": "es-5", "title": "number 5", "score": 2.0}
    assert rankings[5][0] == best and len(rankings[5]) == 3
    assert open_service(f"elasticsearch+{engine.url}/passages?id=id").search(QUERIES[:1], 1)[0][0]["id"] == "p0"
    assert retriever.settings["documents"] == 8 and retriever.settings["index"] == "passages"


@pytest.mark.parametrize("opensearch", [False, True])
def test_vectors_are_searched_in_the_dialect_of_the_engine(engine, opensearch):
    engine.opensearch = opensearch
    retriever = SearchEngineRetriever(engine.url, "passages", vector="vector", encode=nearest)
    assert [ranking[0]["id"] for ranking in retriever.search(QUERIES[:4], k=2)] == ["es-0", "es-1", "es-2", "es-3"]
    assert ("query" in engine.bodies[0]) is opensearch


def test_busy_engine_is_asked_again_and_one_that_stays_busy_ends_with_one_line(engine):
    retriever = SearchEngineRetriever(engine.url, "passages", attempts=3, pause=0.01)
    engine.busy = 2
    assert len(retriever.search(QUERIES[:1], k=1)) == 1 and engine.requests == 3
    engine.busy = 3
    with pytest.raises(DatasetError, match=r"does not answer \(429: too many requests\) after 3 attempts: ") as error:
        retriever.search(QUERIES[:1], k=1)
    assert "\n" not in str(error.value)


def test_missing_index_is_named_at_once(engine):
    with pytest.raises(DatasetError, match=r"there is no such index \(no such index \[nothing\]\)"):
        SearchEngineRetriever(engine.url, "nothing")


def test_service_that_goes_away_in_the_middle_loses_nothing(engine, tmp_path):
    path = tmp_path / "questions.jsonl"
    records = [{"question": query, "answers": [f"{1900 + n % 8}"]} for n, query in enumerate(QUERIES)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    questions = read_questions(str(path))

    def retrieve(retriever, folder):
        sizes = {"k": 2, "shard_size": 10, "batch_size": 10, "cache_dir": tmp_path / "cache"}
        return retrieve_to_folder(questions, retriever, None, tmp_path / folder, **sizes)

    expected = retrieve(SearchEngineRetriever(engine.url, "passages"), "whole")
    before = engine.requests
    gone = SearchEngineRetriever(engine.url, "passages", attempts=2, pause=0.01)
    ask = gone._search

    def ask_until_gone(bodies):
        if engine.requests - before == 4:
            gone.url = "http://127.0.0.1:9"  # where nobody listens
        return ask(bodies)

    gone._search = ask_until_gone
    with pytest.raises(DatasetError, match="does not answer .* what was found so far is kept"):
        retrieve(gone, "killed")
    resumed = retrieve(SearchEngineRetriever(engine.url, "passages"), "killed")
    assert engine.requests - before == 7  # of the seven shards each once
    assert resumed.to_list() == expected.to_list()
    assert read_report(tmp_path / "killed/train")["recall"]["contains an answer"]["1"] == 1.0


def test_embedded_qdrant_finds_what_the_same_vectors_searched_directly_give(tmp_path):
    qdrant = pytest.importorskip("qdrant_client", reason="needs qdrant-client: pip install 'trl_dro[qdrant]'")
    client = qdrant.QdrantClient(path=str(tmp_path / "qdrant"))
    parameters = qdrant.models.VectorParams(size=3, distance=qdrant.models.Distance.EUCLID)
    client.create_collection("passages", vectors_config=parameters)
    points = [
        qdrant.models.PointStruct(id=n, vector=d["vector"], payload={k: d[k] for k in ("id", "title", "text")})
        for n, d in enumerate(DOCUMENTS)
    ]
    client.upsert("passages", points=points)
    client.close()
    retriever = QdrantRetriever("passages", nearest, folder=str(tmp_path / "qdrant"), id="id")
    rankings = retriever.search(QUERIES, k=3)
    for query, ranking in zip(QUERIES, rankings, strict=True):
        n = float(query.split()[-1])
        by_distance = sorted(DOCUMENTS, key=lambda d: (abs(d["vector"][0] - n), d["vector"][0]))
        assert ranking[0] == {k: by_distance[0][k] for k in ("id", "title", "text")} | {"score": 0.0}
        assert {d["id"] for d in ranking} <= {d["id"] for d in by_distance[:4]}
    assert retriever.settings["documents"] == 8
    retriever.client.close()
    with pytest.raises(DatasetError, match="there is no such collection; there are passages"):
        QdrantRetriever("nothing", nearest, folder=str(tmp_path / "qdrant"))


def test_missing_qdrant_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "qdrant_client", None)
    with pytest.raises(ImportError, match=r"pip install 'trl_dro\[qdrant\]'"):
        QdrantRetriever("passages", nearest, folder=".")


def test_retrievers_of_langchain_are_asked_and_named_by_a_function(monkeypatch):
    documents = pytest.importorskip("langchain_core.documents", reason="needs langchain-core")
    from langchain_core.retrievers import BaseRetriever

    class Passages(BaseRetriever):
        def _get_relevant_documents(self, query, *, run_manager):
            found = [DOCUMENTS[int(query.split()[-1])], *DOCUMENTS]
            return [
                documents.Document(page_content=d["text"], id=d["id"], metadata={"title": d["title"], "score": 0.5})
                for d in found
            ]

    monkeypatch.setattr(sys.modules[__name__], "passages", Passages, raising=False)
    retriever = open_service(f"{__name__}:passages")
    assert isinstance(retriever, FrameworkRetriever) and retriever.settings["name"] == f"{__name__}:passages"
    [ranking] = retriever.search(["who is number 3"], k=2)
    assert ranking[0] == {"text": DOCUMENTS[3]["text"], "id": "p3", "title": "number 3", "score": 0.5}
    assert [document["id"] for document in ranking] == ["p3", "p0"]


def test_pgvector_through_langchain_finds_what_the_same_vectors_give_also_when_it_was_gone():
    pytest.importorskip("langchain_core", reason="needs langchain-core")
    from .postgres import PgvectorRetriever, running_server, what_is_missing

    if missing := what_is_missing():
        pytest.skip(missing)
    with running_server() as server:
        server.fill(DOCUMENTS, [document["vector"] for document in DOCUMENTS])
        found = PgvectorRetriever(where=server.where, encode=nearest, k=3)
        retriever = FrameworkRetriever(found, "passages of a test", attempts=2, pause=0.01)
        rankings = retriever.search(QUERIES[:8], k=3)

        def cosine(query, vector):
            [mine] = nearest([query])
            return sum(map(operator.mul, mine, vector)) / (math.hypot(*mine) * math.hypot(*vector))

        for query, ranking in zip(QUERIES, rankings, strict=False):
            best = sorted(DOCUMENTS, key=lambda d: -cosine(query, d["vector"]))[:3]
            assert [document["id"] for document in ranking] == [d["id"] for d in best]
            assert ranking[0]["score"] == pytest.approx(1.0) and ranking[0]["title"] == best[0]["title"]
        server.stop()
        with pytest.raises(DatasetError, match="does not answer .* what was found so far is kept") as error:
            retriever.search(QUERIES[:1], k=3)
        assert "\n" not in str(error.value)
        server.start()
        assert retriever.search(QUERIES[:8], k=3) == rankings


def test_mistakes_of_a_retriever_are_not_taken_for_a_service_that_is_gone():
    pytest.importorskip("langchain_core", reason="needs langchain-core")
    from langchain_core.retrievers import BaseRetriever

    class Broken(BaseRetriever):
        def _get_relevant_documents(self, query, *, run_manager):
            raise KeyError(query)

    with pytest.raises(KeyError):
        FrameworkRetriever(Broken(), "broken").search(["who"], k=1)


def test_retrievers_of_llama_index_are_asked():
    pytest.importorskip("llama_index.core", reason="needs llama-index-core")
    from llama_index.core.retrievers import BaseRetriever
    from llama_index.core.schema import NodeWithScore, TextNode

    class Passages(BaseRetriever):
        def _retrieve(self, query_bundle):
            d = DOCUMENTS[int(query_bundle.query_str.split()[-1])]
            node = TextNode(text=d["text"], id_=d["id"], metadata={"title": d["title"]})
            return [NodeWithScore(node=node, score=0.5)]

    [ranking] = FrameworkRetriever(Passages(), "passages").search(["who is number 3"], k=2)
    assert ranking == [{"text": DOCUMENTS[3]["text"], "id": "p3", "title": "number 3", "score": 0.5}]


@pytest.mark.parametrize(
    "name, message",
    [
        ("solr+http://localhost/passages", "solr is none that is known; name elasticsearch"),
        ("elasticsearch+http://localhost", "names no place and index"),
        ("elasticsearch+http://localhost/passages?rank=1", "rank is no field"),
        ("qdrant+http://localhost/passages", "name the model that made them, --dense_model"),
        ("no_such_module:function", "cannot be called .ModuleNotFoundError"),
        ("json:dumps2", "cannot be called .AttributeError"),
        ("collections:OrderedDict", "returned a OrderedDict, which has no search"),
    ],
)
def test_names_that_cannot_be_read_are_refused_in_one_line(name, message):
    with pytest.raises(DatasetError, match=message) as error:
        open_service(name)
    assert "\n" not in str(error.value)
