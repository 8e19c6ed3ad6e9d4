# SPDX-License-Identifier: Apache-2.0
"""Unwrapping and rewrapping packed data keys: each opens only as the kind, version and id it was wrapped for."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from vault import opened, originals

from openkcm import envelope
from openkcm.errors import DecryptError, InvalidInput, KeyDestroyed
from openkcm.keys import Kind, Service, WrappedKeys
from openkcm.limits import KEY_ID_BYTES, WRAPPED_KEY_BYTES

NAMED = b"\x05" * KEY_ID_BYTES


@functools.cache
def service() -> Service:
    return opened()[0].find_service("acme", "payments")


@functools.cache
def valid() -> frozenset[tuple[int, bytes]]:
    """Version and bytes of every inline key of the golden envelopes that opens."""
    found = [envelope.parse(blob) for blob, case in originals(stream=False).items() if "opens" in case]
    return frozenset((one.version, one.data_key) for one in found if not one.kind.stored)


def seeds() -> Iterator[bytes]:
    keys = sorted(valid())
    for version, key in keys:
        yield bytes((0, version)) + key
    yield bytes((0, 1)) + b"".join(key for version, key in keys if version == 1)
    yield bytes((1, 1)) + keys[0][1] + NAMED
    yield bytes((0, 9)) + keys[0][1]
    yield bytes((2, 1)) + keys[0][1][:-1]


def check(data: bytes) -> None:
    if len(data) < 2:
        return
    kind, version = (Kind.INLINE, Kind.STORED)[data[0] & 1], data[1]
    count = (len(data) - 2) // (WRAPPED_KEY_BYTES + (KEY_ID_BYTES if kind.stored else 0))
    end = 2 + count * WRAPPED_KEY_BYTES
    ids = data[end:] if kind.stored else b""
    try:
        wrapped = WrappedKeys(kind, version, data[2:] if data[0] & 2 else data[2:end], ids)
    except InvalidInput:
        return
    core, expected = (
        opened()[0],
        [
            not kind.stored and (version, bytes(wrapped.wrapped[at : at + WRAPPED_KEY_BYTES])) in valid()
            for at in range(0, len(wrapped.wrapped), WRAPPED_KEY_BYTES)
        ],
    )
    keys, failed, _ = core.unwrap_keys(service(), wrapped)
    keys.wipe()
    moved, not_moved = core.rewrap_keys(service(), wrapped)
    for errors in (failed, not_moved):
        assert {place for place, opens in enumerate(expected) if not opens} == set(errors)
        assert {type(error) for error in errors.values()} <= {DecryptError, KeyDestroyed}
    assert len(moved) == len(wrapped)
