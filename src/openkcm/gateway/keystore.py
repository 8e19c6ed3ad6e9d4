# SPDX-License-Identifier: Apache-2.0
"""Where a Gateway keeps the wrapped data keys of subjects.

Invariant: a key that ``add`` returned is durable, and of two that are added for one subject at the same time one
wins for everybody. A store holds no plaintext key and no subject's name, only a salted hash of it.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol, cast

from ..errors import ConfigurationError, InvalidInput, StoreUnavailable
from ..keys import Service, check_name
from ..limits import KEY_ID_BYTES, MAX_KEYS_PER_CALL, SERVICE_ID_BYTES, SUBJECT_HASH_BYTES, WRAPPED_KEY_BYTES

WHAT: Final = "the Gateway's key store"
VERSION: Final = 1
"""The format of what a store holds, whichever store it is."""

SALT_BYTES: Final = 32
MAX_VERSION: Final = 2**32 - 1

DAMAGED: Final = (
    f"{WHAT} holds something that is no key of ours; restore it from a backup, or find who else writes to it"
)
REPLACED: Final = (
    f"{WHAT} was emptied or replaced while in use; nothing was added. Restore it, or start the Gateway anew"
)
WITHOUT_SALT: Final = (
    f"{WHAT} has keys but lost the salt that their subjects were hashed with; restore it from a backup"
)
OVERTAKEN: Final = f"{WHAT}: what was to be read or added is changed again and again by others; try once more"


class StoredKey(NamedTuple):
    """A wrapped named data key: 16-byte id, 32-byte subject hash, service key version, 72 bytes wrapped.

    A tuple, because a hundred thousand are made at a time and a dataclass takes more than twice as long to make.
    """

    key_id: bytes
    subject: bytes
    version: int
    wrapped: bytes


class Buried(NamedTuple):
    """A key that was deleted here, and of whose shredding the Core is yet to hear. Nothing in it is about a person."""

    service: Service
    key_id: bytes

    @property
    def place(self) -> bytes:
        """Where it comes in order: service id (12), data key id (16)."""
        return self.service.service_id + self.key_id


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
        """Put newly wrapped bytes in place of a key's old ones.

        Keys that are gone stay gone, and a key that is under a newer version already stays as it is.
        """

    def remove(self, service_id: bytes, key_ids: Iterable[bytes]) -> None:
        """Delete keys; where the store can, what held them is overwritten."""

    def bury(self, service: Service, key_ids: Sequence[bytes]) -> None:
        """Delete keys, and keep in the same step that the Core is yet to hear of it: a tombstone for each id."""

    def buried(self, service_id: bytes, key_ids: Sequence[bytes]) -> frozenset[bytes]:
        """Those of the ids that have a tombstone here."""

    def pending(self, after: bytes, limit: int) -> list[Buried]:
        """Up to ``limit`` tombstones whose ``place`` is greater than ``after``, in that order."""

    def delivered(self, service_id: bytes, key_ids: Sequence[bytes]) -> None:
        """The Core has these tombstones: drop them here."""

    def scan(self, service_id: bytes, after: bytes, limit: int) -> list[StoredKey]:
        """Up to ``limit`` keys with ids greater than ``after``, in order."""

    def count(self, service_id: bytes) -> int:
        """How many keys the service has here."""

    def forget(self) -> None:
        """In a forked child: leave inherited connections alone and open new ones."""

    def close(self) -> None:
        """Close the store."""


# ---- opening one ----------------------------------------------------------------------------------------------

_STORES: Final = {
    **dict.fromkeys(
        ("postgresql", "postgres"), ("postgres_store", "PostgresKeyStore", "psycopg", "postgres")
    ),
    **dict.fromkeys(
        ("valkey", "valkeys", "redis", "rediss"), ("valkey_store", "ValkeyKeyStore", "valkey", "valkey")
    ),
}
"""Of each scheme: module, class, the driver it needs, and the extra that brings it."""

_URL: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_SQLITE: Final = "sqlite:///"


def open_key_store(place: str | os.PathLike[str]) -> KeyStore:
    """Open the key store at a place, made where there is none; the caller closes it.

    Args:
        place: a path or ``sqlite:///PATH`` (a SQLite file), ``postgresql://...`` (libpq's URLs, with its parameters),
            ``valkey://...`` or ``redis://...``, and ``valkeys://...`` or ``rediss://...`` for these over TLS.

    Raises:
        ConfigurationError: the driver is not installed, or the store is set up so that it would lose keys.
        InvalidInput: a URL of another kind.
        StoreUnavailable: it does not answer, refuses us, or holds something else.
    """
    found = _URL.match(place) if isinstance(place, str) else None
    if found is None or found[1].lower() == "sqlite":
        from .sqlite_store import SQLiteKeyStore

        return SQLiteKeyStore(place if found is None else _sqlite_path(str(place)))
    if found[1].lower() not in _STORES:
        # Never the URL itself: there may be a password in it.
        raise InvalidInput(
            f"there is no key store of the kind {found[1][:20]}://; use a path, sqlite:///PATH, postgresql://, "
            "valkey://, valkeys://, redis:// or rediss://"
        )
    module, name, driver, extra = _STORES[found[1].lower()]
    try:
        importlib.import_module(driver)
    except ImportError:
        raise ConfigurationError(
            f"the driver for {found[1]}:// key stores is not installed: pip install 'openkcm[{extra}]'"
        ) from None
    store = getattr(importlib.import_module(f".{module}", __package__), name)
    return cast(KeyStore, store(place))


def _sqlite_path(url: str) -> str:
    path = url[len(_SQLITE) :]
    if not url.startswith(_SQLITE) or not path or "?" in path:
        raise InvalidInput("a SQLite key store is a file: sqlite:///PATH, or just its path")
    return path


# ---- what stores share ----------------------------------------------------------------------------------------


def checked(rows: Sequence[Sequence[Any]]) -> list[StoredKey]:
    """Keys of the rows that a database gave; a column at a time, since there may be a hundred thousand.

    Raises:
        StoreUnavailable: one of them is no key.
    """
    if not rows:
        return []
    ids, subjects, versions, wrapped = zip(*rows, strict=True)
    _check_bytes(ids, KEY_ID_BYTES)
    _check_bytes(subjects, SUBJECT_HASH_BYTES)
    _check_bytes(wrapped, WRAPPED_KEY_BYTES)
    if {*map(type, versions)} != {int} or min(versions) < 1 or max(versions) > MAX_VERSION:
        raise StoreUnavailable(DAMAGED, retryable=False)
    return [*map(StoredKey._make, rows)]


def _check_bytes(values: Sequence[Any], size: int) -> None:
    if {*map(type, values)} != {bytes} or {*map(len, values)} != {size}:
        raise StoreUnavailable(DAMAGED, retryable=False)


def parts(items: Sequence[Any], size: int = MAX_KEYS_PER_CALL) -> Iterable[Sequence[Any]]:
    """Cut a sequence into pieces of at most ``size``."""
    return (items[start : start + size] for start in range(0, len(items), size))


def buried_of(rows: Iterable[Sequence[Any]]) -> list[Buried]:
    """Tombstones of rows: service id, data key id, tenant, region, name of the service.

    Raises:
        StoreUnavailable: one of them is none.
    """
    found = []
    for service_id, key_id, *names in rows:
        try:
            tenant, region, name = (check_name(each, "service") for each in names)
        except ValueError:
            raise StoreUnavailable(DAMAGED, retryable=False) from None
        _check_bytes([service_id], SERVICE_ID_BYTES)
        _check_bytes([key_id], KEY_ID_BYTES)
        found.append(Buried(Service(tenant, region, name, service_id), key_id))
    return found


class NoKeyStore:
    """Stands where none was named: a Gateway works without one as long as nobody names a subject."""

    def __getattr__(self, name: str) -> Any:
        raise InvalidInput(
            "the data keys of subjects need a key store: make the Gateway with keys= a path or a URL"
        )

    def forget(self) -> None:
        """There are no connections."""

    def close(self) -> None:
        """There is nothing to close."""
