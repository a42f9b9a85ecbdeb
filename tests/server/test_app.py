# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest


pytest.importorskip("fastapi", reason="needs the extra serve")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra serve")

from trl_dro import LoadOptions, RAGPipeline  # noqa: E402
from trl_dro.commands.serve import LOOPBACK  # noqa: E402
from trl_dro.server.app import create_app  # noqa: E402
from trl_dro.server.limits import ServerLimits  # noqa: E402

from ..test_faults import make_trainer  # noqa: E402
from ..trainer.test_dro_trainer import make_dataset  # noqa: E402


RECORD = make_dataset(1).to_list()[0]
REQUEST = {"question": RECORD["question"], "documents": RECORD["documents"]}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder, max_answer_length=6).save_model()
    return RAGPipeline.from_pretrained(folder, options=LoadOptions(device="cpu"), max_prompt_length=400)


class Server:
    """A real server on a free port."""

    def __init__(self, pipe, **limits):
        app = create_app(pipe, ServerLimits(**limits), hosts=LOOPBACK)
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.server.should_exit = True
        self.thread.join()

    def ask(self, path="/answer", content=REQUEST, method="POST", headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        body = content if isinstance(content, bytes | None) else json.dumps(content).encode()
        connection.request(method, path, body, {"Content-Type": "application/json"} | (headers or {}))
        reply = connection.getresponse()
        text = reply.read()
        connection.close()
        return reply.status, text

    def detail(self, *arguments, **settings):
        status, text = self.ask(*arguments, **settings)
        return status, json.loads(text)["detail"]


@pytest.fixture(scope="module")
def server(pipe):
    with Server(pipe) as running:
        yield running


def test_the_answer_is_the_pipelines(server, pipe):
    status, text = server.ask()
    expected = pipe(REQUEST["question"], documents=REQUEST["documents"])
    reply = json.loads(text)
    assert status == 200 and reply["answer"] == expected.answer
    assert [document["id"] for document in reply["documents"]] == [document.id for document in expected.documents]
    assert reply["documents"][0]["probability"] == pytest.approx(expected.documents[0].probability)


def test_a_stream_is_the_documents_and_then_the_answer_in_pieces(server, pipe):
    status, text = server.ask("/stream")
    lines = [json.loads(line) for line in text.splitlines()]
    expected = pipe(REQUEST["question"], documents=REQUEST["documents"])
    assert status == 200 and len(lines[0]["documents"]) == 2 and len(lines) > 1
    assert "".join(line["text"] for line in lines[1:]).strip() == expected.answer


def test_texts_and_dialogues_are_understood(server):
    dialogue = [{"role": "user", "content": "who wrote number 1?"}]
    assert server.ask(content={"question": dialogue, "documents": ["one text", "another"]})[0] == 200


def test_page_and_health(server):
    status, page = server.ask("/", None, "GET")
    assert status == 200 and b"<form" in page
    assert json.loads(server.ask("/health", None, "GET")[1]) == {"status": "ok", "waiting": 0}


@pytest.mark.parametrize(
    "content, status, message",
    [
        (b"{", 422, "JSON"),
        (b"\xff\xfe", None, None),
        ({}, 422, "Field required"),
        ({"question": 3}, 422, "valid string"),
        ({"question": "who?", "surplus": 1}, 422, "not permitted"),
        ({"question": " ", "documents": ["a"]}, 422, "column question: is empty"),
        ({"question": "who?"}, 422, "pass documents"),
        ({"question": "who?", "documents": []}, 422, "column documents"),
        ({"question": "who?", "documents": [{"title": "no text"}]}, 422, "Field required"),
        ({"question": "who? " * 500, "documents": ["a", "b"]}, 422, "the prompt has"),
        ({"question": "x" * 1_100_000, "documents": ["a"]}, 413, "more than 1000000 bytes"),
    ],
)
@pytest.mark.parametrize("path", ["/answer", "/stream"])
def test_a_wrong_request_is_told_what_is_wrong(server, path, content, status, message):
    got, text = server.ask(path, content)
    if status is None:
        assert got in (400, 422)
    else:
        assert got == status and message in json.dumps(json.loads(text)["detail"])
    assert server.ask()[0] == 200


def test_other_methods_paths_and_hosts_are_refused(server):
    assert server.ask("/answer", None, "GET")[0] == 405
    assert server.ask("/nothing", None, "GET")[0] == 404
    assert server.ask(headers={"Host": "evil.example"})[0] == 400


def test_a_body_that_is_far_too_long_is_not_read(server):
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(b"POST /answer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n{")
    assert b" 413 " in connection.recv(1000).split(b"\r\n")[0]
    connection.close()


def test_a_body_that_does_not_say_its_length_is_cut_off_too(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    chunks = (b'{"question": "' if i == 0 else b"x" * 100_000 for i in range(12))
    connection.request("POST", "/answer", chunks, encode_chunked=True)
    assert connection.getresponse().status == 413


def test_a_slow_client_is_cut_off_and_holds_nobody_up(pipe):
    with Server(pipe, body_timeout=0.5) as server:
        slow = socket.create_connection(("127.0.0.1", server.port))
        slow.sendall(b"POST /answer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert server.ask()[0] == 200
        assert b" 408 " in slow.recv(1000).split(b"\r\n")[0]
        slow.close()


def slow_pipe(pipe, seconds):
    class Slow(RAGPipeline):
        def __call__(self, *arguments):
            time.sleep(seconds)
            return super().__call__(*arguments)

    return Slow(pipe.rag, pipe.config)


def test_too_many_requests_are_turned_away_and_the_others_answered(pipe):
    with Server(slow_pipe(pipe, 0.2), max_waiting=3) as server, ThreadPoolExecutor(12) as threads:
        statuses = list(threads.map(lambda _: server.ask()[0], range(12)))
        assert set(statuses) == {200, 503} and 3 <= statuses.count(200) < 12
        assert server.ask()[0] == 200


def test_an_answer_that_takes_too_long_is_given_up(pipe):
    with Server(slow_pipe(pipe, 1.0), timeout=0.2) as server:
        assert server.detail() == (504, "no answer within 0.2 seconds")
        assert server.ask("/health", None, "GET")[0] == 200


def test_an_error_inside_is_a_500_that_tells_nothing(pipe):
    class Broken(RAGPipeline):
        def __call__(self, *arguments):
            raise RuntimeError("a secret path")

    with Server(Broken(pipe.rag, pipe.config)) as server:
        status, text = server.ask()
        assert status == 500 and b"secret" not in text
        assert json.loads(server.ask("/health", None, "GET")[1])["waiting"] == 0


def test_a_reader_who_leaves_a_stream_does_not_block_the_next(server):
    for _ in range(3):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.request("POST", "/stream", json.dumps(REQUEST), {"Content-Type": "application/json"})
        connection.getresponse().read(10)
        connection.close()
    assert server.ask()[0] == 200


def test_requests_at_once_get_their_own_answers(server, pipe):
    records = make_dataset(6).to_list()
    expected = [pipe(r["question"], documents=r["documents"]).answer for r in records]

    def ask(i):
        record = records[i % 6]
        return json.loads(server.ask(content={name: record[name] for name in ("question", "documents")})[1])["answer"]

    with ThreadPoolExecutor(12) as threads:
        assert list(threads.map(ask, range(24))) == expected * 4
