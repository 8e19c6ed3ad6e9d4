# SPDX-License-Identifier: Apache-2.0
"""``encrypt_many`` and ``decrypt_many``: a list of bytes in, a list of bytes out."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import ClassVar

from .base import ONE_KEY, OpenKCM

HEADLINE = 64
SUBJECTS = 1000


class KeyEach(OpenKCM):
    """The default: a data key for every record."""

    title = "OpenKCM lists, a data key each"
    threads: ClassVar[Sequence[int]] = (1, 2)

    def encrypt(self, records: list[bytes]) -> list[bytes]:
        return self.service.encrypt_many(records)

    def decrypt(self, sealed: list[bytes]) -> list[bytes]:
        return self.service.decrypt_many(sealed)


class OneKey(KeyEach):
    """One data key for all records."""

    title = "OpenKCM lists, one data key"
    policy = ONE_KEY


class Subjects(KeyEach):
    """Records of 1,000 people, whose data keys are in the key store."""

    title = "OpenKCM lists, 1,000 subjects"
    sizes: ClassVar[Sequence[int]] = (HEADLINE,)
    threads: ClassVar[Sequence[int]] = (1,)

    def encrypt(self, records: list[bytes]) -> list[bytes]:
        subjects = [f"user-{number % SUBJECTS}" for number in range(len(records))]
        return self.service.encrypt_many(records, subjects=subjects)


class KeyEachEvp(KeyEach):
    """Held to OpenSSL's EVP, to set it beside the C loop on EVP whatever the default engine is."""

    title = "OpenKCM lists, a data key each, EVP"
    sizes: ClassVar[Sequence[int]] = (HEADLINE,)
    environment = MappingProxyType({"OPENKCM_AES": "evp"})


class OneKeyEvp(OneKey):
    """The same with one data key."""

    title = "OpenKCM lists, one data key, EVP"
    sizes: ClassVar[Sequence[int]] = (HEADLINE,)
    environment = MappingProxyType({"OPENKCM_AES": "evp"})
