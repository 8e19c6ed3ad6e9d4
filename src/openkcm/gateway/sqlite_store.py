# SPDX-License-Identifier: Apache-2.0
"""Named data keys in a SQLite file, the default beside an embedded vault.

Invariant: full syncs before a key is acknowledged; deleted keys are overwritten. One connection under a lock
serves all threads; a forked child opens its own.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import Final, NamedTuple

from ..crypto import random_bytes
from ..errors import StoreUnavailable
from ..keys import Service
from ..limits import KEY_ID_BYTES, SERVICE_ID_BYTES, SUBJECT_HASH_BYTES, WRAPPED_KEY_BYTES
from ..sqlite import BUSY_SECONDS, PRAGMAS, Connection, close_before_fork, store_error
from .keystore import (
    DAMAGED,
    SALT_BYTES,
    VERSION,
    WHAT,
    WITHOUT_SALT,
    Buried,
    StoredKey,
    buried_of,
    checked,
)

_MANY: Final = 1000
_ID: Final = itemgetter(0)
_CACHE_KIB: Final = 32 * 1024
"""Pages kept in memory, once read: nearly twice what a transaction of ``subjects.TOGETHER`` new keys changes."""

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS key_store (
    version INTEGER NOT NULL,
    salt BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS data_keys (
    service_id BLOB NOT NULL,
    key_id BLOB NOT NULL,
    subject BLOB NOT NULL,
    version INTEGER NOT NULL,
    wrapped BLOB NOT NULL,
    created_at TEXT NOT NULL,
    PRIMARY KEY (service_id, key_id),
    UNIQUE (service_id, subject)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tombstones (
    service_id BLOB NOT NULL,
    key_id BLOB NOT NULL,
    tenant TEXT NOT NULL,
    region TEXT NOT NULL,
    service TEXT NOT NULL,
    PRIMARY KEY (service_id, key_id)
) WITHOUT ROWID;
"""


