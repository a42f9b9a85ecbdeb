# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest
import torch

from trl_dro import LoadOptions, RAGPipeline
from trl_dro.system.pipeline import RAGOutput

from ..test_faults import save_run_that_selects_none
from .serving import RECORDS, REQUEST, Broken, Fixed, Gate, Server, Slow, until


def test_the_answer_is_the_pipelines(server, pipe):
    status, text = server.ask()
    expected = pipe(REQUEST["question"], documents=REQUEST["documents"])
    reply = json.loads(text)
    assert status == 200 and reply["answer"] == expected.answer
    assert [document["id"] for document in reply["documents"]] == [document.id for document in expected.documents]
    assert reply["documents"][0]["probability"] == pytest.approx(expected.documents[0].probability)


def test_replies_say_what_the_answer_rests_on(pipe):
    documents = [{"id": "a", "title": "Mills", "text": "It is old. Ada built it.", "page": 3}, {"text": "Nothing."}]
    request = {"question": "who built it", "documents": documents}
    with Server(Fixed(pipe, "Ada")) as server:
        reply = json.loads(server.ask(content=request)[1])
        last = json.loads(server.ask("/stream", request)[1].splitlines()[-1])
    cited = {"id": "a", "title": "Mills", "page": 3, "position": 1, "sentence": "Ada built it.", "states_answer": True}
    assert reply["citations"] == last["citations"] == [cited]
    assert {each["position"]: each["page"] for each in reply["documents"]} == {1: 3, 2: None}


def test_a_stream_is_the_documents_and_then_the_answer_in_pieces(server, pipe):
    status, text = server.ask("/stream")
    lines = [json.loads(line) for line in text.splitlines()]
    expected = pipe(REQUEST["question"], documents=REQUEST["documents"])
    assert status == 200 and len(lines[0]["documents"]) == 2 and len(lines) > 3
    assert "".join(line["text"] for line in lines[1:-1]) == expected.answer
    assert lines[-1] == {name: asdict(expected)[name] for name in ("citations", "gain", "abstained")}


def test_an_answer_by_a_sum_is_streamed_when_it_has_won(pipe):
    pipe = RAGPipeline(pipe.rag, replace(pipe.config, answer_permutations=6))
    expected = pipe(REQUEST["question"], documents=REQUEST["documents"])
    with Server(pipe) as server:
        assert json.loads(server.ask()[1])["answer"] == expected.answer
        lines = [json.loads(line) for line in server.ask("/stream")[1].splitlines()]
    assert [document["id"] for document in lines[0]["documents"]] == [document.id for document in expected.documents]
    assert lines[1:-1] == [{"text": expected.answer}]


def test_texts_and_dialogues_are_understood(server):
    dialogue = [{"role": "user", "content": "who wrote number 1?"}]
    assert server.ask(content={"question": dialogue, "documents": ["one text", "another"]})[0] == 200


def test_the_page_is_there(server):
    status, page = server.get("/")
    assert status == 200 and b"<form" in page


WRONG = [
    (b"{", "JSON"),
    (b"", "JSON"),
    (b"\xff\xfe", "JSON"),
    (b"[" * 100_000, "JSON"),
    (b'{"question": "\\ud800", "documents": ["a"]}', "JSON"),
    (b'{"question": "who?", "documents": ["\\udfff"]}', "JSON"),
    (b'{"question": NaN, "documents": ["a"]}', "valid string"),
    (b'{"question": "who?", "documents": NaN}', "documents: Input should be a valid array"),
    (b'{"question": "who?", "documents": [Infinity]}', "documents[0]"),
    (b'{"question": 1' + b"0" * 5000 + b"}", "JSON"),
    ({}, "question: Field required"),
    ({"question": 3}, "valid string"),
    ({"question": "who?", "surplus": 1}, "not permitted"),
    ({"question": " ", "documents": ["a"]}, "column question: is empty"),
    ({"question": [], "documents": ["a"]}, "column question: must be a string or a non-empty list"),
    ({"question": [{"role": "wizard", "content": "a"}], "documents": ["a"]}, "must be one of system, user, assistant"),
    ({"question": "who?"}, "pass documents"),
    ({"question": "who?", "documents": []}, "column documents"),
    ({"question": "who?", "documents": [" "]}, "column documents[0].text"),
    ({"question": "who?", "documents": [{"title": "no text"}]}, "text: Field required"),
    ({"question": "who? " * 500, "documents": ["a", "b"]}, "the prompt has"),
]


