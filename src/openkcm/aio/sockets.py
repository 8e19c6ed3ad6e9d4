# SPDX-License-Identifier: Apache-2.0
"""Sockets that a greenlet waits for, and the event loop with it.

Invariant: no socket here ever has its thread wait. One greenlet at a time uses one; it is closed by that one only.
TLS 1.3 has no renegotiation, so that reading never waits for room to write, nor writing for something to read.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
import time
from typing import Any, Final

from .green import Loop, block, left_until

_UNDERWAY: Final = frozenset({0, errno.EINPROGRESS})


class GreenSocket(ssl.SSLSocket):
    """TLS over a socket that does not wait; made by ``secure``, which sets ``loop``."""

    loop: Loop
    _until: float | None = None
    _asked = False

    def settimeout(self, value: float | None) -> None:
        """From now on, until when what is done takes its time: so many seconds from now, all in all."""
        self._until = None if value is None else time.monotonic() + value
        super().settimeout(0.0)

    def do_handshake(self, block: bool = False) -> None:
        """As ``SSLSocket.do_handshake``."""
        while True:
            try:
                self._sslobj.do_handshake()  # type: ignore[attr-defined]  # as the ssl module's own does
                return
            except ssl.SSLWantReadError:
                until_ready(self.loop, self, self._until)
            except ssl.SSLWantWriteError:
                until_ready(self.loop, self, self._until, write=True)

    def read(self, len: int = 1024, buffer: Any = None) -> Any:  # noqa: A002  # the ssl module's own name for it
        """As ``SSLSocket.read``; the first after something was sent gives way to others, whatever there is to read.

        On a busy machine the answer may be there at once: a thousand tasks would then make their calls one after the
        other, with nobody else having a turn, and none would join another's.
        """
        if self._asked:
            self._asked = False
            until_ready(self.loop, self, self._until)
        while True:
            try:
                return super().read(len, buffer)
            except ssl.SSLWantReadError:
                until_ready(self.loop, self, self._until)

    def send(self, data: Any, flags: int = 0) -> int:
        """As ``SSLSocket.send``."""
        self._asked = True
        while True:
            try:
                return super().send(data, flags)
            except ssl.SSLWantWriteError:
                until_ready(self.loop, self, self._until, write=True)


def until_ready(loop: Loop, sock: socket.socket, until: float | None, *, write: bool = False) -> None:
    """Wait until there is something to read, or room to write.

    Raises:
        TimeoutError: the time is up.
    """
    running, future, fd = loop.get(), loop.future(), sock.fileno()
    if write:
        running.add_writer(fd, _ready, future)
    else:
        running.add_reader(fd, _ready, future)
    try:
        if not loop.wait(future, left_until(until)):
            raise TimeoutError
    finally:
        if write:
            running.remove_writer(fd)
        else:
            running.remove_reader(fd)


def _ready(future: asyncio.Future[bool]) -> None:
    if not future.done():
        future.set_result(True)


def connect(loop: Loop, host: str, port: int, seconds: float) -> socket.socket:
    """As ``Waiting.connect``."""
    until = time.monotonic() + seconds
    last: OSError | None = None
    for family, kind, protocol, _, address in _resolve(loop, host, port, seconds):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            _connect(loop, sock, address, until)
            return sock
        except OSError as error:
            sock.close()
            last = error
        except BaseException:
            sock.close()
            raise
    raise last or OSError("the name has no address")


def _connect(loop: Loop, sock: socket.socket, address: Any, until: float) -> None:
    code = sock.connect_ex(address)
    if code in _UNDERWAY:
        until_ready(loop, sock, until, write=True)
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))


def _resolve(loop: Loop, host: str, port: int, seconds: float) -> list[Any]:
    """Its addresses; only a name is looked up, in a thread, since nothing else can."""
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        looked_up = loop.get().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return block(asyncio.wait_for(looked_up, seconds))


def secure(
    loop: Loop, context: ssl.SSLContext, plain: socket.socket, server_name: str, seconds: float
) -> ssl.SSLSocket:
    """As ``Waiting.secure``."""
    context.sslsocket_class = GreenSocket
    sock = context.wrap_socket(plain, server_hostname=server_name, do_handshake_on_connect=False)
    assert isinstance(sock, GreenSocket)
    try:
        sock.loop = loop
        sock.settimeout(seconds)
        sock.do_handshake()
    except BaseException:
        sock.close()
        raise
    return sock
