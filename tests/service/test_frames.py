# SPDX-License-Identifier: Apache-2.0
"""The frame transport's format: docs/formats.md, "The frame transport"."""

from __future__ import annotations

import contextlib
import random
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from frame_support import Place, frame
from openkcm.errors import ConfigurationError, FormatError
from openkcm.rpc import keys_pb2 as pb
from openkcm.rpc import wire
from openkcm.rpc.frames import format as frames

VALID = [
    frame(frames.HELLO),
    frame(frames.REQUEST, method=3, call=1, millis=5000, payload=b"wrap"),
    frame(frames.REQUEST, method=3, call=2**32 - 1, millis=2**31),
    frame(frames.REQUEST, method=frames.WATCH, call=7, payload=b"watch"),
    frame(frames.REPLY, call=1, payload=b"x" * 100_000),
    frame(frames.REPLY, call=1, payload=bytes(wire.MAX_MESSAGE_BYTES)),
    frame(frames.FAILURE, payload=b"of the connection"),
    frame(frames.FAILURE, call=3, payload=b"of a call"),
    frame(frames.ITEM, call=3, payload=b"item"),
    frame(frames.END, call=3),
    frame(frames.PING, call=3),
    frame(frames.PONG, call=3),
]

# One thing wrong with each.
INVALID = {
    "no type": frame(0),
    "an unknown type": frame(9, call=1),
    "a greeting with a call": frame(frames.HELLO, call=1),
    "a greeting that says more": frame(frames.HELLO, payload=b"!"),
    "a request of no call": frame(frames.REQUEST, method=3, millis=5),
    "a request of no method": frame(frames.REQUEST, call=1, millis=5),
    "a request of an unknown method": frame(frames.REQUEST, method=len(frames.METHODS) + 1, call=1, millis=5),
    "a call without a deadline": frame(frames.REQUEST, method=3, call=1),
    "a call with one too far": frame(frames.REQUEST, method=3, call=1, millis=2**31 + 1),
    "a stream with a deadline": frame(frames.REQUEST, method=frames.WATCH, call=1, millis=5),
    "a reply with a method": frame(frames.REPLY, method=3, call=1),
    "a reply with a deadline": frame(frames.REPLY, call=1, millis=1),
    "a reply to no call": frame(frames.REPLY),
    "a reply over the limit": frame(frames.REPLY, call=1, payload=bytes(wire.MAX_MESSAGE_BYTES + 1)),
    "a failure over its limit": frame(frames.FAILURE, call=1, payload=bytes(16 * 1024 + 1)),
    "an end that says more": frame(frames.END, call=1, payload=b"!"),
    "a ping that says more": frame(frames.PING, call=1, payload=b"!"),
}


class Pieces:
    """A socket as a Reader sees it: gives bytes in pieces, now and then nothing yet, then the end."""

    def __init__(self, data: bytes, cuts: Sequence[int] = (2**30,), waits: bool = False) -> None:
        self._data, self._cuts, self._waits = data, list(cuts), waits
        self._at = self._turn = 0
        self.asked = 0

    def read(self, count: int) -> bytes:
        self.asked = max(self.asked, count)
        self._turn += 1
        if self._waits and self._turn % 2:
            raise ssl.SSLWantReadError
        take = min(count, self._cuts[self._turn % len(self._cuts)])
        part = self._data[self._at : self._at + take]
        self._at += len(part)
        return part

    def recv_into(self, view: memoryview) -> int:
        part = self.read(len(view))
        view[: len(part)] = part
        return len(part)

    def pending(self) -> int:
        return 0


def read(sock: Any, reader: frames.Reader) -> frames.Frame | None:
    while True:
        try:
            return reader.read(sock)
        except ssl.SSLWantReadError:
            continue


def serialised(found: frames.Frame) -> bytes:
    return frame(found.type, method=found.method, call=found.call, millis=found.millis, payload=found.payload)


def test_the_methods_are_those_of_the_proto_in_its_order() -> None:
    assert list(frames.METHODS) == [each.name for each in pb.DESCRIPTOR.services_by_name["Keys"].methods]
    assert frames.HEADER_BYTES == 14


@pytest.mark.parametrize("cuts", [(2**30,), (1,), (13, 1, 7000), (16384,)])
@pytest.mark.parametrize("waits", [False, True])
def test_what_was_parsed_serialises_to_the_same_bytes_however_it_came(
    cuts: tuple[int, ...], waits: bool
) -> None:
    valid = VALID if cuts != (1,) else [each for each in VALID if len(each) < 200_000]
    sock, reader = Pieces(b"".join(valid), cuts, waits), frames.Reader()
    for each in valid:
        found = read(sock, reader)
        assert found is not None
        assert serialised(found) == each
        assert reader.held == 0
    assert read(sock, reader) is None


