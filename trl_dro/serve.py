# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""A small HTTP server around a pipeline: answers, streamed answers, and a page to try them."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .data import read_corpus
from .data.schema import DatasetError
from .pipeline import RAGPipeline
from .prompts import PromptTooLongError
from .retrieval import BM25Retriever
from .run_folder import LoadOptions


try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
    from pydantic import BaseModel, ConfigDict
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError:
    raise ImportError("the server needs fastapi and uvicorn: pip install 'trl_dro[serve]'") from None


LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass
class ServerLimits:
    """
    What one request, and all of them together, may ask for.

    Args:
        max_body_bytes (`int`, *optional*, defaults to `1000000`):
            Longest request body; a longer one is answered with 413.
        body_timeout (`float`, *optional*, defaults to `10.0`):
            Seconds in which a body must arrive; else 408.
        max_waiting (`int`, *optional*, defaults to `64`):
            Requests at work or waiting; more are answered with 503. One is at work at a time.
        timeout (`float`, *optional*, defaults to `60.0`):
            Seconds from a request to its answer; else 504.
    """

    max_body_bytes: int = field(default=1_000_000, metadata={"help": "Longest request body, in bytes."})
    body_timeout: float = field(default=10.0, metadata={"help": "Seconds in which a body must arrive."})
    max_waiting: int = field(default=64, metadata={"help": "Requests at work or waiting; more are turned away."})
    timeout: float = field(default=60.0, metadata={"help": "Seconds from a request to its answer."})

    def __post_init__(self):
        for name in ("max_body_bytes", "body_timeout", "max_waiting", "timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} {getattr(self, name)}: it must be above 0")


@dataclass
class ServeArguments(ServerLimits):
    """
    What `trl-dro serve` serves, and where; see also [`ServerLimits`].

    Args:
        model (`str`):
            Run folder or Hub repo.
        selector (`str`, *optional*):
            Selector, if it is elsewhere.
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub repo.
        base_model (`str`, *optional*):
            Base of the adapters, instead of the one they name.
        corpus (`str`, *optional*):
            Passages, jsonl, from which BM25 retrieves where a request has no documents.
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Address to listen on. The default is reachable from this machine alone.
        port (`int`, *optional*, defaults to `8000`):
            Port to listen on.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Precision.
        device (`str`, *optional*):
            Device; the accelerator if there is one.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that ships with a model.
    """

    model: str = field(default="", metadata={"help": "Run folder or Hub repo.", "required": True})
    selector: str | None = field(default=None, metadata={"help": "Selector, if it is elsewhere."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the Hub repo."})
    base_model: str | None = field(default=None, metadata={"help": "Base of the adapters, if not the one they name."})
    corpus: str | None = field(
        default=None, metadata={"help": "Passages, jsonl, from which BM25 retrieves where a request has no documents."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on."})
    port: int = field(default=8000, metadata={"help": "Port to listen on."})
    dtype: str = field(default="auto", metadata={"help": "Precision."})
    device: str | None = field(default=None, metadata={"help": "Device; the accelerator if there is one."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether to run code that ships with a model."})

    def __post_init__(self):
        super().__post_init__()
        if not self.model:
            raise ValueError("nothing to serve: pass --model, a run folder or Hub repo")


def serve(args: ServeArguments) -> None:
    """
    Loads a system and serves it until the process is stopped.

    Args:
        args ([`ServeArguments`]):
            System, address and limits.

    Raises:
        `ValueError`: the system cannot be loaded.
    """
    retriever = None if args.corpus is None else BM25Retriever(read_corpus(args.corpus))
    pipe = RAGPipeline.from_pretrained(
        args.model,
        selector=args.selector,
        retriever=retriever,
        revision=args.revision,
        base_model=args.base_model,
        options=LoadOptions(dtype=args.dtype, device=args.device, trust_remote_code=args.trust_remote_code),
    )
    limits = ServerLimits(args.max_body_bytes, args.body_timeout, args.max_waiting, args.timeout)
    app = create_app(pipe, limits, hosts=LOOPBACK if args.host in LOOPBACK else None)
    uvicorn.run(app, host=args.host, port=args.port, timeout_keep_alive=5, server_header=False)


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
    page = (Path(__file__).parent / "serve.html").read_text(encoding="utf-8")

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
        """What `work` returns."""
        try:
            return await asyncio.wait_for(asyncio.shield(self._begin(work)), self.limits.timeout)
        except TimeoutError:
            raise HTTPException(504, f"no answer within {self.limits.timeout:g} seconds") from None

    async def stream(self, work: Callable[[], Any]) -> AsyncIterator[str]:
        """What the generator that `work` returns yields. It is closed when nobody reads any more."""
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
