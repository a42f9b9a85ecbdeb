# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
A server under load, in a process of its own: first valid requests alone, for requests per second; then 1,000 of
clients that ask, stream, leave, say nothing, send half a body, too much, nonsense, or no HTTP, 64 at once. Prints what
each kind got, memory, and open connections at the end, and fails if a status is not the right one, the server has
died, or a connection is left.

    python benchmarks/server_load.py                          # a tiny random model
    python benchmarks/server_load.py -- --max_batch 1         # more flags of `trl-dro serve`
    python benchmarks/server_load.py --model llama3-dro       # a run folder or Hub repo
    python benchmarks/server_load.py --serve "python -m …"    # another command than this version's
"""

import argparse
import contextlib
import http.client
import json
import random
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_dro.model.prompts import GENERATOR_TEMPLATE, SELECTOR_TEMPLATE


SERVE = f"{sys.executable} -c 'from trl_dro.commands.cli import main; main()' serve"

# Seconds in which the server wants headers and bodies; clients that say nothing are left open for three times as long.
BODY_TIMEOUT = 3.0

# What the requests are, how often each is drawn, and what is right: a status, or that the connection is closed.
KINDS = {
    "valid": (46, "200"),
    "streamed": (14, "200"),
    "leaving": (12, "left"),
    "oversized": (3, "413"),
    "not JSON": (4, "422"),
    "lone surrogate": (3, "422"),
    "NaN": (3, "422"),
    "empty chat": (3, "422"),
    "no documents": (3, "422"),
    "wrong path": (2, "404"),
    "wrong method": (1, "405"),
    "no HTTP": (2, "400"),
    "half a body": (2, "408"),
    "half a header": (1, "closed"),
    "silent": (1, "closed"),
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
    parser.add_argument("--serve", default=SERVE, help="command that serves")
    parser.add_argument("--requests", type=int, default=1000, help="of all kinds; a third as many valid ones before")
    parser.add_argument("--at_once", type=int, default=64)
    parser.add_argument("flags", nargs="*", help="of trl-dro serve, after --")
    return parser.parse_args()


def write_model(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([json.dumps(RECORDS)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=tokenizer.get_vocab_size(), **sizes)).save_pretrained(folder)
    templates = {"selector_template": SELECTOR_TEMPLATE, "generator_template": GENERATOR_TEMPLATE}
    config = {"num_selected": 2, "max_candidates": 5, "max_answer_length": 8}
    (folder / "rag_config.json").write_text(json.dumps(config | templates), encoding="utf-8")


class Server:
    """A server in a process of its own."""

    def __init__(self, command: list[str]):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        command = [*command, "--port", str(self.port), "--body_timeout", str(BODY_TIMEOUT)]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        while self.process.poll() is None and self.health() is None:
            time.sleep(0.2)
        if self.process.poll() is not None:
            raise SystemExit(self.stop())

    def health(self) -> str | None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
            connection.request("GET", "/health", headers={"Connection": "close"})
            return json.loads(connection.getresponse().read())["status"]
        return None

    @property
    def memory(self) -> float:
        """Resident memory, in MiB."""
        return psutil.Process(self.process.pid).memory_info().rss / 2**20

    @property
    def seconds(self) -> float:
        """Processor time that it has used: what a busy machine cannot change."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    @property
    def connections(self) -> int:
        """Connections that the process holds."""
        found = psutil.Process(self.process.pid).net_connections("tcp")
        return sum(each.status != psutil.CONN_LISTEN for each in found)

    def stop(self) -> str:
        """Ends the process; returns its log."""
        self.process.terminate()
        self.process.wait(timeout=90)
        self.log.seek(0)
        return self.log.read().decode(errors="replace")


