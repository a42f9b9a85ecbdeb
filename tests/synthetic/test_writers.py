# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
import http.server
import itertools
import json
import threading

import pytest
import torch

from trl_dro.data import DatasetError
from trl_dro.synthetic import writers
from trl_dro.synthetic.writers import Endpoint, LocalModel, Pair, parse_pairs

from ..tiny_models import TOKENIZERS, tiny_llama


PASSAGES = [
    {"id": "p0", "title": "Anna Brown", "text": "Anna Brown was born in Paris in 1907."},
    {"id": "p1", "title": "", "text": "The book was written by the year 1950."},
]


@pytest.mark.parametrize(
    "text, pairs",
    [
        ("Question: who wrote it\nAnswer: Anna.\n", [("Who wrote it?", "Anna")]),
        ('**Question 2:** When?\n**Answer:** "1907"\n', [("When?", "1907")]),
        ("Question: a\nAnswer: b\n\nQuestion: c\nAnswer: U.S.\n", [("A?", "b"), ("C?", "U.S.")]),
        ("Question: who\nQuestion: why\nAnswer: so", [("Why?", "so")]),
        ("Here are some questions.\nQuestion: who wrote", []),
    ],
)
def test_lines_of_questions_and_answers_are_read_and_nothing_else(text, pairs):
    assert parse_pairs(text) == [Pair(*pair) for pair in pairs]


@pytest.fixture(params=TOKENIZERS)
def local(request):
    tokenizer = TOKENIZERS[request.param]()
    return LocalModel(tiny_llama(tokenizer), tokenizer, question_words=("who", "when", "how many"))


SOURCES = [PASSAGES[:1], PASSAGES[1:], PASSAGES]


@torch.no_grad()
def test_a_model_writes_on_as_if_it_had_read_the_whole_prompt_anew(local, monkeypatch):
    seen = []
    monkeypatch.setattr(writers, "MAX_NEW_TOKENS", 30)
    monkeypatch.setattr(writers, "parse_pairs", lambda text: seen.append(text) or [])
    local.write(SOURCES, 2)
    words = [("who", "when"), ("how many", "who"), ("when", "how many")]  # they take turns
    expected = []
    for source, of_source in zip(SOURCES, words, strict=True):
        for word in of_source:
            parts = [part for each in source for part in ("Passage:", f" {writers.passage_text(each)}", "\n")]
            parts.append(f"Question: {word}")
            ids = local.tokenizer("".join(writers.SHOTS[len(source)])).input_ids
            ids += [i for part in parts for i in local.tokenizer(part, add_special_tokens=False).input_ids]
            length = len(ids)
            text = ""
            while len(ids) < length + 30 and text.count("\n") < 2 and ids[-1] != local.tokenizer.eos_token_id:
                ids.append(int(local.model(torch.tensor([ids])).logits[0, -1].argmax()))
                text = local.tokenizer.decode(ids[length:], skip_special_tokens=True)
            expected.append(f"Question: {word}{text}")
    for text, plain in zip(seen, expected, strict=True):
        # The cap on tokens counts from the longest beginning, and cuts within a character.
        assert text.startswith(plain.rstrip("\ufffd")) and len(plain) > 15
    assert len(set(seen)) > 1


@torch.no_grad()
@pytest.mark.parametrize("source", SOURCES[::2], ids=["one passage", "two"])
def test_gains_are_over_the_best_of_less(local, source):
    pairs = [Pair("Who was born in Paris?", "Anna Brown"), Pair("When?", "1907")]
    for pair, gain in zip(pairs, local.gains(source, pairs), strict=True):
        answer = local.tokenizer(f" {pair.answer}", add_special_tokens=False).input_ids
        logps = {}
        for size in range(len(source) + 1):
            for part in itertools.combinations(range(len(source)), size):
                texts = [f"Passage: {writers.passage_text(source[i])}\n" for i in part]
                prompt = []
                for text in [*texts, f"Question: {pair.question}\nAnswer:"]:
                    prompt += local.tokenizer(text, add_special_tokens=not prompt).input_ids
                logits = local.model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
                logps[part] = sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))
        whole = logps.pop(tuple(range(len(source))))
        assert len(logps) == 2 * len(source) - 1
        assert gain == pytest.approx(whole - max(logps.values()), abs=1e-3)


