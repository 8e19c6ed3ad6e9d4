# SPDX-License-Identifier: Apache-2.0
"""The Core's store in PostgreSQL as replicas share it: news, transactions, and what it tells of its address."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy.exc import OperationalError

import openkcm
from openkcm.core import audit, postgres_store
from openkcm.core.postgres_store import PostgresStore
from openkcm.core.store import open_store
from openkcm.errors import ConfigurationError, InvalidInput, StoreUnavailable
from openkcm.postgres import Address, store_error
from openkcm.testing.https import make_certificate
from openkcm.testing.postgres import PostgresServer
from postgres_support import Replica, again, is_dark, tls_server, until
from support import refused, run_python, without_threads

# ---- replicas tell each other --------------------------------------------------------------------------------


def _kills(open_replica: Callable[..., Replica], url: str, runs: int) -> list[float]:
    first = open_replica(url)
    others = [open_replica(url) for _ in range(3)]
    blob = first.records.encrypt(b"x")
    handles = [other.records for other in others]
    took = []
    for _ in range(runs):
        until(lambda: not any(is_dark(each, blob) for each in handles))
        first.core.kill("acme")
        took += [until(lambda each=each: is_dark(each, blob)) for each in handles]  # type: ignore[misc]
        first.core.restore("acme")
    return took


@pytest.mark.parametrize("listen", ["on", "off"])
def test_a_kill_is_known_on_every_replica(
    listen: str, postgres_url: str, open_replica: Callable[..., Replica]
) -> None:
    assert max(_kills(open_replica, f"{postgres_url}?listen={listen}", 4)) < 1


@pytest.mark.soak
@pytest.mark.parametrize("listen", ["on", "off"])
def test_fifty_kills(listen: str, postgres_url: str, open_replica: Callable[..., Replica]) -> None:
    assert max(_kills(open_replica, f"{postgres_url}?listen={listen}", 50)) < 1


def test_a_notification_does_not_wait_for_the_poll(
    postgres_url: str, open_replica: Callable[..., Replica]
) -> None:
    first, second = open_replica(postgres_url, poll_interval=60), open_replica(postgres_url, poll_interval=60)
    records, blob = second.records, first.records.encrypt(b"x")
    assert records.decrypt(blob) == b"x"
    until(lambda: second.core._vault.store._news.number is not None)  # type: ignore[attr-defined]
    first.core.kill("acme")
    assert until(lambda: is_dark(records, blob)) < 20


def test_a_use_costs_no_round_trip(
    postgres_url: str, open_replica: Callable[..., Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    # So seldom that no look is late while this runs, however busy the machine: who is late asks for himself.
    replica = open_replica(postgres_url, poll_interval=60)
    records = replica.records
    blob, mine = records.encrypt(b"x"), records.encrypt(b"y", subject="user-1")
    assert (records.decrypt(blob), records.decrypt(mine)) == (b"x", b"y")
    store = replica.core._vault.store
    until(lambda: store._news.number is not None)  # type: ignore[attr-defined]
    with store._news._looking:  # type: ignore[attr-defined]  # the first look, which is news, is over
        pass
    assert records.decrypt(mine) == b"y"  # takes it over
    until(lambda: store.data_version() == replica.core._tombstones._known.version)

    def fail(*_: object) -> None:
        raise AssertionError("the database was asked")

    monkeypatch.setattr(store, "_transaction", fail)
    for _ in range(50):
        assert (records.decrypt(blob), records.decrypt(mine)) == (b"x", b"y")


def test_own_notifications_are_no_news(postgres_url: str, open_replica: Callable[..., Replica]) -> None:
    replica = open_replica(postgres_url)
    store = replica.core._vault.store
    store.data_version()
    woken: list[bool] = []
    looked = store._news.tried  # type: ignore[attr-defined]
    until(lambda: store._news.tried != looked)  # type: ignore[attr-defined]  # its thread listens, and looks
    # What was done until now is seen: an own change not yet looked at would be news as well, and so is the first look.
    with store._news._looking:  # type: ignore[attr-defined]
        store.look()  # type: ignore[attr-defined]
    store.on_news(lambda: woken.append(True))
    with store.write():
        pass  # no audit record either
    with psycopg.connect(postgres_url) as other:
        other.execute("SELECT pg_notify('openkcm', 'of another process')")
    until(lambda: bool(woken))
    assert woken == [True]


def test_where_there_is_no_listen_it_polls(
    postgres_url: str, open_replica: Callable[..., Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openkcm.core.postgres_news.CHANNEL", "not a name")
    first, second = open_replica(postgres_url), open_replica(postgres_url)
    records, blob = second.records, first.records.encrypt(b"x")
    assert records.decrypt(blob) == b"x"
    until(lambda: not second.core._vault.store._news.listening)  # type: ignore[attr-defined]
    first.core.kill("acme")
    assert until(lambda: is_dark(records, blob)) < 1


def test_the_listening_connection_is_cut(postgres_url: str, open_replica: Callable[..., Replica]) -> None:
    first, second = open_replica(postgres_url), open_replica(postgres_url)
    records, blob = second.records, first.records.encrypt(b"x")
    with psycopg.connect(postgres_url, autocommit=True) as other:
        for _ in range(4):
            until(lambda: not is_dark(records, blob))
            other.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            again(lambda: first.core.kill("acme"))
            assert until(lambda: is_dark(records, blob)) < 1
            again(lambda: first.core.restore("acme"))


# ---- transactions --------------------------------------------------------------------------------------------


def test_a_writer_who_waits_for_too_long_is_told(
    postgres_url: str, open_replica: Callable[..., Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "openkcm.postgres._SETTINGS", "SELECT set_config('lock_timeout', '200', false)", raising=True
    )
    first, second = open_replica(postgres_url), open_replica(postgres_url)
    with first.core._vault.store.write():
        error = refused(lambda: second.core.rotate_service("acme", "records"), StoreUnavailable)
    assert isinstance(error, StoreUnavailable) and error.retryable
    assert second.core.rotate_service("acme", "records") == 2


def test_a_conflict_before_anything_was_done_is_begun_anew(
    postgres_url: str, open_replica: Callable[..., Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = open_replica(postgres_url)
    conflicts = iter([psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected, None])

    class Refusing:
        """The connection, on an engine that finds a conflict at the first statement."""

        def __init__(self, connection: Any) -> None:
            self._connection = connection

        def execute(self, query: Any) -> Any:
            conflict = next(conflicts)
            if conflict is not None:
                raise OperationalError("SELECT", {}, conflict())
            return self._connection.execute(query)

        def rollback(self) -> None:
            self._connection.rollback()

    lock = postgres_store._lock
    monkeypatch.setattr(postgres_store, "_lock", lambda connection: lock(Refusing(connection)))  # type: ignore[arg-type]
    with replica.core._vault.store.write():
        pass
    assert next(conflicts, "none left") == "none left"


def test_a_conflict_later_is_told_and_may_be_triedagain(
    postgres_url: str, open_replica: Callable[..., Replica]
) -> None:
    store = open_replica(postgres_url).core._vault.store
    with pytest.raises(StoreUnavailable, match="same moment") as raised, store.write() as connection:
        connection.exec_driver_sql("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$")
    assert raised.value.retryable


def test_commits_are_as_durable_as_can_be(own_postgres: PostgresServer) -> None:
    own_postgres.run("ALTER SYSTEM SET synchronous_commit = off")
    own_postgres.run("SELECT pg_reload_conf()")
    until(lambda: own_postgres.run("SHOW synchronous_commit") == [("off",)])
    store = open_store(own_postgres.url())
    with store.read() as connection:
        assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == "on"
        assert connection.exec_driver_sql("SHOW transaction_isolation").scalar() == "repeatable read"
        assert connection.exec_driver_sql("SHOW statement_timeout").scalar() == "10s"
    store.retire()


def test_more_threads_than_connections(postgres_url: str, open_replica: Callable[..., Replica]) -> None:
    replica = open_replica(postgres_url)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                replica.core.status("acme")
                replica.core.rotate_service("acme", "records")
        except StoreUnavailable as error:
            if not error.retryable:
                failed.append(error)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failed
    assert replica.core.verify_audit() is None


# ---- what it is told, and what it tells ------------------------------------------------------------------------


@pytest.mark.parametrize("listen", ["on", "off"])
def test_a_core_that_nobody_holds_ends_its_thread_and_connections(
    listen: str, postgres_server: PostgresServer, postgres_url: str, tmp_path: Path
) -> None:
    core: openkcm.Core | None = without_threads(
        openkcm.Core.open(
            f"{postgres_url}?listen={listen}", seal=tmp_path / "s", create=True, poll_interval=0.05
        )
    )
    assert core is not None
    core._vault.store.data_version()
    thread = core._vault.store._news._thread  # type: ignore[attr-defined]
    assert thread.is_alive()
    core = None
    gc.collect()
    until(lambda: not thread.is_alive())
    name = postgres_url.rpartition("/")[2]
    until(lambda: not postgres_server.run(f"SELECT 1 FROM pg_stat_activity WHERE datname = '{name}'"))


def test_grace_is_longer_than_a_poll(postgres_url: str, tmp_path: Path) -> None:
    for grace in (-1, 0, 0.9, 3601):
        with pytest.raises(InvalidInput, match="store_grace"):
            openkcm.Core.open(postgres_url, seal=tmp_path / "s", create=True, store_grace=grace)


FORKER = """
import os, sys, openkcm
with openkcm.Core.open(sys.argv[1], seal=sys.argv[2], poll_interval=0.05) as core:
    def backends():
        with core._vault.store.read() as connection:
            found = connection.exec_driver_sql(
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database() ORDER BY pid"
            )
            return found.scalars().all()
    core._vault.store.data_version()
    while len(backends()) < 2:  # the pool's, and the one that listens
        pass
    before = backends()
    child = os.fork()
    if not child:
        assert not set(backends()) <= set(before)  # a connection of its own
        core._vault.store.data_version()
        core.close()
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
    while len(backends()) > 2:
        pass
    assert backends() == before, (before, backends())
