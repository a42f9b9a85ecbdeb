# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
500 requests to a real server, 32 at once: valid, streamed, oversized, malformed, misdirected, and from clients that
stop half-way. Prints the status codes and times of each kind, and fails if a status is not the right one.

    python benchmarks/server_load.py                    # a tiny random model
    python benchmarks/server_load.py --model llama3-dro # a run folder or Hub repo
"""

import argparse
import http.client
import json
import random
import socket
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import uvicorn
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_dro import RAGPipeline
from trl_dro.server.app import create_app
from trl_dro.server.limits import ServerLimits


# What the requests are, how often each is drawn, and the status that is right.
KINDS = {
    "valid": (60, 200),
    "streamed": (12, 200),
    "oversized": (8, 413),
    "not JSON": (5, 422),
    "no documents": (5, 422),
    "wrong path": (3, 404),
    "wrong method": (3, 405),
    "slow client": (4, 408),
}

RECORDS = [
    {
        "question": f"In which year was person {i} born?",
        "documents": [f"Person {j} was born in {1900 + j} in a town by the sea." for j in range(i, i + 5)],
    }
    for i in range(100)
]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="run folder or Hub repo; a tiny random model by default")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--at_once", type=int, default=32)
    return parser.parse_args()


def load(model: str | None, folder: str) -> RAGPipeline:
    if model is not None:
        return RAGPipeline.from_pretrained(model)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([json.dumps(RECORDS)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=tokenizer.get_vocab_size(), **sizes)).save_pretrained(folder)
    return RAGPipeline.from_pretrained(folder, num_selected=2, max_candidates=5, max_answer_length=8)


def send(kind: str, record: dict, port: int) -> tuple[int, float]:
    """Status and seconds of one request."""
    content = {name: record[name] for name in ("question", "documents")}
    method, path, body = "POST", "/stream" if kind == "streamed" else "/answer", json.dumps(content)
    match kind:
        case "oversized":
            body = json.dumps({"question": "who? " * 400_000, "documents": ["a"]})
        case "not JSON":
            body = body[: len(body) // 2]
        case "no documents":
            body = json.dumps({"question": record["question"], "documents": []})
        case "wrong path":
            path = "/ask"
        case "wrong method":
            method = "PUT"
    start = time.perf_counter()
    if kind == "slow client":
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            head = f"POST /answer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall((head + body[: len(body) // 2]).encode())
            status = int(connection.recv(4096).split()[1])
    else:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        reply.read()
        connection.close()
        status = reply.status
    return status, time.perf_counter() - start


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        app = create_app(load(args.model, folder), ServerLimits(body_timeout=2.0))
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        port = server.servers[0].sockets[0].getsockname()[1]
        draw = random.Random(0)
        kinds = draw.choices(list(KINDS), [weight for weight, _ in KINDS.values()], k=args.requests)
        start = time.perf_counter()
        with ThreadPoolExecutor(args.at_once) as threads:
            results = list(threads.map(lambda kind: send(kind, draw.choice(RECORDS), port), kinds))
        seconds = time.perf_counter() - start
        health, _ = send("valid", RECORDS[0], port)
        server.should_exit = True
        thread.join()

    table = Table(title=f"{args.requests} requests, {args.at_once} at once, in {seconds:.1f} s")
    for heading in ("request", "statuses", "p50, ms", "p95, ms"):
        table.add_column(heading, justify="left" if heading in ("request", "statuses") else "right")
    wrong = int(health != 200)
    for kind, (_, right) in KINDS.items():
        of_kind = [result for result, drawn in zip(results, kinds, strict=True) if drawn == kind]
        statuses = Counter(status for status, _ in of_kind)
        wrong += sum(count for status, count in statuses.items() if status != right)
        p50, p95 = np.percentile([1000 * seconds for _, seconds in of_kind], [50, 95])
        shown = ", ".join(f"{status}: {count}" for status, count in statuses.items())
        table.add_row(kind, shown, f"{p50:.0f}", f"{p95:.0f}")
    Console().print(table)
    if wrong:
        raise SystemExit(f"{wrong} requests had a wrong status")


if __name__ == "__main__":
    main(parse_arguments())
