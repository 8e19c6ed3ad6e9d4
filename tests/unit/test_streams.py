# SPDX-License-Identifier: Apache-2.0
"""Streams: any size, constant memory, and nothing unverified released."""

from __future__ import annotations

import io
import os
import random
import resource
from pathlib import Path
from typing import Any

import pytest

import openkcm
from openkcm.errors import DecryptError, FormatError, InvalidInput, KeyDestroyed, TenantDark
from openkcm.gateway import ServiceHandle
from openkcm.gateway.streams import stream_shape
from openkcm.limits import SEGMENT_BYTES
from support import refused, run_python, url

SIZES = [0, 1, 100, SEGMENT_BYTES - 1, SEGMENT_BYTES, SEGMENT_BYTES + 1, 3 * SEGMENT_BYTES, 1_000_000]
HEADERS = {None: 96 + 19, "user-42": 40 + 19}


def seal(service: ServiceHandle, data: bytes, context: object = None, subject: str | None = None) -> bytes:
    target = io.BytesIO()
    written = service.encrypt_stream(io.BytesIO(data), target, context=context, subject=subject)
    assert written == len(target.getvalue())
    return target.getvalue()


def open_stream(service: ServiceHandle, sealed: bytes, context: object = None) -> bytes:
    target = io.BytesIO()
    assert service.decrypt_stream(io.BytesIO(sealed), target, context=context) == len(target.getvalue())
    return target.getvalue()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("subject", [None, "user-42"])
