# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Connections: where the server listens, under which names, and what becomes of clients that neither send nor read.

uvicorn has a limit for idle time between requests, but none for a header that does not arrive, for a reply that is not
taken, or for connections as such.
"""

import asyncio
import errno
import ipaddress
import json
import socket
from functools import partial
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from .limits import ServerLimits


def listen(host: str, port: int) -> list[socket.socket]:
    """
    Sockets bound to all addresses of a name.

    Args:
        host (`str`):
            Name or address of this machine.
        port (`int`):
            Port; 0 takes a free one.

    Returns:
        `list[socket.socket]`: for uvicorn, which closes them.

    Raises:
        `ValueError`: there is no such name or port here, or the port is taken.
    """
    sockets: list[socket.socket] = []
    failure: Exception | None = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, OverflowError) as error:
        found, failure = [], error
    for family, kind, protocol, _, address in dict.fromkeys(found):
        # A free port is the same for all addresses.
        where = (address[0], sockets[0].getsockname()[1] if sockets else port, *address[2:])
        try:
            one = socket.socket(family, kind, protocol)
        except OSError as error:  # localhost has an address of IPv6 also where the machine does not speak it
            failure = error
            continue
        try:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind(where)
            sockets.append(one)
        except (OSError, OverflowError) as error:
            one.close()
            failure = error
            if getattr(error, "errno", None) == errno.EADDRINUSE:
                for other in sockets:
                    other.close()
                sockets = []
                break
    if not sockets:
        raise ValueError(f"--host {host} --port {port}: {failure}; name an address of this machine and a free port")
    return sockets


def loopback_names(host: str, sockets: list[socket.socket]) -> set[str] | None:
    """
    Names by which clients may call a server on the loopback address.

    Args:
        host (`str`):
            Name or address that the user gave.
        sockets (`list[socket.socket]`):
            Where it listens.

    Returns:
        `set[str]`, or `None` if it can be reached from elsewhere and is called by whatever name it has there.
    """
    addresses = [one.getsockname()[0] for one in sockets]
    if not all(ipaddress.ip_address(address).is_loopback for address in addresses):
        return None
    return {"localhost", "127.0.0.1", "::1", host.lower(), *addresses}


def server_config(app: ASGIApp, limits: ServerLimits, **settings: Any) -> uvicorn.Config:
    """
    Settings of a uvicorn server with these limits.

    Args:
        app (`Callable`):
            ASGI application.
        limits ([`ServerLimits`]):
            Limits of connections.
        settings:
            Others of uvicorn's settings.

    Returns:
        `uvicorn.Config`
    """
    return uvicorn.Config(
        app,
        http=partial(LimitedProtocol, limits),  # type: ignore[arg-type]  # called as the class would be
        ws="none",
        timeout_keep_alive=5,
        timeout_graceful_shutdown=int(limits.timeout) + 1,
        server_header=False,
        **settings,
    )


class LimitedProtocol(H11Protocol):
    """
    A connection that is cut off when its client does not send the header of a request, does not take the reply, or is
    one too many.

    Args:
        limits ([`ServerLimits`]):
            Their number, and seconds.
        settings:
            Those of uvicorn's protocol.
    """

    def __init__(self, limits: ServerLimits, **settings: Any):
        super().__init__(**settings)
        self.limits = limits
        self.header_timer: asyncio.TimerHandle | None = None
        self.write_timer: asyncio.TimerHandle | None = None
        self.opened = self.loop.time()

    @property
    def idle(self) -> bool:
        """Whether no request is being read or answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        # Writing is then paused whenever the client has not taken all, and `pause_writing` says so.
        transport.set_write_buffer_limits(high=0)
        super().connection_made(transport)
        self.header_timer = self.loop.call_later(self.limits.body_timeout, self._header_too_late)
        if len(self.connections) <= self.limits.max_connections:
            return
        idle = [each for each in self.connections if isinstance(each, LimitedProtocol) and each.idle]
        oldest = min((each for each in idle if each is not self), key=lambda each: each.opened, default=None)
        if oldest is not None:
            oldest.transport.abort()
        else:
            self._refuse(503, "Service Unavailable", f"there are {self.limits.max_connections} connections: try again")

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.idle:
            self._cancel_header_timer()
        elif self.header_timer is None:  # the begin of one more request on this connection
            self.header_timer = self.loop.call_later(self.limits.body_timeout, self._header_too_late)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.write_timer is None:
            self.write_timer = self.loop.call_later(self.limits.body_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_write_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_header_timer()
        self._cancel_write_timer()
        super().connection_lost(exc)

    def _header_too_late(self) -> None:
        self.header_timer = None
        if self.idle and not self.transport.is_closing():
            self._refuse(408, "Request Timeout", "the header did not arrive in time")

    def _refuse(self, status: int, phrase: str, detail: str) -> None:
        body = json.dumps({"detail": detail})
        head = f"HTTP/1.1 {status} {phrase}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self.transport.write(f"{head}Connection: close\r\n\r\n{body}".encode())
        self.transport.close()

    def _cancel_header_timer(self) -> None:
        if self.header_timer is not None:
            self.header_timer.cancel()
            self.header_timer = None

    def _cancel_write_timer(self) -> None:
        if self.write_timer is not None:
            self.write_timer.cancel()
            self.write_timer = None
