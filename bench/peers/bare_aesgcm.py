# SPDX-License-Identifier: Apache-2.0
"""Bare ``cryptography``: AESGCM with a nonce from ``os.urandom``, and nothing around it.

The nonce is kept beside its ciphertext: putting the two together, as most do, would copy the record once more.
"""

from __future__ import annotations

import os

from cryptography.hazmat.backends.openssl import backend
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from contender import LARGEST, MIB, SIZES, Contender

NONCE = 12
KEY = 32


class _Bare(Contender):
    package = "cryptography"
    most_bytes = MIB
    threads = (1, 2)

    def version(self) -> str:
        return str(backend.openssl_version_text())


class OneKey(_Bare):
    """One AESGCM object that is kept, as its documentation shows."""

    title = "cryptography AESGCM, one key"
    less = "no key management: one key in plain memory, no context, no key commitment, no envelope"
    sizes = (*SIZES, LARGEST)

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._cipher = AESGCM(AESGCM.generate_key(256))

    def encrypt(self, records: list[bytes]) -> list[tuple[bytes, bytes]]:
        seal, draw = self._cipher.encrypt, os.urandom
        return [((nonce := draw(NONCE)), seal(nonce, record, None)) for record in records]

    def decrypt(self, sealed: list[tuple[bytes, bytes]]) -> list[bytes]:
        unseal = self._cipher.decrypt
        return [unseal(nonce, ciphertext, None) for nonce, ciphertext in sealed]


class KeyEach(_Bare):
    """A new key for each record, which the caller keeps: nothing wraps it."""

    title = "cryptography AESGCM, a key each"
    less = "keys are not wrapped but kept beside the records; no context, no key commitment"

    def encrypt(self, records: list[bytes]) -> list[tuple[bytes, bytes, bytes]]:
        draw = os.urandom
        return [
            ((key := draw(KEY)), (nonce := draw(NONCE)), AESGCM(key).encrypt(nonce, record, None))
            for record in records
        ]

    def decrypt(self, sealed: list[tuple[bytes, bytes, bytes]]) -> list[bytes]:
        return [AESGCM(key).decrypt(nonce, ciphertext, None) for key, nonce, ciphertext in sealed]
