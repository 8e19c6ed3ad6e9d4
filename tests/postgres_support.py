# SPDX-License-Identifier: Apache-2.0
"""What the tests on PostgreSQL share: one server a test run's worker, a fresh database each, and Cores on it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import openkcm
from openkcm.errors import StoreUnavailable, TenantDark
from openkcm.gateway import ServiceHandle
from openkcm.testing.postgres import PostgresServer
from openkcm.testing.tcp_proxy import TcpProxy

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A running PostgreSQL for tests that leave it running."""
    with PostgresServer() as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> str:
    """The URL of an empty database, with its password."""
    return postgres_server.create_database(f"test_{next(_numbers)}")


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL of the test's own, to stop, kill and restart."""
    with PostgresServer() as server:
        yield server


POLL = 0.1


def until(done: Callable[[], bool], seconds: float = 20) -> float:
    """Wait until it is so; how long that took."""
    started = time.monotonic()
    while not done():
        assert time.monotonic() - started < seconds, "it never came about"
        time.sleep(0.002)
    return time.monotonic() - started


def tls_server(certificate: Path) -> PostgresServer:
    """A server that offers TLS; the test is skipped, and says so, where PostgreSQL was built without it."""
    try:
        return PostgresServer(certificate=certificate)
    except RuntimeError as error:
        if "SSL is not supported" in str(error):
            pytest.skip("this PostgreSQL was built without TLS: apt-get install postgresql")
        raise


class Replica:
    """A Core on the shared database with its Gateway, as a process of its own would have them."""

    def __init__(self, url: str, folder: Path, **options: Any) -> None:
        self.core = openkcm.Core.open(
            url, seal=folder / "vault.seal", **{"create": True, "poll_interval": POLL, **options}
        )
        self.gateway = openkcm.Gateway(self.core, keys=folder / "keys.db")

    @property
    def records(self) -> ServiceHandle:
        return self.gateway.service("acme", "records")

    def close(self) -> None:
        self.gateway.close()
        self.core.close()


@pytest.fixture
def open_replica(tmp_path: Path) -> Iterator[Callable[..., Replica]]:
    """Opens Cores, and closes them after the test; the first makes the vault."""
    opened: list[Replica] = []

    def open_one(url: str, **options: Any) -> Replica:
        replica = Replica(url, tmp_path, **options)
        opened.append(replica)
        if len(opened) == 1:
            replica.core.link_tenant("acme", root=f"local:{tmp_path / 'acme.root'}")
            replica.core.create_service("acme", "records")
        return replica

    yield open_one
    for replica in opened:
        replica.close()


@pytest.fixture
def proxy(own_postgres: PostgresServer) -> Iterator[TcpProxy]:
    """The network to the test's own server."""
    with TcpProxy(("127.0.0.1", own_postgres.port)) as proxy:
        yield proxy


def through(server: PostgresServer, proxy: TcpProxy) -> str:
    return server.url().replace(f":{server.port}/", f":{proxy.port}/")


def is_dark(records: ServiceHandle, blob: bytes) -> bool:
    try:
        records.decrypt(blob)
    except TenantDark:
        return True
    return False


def again(act: Callable[[], None]) -> None:
    """An act on connections that were cut: an error says that it may be repeated."""
    while True:
        try:
            return act()
        except StoreUnavailable as error:
            assert error.retryable, error
