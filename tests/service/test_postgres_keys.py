# SPDX-License-Identifier: Apache-2.0
"""What is PostgreSQL's alone: its refusals, waits and locks, poolers' and standbys' ways, TLS, and forks."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from key_store_support import SERVICE, by_id, by_subject, ids, make_keys, opened, subjects
from openkcm.errors import InvalidInput, StoreUnavailable
from openkcm.gateway import postgres_pool, postgres_store
from openkcm.gateway.keystore import open_key_store
from openkcm.gateway.postgres_store import PostgresKeyStore
from openkcm.testing.https import make_certificate
from openkcm.testing.postgres import PostgresServer
from support import refused

_numbers = itertools.count()


@pytest.fixture
def database(postgres_server: PostgresServer) -> str:
    name = f"store_{next(_numbers)}"
    postgres_server.create_database(name)
    return name


@pytest.fixture
def place(postgres_server: PostgresServer, database: str) -> str:
    return postgres_server.url(database)


@pytest.fixture
def store(place: str) -> Iterator[PostgresKeyStore]:
    with opened(place) as store:
        assert isinstance(store, PostgresKeyStore)
        yield store


def _sessions(server: PostgresServer, database: str) -> set[int]:
    rows = server.run(
        f"SELECT pid FROM pg_stat_activity WHERE datname = '{database}' AND application_name = 'openkcm-gateway'"
    )
    return {row[0] for row in rows}


# ---- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["postgresql://h:hunter2@[", "postgresql://h/x?hunter2=1", "postgresql://h:hunter2%zz@h/x"]
)
def test_a_url_of_another_form(url: str) -> None:
    error = refused(lambda: open_key_store(url), InvalidInput)
    assert "hunter2" not in str(error)
    assert error.__cause__ is error.__context__ is None


def test_a_database_that_is_not_there(postgres_server: PostgresServer) -> None:
    url = postgres_server.url("postgres").replace("/postgres", "/nowhere")
    error = refused(lambda: open_key_store(url), StoreUnavailable)
    assert not error.retryable
    assert "no database of that name" in str(error)


def test_a_right_that_is_missing(postgres_server: PostgresServer, database: str, place: str) -> None:
    postgres_server.run("DROP ROLE IF EXISTS limited")
    postgres_server.run("CREATE ROLE limited LOGIN PASSWORD 'word'")
    limited = place.replace(f"openkcm:{postgres_server.password}", "limited:word")
    # Nobody but the owner makes tables since PostgreSQL 15; where they are made, rights on them are enough.
    postgres_server.run("REVOKE CREATE ON SCHEMA public FROM PUBLIC", database)
    assert not refused(lambda: open_key_store(limited), StoreUnavailable).retryable
    with opened(place) as owner:
        for right in ("SELECT ON openkcm_key_store", "SELECT, INSERT, UPDATE, DELETE ON openkcm_data_keys"):
            postgres_server.run(f"GRANT {right} TO limited", database)
        keys = make_keys(3)
        with opened(limited) as store:
            assert store.salt == owner.salt
            assert store.add(SERVICE, keys) == by_subject(keys)
            store.rewrap(SERVICE, keys)
            postgres_server.run("REVOKE DELETE ON openkcm_data_keys FROM limited", database)
            error = refused(lambda: store.remove(SERVICE, ids(keys)), StoreUnavailable)
            assert not error.retryable
            assert "lacks a right" in str(error)
            # A refusal is no lost connection: the same one is used again.
            assert store.count(SERVICE) == 3
            assert len(_sessions(postgres_server, database)) == 2
    postgres_server.run("DROP OWNED BY limited", database)
    postgres_server.run("DROP ROLE limited")


def test_a_standby_takes_no_keys(store: PostgresKeyStore, place: str) -> None:
    keys = make_keys(2)
    store.add(SERVICE, keys)
    with opened(f"{place}?options=-cdefault_transaction_read_only%3Don") as reading:
        assert reading.find_ids(SERVICE, ids(keys)) == by_id(keys)
        error = refused(lambda: reading.add(SERVICE, make_keys(1)), StoreUnavailable)
        assert error.retryable
        assert "primary" in str(error)


def test_tables_that_others_changed(
    store: PostgresKeyStore, postgres_server: PostgresServer, database: str
) -> None:
    keys = make_keys(2)
    store.add(SERVICE, keys)
    postgres_server.run("ALTER TABLE openkcm_data_keys RENAME COLUMN wrapped TO other", database)
    for call in (lambda: store.add(SERVICE, make_keys(1)), lambda: store.find_ids(SERVICE, ids(keys))):
        error = refused(call, StoreUnavailable)
        assert not error.retryable
        assert "tables" in str(error)


def test_a_store_that_is_replaced_while_it_is_used(
    store: PostgresKeyStore, postgres_server: PostgresServer, database: str
) -> None:
    postgres_server.run("UPDATE openkcm_key_store SET salt = decode(repeat('00', 32), 'hex')", database)
    error = refused(lambda: store.add(SERVICE, make_keys(3)), StoreUnavailable)
    assert not error.retryable
    assert store.count(SERVICE) == 0


def test_a_later_format_is_not_touched(
    store: PostgresKeyStore, postgres_server: PostgresServer, database: str, place: str
) -> None:
    postgres_server.run("UPDATE openkcm_key_store SET version = 2", database)
    assert "newer OpenKCM" in str(refused(lambda: open_key_store(place), StoreUnavailable))


# ---- waiting -------------------------------------------------------------------------------------------


def test_a_lock_is_not_waited_for_without_end(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openkcm.postgres._SETTINGS", "SELECT set_config('lock_timeout', '200', false)")
    keys = make_keys(2)
    with opened(place) as store, psycopg.connect(place) as blocker:
        store.add(SERVICE, keys)
        blocker.execute("LOCK TABLE openkcm_data_keys")
        error = refused(lambda: store.add(SERVICE, make_keys(1)), StoreUnavailable)
        assert error.retryable
        assert "locked" in str(error)
        blocker.rollback()
        store.add(SERVICE, make_keys(1))


def test_a_statement_is_not_waited_for_without_end(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openkcm.postgres._SETTINGS", "SELECT set_config('statement_timeout', '200', false)")
    with opened(place) as store, psycopg.connect(place) as blocker:
        blocker.execute("LOCK TABLE openkcm_data_keys")
        error = refused(lambda: store.count(SERVICE), StoreUnavailable)
        assert error.retryable
        assert "too long" in str(error)


def test_a_connection_is_not_waited_for_without_end(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_pool, "FREE_SECONDS", 0.1)
    store = PostgresKeyStore(place, most=1)
    connection, _ = store._pool.take()
    assert refused(lambda: store.count(SERVICE), StoreUnavailable).retryable
    store._pool.give_back(connection)
    assert store.count(SERVICE) == 0
    store.close()
    assert not refused(lambda: store.count(SERVICE), StoreUnavailable).retryable


def test_writers_who_lock_in_a_circle_all_get_on(
    store: PostgresKeyStore, postgres_server: PostgresServer, database: str
) -> None:
    """What a deadlock or a serialization failure undid is done again."""
    before = _deadlocks(postgres_server)
    keys = make_keys(2)
    store.add(SERVICE, sorted(keys))
    first, second = sorted(keys)
    # A wait is looked at once, after this long: by then the circle has to be closed, on a busy machine too.
    postgres_server.run("ALTER DATABASE " + database + " SET deadlock_timeout = '3s'", database)
    with (
        opened(postgres_server.url(database)) as mine,
        psycopg.connect(postgres_server.url(database)) as other,
    ):
        lock = "SELECT 1 FROM openkcm_data_keys WHERE key_id = %s FOR UPDATE"
        # The other holds the second and will want the first, while we hold the first and want the second.
        other.execute("SET deadlock_timeout = '60s'")
        other.execute(lock, (second.key_id,))
        with ThreadPoolExecutor(1) as threads:
            moved = [key._replace(version=2) for key in keys]
            moving = threads.submit(mine.rewrap, SERVICE, moved)
            _wait_for(
                postgres_server,
                f"SELECT 1 FROM pg_stat_activity WHERE datname = '{database}' AND wait_event_type = 'Lock'",
            )
            other.execute(lock, (first.key_id,))  # returns only when ours was undone
            other.rollback()
            moving.result(30)
        assert mine.find_ids(SERVICE, ids(keys)) == by_id(moved)
        assert _deadlocks(postgres_server) == before + 1


def _deadlocks(server: PostgresServer) -> int:
    return (server.folder / "log").read_text().count("ERROR:  deadlock detected")


def _wait_for(server: PostgresServer, query: str) -> None:
    deadline = time.monotonic() + 20
    while not server.run(query):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_serializable_database_serves_writers_at_once(
    store: PostgresKeyStore, postgres_server: PostgresServer, database: str, place: str
) -> None:
    postgres_server.run(
        f"ALTER DATABASE {database} SET default_transaction_isolation = 'serializable'", database
    )
    names = subjects(make_keys(100))
    turn = threading.Barrier(4)
    with opened(place) as strict, ThreadPoolExecutor(4) as threads:

        def race(_: int) -> dict[bytes, object]:
            mine = [key._replace(subject=each) for key, each in zip(make_keys(100), names, strict=True)]
            turn.wait(30)
            return dict(strict.add(SERVICE, mine))

        results = list(threads.map(race, range(4)))
        assert all(each == results[0] for each in results)
        assert strict.count(SERVICE) == 100


def test_a_subject_shredded_between_adding_and_reading(
    store: PostgresKeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one who was first is gone when it is read: then ours is added after all."""
    first, mine = make_keys(2)
    mine = mine._replace(subject=first.subject)
    store.add(SERVICE, [first])
    find = store.find_subjects

    def overtaken(service_id: bytes, names: list[bytes]) -> object:
        store.remove(SERVICE, [first.key_id])
        return find(service_id, names)

    monkeypatch.setattr(store, "find_subjects", overtaken)
    assert store.add(SERVICE, [mine]) == by_subject([mine])


