# SPDX-License-Identifier: Apache-2.0
"""Named data keys in PostgreSQL, shared by any number of Gateways.

Invariant: a statement is a transaction that is durable when it returns (``synchronous_commit`` is on for our
sessions, whatever the server's default), and may be run again without harm, so that what a lost connection or a
deadlock left unsaid is. No call takes longer than seconds, and no connection is used by two processes.

Engines that speak PostgreSQL's protocol will do: what is needed are primary keys, a unique constraint, ``ON CONFLICT
DO NOTHING``, ``UPDATE ... FROM`` and ``unnest``; not triggers, advisory locks, sequences, ``LISTEN`` or prepared
statements. Serialization failures are tried again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

from psycopg import Connection, Error, errors

from ..clock import DICE
from ..crypto import random_bytes
from ..errors import StoreUnavailable
from ..keys import Service
from ..limits import SERVICE_ID_BYTES
from ..postgres import Silent
from .keystore import (
    DAMAGED,
    OVERTAKEN,
    REPLACED,
    SALT_BYTES,
    VERSION,
    WHAT,
    WITHOUT_SALT,
    Buried,
    StoredKey,
    buried_of,
    checked,
    parts,
)
from .postgres_pool import Pool, store_error

T = TypeVar("T")

_TRIES: Final = 10
_PAUSE_SECONDS: Final = 0.02

_TOMBSTONES: Final = """
CREATE TABLE IF NOT EXISTS openkcm_tombstones (
    service_id BYTEA NOT NULL CHECK (octet_length(service_id) = 12),
    key_id BYTEA NOT NULL CHECK (octet_length(key_id) = 16),
    tenant TEXT NOT NULL,
    region TEXT NOT NULL,
    service TEXT NOT NULL,
    PRIMARY KEY (service_id, key_id)
)"""
# In this order: where the last is, the others are too.
_SCHEMA: Final = (
    _TOMBSTONES,
    """
CREATE TABLE IF NOT EXISTS openkcm_data_keys (
    service_id BYTEA NOT NULL,
    key_id BYTEA NOT NULL CHECK (octet_length(key_id) = 16),
    subject BYTEA NOT NULL CHECK (octet_length(subject) = 32),
    version BIGINT NOT NULL CHECK (version > 0),
    wrapped BYTEA NOT NULL CHECK (octet_length(wrapped) = 72),
    created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (service_id, key_id),
    UNIQUE (service_id, subject)
)""",
    """
