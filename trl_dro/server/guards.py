# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""What a request passes before the application sees it, and before its body is read: name of the server, key, size,
time. Each guard is an ASGI application around another."""

import asyncio
import hmac
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import error_content
from .limits import ServerLimits


def refusal(scope: Scope, detail: str, status: int, **headers: str) -> JSONResponse:
    """A reply after which the connection is closed: the request's body may not have been read."""
    return JSONResponse(error_content(scope["path"], detail, status), status, {"Connection": "close", **headers})


class KnownHosts:
    """
    Refuses requests to another name than the server's, with 400. A web page whose name leads to this machine could
    otherwise call a server that listens on the loopback address only.

    Args:
        app (`Callable`):
            ASGI application.
        hosts (`Collection[str]`):
            Names and addresses of the server, lower case, without port and brackets.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str]):
        self.app = app
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._name(scope) not in self.hosts:
            return await refusal(scope, "the Host header names another server", 400)(scope, receive, send)
        return await self.app(scope, receive, send)

    def _name(self, scope: Scope) -> str | None:
        value = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        try:
            url = urlsplit(f"//{value}")  # which knows about ports and [::1]
            return url.hostname if url.netloc == value and url.username is None else None
        except ValueError:
            return None


class ApiKey:
    """
    Refuses requests without the key, `Authorization: Bearer KEY`, with 401. The page and what probes ask for need
    none.

    Args:
        app (`Callable`):
            ASGI application.
        key (`str`):
            The key.
        open_paths (`Collection[str]`):
            Paths for which none is needed.
    """

    def __init__(self, app: ASGIApp, key: str, open_paths: Collection[str]):
        self.app = app
        self.expected = b"Bearer " + key.encode()
        self.open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self.open_paths:
            given = dict(scope["headers"]).get(b"authorization", b"")
            # In a time that does not tell how much of it is right.
            if not hmac.compare_digest(given, self.expected):
                reply = refusal(
                    scope, "send the header Authorization: Bearer KEY", 401, **{"WWW-Authenticate": "Bearer"}
                )
                return await reply(scope, receive, send)
        return await self.app(scope, receive, send)


class BodyLimits:
    """
    Reads the body of a request before the application does, up to a size and a time.

    Args:
        app (`Callable`):
            ASGI application.
        limits ([`ServerLimits`]):
            Size and time.
    """

    def __init__(self, app: ASGIApp, limits: ServerLimits):
        self.app = app
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            body = await asyncio.wait_for(self._read(scope, receive), self.limits.body_timeout)
        except ClientDisconnect:
            return None
        except TimeoutError:
            return await refusal(scope, "the body did not arrive in time", 408)(scope, receive, send)
        if body is None:
            detail = f"the body has more than {self.limits.max_body_bytes} bytes"
            return await refusal(scope, detail, 413)(scope, receive, send)
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()  # which tells when the client has gone
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        return await self.app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """
        The body, or `None` if it is too long. Some of what is too much is read all the same: a client that is still
        sending would not see the reply.
        """
        declared = int(dict(scope["headers"]).get(b"content-length", 0))  # the server has checked that it is a number
        size = 0
        parts: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            size += len(message.get("body", b""))
            if size <= self.limits.max_body_bytes:
                parts.append(message.get("body", b""))
            if size > 10 * self.limits.max_body_bytes or declared > 10 * self.limits.max_body_bytes:
                return None
            if not message.get("more_body"):
                return b"".join(parts) if size <= self.limits.max_body_bytes else None
