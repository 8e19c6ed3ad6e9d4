# SPDX-License-Identifier: Apache-2.0
"""What the tests of key stores share: a place for each kind of store, and what its owner can do to it."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from openkcm.gateway.keystore import KeyStore, StoredKey, open_key_store
from openkcm.testing.postgres import PostgresServer
from openkcm.testing.valkey import ValkeyServer

SERVICE = b"service-id-1"
OTHER = b"service-id-2"


RACER = """
import hashlib, os, sys
from openkcm.gateway.keystore import StoredKey, open_key_store
store = open_key_store(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
subjects = [hashlib.sha256(b"%d" % number).digest() for number in range(3000)]
keys = [StoredKey(os.urandom(16), each, 1, os.urandom(72)) for each in subjects]
for start in range(0, 3000, 500):
    counting = dict(store.add(b"service-id-1", keys[start : start + 500]))
    store.add(b"service-id-2", keys[::-1])
found = store.find_subjects(b"service-id-1", subjects)
print(store.salt.hex(), hashlib.sha256(b"".join(found[each].key_id for each in subjects)).hexdigest())
store.close()
"""
"""A process that opens a store, waits for a line, and adds keys for the same subjects as others of its kind."""


def make_keys(count: int, version: int = 1) -> list[StoredKey]:
    """Keys of random bytes, as a store takes them."""
    return [StoredKey(os.urandom(16), os.urandom(32), version, os.urandom(72)) for _ in range(count)]


def by_subject(keys: Sequence[StoredKey]) -> dict[bytes, StoredKey]:
    return {key.subject: key for key in keys}


def by_id(keys: Sequence[StoredKey]) -> dict[bytes, StoredKey]:
    return {key.key_id: key for key in keys}


def ids(keys: Sequence[StoredKey]) -> list[bytes]:
    return [key.key_id for key in keys]


def subjects(keys: Sequence[StoredKey]) -> list[bytes]:
    return [key.subject for key in keys]


@contextmanager
def opened(place: str) -> Iterator[KeyStore]:
    store = open_key_store(place)
    try:
        yield store
    finally:
        store.close()


class Place:
    """Where a store is, to be opened any number of times.

    Attributes:
        kind: sqlite, postgres or valkey.
        url: what a Gateway is given.
        password: what must not be told.
        server: its server, if it has one.
        ruin: put something else in the place of one field of a key's record.
        wipe: what an owner does who has no backup: everything is gone, the salt as well.
    """

    def __init__(self, kind: str, url: str, server: PostgresServer | ValkeyServer | None) -> None:
        self.kind = kind
        self.url = url
        self.server = server
        self.password = "" if server is None else server.password
        self.ruin: Callable[[StoredKey, str, Any], None] = getattr(self, f"_ruin_{kind}")
        self.lose_salt: Callable[[], None] = getattr(self, f"_lose_salt_{kind}")

    def port(self, port: int) -> str:
        """The URL with another port."""
        assert self.server is not None
        return self.url.replace(f":{self.server.port}/", f":{port}/")

    # ---- SQLite --------------------------------------------------------------------------------------

    def _ruin_sqlite(self, key: StoredKey, field: str, value: Any) -> None:
        self._sqlite(f"UPDATE data_keys SET {field} = ? WHERE key_id = ?", value, key.key_id)

    def _lose_salt_sqlite(self) -> None:
        self._sqlite("DELETE FROM key_store")

    def _sqlite(self, statement: str, *values: Any) -> None:
        connection = sqlite3.connect(self.url, isolation_level=None)
        try:
            assert connection.execute(statement, values).rowcount == 1
        finally:
            connection.close()

    # ---- PostgreSQL ----------------------------------------------------------------------------------

    def _ruin_postgres(self, key: StoredKey, field: str, value: Any) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            for each in ("key_id", "subject", "version", "wrapped"):
                connection.execute(
                    f"ALTER TABLE openkcm_data_keys DROP CONSTRAINT IF EXISTS openkcm_data_keys_{each}_check".encode()
                )
            if isinstance(value, str):
                kind = f"ALTER TABLE openkcm_data_keys ALTER {field} TYPE text USING '{value}'"
                connection.execute(kind.encode())
                return
            statement = f"UPDATE openkcm_data_keys SET {field} = %s WHERE key_id = %s"
            assert connection.execute(statement.encode(), (value, key.key_id)).rowcount == 1

    def _lose_salt_postgres(self) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            assert connection.execute("DELETE FROM openkcm_key_store").rowcount == 1

    # ---- Valkey --------------------------------------------------------------------------------------

    def _ruin_valkey(self, key: StoredKey, field: str, value: Any) -> None:
        assert isinstance(self.server, ValkeyServer)
        ruined = key._replace(**{field: value})
        parts = [
            each if isinstance(each, bytes) else f"{each:>010}".encode()
            for each in (ruined.subject, ruined.wrapped, ruined.version)
        ]
        name = f"{{openkcm}}:{SERVICE.hex()}:"
        self.server.run("HDEL", f"{name}keys", key.key_id)
        self.server.run("HSET", f"{name}keys", ruined.key_id, b"".join(parts))
        self.server.run("HSET", f"{name}subjects", key.subject, ruined.key_id)
        self.server.run("ZREM", f"{name}ids", key.key_id)
        self.server.run("ZADD", f"{name}ids", 0, ruined.key_id)

    def _lose_salt_valkey(self) -> None:
        assert isinstance(self.server, ValkeyServer)
        assert self.server.run("DEL", "{openkcm}:keystore") == 1


def sqlite_place(folder: Path) -> Place:
    return Place("sqlite", str(folder / "keys.db"), None)


def postgres_place(server: PostgresServer, database: str) -> Place:
    return Place("postgres", server.create_database(database), server)


def valkey_place(server: ValkeyServer) -> Place:
    return Place("valkey", server.url, server)
