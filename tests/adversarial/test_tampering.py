# SPDX-License-Identifier: Apache-2.0
"""Tampering: every byte flipped, every truncation, every extension, every kind: refused and typed."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable, Iterator

import pytest

from openkcm.errors import DecryptError, FormatError
from openkcm.gateway import ServiceHandle
from openkcm.limits import SEGMENT_BYTES
from support import refused

CONTEXT = {"table": "cards", "row": "7"}
RECORD = b"4111 1111 1111 1111"


def opener(service: ServiceHandle, stream: bool) -> Callable[[bytes], bytes]:
    def open_stream(blob: bytes) -> bytes:
        target = io.BytesIO()
        try:
            service.decrypt_stream(io.BytesIO(blob), target, context=CONTEXT)
        except BaseException:
            assert target.getvalue() == b""  # all of these streams have one segment
            raise
        return target.getvalue()

    def open_record(blob: bytes) -> bytes:
        return service.decrypt(blob, context=CONTEXT)

    return open_stream if stream else open_record


def sealed(service: ServiceHandle, stream: bool, subject: str | None, record: bytes = RECORD) -> bytes:
    if not stream:
        return service.encrypt(record, context=CONTEXT, subject=subject)
    target = io.BytesIO()
    service.encrypt_stream(io.BytesIO(record), target, context=CONTEXT, subject=subject)
    return target.getvalue()


@pytest.fixture(
    params=[(False, None), (False, "ann"), (True, None), (True, "ann")], ids=["01", "02", "03", "04"]
)
def sample(
    request: pytest.FixtureRequest, service: ServiceHandle
) -> Iterator[tuple[bytes, Callable[[bytes], bytes]]]:
    """An envelope of a kind and what opens it."""
    stream, subject = request.param
    blob = sealed(service, stream, subject)
    open_it = opener(service, stream)
    assert open_it(blob) == RECORD
    yield blob, open_it
    assert open_it(blob) == RECORD


def expected(blob: bytearray, at: int) -> set[type[Exception]]:
    """What altering the byte at a position may be answered with."""
    if at < 8:
        return {FormatError}  # magic, version, suite, kind, reserved
    if 20 <= at < 24:
        return {FormatError} if (blob[5] in (2, 4)) != (blob[20:24] == bytes(4)) else {DecryptError}
    return {DecryptError}


def test_every_bit_flipped(sample: tuple[bytes, Callable[[bytes], bytes]]) -> None:
    blob, open_it = sample
    for at in range(len(blob)):
        for bit in range(8):
            altered = bytearray(blob)
            altered[at] ^= 1 << bit
            kinds = expected(altered, at)
            if at == 5:  # one kind may turn into another, which is then read as that
                kinds = {FormatError, DecryptError}
            with pytest.raises(tuple(kinds)) as caught:
                open_it(bytes(altered))
            assert type(caught.value) in kinds


def test_every_truncation(sample: tuple[bytes, Callable[[bytes], bytes]]) -> None:
    blob, open_it = sample
    for size in range(len(blob)):
        with pytest.raises((FormatError, DecryptError)) as caught:
            open_it(blob[:size])
        assert type(caught.value) in (FormatError, DecryptError)


def test_every_extension(sample: tuple[bytes, Callable[[bytes], bytes]]) -> None:
    blob, open_it = sample
    for extra in (b"\0", b"\xff", blob[-16:], blob, os.urandom(1000), bytes(SEGMENT_BYTES)):
        refused(lambda extra=extra: open_it(blob + extra), DecryptError)
    for size in range(1, 257):
        refused(lambda size=size: open_it(blob + bytes(size)), DecryptError)
    with pytest.raises((FormatError, DecryptError)):
        open_it(b"\0" + blob)


def test_a_byte_gone_or_come_at_every_place(sample: tuple[bytes, Callable[[bytes], bytes]]) -> None:
    blob, open_it = sample
    for at in range(len(blob)):
        for altered in (blob[:at] + blob[at + 1 :], blob[:at] + b"\x5a" + blob[at:]):
            with pytest.raises((FormatError, DecryptError)):
                open_it(altered)


@pytest.mark.parametrize("version", [0, 2, 3, 255])
def test_future_versions(sample: tuple[bytes, Callable[[bytes], bytes]], version: int) -> None:
    blob, open_it = sample
    error = refused(lambda: open_it(blob[:3] + bytes([version]) + blob[4:]), FormatError)
    assert str(version) in str(error)


def test_batches_with_one_altered_envelope_give_nothing_or_the_others(service: ServiceHandle) -> None:
    blobs = service.encrypt_many([RECORD] * 50, context=CONTEXT)
    generator = random.Random(7)
    for _ in range(200):
        at, byte = generator.randrange(50), generator.randrange(len(blobs[0]))
        altered = bytearray(blobs[at])
        altered[byte] ^= generator.randrange(1, 256)
        batch = [*blobs[:at], bytes(altered), *blobs[at + 1 :]]
        with pytest.raises((FormatError, DecryptError)) as caught:
            service.decrypt_many(batch, context=CONTEXT)
        assert caught.value.index == at
        outcomes = service.decrypt_many(batch, context=CONTEXT, errors="return")
        assert isinstance(outcomes[at], (FormatError, DecryptError))
        assert outcomes[at].index == at
        assert outcomes[:at] + outcomes[at + 1 :] == [RECORD] * 49


def test_a_long_streams_bytes(service: ServiceHandle) -> None:
    """Random flips over several segments: what is released is a true beginning, by whole segments."""
    data = os.urandom(3 * SEGMENT_BYTES + 7)
    blob = sealed(service, True, None, data)
    generator = random.Random(11)
    for _ in range(150):
        at = generator.randrange(8, len(blob))
        altered = bytearray(blob)
        altered[at] ^= 1 << generator.randrange(8)
        target = io.BytesIO()
        refused(
            lambda altered=altered, target=target: service.decrypt_stream(
                io.BytesIO(bytes(altered)), target, context=CONTEXT
            ),
            DecryptError,
        )
        released = target.getvalue()
        assert len(released) % SEGMENT_BYTES == 0
        assert data.startswith(released)
        assert len(released) <= max(0, at - 115)
