# SPDX-License-Identifier: Apache-2.0
"""The Cython-free fallback, beside a plain Python loop that makes the same calls of ``cryptography``.

The loop makes keys and nonces in bulk, wraps each data key under one subkey, and seals the same bytes with the same
associated data; it has no checks, no secret memory, no Gateway and no Core.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import MappingProxyType
from typing import ClassVar

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from contender import Contender

from . import lists

SIZES = (64, 4096)
COMMITMENT = bytes(32)
KEY, NONCE, WRAPPED = 32, 12, 72
HEAD = b"OKC\x01" + bytes(20)
BODY = len(HEAD) + WRAPPED + NONCE
RECORD_AAD = b"OKC\x01\x01\x01" + bytes(13)
WRAP_AAD = b"openkcm/v1/L4".ljust(56, b"\0")


class KeyEach(lists.KeyEach):
    """``encrypt_many`` without the native layer."""

    title = "OpenKCM Python backend, a data key each"
    sizes: ClassVar[Sequence[int]] = SIZES
    threads: ClassVar[Sequence[int]] = (1,)
    environment = MappingProxyType({"OPENKCM_BACKEND": "python"})


class OneKey(lists.OneKey):
    """The same with one data key."""

    title = "OpenKCM Python backend, one data key"
    sizes: ClassVar[Sequence[int]] = SIZES
    threads: ClassVar[Sequence[int]] = (1,)
    environment = MappingProxyType({"OPENKCM_BACKEND": "python"})


class LoopKeyEach(Contender):
    """The plain loop with a data key for each record."""

    title = "plain Python loop, a data key each"
    less = "a yardstick: no secret memory, no key management, no checks"
    package = "cryptography"
    sizes: ClassVar[Sequence[int]] = SIZES

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._wrapping = AESGCM(os.urandom(KEY))

    def encrypt(self, records: list[bytes]) -> list[bytes]:
        keys = parts(os.urandom(KEY * len(records)), KEY)
        prefix, start = os.urandom(NONCE), int.from_bytes(os.urandom(8), "big")
        wrapped = []
        for at, key in enumerate(keys):
            nonce = (start + at).to_bytes(NONCE, "big")
            wrapped.append(prefix + nonce + self._wrapping.encrypt(nonce, key, WRAP_AAD))
        nonces = parts(os.urandom(NONCE * len(records)), NONCE)
        return [
            HEAD + middle + nonce + AESGCM(key).encrypt(nonce, COMMITMENT + record, RECORD_AAD)
            for record, key, middle, nonce in zip(records, keys, wrapped, nonces, strict=True)
        ]

    def decrypt(self, sealed: list[bytes]) -> list[bytes]:
        unwrap, start = self._wrapping.decrypt, len(HEAD)
        wrapped = [blob[start : start + WRAPPED] for blob in sealed]
        keys = [unwrap(middle[NONCE : 2 * NONCE], middle[2 * NONCE :], WRAP_AAD) for middle in wrapped]
        return [unsealed(AESGCM(key), blob) for key, blob in zip(keys, sealed, strict=True)]


class LoopOneKey(LoopKeyEach):
    """The plain loop with one data key."""

    title = "plain Python loop, one data key"

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._cipher = AESGCM(os.urandom(KEY))
        self._middle = os.urandom(WRAPPED)

    def encrypt(self, records: list[bytes]) -> list[bytes]:
        seal, head = self._cipher.encrypt, HEAD + self._middle
        nonces = parts(os.urandom(NONCE * len(records)), NONCE)
        return [
            head + nonce + seal(nonce, COMMITMENT + record, RECORD_AAD)
            for record, nonce in zip(records, nonces, strict=True)
        ]

    def decrypt(self, sealed: list[bytes]) -> list[bytes]:
        return [unsealed(self._cipher, blob) for blob in sealed]


def parts(data: bytes, width: int) -> list[bytes]:
    """Cut into pieces of one width."""
    return [data[at : at + width] for at in range(0, len(data), width)]


def unsealed(cipher: AESGCM, blob: bytes) -> bytes:
    """One record; its commitment is checked."""
    opened = cipher.decrypt(blob[BODY - NONCE : BODY], blob[BODY:], RECORD_AAD)
    if opened[: len(COMMITMENT)] != COMMITMENT:
        raise ValueError("not the key that sealed it")
    return opened[len(COMMITMENT) :]