def send(kind: str, record: dict, port: int) -> str:
    """What one request got."""
    if kind == "leaving":
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(raw("/answer", json.dumps(record)))
            time.sleep(random.uniform(0, 0.2))
        return "left"
    if kind in ("silent", "half a header", "half a body", "no HTTP"):
        whole = raw("/answer", json.dumps(record))
        data = {
            "silent": b"",
            "half a header": whole[:40],
            "half a body": whole[:-20],
            "no HTTP": b"\x16\x03\x01\r\n\r\n",
        }
        with socket.create_connection(("127.0.0.1", port), timeout=3 * BODY_TIMEOUT) as connection:
            try:
                connection.sendall(data[kind])
                reply = connection.recv(4096)
            except TimeoutError:
                OPEN.append(connection.dup())  # a client that stays
                return "left open"
            return "closed" if kind in ("silent", "half a header") else reply.split()[1].decode()
    method, path, body = "POST", "/stream" if kind == "streamed" else "/answer", json.dumps(record)
    match kind:
        case "oversized":
            body = json.dumps({"question": "who? " * 400_000, "documents": ["a"]})
        case "not JSON":
            body = body[: len(body) // 2]
        case "lone surrogate":
            body = json.dumps(record | {"question": "who is \ud800?"})
        case "NaN":
            body = json.dumps(record | {"question": float("nan")})
        case "empty chat":
            body = json.dumps(record | {"question": []})
        case "no documents":
            body = json.dumps(record | {"documents": []})
        case "wrong path":
            path = "/ask"
        case "wrong method":
            method = "PUT"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        text = reply.read()
        return "cut" if kind == "streamed" and b'"documents"' not in text else str(reply.status)


# Sockets of clients that neither send nor close.
OPEN: list[socket.socket] = []


def raw(path: str, body: str) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


def run(kinds: list[str], at_once: int, port: int) -> tuple[list[tuple[str, float]], float]:
    """What each request got and its seconds, and the seconds of all."""

    def timed(kind: str) -> tuple[str, float]:
        start = time.perf_counter()
        try:
            got = send(kind, random.choice(RECORDS), port)
        except (OSError, http.client.HTTPException) as error:
            got = type(error).__name__
        return got, time.perf_counter() - start

    start = time.perf_counter()
    with ThreadPoolExecutor(at_once) as threads:
        results = list(threads.map(timed, kinds))
    return results, time.perf_counter() - start


def main(args: argparse.Namespace) -> None:
    random.seed(0)
    kinds = random.choices(list(KINDS), [weight for weight, _ in KINDS.values()], k=args.requests)
    valid = ["valid"] * (args.requests // 3)
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            write_model(Path(folder))
        server = Server([*shlex.split(args.serve), "--model", args.model or folder, *args.flags])
        try:
            run(valid[:64], args.at_once, server.port)  # to warm up
            used = server.seconds
            alone, seconds = run(valid, args.at_once, server.port)
            used = server.seconds - used
            before = server.memory
            results, mixed = run(kinds, args.at_once, server.port)
            middle = server.memory
            results += run(kinds, args.at_once, server.port)[0]
            time.sleep(2 * BODY_TIMEOUT)
            after, connections, health = server.memory, server.connections, server.health()
        finally:
            log = server.stop()

    table = Table(title=f"twice {args.requests} requests, {args.at_once} at once, {mixed:.1f} s the first time")
    for heading in ("request", "right", "got", "p50, ms", "p95, ms"):
        table.add_column(heading, justify="right" if "ms" in heading else "left")
    wrong = 0
    for kind, (_, right) in KINDS.items():
        of_kind = [result for result, drawn in zip(results, kinds * 2, strict=True) if drawn == kind]
        got = Counter(status for status, _ in of_kind)
        wrong += len(of_kind) - got[right]
        p50, p95 = np.percentile([1000 * seconds for _, seconds in of_kind], [50, 95])
        shown = ", ".join(f"{status}: {count}" for status, count in got.items())
        table.add_row(kind, right, shown, f"{p50:.0f}", f"{p95:.0f}")
    Console(width=110).print(table)
    statuses = Counter(status for status, _ in alone)
    per_second, per_used = statuses["200"] / seconds, statuses["200"] / used
    print(f"valid alone: {per_second:.1f} per second, {per_used:.1f} per second of processor time ({dict(statuses)})")
    print(f"memory, MiB: {before:.0f}, after {args.requests} requests of all kinds {middle:.0f}, twice {after:.0f}")
    print(f"open connections: {connections}; health: {health}; tracebacks in the log: {log.count('Traceback')}")
    if wrong or connections or health != "ok" or "Traceback" in log:
        raise SystemExit(f"{wrong} requests did not get what is right")


if __name__ == "__main__":
    main(parse_arguments())
