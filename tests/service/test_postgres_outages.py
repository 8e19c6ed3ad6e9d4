# SPDX-License-Identifier: Apache-2.0
"""A Core on PostgreSQL while its database is stopped, killed, restarted, cut off or silent."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

import openkcm
from openkcm.core import postgres_store
from openkcm.core.store import open_store
from openkcm.errors import KeyDestroyed, StoreUnavailable, TenantDark
from openkcm.testing.postgres import PostgresServer
from openkcm.testing.tcp_proxy import TcpProxy
from postgres_support import Replica, again, is_dark, through, until
from support import refused


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=[pytest.mark.soak, pytest.mark.timeout(600)])])
def test_an_outage(
    seconds: float, own_postgres: PostgresServer, open_replica: Callable[..., Replica]
) -> None:
    url = own_postgres.url()
    first, second = open_replica(url), open_replica(url)
    blob = first.records.encrypt(b"x")
    mine, gone = first.records.encrypt(b"y", subject="user-1"), first.records.encrypt(b"z", subject="user-2")
    first.records.shred("user-2")
    before = first.core.audit_records()
    handles = [first.records, second.records]
    for each in handles:
        assert (each.decrypt(blob), each.decrypt(mine)) == (b"x", b"y")
        refused(lambda each=each: each.decrypt(gone), KeyDestroyed)  # type: ignore[misc]
    _settle(first, second)
    own_postgres.kill()
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        for each in handles:
            assert each.decrypt(blob) == b"x"
            assert each.decrypt(each.encrypt(b"new")) == b"new"
            assert each.decrypt(mine) == b"y"
            refused(lambda each=each: each.decrypt(gone), KeyDestroyed)  # type: ignore[misc]
        _refused_writing(first.core)
    own_postgres.start()
    again(lambda: first.core.rotate_service("acme", "records") and None)
    until(lambda: second.core.status("acme")[0].services[0].active_version == 2)
    assert [each.decrypt(blob) for each in handles] == [b"x", b"x"]
    assert first.core.audit_records()[: len(before)] == before
    assert first.core.verify_audit() is None
    first.core.kill("acme")
    assert until(lambda: is_dark(handles[1], blob)) < 3


def _settle(*replicas: Replica) -> None:
    """Wait until what was committed is known, and known to be known."""
    for replica in replicas:
        store, core = replica.core._vault.store, replica.core
        until(
            lambda store=store, core=core: (  # type: ignore[misc]
                store.data_version() == core._tombstones._known.version == core._vault.follower._seen
                and store._news.number == core._tombstones._known.number
            )
        )


def _refused_writing(core: openkcm.Core) -> None:
    started = time.monotonic()
    error = refused(lambda: core.rotate_service("acme", "records"), StoreUnavailable)
    assert isinstance(error, StoreUnavailable) and error.retryable
    assert time.monotonic() - started < 10


def test_what_is_not_known_does_not_open_in_an_outage(
    own_postgres: PostgresServer, open_replica: Callable[..., Replica]
) -> None:
    url = own_postgres.url()
    first, second = open_replica(url), open_replica(url)
    mine = first.records.encrypt(b"y", subject="user-1")
    records = second.records
    assert records.decrypt(records.encrypt(b"x")) == b"x"  # its keys are open, its tombstones were never read
    own_postgres.kill()
    assert refused(lambda: records.decrypt(mine), StoreUnavailable).retryable  # type: ignore[attr-defined]
    own_postgres.start()
    assert records.decrypt(mine) == b"y"


def test_a_kill_in_an_outage_is_dark_here_and_says_that_nobody_knows(
    own_postgres: PostgresServer, open_replica: Callable[..., Replica]
) -> None:
    replica = open_replica(own_postgres.url())
    records = replica.records
    blob = records.encrypt(b"x")
    own_postgres.kill()
    assert "Repeat the kill" in str(refused(lambda: replica.core.kill("acme"), StoreUnavailable))
    refused(lambda: records.decrypt(blob), TenantDark)
    own_postgres.start()
    replica.core.kill("acme")
    assert replica.core.audit_records()[-1].act == "kill"


def test_after_too_long_an_outage_every_key_is_zeroed(
    own_postgres: PostgresServer, open_replica: Callable[..., Replica]
) -> None:
    replica = open_replica(own_postgres.url(), store_grace=0.5)
    records = replica.records
    blob = records.encrypt(b"x")
    assert records.decrypt(blob) == b"x"
    time.sleep(0.8)  # longer than the grace: while the database answers it does not count
    assert records.decrypt(blob) == b"x"
    assert replica.core._vault.ring.is_open("acme")
    own_postgres.kill()
    until(lambda: not replica.core._vault.ring.is_open("acme"))
    refused(lambda: records.decrypt(blob), StoreUnavailable)
    own_postgres.start()
    assert records.decrypt(blob) == b"x"


def test_a_restart_of_the_database(
    own_postgres: PostgresServer, open_replica: Callable[..., Replica]
) -> None:
    replica = open_replica(own_postgres.url())
    records = replica.records
    blob = records.encrypt(b"x")
    for _ in range(3):
        own_postgres.restart()
        replica.core.rotate_service("acme", "records")  # the connections of before are replaced unnoticed
        assert records.decrypt(blob) == b"x"


def test_a_server_that_swallows_everything_holds_nobody_up(
    own_postgres: PostgresServer, proxy: TcpProxy, open_replica: Callable[..., Replica]
) -> None:
    replica = open_replica(through(own_postgres, proxy))
    records = replica.records
    blob = records.encrypt(b"x")
    assert records.decrypt(blob) == b"x"
    proxy.black_hole()
    try:
        started = time.monotonic()
        refused(lambda: replica.core.status("acme"), StoreUnavailable)
        assert time.monotonic() - started < 12
        started = time.monotonic()
        refused(
            lambda: replica.core.status("acme"), StoreUnavailable
        )  # at once: it did not answer a moment ago
        assert time.monotonic() - started < 1
        for _ in range(20):
            started = time.monotonic()
            assert records.decrypt(blob) == b"x"
            assert time.monotonic() - started < 1
    finally:
        proxy.heal()
    until(lambda: _answers(replica.core))


def _answers(core: openkcm.Core) -> bool:
    try:
        return bool(core.status("acme"))
    except StoreUnavailable as error:
        assert error.retryable
        return False


def test_silence_in_the_middle_of_a_statement_ends(
    own_postgres: PostgresServer, proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_store, "SILENCE_SECONDS", 0.5)
    store = open_store(through(own_postgres, proxy))
    started = time.monotonic()
    with pytest.raises(StoreUnavailable), store.read() as connection:
        proxy.black_hole()
        connection.exec_driver_sql("SELECT 1")
    assert time.monotonic() - started < 5
    proxy.heal()
    until(lambda: _reads(store))
    store.retire()


def _reads(store: Any) -> bool:
    try:
        with store.read() as connection:
            return bool(connection.exec_driver_sql("SELECT 1").scalar() == 1)
    except StoreUnavailable as error:
        assert error.retryable
        return False


def test_a_commit_that_is_cut_says_that_it_is_not_known(
    own_postgres: PostgresServer, proxy: TcpProxy, open_replica: Callable[..., Replica]
) -> None:
    replica = open_replica(through(own_postgres, proxy))
    store = replica.core._vault.store
    with pytest.raises(StoreUnavailable, match="middle of the commit") as raised, store.write():
        proxy.cut()
    assert raised.value.retryable
    replica.core.rotate_service("acme", "records")