class SQLiteKeyStore:
    """A key store in one file, made where there is none.

    Args:
        path: the file; its folder must exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._closed = False
        with self._use() as connection:
            self._salt = _prepare(connection)
        close_before_fork(self)

    @property
    def salt(self) -> bytes:
        """32 random bytes, made with the store."""
        return self._salt

    def find_subjects(self, service_id: bytes, subjects: Sequence[bytes]) -> Mapping[bytes, StoredKey]:
        """Keys by subject hash."""
        with self._use() as connection:
            return {key.subject: key for key in _find(connection, _BY_SUBJECT, service_id, subjects)}

    def find_ids(self, service_id: bytes, key_ids: Sequence[bytes]) -> Mapping[bytes, StoredKey]:
        """Keys by id."""
        with self._use() as connection:
            return {key.key_id: key for key in _find(connection, _BY_ID, service_id, key_ids)}

    def add(self, service_id: bytes, keys: Sequence[StoredKey]) -> Mapping[bytes, StoredKey]:
        """Add keys for subjects that have none; the key that now counts for each subject.

        One transaction: one for each thousand keys takes eight times as long (67 us a key, not 8.5, for 65,536 keys).
        """
        at = datetime.now(UTC).isoformat(timespec="seconds")
        with self._write() as connection:
            added = 0
            for version in {key.version for key in keys}:
                # In the order of the table, for the sake of its pages.
                group = sorted((key for key in keys if key.version == version), key=_ID)
                ids, subjects, _, wrapped = zip(*group, strict=True)
                packed = (b"".join(ids), b"".join(subjects), version, b"".join(wrapped))
                added += connection.execute(_ADD, (service_id, len(group), *packed, at)).rowcount
            if added == len(keys):
                return {key.subject: key for key in keys}
            # Somebody was first for some of them.
            subjects_of = [key.subject for key in keys]
            return {key.subject: key for key in _find(connection, _BY_SUBJECT, service_id, subjects_of)}

    def rewrap(self, service_id: bytes, keys: Iterable[StoredKey]) -> None:
        """Put newly wrapped bytes in place of the old ones, unless a newer version is there."""
        rows = [(key.version, key.wrapped, service_id, key.key_id, key.version) for key in keys]
        with self._write() as connection:
            connection.executemany(
                "UPDATE data_keys SET version = ?, wrapped = ? WHERE service_id = ? AND key_id = ? AND version <= ?",
                rows,
            )

    def remove(self, service_id: bytes, key_ids: Iterable[bytes]) -> None:
        """Delete keys; the write-ahead log is folded in at once so that no copy is left there."""
        with self._write() as connection:
            _delete(connection, service_id, key_ids)
        self._fold_in()

    def bury(self, service: Service, key_ids: Sequence[bytes]) -> None:
        """As ``remove``, with a tombstone for each id."""
        names = (service.tenant, service.region, service.name)
        with self._write() as connection:
            _delete(connection, service.service_id, key_ids)
            connection.executemany(
                "INSERT INTO tombstones VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                [(service.service_id, key_id, *names) for key_id in key_ids],
            )
        self._fold_in()

    def buried(self, service_id: bytes, key_ids: Sequence[bytes]) -> frozenset[bytes]:
        """Those of the ids that have a tombstone."""
        query = "SELECT 1 FROM tombstones WHERE service_id = ? AND key_id = ?"
        with self._use() as connection:
            return frozenset(
                each for each in key_ids if connection.execute(query, (service_id, each)).fetchone()
            )

    def pending(self, after: bytes, limit: int) -> list[Buried]:
        """Tombstones in order."""
        start = (after[:SERVICE_ID_BYTES], after[SERVICE_ID_BYTES:])
        with self._use() as connection:
            rows = connection.execute(
                "SELECT service_id, key_id, tenant, region, service FROM tombstones "
                "WHERE (service_id, key_id) > (?, ?) ORDER BY service_id, key_id LIMIT ?",
                (*start, limit),
            )
            return buried_of(rows.fetchall())

    def delivered(self, service_id: bytes, key_ids: Sequence[bytes]) -> None:
        """Drop tombstones."""
        with self._write() as connection:
            connection.executemany(
                "DELETE FROM tombstones WHERE service_id = ? AND key_id = ?",
                [(service_id, key_id) for key_id in key_ids],
            )

    def scan(self, service_id: bytes, after: bytes, limit: int) -> list[StoredKey]:
        """Keys in the order of their ids."""
        with self._use() as connection:
            rows = connection.execute(
                "SELECT key_id, subject, version, wrapped FROM data_keys WHERE service_id = ? AND key_id > ? "
                "ORDER BY key_id LIMIT ?",
                (service_id, after, limit),
            )
            return checked(rows.fetchall())

    def count(self, service_id: bytes) -> int:
        """How many keys the service has."""
        with self._use() as connection:
            row = connection.execute(
                "SELECT count(*) FROM data_keys WHERE service_id = ?", (service_id,)
            ).fetchone()
            return int(row[0])

    def before_fork(self) -> None:
        """Wait for the thread that uses the connection, close it, and let no other open one."""
        self._lock.acquire()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def after_fork_in_parent(self) -> None:
        """Go on, with a new connection."""
        self._lock.release()

    def forget(self) -> None:
        """In a forked child: a lock that no thread of the parent holds."""
        self._lock = threading.RLock()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._closed = True
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _fold_in(self) -> None:
        with self._use() as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    @contextmanager
    def _use(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._lock:
                if self._closed:
                    raise StoreUnavailable(f"{WHAT} was closed", retryable=False)
                if self._connection is None:
                    self._connection = _connect(self.path)
                yield self._connection
        except sqlite3.Error as error:
            raise store_error(error, WHAT) from None

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self._use() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise


def _delete(connection: sqlite3.Connection, service_id: bytes, key_ids: Iterable[bytes]) -> None:
    connection.executemany(
        "DELETE FROM data_keys WHERE service_id = ? AND key_id = ?",
        [(service_id, key_id) for key_id in key_ids],
    )


def _connect(path: Path) -> sqlite3.Connection:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise StoreUnavailable(f"{WHAT} {path} cannot be opened: {error.strerror}", retryable=False) from None
    connection = sqlite3.connect(
        path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, factory=Connection
    )
    for pragma in PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")
    connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
    return connection


def _prepare(connection: sqlite3.Connection) -> bytes:
    """Make the tables that a file has not, an older one the last; returns the salt."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        for statement in _SCHEMA.split(";")[:-1]:
            connection.execute(statement)
        row = connection.execute("SELECT version, salt FROM key_store").fetchone()
        if row is None:
            if connection.execute("SELECT 1 FROM data_keys LIMIT 1").fetchone() is not None:
                raise StoreUnavailable(WITHOUT_SALT, retryable=False)
            row = (VERSION, random_bytes(SALT_BYTES))
            connection.execute("INSERT INTO key_store VALUES (?, ?)", row)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    if row[0] != VERSION:
        raise StoreUnavailable(f"{WHAT} has format {row[0]}; use a newer OpenKCM", retryable=False)
    if type(row[1]) is not bytes or len(row[1]) != SALT_BYTES:
        raise StoreUnavailable(DAMAGED, retryable=False)
    return row[1]


