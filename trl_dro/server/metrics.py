# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""What the server counts, for Prometheus."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .worker import Worker


PATHS = ("/", "/answer", "/stream", "/v1/chat/completions", "/v1/models", "/health", "/ready", "/metrics")


class Metrics:
    """
    Counters of one server. [`Measured`] counts every reply, those of the guards included.

    Args:
        worker ([`Worker`]):
            Whose queue is shown, and whose batches are counted.
    """

    def __init__(self, worker: Worker):
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter("trl_dro_requests", "Replies.", ["path", "status"], registry=self.registry)
        self.seconds = Histogram(
            "trl_dro_request_seconds",
            "Seconds from a request to the end of its reply.",
            ["path"],
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
            registry=self.registry,
        )
        self.left = Counter("trl_dro_left", "Requests whose client left before the answer.", registry=self.registry)
        batch = Histogram(
            "trl_dro_batch_size",
            "Requests answered in one forward.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        worker.on_batch = batch.observe
        waiting = Gauge("trl_dro_waiting", "Requests at work or waiting.", registry=self.registry)
        waiting.set_function(lambda: worker.waiting)
        ready = Gauge("trl_dro_ready", "1 if requests are answered.", registry=self.registry)
        ready.set_function(lambda: worker.status == "ok")


class Measured:
    """
    Counts replies and their times.

    Args:
        app (`Callable`):
            ASGI application.
        metrics ([`Metrics`]):
            Where they are counted.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        # A label for every path that somebody tries would never be forgotten.
        path = scope["path"] if scope["path"] in PATHS else "other"
        status = 499  # of a client that left while it asked
        start = time.perf_counter()

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, seen)
        except Exception:
            status = 500
            raise
        finally:
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - start)
