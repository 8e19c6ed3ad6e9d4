# SPDX-License-Identifier: Apache-2.0
"""A Core's data interface over frames: a client's few connections to one address.

Invariant: that of ``transport``. A connection on which a call has failed is not used again, so that an answer cannot be
taken for another call's; nor is one whose certificate may be what the Core refuses. The connections used last are used
first, so that few stay open. A forked child closes its descriptors of its parent's connections, says nothing on them,
and makes its own.
"""

from __future__ import annotations

import os
import ssl
import threading
import time
from typing import Final

from ...alive import Alive
from ...errors import AccessDenied, ConfigurationError, CoreUnavailable, OpenKCMError
from ...waiting import THREADS, Waiting
from ..client.endpoint import host_of
from . import format as frames
from .link import CLOSED, SILENT, Link, Stale, failure

MOST_CONNECTIONS: Final = 16
"""To one address; further calls wait for one of them. A watch stream has one of its own beside them."""

CONNECT_SECONDS: Final = 2.0
"""For how long a watch stream's connection may take to be made."""


class FrameTransport:
    """One address of a Core, over frames. Safe for threads and across ``fork``.

    Args:
        address: ``HOST:PORT``.
        credentials: reads key, chain and roots, in PEM; called for each connection, so that they can be replaced.
        server_name: what the server's certificate must be for, if not the host.
        most: connections at a time.
        waiting: how callers wait.
    """

    def __init__(
        self,
        address: str,
        credentials: frames.Fetch,
        server_name: str | None = None,
        *,
        most: int = MOST_CONNECTIONS,
        waiting: Waiting = THREADS,
    ) -> None:
        host_of(address)
        self.address = address
        self._credentials = credentials
        self._server_name = server_name
        self._most = most
        self.waiting = waiting
        self._closed = False
        self._retired = False
        self._pem: frames.PEM | None = None
        self._context: ssl.SSLContext | None = None
        self._start()
        _transports.add(self)

    def _start(self) -> None:
        self._changed = self.waiting.condition()
        self._idle: list[Link] = []
        self._links: set[Link] = set()
        self._streams: Alive[FrameStream] = Alive()
        self._count = 0
        self._waiting = 0

    def call(self, method: str, request: bytes, seconds: float) -> bytes:
        """As ``Transport.call``; made again, once, where its connection turns out to have ended before an answer."""
        return self._call(frames.NUMBERS[method], request, seconds)

    def ping(self, seconds: float) -> None:
        """Hear from the Core, as ``call`` does, with no question asked."""
        self._call(frames.NO_METHOD, b"", seconds)

    def _call(self, number: int, request: bytes, seconds: float) -> bytes:
        until = time.monotonic() + seconds
        link = self._take(until)
        try:
            frame = link.ask(number, request, until)
        except Stale:
            again = link.used and not self._closed
            self._discard(link)
            if not again:
                raise CoreUnavailable(CLOSED.format(self.address)) from None
            frame, link = self._ask_again(number, request, until)
        except BaseException:
            self._discard(link)
            raise
        if frame.type != frames.FAILURE:
            self._give(link)
            return frame.payload
        error = failure(frame)
        if isinstance(error, AccessDenied):
            self._discard(link)
        else:
            self._give(link)
        raise error

    def stream(self, method: str, request: bytes) -> FrameStream:
        """As ``Transport.stream``; connects when the first reply is asked for."""
        stream = FrameStream(self, frames.NUMBERS[method], request)
        self._streams.add(stream)
        return stream

    def retire(self) -> None:
        """As ``Transport.retire``."""
        self._retired = True
        self._drop_idle()

    def close(self) -> None:
        """As ``Transport.close``."""
        self._closed = True
        for stream in self._streams.all():
            stream.cancel()
        self._drop_idle()
        with self._changed:
            for each in self._links:
                each.end()
            self._changed.notify_all()

    # ---- connections ---------------------------------------------------------------------------------

    def _ask_again(self, number: int, request: bytes, until: float) -> tuple[frames.Frame, Link]:
        self._drop_idle()  # the Core was restarted, or somebody between it and here forgot us: they have ended alike
        link = self._take(until)
        try:
            return link.ask(number, request, until), link
        except BaseException as error:
            self._discard(link)
            if isinstance(error, Stale):
                raise CoreUnavailable(CLOSED.format(self.address)) from None
            raise

    def _take(self, until: float) -> Link:
        while True:
            link = self._pop()
            if link is None:
                link = self._new_or_wait(until)
            elif not link.is_usable():
                self._discard(link)
                continue
            if link is not None:
                return link

    def _pop(self) -> Link | None:
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _new_or_wait(self, until: float) -> Link | None:
        """A new connection; None when there may be an idle one, after a wait for it."""
        with self._changed:
            if self._closed:
                raise CoreUnavailable(CLOSED.format(self.address), retryable=False)
            if self._count >= self._most:
                self._waiting += 1
                try:
                    # Looked at once more: who gives one back looks at ``_waiting`` after that.
                    if not self._idle and not self._changed.wait(max(until - time.monotonic(), 0)):
                        raise CoreUnavailable(SILENT.format(self.address))
                finally:
                    self._waiting -= 1
                return None
            self._count += 1
        link = Link(self.address, self.waiting)
        try:
            self._open(link, until)
        except BaseException:
            self._discard(link)
            raise
        return link

    def _open(self, link: Link, until: float) -> None:
        with self._changed:
            if self._closed:
                raise CoreUnavailable(CLOSED.format(self.address), retryable=False)
            self._links.add(link)
        link.open(self._tls(), self._server_name, until)

    def _tls(self) -> ssl.SSLContext:
        try:
            pem = self._credentials()
        except OSError as error:
            raise ConfigurationError(f"the certificate cannot be read: {error.strerror}") from None
        context = self._context
        if context is None or pem != self._pem:
            self._context = context = frames.client_context(pem)
            self._pem = pem
        return context

    def _give(self, link: Link) -> None:
        self._idle.append(link)
        if self._closed or self._retired:
            self._drop_idle()
        elif self._waiting:
            with self._changed:
                self._changed.notify()

    def _discard(self, link: Link) -> None:
        with self._changed:
            self._links.discard(link)
            link.close()  # within, so that ``close`` cannot end a descriptor that is another's by then
            self._count -= 1
            self._changed.notify()

    def _drop_idle(self) -> None:
        while (link := self._pop()) is not None:
            self._discard(link)

    def _forget(self, link: Link) -> None:
        """A stream's connection has ended."""
        with self._changed:
            self._links.discard(link)
            link.close()

    def _after_fork(self) -> None:
        _inherited.extend(each.abandon() for each in self._links)
        self._start()


