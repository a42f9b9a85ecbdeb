# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""`trl-dro serve`: a trained system over HTTP. The server itself is in `server.py`, whose packages are an extra."""

from dataclasses import dataclass, field

from ..data import read_corpus
from ..retrieval import BM25Retriever
from ..server.limits import ServerLimits
from ..system.pipeline import RAGPipeline
from .arguments import CORPUS_HELP, LoadArguments


LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(kw_only=True)
class ServeArguments(ServerLimits, LoadArguments):
    """
    What is served, and where; see also [`LoadArguments`] and [`ServerLimits`].

    Args:
        corpus (`str`, *optional*):
            Passages, as for [`~data.corpus.open_corpus`], from which BM25 retrieves where a request has no documents.
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Address to listen on. The default is reachable from this machine alone.
        port (`int`, *optional*, defaults to `8000`):
            Port to listen on.
    """

    corpus: str | None = field(
        default=None,
        metadata={"help": f"{CORPUS_HELP} BM25 retrieves from them where a request has no documents."},
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on."})
    port: int = field(default=8000, metadata={"help": "Port to listen on."})

    def __post_init__(self):
        super().__post_init__()
        if not self.model:
            raise ValueError("nothing to serve: name a run folder or Hub repo, trl-dro serve RUN")


def serve(args: ServeArguments) -> None:
    """
    Loads a system and serves it until the process is stopped.

    Args:
        args ([`ServeArguments`]):
            System, address and limits.

    Raises:
        `ImportError`: fastapi or uvicorn is not installed.
        `ValueError`: the system cannot be loaded.
    """
    from ..server.app import create_app, uvicorn  # before a model is loaded, as it may not be installed

    retriever = None if args.corpus is None else BM25Retriever(read_corpus(args.corpus))
    pipe = RAGPipeline.from_pretrained(
        str(args.model),
        selector=args.selector,
        retriever=retriever,
        revision=args.revision,
        base_model=args.base_model,
        options=args.load_options(),
    )
    limits = ServerLimits(args.max_body_bytes, args.body_timeout, args.max_waiting, args.timeout)
    app = create_app(pipe, limits, hosts=LOOPBACK if args.host in LOOPBACK else None)
    uvicorn.run(app, host=args.host, port=args.port, timeout_keep_alive=5, server_header=False)
