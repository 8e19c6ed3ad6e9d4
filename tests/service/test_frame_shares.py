# SPDX-License-Identifier: Apache-2.0
"""What one peer of the frame server, or one kind of request, can keep from the others."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest

from frame_support import SECONDS, Place, Told, eventually, frame, read_frame
from openkcm.rpc import keys_pb2 as pb
from openkcm.rpc.frames import format as frames
from openkcm.rpc.frames import server as frame_server
from openkcm.rpc.server.streams import OPENINGS


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


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
