# SPDX-License-Identifier: Apache-2.0
"""Compare the Python backend with plain loops that make the same ``cryptography`` calls and check nothing.

Run ``python bench/fallback.py``. For each work it prints the microseconds a 64-byte record takes through the whole
chain (Gateway, Core, Python backend), those of the plain loop, and the ratio: each is the least of many rounds, and
the two take turns in a round, so that a drift of the machine falls on both. The loops' envelopes are real ones, which
the service has to open, so that no loop gets away with less than the envelope needs.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Final

os.environ["OPENKCM_BACKEND"] = "python"

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

import openkcm
from openkcm.context import ABSENT
from openkcm.core.keyring import ServiceKey
from openkcm.crypto.pure import HALF, xaes_subkey
from openkcm.envelope import FIXED_BYTES, INLINE_HEADER_BYTES, fixed_header, payload_aad
from openkcm.gateway import ServiceHandle
from openkcm.keys import Kind
from openkcm.limits import COMMITMENT_BYTES, KEY_BYTES, NONCE_BYTES, XAES_NONCE_BYTES

BATCH: Final = 10_000
SIZE: Final = 64
ROUNDS: Final = 60
ZEROS: Final = bytes(COMMITMENT_BYTES)
WRAP_NONCE: Final = FIXED_BYTES + HALF
WRAPPED: Final = FIXED_BYTES + XAES_NONCE_BYTES
BODY: Final = INLINE_HEADER_BYTES + NONCE_BYTES


class PlainLoops:
    """What someone would write who had a service key in hand and needed no Gateway, no Core and no checks."""

    def __init__(self, held: ServiceKey) -> None:
        self._key = held.key
        self._head = fixed_header(Kind.INLINE, held.service.service_id, held.version)
        self._wrap_aad = held.aad(Kind.INLINE)
        self._aad = payload_aad(Kind.INLINE, held.service.service_id) + ABSENT

    def _wrapper(self, nonce: bytes) -> AESGCM:
        with self._key as key:
            return AESGCM(xaes_subkey(bytes(key), nonce))

    def encrypt_each(self, records: list[bytes]) -> list[bytes]:
        """A data key for every record."""
        start = os.urandom(HALF)
        head, wrap, wrap_aad, aad = (
            self._head + start,
            self._wrapper(start).encrypt,
            self._wrap_aad,
            self._aad,
        )
        keys = os.urandom(KEY_BYTES * len(records))
        nonces = os.urandom(2 * NONCE_BYTES * len(records))
        out = []
        for at, record in enumerate(records):
            key = keys[at * KEY_BYTES : (at + 1) * KEY_BYTES]
            both = nonces[2 * at * NONCE_BYTES : 2 * (at + 1) * NONCE_BYTES]
            wrap_nonce, nonce = both[:NONCE_BYTES], both[NONCE_BYTES:]
            wrapped = wrap(wrap_nonce, key, wrap_aad)
            sealed = AESGCM(key).encrypt(nonce, ZEROS + record, aad)
            out.append(head + wrap_nonce + wrapped + nonce + sealed)
        return out

    def encrypt_shared(self, records: list[bytes]) -> list[bytes]:
        """One data key, which need not be wrapped more than once."""
        start, wrap_nonce, key = os.urandom(HALF), os.urandom(NONCE_BYTES), os.urandom(KEY_BYTES)
        wrapped = self._wrapper(start).encrypt(wrap_nonce, key, self._wrap_aad)
        head, seal, aad = self._head + start + wrap_nonce + wrapped, AESGCM(key).encrypt, self._aad
        nonces = os.urandom(NONCE_BYTES * len(records))
        out = []
        for at, record in enumerate(records):
            nonce = nonces[at * NONCE_BYTES : (at + 1) * NONCE_BYTES]
            out.append(head + nonce + seal(nonce, ZEROS + record, aad))
        return out

    def decrypt_each(self, blobs: list[bytes]) -> list[bytes]:
        """What ``encrypt_each`` made; the service key's subkey is derived once."""
        unwrap, wrap_aad = self._wrapper(blobs[0][FIXED_BYTES:WRAP_NONCE]).decrypt, self._wrap_aad
        aad = self._aad
        out = []
        for blob in blobs:
            key = unwrap(blob[WRAP_NONCE:WRAPPED], blob[WRAPPED:INLINE_HEADER_BYTES], wrap_aad)
            opened = AESGCM(key).decrypt(blob[INLINE_HEADER_BYTES:BODY], blob[BODY:], aad)
            out.append(opened[COMMITMENT_BYTES:])
        return out

    def decrypt_shared(self, blobs: list[bytes]) -> list[bytes]:
        """What ``encrypt_shared`` made; the data key is opened once."""
        first = blobs[0]
        unwrap = self._wrapper(first[FIXED_BYTES:WRAP_NONCE]).decrypt
        key = unwrap(first[WRAP_NONCE:WRAPPED], first[WRAPPED:INLINE_HEADER_BYTES], self._wrap_aad)
        decrypt, aad = AESGCM(key).decrypt, self._aad
        out = []
        for blob in blobs:
            opened = decrypt(blob[INLINE_HEADER_BYTES:BODY], blob[BODY:], aad)
            out.append(opened[COMMITMENT_BYTES:])
        return out