CREATE TABLE IF NOT EXISTS openkcm_key_store (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    version INTEGER NOT NULL,
    salt BYTEA NOT NULL CHECK (octet_length(salt) = 32)
)""",
)
_MADE_MEANWHILE: Final = (errors.UniqueViolation, errors.DuplicateTable, errors.DuplicateObject)
"""What PostgreSQL tells the second of two who make a table at once, by how far it got: IF NOT EXISTS waits for none."""

# A salt is made for an empty store only: under a new one, nobody would find the subjects that are there.
_MAKE_SALT: Final = """
INSERT INTO openkcm_key_store (one, version, salt)
SELECT 1, %s, %s WHERE NOT EXISTS (SELECT 1 FROM openkcm_data_keys)
ON CONFLICT DO NOTHING
"""
_SALT: Final = "SELECT version, salt FROM openkcm_key_store"
_ADD: Final = """
INSERT INTO openkcm_data_keys (service_id, key_id, subject, version, wrapped)
SELECT %s, fresh.key_id, fresh.subject, fresh.version, fresh.wrapped
FROM unnest(%s::bytea[], %s::bytea[], %s::bigint[], %s::bytea[]) AS fresh (key_id, subject, version, wrapped)
WHERE EXISTS (SELECT 1 FROM openkcm_key_store WHERE salt = %s)
ON CONFLICT DO NOTHING
"""
_FIND: Final = "SELECT key_id, subject, version, wrapped FROM openkcm_data_keys WHERE service_id = %s AND "
_FIND_SUBJECTS: Final = _FIND + "subject = ANY(%s::bytea[])"
_FIND_IDS: Final = _FIND + "key_id = ANY(%s::bytea[])"
_SCAN: Final = _FIND + "key_id > %s ORDER BY key_id LIMIT %s"
_REWRAP: Final = """
UPDATE openkcm_data_keys AS old SET version = fresh.version, wrapped = fresh.wrapped
FROM unnest(%s::bytea[], %s::bigint[], %s::bytea[]) AS fresh (key_id, version, wrapped)
WHERE old.service_id = %s AND old.key_id = fresh.key_id AND old.version <= fresh.version
"""
_REMOVE: Final = "DELETE FROM openkcm_data_keys WHERE service_id = %s AND key_id = ANY(%s::bytea[])"
# One statement, and so one transaction.
_BURY: Final = """
WITH gone AS (DELETE FROM openkcm_data_keys WHERE service_id = %s AND key_id = ANY(%s::bytea[]) RETURNING key_id)
INSERT INTO openkcm_tombstones (service_id, key_id, tenant, region, service)
SELECT %s, fresh.key_id, %s, %s, %s FROM unnest(%s::bytea[]) AS fresh (key_id)
ON CONFLICT DO NOTHING
"""
_BURIED: Final = "SELECT key_id FROM openkcm_tombstones WHERE service_id = %s AND key_id = ANY(%s::bytea[])"
_PENDING: Final = """
SELECT service_id, key_id, tenant, region, service FROM openkcm_tombstones
WHERE (service_id, key_id) > (%s, %s) ORDER BY service_id, key_id LIMIT %s
"""
_DELIVERED: Final = "DELETE FROM openkcm_tombstones WHERE service_id = %s AND key_id = ANY(%s::bytea[])"
_COUNT: Final = "SELECT count(*) FROM openkcm_data_keys WHERE service_id = %s"


class PostgresKeyStore:
    """A key store in two tables of a PostgreSQL database, made where there are none.

    Args:
        url: libpq's, with its parameters (``sslmode=verify-full``, ``sslrootcert``, several hosts, ...); what is left
            out comes from libpq's environment and password file.
        most: connections at a time; who finds none free waits.

    Raises:
        StoreUnavailable: the server does not answer, refuses us, or holds something else.
    """

    def __init__(self, url: str, *, most: int = 8) -> None:
        self._pool = Pool(url, most)
        self._salt = b""
        try:
            self._salt = self._prepare()
        except BaseException:
            self._pool.close()
            raise

    @property
    def salt(self) -> bytes:
        """32 random bytes, made with the store."""
        return self._salt

    def find_subjects(self, service_id: bytes, subjects: Sequence[bytes]) -> Mapping[bytes, StoredKey]:
        """Keys by subject hash."""
        return {key.subject: key for key in self._find(_FIND_SUBJECTS, service_id, subjects)}

    def find_ids(self, service_id: bytes, key_ids: Sequence[bytes]) -> Mapping[bytes, StoredKey]:
        """Keys by id."""
        return {key.key_id: key for key in self._find(_FIND_IDS, service_id, key_ids)}

    def add(self, service_id: bytes, keys: Sequence[StoredKey]) -> Mapping[bytes, StoredKey]:
        """Add keys for subjects that have none; the key that now counts for each subject."""
        counting: dict[bytes, StoredKey] = {}
        # In one order for all writers, who would wait for each other in a circle otherwise.
        for part in parts(sorted(keys, key=lambda key: key.subject)):
            counting.update(self._add(service_id, part))
        return counting

    def rewrap(self, service_id: bytes, keys: Iterable[StoredKey]) -> None:
        """Put newly wrapped bytes in place of the old ones, unless a newer version is there."""
        for part in parts(sorted(keys)):
            ids, _, versions, wrapped = map(list, zip(*part, strict=True))
            self._change(_REWRAP, (ids, versions, wrapped, service_id))

    def remove(self, service_id: bytes, key_ids: Iterable[bytes]) -> None:
        """Delete keys; their bytes stay in the server's files until it vacuums, and in its logs and backups."""
        for part in parts(sorted(key_ids)):
            self._change(_REMOVE, (service_id, part))

    def bury(self, service: Service, key_ids: Sequence[bytes]) -> None:
        """As ``remove``, with a tombstone for each id."""
        self._make_tombstones()
        for part in parts(sorted(key_ids)):
            names = (service.tenant, service.region, service.name)
            self._change(_BURY, (service.service_id, part, service.service_id, *names, part))

    def buried(self, service_id: bytes, key_ids: Sequence[bytes]) -> frozenset[bytes]:
        """Those of the ids that have a tombstone."""
        found: set[bytes] = set()
        for part in parts(sorted(key_ids)):
            found.update(row[0] for row in self._tombstones(_BURIED, (service_id, part)))
        return frozenset(found)

    def pending(self, after: bytes, limit: int) -> list[Buried]:
        """Tombstones in order."""
        start = (after[:SERVICE_ID_BYTES], after[SERVICE_ID_BYTES:])
        return buried_of(self._tombstones(_PENDING, (*start, limit)))

    def delivered(self, service_id: bytes, key_ids: Sequence[bytes]) -> None:
        """Drop tombstones."""
        self._make_tombstones()
        for part in parts(sorted(key_ids)):
            self._change(_DELIVERED, (service_id, part))

    def scan(self, service_id: bytes, after: bytes, limit: int) -> list[StoredKey]:
        """Keys in the order of their ids."""
        return checked(self._query(_SCAN, (service_id, after, limit)))

    def count(self, service_id: bytes) -> int:
        """How many keys the service has."""
        return int(self._query(_COUNT, (service_id,))[0][0])

    def forget(self) -> None:
        """In a forked child: leave the parent's connections alone."""
        self._pool.forget()

    def close(self) -> None:
        """Close the connections."""
        self._pool.close()

    def __repr__(self) -> str:
        return "<PostgresKeyStore>"

    # ---- inside --------------------------------------------------------------------------------------

    def _find(self, query: str, service_id: bytes, values: Sequence[bytes]) -> Iterable[StoredKey]:
        for part in parts(sorted(values)):
            yield from checked(self._query(query, (service_id, part)))

    def _tombstones(self, query: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        try:
            return self._query(query, values, expected=errors.UndefinedTable)
        except errors.UndefinedTable:
            return []  # a store of before there were any, and nothing was buried in it yet

    def _make_tombstones(self) -> None:
        """Make their table in a store that is older than they are; who may not make tables is told so."""
        try:
            self._query(_BURIED, (b"", []), expected=errors.UndefinedTable)
        except errors.UndefinedTable:
            self._change(_TOMBSTONES, (), again=_MADE_MEANWHILE)

    def _add(self, service_id: bytes, keys: Sequence[StoredKey]) -> Mapping[bytes, StoredKey]:
        counting: dict[bytes, StoredKey] = {}
        for _ in range(_TRIES):
            ids, subjects, versions, wrapped = map(list, zip(*keys, strict=True))
            added = self._change(_ADD, (service_id, ids, subjects, versions, wrapped, self._salt))
            if added == len(keys):
                return counting | {key.subject: key for key in keys}
            # Somebody was first for some of them. They are read in another transaction, and may be gone again.
            found = self.find_subjects(service_id, subjects)
            counting.update(found)
            keys = [key for key in keys if key.subject not in found]
            if not keys:
                return counting
            self._check_salt()
        raise StoreUnavailable(OVERTAKEN)

    def _check_salt(self) -> None:
        if [bytes(row[1]) for row in self._query(_SALT, ())] != [self._salt]:
            raise StoreUnavailable(REPLACED, retryable=False)

    def _prepare(self) -> bytes:
        """Make the tables and the salt where there are none; returns the salt."""
        try:
            rows = self._query(_SALT, (), expected=errors.UndefinedTable)
        except errors.UndefinedTable:
            # Two who make a table at once may both be told that it is not there, and one then that it is.
            for statement in _SCHEMA:
                self._change(statement, (), again=_MADE_MEANWHILE)
            rows = []
        if not rows:
            self._change(_MAKE_SALT, (VERSION, random_bytes(SALT_BYTES)))
            rows = self._query(_SALT, ())
        if not rows:
            raise StoreUnavailable(WITHOUT_SALT, retryable=False)
        version, salt = rows[0]
        if version != VERSION:
            raise StoreUnavailable(f"{WHAT} has format {version}; use a newer OpenKCM", retryable=False)
        if type(salt) is not bytes or len(salt) != SALT_BYTES:
            raise StoreUnavailable(DAMAGED, retryable=False)
        return salt

    def _query(
        self, query: str, values: Sequence[Any], *, expected: type[Error] | None = None
    ) -> list[tuple[Any, ...]]:
        def ask(connection: Connection[Any]) -> list[tuple[Any, ...]]:
            with connection.cursor(binary=True) as cursor:
                return cursor.execute(query.encode(), values).fetchall()

        return self._run(ask, expected=expected)

    def _change(self, statement: str, values: Sequence[Any], *, again: tuple[type[Error], ...] = ()) -> int:
        def change(connection: Connection[Any]) -> int:
            with connection.cursor(binary=True) as cursor:
                return cursor.execute(statement.encode(), values).rowcount

        return self._run(change, again=again)

    def _run(
        self,
        use: Callable[[Connection[Any]], T],
        *,
        again: tuple[type[Error], ...] = (),
        expected: type[Error] | None = None,
    ) -> T:
        """Use a connection; once more where nothing was done, or where it is not known and does no harm."""
        overtaken: tuple[type[Error], ...] = (errors.SerializationFailure, errors.DeadlockDetected, *again)
        for left in reversed(range(_TRIES)):
            connection, fresh = self._pool.take()
            try:
                result = use(connection)
            except Error as error:
                alive = self._pool.give_back(connection)
                if expected is not None and isinstance(error, expected):
                    raise
                stale = not alive and not fresh and not isinstance(error, Silent)
                if not left or not (stale or isinstance(error, overtaken)):
                    raise store_error(error) from None
            except BaseException:
                self._pool.discard(connection)
                raise
            else:
                self._pool.give_back(connection)
                return result
            if not stale:
                time.sleep(DICE.uniform(0, _PAUSE_SECONDS))
        raise AssertionError("the last try returns or raises")
