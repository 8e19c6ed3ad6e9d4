# SPDX-License-Identifier: Apache-2.0
"""The frame server: turns frames into the calls of ``handlers`` and ``streams``.

Invariant: one thread at a time has a connection, because the kernel hands each readiness to one thread and is armed
again when that thread is done (epoll, one shot). No thread waits for a peer longer than ``LINGER_SECONDS``, and while
some do, others are free; so neither idle nor slow nor hostile peers, however many, keep a request of another waiting.
Connections, those of one certificate, handshakes, requests under way, requests waiting and bytes held for them all have
bounds; what is above them is turned away and not kept.

Why threads and not one event loop: the work (opening keys) runs in native code without the interpreter's lock. Why
each lingers on its connection for a moment: requests follow each other, and a thread that waits in ``read`` has the
next one sooner than one that must be found through epoll.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import select
import socket
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Protocol

from ...errors import AccessDenied, CoreUnavailable, FormatError
from .. import wire
from ..peer import Peer, Peers, Shares
from ..server.denials import Denials
from ..server.streams import OPENING_SECONDS, OPENINGS
from . import format as frames
from .certificate import OwnCertificate
from .connection import Connection, Refused, listen
from .format import Frame
from .gate import Bounds, Gate
from .streams import Pump, StreamSource

logger = logging.getLogger("openkcm.rpc")

LINGER_SECONDS: Final = 0.02
KEEPING_SECONDS: Final = 0.1
"""How often deadlines are looked at."""
RELOAD_SECONDS: Final = 1.0
"""How often the certificate's files are."""
RECHECK_SECONDS: Final = 30.0
"""How often the certificates of idle peers are; whoever asks is looked at each time."""
TURN: Final = 64
"""Frames after which a connection that always has more makes way for others."""
SPARE_THREADS: Final = 2
"""Threads that neither carry out a request nor linger, so that somebody always reads."""

NOT_ACCEPTED: Final = "a connection with a certificate that is not accepted"

_READ: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLONESHOT
_WRITE: Final = select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLONESHOT
_GONE: Final = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR


class Handlers(Protocol):
    """What carries out unary calls."""

    def check_peer(self, peer: Peer) -> None:
        """Raise AccessDenied if the peer's certificate is not good any more."""

    def call(self, name: str, peer: Peer, data: bytes) -> bytes:
        """A request's bytes in, a reply's bytes out."""

    def refused(self, error: Exception, name: str, peer: Peer | None) -> None:
        """Note what became of a call that is not one of ``call``."""


