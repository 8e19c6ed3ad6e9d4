# SPDX-License-Identifier: Apache-2.0
"""Where a Gateway keeps the wrapped data keys of subjects.

Invariant: a key that ``add`` returned is durable, and of two that are added for one subject at the same time one
wins for everybody. A store holds no plaintext key and no subject's name, only a salted hash of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol


class StoredKey(NamedTuple):
    """A wrapped named data key: 16-byte id, 32-byte subject hash, service key version, 72 bytes wrapped.

    A tuple, because a hundred thousand are made at a time and a dataclass takes more than twice as long to make.
    """

    key_id: bytes
    subject: bytes
    version: int
    wrapped: bytes


class KeyStore(Protocol):
    """What a Gateway needs of a key store. Every method takes many; all are safe for threads."""

    @property
    def salt(self) -> bytes:
        """32 random bytes, made with the store: the key of its subject hashes."""

    def find_subjects(self, service_id: bytes, subjects: Sequence[bytes]) -> Mapping[bytes, StoredKey]:
        """Keys by subject hash; subjects without one are left out."""

    def find_ids(self, service_id: bytes, key_ids: Sequence[bytes]) -> Mapping[bytes, StoredKey]:
        """Keys by id; unknown ids are left out."""

    def add(self, service_id: bytes, keys: Sequence[StoredKey]) -> Mapping[bytes, StoredKey]:
        """Add keys for subjects that have none; the key that now counts for each subject, by subject hash."""

    def rewrap(self, service_id: bytes, keys: Iterable[StoredKey]) -> None:
        """Put newly wrapped bytes in place of a key's old ones; keys that are gone stay gone."""

    def remove(self, service_id: bytes, key_ids: Iterable[bytes]) -> None:
        """Delete keys, overwriting what held them."""

    def scan(self, service_id: bytes, after: bytes, limit: int) -> list[StoredKey]:
        """Up to ``limit`` keys with ids greater than ``after``, in order."""

    def count(self, service_id: bytes) -> int:
        """How many keys the service has here."""

    def forget(self) -> None:
        """In a forked child: leave inherited connections alone and open new ones."""

    def close(self) -> None:
        """Close the store."""
