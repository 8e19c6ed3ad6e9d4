# SPDX-License-Identifier: Apache-2.0
"""PostgreSQL goes away under two replicas and the Gateways on them, and comes back.

Loaded tenants go on, also for people and for those who were shredded; what must be written is refused in a way that
says "later"; and afterwards everything is as before, in the same processes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

import openkcm
from fault_support import SOAK, Ledger, PostgresSite, running, until
from openkcm.errors import KeyDestroyed, StoreUnavailable, TenantDark
from openkcm.gateway import ServiceHandle
from openkcm.testing.postgres import PostgresServer
from rpc_support import Replica
from support import refused

SETTLING: Final = 30 * 0.1
"""Many polls: every replica knows of what was committed before."""


class Reached(NamedTuple):
    """A replica and a Gateway of it."""

    replica: Replica
    remote: openkcm.RemoteCore
    handle: ServiceHandle


@contextmanager
def gateway_of(site: PostgresSite, replica: Replica) -> Iterator[Reached]:
    """A Gateway whose named keys are where all of them keep theirs."""
    with (
        site.connect(replica.ports, deadline=30) as remote,
        openkcm.Gateway(remote, keys=site.folder / "keys.db") as gateway,
    ):
        yield Reached(replica, remote, gateway.service("acme", "records"))


@contextmanager
def two(folder: Path, server: PostgresServer) -> Iterator[tuple[PostgresSite, list[Reached]]]:
    """Two replicas, with a Gateway each."""
    site = PostgresSite(folder, server)
    with ExitStack() as stack:
        replicas = [
            stack.enter_context(site.start_replica(name, poll_interval=0.1)) for name in ("one", "two")
        ]
        yield site, [stack.enter_context(gateway_of(site, replica)) for replica in replicas]


def refused_later(call: Any) -> None:
    """The store's absence, as it is told over the wire."""
    error = refused(call, StoreUnavailable)
    assert error.retryable, error  # type: ignore[attr-defined]


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=SOAK)])
def test_an_outage_of_the_database(seconds: float, tmp_path: Path, own_postgres: PostgresServer) -> None:
    with two(tmp_path, own_postgres) as (site, reached):
        first, second = (each.handle for each in reached)
        ledgers = [Ledger(handle) for handle in (first, second)]
        for ledger in ledgers:
            for _ in range(10):
                ledger.encrypt()
                ledger.people()
        mine, gone, third = (first.encrypt(b"y", subject=f"the-{name}") for name in ("one", "two", "three"))
        first.shred("the-two")
        time.sleep(SETTLING)
        for handle in (first, second):
            assert (handle.decrypt(mine), handle.decrypt(third)) == (b"y", b"y")
            refused(lambda handle=handle: handle.decrypt(gone), KeyDestroyed)  # type: ignore[misc]
        own_postgres.kill()
        works = [work for ledger in ledgers for work in (ledger.encrypt, ledger.decrypt)]
        with running(*works), ExitStack() as stack:
            admins = [stack.enter_context(site.admin(each.replica)) for each in reached]
            ends = time.monotonic() + seconds
            refused_later(lambda: reached[0].remote.shred_keys(first._service, bytes(16)))
            refused_later(
                lambda: second.shred("the-three")
            )  # the Core is there, and says that it cannot record it
            while time.monotonic() < ends:
                for handle, admin in zip((first, second), admins, strict=True):
                    assert (handle.decrypt(mine), handle.decrypt(third)) == (b"y", b"y")
                    refused(lambda handle=handle: handle.decrypt(gone), KeyDestroyed)  # type: ignore[misc]
                    refused_later(lambda admin=admin: admin.rotate_service("acme", "records"))  # type: ignore[misc]
                    time.sleep(0.05)
            own_postgres.start()
            until(lambda: _again(lambda: admins[0].rotate_service("acme", "records")))
            until(lambda: _again(lambda: second.shred("the-three")))
        for ledger in ledgers:
            print(f"{ledger.calls} calls, the longest took {ledger.longest:.2f} s")
        for each in reached:
            assert each.replica.process.poll() is None
            for ledger in ledgers:
                ledger.verify(each.handle)
            refused(lambda each=each: each.handle.decrypt(third), KeyDestroyed)  # type: ignore[misc]
        with site.admin(reached[0].replica) as admin:
            assert admin.verify_audit() is None
            admin.kill("acme")
        until(lambda: _is_dark(second, mine), 5)


def _again(call: Any) -> Any:
    """What is refused for now is repeated; nothing else is."""
    try:
        return call()
    except StoreUnavailable as error:
        assert error.retryable, error
        return None


def _is_dark(handle: ServiceHandle, blob: bytes) -> bool:
    try:
        handle.decrypt(blob)
    except TenantDark:
        return True
    return False