class FrameServer:
    """Serves the data interface over frames.

    Args:
        address: ``HOST:PORT``; port 0 takes a free one, see ``port``.
        fetch: reads key, chain and clients' authorities; called again so that they can be replaced.
        handlers: carry out the calls.
        streams: gives the watch streams.
        denials: where refusals are recorded.
        bounds: what is taken.

    Raises:
        CoreUnavailable: the address is taken, or not this machine's.
        ConfigurationError: the key or a certificate cannot be used.
    """

    def __init__(
        self,
        address: str,
        fetch: frames.Fetch,
        handlers: Handlers,
        streams: StreamSource,
        denials: Denials,
        bounds: Bounds | None = None,
    ) -> None:
        self._bounds = bounds = bounds or Bounds()
        self._certificate = OwnCertificate(fetch)
        self._handlers = handlers
        self._streams = streams
        self._denials = denials
        self._peers = Peers()
        self._gate: Gate[Connection] = Gate(bounds.threads, bounds.waiting, bounds.waiting_bytes)
        # Watch streams are begun by threads more than the others, since the store may keep each of them waiting.
        self._openings: Gate[Connection] = Gate(OPENINGS, bounds.connections, bounds.waiting_bytes)
        self._lock = threading.Lock()
        self._connections: dict[int, Connection] = {}
        self._shaking: OrderedDict[int, Connection] = OrderedDict()
        self._shares = Shares(bounds.peer_connections)
        self._held = 0
        self._lingering = threading.Semaphore(max(bounds.threads // 2, 1))
        self._draining = False
        self._paused = False
        self._stop = threading.Event()
        self._pump = Pump(handlers.check_peer, streams.drop)
        self._listener = listen(address)
        self._listening = self._listener.fileno()
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._threads: list[threading.Thread] = []

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return int(self._listener.getsockname()[1])

    @property
    def connections(self) -> int:
        """How many connections there are."""
        return len(self._connections)

    def start(self) -> None:
        """Listen."""
        self._epoll.register(self._wake, select.EPOLLIN)
        self._epoll.register(self._listening, select.EPOLLIN | select.EPOLLONESHOT)
        count = self._bounds.threads + max(self._bounds.threads // 2, 1) + SPARE_THREADS + OPENINGS
        self._pump.start()
        self._threads = [
            threading.Thread(target=self._keep, name="openkcm-keeper", daemon=True),
            threading.Thread(target=self._recheck, name="openkcm-recheck", daemon=True),
        ]
        self._threads += [
            threading.Thread(target=self._work, name=f"openkcm-frames-{at}", daemon=True)
            for at in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self, drain: float = 0.0) -> None:
        """Take nothing new, give what is under way ``drain`` seconds, then close everything. Idempotent."""
        if self._stop.is_set():
            return
        self._draining = True
        with self._lock:
            socket.socket.shutdown(self._listener, socket.SHUT_RDWR)
            idle = [each for each in self._connections.values() if each.idle]
            for each in idle:
                each.end()
        until = time.monotonic() + drain
        while self._gate.is_busy() and time.monotonic() < until:
            time.sleep(0.005)  # polled, so that no call pays for the end of the server
        self._pump.stop(max(until - time.monotonic(), 0.0))
        self._stop.set()
        os.eventfd_write(self._wake, 1)
        for thread in self._threads:
            thread.join(timeout=10)
        for connection in list(self._connections.values()):
            self._close(connection)
        self._epoll.close()
        self._listener.close()
        os.close(self._wake)

    # ---- threads -------------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._stop.is_set():
            for fd, mask in self._epoll.poll(-1, 1):
                if fd == self._listening:
                    self._accept()
                    continue
                connection = self._connections.get(fd)
                while connection is not None:
                    connection, mask = self._guard(connection, self._advance, mask), 0

    def _keep(self) -> None:
        reload_at = time.monotonic() + RELOAD_SECONDS
        while not self._stop.wait(KEEPING_SECONDS):
            now = time.monotonic()
            with self._lock:
                for each in self._connections.values():
                    if each.deadline is not None and each.deadline < now:
                        each.slow = True
                        each.end()
                if self._paused and not self._draining:
                    self._paused = False
                    self._epoll.modify(self._listening, select.EPOLLIN | select.EPOLLONESHOT)
            if now >= reload_at:
                reload_at = now + RELOAD_SECONDS
                self._certificate.refresh()

    def _recheck(self) -> None:
        """Every so often, end the idle connections of who is not accepted any more; others hear so when they ask."""
        while not self._stop.wait(RECHECK_SECONDS):
            with self._lock:
                idle = [(each, each.peer) for each in self._connections.values() if each.peer and each.idle]
            for connection, peer in idle:
                if not self._is_accepted(peer):
                    self._denials.note(peer.identity, NOT_ACCEPTED, connection.address, accepted=False)
                    with self._lock:
                        connection.end()

    def _is_accepted(self, peer: Peer) -> bool:
        try:
            self._handlers.check_peer(peer)
        except AccessDenied:
            return False
        except Exception as error:
            logger.debug("whether %s is accepted is not known now: %s", peer.identity, error)
        return True

    def _accept(self) -> None:
        for _ in range(64):
            try:
                sock, place = self._listener.accept()
            except BlockingIOError:
                break
            except OSError:
                self._paused = True  # out of descriptors, or the server ends; the keeper listens again
                return
            try:
                self._admit_socket(sock, f"{place[0]}:{place[1]}")
            except Exception:
                sock.close()
                logger.exception("a connection could not be taken")
        if not self._draining:
            self._epoll.modify(self._listening, select.EPOLLIN | select.EPOLLONESHOT)

    def _admit_socket(self, sock: socket.socket, address: str) -> None:
        if len(self._connections) >= self._bounds.connections or self._draining:
            sock.close()
            if not self._draining:
                self._denials.note("", "a connection above the limit", address)
            return
        sock.setblocking(False)
        try:
            frames.set_options(sock)
            secured = self._certificate.context.wrap_socket(
                sock, server_side=True, do_handshake_on_connect=False
            )
        except OSError:
            sock.close()
            return
        connection = Connection(secured, address, time.monotonic() + self._bounds.handshake_seconds)
        fd = secured.fileno()
        with self._lock:
            self._connections[fd] = self._shaking[fd] = connection
            if len(self._shaking) > self._bounds.handshakes:
                # A good peer is done in a moment: what has been at it the longest makes room.
                oldest = next(iter(self._shaking.values()))
                self._shaking.pop(oldest.sock.fileno(), None)
                oldest.slow = True
                oldest.end()
        self._epoll.register(fd, _READ)

    # ---- a connection's turn -------------------------------------------------------------------------

    def _guard(
        self, connection: Connection, act: Callable[[Connection, int], Connection | None], mask: int
    ) -> Connection | None:
        """Act on a connection; then park it, or close it."""
        try:
            return act(connection, mask)
        except ssl.SSLWantReadError:
            self._park(connection, _READ)
        except ssl.SSLWantWriteError:
            self._park(connection, _WRITE)
        except FormatError as error:
            connection.out = _told(error)
            self._say_last(connection)
        except Refused as refused:
            self._denials.note(refused.identity, str(refused), connection.address, accepted=refused.accepted)
            self._say_last(connection)
        except (OSError, ValueError) as error:
            if connection.peer is None:
                self._note_refusal(connection, error)
            self._close(connection)
        except Exception:
            logger.exception("a connection failed")
            self._close(connection)
        return None

    def _advance(self, connection: Connection, mask: int) -> Connection | None:
        """Go on with a connection for as long as it does not keep us waiting.

        Returns another one, whose request has waited, where that is due now.
        """
        frame, connection.frame = connection.frame, None
        connection.idle = False
        if connection.peer is None:
            self._shake_hands(connection)
        elif frame is None and (mask & _GONE or connection.stream is not None):
            # Who has hung up gets no answer, and nobody says anything on a stream.
            self._close(connection)
            return None
        lingers = self._lingering.acquire(blocking=False)
        try:
            connection.sock.settimeout(LINGER_SECONDS if lingers else 0)
            return self._converse(connection, frame)
        except TimeoutError:
            raise ssl.SSLWantWriteError if connection.out else ssl.SSLWantReadError from None
        finally:
            if lingers:
                self._lingering.release()

    def _converse(self, connection: Connection, frame: Frame | None) -> Connection | None:
        for taken in itertools.count():
            if connection.out:
                self._flush(connection)
            if frame is None:
                if taken >= TURN and not connection.sock.pending():
                    raise ssl.SSLWantReadError
                frame = connection.reader.read(connection.sock, time.monotonic() + LINGER_SECONDS)
                connection.deadline = None
                if frame is None or self._draining:
                    self._close(connection)
                    return None
                if not self._let_through(connection, frame):
                    if not connection.out:
                        return None  # it waits for its turn
                    frame = None
                    continue
            gate = self._gate_of(frame)
            streams = self._carry_out(connection, frame)
            frame = None
            following = gate.done()
            if following is not None or streams:
                if not streams:
                    self._guard(connection, self._settle, 0)
                if following is None:
                    return None
                other, other_frame = following
                other.frame = other_frame
                return other
        return None

    def _gate_of(self, frame: Frame) -> Gate[Connection]:
        return self._openings if frame.method == frames.WATCH else self._gate

    def _settle(self, connection: Connection, _: int) -> None:
        """Send what is to be sent, and let go of the connection."""
        connection.sock.settimeout(0)
        self._flush(connection)
        raise ssl.SSLWantReadError

    def _let_through(self, connection: Connection, frame: Frame) -> bool:
        """Whether a frame is a request that is to be carried out now, by us."""
        if frame.type == frames.PING:
            connection.out = frames.reply_parts(frames.PONG, frame.call, b"")
            return False
        if frame.type != frames.REQUEST:
            raise FormatError("only requests go to a Core")
        connection.until = time.monotonic() + (frame.millis / 1000 or OPENING_SECONDS)
        now = self._gate_of(frame).enter(connection, frame)
        if now is None:
            full = CoreUnavailable("this Core has more calls than it takes; try another")
            connection.out = _told(full, frame.call)
        return bool(now)

    def _carry_out(self, connection: Connection, frame: Frame) -> bool:
        """Do what a request asks for; whether the connection is a stream's now, and out of our hands."""
        peer = connection.peer
        assert peer is not None
        try:
            if time.monotonic() > connection.until:
                raise CoreUnavailable("this Core did not get to it in time")
            if frame.method == frames.WATCH:
                return self._begin_stream(connection, peer, frame)
            reply = self._handlers.call(frames.METHODS[frame.method - 1], peer, frame.payload)
            connection.out = frames.reply_parts(frames.REPLY, frame.call, reply)
        except Exception as error:
            connection.out = _told(error, frame.call)
        return False

    def _flush(self, connection: Connection) -> None:
        frames.send(connection.sock, connection.out)
        connection.deadline = None

    # ---- a connection's beginning and end ------------------------------------------------------------

    def _shake_hands(self, connection: Connection) -> None:
        sock = connection.sock
        sock.do_handshake()
        if sock.selected_alpn_protocol() != frames.ALPN:
            raise Refused("a connection with another protocol")
        identity = ""
        try:
            peer = self._peers.read(sock.getpeercert(binary_form=True) or b"", connection.address)
            identity = peer.identity
            self._handlers.check_peer(peer)
        except AccessDenied as error:
            connection.out = _told(error)
            raise Refused(NOT_ACCEPTED, identity) from None
        if not self._shares.take(peer):
            connection.out = _told(CoreUnavailable("this Core has no more connections for one certificate"))
            raise Refused("a connection above the limit for one certificate", identity, accepted=True)
        connection.peer = peer
        with self._lock:
            self._shaking.pop(sock.fileno(), None)
        connection.out = frames.reply_parts(frames.HELLO, 0, b"")
        connection.deadline = None

    def _begin_stream(self, connection: Connection, peer: Peer, frame: Frame) -> bool:
        connection.sock.settimeout(0)
        try:
            self._handlers.check_peer(peer)
            connection.stream = self._pump.begin(connection, peer, frame, self._streams)
        except Exception as error:
            self._handlers.refused(error, "Watch", peer)
            raise
        self._epoll.modify(connection.sock.fileno(), _READ)
        self._pump.add(connection.stream)
        return True

    def _park(self, connection: Connection, events: int) -> None:
        """Have the next thread go on with a connection when it can be read or written."""
        held = connection.reader.held + sum(map(len, connection.out))
        if connection.peer is None:
            pass  # the handshake's deadline stands
        elif held:
            if connection.deadline is None:
                connection.deadline = time.monotonic() + self._bounds.frame_seconds
        elif self._draining:
            self._close(connection)
            return
        else:
            connection.deadline, connection.idle = None, True
        if held != connection.counted and not self._count(connection, held):
            self._close(connection)
            return
        self._epoll.modify(connection.sock.fileno(), events)

    def _count(self, connection: Connection, held: int) -> bool:
        """Count what is held of frames that are in pieces, or not taken yet; False where it is too much."""
        with self._lock:
            self._held += held - connection.counted
            connection.counted = held
            return self._held <= self._bounds.held_bytes

    def _say_last(self, connection: Connection) -> None:
        """Send what is to be sent if that can be done at once, and close."""
        with contextlib.suppress(OSError, ValueError):
            connection.sock.settimeout(0)
            self._flush(connection)
        self._close(connection)

    def _close(self, connection: Connection) -> None:
        if connection.stream is not None:
            self._pump.end(connection.stream)
        connection.reader.close()
        if connection.counted:
            self._count(connection, 0)
        fd = connection.sock.fileno()
        with self._lock:  # the keeper must not end another connection that got the same descriptor
            if self._connections.pop(fd, None) is not None:
                self._shaking.pop(fd, None)
                if connection.peer is not None:
                    self._shares.give_back(connection.peer)
            connection.sock.close()

    def _note_refusal(self, connection: Connection, error: BaseException) -> None:
        reason = "a handshake too slow" if connection.slow else frames.refusal_of(error)
        if reason is not None:
            self._denials.note("", f"a connection with {reason}", connection.address)
        else:
            logger.debug("%s ended its handshake", connection.address)


def _told(error: BaseException, call: int = 0) -> list[frames.Part]:
    """What a peer is told of an error; of no call, it is the last that it hears."""
    failure = wire.failure_of(error)
    if isinstance(error, CoreUnavailable):
        failure.message = str(error)  # our own words, with no secret of this machine's in them
    return frames.reply_parts(frames.FAILURE, call, failure.SerializeToString())
