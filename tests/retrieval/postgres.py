# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""A PostgreSQL with pgvector of one's own, in a folder that goes with it, and a retriever of LangChain on it."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import Any

from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever


BINARIES = "/usr/lib/postgresql/*/bin"  # where Debian has them
EXTENSION = "/usr/share/postgresql/*/extension/vector.control"


def what_is_missing() -> str | None:
    """What a server with pgvector lacks on this machine."""
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "needs psycopg: pip install 'psycopg[binary]'"
    if not glob(f"{BINARIES}/initdb"):
        return "needs PostgreSQL: apt-get install postgresql"
    return None if glob(EXTENSION) else "needs pgvector: apt-get install postgresql-17-pgvector, or make install"


class Server:
    """
    A server that listens on a socket in its folder.

    Args:
        folder (`str`):
            Empty folder; its owner runs the server, as root may not.
    """

    def __init__(self, folder: str):
        self.folder = folder
        self.where = f"host={folder} user=postgres dbname=postgres"
        self._run("initdb", "--username", "postgres", "--auth", "trust", "--no-sync")
        self.start()

    def _run(self, name: str, *arguments: str) -> None:
        program = str(Path(sorted(glob(BINARIES))[-1]) / name)
        owner = os.stat(self.folder).st_uid
        command = [program, "--pgdata", f"{self.folder}/data", *arguments]
        subprocess.run(command, user=owner, cwd=self.folder, check=True, stdout=subprocess.DEVNULL)

    def start(self) -> None:
        options = f"-k {self.folder} -c listen_addresses= -c fsync=off"
        self._run("pg_ctl", "--wait", "--log", f"{self.folder}/log", "--options", options, "start")

    def stop(self) -> None:
        """Ends it with all that it is doing."""
        self._run("pg_ctl", "--mode", "immediate", "stop")

    def fill(self, documents: Iterable[dict[str, Any]], vectors: Iterable[Sequence[float]]) -> None:
        """A table of passages with id, title, text and vector."""
        import psycopg

        with psycopg.connect(self.where) as connection:
            connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
            connection.execute("CREATE TABLE passages (id text PRIMARY KEY, title text, text text, vector vector)")
            rows = [
                (d["id"], d["title"], d["text"], str([float(value) for value in vector]))
                for d, vector in zip(documents, vectors, strict=True)
            ]
            with connection.cursor() as cursor:
                cursor.executemany("INSERT INTO passages VALUES (%s, %s, %s, %s)", rows)


@contextmanager
def running_server() -> Iterator[Server]:
    """A server, until the end of the block."""
    folder = tempfile.mkdtemp(prefix="postgres-")
    try:
        if os.getuid() == 0:
            shutil.chown(folder, "postgres")
        server = Server(folder)
        try:
            yield server
        finally:
            if Path(folder, "data/postmaster.pid").is_file():
                server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class PgvectorRetriever(BaseRetriever):
    """The nearest of the table's vectors, by cosine, as LangChain asks for them."""

    where: str
    encode: Callable[[list[str]], Sequence[Sequence[float]]]
    k: int = 20

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        import psycopg

        [vector] = self.encode([query])
        near = str([float(value) for value in vector])
        select = "SELECT id, title, text, 1 - (vector <=> %s::vector) FROM passages ORDER BY vector <=> %s::vector"
        with psycopg.connect(self.where) as connection:
            rows = connection.execute(f"{select}, id LIMIT %s", (near, near, self.k)).fetchall()
        return [
            Document(page_content=text, id=key, metadata={"title": title, "score": score})
            for key, title, text, score in rows
        ]
