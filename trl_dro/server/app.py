# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""A small HTTP server around a pipeline: answers, streamed answers, and a page to try them."""

import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..data.schema import DatasetError, check_documents, check_question
from ..system.pipeline import RAGOutput, RAGPipeline
from .limits import ServerLimits
from .worker import REQUEST_ERRORS, Late, Left, Overloaded, Worker


try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from pydantic import BaseModel, ConfigDict, ValidationError

    from .connections import listen, loopback_names, server_config
    from .guards import ApiKey, BodyLimits, KnownHosts
    from .metrics import Measured, Metrics
except ImportError:
    raise ImportError(
        "the server needs fastapi, uvicorn and prometheus_client: pip install 'trl_dro[serve]'"
    ) from None

__all__ = ["create_app", "listen", "loopback_names", "server_config", "uvicorn"]

logger = logging.getLogger(__name__)


class DocumentIn(BaseModel):
    """A candidate document of a request."""

    model_config = ConfigDict(extra="ignore")

    id: str | None = None
    title: str | None = None
    text: str


class MessageIn(BaseModel):
    """A turn of a dialogue."""

    role: str
    content: str


class QuestionIn(BaseModel):
    """A request: a question or a dialogue, and its candidate documents unless the server retrieves them."""

    model_config = ConfigDict(extra="forbid")

    question: str | list[MessageIn]
    documents: list[DocumentIn | str] | None = None