def test_commits_are_durable_whatever_the_server_says(
    postgres_server: PostgresServer, database: str, place: str
) -> None:
    postgres_server.run(f"ALTER DATABASE {database} SET synchronous_commit = off", database)
    with opened(place) as store:
        assert isinstance(store, PostgresKeyStore)
        connection, _ = store._pool.take()
        assert connection.execute("SHOW synchronous_commit").fetchall() == [("on",)]
        store._pool.give_back(connection)


# ---- connections ---------------------------------------------------------------------------------------


def test_threads_share_a_few_connections(postgres_server: PostgresServer, database: str, place: str) -> None:
    store = PostgresKeyStore(place, most=3)
    keys = make_keys(64)
    store.add(SERVICE, keys)
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda key: store.find_ids(SERVICE, [key.key_id]), keys * 5))
    assert found == [by_id([key]) for key in keys] * 5
    assert 1 <= len(_sessions(postgres_server, database)) <= 3
    store.close()


def test_connections_that_the_server_ended_are_replaced(
    store: PostgresKeyStore, postgres_server: PostgresServer, database: str
) -> None:
    keys = make_keys(5)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: store.add(SERVICE, keys), range(8)))
    assert _sessions(postgres_server, database)
    for pid in _sessions(postgres_server, database):
        postgres_server.run(f"SELECT pg_terminate_backend({pid}, 10000)")
    # The first call already succeeds, whether it reads or writes.
    assert store.find_ids(SERVICE, ids(keys)) == by_id(keys)
    for pid in _sessions(postgres_server, database):
        postgres_server.run(f"SELECT pg_terminate_backend({pid}, 10000)")
    more = make_keys(5)
    assert store.add(SERVICE, more) == by_subject(more)


