# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
Candidates of real questions from services, against what the same BM25 and the same vectors give when they are searched
directly: Recall@1, 5 and 20, and whether every list of candidates is the same. Each service is asked three times: by a
process left alone; by one that is killed in the middle, and again; and, where a server can be stopped, with the
server gone in the middle, and again when it is back.

The services are real but for the search engine, which is one on loopback that answers `_msearch` as Elasticsearch
documents it, with this package's BM25 and cosines: Qdrant embedded in a folder, and a PostgreSQL with pgvector that is
started for the purpose and asked through LangChain. Vectors are words weighed by their rarity, hashed into 512
numbers: what is compared are services, not encoders.

```bash
.venv/bin/python benchmarks/services.py --corpus corpus.jsonl --questions dev.jsonl
```
"""

import argparse
import http.server
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from trl_dro.data import DatasetError, read_corpus, read_questions
from trl_dro.retrieval import BM25Retriever, FrameworkRetriever, QdrantRetriever, SearchEngineRetriever
from trl_dro.retrieval.job import read_report, retrieve_to_folder


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tests.retrieval.postgres import PgvectorRetriever, running_server, what_is_missing  # noqa: E402


K, SIZE = 20, 512
SIZES = {"k": K, "shard_size": 50, "batch_size": 25}
ROOM = "passages"


class Encoder:
    """Vectors of texts: each word, weighed by its rarity in a corpus, adds to one of `SIZE` numbers, or takes away."""

    def __init__(self, texts: list[str]):
        found = Counter(word for text in texts for word in set(self._words(text)))
        self.rarity = {word: np.log(len(texts) / count) for word, count in found.items()}

    @staticmethod
    def _words(text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())

    def __call__(self, texts: list[str]) -> list[list[float]]:
        vectors = np.full((len(texts), SIZE), 1e-6)  # no vector of zeros
        for row, text in zip(vectors, texts, strict=True):
            for word in self._words(text):
                key = zlib.crc32(word.encode())
                row[key % SIZE] += self.rarity.get(word, 0.0) * (1 if key >> 31 else -1)
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32).tolist()


class Nearest:
    """The same vectors, searched by multiplying all of them."""

    settings = {"name": "nearest"}

    def __init__(self, documents: list[dict[str, Any]], vectors: list[list[float]], encode: Encoder):
        self.documents, self.encode = documents, encode
        self.vectors = np.array(vectors, dtype=np.float32)

    def index(self, corpus: Any, folder: Any) -> None:
        """Nothing: the vectors are there."""

    def search(self, queries: list[str], k: int) -> list[list[dict[str, Any]]]:
        """The nearest documents of each query."""
        scores = np.array(self.encode(queries), dtype=np.float32) @ self.vectors.T
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return [
            [self.documents[n] | {"score": float(row[n])} for n in order]
            for row, order in zip(scores, best, strict=True)
        ]


class Engine:
    """A search engine on loopback: `/`, `_count` and `_msearch`, by BM25 or by vectors."""

    def __init__(self, documents: list[dict[str, Any]], nearest: Nearest):
        self.documents, self.nearest, self.bm25 = documents, nearest, BM25Retriever(documents, show_progress=False)
        self.port = 0
        self.start()

    def start(self) -> None:
        """Listens, where it did before."""
        engine = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply({"count": len(engine.documents), "version": {"number": "8.0"}})

            def do_POST(self) -> None:
                lines = self.rfile.read(int(self.headers["Content-Length"])).decode().splitlines()
                self.reply({"responses": [engine.answer(json.loads(line)) for line in lines[1::2]]})

            def reply(self, content: Any) -> None:
                data = json.dumps(content).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                """Nothing."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Nobody listens any more."""
        self.server.shutdown()
        self.server.server_close()

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """Hits of one search."""
        if "knn" in body:
            vector = np.array(body["knn"]["query_vector"], dtype=np.float32)
            scores = self.nearest.vectors @ vector
            found = [self.documents[n] | {"score": float(scores[n])} for n in np.argsort(-scores, kind="stable")]
        else:
            [found] = self.bm25.search([body["query"]["multi_match"]["query"]], body["size"])
        hits = [
            {"_id": d["id"], "_score": d["score"], "_source": {name: d.get(name) for name in body["_source"]}}
            for d in found[: body["size"]]
        ]
        return {"hits": {"hits": hits}, "status": 200}