@pytest.mark.parametrize("path", ["/answer", "/stream"])
@pytest.mark.parametrize("content, message", WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_request_is_told_in_one_line_what_is_wrong(server, path, content, message):
    status, text = server.ask(path, content)
    detail = json.loads(text)["detail"]
    assert status == 422 and message in detail and "\n" not in detail


def test_what_a_web_page_could_send_unasked_is_refused(server):
    status, text = server.ask(headers={"Content-Type": "text/plain"})
    assert status == 422 and b"Content-Type: application/json" in text


def test_other_methods_and_paths_are_refused(server):
    assert server.get("/answer")[0] == 405
    assert server.get("/nothing")[0] == 404


def test_a_stream_cut_by_the_time_limit_says_so_in_its_last_line(pipe):
    class Hangs(RAGPipeline):
        """Writes nothing after the documents."""

        def __call__(self, *arguments, watch, **settings):
            def hang(i, output):
                until(lambda: watch(i, output))
                return True

            return super().__call__(*arguments, watch=hang, **settings)

    with Server(Hangs(pipe.rag, pipe.config), timeout=1.5) as server:
        status, text = server.ask("/stream")
    lines = [json.loads(line) for line in text.splitlines()]
    assert status == 200 and "documents" in lines[0]
    assert lines[-1] == {"error": "no answer within 1.5 seconds"}


def test_an_error_in_a_stream_is_its_last_line(pipe):
    class BreaksLater(Slow):
        def __call__(self, *arguments, watch, **settings):
            super().__call__(*arguments, watch=watch, **settings)
            raise RuntimeError("a secret path")

    with Server(BreaksLater(pipe, 0.0)) as server:
        lines = server.ask("/stream")[1].splitlines()
    assert json.loads(lines[-1]) == {"error": "an error inside the server, which its log tells"}


def test_an_answer_that_takes_too_long_is_given_up(pipe):
    with Server(Slow(pipe, 0.1), timeout=0.2) as server:
        status, text = server.ask()
        assert (status, json.loads(text)["detail"]) == (504, "no answer within 0.2 seconds")
        until(lambda: server.state()[1]["waiting"] == 0)


def test_an_error_inside_is_a_500_that_tells_nothing(pipe):
    with Server(Broken(pipe, RuntimeError("a secret path"))) as server:
        status, text = server.ask()
        assert status == 500 and b"secret" not in text
        assert server.state()[1]["waiting"] == 0


def test_health_and_readiness_are_those_of_the_worker(pipe):
    gate = Gate(pipe)
    with Server(gate, max_waiting=2) as server:
        assert server.state("/ready") == (200, {"status": "ok", "waiting": 0, "last_error": None})
        held = [server.send() for _ in range(2)]
        until(lambda: server.state("/health")[1]["waiting"] == 2)
        assert server.state("/ready") == (503, {"status": "overloaded", "waiting": 2, "last_error": None})
        assert server.state("/health")[0] == 200
        gate.open.set()
        assert all(b" 200 " in connection.recv(20) for connection in held)
        until(lambda: server.state("/ready")[0] == 200)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_errors_are_told_by_the_readiness_and_a_dead_worker_by_the_health(pipe):
    broken = Broken(pipe, RuntimeError("a secret path"))
    with Server(broken) as server:
        for _ in range(3):
            assert server.ask()[0] == 500
        status, state = server.state("/ready")
        assert (status, state["status"], state["last_error"]["type"]) == (503, "failing", "RuntimeError")
        broken.error = None
        assert server.ask()[0] == 200 and server.state("/ready")[0] == 200
        broken.error = SystemExit()  # which ends a thread
        assert server.ask()[0] == 503
        assert server.state("/health")[0] == 503 and server.state("/health")[1]["status"] == "dead"
        assert b"must be restarted" in server.ask()[1]


def test_too_many_requests_are_turned_away_and_the_others_answered(pipe):
    gate = Gate(pipe)
    with Server(gate, max_waiting=3) as server, ThreadPoolExecutor(12) as threads:
        replies = [threads.submit(server.ask) for _ in range(12)]
        until(lambda: sum(reply.done() for reply in replies) == 9)
        gate.open.set()
        assert sorted(reply.result()[0] for reply in replies) == [200] * 3 + [503] * 9


def test_requests_whose_client_left_are_taken_out_of_the_queue(pipe):
    gate = Gate(pipe)
    with Server(gate, max_batch=1) as server:
        held = [server.send("/stream" if i % 2 else "/answer") for i in range(16)]
        until(lambda: server.state()[1]["waiting"] == 16)
        for connection in held[1:]:
            connection.close()
        until(lambda: server.state()[1]["waiting"] == 1)
        gate.open.set()
        assert b" 200 " in held[0].recv(20)
        assert len(gate.batches) == 1  # no model saw the others


@pytest.mark.parametrize("path", ["/answer", "/stream"])
def test_an_answer_ends_when_its_client_leaves(pipe, path):
    slow = Slow(pipe, 0.15)
    with Server(slow) as server:
        connection = server.send(path)
        until(lambda: slow.tokens >= 3)
        connection.close()
        until(lambda: server.state()[1]["waiting"] == 0)
    assert slow.tokens < 10  # of the documents and twelve


def test_a_reader_who_leaves_a_stream_does_not_block_the_next(server):
    for _ in range(3):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.request("POST", "/stream", json.dumps(REQUEST), {"Content-Type": "application/json"})
        connection.getresponse().read(10)
        connection.close()
    assert server.ask()[0] == 200


def test_requests_at_once_get_their_own_answers(server, pipe):
    expected = [pipe(**record).answer for record in RECORDS]
    with ThreadPoolExecutor(12) as threads:
        replies = threads.map(lambda i: server.ask(content=RECORDS[i % 6])[1], range(24))
        assert [json.loads(reply)["answer"] for reply in replies] == expected * 4


def test_a_server_with_requests_under_way_stops(pipe):
    with Server(Slow(pipe, 0.05), timeout=1.0) as server:
        server.send()
        start = time.monotonic()
    assert time.monotonic() - start < 5


def test_where_none_is_selected_the_reply_names_no_document(tmp_path):
    save_run_that_selects_none(tmp_path)
    pipe = RAGPipeline.from_pretrained(tmp_path, options=LoadOptions(device="cpu"))
    expected = pipe(**REQUEST)
    with torch.no_grad():
        alone = pipe.rag.answer([REQUEST], torch.zeros(1, 2, dtype=torch.long), 6)
    assert expected == RAGOutput(alone[0], [], expected.logp) and alone[0]
    with Server(pipe) as server:
        reply = json.loads(server.ask()[1])
        assert reply == {**asdict(expected), "documents": [], "logp": pytest.approx(expected.logp)}
        lines = [json.loads(line) for line in server.ask("/stream")[1].splitlines()]
    assert lines[0] == {"documents": []}
    assert "".join(line["text"] for line in lines[1:-1]) == expected.answer
    stream = pipe.stream(**REQUEST)
    assert stream.documents == [] and "".join(stream.pieces).strip() == expected.answer
