# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""`trl-dro serve`: a trained system over HTTP, with a page to try it."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from ..retrieval.services import retriever_of
from ..server.limits import ServerLimits
from ..system.pipeline import RAGPipeline
from .arguments import (
    CORPUS_HELP,
    DENSE_MODEL_HELP,
    SERVICE_HELP,
    AnswerArguments,
    CuttingArguments,
    check_range,
)


KEY_VARIABLE = "TRL_DRO_API_KEY"


@dataclass(kw_only=True)
class ServeArguments(ServerLimits, AnswerArguments, CuttingArguments):
    """
    What is served, and where; see also [`AnswerArguments`], [`CuttingArguments`] and [`ServerLimits`].

    Args:
        corpus (`str`, *optional*):
            Passages, as for [`~data.corpus.open_corpus`], from which BM25 retrieves where a request has no documents.
        retriever (`str`, *optional*):
            Service that retrieves instead, see [`~retrieval.services.open_service`].
        dense_model (`str`, *optional*):
            Model that encodes questions for it, if it searches vectors.
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Name or address to listen on. The default is reachable from this machine alone.
        port (`int`, *optional*, defaults to `8000`):
            Port to listen on.
    """

    corpus: str | None = field(
        default=None,
        metadata={"help": f"{CORPUS_HELP} BM25 retrieves from them where a request has no documents."},
    )
    retriever: str | None = field(default=None, metadata={"help": SERVICE_HELP})
    dense_model: str | None = field(default=None, metadata={"help": DENSE_MODEL_HELP})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on."})
    port: int = field(default=8000, metadata={"help": "Port to listen on."})

    def __post_init__(self):
        super().__post_init__()
        self.cut()
        check_range(self, ["port"], 0, 65535)
        check_range(self, ["answer_permutations"], 1)
        if not self.model:
            raise ValueError("nothing to serve: name a run folder or Hub repo, trl-dro serve RUN")


def serve(args: ServeArguments) -> None:
    """
    Loads a system and serves it until the process is stopped. If the environment variable `TRL_DRO_API_KEY` is set,
    requests must send that key.

    Args:
        args ([`ServeArguments`]):
            System, address and limits.

    Raises:
        `ImportError`: fastapi or uvicorn is not installed.
        `ValueError`: the address is not of this machine, the port is taken, or the system cannot be loaded.
    """
    # Before a model is loaded: the packages may not be installed, and the port may be taken.
    from ..server.app import create_app, listen, loopback_names, server_config, uvicorn

    api_key = os.environ.get(KEY_VARIABLE)
    if api_key is not None and (not api_key.isprintable() or api_key.split() != [api_key]):
        raise ValueError(f"{KEY_VARIABLE} is empty or holds white space: set a key without, or unset it")
    sockets = listen(args.host, args.port)
    retriever = retriever_of(args.corpus, args.retriever, args.dense_model, *args.cut())
    pipe = RAGPipeline.from_pretrained(
        str(args.model),
        selector=args.selector,
        retriever=retriever,
        revision=args.revision,
        base_model=args.base_model,
        options=args.load_options(),
        **args.changes(),
    )
    hosts = loopback_names(args.host, sockets)
    if hosts is None and api_key is None:
        print(f"anybody who reaches {args.host} may ask: set {KEY_VARIABLE} to a key that requests must send")
    for each in sockets:
        address, port = each.getsockname()[:2]
        print(f"serving on http://{f'[{address}]' if ':' in address else address}:{port} (Ctrl-C stops)", flush=True)
    name = served_name(str(args.model))
    print(f"OpenAI's clients: the same with /v1 behind it as base_url, model {name!r}", flush=True)
    app = create_app(pipe, args, hosts, api_key, name)
    uvicorn.Server(server_config(app, args)).run(sockets)


def served_name(model: str) -> str:
    """What OpenAI's clients call a system: by its Hub id, or its folder, whose path is nobody's business."""
    return Path(model).resolve().name if os.path.isdir(model) else model