def create_app(
    pipe: RAGPipeline,
    limits: ServerLimits | None = None,
    hosts: Collection[str] | None = None,
    api_key: str | None = None,
) -> FastAPI:
    """
    The server as an ASGI application.

    | request | reply |
    | --- | --- |
    | `POST /answer` with `{question, documents}` | `{answer, documents: [{id, title, text, position, probability}]}` |
    | `POST /stream` with the same | lines of JSON: `{documents}`, then `{text}` for each piece of the answer |
    | `GET /health` | `{status, waiting, last_error}`; 503 if the server must be restarted |
    | `GET /ready` | the same; 503 if a request would not be answered now |
    | `GET /metrics` | counters, for Prometheus |
    | `GET /` | a page to try it |

    What is wrong with a request is answered in one line, `{detail}`, with 422 for its content, 400 for its host, 401
    for its key, 413 and 408 for its body, 503 when too many wait and 504 when its answer took too long. A stream that
    has begun ends with the line `{error}` instead. A request whose client leaves is dropped, wherever it is.

    Args:
        pipe ([`~pipeline.RAGPipeline`]):
            The system.
        limits ([`ServerLimits`], *optional*):
            Limits of requests. Those of connections are kept by [`~connections.server_config`].
        hosts (`Collection[str]`, *optional*):
            Names by which the server may be called, lower case; any by default. A server on the loopback address
            should name those of that address, or a web page that its user visits could call it by another.
        api_key (`str`, *optional*):
            Key that requests must send, as `Authorization: Bearer KEY`.

    Returns:
        [`~fastapi.FastAPI`]
    """
    limits = limits or ServerLimits()
    worker = Worker(pipe, limits)
    metrics = Metrics(worker)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        worker.close()

    app = FastAPI(title="trl_dro", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    _add_pages(app, worker, metrics)

    @app.post("/answer")
    async def answer(request: Request) -> Response:
        outputs = _outputs(worker, pipe, request, await request.body(), streamed=False)
        try:
            return JSONResponse(asdict([output async for output in outputs][-1]))
        except Exception as error:
            return _failure(error, metrics)

    @app.post("/stream")
    async def stream(request: Request) -> Response:
        lines = _lines(_outputs(worker, pipe, request, await request.body(), streamed=True))
        try:
            first = await anext(lines)  # errors of the request still have a status of their own
        except Exception as error:
            return _failure(error, metrics)

        async def rest() -> AsyncIterator[str]:
            async with aclosing(lines):
                yield first
                try:
                    async for line in lines:
                        yield line
                except Exception as error:
                    yield json.dumps({"error": _status_and_detail(error, metrics)[1]}) + "\n"

        return StreamingResponse(rest(), media_type="application/x-ndjson")

    app.add_middleware(BodyLimits, limits=limits)
    if api_key is not None:
        app.add_middleware(ApiKey, key=api_key, open_paths=("/", "/health", "/ready"))
    if hosts is not None:
        app.add_middleware(KnownHosts, hosts=hosts)
    app.add_middleware(Measured, metrics=metrics)
    return app


def _add_pages(app: FastAPI, worker: Worker, metrics: Metrics) -> None:
    """What is read and not asked."""
    page = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")

    def state(ok: Collection[str]) -> Response:
        status = worker.status
        report: dict[str, Any] = {"status": status, "waiting": worker.waiting, "last_error": None}
        if worker.last_error is not None:
            error, when = worker.last_error
            report["last_error"] = {"type": error, "seconds_ago": round(time.monotonic() - when)}
        return JSONResponse(report, 200 if status in ok else 503)

    @app.get("/")
    async def show_page() -> Response:
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @app.get("/health")
    async def health() -> Response:
        return state(ok=("ok", "overloaded", "failing", "closing"))

    @app.get("/ready")
    async def ready() -> Response:
        return state(ok=("ok",))

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


async def _gone(request: Request) -> None:
    """Returns when the client has."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _outputs(
    worker: Worker, pipe: RAGPipeline, request: Request, body: bytes, streamed: bool
) -> AsyncGenerator[RAGOutput, None]:
    """Outputs of a request whose content is right. Raises what [`~Worker.outputs`] raises, or a `DatasetError`."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # Which a web page cannot send to another server than its own without asking first.
        raise DatasetError("the body must be JSON: send the header Content-Type: application/json")
    try:
        content = QuestionIn.model_validate_json(body).model_dump()
    except ValidationError as error:
        raise DatasetError(_one_line(error)) from None
    # Here, where a mistake costs nobody else anything.
    check_question(content["question"], "the request")
    documents = content["documents"]
    if documents is None and pipe.retriever is None:
        raise DatasetError(
            "there are no documents to answer from, and no corpus to retrieve them from: pass documents"
        )
    if documents is not None:
        documents = [{"text": each} if isinstance(each, str) else each for each in documents]
        check_documents(documents[: pipe.config.max_candidates], "the request", num_selected=1)
    async with aclosing(worker.outputs(content["question"], documents, streamed, _gone(request))) as outputs:
        async for output in outputs:
            yield output


async def _lines(outputs: AsyncGenerator[RAGOutput, None]) -> AsyncGenerator[str, None]:
    """Lines of a streamed answer: its documents, and what each output adds to the text of those before."""
    sent: str | None = None
    async with aclosing(outputs):
        async for output in outputs:
            if sent is None:
                documents = [asdict(document) for document in output.documents]
                yield json.dumps({"documents": documents}, allow_nan=False) + "\n"
                sent = ""
            if len(output.answer) > len(sent):
                yield json.dumps({"text": output.answer[len(sent) :]}) + "\n"
                sent = output.answer


def _one_line(error: ValidationError) -> str:
    """The first mistake and its place. The value is left out: it can be of any length, and not be JSON."""
    mistake = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in mistake["loc"]).lstrip(".")
    return f"{place}: {mistake['msg']}" if place else mistake["msg"]


def _status_and_detail(error: Exception, metrics: Metrics) -> tuple[int, str]:
    if isinstance(error, REQUEST_ERRORS):
        return 422, " ".join(str(error).split())
    if isinstance(error, Overloaded):
        return 503, str(error)
    if isinstance(error, Late):
        return 504, str(error)
    if isinstance(error, Left):
        metrics.left.inc()
        return 499, "the client has left"  # for the counters: nobody reads it
    logger.error("a request failed", exc_info=error)
    return 500, "an error inside the server, which its log tells"


def _failure(error: Exception, metrics: Metrics) -> Response:
    status, detail = _status_and_detail(error, metrics)
    return JSONResponse({"detail": detail}, status, {"Retry-After": "1"} if status == 503 else None)
