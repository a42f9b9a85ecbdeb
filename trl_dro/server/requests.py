# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Requests that are answered: their content checked, put into the worker's queue, and streamed where that is asked."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ..data.schema import DatasetError, check_documents, check_question
from ..system.pipeline import RAGOutput, RAGPipeline
from .errors import status_and_detail
from .metrics import Metrics
from .worker import Worker


Content = TypeVar("Content", bound=BaseModel)


class DocumentIn(BaseModel):
    """A candidate document of a request."""

    model_config = ConfigDict(extra="ignore")

    id: str | None = None
    title: str | None = None
    text: str
    page: int | None = None


class MessageIn(BaseModel):
    """A turn of a dialogue."""

    role: str
    content: str


class QuestionIn(BaseModel):
    """A request: a question or a dialogue, and its candidate documents unless the server retrieves them."""

    model_config = ConfigDict(extra="forbid")

    question: str | list[MessageIn]
    documents: list[DocumentIn | str] | None = None


def parse(request: Request, body: bytes, form: type[Content]) -> Content:
    """
    Content of a request.

    Args:
        request (`Request`):
            The request, whose header tells that it is JSON.
        body (`bytes`):
            What it sent.
        form (`type`):
            What it should be.

    Raises:
        `DatasetError`: it is something else.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # Which a web page cannot send to another server than its own without asking first.
        raise DatasetError("the body must be JSON: send the header Content-Type: application/json")
    try:
        return form.model_validate_json(body)
    except ValidationError as error:
        raise DatasetError(_one_line(error)) from None


async def outputs(
    worker: Worker, pipe: RAGPipeline, request: Request, content: QuestionIn, streamed: bool
) -> AsyncGenerator[RAGOutput, None]:
    """Outputs of a request, see [`~worker.Worker.outputs`]. Raises a `DatasetError` too, if it cannot be asked."""
    asked = content.model_dump(include={"question", "documents"})
    # Here, where a mistake costs nobody else anything.
    check_question(asked["question"], "the request")
    documents = asked["documents"]
    if documents is None and pipe.retriever is None:
        raise DatasetError(
            "there are no documents to answer from, and no corpus to retrieve them from: pass documents"
        )
    if documents is not None:
        documents = [{"text": each} if isinstance(each, str) else each for each in documents]
        check_documents(documents[: pipe.config.max_candidates], "the request", num_selected=1)
    async with aclosing(worker.outputs(asked["question"], documents, streamed, _gone(request))) as answers:
        async for output in answers:
            yield output


async def pieces(answers: AsyncGenerator[RAGOutput, None]) -> AsyncGenerator[tuple[RAGOutput, str], None]:
    """Each output, and what it adds to the text of those before."""
    sent = ""
    async with aclosing(answers):
        async for output in answers:
            yield output, output.answer[len(sent) :]
            sent = max(sent, output.answer, key=len)  # a batch that was halved begins again


async def stream(
    lines: AsyncGenerator[str, None],
    last_words: Callable[[int, str], str],
    metrics: Metrics,
    media_type: str,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """
    A reply that is sent while it is written.

    Args:
        lines (`AsyncGenerator[str]`):
            What is sent.
        last_words (`Callable`):
            What is sent last if something fails later on, by its status and the line that tells it.
        metrics ([`Metrics`]):
            Where clients that leave are counted.
        media_type (`str`):
            Type of the content.
        headers (`dict`, *optional*):
            More headers.

    Raises:
        `Exception`: what the first line raised: errors of the request still have a status of their own.
    """
    first = await anext(lines)

    async def rest() -> AsyncIterator[str]:
        async with aclosing(lines):
            yield first
            try:
                async for line in lines:
                    yield line
            except Exception as error:
                yield last_words(*status_and_detail(error, metrics))

    return StreamingResponse(rest(), media_type=media_type, headers=headers)


async def _gone(request: Request) -> None:
    """Returns when the client has."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _one_line(error: ValidationError) -> str:
    """The first mistake and its place. The value is left out: it can be of any length, and not be JSON."""
    mistake: Any = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in mistake["loc"]).lstrip(".")
    return f"{place}: {mistake['msg']}" if place else mistake["msg"]