def test_a_child_does_not_disturb_its_parent(
    store: PostgresKeyStore, postgres_server: PostgresServer, database: str
) -> None:
    before = _sessions(postgres_server, database)
    assert len(before) == 1
    child = os.fork()
    if not child:
        try:
            store.forget()
            store.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert store.count(SERVICE) == 0
    assert _sessions(postgres_server, database) == before


def test_tls_is_verified_to_the_host(tmp_path: Path) -> None:
    keys = make_keys(10)
    with PostgresServer(certificate=make_certificate(tmp_path)) as server:
        good = server.url("keys", sslmode="verify-full", sslrootcert=str(tmp_path / "authority.pem"))
        with opened(good) as store:
            assert store.add(SERVICE, keys) == by_subject(keys)
        other = tmp_path / "other"
        other.mkdir()
        make_certificate(other)
        bad = server.url("keys", sslmode="verify-full", sslrootcert=str(other / "authority.pem"))
        error = refused(lambda: open_key_store(bad), StoreUnavailable)
        assert not error.retryable
        assert "TLS" in str(error)


def test_a_code_that_is_not_known_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    error = psycopg.errors.lookup("54001")("what the server says")
    told = postgres_pool.store_error(error)
    assert "54001" in str(told)
    assert "what the server says" not in str(told)


def test_trying_has_an_end(store: PostgresKeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_store, "_PAUSE_SECONDS", 0)
    tries = []

    def deadlocked(connection: object) -> None:
        tries.append(connection)
        raise psycopg.errors.DeadlockDetected

    assert refused(lambda: store._run(deadlocked), StoreUnavailable).retryable
    assert len(tries) == postgres_store._TRIES
