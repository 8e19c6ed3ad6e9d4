# SPDX-License-Identifier: Apache-2.0
"""Grants on PostgreSQL, where several Cores share a store: everywhere within a second, and through an outage."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

import openkcm
from openkcm import StoreUnavailable, Verb
from openkcm.testing.postgres import PostgresServer
from postgres_support import until

ONE = "spiffe://example/gateway/one"


def replicas(url: str, folder: Path) -> tuple[openkcm.Core, openkcm.Core]:
    """Two Cores on one database."""
    seal = folder / "vault.seal"
    return openkcm.Core.open(url, seal=seal, create=True), openkcm.Core.open(url, seal=seal)


def may(core: openkcm.Core) -> bool:
    return core.access.allows(ONE, "acme", "records", Verb.UNWRAP)


@pytest.mark.parametrize("listen", ["on", "off"])
def test_another_replica_goes_by_every_change(postgres_url: str, tmp_path: Path, listen: str) -> None:
    there, here = replicas(f"{postgres_url}?listen={listen}", tmp_path)
    with there, here:
        assert not may(here)
        there.grant(ONE, "acme", "*", ["unwrap"])
        took = [until(lambda: may(here))]
        there.revoke_certificate(b"f" * 32)
        took.append(until(lambda: here.access.is_revoked(b"f" * 32)))
        there.withdraw(ONE, "acme", "*")
        took.append(until(lambda: not may(here)))
        print("seconds:", *(f"{each:.3f}" for each in took))
        assert [each.act for each in here.audit_records()[-3:]] == ["grant", "revoke-certificate", "withdraw"]
        assert here.verify_audit() is None


def test_many_replicas_grant_at_once(postgres_url: str, tmp_path: Path) -> None:
    there, here = replicas(postgres_url, tmp_path)
    with there, here:
        cores = (there, here)
        threads = [
            threading.Thread(
                target=lambda core, number: core.grant(f"cn:g{number % 5}", "acme", "records", ["wrap"]),
                args=(cores[number % 2], number),
            )
            for number in range(20)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [each.identity for each in here.grants()] == [f"cn:g{number}" for number in range(5)]
        assert sum(each.act == "grant" for each in here.audit_records()) == 5
        assert here.verify_audit() is None


def test_answers_go_on_through_an_outage_without_waiting(
    own_postgres: PostgresServer, tmp_path: Path
) -> None:
    there, here = replicas(own_postgres.create_database("grants"), tmp_path)
    with there, here:
        there.grant(ONE, "acme", "records", ["unwrap"])
        until(lambda: may(here))
        own_postgres.stop()
        slowest, ends = 0.0, time.monotonic() + 3
        while time.monotonic() < ends:
            started = time.monotonic()
            assert may(here)
            slowest = max(slowest, time.monotonic() - started)
            time.sleep(0.01)
        print(f"slowest answer in the outage: {slowest:.3f} s")
        with pytest.raises(StoreUnavailable) as caught:
            here.withdraw(ONE, "acme", "records")
        assert caught.value.retryable
        own_postgres.start()
        until(lambda: _withdrawn(there))
        until(lambda: not may(here))


def _withdrawn(core: openkcm.Core) -> bool:
    try:
        core.withdraw(ONE, "acme", "records")
    except StoreUnavailable:
        return False
    return True
