# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""A real server on the loopback address, and pipelines that are slow or broken."""

import contextlib
import http.client
import json
import socket
import threading
import time
from dataclasses import replace

from trl_dro import RAGPipeline
from trl_dro.server.app import create_app, listen, loopback_names, server_config, uvicorn
from trl_dro.server.limits import ServerLimits

from ..trainer.test_dro_trainer import make_dataset


RECORDS = [{name: r[name] for name in ("question", "documents")} for r in make_dataset(6).to_list()]
REQUEST = RECORDS[0]


class Server:
    """A server on a free port."""

    def __init__(self, pipe, host="127.0.0.1", api_key=None, **limits):
        self.host = host
        limits = ServerLimits(**limits)
        sockets = listen(host, 0)
        self.port = sockets[0].getsockname()[1]
        app = create_app(pipe, limits, loopback_names(host, sockets), api_key)
        self.server = uvicorn.Server(server_config(app, limits, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, args=(sockets,))
        self.thread.start()
        until(lambda: self.server.started)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.server.should_exit = True
        self.thread.join()

    @property
    def connections(self):
        return len(self.server.server_state.connections)

    def connect(self, data=b""):
        connection = socket.create_connection((self.host, self.port), timeout=30)
        connection.sendall(data)
        return connection

    def send(self, path="/answer", content=REQUEST):
        """A connection on which a request was sent and nothing is read yet."""
        body = json.dumps(content).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        return self.connect(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    def ask(self, path="/answer", content=REQUEST, method="POST", headers=None):
        with contextlib.closing(http.client.HTTPConnection(self.host, self.port, timeout=30)) as connection:
            body = content if isinstance(content, bytes | None) else json.dumps(content).encode()
            connection.request(method, path, body, {"Content-Type": "application/json"} | (headers or {}))
            reply = connection.getresponse()
            return reply.status, reply.read()

    def get(self, path, headers=None):
        return self.ask(path, None, "GET", headers)

    def state(self, path="/health"):
        status, text = self.get(path)
        return status, json.loads(text)


def until(condition, seconds=20):
    """Waits for something that another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


class Gate(RAGPipeline):
    """A pipeline that answers when it is let to, and keeps what it was asked."""

    def __init__(self, pipe):
        super().__init__(pipe.rag, pipe.config)
        self.batches = []
        self.open = threading.Event()

    def __call__(self, question, *arguments, **settings):
        self.batches.append(question)
        assert self.open.wait(30)
        return super().__call__(question, *arguments, **settings)


class Fixed(RAGPipeline):
    """A pipeline that gives the same answer to everything."""

    def __init__(self, pipe, answer):
        super().__init__(pipe.rag, pipe.config)
        self.answer = answer

    def _answer(self, records, watch=None):
        return [replace(output, answer=self.answer) for output in super()._answer(records, watch)]


class Slow(RAGPipeline):
    """A pipeline that takes its time for every token, and counts the tokens of all answers."""

    def __init__(self, pipe, seconds):
        super().__init__(pipe.rag, pipe.config)
        self.seconds = seconds
        self.tokens = 0

    def __call__(self, *arguments, watch, **settings):
        def slowly(i, output):
            self.tokens += 1
            time.sleep(self.seconds)
            return watch(i, output)

        return super().__call__(*arguments, watch=slowly, **settings)


class Broken(RAGPipeline):
    """A pipeline that raises `error` until it is mended."""

    def __init__(self, pipe, error):
        super().__init__(pipe.rag, pipe.config)
        self.error = error

    def __call__(self, *arguments, **settings):
        if self.error is not None:
            raise self.error
        return super().__call__(*arguments, **settings)