class FrameStream:
    """As ``transport.Stream``."""

    def __init__(self, transport: FrameTransport, method: int, request: bytes) -> None:
        self._transport = transport
        self._method = method
        self._request = request
        self._lock = threading.Lock()
        self._link: Link | None = None
        self._reading = False
        self._cancelled = False

    def __iter__(self) -> FrameStream:
        return self

    def __next__(self) -> bytes:
        with self._lock:
            if self._cancelled:
                raise self._closed()
            self._reading = True
            opened, self._link = (
                self._link is not None,
                self._link or Link(self._transport.address, self._transport.waiting),
            )
        done = True
        try:
            if not opened:
                self._open(self._link)
            payload = self._next(self._link)
            done = False
            return payload
        finally:
            with self._lock:
                self._reading = False
                self._cancelled = done = done or self._cancelled
                if done:
                    self._transport._forget(self._link)

    def cancel(self) -> None:
        """As ``Stream.cancel``."""
        with self._lock:
            self._cancelled = True
            if self._link is not None:
                if self._reading:
                    self._link.end()
                else:
                    self._transport._forget(self._link)

    def _open(self, link: Link) -> None:
        until = time.monotonic() + CONNECT_SECONDS
        self._transport._open(link, until)
        try:
            link.follow(self._method, self._request, until)
        except (OSError, ValueError):
            raise self._closed() from None

    def _next(self, link: Link) -> bytes:
        try:
            frame = link.next()
        except OpenKCMError:
            raise
        except (OSError, ValueError):
            frame = None
        if frame is None:
            raise self._closed()
        if frame.type == frames.FAILURE:
            raise failure(frame)
        if frame.type == frames.END:
            raise StopIteration
        return frame.payload

    def _closed(self) -> CoreUnavailable:
        return CoreUnavailable(CLOSED.format(self._transport.address))


_transports: Final[Alive[FrameTransport]] = Alive()
_inherited: Final[list[object]] = []


def _after_fork_in_child() -> None:
    for each in _transports.all():
        each._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