@torch.no_grad()
def test_two_long_passages_fit_a_short_context(local):
    local.model.config.max_position_embeddings = 1024
    seen = []
    local.model.register_forward_pre_hook(
        lambda module, _, inputs: seen.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    long = [{"title": "", "text": f"{number} " * 2000} for number in "ab"]
    assert len(local.gains(long, [Pair("Who was it?", "Anna")])) == 1
    assert 700 < max(seen) <= 1024


class Chat(http.server.BaseHTTPRequestHandler):
    """Answers as a chat model that asks for the last word of a passage and answers with one of the first."""

    answer_word = 0

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.seen.append((self.path, self.headers.get("Authorization"), body))
        if server.failures:
            status, headers = server.failures.pop()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        words = body["messages"][0]["content"].strip().split("Passage: ")[-1].split()
        text = f"Question: who is {words[-1]}\nAnswer: {words[self.answer_word]}\n\nQuestion: where\nAnswer: there\n"
        self.reply({"choices": [{"message": {"content": text}}], "usage": {"total_tokens": 7}})

    def reply(self, content):
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def chat():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Chat)
    server.seen, server.failures = [], []
    server.address = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_an_endpoint_is_asked_with_its_key_and_again_while_it_is_busy(chat, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    chat.failures = [(429, {"Retry-After": "0"}), (503, {})]
    endpoint = Endpoint(chat.address, "some-model", pause=0.01)
    first, second, both = endpoint.write(SOURCES, 2)
    assert first.pairs == [Pair("Who is 1907?", "Anna"), Pair("Where?", "there")] and first.tokens == 7
    assert second.pairs[0] == Pair("Who is 1950?", "The")
    assert both.pairs[0] == second.pairs[0]  # of the last passage
    prompts = {body["messages"][0]["content"] for *_, body in chat.seen}  # some were sent twice
    [prompt] = [each for each in prompts if "both passages" in each]
    assert prompt.endswith("".join(f"Passage: {writers.passage_text(each)}\n" for each in PASSAGES))
    assert endpoint.write(SOURCES[:1], 1)[0].pairs == first.pairs[:1]
    assert len(chat.seen) == 6
    assert {(path, key) for path, key, _ in chat.seen} == {("/v1/chat/completions", "Bearer sk-secret")}
    assert chat.seen[0][2]["model"] == "some-model" and "sk-secret" not in json.dumps(endpoint.settings)


@pytest.mark.parametrize(
    "failure, times, message",
    [
        ((503, {}), 9, "does not answer .503 .* after 3 attempts: .* what was written so far is kept"),
        ((401, {}), 1, "refuses the request .401 Unauthorized.: set OPENAI_API_KEY"),
        ((404, {}), 1, "check --api_base and --api_model"),
        ((302, {"Location": "http://127.0.0.1:9/elsewhere"}), 1, "302"),  # a key goes nowhere else
    ],
)
def test_an_endpoint_that_refuses_ends_with_one_line_without_the_key(chat, monkeypatch, failure, times, message):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    chat.failures = [failure] * times
    with pytest.raises(DatasetError, match=message) as error:
        Endpoint(chat.address, "m", attempts=3, pause=0.01).write(SOURCES[:1], 2)
    assert "\n" not in str(error.value) and "sk-secret" not in str(error.value)
    assert len(chat.seen) == min(times, 3)


@pytest.mark.parametrize("address", ["localhost:8000", "https://user:sk-secret@host/v1", "ftp://host"])
def test_an_address_that_is_none_or_holds_a_key_is_refused(address):
    with pytest.raises(DatasetError, match="must be an address like") as error:
        Endpoint(address, "m")
    assert "sk-secret" not in str(error.value)
