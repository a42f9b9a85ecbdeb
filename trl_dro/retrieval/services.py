# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Candidates from what is running already: Elasticsearch or OpenSearch, Qdrant, and any retriever of LangChain or
LlamaIndex. Each has an index of its own, so that `index` has nothing to do and no corpus is read."""

import importlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit, urlunsplit

from ..data.corpus import Corpus, read_corpus
from ..data.lines import first_line
from ..data.schema import DatasetError, Document
from .bm25 import BM25Retriever
from .interface import Retriever, checkpoint_key


Encode = Callable[[list[str]], Sequence[Sequence[float]]]
T = TypeVar("T")

# Environment variable with a key that the service asks for; it stands in no settings and no message.
KEY_VARIABLE = "TRL_DRO_SERVICE_KEY"
# What passes by itself: too many requests, and servers that are starting or behind one that is.
TRANSIENT = {429, 502, 503, 504}
QUERIES_PER_REQUEST = 64
# What databases, httpx, requests, grpc and Python itself raise when nobody answers.
UNREACHABLE = {"OperationalError", "TransportError", "RequestException", "RpcError", "ConnectionError", "TimeoutError"}
HOW_TO_NAME = (
    "elasticsearch+http://HOST:9200/INDEX, opensearch+https://…, qdrant+http://HOST:6333/COLLECTION, "
    "qdrant+file:FOLDER/COLLECTION, or MODULE:FUNCTION that returns a retriever of LangChain or LlamaIndex"
)


class _Service:
    """What all services share: nothing to index, and patience."""

    def __init__(self, name: str, attempts: int, pause: float):
        self.name = name
        self.attempts = attempts
        self.pause = pause  # seconds after the first attempt; twice as long after each other

    def index(self, corpus: Corpus, folder: str | os.PathLike) -> None:
        """Nothing: the service has its own index."""

    def _patiently(self, ask: Callable[[], T]) -> T:
        """
        Asks again while the service cannot be reached or is busy.

        Raises:
            `DatasetError`: it still is after all attempts.
        """
        pause = self.pause
        for attempt in range(1, self.attempts + 1):
            try:
                return ask()
            except _NotNowError as error:
                reason = str(error)
            if attempt < self.attempts:
                time.sleep(pause)
                pause = min(2 * pause, 30.0)
        raise DatasetError(
            f"{self.name} does not answer ({reason}) after {self.attempts} attempts: start it, or check the address, "
            "and run the command again; what was found so far is kept"
        )


class _NotNowError(Exception):
    """A service cannot be reached, or is busy."""


class SearchEngineRetriever(_Service):
    """
    Elasticsearch or OpenSearch, asked by `_msearch` for many questions at once: BM25 over texts and titles, or the
    nearest vectors where `vector` is given.

    The environment variable `TRL_DRO_SERVICE_KEY` is sent as the `Authorization` header, e.g. `ApiKey …`.

    Args:
        url (`str`): address of the service, e.g. `"http://localhost:9200"`.
        index (`str`): name of the index.
        text (`str`, *optional*, defaults to `"text"`): field of the texts.
        title (`str`, *optional*, defaults to `"title"`): field of the titles.
        id (`str`, *optional*): field of the ids; by default those of the index itself.
        vector (`str`, *optional*): field of the vectors; with it questions are encoded.
        encode (`Callable`, *optional*): takes queries, returns a vector for each; needed along with `vector`.
        encoder (`str`, *optional*): what tells the encoder from others, for the cache.
        attempts (`int`, *optional*, defaults to `6`): requests until the service is given up.
        pause (`float`, *optional*, defaults to `0.5`): seconds before the second, twice as many before each other.

    Raises:
        `DatasetError`: the service does not answer, or has no such index.
    """

    def __init__(
        self,
        url: str,
        index: str,
        text: str = "text",
        title: str = "title",
        id: str | None = None,
        vector: str | None = None,
        encode: Encode | None = None,
        encoder: str | None = None,
        attempts: int = 6,
        pause: float = 0.5,
    ):
        super().__init__(f"{url}/{index}", attempts, pause)
        if vector is not None and encode is None:
            raise ValueError(f"{self.name}: vectors need an encoder of questions: pass encode=…, or --dense_model")
        self.url = url.rstrip("/")
        self.index_name = index
        self.text, self.title, self.id, self.vector = text, title, id, vector
        self.encode = encode
        self.encoder = encoder
        self.num_documents = int(self._request(f"/{index}/_count")["count"])
        about = self._request("/").get("version", {})
        self.is_opensearch = about.get("distribution") == "opensearch"

    @property
    def settings(self) -> dict[str, Any]:
        """What a ranking depends on, as far as the service tells: another number of documents is another index."""
        fields = {"text": self.text, "title": self.title, "id": self.id, "vector": self.vector}
        return {
            "name": "search engine",
            "url": self.url,
            "index": self.index_name,
            "documents": self.num_documents,
            "encoder": self.encoder,
            **fields,
        }

    def search(self, queries: list[str], k: int) -> list[list[Document]]:
        """Returns the `k` best documents of each query, best first; fewer where fewer match."""
        rankings: list[list[Document]] = []
        for start in range(0, len(queries), QUERIES_PER_REQUEST):
            part = queries[start : start + QUERIES_PER_REQUEST]
            bodies = [self._query(query, k) for query in part]
            if self.vector is not None and self.encode is not None:
                vectors = self.encode(part)
                bodies = [self._nearest(vector, k) for vector in vectors]
            rankings += self._patiently(lambda bodies=bodies: self._search(bodies))  # type: ignore[misc]
        return rankings

    def _query(self, query: str, k: int) -> dict[str, Any]:
        match = {"query": query, "fields": [self.text, self.title], "type": "most_fields"}
        return {"query": {"multi_match": match}, "size": k}

    def _nearest(self, vector: Sequence[float], k: int) -> dict[str, Any]:
        values = [float(value) for value in vector]
        if self.is_opensearch:
            return {"query": {"knn": {self.vector: {"vector": values, "k": k}}}, "size": k}
        near = {"field": self.vector, "query_vector": values, "k": k, "num_candidates": max(10 * k, 100)}
        return {"knn": near, "size": k}

    def _search(self, bodies: list[dict[str, Any]]) -> list[list[Document]]:
        shown = [name for name in (self.text, self.title, self.id) if name]
        lines = [json.dumps(line) for body in bodies for line in ({}, {**body, "_source": shown})]
        answer = self._once(f"/{self.index_name}/_msearch", "\n".join(lines) + "\n")
        rankings = []
        for response in answer["responses"]:
            if "error" in response:
                self._refuse(int(response.get("status", 500)), _reason(response))
            rankings.append([self._document(hit) for hit in response["hits"]["hits"]])
        return rankings

    def _document(self, hit: dict[str, Any]) -> Document:
        source = hit.get("_source", {})
        document_id = hit["_id"] if self.id is None else source.get(self.id)
        return _document(self.name, document_id, source.get(self.title), source.get(self.text), hit.get("_score"))

    def _request(self, path: str) -> Any:
        return self._patiently(lambda: self._once(path))

    def _once(self, path: str, body: str | None = None) -> Any:
        headers = {"Content-Type": "application/x-ndjson" if body else "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = key
        data = None if body is None else body.encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            content = error.read().decode(errors="replace")
            try:
                reason = _reason(json.loads(content))
            except ValueError:
                reason = first_line(ValueError(content)) if content else error.reason
            self._refuse(error.code, reason)
        except (OSError, ValueError) as error:
            raise _NotNowError(first_line(error)) from None

    def _refuse(self, status: int, reason: str) -> None:
        if status in TRANSIENT:
            raise _NotNowError(f"{status}: {reason}")
        if status == 404:
            raise DatasetError(f"{self.name}: there is no such index ({reason}); name one that the service has")
        raise DatasetError(f"{self.name} refuses the request ({status}: {reason}); check fields, key and settings")


def _reason(content: Any) -> str:
    """Why a search engine refuses, of its long answer."""
    error = content.get("error", content) if isinstance(content, dict) else content
    reason = error.get("reason", error.get("type", "")) if isinstance(error, dict) else error
    return str(reason).splitlines()[0][:200] if str(reason) else "no reason given"


class QdrantRetriever(_Service):
    """
    A collection of Qdrant: in a folder, which needs no server, or of a server. Needs `pip install trl_dro[qdrant]`.

    Args:
        collection (`str`): name of the collection.
        encode (`Callable`): takes queries, returns a vector for each.
        folder (`str`, *optional*): folder of an embedded Qdrant, `QdrantClient(path=folder)`.
        url (`str`, *optional*): address of a server, if not a folder. `TRL_DRO_SERVICE_KEY` is sent as its API key.
        text (`str`, *optional*, defaults to `"text"`): payload with the text.
        title (`str`, *optional*, defaults to `"title"`): payload with the title.
        id (`str`, *optional*): payload with the id; by default the points' own.
        vector (`str`, *optional*): which of the points' named vectors.
        encoder (`str`, *optional*): what tells the encoder from others, for the cache.
        attempts (`int`, *optional*, defaults to `6`): requests until the service is given up.
        pause (`float`, *optional*, defaults to `0.5`): seconds before the second, twice as many before each other.

    Raises:
        `ImportError`: `qdrant-client` is not installed.
        `DatasetError`: the service does not answer, or has no such collection.
    """

    def __init__(
        self,
        collection: str,
        encode: Encode,
        folder: str | None = None,
        url: str | None = None,
        text: str = "text",
        title: str = "title",
        id: str | None = None,
        vector: str | None = None,
        encoder: str | None = None,
        attempts: int = 6,
        pause: float = 0.5,
    ):
        try:
            import qdrant_client
        except ImportError:
            raise ImportError("Qdrant needs qdrant-client: pip install 'trl_dro[qdrant]'") from None
        if (folder is None) == (url is None):
            raise ValueError("Qdrant is in a folder or at a url: pass one of them")
        super().__init__(f"{folder or url}/{collection}", attempts, pause)
        if folder is not None and not os.path.isdir(folder):
            raise DatasetError(f"{folder} is no folder of an embedded Qdrant: check the path")
        self.models = qdrant_client.models
        self.place, self.collection = folder or url, collection
        self.encode, self.encoder = encode, encoder
        self.text, self.title, self.id, self.vector = text, title, id, vector
        if folder is not None:
            self.client = qdrant_client.QdrantClient(path=folder)
        else:
            self.client = qdrant_client.QdrantClient(url=url, api_key=os.environ.get(KEY_VARIABLE), timeout=60)
        if not self._ask(lambda: self.client.collection_exists(collection)):
            known = sorted(each.name for each in self._ask(self.client.get_collections).collections)
            raise DatasetError(f"{self.name}: there is no such collection; there are {', '.join(known) or 'none'}")
        self.num_documents = self._ask(lambda: self.client.count(collection)).count

    @property
    def settings(self) -> dict[str, Any]:
        """What a ranking depends on, as far as Qdrant tells: another number of points is another collection."""
        fields = {"text": self.text, "title": self.title, "id": self.id, "vector": self.vector}
        return {
            "name": "qdrant",
            "place": self.place,
            "collection": self.collection,
            "documents": self.num_documents,
            "encoder": self.encoder,
            **fields,
        }

    def search(self, queries: list[str], k: int) -> list[list[Document]]:
        """Returns the `k` nearest documents of each query, best first; fewer where there are fewer."""
        rankings: list[list[Document]] = []
        for start in range(0, len(queries), QUERIES_PER_REQUEST):
            vectors = self.encode(queries[start : start + QUERIES_PER_REQUEST])
            requests = [
                self.models.QueryRequest(
                    query=[float(value) for value in vector], using=self.vector, limit=k, with_payload=True
                )
                for vector in vectors
            ]
            found = self._ask(lambda r=requests: self.client.query_batch_points(self.collection, requests=r))  # type: ignore[misc]
            rankings += [[self._document(point) for point in each.points] for each in found]
        return rankings

    def _document(self, point: Any) -> Document:
        payload = point.payload or {}
        document_id = point.id if self.id is None else payload.get(self.id)
        return _document(self.name, document_id, payload.get(self.title), payload.get(self.text), point.score)

    def _ask(self, ask: Callable[[], T]) -> T:
        from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

        def once() -> T:
            try:
                return ask()
            except ResponseHandlingException as error:  # it cannot be reached
                raise _NotNowError(first_line(error)) from None
            except UnexpectedResponse as error:
                if error.status_code in TRANSIENT:
                    raise _NotNowError(f"{error.status_code}: {error.reason_phrase}") from None
                raise DatasetError(f"{self.name} refuses the request ({first_line(error)}); check settings") from None

        return self._patiently(once)


class FrameworkRetriever(_Service):
    """
    Any retriever of LangChain (`BaseRetriever`) or LlamaIndex (`BaseRetriever`), and so whatever they open: pgvector,
    Milvus, Weaviate, Vespa, … How many documents it finds is a setting of its own; more than asked for are cut off.

    Args:
        retriever (`langchain_core.retrievers.BaseRetriever` or `llama_index.core.retrievers.BaseRetriever`):
            The retriever.
        name (`str`): what tells it, its index and its settings from others: candidates are kept under this name.
        title (`str`, *optional*, defaults to `"title"`): metadata with the title.
        id (`str`, *optional*): metadata with the id; by default the documents' own.
        attempts (`int`, *optional*, defaults to `6`): how often a query is asked until the service is given up.
        pause (`float`, *optional*, defaults to `0.5`): seconds before the second, twice as many before each other.

    Example:
    ```python
    # needs a vector store of LangChain
    from trl_dro.retrieval import FrameworkRetriever

    retriever = FrameworkRetriever(store.as_retriever(search_kwargs={"k": 20}), name="passages of May, k=20")
    ```
    """

    def __init__(
        self,
        retriever: Any,
        name: str,
        title: str = "title",
        id: str | None = None,
        attempts: int = 6,
        pause: float = 0.5,
    ):
        super().__init__(name, attempts, pause)
        package = {base.__module__.partition(".")[0] for base in type(retriever).__mro__}
        if not package & {"langchain_core", "llama_index"}:
            raise ValueError(f"{name} is a {type(retriever).__name__}, no retriever of LangChain or LlamaIndex")
        self.is_langchain = "langchain_core" in package
        self.retriever = retriever
        self.title, self.id = title, id

    @property
    def settings(self) -> dict[str, Any]:
        """The name that was given, and the kind of retriever."""
        kind = type(self.retriever)
        return {
            "name": self.name,
            "class": f"{kind.__module__}.{kind.__qualname__}",
            "title": self.title,
            "id": self.id,
        }

    def search(self, queries: list[str], k: int) -> list[list[Document]]:
        """Returns the first `k` documents that the retriever finds for each query."""
        return [self._patiently(lambda query=query: self._found(query))[:k] for query in queries]  # type: ignore[misc]

    def _found(self, query: str) -> list[Document]:
        try:
            found = self.retriever.invoke(query) if self.is_langchain else self.retriever.retrieve(query)
        except Exception as error:
            known = UNREACHABLE & {kind.__name__ for kind in type(error).__mro__}
            raise (_NotNowError(first_line(error)) if known else error) from None
        return [self._langchain(each) if self.is_langchain else self._llama_index(each) for each in found]

    def _langchain(self, found: Any) -> Document:
        document_id = found.id if self.id is None else found.metadata.get(self.id)
        # Retrievers that tell a score put it into the metadata, under one of these names.
        scores = (found.metadata.get(name) for name in ("score", "_score", "relevance_score"))
        score = next((score for score in scores if score is not None), None)
        return _document(self.name, document_id, found.metadata.get(self.title), found.page_content, score)

    def _llama_index(self, found: Any) -> Document:
        metadata = found.node.metadata
        document_id = found.node.node_id if self.id is None else metadata.get(self.id)
        return _document(self.name, document_id, metadata.get(self.title), found.node.get_content(), found.score)


def _document(name: str, document_id: Any, title: Any, text: Any, score: Any) -> Document:
    """A document of a service. Raises `DatasetError` for one without text."""
    if not isinstance(text, str) or not text.strip():
        raise DatasetError(f"{name}: document {document_id} has no text where it should be; name the field of texts")
    document: Document = {"text": text}
    if document_id is not None:
        document["id"] = str(document_id)
    if title is not None:
        document["title"] = str(title)
    if score is not None:
        document["score"] = float(score)
    return document


def retriever_of(corpus: str | None, retriever: str | None, dense_model: str | None, *cut: int) -> Retriever | None:
    """
    What finds the candidates of questions: a service, BM25 over a corpus, or nothing.

    Args:
        corpus (`str`, *optional*): file of passages, see [`~data.corpus.read_corpus`].
        retriever (`str`, *optional*): service, see [`open_service`].
        dense_model (`str`, *optional*): model that encodes questions for the service.
        cut (`int`): how documents are cut into passages, see [`~data.corpus.read_corpus`].

    Returns:
        [`Retriever`] or `None`

    Raises:
        `DatasetError`: both are named, or one of them cannot be opened.
    """
    if retriever is None:
        return None if corpus is None else BM25Retriever(read_corpus(corpus, *cut))
    if corpus is not None:
        raise DatasetError(f"--retriever {retriever} has passages of its own: leave out --corpus")
    return open_service(retriever, dense_model)


def is_service(name: str) -> bool:
    """Whether a name is one of a service, see [`open_service`], and not of a retriever that reads a corpus."""
    return ":" in name


def open_service(name: str, dense_model: str | None = None) -> Retriever:
    """
    The retriever that a name stands for.

    Args:
        name (`str`): `elasticsearch+URL/INDEX` or `opensearch+URL/INDEX`, `qdrant+URL/COLLECTION` or
            `qdrant+file:FOLDER/COLLECTION`, or `MODULE:FUNCTION`, a function that returns a retriever of LangChain,
            LlamaIndex or one's own. `?text=…&title=…&id=…&vector=…` at the end of the first three name fields; with
            `vector` a search engine gives the nearest vectors instead of BM25.
        dense_model (`str`, *optional*): `sentence-transformers` model that encodes questions, for vectors.

    Returns:
        [`Retriever`]

    Raises:
        `DatasetError`: the name cannot be read, or there is no such service, index or function.
        `ImportError`: what it needs is not installed.
    """
    kind, plus, address = name.partition("+")
    if not plus and is_service(name):
        return _call(name)
    if kind not in ("elasticsearch", "opensearch", "qdrant"):
        raise DatasetError(f"--retriever {name}: {kind} is none that is known; name {HOW_TO_NAME}")
    parts = urlsplit(address)
    place, _, index = parts.path.rpartition("/")
    fields: dict[str, Any] = {field: values[-1] for field, values in parse_qs(parts.query).items()}
    if unknown := sorted(fields.keys() - {"text", "title", "id", "vector"}):
        raise DatasetError(f"--retriever {name}: {unknown[0]} is no field; after ? stand text, title, id or vector")
    if not index or not (parts.netloc or parts.scheme == "file"):
        raise DatasetError(f"--retriever {name}: it names no place and index; name {HOW_TO_NAME}")
    url = urlunsplit((parts.scheme, parts.netloc, place, "", ""))
    encoding: dict[str, Any] = {}
    if kind == "qdrant" or "vector" in fields:
        encoding = {"encode": _encoder(dense_model, name), "encoder": checkpoint_key(str(dense_model))}
    if kind != "qdrant":
        return SearchEngineRetriever(url, index, **fields, **encoding)
    where: dict[str, Any] = {"folder": place} if parts.scheme == "file" else {"url": url}
    return QdrantRetriever(index, **where, **fields, **encoding)


def _encoder(model: str | None, name: str) -> Encode:
    if model is None:
        raise DatasetError(f"--retriever {name} searches vectors: name the model that made them, --dense_model")
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ImportError("encoding questions needs sentence-transformers: pip install 'trl_dro[dense]'") from None
    encoder = SentenceTransformer(model)
    return lambda queries: encoder.encode_query(queries, show_progress_bar=False).tolist()


def _call(name: str) -> Retriever:
    """What a function returns that is named as MODULE:FUNCTION."""
    module, _, function = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, ValueError) as error:
        raise DatasetError(f"--retriever {name} cannot be called ({first_line(error)}); name {HOW_TO_NAME}") from None
    package = {base.__module__.partition(".")[0] for base in type(made).__mro__}
    if package & {"langchain_core", "llama_index"}:
        return FrameworkRetriever(made, name)
    if not callable(getattr(made, "search", None)):
        raise DatasetError(f"--retriever {name} returned a {type(made).__name__}, which has no search(queries, k)")
    return made