def test_round_trip(service: ServiceHandle, size: int, subject: str | None) -> None:
    data = os.urandom(size)
    sealed = seal(service, data, {"file": "a"}, subject)
    segments, plaintext = stream_shape(len(sealed) - HEADERS[subject])
    assert (segments, plaintext) == (max(1, -(-size // SEGMENT_BYTES)), size)
    assert open_stream(service, sealed, {"file": "a"}) == data
    refused(lambda: open_stream(service, sealed, {"file": "b"}), DecryptError)


class Awkward(io.RawIOBase):
    """Reads and writes a few bytes at a time."""

    def __init__(self, data: bytes = b"") -> None:
        self.data, self.at, self.random = bytearray(data), 0, random.Random(1)

    def read(self, size: int = -1) -> bytes:
        part = bytes(self.data[self.at : self.at + self.random.randint(1, max(1, size))])
        self.at += len(part)
        return part

    def write(self, data: bytes) -> int:  # type: ignore[override]
        part = bytes(data[: self.random.randint(1, 50_000)])
        self.data += part
        return len(part)


def test_short_reads_and_writes(service: ServiceHandle) -> None:
    data = os.urandom(300_000)
    sealed, opened = Awkward(), Awkward()
    service.encrypt_stream(Awkward(data), sealed)
    service.decrypt_stream(Awkward(bytes(sealed.data)), opened)
    assert bytes(opened.data) == data


def test_text_files_and_empty_handed_sources_are_refused(service: ServiceHandle) -> None:
    refused(lambda: service.encrypt_stream(io.StringIO("text"), io.BytesIO()), InvalidInput)

    class Nothing:
        def read(self, size: int) -> None:
            return None

    refused(lambda: service.encrypt_stream(Nothing(), io.BytesIO()), InvalidInput)


def test_records_and_streams_are_told_apart(service: ServiceHandle) -> None:
    assert "record" in str(refused(lambda: open_stream(service, service.encrypt(b"x")), FormatError))
    assert "stream" in str(refused(lambda: service.decrypt(seal(service, b"x" * 500)), FormatError))
    for junk in (b"", b"junk", b"OKC\x01", os.urandom(200), b"OKC\x01\x01\x03" + bytes(200)):
        refused(lambda junk=junk: open_stream(service, junk), FormatError)


def parts(sealed: bytes) -> tuple[bytes, list[bytes]]:
    """A stream of at least one full segment, cut into header and segments."""
    header, rest = sealed[:115], sealed[115:]
    first = 32 + SEGMENT_BYTES + 16
    segments = [rest[:first]]
    segments += [rest[at : at + SEGMENT_BYTES + 16] for at in range(first, len(rest), SEGMENT_BYTES + 16)]
    return header, segments


def test_segments_cannot_be_moved(service: ServiceHandle) -> None:
    data = os.urandom(3 * SEGMENT_BYTES + 5)
    sealed, twin = seal(service, data), seal(service, data)
    header, (a, b, c, d) = parts(sealed)
    other_header, (a2, b2, _, d2) = parts(twin)
    assert open_stream(service, header + a + b + c + d) == data
    for wrong in (
        [header, a, c, b, d],
        [header, a, b, d],
        [header, a, b, b, c, d],
        [header, b, c, d],
        [header, a, b, c],
        [header, a, b, c, d, d],
        [header, a, b, c, d, b""[:0], b"x"],
        [header, a, b2, c, d],
        [header, a2, b, c, d],
        [header, a, b, c, d2],
        [other_header, a, b, c, d],
        [header, a, b, c, d[:-1]],
        [header, a, b, c, d[:16]],
        [header],
        [header, a[:20]],
    ):
        target = io.BytesIO()
        refused(
            lambda wrong=wrong, target=target: service.decrypt_stream(io.BytesIO(b"".join(wrong)), target),
            DecryptError,
        )
        # What was released is a true beginning of the plaintext, by whole segments.
        assert data.startswith(target.getvalue())
        assert len(target.getvalue()) % SEGMENT_BYTES == 0


def test_a_stored_streams_subject_can_be_shredded(service: ServiceHandle) -> None:
    sealed = seal(service, b"x" * 100_000, subject="a")
    record = service.encrypt(b"r", subject="a")
    assert open_stream(service, sealed) == b"x" * 100_000
    assert service.decrypt(record) == b"r"
    service.shred("a")
    refused(lambda: open_stream(service, sealed), KeyDestroyed)


def test_streams_outlive_rotation(service: ServiceHandle) -> None:
    sealed = seal(service, b"x" * 70_000)
    service._core.rotate_service("acme", "records")  # type: ignore[attr-defined]
    assert open_stream(service, sealed) == b"x" * 70_000


@pytest.mark.parametrize("direction", ["encrypt", "decrypt"])
@pytest.mark.parametrize("who", ["ann", "bob"])
def test_a_shred_stops_the_streams_of_its_subject_alone(
    service: ServiceHandle, direction: str, who: str
) -> None:
    data = bytes(10 * SEGMENT_BYTES)
    sealed = seal(service, data, subject="ann")
    service.encrypt(b"x", subject="bob")

    class Shredding(io.BytesIO):
        count = 0

        def read(self, size: int | None = -1, /) -> bytes:
            self.count += 1
            if self.count == 5:
                service.shred(who)
            return super().read(size)

    target = io.BytesIO()
    if direction == "encrypt":

        def act() -> None:
            service.encrypt_stream(Shredding(data), target, subject="ann")
    else:

        def act() -> None:
            service.decrypt_stream(Shredding(sealed), target)

    if who == "ann":
        refused(act, KeyDestroyed)
        assert len(target.getvalue()) < 5 * SEGMENT_BYTES
    else:
        act()
        assert len(target.getvalue()) >= 10 * SEGMENT_BYTES


def test_a_shred_between_opening_and_the_first_segment(
    service: ServiceHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed, target = seal(service, bytes(10 * SEGMENT_BYTES), subject="ann"), io.BytesIO()
    before = service._core.unwrap_keys

    def shredded(*arguments: Any) -> object:
        answer = before(*arguments)
        service.shred("ann")
        return answer

    monkeypatch.setattr(service._core, "unwrap_keys", shredded)
    refused(lambda: service.decrypt_stream(io.BytesIO(sealed), target), KeyDestroyed)
    assert not target.getvalue()


@pytest.mark.parametrize("direction", ["encrypt", "decrypt"])
def test_a_kill_stops_a_running_stream(service: ServiceHandle, direction: str) -> None:
    sealed = seal(service, bytes(10 * SEGMENT_BYTES))
    core = service._core

    class Killing(io.BytesIO):
        count = 0

        def read(self, size: int | None = -1, /) -> bytes:
            self.count += 1
            if self.count == 5:
                core.kill("acme")  # type: ignore[attr-defined]
            return super().read(size)

    target = io.BytesIO()
    if direction == "encrypt":
        refused(lambda: service.encrypt_stream(Killing(bytes(10 * SEGMENT_BYTES)), target), TenantDark)
    else:
        refused(lambda: service.decrypt_stream(Killing(sealed), target), TenantDark)
        assert len(target.getvalue()) < 5 * SEGMENT_BYTES


@pytest.mark.parametrize("subject", [None, "user-42"])
def test_a_kill_between_wrapping_and_the_first_segment(
    service: ServiceHandle, monkeypatch: pytest.MonkeyPatch, subject: str | None
) -> None:
    core, target = service._core, io.BytesIO()
    call = "wrap_keys" if subject is None else "unwrap_keys"
    before = getattr(core, call)

    def killed(*arguments: object) -> object:
        answer = before(*arguments)
        core.kill("acme")  # type: ignore[attr-defined]
        return answer

    monkeypatch.setattr(core, call, killed)
    refused(
        lambda: service.encrypt_stream(io.BytesIO(bytes(10 * SEGMENT_BYTES)), target, subject=subject),
        TenantDark,
    )
    assert len(target.getvalue()) < SEGMENT_BYTES


def test_memory_is_constant(service: ServiceHandle, tmp_path: Path) -> None:
    """256 MiB through a process whose address space does not allow 256 MiB more."""
    code = f"""
import resource, openkcm
core = openkcm.Core.open({url(tmp_path)!r})
service = openkcm.Gateway(core).service("acme", "records")
class Zeros:
    left = 256 * 2**20
    def read(self, size):
        size = min(size, self.left); self.left -= size
        return bytes(size)
class Sink:
    count = 0
    def write(self, data):
        self.count += len(data)
        return len(data)
service.encrypt_stream(Zeros(), Sink())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
zeros, sink = Zeros(), Sink()
service.encrypt_stream(zeros, sink)
assert zeros.left == 0 and sink.count > 256 * 2**20
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 * 1024
"""
    run_python(code)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0


@pytest.mark.parametrize("size", [-1, 0, 47, 32 + 65536 + 16 + 16, 32 + 65536 + 16 + 1])
def test_impossible_lengths(size: int) -> None:
    refused(lambda: stream_shape(size), FormatError)


def test_exports() -> None:
    assert openkcm.Gateway.__doc__
