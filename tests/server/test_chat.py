# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import json
from dataclasses import asdict, replace

import pytest

from trl_dro import RAGPipeline
from trl_dro.model.control_tokens import text_ids

from .serving import RECORDS, REQUEST, Gate, Server, Slow, until


openai = pytest.importorskip("openai", reason="needs the official client: pip install -c constraints.txt openai")

PATH = "/v1/chat/completions"
ASKED = {"messages": [{"role": "user", "content": REQUEST["question"]}], "model": "trl_dro"}
CHAT = {**ASKED, "documents": REQUEST["documents"]}


def client(server, key="any"):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=key, max_retries=0)


def ask(server, **more):
    asked = {**ASKED, "extra_body": {"documents": REQUEST["documents"]}, **more}
    return client(server).chat.completions.create(**asked)


def test_the_official_client_gets_the_pipelines_answer(server, pipe):
    expected = pipe(**REQUEST)
    [model] = client(server).models.list().data
    assert model.id == "trl_dro" and client(server).models.retrieve("trl_dro") == model
    reply = ask(server, temperature=0.7, max_tokens=12)
    [choice] = reply.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.answer)
    assert [each["id"] for each in reply.documents] == [each.id for each in expected.documents]
    assert reply.citations == [asdict(each) for each in expected.citations]
    documents = [vars(each) for each in expected.documents]
    assert reply.usage.prompt_tokens == len(pipe.rag.prompts["generator"](REQUEST["question"], documents))
    tokens = len(text_ids(pipe.rag.tokenizers["generator"], [expected.answer])[0])
    assert reply.usage.completion_tokens == tokens
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + tokens
    assert choice.finish_reason == ("length" if tokens >= 12 else "stop")


def test_the_official_client_gets_the_answer_in_pieces(server, pipe):
    expected = pipe(**REQUEST)
    chunks = list(ask(server, stream=True, stream_options={"include_usage": True}))
    *answered, usage = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in answered) == expected.answer
    assert len(answered) > 3 and len({chunk.id for chunk in chunks}) == 1
    assert answered[0].choices[0].delta.role == "assistant"
    assert [each["id"] for each in answered[0].documents] == [each.id for each in expected.documents]
    assert [chunk.choices[0].finish_reason for chunk in answered[:-1]] == [None] * (len(answered) - 1)
    assert answered[-1].choices[0].finish_reason in ("stop", "length")
    assert not answered[-1].abstained and answered[-1].citations == [asdict(each) for each in expected.citations]
    assert usage.choices == [] and usage.usage == ask(server).usage


def test_an_answer_without_support_says_so(pipe):
    unsure = RAGPipeline(pipe.rag, replace(pipe.config, min_gain=1e9))
    expected = unsure(**REQUEST)
    with Server(unsure) as server:
        reply = ask(server)
        chunks = list(ask(server, stream=True))
        last = json.loads(server.ask("/stream")[1].splitlines()[-1])
    said = f"{expected.answer}\n\n(The documents do not support this answer.)"
    assert reply.choices[0].message.content == said
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == said
    for each in (reply.model_extra, chunks[-1].model_extra, last):
        assert each["abstained"] and each["gain"] == pytest.approx(expected.gain, abs=1e-3)


def test_a_stream_is_server_sent_events_and_ends_with_done(server):
    status, text = server.ask(PATH, {**CHAT, "stream": True})
    *events, last, nothing = text.decode().split("\n\n")
    assert status == 200 and last == "data: [DONE]" and nothing == ""
    chunks = [json.loads(each.removeprefix("data: ")) for each in events]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert all(chunk["choices"] and "usage" not in chunk for chunk in chunks)


