# SPDX-License-Identifier: Apache-2.0
"""What one peer of the frame server, or one kind of request, can keep from the others."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from pathlib import Path
from typing import Any

import pytest

from frame_support import SECONDS, Place, Told, eventually, frame, is_ended, read_frame
from openkcm.errors import AccessDenied, StoreUnavailable
from openkcm.rpc import keys_pb2 as pb
from openkcm.rpc import wire
from openkcm.rpc.frames import format as frames
from openkcm.rpc.frames import server as frame_server
from openkcm.rpc.server.streams import OPENINGS


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def context_of(place: Place, name: str) -> ssl.SSLContext:
    """What another client connects with."""
    return frames.client_context(place.pem(place.ca.issue_client(name)))


# ---- connections of one certificate ------------------------------------------------------------------


def test_one_certificate_has_not_all_connections(place: Place) -> None:
    with place.serve(connections=10, peer_connections=3) as server, contextlib.ExitStack() as stack:
        mine = [stack.enter_context(place.raw(server.port)) for _ in range(3)]
        context = frames.client_context(place.pem(place.client))
        with (
            socket.create_connection(("127.0.0.1", server.port), SECONDS) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as sock,
        ):
            kind, _, payload = read_frame(sock)
            assert kind == frames.FAILURE
            failure = pb.Failure.FromString(payload)
            assert (failure.code, failure.retryable) == ("core_unavailable", True)
            assert "one certificate" in failure.message
            assert is_ended(sock)
        eventually(
            lambda: place.noted(
                "a connection above the limit for one certificate refused to cn:gateway at 127."
            )
        )
        others = context_of(place, "other")
        for _ in range(3):
            stack.enter_context(place.raw(server.port, others))
        for sock in mine:  # those that it has go on
            sock.sendall(frame(frames.PING, call=1))
            assert read_frame(sock) == (frames.PONG, 1, b"")
        assert server.connections == 6
        mine[0].close()
        eventually(lambda: server.connections == 5)
        stack.enter_context(place.raw(server.port))
        stack.close()
        eventually(lambda: server.connections == 0)
        assert server._shares._taken == {}


def test_idle_connections_of_who_is_not_accepted_any_more_are_ended(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame_server, "RECHECK_SECONDS", 0.02)
    out: set[str] = set()
    asked: list[str] = []

    def check(peer: Any) -> None:
        asked.append(peer.identity)
        if "store" in out:
            raise StoreUnavailable("not known now")
        if peer.identity in out:
            raise AccessDenied(wire.REFUSED)

    place.handlers.check = check
    other = context_of(place, "other")
    with place.serve() as server, place.raw(server.port) as idle, place.raw(server.port, other) as good:
        eventually(lambda: server.connections == 2)
        out.add("store")
        before = len(asked)
        eventually(lambda: len(asked) > before + 10)
        assert server.connections == 2  # an outage is no refusal
        out.clear()
        out.add("cn:gateway")
        assert is_ended(idle)
        eventually(lambda: server.connections == 1)
        good.sendall(frame(frames.PING, call=1))
        assert read_frame(good) == (frames.PONG, 1, b"")
        assert place.noted(
            "a connection with a certificate that is not accepted refused to cn:gateway at 127."
        )


# ---- beginning streams -------------------------------------------------------------------------------


class Opening:
    """Begins streams when it may."""

    def __init__(self, place: Place) -> None:
        self._open = place.handlers.open
        self._lock = threading.Lock()
        self.go = threading.Event()
        self.asked = 0
        place.handlers.open = self  # type: ignore[method-assign,assignment]

    def __call__(self, *given: Any) -> Told:
        with self._lock:
            self.asked += 1
        assert self.go.wait(SECONDS)
        return self._open(*given)


def test_streams_that_wait_for_the_store_keep_no_call_waiting(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame_server, "OPENING_SECONDS", 10 * SECONDS)
    opening = Opening(place)
    with place.serve(threads=1) as server, contextlib.ExitStack() as stack:
        socks = [stack.enter_context(place.raw(server.port)) for _ in range(3 * OPENINGS)]
        for sock in socks:
            sock.sendall(frame(frames.REQUEST, method=frames.WATCH, call=1))
        eventually(lambda: opening.asked == OPENINGS)
        with contextlib.closing(place.connect(server.port)) as client:
            for at in range(20):
                assert client.call("WrapKeys", b"%d" % at, SECONDS) == b"%d" % at
            assert opening.asked == OPENINGS
            opening.go.set()
            for sock in socks:  # those that waited are begun too
                assert read_frame(sock)[0] == frames.ITEM
            assert client.call("WrapKeys", b"after", SECONDS) == b"after"


def test_streams_that_have_waited_for_too_long_are_told_to_try_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame_server, "OPENING_SECONDS", 10 * SECONDS)
    opening = Opening(place)
    with place.serve(threads=1) as server, contextlib.ExitStack() as stack:
        first = [stack.enter_context(place.raw(server.port)) for _ in range(OPENINGS)]
        for sock in first:
            sock.sendall(frame(frames.REQUEST, method=frames.WATCH, call=1))
        eventually(lambda: opening.asked == OPENINGS)
        monkeypatch.setattr(frame_server, "OPENING_SECONDS", 0.0)
        late = stack.enter_context(place.raw(server.port))
        late.sendall(frame(frames.REQUEST, method=frames.WATCH, call=7) + frame(frames.PING, call=8))
        eventually(lambda: len(server._openings._queue) == 1)
        opening.go.set()
        kind, call, payload = read_frame(late)
        assert (kind, call) == (frames.FAILURE, 7)
        failure = pb.Failure.FromString(payload)
        assert (failure.code, failure.retryable) == ("core_unavailable", True)
        assert read_frame(late) == (frames.PONG, 8, b"")  # the connection goes on
        assert opening.asked == OPENINGS