"""


def test_a_forked_child_says_nothing_on_its_parents_connections(postgres_url: str, tmp_path: Path) -> None:
    openkcm.Core.open(postgres_url, seal=tmp_path / "s", create=True).close()
    run_python(FORKER, postgres_url, str(tmp_path / "s"))


def test_a_seal_file_has_to_be_named(postgres_url: str) -> None:
    assert "seal=PATH" in str(
        refused(lambda: openkcm.Core.open(postgres_url, create=True), ConfigurationError)
    )


def test_it_says_where_it_is(postgres_url: str, open_replica: Callable[..., Replica]) -> None:
    core = open_replica(postgres_url).core
    assert core.default_key_store is None
    assert repr(core).startswith("<Core postgresql://openkcm@127.0.0.1:")
    refused(lambda: openkcm.Gateway(core), InvalidInput)


def test_tls_is_verified(tmp_path: Path, open_replica: Callable[..., Replica]) -> None:
    (tmp_path / "other").mkdir()
    make_certificate(tmp_path / "other")
    with tls_server(make_certificate(tmp_path)) as server:
        url = server.url(sslmode="verify-full", sslrootcert=str(tmp_path / "authority.pem"))
        replica = open_replica(url)
        with replica.core._vault.store.read() as connection:
            used = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
            assert connection.exec_driver_sql(used).scalar() is True
        wrong = server.url(sslmode="verify-full", sslrootcert=str(tmp_path / "other" / "authority.pem"))
        error = refused(lambda: openkcm.Core.open(wrong, seal=tmp_path / "vault.seal"), StoreUnavailable)
        assert "TLS" in str(error) and not error.retryable  # type: ignore[attr-defined]
        replica.close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("@", "guessed@"), "refuses this user"),
        (("openkcm:", "nobody:"), "refuses this user"),
        (("/test_", "/absent_"), "no database of that name"),
    ],
)
def test_what_is_wrong_with_the_url_is_said_without_the_password(
    change: tuple[str, str],
    words: str,
    postgres_server: PostgresServer,
    postgres_url: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    url = postgres_url.replace(*change)
    error = refused(lambda: openkcm.Core.open(url, seal=tmp_path / "s", create=True), StoreUnavailable)
    assert words in str(error) and not error.retryable  # type: ignore[attr-defined]
    assert not (tmp_path / "s").exists()
    for text in (str(error), repr(error), caplog.text, repr(open_store(url)), repr(Address(url))):
        assert postgres_server.password not in text


def test_the_password_is_in_no_repr(postgres_server: PostgresServer, postgres_url: str) -> None:
    store = open_store(postgres_url)
    with store.read():
        pass
    assert isinstance(store, PostgresStore)
    for each in (store, store.place, store.engine, store.engine.url, store.engine.pool, vars(store._address)):
        assert postgres_server.password not in repr(each)
    store.retire()


@pytest.mark.parametrize(
    "bad",
    [
        "postgresql://u:secret@h",
        "postgresql://u:secret@h/d?nosuch=1",
        "postgresql://u:%zzsecret@h/d",
        "postgresql://u:secret@h/d?listen=perhaps",
        "postgresql+psycopg2://u:secret@h/d",
        "cockroachdb://u:secret@h/d",
    ],
)
def test_bad_urls_are_refused(bad: str) -> None:
    assert "secret" not in str(refused(lambda: open_store(bad), InvalidInput))


def test_libpqs_spellings_are_known() -> None:
    for url in ("postgres://u:p@h:1/d", "postgresql+psycopg://u:p@h:1/d?listen=off&application_name=x"):
        assert Address(url).place == "postgresql://u@h:1/d"
    assert not Address("postgresql://h/d?listen=off").listen
    assert Address("postgresql://h/d?sslmode=disable").listen


def test_without_the_driver_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.delitem(sys.modules, "openkcm.core.postgres_store", raising=False)
    monkeypatch.delitem(sys.modules, "openkcm.postgres", raising=False)
    error = refused(lambda: open_store("postgresql://h/d"), ConfigurationError)
    assert "openkcm[postgres]" in str(error)


def test_a_database_with_other_tables(postgres_url: str, open_replica: Callable[..., Replica]) -> None:
    with psycopg.connect(postgres_url) as other:
        other.execute("CREATE TABLE somebody_elses (number integer)")
    assert open_replica(postgres_url).core.status()


def test_a_database_with_tables_of_our_names(postgres_url: str, tmp_path: Path) -> None:
    with psycopg.connect(postgres_url) as other:
        other.execute("CREATE TABLE audit (number integer)")
    error = refused(
        lambda: openkcm.Core.open(postgres_url, seal=tmp_path / "s", create=True), StoreUnavailable
    )
    assert "somebody else" in str(error)
    assert not (tmp_path / "s").exists()


def test_a_user_who_may_not(postgres_server: PostgresServer, postgres_url: str, tmp_path: Path) -> None:
    postgres_server.run("DROP ROLE IF EXISTS reader")
    postgres_server.run("CREATE ROLE reader LOGIN PASSWORD 'reader'")
    url = postgres_url.replace(f"openkcm:{postgres_server.password}@", "reader:reader@")
    postgres_server.run("REVOKE CREATE ON SCHEMA public FROM PUBLIC", postgres_url.rpartition("/")[2])
    error = refused(lambda: openkcm.Core.open(url, seal=tmp_path / "s", create=True), StoreUnavailable)
    assert "GRANT" in str(error) and not error.retryable  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("kind", "retryable"),
    [
        (psycopg.errors.ReadOnlySqlTransaction, True),
        (psycopg.errors.DiskFull, True),
        (psycopg.errors.TooManyConnections, True),
        (psycopg.errors.QueryCanceled, True),
        (psycopg.errors.AdminShutdown, True),
        (psycopg.errors.DataCorrupted, False),
        (psycopg.errors.UndefinedTable, False),
        (psycopg.errors.UndefinedColumn, True),
        (psycopg.OperationalError, True),
        (ValueError, True),
    ],
)
def test_each_failure_says_whether_to_tryagain(kind: type[Exception], retryable: bool) -> None:
    error = store_error(kind("the server's own words"), "the store")
    assert error.retryable is retryable
    assert "own words" not in str(error)


def test_a_closed_core_stays_closed(postgres_url: str, open_replica: Callable[..., Replica]) -> None:
    replica = open_replica(postgres_url)
    store = replica.core._vault.store
    before = threading.active_count()
    replica.core.find_service("acme", "records")
    replica.core.close()
    for use in (store.data_version, store.look, lambda: store.read().__enter__()):
        refused(use, openkcm.CoreUnavailable)
    assert threading.active_count() <= before
    assert os.getpid()


@pytest.mark.parametrize(
    ("url", "weak"),
    [
        ("postgresql://db.example/d", True),
        ("postgresql://db.example/d?sslmode=require", True),
        ("postgresql://db.example/d?sslmode=verify-full", False),
        ("postgresql://127.0.0.1,db.example/d", True),
        ("postgresql://127.0.0.1/d?hostaddr=10.1.1.1", True),
        ("postgresql://localhost/d", False),
        ("postgresql:///d?host=/run/postgresql", False),
        ("postgresql:///d", False),
    ],
)
def test_a_connection_that_others_could_answer_is_weak(
    url: str, weak: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PGSSLMODE", raising=False)
    assert bool(Address(url).weakness) is weak


def test_who_made_it_between_looking_and_writing_counts(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[openkcm.Core] = []
    begin = audit.begin

    def overtaken(*arguments: str) -> None:
        if not made:
            monkeypatch.setattr(audit, "begin", begin)
            made.append(openkcm.Core.open(postgres_url, seal=tmp_path / "s", create=True, region="eu"))
        begin(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(audit, "begin", overtaken)
    with openkcm.Core.open(postgres_url, seal=tmp_path / "s", create=True) as core, made[0] as other:
        assert core.region == other.region == "eu"
        assert [record.detail for record in core.audit_records()] == ["region eu"]
