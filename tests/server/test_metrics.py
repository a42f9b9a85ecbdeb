# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
from prometheus_client.parser import text_string_to_metric_families

from .serving import Gate, Server, until


def samples(server):
    families = text_string_to_metric_families(server.get("/metrics")[1].decode())
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def test_replies_batches_and_clients_that_left_are_counted(pipe):
    gate = Gate(pipe)
    with Server(gate, max_batch=1) as server:
        held = [server.send(), server.send()]
        until(lambda: samples(server)["trl_dro_waiting",] == 2)
        held[1].close()
        until(lambda: samples(server)["trl_dro_left_total",] == 1)
        gate.open.set()
        assert b" 200 " in held[0].recv(20)
        server.ask(content=b"{")
        server.get("/answer/../../etc")
        server.get("/health", {"Host": "evil.example"})
        found = samples(server)
    assert found["trl_dro_requests_total", "/answer", "200"] == 1
    assert found["trl_dro_requests_total", "/answer", "422"] == 1
    assert found["trl_dro_requests_total", "/answer", "499"] == 1
    assert found["trl_dro_requests_total", "/health", "400"] == 1
    assert found["trl_dro_requests_total", "other", "404"] == 1
    assert found["trl_dro_batch_size_count",] == 1 and found["trl_dro_batch_size_sum",] == 1
    assert found["trl_dro_request_seconds_count", "/answer"] == 3
    assert found["trl_dro_waiting",] == 0 and found["trl_dro_ready",] == 1
    assert found["process_resident_memory_bytes",] > 0
