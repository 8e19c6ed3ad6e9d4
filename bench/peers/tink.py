# SPDX-License-Identifier: Apache-2.0
"""Tink (Google): the AEAD primitive with one key, and its envelope AEAD with a data key a record.

The primitive is got once and kept, as its documentation shows; the key that wraps data keys is a local AEAD in the
KMS's place, so that no network is timed.
"""

from __future__ import annotations

import tink
from tink import aead

from contender import MIB, Contender

NOTHING = b""


class _Tink(Contender):
    package = "tink"
    threads = (1, 2)
    most = 2000
    most_bytes = MIB
    _primitive: aead.Aead

    def __init__(self, size: int) -> None:
        super().__init__(size)
        aead.register()

    def encrypt(self, records: list[bytes]) -> list[bytes]:
        call = self._primitive.encrypt
        return [call(record, NOTHING) for record in records]

    def decrypt(self, sealed: list[bytes]) -> list[bytes]:
        call = self._primitive.decrypt
        return [call(blob, NOTHING) for blob in sealed]


def local_aead() -> aead.Aead:
    """A new AES-256-GCM key and its primitive."""
    return tink.new_keyset_handle(aead.aead_key_templates.AES256_GCM).primitive(aead.Aead)


class OneKey(_Tink):
    """AES-256-GCM with one key."""

    title = "tink AEAD, one key"
    less = "one key in plain memory for all, no key commitment"

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._primitive = local_aead()


class Envelope(_Tink):
    """Envelope encryption: a data key a record, wrapped by another AEAD."""

    title = "tink envelope, a data key each"
    less = "no key commitment, the key is bound to no tenant or service"

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._primitive = aead.KmsEnvelopeAead(aead.aead_key_templates.AES256_GCM, local_aead())
