# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""A small HTTP server around a pipeline: answers, streamed answers, and a page to try them."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..data.schema import DatasetError
from ..model.prompts import PromptTooLongError
from ..server.limits import ServerLimits
from ..system.pipeline import RAGPipeline


try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
    from pydantic import BaseModel, ConfigDict
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError:
    raise ImportError("the server needs fastapi and uvicorn: pip install 'trl_dro[serve]'") from None

__all__ = ["BodyLimits", "Worker", "create_app", "uvicorn"]


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


def create_app(pipe: RAGPipeline, limits: ServerLimits | None = None, hosts: tuple[str, ...] | None = None) -> FastAPI:
    """
    The server as an ASGI application.

    | request | reply |
    | --- | --- |
    | `POST /answer` with `{question, documents}` | `{answer, documents: [{id, title, text, position, probability}]}` |
    | `POST /stream` with the same | lines of JSON: `{documents}`, then `{text}` for each piece of the answer |
    | `GET /health` | `{status, waiting}` |
    | `GET /` | a page to try it |

    What is wrong with a request is answered in one line, `{detail}`, with 422 for its content, 413 and 408 for its
    body, 503 when too many wait and 504 when its answer took too long.

    Args:
        pipe ([`~pipeline.RAGPipeline`]):
            The system.
        limits ([`ServerLimits`], *optional*):
            Limits of requests.
        hosts (`tuple[str]`, *optional*):
            Names by which the server may be called; any by default. A server on the loopback address should name
            those of that address, or a web page that its user visits could call it by another.

    Returns:
        [`~fastapi.FastAPI`]
    """
    limits = limits or ServerLimits()
    worker = Worker(limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        worker.thread.shutdown(cancel_futures=True)

    app = FastAPI(title="trl_dro", docs_url=None, redoc_url=None, lifespan=lifespan)
    page = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")

    @app.get("/")
    async def show_page() -> HTMLResponse:
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": worker.waiting}

    @app.post("/answer")
    async def answer(request: QuestionIn) -> dict[str, Any]:
        output = await worker.result(lambda: pipe(*_arguments(request)))
        return asdict(output)

    @app.post("/stream")
    async def stream(request: QuestionIn) -> StreamingResponse:
        lines = worker.stream(lambda: _lines(pipe, request))
        first = await anext(lines)  # errors of the request still have a status of their own

        async def rest() -> AsyncIterator[str]:
            yield first
            async for line in lines:
                yield line

        return StreamingResponse(rest(), media_type="application/x-ndjson")

    @app.exception_handler(DatasetError)
    @app.exception_handler(PromptTooLongError)
    async def wrong_content(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=422)

    app.add_middleware(BodyLimits, limits=limits)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    return app


def _arguments(request: QuestionIn) -> tuple[Any, Any]:
    content = request.model_dump()
    return content["question"], content["documents"]


def _lines(pipe: RAGPipeline, request: QuestionIn):
    """Lines of a streamed answer."""
    documents, pieces = pipe.stream(*_arguments(request))
    yield json.dumps({"documents": [asdict(document) for document in documents]}) + "\n"
    for piece in pieces:
        if piece:
            yield json.dumps({"text": piece}) + "\n"


class Worker:
    """
    One thread that answers one request at a time, in the order in which they came.

    Args:
        limits ([`ServerLimits`]):
            How many may wait, and how long.
    """

    def __init__(self, limits: ServerLimits):
        self.limits = limits
        self.waiting = 0
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pipeline")

    async def result(self, work: Callable[[], Any]) -> Any:
        """What `work` returns. Raises `HTTPException` with 503 or 504 if it has to wait too long."""
        try:
            return await asyncio.wait_for(asyncio.shield(self._begin(work)), self.limits.timeout)
        except TimeoutError:
            raise HTTPException(504, f"no answer within {self.limits.timeout:g} seconds") from None

    async def stream(self, work: Callable[[], Any]) -> AsyncIterator[str]:
        """
        What the generator that `work` returns yields. It is closed when nobody reads any more. Raises `HTTPException`
        with 503 or 504 if it has to wait too long.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Any] = asyncio.Queue()
        end = object()
        closed = False

        def produce() -> None:
            pieces = work()
            try:
                for piece in pieces:
                    if closed:
                        return
                    loop.call_soon_threadsafe(queue.put_nowait, piece)
                loop.call_soon_threadsafe(queue.put_nowait, end)
            except Exception as error:
                loop.call_soon_threadsafe(queue.put_nowait, error)
            finally:
                pieces.close()

        deadline = loop.time() + self.limits.timeout
        future = self._begin(produce)
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            while (piece := await asyncio.wait_for(queue.get(), max(0.0, deadline - loop.time()))) is not end:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        except TimeoutError:
            raise HTTPException(504, f"no answer within {self.limits.timeout:g} seconds") from None
        finally:
            closed = True

    def _begin(self, work: Callable[[], Any]) -> asyncio.Future[Any]:
        if self.waiting >= self.limits.max_waiting:
            raise HTTPException(503, f"{self.waiting} requests are waiting: try again", {"Retry-After": "1"})
        deadline = time.monotonic() + self.limits.timeout

        def in_time() -> Any:
            # Whoever asked has had a 504 by now.
            return work() if time.monotonic() < deadline else None

        def finish(done: asyncio.Future[Any]) -> None:
            self.waiting -= 1
            if not done.cancelled():
                done.exception()  # looked at, if only here, or asyncio complains

        self.waiting += 1
        future = asyncio.get_running_loop().run_in_executor(self.thread, in_time)
        future.add_done_callback(finish)
        return future


class BodyLimits:
    """
    Reads the body of a request before the application does, up to a size and a time.

    Args:
        app (`Callable`):
            ASGI application.
        limits ([`ServerLimits`]):
            Size and time.
    """

    def __init__(self, app: ASGIApp, limits: ServerLimits):
        self.app = app
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            body = await asyncio.wait_for(self._read(scope, receive), self.limits.body_timeout)
        except TimeoutError:
            reply = JSONResponse({"detail": "the body did not arrive in time"}, 408, {"Connection": "close"})
            return await reply(scope, receive, send)
        if body is None:
            detail = f"the body has more than {self.limits.max_body_bytes} bytes"
            return await JSONResponse({"detail": detail}, 413, {"Connection": "close"})(scope, receive, send)
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()  # which tells when the client has gone
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        return await self.app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """
        The body, or `None` if it is too long. Some of what is too much is read all the same: a client that is still
        sending would not see the reply.
        """
        declared = int(dict(scope["headers"]).get(b"content-length", 0))  # the server has checked that it is a number
        size = 0
        parts: list[bytes] = []
        while True:
            message = await receive()
            size += len(message.get("body", b""))
            if size <= self.limits.max_body_bytes:
                parts.append(message.get("body", b""))
            if size > 10 * self.limits.max_body_bytes or declared > 10 * self.limits.max_body_bytes:
                return None
            if not message.get("more_body"):
                return b"".join(parts) if size <= self.limits.max_body_bytes else None
