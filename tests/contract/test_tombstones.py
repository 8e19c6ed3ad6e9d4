# SPDX-License-Identifier: Apache-2.0
"""What every key store keeps to about keys of whose shredding the Core is yet to hear, on the real servers."""

from __future__ import annotations

import itertools
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from key_store_support import (
    Place,
    by_id,
    ids,
    make_keys,
    opened,
    postgres_place,
    sqlite_place,
    subjects,
    valkey_place,
)
from openkcm.errors import StoreUnavailable
from openkcm.gateway.keystore import Buried, KeyStore
from openkcm.keys import Service
from openkcm.testing.valkey import ValkeyServer
from support import refused

MINE = Service("acme", "eu-1", "records", b"service-id-1")
OTHER = Service("globex", "us", "x" * 128, b"\xff" * 12)
_numbers = itertools.count()


@pytest.fixture(params=["sqlite", "postgres", "valkey"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty place of each kind."""
    if request.param == "sqlite":
        return sqlite_place(tmp_path)
    if request.param == "postgres":
        return postgres_place(request.getfixturevalue("postgres_server"), f"tombstones_{next(_numbers)}")
    return valkey_place(request.getfixturevalue("empty_valkey"))


@pytest.fixture
def store(place: Place) -> Iterator[KeyStore]:
    with opened(place.url) as store:
        yield store


def every(store: KeyStore, limit: int = 100) -> list[Buried]:
    """All tombstones, a part at a time."""
    found: list[Buried] = []
    while part := store.pending(found[-1].place if found else b"", limit):
        found += part
    return found


def test_a_buried_key_is_gone_and_kept_in_mind(store: KeyStore, place: Place) -> None:
    keys = make_keys(5)
    store.add(MINE.service_id, keys)
    store.bury(MINE, ids(keys[:2]))
    with opened(place.url) as again:
        for each in (store, again):
            assert each.find_ids(MINE.service_id, ids(keys)) == by_id(keys[2:])
            assert set(each.find_subjects(MINE.service_id, subjects(keys))) == set(subjects(keys[2:]))
            assert each.count(MINE.service_id) == 3
            assert each.buried(MINE.service_id, ids(keys)) == set(ids(keys[:2]))
            assert every(each) == [Buried(MINE, key_id) for key_id in sorted(ids(keys[:2]))]
        again.delivered(MINE.service_id, ids(keys[:1]))
    assert store.buried(MINE.service_id, ids(keys)) == {keys[1].key_id}
    assert every(store) == [Buried(MINE, keys[1].key_id)]


def test_a_subject_that_was_buried_gets_another_key(store: KeyStore) -> None:
    (old,) = make_keys(1)
    store.add(MINE.service_id, [old])
    store.bury(MINE, [old.key_id])
    fresh = old._replace(key_id=os.urandom(16))
    assert store.add(MINE.service_id, [fresh]) == {old.subject: fresh}
    store.bury(MINE, [old.key_id])
    assert store.find_subjects(MINE.service_id, [old.subject]) == {old.subject: fresh}


def test_burying_twice_and_delivering_twice_do_no_harm(store: KeyStore) -> None:
    keys = make_keys(3)
    for _ in range(2):
        store.bury(MINE, ids(keys))  # they need not be there
    assert len(every(store)) == 3
    for _ in range(2):
        store.delivered(MINE.service_id, ids(keys))
    assert every(store) == []
    assert store.buried(MINE.service_id, ids(keys)) == frozenset()


def test_nothing_is_asked_for_and_nothing_given(store: KeyStore) -> None:
    store.bury(MINE, [])
    store.delivered(MINE.service_id, [])
    assert store.buried(MINE.service_id, []) == frozenset()
    assert store.pending(b"", 10) == []


def test_many_come_in_order_and_all_of_them(store: KeyStore) -> None:
    mine, others = ids(make_keys(1500)), ids(make_keys(7))
    edges = [b"\x00" * 16, b"\xff" * 16, b" " * 16]
    store.bury(MINE, mine + edges)
    store.bury(OTHER, others)
    wanted = [Buried(MINE, each) for each in sorted(mine + edges)]
    wanted += [Buried(OTHER, each) for each in sorted(others)]
    assert every(store, 400) == wanted
    assert store.buried(OTHER.service_id, mine) == frozenset()
    store.delivered(MINE.service_id, mine + edges)
    assert every(store) == wanted[-7:]


def test_a_key_that_was_buried_does_not_come_back_by_a_rewrap(store: KeyStore) -> None:
    keys = make_keys(2)
    store.add(MINE.service_id, keys)
    store.bury(MINE, ids(keys))
    store.rewrap(MINE.service_id, [key._replace(version=2) for key in keys])
    assert store.find_ids(MINE.service_id, ids(keys)) == {}


def test_a_store_of_before_there_were_any(place: Place) -> None:
    (key,) = make_keys(1)
    with opened(place.url) as store:
        store.add(MINE.service_id, [key])
    if place.kind == "sqlite":
        with sqlite3.connect(place.url) as connection:
            connection.execute("DROP TABLE tombstones")
        connection.close()
    elif place.kind == "postgres":
        with psycopg.connect(place.url, autocommit=True) as server:
            server.execute("DROP TABLE openkcm_tombstones")
    with opened(place.url) as store:
        assert store.pending(b"", 10) == []
        assert store.buried(MINE.service_id, [key.key_id]) == frozenset()
        store.delivered(MINE.service_id, [key.key_id])
        store.bury(MINE, [key.key_id])
        assert every(store) == [Buried(MINE, key.key_id)]
        assert store.count(MINE.service_id) == 0


def test_what_is_no_tombstone_is_said_so(place: Place) -> None:
    with opened(place.url) as store:
        store.bury(MINE, ids(make_keys(1)))
        if place.kind == "sqlite":
            with sqlite3.connect(place.url) as connection:
                connection.execute("UPDATE tombstones SET tenant = 'not a name'")
            connection.close()
        elif place.kind == "postgres":
            with psycopg.connect(place.url, autocommit=True) as server:
                server.execute("UPDATE openkcm_tombstones SET tenant = 'not a name'")
        else:
            assert isinstance(place.server, ValkeyServer)
            place.server.run("DEL", "{openkcm}:names")
        assert not refused(lambda: store.pending(b"", 10), StoreUnavailable).retryable  # type: ignore[attr-defined]
