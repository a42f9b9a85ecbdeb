# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""The system as a chat model of OpenAI's interface, for the clients that people have."""

import json
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import asdict
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict

from ..data.schema import DatasetError
from ..model.control_tokens import text_ids
from ..model.prompts import Question
from ..system.pipeline import RAGOutput, RAGPipeline
from .errors import error_content, failure
from .metrics import Metrics
from .requests import DocumentIn, MessageIn, QuestionIn, outputs, parse, pieces, stream
from .worker import Worker


# Answers are greedy, so that these change nothing, or they are for the client's own records.
UNHEEDED = {
    *("temperature", "top_p", "seed", "frequency_penalty", "presence_penalty", "reasoning_effort", "verbosity"),
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
}
# What an answer ends with that its documents do not support: not all clients show other fields than the text.
ABSTAINED = "\n\n(The documents do not support this answer.)"


class PartIn(BaseModel):
    """A piece of a turn."""

    type: Literal["text"]
    text: str


class ChatMessageIn(BaseModel):
    """A turn as OpenAI's clients send it."""

    model_config = ConfigDict(extra="ignore")

    role: str
    content: str | list[PartIn]

    def plain(self) -> MessageIn:
        """Role and text."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return MessageIn(role="system" if self.role == "developer" else self.role, content=text)


class StreamOptionsIn(BaseModel):
    """What a stream has beside the answer."""

    model_config = ConfigDict(extra="ignore")

    include_usage: bool | None = None


class ChatIn(BaseModel):
    """A request: OpenAI's, and its candidate documents unless the server retrieves them."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[ChatMessageIn]
    documents: list[DocumentIn | str] | None = None
    stream: bool | None = None
    stream_options: StreamOptionsIn | None = None
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None

    def question(self, longest: int) -> QuestionIn:
        """
        What the system is asked: a single message of the user's is a question, several messages are a dialogue.

        Args:
            longest (`int`):
                Tokens that an answer can have.

        Raises:
            `DatasetError`: something is asked for that the system cannot do.
        """
        unknown = [name for name, value in (self.model_extra or {}).items() if value and name not in UNHEEDED]
        if unknown:
            raise DatasetError(f"{unknown[0][:40]} is not supported: leave it out")
        if self.n not in (None, 1):
            raise DatasetError(f"n: {self.n} answers are not supported, there is one, the likeliest: leave it out")
        for name in ("max_tokens", "max_completion_tokens"):
            asked = getattr(self, name)
            if asked is not None and asked < longest:
                raise DatasetError(f"{name}: {asked} would cut answers, which have up to {longest}: leave it out")
        messages = [message.plain() for message in self.messages]
        alone = len(messages) == 1 and messages[0].role == "user"
        return QuestionIn(question=messages[0].content if alone else messages, documents=self.documents)


class Completion:
    """
    What is sent of one answer.

    Args:
        model (`str`):
            Name of the system.
        pipe ([`~pipeline.RAGPipeline`]):
            The system, whose tokens are counted.
        question (`str` or `list[dict]`):
            What it was asked.
    """

    def __init__(self, model: str, pipe: RAGPipeline, question: Question):
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.pipe = pipe
        self.question = question
        self.begun = False  # whether a chunk was sent

    def whole(self, output: RAGOutput) -> dict[str, Any]:
        """The reply that is not streamed."""
        content = output.answer + (ABSTAINED if output.abstained else "")
        message = {"role": "assistant", "content": content, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self.finish_reason(output)}
        own = {**self.head, "object": "chat.completion", "choices": [choice], "usage": self.usage(output)}
        return {**own, **documents(output), **support(output)}

    async def events(self, answers: AsyncGenerator[RAGOutput, None], with_usage: bool) -> AsyncGenerator[str, None]:
        """Server-sent events: the documents with the first chunk, pieces, and with the last one the citations."""
        output = None
        async for output, text in pieces(answers):
            if self.begun and text:
                yield self.event({"content": text})
            elif not self.begun:
                self.begun = True
                yield self.event({"role": "assistant", "content": text}, **documents(output))
        assert output is not None  # the last one is the whole answer
        if output.abstained:
            yield self.event({"content": ABSTAINED})
        yield self.event({}, self.finish_reason(output), **support(output))
        if with_usage:
            yield event({**self.head, "object": "chat.completion.chunk", "choices": [], "usage": self.usage(output)})
        yield "data: [DONE]\n\n"

    def event(self, delta: dict[str, str], finish_reason: str | None = None, **more: Any) -> str:
        """A chunk of the answer."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return event({**self.head, "object": "chat.completion.chunk", "choices": [choice], **more})

    def finish_reason(self, output: RAGOutput) -> str:
        """Whether the model ended the answer, or the limit of its length did."""
        return "length" if self._answer_length(output) >= self.pipe.config.max_answer_length else "stop"

    def usage(self, output: RAGOutput) -> dict[str, int]:
        """Tokens of the generator's prompt and of the answer; what the selector reads is not counted."""
        prompt = len(self.pipe.rag.prompts["generator"](self.question, documents(output)["documents"]))
        answer = self._answer_length(output)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}

    def _answer_length(self, output: RAGOutput) -> int:
        return len(text_ids(self.pipe.rag.tokenizers["generator"], [output.answer])[0])


def documents(output: RAGOutput) -> dict[str, Any]:
    """Selected documents, beside OpenAI's own fields."""
    return {"documents": [asdict(document) for document in output.documents]}


def support(output: RAGOutput) -> dict[str, Any]:
    """What the answer rests on, and how firmly, beside OpenAI's own fields."""
    return {name: asdict(output)[name] for name in ("citations", "gain", "abstained")}


def event(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, allow_nan=False)}\n\n"


def add_chat(app: FastAPI, worker: Worker, pipe: RAGPipeline, metrics: Metrics, name: str) -> None:
    """
    Adds OpenAI's paths to a server.

    Args:
        app ([`~fastapi.FastAPI`]):
            The server.
        worker ([`Worker`]):
            Answers.
        pipe ([`~pipeline.RAGPipeline`]):
            The system.
        metrics ([`Metrics`]):
            Where clients that leave are counted.
        name (`str`):
            What the system is called as a model.
    """
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "trl_dro"}

    def no_such_model(asked: str, path: str) -> Response:
        detail = f"there is no model {asked[:100]!r} here: ask for {name!r}"
        return JSONResponse(error_content(path, detail, 404, "model_not_found"), 404)

    @app.get("/v1/models")
    async def list_models() -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{asked:path}")
    async def show_model(asked: str, request: Request) -> Response:
        return JSONResponse(model) if asked == name else no_such_model(asked, request.url.path)

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        path = request.url.path
        try:
            chat = parse(request, await request.body(), ChatIn)
            if chat.model != name:
                return no_such_model(chat.model, path)
            content = chat.question(pipe.config.max_answer_length)
            answers = outputs(worker, pipe, request, content, streamed=bool(chat.stream))
            completion = Completion(name, pipe, content.model_dump()["question"])
            if not chat.stream:
                return JSONResponse(completion.whole([output async for output in answers][-1]))
            with_usage = bool(chat.stream_options and chat.stream_options.include_usage)
            events = completion.events(answers, with_usage)
            return await stream(
                events,
                lambda status, detail: event(error_content(path, detail, status)),
                metrics,
                "text/event-stream",
                {"Cache-Control": "no-cache"},
            )
        except Exception as error:
            return failure(error, metrics, path)