def measure(ours: Callable[[], object], plain: Callable[[], object]) -> tuple[float, float]:
    """Microseconds a record of both: the least of ``ROUNDS`` rounds in which they take turns."""
    least = [float("inf")] * 2
    for _ in range(ROUNDS):
        for at, work in enumerate((ours, plain)):
            start = perf_counter()
            work()
            least[at] = min(least[at], perf_counter() - start)
    return least[0] * 1e6 / BATCH, least[1] * 1e6 / BATCH


def compare(core: openkcm.Core) -> None:
    """Print a line for each of the four works."""
    records = [bytes([number % 251]) * SIZE for number in range(BATCH)]
    each = openkcm.Gateway(core).service("bench", "records")
    shared = openkcm.Gateway(core, policy=openkcm.DataKeyPolicy(records=2**31)).service("bench", "records")
    plain = PlainLoops(service_key(core, each))
    blobs, shared_blobs = plain.encrypt_each(records), plain.encrypt_shared(records)
    for made in (blobs, shared_blobs):
        if each.decrypt_many(made) != records:
            sys.exit("the plain loops do not make this service's envelopes")
    works: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "encrypt_many, a data key each": (
            lambda: each.encrypt_many(records),
            lambda: plain.encrypt_each(records),
        ),
        "encrypt_many, one data key": (
            lambda: shared.encrypt_many(records),
            lambda: plain.encrypt_shared(records),
        ),
        "decrypt_many, a data key each": (
            lambda: each.decrypt_many(blobs),
            lambda: plain.decrypt_each(blobs),
        ),
        "decrypt_many, one data key": (
            lambda: shared.decrypt_many(shared_blobs),
            lambda: plain.decrypt_shared(shared_blobs),
        ),
    }
    for name, (ours, theirs) in works.items():
        ours_us, plain_us = measure(ours, theirs)
        print(f"{name:<30} {ours_us:6.3f} us, plain loop {plain_us:6.3f} us, ratio {ours_us / plain_us:5.2f}")


def service_key(core: openkcm.Core, service: ServiceHandle) -> ServiceKey:
    """The service key that the Core has in memory once it was used; no public call gives it."""
    service.encrypt(b"")
    held = core._vault.ring.active(service.service_id)
    assert held is not None
    return held


def main() -> None:
    """Run the comparison with a vault of its own."""
    with (
        tempfile.TemporaryDirectory() as name,
        openkcm.Core.open(f"sqlite:///{Path(name) / 'vault.db'}") as core,
    ):
        core.link_tenant("bench", root=f"local:{Path(name) / 'root.key'}")
        core.create_service("bench", "records")
        compare(core)


if __name__ == "__main__":
    main()
