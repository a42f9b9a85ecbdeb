# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""A small HTTP server around a pipeline: answers, streamed answers, and a page to try them."""

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..system.pipeline import RAGOutput, RAGPipeline
from .limits import ServerLimits
from .worker import Worker


try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import HTMLResponse, JSONResponse, Response
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from starlette.exceptions import HTTPException

    from .chat import add_chat
    from .connections import listen, loopback_names, server_config
    from .errors import error_content, failure
    from .guards import ApiKey, BodyLimits, KnownHosts
    from .metrics import Measured, Metrics
    from .requests import QuestionIn, outputs, parse, pieces, stream
except ImportError:
    raise ImportError(
        "the server needs fastapi, uvicorn and prometheus_client: pip install 'trl_dro[serve]'"
    ) from None

__all__ = ["create_app", "listen", "loopback_names", "server_config", "uvicorn"]


def create_app(
    pipe: RAGPipeline,
    limits: ServerLimits | None = None,
    hosts: Collection[str] | None = None,
    api_key: str | None = None,
    name: str = "trl_dro",
) -> FastAPI:
    """
    The server as an ASGI application.

    | request | reply |
    | --- | --- |
    | `POST /answer` with `{question, documents}` | `{answer, documents, citations}`, see [`~pipeline.RAGOutput`] |
    | `POST /stream` with the same | lines of JSON: `{documents}`, `{text}` for each piece, `{citations}` |
    | `POST /v1/chat/completions` | as OpenAI's, with `documents` beside `choices`; see [`~chat.ChatIn`] |
    | `GET /v1/models` | the one that there is |
    | `GET /health` | `{status, waiting, last_error}`; 503 if the server must be restarted |
    | `GET /ready` | the same; 503 if a request would not be answered now |
    | `GET /metrics` | counters, for Prometheus |
    | `GET /` | a page to try it |

    What is wrong with a request is answered in one line, `{detail}`, with 422 for its content, 400 for its host, 401
    for its key, 413 and 408 for its body, 503 when too many wait and 504 when its answer took too long. A stream that
    has begun ends with the line `{error}` instead. A request whose client leaves is dropped, wherever it is. Errors of
    OpenAI's paths have OpenAI's form, and 400 in place of 422.

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
        name (`str`, *optional*, defaults to `"trl_dro"`):
            What the system is called as a model of OpenAI's interface.

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
    _add_answers(app, worker, pipe, metrics)
    add_chat(app, worker, pipe, metrics, name)

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> Response:
        content = error_content(request.url.path, error.detail, error.status_code)
        return JSONResponse(content, error.status_code, error.headers)

    app.add_middleware(BodyLimits, limits=limits)
    if api_key is not None:
        app.add_middleware(ApiKey, key=api_key, open_paths=("/", "/health", "/ready"))
    if hosts is not None:
        app.add_middleware(KnownHosts, hosts=hosts)
    app.add_middleware(Measured, metrics=metrics)
    return app


def _add_answers(app: FastAPI, worker: Worker, pipe: RAGPipeline, metrics: Metrics) -> None:
    """What is asked, but for OpenAI's paths."""

    @app.post("/answer")
    async def answer(request: Request) -> Response:
        try:
            content = parse(request, await request.body(), QuestionIn)
            answers = outputs(worker, pipe, request, content, streamed=False)
            return JSONResponse(asdict([output async for output in answers][-1]))
        except Exception as error:
            return failure(error, metrics, request.url.path)

    @app.post("/stream")
    async def stream_answer(request: Request) -> Response:
        try:
            content = parse(request, await request.body(), QuestionIn)
            lines = _lines(outputs(worker, pipe, request, content, streamed=True))
            return await stream(
                lines, lambda _, detail: json.dumps({"error": detail}) + "\n", metrics, "application/x-ndjson"
            )
        except Exception as error:
            return failure(error, metrics, request.url.path)


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


async def _lines(answers: AsyncGenerator[RAGOutput, None]) -> AsyncGenerator[str, None]:
    """Lines of a streamed answer: its documents, each piece of its text, and what it rests on, and how firmly."""
    begun = False
    output = None
    async for output, text in pieces(answers):
        if not begun:
            documents = [asdict(document) for document in output.documents]
            yield json.dumps({"documents": documents}, allow_nan=False) + "\n"
            begun = True
        if text:
            yield json.dumps({"text": text}) + "\n"
    assert output is not None  # the last one is the whole answer
    yield json.dumps({name: asdict(output)[name] for name in ("citations", "gain", "abstained")}) + "\n"