def after(number: int, search: Callable, act: Callable[[], None]) -> Callable:
    """A search that does something before one of its calls."""
    calls = 0

    def counted(queries: list[str], k: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return search(queries, k)

    return counted


def ask(open_retriever: Callable[[], Any], questions: Any, folder: Path, killed: bool = False) -> None:
    """Retrieves into a folder, and dies at the fourth request if it is to."""
    retriever = open_retriever()
    if killed:
        retriever.search = after(4, retriever.search, lambda: os.kill(os.getpid(), signal.SIGKILL))
    retrieve_to_folder(questions, retriever, None, folder / "data", cache_dir=folder / "cache", **SIZES)


def in_a_process(*arguments: Any) -> int | None:
    """Exit code of [`ask`] in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=ask, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def candidates(folder: Path) -> list[list[str]]:
    """Ids of the candidates of each question."""
    from datasets import load_from_disk

    return [[d["id"] for d in documents] for documents in load_from_disk(str(folder / "data/train"))["documents"]]


def try_service(name: str, open_retriever: Callable, server: Any, questions: Any, folder: Path) -> dict[str, Any]:
    """Candidates of a service: left alone, killed, and gone."""
    start = time.perf_counter()
    assert in_a_process(open_retriever, questions, folder / "alone") == 0
    result: dict[str, Any] = {"seconds": time.perf_counter() - start, "ids": candidates(folder / "alone")}
    result["recall"] = read_report(folder / "alone/data/train")["recall"]["contains an answer"]
    assert in_a_process(open_retriever, questions, folder / "killed", True) == -signal.SIGKILL
    assert in_a_process(open_retriever, questions, folder / "killed") == 0
    result["killed"] = candidates(folder / "killed") == result["ids"]
    if server is None:
        return result
    retriever = open_retriever()
    retriever.attempts, retriever.pause = 2, 0.1
    retriever.search = after(4, retriever.search, server.stop)
    try:
        retrieve_to_folder(questions, retriever, None, folder / "gone/data", cache_dir=folder / "gone/cache", **SIZES)
        raise AssertionError(f"{name} was gone and nobody noticed")
    except DatasetError as error:
        result["line"] = str(error)
    server.start()
    assert in_a_process(open_retriever, questions, folder / "gone") == 0
    result["gone"] = candidates(folder / "gone") == result["ids"] and "\n" not in result["line"]
    return result


def fill_qdrant(folder: str, documents: list[dict[str, Any]], vectors: list[list[float]]) -> None:
    """A collection in a folder."""
    import qdrant_client
    from qdrant_client.models import Distance, PointStruct, VectorParams

    client = qdrant_client.QdrantClient(path=folder)
    client.create_collection(ROOM, vectors_config=VectorParams(size=SIZE, distance=Distance.COSINE))
    points = [PointStruct(id=n, vector=v, payload=d) for n, (d, v) in enumerate(zip(documents, vectors, strict=True))]
    client.upload_points(ROOM, points)
    client.close()


def main() -> None:
    """Prints one row per service."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="file of passages")
    parser.add_argument("--questions", required=True, help="file of questions")
    args = parser.parse_args()
    documents: list[dict[str, Any]] = [dict(each) for each in read_corpus(args.corpus)]
    questions = read_questions(args.questions)
    texts = [f"{d.get('title', '')} {d['text']}" for d in documents]
    encode = Encoder(texts)
    vectors = encode(texts)
    nearest = Nearest(documents, vectors, encode)

    table = Table(title=f"{len(questions)} questions, {len(documents):,} passages", title_justify="left")
    for heading in ("service", "Recall@1", "@5", "@20", "same lists", "killed, resumed", "gone, resumed", "seconds"):
        table.add_column(heading, justify="left" if heading == "service" else "right")
    direct: dict[str, list[list[str]]] = {}
    lines = []

    def show(name: str, open_retriever: Callable, like: str | None = None, server: Any = None) -> None:
        with tempfile.TemporaryDirectory() as folder:
            found = try_service(name, open_retriever, server, questions, Path(folder))
        direct[name] = found["ids"]
        same = sum(a == b for a, b in zip(found["ids"], direct[like or name], strict=True))
        recall = [f"{100 * found['recall'][str(k)]:.1f}" for k in (1, 5, 20)]
        shown = [
            "yes" if found[each] else "NO" if each in found else "" for each in ("killed", "gone") if each in found
        ]
        shown += [""] * (2 - len(shown))
        same_shown = f"{same} of {len(questions)}" if like else ""
        table.add_row(name, *recall, same_shown, *shown, f"{found['seconds']:.1f}")
        if "line" in found:
            lines.append(f"{name}: {found['line']}")

    with tempfile.TemporaryDirectory() as place:
        engine = Engine(documents, nearest)
        url = f"http://127.0.0.1:{engine.port}"

        class Direct(BM25Retriever):
            """BM25 over the corpus, which is indexed already."""

            def index(self, corpus: Any, folder: Any) -> None:
                if corpus is not None:
                    super().index(corpus, folder)

        bm25 = Direct(documents, show_progress=False)
        show("BM25, directly", lambda: bm25)
        show("_msearch, BM25", lambda: SearchEngineRetriever(url, ROOM), "BM25, directly", engine)
        show("vectors, directly", lambda: nearest)
        knn = {"vector": "vector", "encode": encode, "encoder": "hashed words"}
        show("_msearch, vectors", lambda: SearchEngineRetriever(url, ROOM, **knn), "vectors, directly", engine)
        fill_qdrant(f"{place}/qdrant", documents, vectors)
        show(
            "Qdrant, in a folder",
            lambda: QdrantRetriever(ROOM, encode, folder=f"{place}/qdrant", id="id", encoder="hashed words"),
            "vectors, directly",
        )
        missing = what_is_missing()
        if missing is None:
            with running_server() as server:
                server.fill(documents, vectors)
                asked = PgvectorRetriever(where=server.where, encode=encode, k=K)
                name = "pgvector, through LangChain"
                show(name, lambda: FrameworkRetriever(asked, "pgvector"), "vectors, directly", server)
        engine.stop()
    Console(width=119).print(table)
    print(missing or "", *lines, sep="\n")


if __name__ == "__main__":
    main()
