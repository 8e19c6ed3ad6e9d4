# SPDX-License-Identifier: Apache-2.0
"""One record into a buffer of the caller's: what ``encrypt`` and ``decrypt`` do, and nothing left where they fail."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import pytest

import openkcm
from openkcm.errors import DecryptError, FormatError, InvalidInput, KeyDestroyed, TenantDark
from openkcm.gateway import DataKeyPolicy, ServiceHandle
from support import refused

OVERHEAD = {None: 156, "ann": 100}


@pytest.mark.parametrize("size", [0, 1, 64, 2048, 2049, 3_000_000])
@pytest.mark.parametrize("subject", [None, "ann"])
@pytest.mark.parametrize("context", [None, b"c", {"a": "b"}])
def test_it_is_what_encrypt_and_decrypt_do(
    service: ServiceHandle, size: int, subject: str | None, context: Any
) -> None:
    record = bytes(size % 251 for _ in range(size))
    sealed, opened = bytearray(b"\xaa" * (size + 200)), bytearray(b"\xaa" * (size + 7))
    written = service.encrypt_into(record, sealed, context=context, subject=subject)
    assert written == size + OVERHEAD[subject]
    assert sealed[written:] == b"\xaa" * (size + 200 - written)
    assert service.decrypt(sealed[:written], context=context) == record
    blob = service.encrypt(record, context=context, subject=subject)
    assert service.decrypt_into(blob, opened, context=context) == size
    assert opened == record + b"\xaa" * 7


@pytest.mark.parametrize("policy", [DataKeyPolicy(), DataKeyPolicy(records=5)])
def test_any_policy(core: openkcm.Core, policy: DataKeyPolicy) -> None:
    with openkcm.Gateway(core, policy=policy) as gateway:
        service, out = gateway.service("acme", "records"), bytearray(200)
        blobs = {bytes(out[: service.encrypt_into(b"x" * 20, out)]) for _ in range(12)}
        assert len(blobs) == 12
        assert service.decrypt_many(list(blobs)) == [b"x" * 20] * 12


def test_any_buffer_that_can_be_written_to(service: ServiceHandle) -> None:
    record = np.arange(100, dtype=np.float64)
    with mmap.mmap(-1, 4096) as pages:
        written = service.encrypt_into(record, pages)
        back = np.zeros(100)
        assert service.decrypt_into(memoryview(pages)[:written], back) == 800
    assert (back == record).all()


@pytest.mark.parametrize(
    "out",
    [None, b"x" * 300, bytearray(219), memoryview(bytearray(600))[::2], "text", 7],
    ids=["none", "read-only", "too small", "in pieces", "text", "number"],
)
def test_a_buffer_that_is_none(service: ServiceHandle, out: Any) -> None:
    before = bytes(out) if isinstance(out, (bytes, bytearray)) else b""
    refused(lambda: service.encrypt_into(b"x" * 64, out), InvalidInput)
    refused(lambda: service.decrypt_into(service.encrypt(b"x" * 300), out), InvalidInput)
    assert not before or bytes(out) == before


@pytest.mark.parametrize("data", ["text", 7, None, memoryview(bytearray(8))[::2], [b"x"]])
def test_a_record_that_is_none(service: ServiceHandle, data: Any) -> None:
    refused(lambda: service.encrypt_into(data, bytearray(300)), InvalidInput)
    refused(lambda: service.decrypt_into(data, bytearray(300)), InvalidInput)


def test_not_onto_itself(service: ServiceHandle) -> None:
    memory = bytearray(service.encrypt(b"x" * 64) + bytes(100))
    before = bytes(memory)
    refused(lambda: service.decrypt_into(memoryview(memory)[:220], memory), InvalidInput)
    refused(lambda: service.encrypt_into(memoryview(memory)[:20], memory), InvalidInput)
    assert memory == before


def test_what_does_not_open_leaves_nothing(core: openkcm.Core) -> None:
    service = openkcm.Gateway(core).service("acme", "records")
    blob = service.encrypt(b"secret" * 500, context=b"right")
    out = bytearray(b"\xaa" * 4000)
    for bad, context, kind in (
        (blob, b"wrong", DecryptError),
        (blob[:-1] + bytes([blob[-1] ^ 1]), b"right", DecryptError),
        (b"no envelope at all", b"right", FormatError),
        (b"OKC\x01" + bytes(300), b"right", FormatError),
    ):
        error: Any = refused(
            lambda bad=bad, context=context: service.decrypt_into(bad, out, context=context), kind
        )
        assert error.index is None
        assert b"secret" not in out
    named = service.encrypt(b"x", subject="ann")
    service.shred("ann")
    refused(lambda: service.decrypt_into(named, out), KeyDestroyed)
    core.kill("acme")
    refused(lambda: service.decrypt_into(blob, out, context=b"right"), TenantDark)
    refused(lambda: service.encrypt_into(b"x", out), TenantDark)
    assert b"secret" not in out


def test_under_a_lease(core: openkcm.Core) -> None:
    core.set_lease("acme", "records", 600)
    with openkcm.Gateway(core) as gateway:
        service = gateway.service("acme", "records")
        blob, out = service.encrypt(b"x" * 64), bytearray(70)
        for _ in range(3):
            assert service.decrypt_into(blob, out) == 64
            assert out == b"x" * 64 + bytes(6)
        assert service._leases.kept
        refused(lambda: service.decrypt_into(blob, bytearray(63)), InvalidInput)
        refused(lambda: service.decrypt_into(blob[:-1] + b"?", out), DecryptError)


def test_keys_that_were_wiped_between_look_and_use(service: ServiceHandle) -> None:
    out = bytearray(300)
    assert service.encrypt_into(b"x", out)
    ready = service._pool.ready
    assert ready is not None
    ready.keys.wipe()
    assert service.decrypt(out[: service.encrypt_into(b"y", out)]) == b"y"
