# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""One thread that answers the requests of all users, several in one forward."""

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

import torch

from ..data.schema import DatasetError
from ..model.prompts import PromptTooLongError, question_text
from ..system.pipeline import RAGOutput, RAGPipeline
from .limits import ServerLimits


# Seconds that a batch waits for more requests. A forward of any model worth serving takes longer.
BATCH_WINDOW = 0.005

# Requests of a batch are padded to the longest, so that none may be longer than this many times the shortest.
LENGTH_RATIO = 2.0

# Errors that are the request's own, and are told to whoever sent it.
REQUEST_ERRORS = (DatasetError, PromptTooLongError)

# After so many failed requests in a row the server says for so many seconds that it is not ready.
FAILURES_IN_A_ROW = 3
FAILURE_PAUSE = 30.0


class Overloaded(Exception):
    """Too many requests wait, or nobody is there to answer them."""


class Late(Exception):
    """The answer took too long."""


class Left(Exception):
    """Whoever asked has gone."""


class Job:
    """
    A request from its arrival to its answer.

    Args:
        question (`str` or `list[dict]`):
            Question or dialogue.
        documents (`list[dict | str]`, *optional*):
            Its candidates; retrieved by default.
        streamed (`bool`):
            Whether the answer is wanted while it is written.
    """

    def __init__(self, question: Any, documents: Sequence[Any] | None, streamed: bool):
        self.question = question
        self.documents = documents
        self.streamed = streamed
        # In characters: near enough to put requests of similar length together.
        texts = [each if isinstance(each, str) else each["text"] for each in documents or []]
        self.length = len(question_text(question)) + sum(map(len, texts))
        self.over = False  # answered or given up; read by the worker after every token
        self.news: asyncio.Queue[tuple[bool, RAGOutput | Exception]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def tell(self, news: RAGOutput | Exception, final: bool = True) -> None:
        """Hands the output so far, the final one or an error over to the event loop, from any thread."""
        self.over |= final
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped, and nobody listens
            self._loop.call_soon_threadsafe(self.news.put_nowait, (final, news))


class Worker:
    """
    A queue of requests and the thread that answers them. A batch starts with the request that has waited longest, and
    takes along others of similar length.

    Args:
        pipe ([`~pipeline.RAGPipeline`]):
            The system.
        limits ([`ServerLimits`]):
            How many may wait and go together, and how long.
        on_batch (`Callable`, *optional*):
            Called with the number of requests of every batch.
    """

    def __init__(self, pipe: RAGPipeline, limits: ServerLimits, on_batch: Callable[[int], Any] | None = None):
        self.pipe = pipe
        self.limits = limits
        self.on_batch = on_batch
        self.max_batch = limits.max_batch
        self.last_error: tuple[str, float] | None = None  # its class and when, on the monotonic clock
        self._failures = 0  # since the last request that did not fail
        self._queue: list[Job] = []
        self._at_work: list[Job] = []
        self._since = 0.0  # when the batch at work began
        self._closing = False
        self._dead = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="pipeline", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests at work or waiting."""
        return len(self._queue) + sum(not job.over for job in self._at_work)

    @property
    def status(self) -> str:
        """`"ok"`, or why requests are not answered: `"dead"`, `"stuck"`, `"failing"`, `"overloaded"`, `"closing"`."""
        now = time.monotonic()
        if self._closing:
            return "closing"
        if self._dead:
            return "dead"
        # All of a batch are given up after `timeout`, and it then ends with its next token.
        if self._at_work and now - self._since > 2 * self.limits.timeout:
            return "stuck"
        if self._failures >= FAILURES_IN_A_ROW and self.last_error and now - self.last_error[1] < FAILURE_PAUSE:
            return "failing"
        return "overloaded" if self.waiting >= self.limits.max_waiting else "ok"

    async def outputs(
        self, question: Any, documents: Sequence[Any] | None, streamed: bool, gone: Awaitable[None]
    ) -> AsyncGenerator[RAGOutput, None]:
        """
        The output of a request: its documents and the answer so far, again and again, if it is streamed; the whole
        last. A request that is not wanted any more, because its time is over, whoever asked has gone, or the iterator
        is closed, is taken out of the queue or ends with the token that is being written.

        Args:
            question (`str` or `list[dict]`):
                Question or dialogue.
            documents (`list[dict | str]`, *optional*):
                Its candidates; retrieved by default.
            streamed (`bool`):
                Whether the answer is wanted while it is written.
            gone (`Awaitable`):
                Done when whoever asked has gone.

        Raises:
            [`Overloaded`]: as many as may are waiting, or the thread has died.
            [`Late`]: the answer took too long.
            [`Left`]: whoever asked has gone.
            `Exception`: what the pipeline raised.
        """
        watching = asyncio.ensure_future(gone)
        timer: asyncio.TimerHandle | None = None
        job = Job(question, documents, streamed)
        try:
            self._put(job)
            late = Late(f"no answer within {self.limits.timeout:g} seconds")
            timer = asyncio.get_running_loop().call_later(self.limits.timeout, job.news.put_nowait, (True, late))
            watching.add_done_callback(lambda done: None if done.cancelled() else job.tell(Left()))
            final = False
            while not final:
                final, news = await job.news.get()
                if isinstance(news, Exception):
                    raise news
                yield news
        finally:
            watching.cancel()
            if timer is not None:
                timer.cancel()
            self._give_up(job)

    def close(self) -> None:
        """Gives up all requests and ends the thread."""
        with self._changed:
            self._closing = True
            for job in (*self._queue, *self._at_work):
                job.over = True
            self._changed.notify()
        self._thread.join()

    def _put(self, job: Job) -> None:
        with self._changed:
            if self._closing:
                raise Overloaded("the server is stopping")
            if self._dead:
                raise Overloaded("the worker has died: the server must be restarted")
            if self.waiting >= self.limits.max_waiting:
                raise Overloaded(f"{self.waiting} requests are waiting: try again")
            self._queue.append(job)
            self._changed.notify()

    def _give_up(self, job: Job) -> None:
        with self._changed:
            job.over = True
            if job in self._queue:
                self._queue.remove(job)

    def _run(self) -> None:
        try:
            while self._take():
                self._answer(self._at_work)
                self._at_work = []
        finally:  # also if an error that nothing can be done about ends the thread
            with self._changed:
                self._dead = True
                for job in (*self._queue, *self._at_work):
                    job.tell(Overloaded("the worker has died: the server must be restarted"))
                self._queue, self._at_work = [], []

    def _take(self) -> list[Job]:
        """Waits for requests and takes a batch out of the queue; none when the server stops."""
        with self._changed:
            while not self._closing:
                self._changed.wait_for(lambda: self._queue or self._closing)
                self._changed.wait_for(lambda: len(self._queue) >= self.max_batch or self._closing, BATCH_WINDOW)
                if self._queue and not self._closing:  # all may have left
                    break
            shortest, longest = math.inf, 0
            for job in self._queue[:] if not self._closing else []:
                low, high = min(shortest, job.length), max(longest, job.length)
                if high <= LENGTH_RATIO * low and len(self._at_work) < self.max_batch:
                    shortest, longest = low, high
                    self._at_work.append(job)
                    self._queue.remove(job)
            self._since = time.monotonic()
            return self._at_work

    def _answer(self, jobs: list[Job]) -> None:
        jobs = [job for job in jobs if not job.over]
        if not jobs:
            return

        def watch(i: int, output: RAGOutput | None) -> bool:
            if jobs[i].streamed and output is not None:
                jobs[i].tell(output, final=False)
            return jobs[i].over

        try:
            outputs = self.pipe(
                [job.question for job in jobs],
                documents=[job.documents for job in jobs],
                batch_size=len(jobs),
                watch=watch,
            )
        except Exception as error:
            if len(jobs) == 1:
                self._fail(jobs[0], error)
            else:
                # Whose error it is shows when halves fail. What a stream has had already it gets again, which changes
                # nothing, as outputs are whole and not pieces.
                half = len(jobs) // 2
                if isinstance(error, torch.OutOfMemoryError):
                    self.max_batch = half
                self._answer(jobs[:half])
                self._answer(jobs[half:])
        else:
            self._failures = 0
            if self.on_batch is not None:
                self.on_batch(len(jobs))
            for job, output in zip(jobs, outputs, strict=True):
                job.tell(output)

    def _fail(self, job: Job, error: Exception) -> None:
        job.tell(error)
        if not isinstance(error, REQUEST_ERRORS):
            self._failures += 1
            self.last_error = (type(error).__name__, time.monotonic())
