# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import contextlib
import time

import pytest

from trl_dro.server.connections import listen

from .serving import Gate, Server, until


HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


def test_connections_that_send_no_header_are_closed(pipe):
    with Server(pipe, body_timeout=0.3) as server:
        silent = [server.connect(HEAD[:i]) for i in range(30)]
        for connection in silent:
            reply = connection.recv(1000)
            assert reply.startswith(b"HTTP/1.1 408 ") and b"header did not arrive" in reply
            assert connection.recv(1000) == b""
        until(lambda: server.connections == 0)


def test_a_header_that_arrives_byte_by_byte_is_not_waited_for(pipe):
    with Server(pipe, body_timeout=0.3) as server:
        connection = server.connect()
        start = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - start < 5:
                connection.sendall(b"a")
                time.sleep(0.02)
        assert time.monotonic() - start < 2


def test_the_begin_of_a_second_request_is_not_waited_for_either(pipe):
    with Server(pipe, body_timeout=0.3) as server:
        connection = server.connect(HEAD + b"\r\n")
        reply = b""
        while not reply.endswith(b"}"):
            reply += connection.recv(1000)
        connection.sendall(HEAD)
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ") and connection.recv(1000) == b""


def test_a_client_that_does_not_take_its_reply_is_cut_off(pipe):
    size = 8_000_000  # more than the kernel buffers
    with Server(pipe, body_timeout=0.4, max_body_bytes=10_000_000) as server:
        # Ids are echoed, and are not in the prompt.
        documents = [{"id": i * (size // 2), "text": "a"} for i in "12"]
        connection = server.send(content={"question": "who?", "documents": documents})
        assert connection.recv(10) == b"HTTP/1.1 2"
        start = time.monotonic()
        until(lambda: server.connections == 0)
        assert time.monotonic() - start < 3
        taken = 0
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(1_000_000):
                taken += len(part)
        assert taken < size
        connection.close()


def test_one_connection_too_many_ends_the_oldest_idle_one(pipe):
    with Server(pipe, max_connections=3) as server:
        idle = [server.connect() for _ in range(3)]
        until(lambda: server.connections == 3)
        assert server.get("/health")[0] == 200
        assert idle[0].recv(10) == b""
        idle[1].sendall(HEAD + b"\r\n")
        assert b" 200 " in idle[1].recv(1000)


def test_one_connection_too_many_is_refused_if_all_others_are_at_work(pipe):
    gate = Gate(pipe)
    with Server(gate, max_connections=3) as server:
        busy = [server.send() for _ in range(3)]
        until(lambda: server.connections == 3 and gate.batches)
        time.sleep(0.1)  # the requests are read
        assert server.connect().recv(1000).startswith(b"HTTP/1.1 503 ")
        gate.open.set()
        assert all(b" 200 " in connection.recv(20) for connection in busy)


@pytest.mark.parametrize(
    "host, port", [("no such host", 0), ("192.0.2.1", 0), ("127.0.0.1", 99999999), ("127.0.0.1", -1)]
)
def test_an_address_that_is_not_here_is_named(host, port):
    with pytest.raises(ValueError, match=f"--host {host} --port {port}: .*name an address"):
        listen(host, port)


def test_a_port_that_is_taken_is_named():
    [taken] = listen("127.0.0.1", 0)
    taken.listen()
    with pytest.raises(ValueError, match="in use"):
        listen("127.0.0.1", taken.getsockname()[1])
    taken.close()


def test_one_free_port_is_taken_for_all_addresses_of_a_name():
    sockets = listen("localhost", 0)
    assert len({one.getsockname()[1] for one in sockets}) == 1
    for one in sockets:
        one.close()