def test_one_message_is_a_question_and_several_are_a_dialogue(pipe):
    gate = Gate(pipe)
    gate.open.set()
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "who wrote"}, {"type": "text", "text": "number 1?"}]},
        {"role": "assistant", "content": "Anna 1", "refusal": None},
        {"role": "user", "content": "and number 2?"},
    ]
    with Server(gate) as server:
        for messages in (ASKED["messages"], turns):
            assert server.ask(PATH, {**CHAT, "messages": messages})[0] == 200
    plain = [("system", "Be brief."), ("user", "who wrote\nnumber 1?"), ("assistant", "Anna 1")]
    dialogue = [{"role": role, "content": content} for role, content in [*plain, ("user", "and number 2?")]]
    assert gate.batches == [[REQUEST["question"]], [dialogue]]


@pytest.mark.parametrize(
    "change, status, message",
    [
        ({"model": "gpt-4"}, 404, "there is no model 'gpt-4' here: ask for 'trl_dro'"),
        ({"model": None}, 400, "model: Input should be a valid string"),
        ({"messages": []}, 400, "column question: must be a string or a non-empty list"),
        ({"messages": [{"role": "assistant", "content": "Anna"}]}, 400, "the last message must come from the user"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content"),
        ({"documents": None}, 400, "pass documents"),
        ({"documents": []}, 400, "column documents: must be a non-empty list"),
        ({"n": 2}, 400, "n: 2 answers are not supported"),
        ({"max_tokens": 11}, 400, "max_tokens: 11 would cut answers, which have up to 12"),
        ({"max_completion_tokens": 1}, 400, "max_completion_tokens: 1 would cut"),
        ({"tools": [{"type": "function"}]}, 400, "tools is not supported: leave it out"),
        ({"messages": [{"role": "user", "content": "who? " * 500}]}, 400, "the prompt has"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_what_cannot_be_done_is_refused_in_the_form_that_clients_read(server, change, status, message, streamed):
    found, text = server.ask(PATH, {**CHAT, "stream": streamed, **change})
    error = json.loads(text)["error"]
    assert found == status and message in error["message"] and "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"


def test_the_official_client_raises_its_own_errors(pipe):
    with Server(pipe, api_key="s3cret", max_body_bytes=5000) as server:
        with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer KEY"):
            client(server, "guess").models.list()
        ours = client(server, "s3cret")
        assert ours.models.list().data
        with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4' here") as error:
            ours.models.retrieve("gpt-4")
        assert error.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError, match="pass documents"):
            ours.chat.completions.create(**ASKED)
        with pytest.raises(openai.APIStatusError, match="more than 5000 bytes"):
            ours.chat.completions.create(**ASKED, extra_body={"documents": ["long " * 2000]})
        with pytest.raises(openai.NotFoundError, match="Not Found"):
            ours.embeddings.create(input="a", model="trl_dro")


def test_an_error_in_a_stream_is_raised_by_the_official_client(pipe):
    class BreaksLater(Slow):
        def __call__(self, *arguments, watch, **settings):
            super().__call__(*arguments, watch=watch, **settings)
            raise RuntimeError("a secret path")

    with Server(BreaksLater(pipe, 0.0)) as server:
        chunks = ask(server, stream=True)
        with pytest.raises(openai.APIError, match="an error inside the server, which its log tells"):
            list(chunks)
        with pytest.raises(openai.InternalServerError, match="an error inside the server"):
            ask(server)


def test_chats_share_queue_and_limits_with_the_other_paths(pipe):
    gate = Gate(pipe)
    with Server(gate, max_waiting=2) as server:
        held = [server.send(PATH, CHAT), server.send("/answer", RECORDS[1])]
        until(lambda: server.state()[1]["waiting"] == 2)
        with pytest.raises(openai.InternalServerError, match="2 requests are waiting: try again") as error:
            ask(server)
        assert error.value.status_code == 503 and error.value.response.headers["Retry-After"] == "1"
        gate.open.set()
        assert all(b" 200 " in connection.recv(20) for connection in held)


def test_a_client_that_leaves_a_stream_ends_the_answer(pipe):
    slow = Slow(pipe, 0.15)
    with Server(slow) as server:
        chunks = ask(server, stream=True)
        next(iter(chunks))
        chunks.close()
        until(lambda: server.state()[1]["waiting"] == 0)
    assert slow.tokens < 10  # of the documents and twelve
