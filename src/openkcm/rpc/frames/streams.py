# SPDX-License-Identifier: Apache-2.0
"""The watch streams of the frame server, all of them on one thread.

Invariant: no stream waits for another's reader. What a reader does not take at once stays with its stream, one reply of
it; further events stay with its subscriber, which bounds them; and a reader that takes nothing for ``STALL_SECONDS`` is
dropped.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from ...errors import AccessDenied, StoreUnavailable
from .. import keys_pb2 as pb
from .. import wire
from ..peer import Peer
from ..server.streams import HEARTBEAT_SECONDS, Subscriber
from . import format as frames
from .format import Frame

logger = logging.getLogger("openkcm.rpc")

STALL_SECONDS: Final = 5.0


class StreamSource(Protocol):
    """What gives the streams: ``streams.Streams``."""

    def open(self, peer: Peer, request: pb.WatchRequest, woken: Callable[[], None]) -> Subscriber:
        """Begin a stream."""

    def drop(self, subscriber: Subscriber) -> None:
        """A stream has ended."""


class Carrier(Protocol):
    """What a stream goes over: the server's connection."""

    sock: ssl.SSLSocket

    def end(self) -> None:
        """Have it end."""


class Stream:
    """One stream. ``lock`` is held by whoever uses its socket; ``out`` is what its reader did not take yet."""

    __slots__ = ("call", "carrier", "ended", "lock", "out", "peer", "since", "subscriber")

    def __init__(self, carrier: Carrier, peer: Peer, call: int) -> None:
        self.carrier = carrier
        self.peer = peer
        self.call = call
        self.lock = threading.Lock()
        self.out: list[frames.Part] = []
        self.since = 0.0
        self.ended = False
        self.subscriber: Subscriber | None = None


class Pump:
    """Sends what streams have to tell, at the latest a heartbeat after the last.

    Args:
        check_peer: raises AccessDenied if a peer's certificate is not good any more.
        drop: is told of each stream that has ended.
    """

    def __init__(self, check_peer: Callable[[Peer], None], drop: Callable[[Subscriber], None]) -> None:
        self._check_peer = check_peer
        self._drop = drop
        self._wake = threading.Condition(threading.Lock())
        self._woken: dict[Stream, None] = {}
        # All wait equally long, so that who was appended first is due first.
        self._beats: deque[tuple[float, Stream]] = deque()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="openkcm-streams", daemon=True)

    def start(self) -> None:
        """Begin to tell."""
        self._thread.start()

    def begin(self, carrier: Carrier, peer: Peer, frame: Frame, source: StreamSource) -> Stream:
        """Open a stream; its connection must be given to ``add`` to have it told.

        Raises:
            OpenKCMError: it is refused.
        """
        stream = Stream(carrier, peer, frame.call)
        request = wire.parse(pb.WatchRequest.FromString, frame.payload)
        stream.subscriber = source.open(peer, request, lambda: self._rouse(stream))
        return stream

    def add(self, stream: Stream) -> None:
        """Have a stream told from now on."""
        with self._wake:
            self._woken[stream] = None
            self._beats.append((time.monotonic() + HEARTBEAT_SECONDS, stream))
            self._wake.notify()

    def end(self, stream: Stream) -> None:
        """Forget a stream; when this returns, nobody uses its socket."""
        with stream.lock:
            if stream.ended:
                return
            stream.ended = True
        if stream.subscriber is not None:
            self._drop(stream.subscriber)

    def stop(self, seconds: float) -> None:
        """Stop telling; streams whose subscribers were closed have ``seconds`` for their end."""
        until = time.monotonic() + seconds
        while any(not each.ended for _, each in list(self._beats)) and time.monotonic() < until:
            time.sleep(0.005)
        with self._wake:
            self._stopped = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout=5)

    # ---- its thread ----------------------------------------------------------------------------------

    def _rouse(self, stream: Stream) -> None:
        with self._wake:
            self._woken[stream] = None
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                stream = self._next()
                while stream is None:
                    if self._stopped:
                        return
                    self._wake.wait(self._pause())
                    stream = self._next()
            try:
                self._tell(stream)
            except (OSError, ValueError):
                stream.carrier.end()
            except Exception:
                logger.exception("a watch stream failed")
                stream.carrier.end()

    def _pause(self) -> float | None:
        return max(self._beats[0][0] - time.monotonic(), 0.0) if self._beats else None

    def _next(self) -> Stream | None:
        """The stream to see to now."""
        if self._woken:
            stream = next(iter(self._woken))
            del self._woken[stream]
            return stream
        now = time.monotonic()
        while self._beats and self._beats[0][0] <= now:
            _, stream = self._beats.popleft()
            if not stream.ended:
                self._beats.append((now + HEARTBEAT_SECONDS, stream))
                return stream
        return None

    def _tell(self, stream: Stream) -> None:
        with stream.lock:
            if stream.ended or not self._flush(stream) or stream.subscriber is None:
                return
            kind, payload = frames.END, b""
            try:
                self._check_peer(stream.peer)
                reply = stream.subscriber.take(0)
                if reply is not None:
                    kind, payload = frames.ITEM, reply.SerializeToString()
            except (AccessDenied, StoreUnavailable) as error:
                kind, payload = frames.FAILURE, wire.failure_of(error).SerializeToString()
            stream.out, stream.since = frames.reply_parts(kind, stream.call, payload), time.monotonic()
            self._flush(stream)
            if kind != frames.ITEM:
                socket.socket.shutdown(stream.carrier.sock, socket.SHUT_RDWR)

    def _flush(self, stream: Stream) -> bool:
        """Send what is left of the last reply; False while its reader does not take it."""
        try:
            frames.send(stream.carrier.sock, stream.out)
        except ssl.SSLWantWriteError:
            if time.monotonic() - stream.since > STALL_SECONDS:
                stream.carrier.end()
            return False
        return True
