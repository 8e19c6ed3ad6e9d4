# SPDX-License-Identifier: Apache-2.0
"""A frame server on loopback with handlers that tests steer, its clients, and connections of a peer that misbehaves."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from openkcm.pki import DevelopmentCA, Issued
from openkcm.rpc import keys_pb2 as pb
from openkcm.rpc.frames import format as frames
from openkcm.rpc.frames.client import FrameTransport
from openkcm.rpc.frames.gate import Bounds
from openkcm.rpc.frames.server import FrameServer
from openkcm.rpc.server.denials import Denials

SECONDS = 10.0
"""How long a test waits for what must come."""


def eventually(holds: Callable[[], object], seconds: float = SECONDS) -> None:
    """Wait until something holds; fail if it does not in time."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it did not come true in time"
        time.sleep(0.005)


def frame(kind: int, *, method: int = 0, call: int = 0, millis: int = 0, payload: bytes = b"") -> bytes:
    """A frame as docs/formats.md lays it out, without the code under test."""
    return struct.pack(">IBBII", len(payload), kind, method, call, millis) + payload


class Told:
    """What a stream's subscriber is to the server: gives what tests put in."""

    def __init__(self, woken: Callable[[], None]) -> None:
        self._woken = woken
        self._lock = threading.Lock()
        self._waiting: list[str] = []
        self.taken = 0
        self.closed = False

    def put(self, tenant: str) -> None:
        with self._lock:
            self._waiting.append(tenant)
        self._woken()

    def take(self, seconds: float) -> pb.WatchReply | None:
        assert seconds == 0
        with self._lock:
            self.taken += 1
            events = [pb.ChangeEvent(change="dark", tenant=each) for each in self._waiting]
            self._waiting.clear()
            return None if self.closed else pb.WatchReply(position=self.taken, events=events)

    def close(self) -> None:
        self.closed = True
        self._woken()


class Steered:
    """Handlers and streams; ``act`` answers calls, ``check`` is asked about each peer."""

    def __init__(self) -> None:
        self.act: Callable[[str, bytes], bytes] = lambda name, data: data
        self.check: Callable[[Any], None] = lambda peer: None
        self.open_streams: list[Told] = []
        self.dropped: list[Told] = []
        self.errors: list[tuple[str, str]] = []

    def check_peer(self, peer: Any) -> None:
        self.check(peer)

    def call(self, name: str, peer: Any, data: bytes) -> bytes:
        self.check(peer)
        return self.act(name, data)

    def refused(self, error: Exception, name: str, peer: Any) -> None:
        self.errors.append((name, type(error).__name__))

    def open(self, peer: Any, request: pb.WatchRequest, woken: Callable[[], None]) -> Told:
        told = Told(woken)
        self.open_streams.append(told)
        return told

    def drop(self, told: Told) -> None:
        self.dropped.append(told)

    def close(self) -> None:
        for each in self.open_streams:
            each.close()


class Place:
    """A CA, a server's and a client's certificate."""

    def __init__(self, folder: Path) -> None:
        self.ca = DevelopmentCA.create(folder / "pki")
        self.server = self.ca.issue_server("core", dns=["localhost"], ips=["127.0.0.1"])
        self.client = self.ca.issue_client("gateway")
        self.handlers = Steered()
        self.lines: list[str] = []
        self.denials = Denials(self.lines.append)

    def pem(self, issued: Issued) -> frames.PEM:
        """Key, chain and roots."""
        return issued.key.read_bytes(), issued.certificate.read_bytes(), self.ca.certificate_path.read_bytes()

    @contextlib.contextmanager
    def serve(self, drain: float = 5.0, **bounds: Any) -> Iterator[FrameServer]:
        """A server until the end of the block."""
        server = FrameServer(
            "127.0.0.1:0",
            lambda: self.pem(self.ca.find("core")),
            self.handlers,
            self.handlers,  # type: ignore[arg-type]
            self.denials,
            Bounds(**bounds),
        )
        server.start()
        try:
            yield server
        finally:
            self.handlers.close()
            server.stop(drain)
            self.denials.close()

    def connect(self, port: int, **options: Any) -> FrameTransport:
        """A client."""
        return FrameTransport(f"127.0.0.1:{port}", lambda: self.pem(self.client), **options)

    @contextlib.contextmanager
    def raw(self, port: int, context: ssl.SSLContext | None = None) -> Iterator[ssl.SSLSocket]:
        """A connection that says what a test wants, past the greeting."""
        context = context or frames.client_context(self.pem(self.client))
        with (
            socket.create_connection(("127.0.0.1", port), SECONDS) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as sock,
        ):
            assert read_exactly(sock, 14) == frame(frames.HELLO)
            yield sock

    def noted(self, text: str) -> bool:
        """Whether a refusal was recorded."""
        self.denials.flush()
        return any(text in line for line in self.lines)


def read_exactly(sock: ssl.SSLSocket, count: int) -> bytes:
    """So many bytes, or those up to the connection's end."""
    found = b""
    while len(found) < count and (part := sock.recv(count - len(found))):
        found += part
    return found


def read_frame(sock: ssl.SSLSocket) -> tuple[int, int, bytes]:
    """A frame's type, call and payload."""
    length, kind, _, call, _ = struct.unpack(">IBBII", read_exactly(sock, 14))
    return kind, call, read_exactly(sock, length)


def is_ended(sock: ssl.SSLSocket) -> bool:
    """Read to the connection's end; whether it came."""
    try:
        while sock.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True