@pytest.mark.parametrize("what", INVALID)
def test_a_frame_has_one_form(what: str) -> None:
    sock = Pieces(INVALID[what])
    with pytest.raises(FormatError):
        read(sock, frames.Reader())
    assert sock.asked == frames.HEADER_BYTES  # the payload is not even asked for


@pytest.mark.parametrize("data", [each for each in VALID if len(each) < 200_000])
def test_a_connection_that_ends_within_a_frame_is_an_error(data: bytes) -> None:
    for cut in {1, 13, 14, len(data) - 1} - {len(data)}:
        if cut < len(data):
            with pytest.raises(ConnectionError):
                read(Pieces(data[:cut]), frames.Reader())


def test_random_headers_are_refused_or_are_the_frame_that_they_say() -> None:
    chance = random.Random(5)
    kept = 0
    for _ in range(20_000):
        kind, method = chance.choice([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 255]), chance.choice([0, 0, 1, 8, 9])
        data = frame(
            kind,
            method=method,
            call=chance.choice([0, 1, 2**32 - 1]),
            millis=chance.choice([0, 0, 1, 2**31, 2**31 + 1]),
            payload=bytes(chance.choice([0, 0, 1, 20_000])),
        )
        try:
            found = read(Pieces(data), frames.Reader())
        except FormatError:
            continue
        assert found is not None
        assert serialised(found) == data
        kept += 1
    assert kept > 500


def test_garbage_is_a_frame_or_a_format_error() -> None:
    chance = random.Random(6)
    for _ in range(2000):
        data = chance.randbytes(chance.randrange(1, 60))
        with pytest.raises((FormatError, ConnectionError)):
            while read(Pieces(data), frames.Reader()) is not None:
                raise AssertionError("random bytes were a frame")


@pytest.mark.parametrize("size", [0, 1, 16_369, 16_370, 16_371, 100_000])
def test_parts_are_the_frame_and_the_first_is_a_record(size: int) -> None:
    payload = random.Random(size).randbytes(size)
    parts = frames.reply_parts(frames.REPLY, 9, payload)
    assert b"".join(parts) == frame(frames.REPLY, call=9, payload=payload)
    assert len(parts[0]) == min(14 + size, 16 * 1024)
    parts = frames.request_parts(3, 9, 1.5, payload)
    assert b"".join(parts) == frame(frames.REQUEST, method=3, call=9, millis=1500, payload=payload)
    parts = frames.request_parts(frames.WATCH, 9, 1.5, payload)
    assert b"".join(parts) == frame(frames.REQUEST, method=frames.WATCH, call=9, payload=payload)


@pytest.mark.parametrize(("seconds", "millis"), [(0.0001, 1), (5, 5000), (1e12, 2**31)])
def test_a_deadline_is_at_least_a_millisecond(seconds: float, millis: int) -> None:
    assert b"".join(frames.request_parts(1, 1, seconds, b"")) == frame(
        frames.REQUEST, method=1, call=1, millis=millis
    )


def test_buffers_are_given_back_whatever_becomes_of_a_frame() -> None:
    free = len(frames._buffers._free)
    data = frame(frames.REPLY, call=1, payload=bytes(50_000))
    for cut in (len(data), 20_000):
        reader = frames.Reader()
        with contextlib.suppress(ConnectionError):
            read(Pieces(data[:cut]), reader)
        reader.close()
        reader.close()
        assert len(frames._buffers._free) == free
    assert len({id(each) for each in frames._buffers._free if each is not None}) > 0


def test_more_large_frames_at_a_time_than_buffers_are_read_all_the_same() -> None:
    data = frame(frames.REPLY, call=1, payload=random.Random(1).randbytes(50_000))
    readers = [frames.Reader() for _ in range(40)]
    socks: list[Any] = [Pieces(data, (1000,), waits=True) for _ in readers]
    for sock, reader in zip(socks, readers, strict=True):
        while reader.held < 5000:
            with contextlib.suppress(ssl.SSLWantReadError):
                reader.read(sock)
    for at, (sock, reader) in enumerate(zip(socks, readers, strict=True)):
        if at % 3:
            found = read(sock, reader)
            assert found is not None
            assert serialised(found) == data
        reader.close()


@pytest.mark.parametrize("broken", ["key", "chain", "roots", "another key"])
def test_credentials_that_do_not_load_are_told_without_their_bytes(broken: str, tmp_path: Path) -> None:
    place = Place(tmp_path)
    key, chain, roots = place.pem(place.client)
    other = place.pem(place.server)[0]
    parts = {
        "key": (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", chain, roots),
        "chain": (key, b"nothing", roots),
        "roots": (key, chain, b"\xff"),
        "another key": (other, chain, roots),
    }[broken]
    with pytest.raises(ConfigurationError) as caught:
        frames.client_context(parts)
    assert "BEGIN" not in str(caught.value)
    with pytest.raises(ConfigurationError):
        frames.server_context(parts)
