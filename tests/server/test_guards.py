# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import hmac
import http.client
import json

import pytest

from .serving import Server


@pytest.fixture(scope="module")
def locked(pipe):
    with Server(pipe, api_key="s3cret-ä") as running:
        yield running


def bearer(key):
    return {"Authorization": f"Bearer {key}".encode()}


def test_without_the_right_key_nothing_is_answered(locked):
    for headers in ({}, bearer("s3cret"), bearer("s3cret-äa"), bearer(""), {"Authorization": "s3cret-ä".encode()}):
        for path in ("/answer", "/stream"):
            status, text = locked.ask(path, headers=headers)
            assert status == 401 and b"Authorization: Bearer" in text
    assert locked.get("/metrics")[0] == 401
    assert locked.ask(headers=bearer("s3cret-ä"))[0] == 200
    assert locked.get("/metrics", bearer("s3cret-ä"))[0] == 200


def test_the_page_and_probes_need_no_key(locked):
    assert [locked.get(path)[0] for path in ("/", "/health", "/ready")] == [200] * 3


def test_keys_are_compared_in_constant_time(locked, monkeypatch):
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or compare(a, b))
    locked.ask(headers=bearer("guess"))
    assert compared == [(b"Bearer guess", "Bearer s3cret-ä".encode())]


def test_a_body_without_a_key_is_not_read(locked):
    connection = locked.connect(b"POST /answer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
    assert b" 401 " in connection.recv(1000).split(b"\r\n")[0]
    connection.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_a_server_on_the_loopback_address_answers_to_its_names_only(pipe, host):
    with Server(pipe, host=host) as server:
        assert server.get("/health")[0] == 200  # by the address itself, brackets and port included
        for name in ("localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]", "[::1]:8000"):
            assert server.get("/health", {"Host": name})[0] == 200, name
        for name in ("evil.example", "localhost.evil.example", "evil.example:80", "a@localhost", "[::1", "::1", ""):
            assert server.get("/health", {"Host": name})[0] == 400, name


def test_a_body_that_is_too_long_is_refused(server):
    for size in (1_100_000, 11_000_000):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.request("POST", "/answer", json.dumps({"question": "x" * 1_100_000}))
        reply = connection.getresponse()
        assert reply.status == 413 and b"more than 1000000 bytes" in reply.read(), size
        connection.close()


def test_a_body_that_is_far_too_long_is_not_read(server):
    connection = server.connect(b"POST /answer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n{")
    assert b" 413 " in connection.recv(1000).split(b"\r\n")[0]
    connection.close()


def test_a_body_that_does_not_say_its_length_is_cut_off_too(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    chunks = (b'{"question": "' if i == 0 else b"x" * 100_000 for i in range(12))
    connection.request("POST", "/answer", chunks, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_a_slow_client_is_cut_off_and_holds_nobody_up(pipe):
    with Server(pipe, body_timeout=0.5) as server:
        slow = server.connect(b"POST /answer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert server.ask()[0] == 200
        assert b" 408 " in slow.recv(1000).split(b"\r\n")[0]
        slow.close()