class _Column(NamedTuple):
    """A column that keys are looked for by: its place in a ``StoredKey``, and the query that takes values packed."""

    place: int
    query: str


def _column(name: str, size: int) -> _Column:
    # CROSS JOIN keeps the order: for ``name IN (...)`` SQLite reads every key of the service once for each 500 values.
    return _Column(
        StoredKey._fields.index(name),
        f"{_WANTED} SELECT key_id, subject, data_keys.version, wrapped FROM wanted CROSS JOIN data_keys "
        f"WHERE service_id = ?1 AND {name} = substr(?3, {size} * place + 1, {size})",
    )


# The values of many rows are given as one, packed: an argument each costs more than finding its row.
_WANTED: Final = (
    "WITH RECURSIVE wanted(place) AS (SELECT 0 UNION ALL SELECT place + 1 FROM wanted WHERE place + 1 < ?2)"
)
_ADD: Final = (
    f"{_WANTED} INSERT INTO data_keys SELECT ?1, substr(?3, {KEY_ID_BYTES} * place + 1, {KEY_ID_BYTES}), "
    f"substr(?4, {SUBJECT_HASH_BYTES} * place + 1, {SUBJECT_HASH_BYTES}), ?5, "
    f"substr(?6, {WRAPPED_KEY_BYTES} * place + 1, {WRAPPED_KEY_BYTES}), ?7 FROM wanted WHERE true "
    "ON CONFLICT (service_id, subject) DO NOTHING"
)
_BY_ID: Final = _column("key_id", KEY_ID_BYTES)
_BY_SUBJECT: Final = _column("subject", SUBJECT_HASH_BYTES)


def _find(
    connection: sqlite3.Connection, column: _Column, service_id: bytes, values: Sequence[bytes]
) -> Iterable[StoredKey]:
    if not values:
        return []
    if len(values) >= _MANY and _count(connection, service_id, 2 * len(values) + 1) <= 2 * len(values):
        # They are much of what there is: reading all in the table's order takes less than looking for each.
        wanted, place = frozenset(values), column.place
        rows = connection.execute(
            "SELECT key_id, subject, version, wrapped FROM data_keys WHERE service_id = ?", (service_id,)
        )
        return checked([row for row in rows if row[place] in wanted])
    # Sorted, so that neighbours in the index come one after the other.
    packed = b"".join(sorted(values))
    rows = connection.execute(column.query, (service_id, len(values), packed))
    return checked(rows.fetchall())


def _count(connection: sqlite3.Connection, service_id: bytes, most: int) -> int:
    """How many keys a service has, but no more than ``most`` are counted."""
    row = connection.execute(
        "SELECT count(*) FROM (SELECT 1 FROM data_keys WHERE service_id = ? LIMIT ?)", (service_id, most)
    ).fetchone()
    return int(row[0])
