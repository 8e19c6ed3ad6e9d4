# SPDX-License-Identifier: Apache-2.0
"""Two replicas on one PostgreSQL, of which one or the other is killed in the middle of whatever it does.

No Gateway's caller notices: there is no error, nothing acknowledged is lost, and nobody is brought back.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import openkcm
from fault_support import SOAK, Ledger, PostgresSite, running
from openkcm.testing.postgres import PostgresServer
from openkcm.testing.tcp_proxy import TcpProxy
from rpc_support import Replica

WRITERS = READERS = 2


class Pair:
    """Two replicas, each behind an address that stays when it is started anew."""

    def __init__(self, site: PostgresSite, replicas: list[Replica], fronts: list[TcpProxy]) -> None:
        self.site = site
        self.replicas = replicas
        self._fronts = fronts

    @property
    def ports(self) -> list[dict[str, int]]:
        """Where Gateways reach them."""
        return [{"data": front.port} for front in self._fronts]

    def lose(self, at: int) -> None:
        """SIGKILL, and a new process in its place."""
        self.replicas[at].kill()
        self.replicas[at].start()
        self._fronts[at].divert(("127.0.0.1", self.replicas[at].ports["data"]))


@contextmanager
def pair(folder: Path, server: PostgresServer) -> Iterator[Pair]:
    """Both of them; they end with the block."""
    site = PostgresSite(folder, server)
    with ExitStack() as stack:
        replicas = [stack.enter_context(site.start_replica(name)) for name in ("one", "two")]
        fronts = [stack.enter_context(TcpProxy(("127.0.0.1", replica.ports["data"]))) for replica in replicas]
        yield Pair(site, replicas, fronts)


def rotate(pair: Pair) -> None:
    """A new version of the service key now and then, at a replica that may be killed over it."""
    time.sleep(0.1)
    replica = random.choice(pair.replicas)
    try:
        with pair.site.admin(replica) as admin:
            admin.rotate_service("acme", "records")
    except openkcm.Unavailable as error:
        assert error.retryable, error


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=SOAK)])
def test_replicas_are_killed_at_random_moments(
    kills: int, tmp_path: Path, postgres_server: PostgresServer
) -> None:
    with pair(tmp_path, postgres_server) as both:
        with both.site.connect(both.ports, deadline=30) as remote, _gateway(remote, tmp_path) as gateway:
            ledger = Ledger(gateway.service("acme", "records"))
            ledger.encrypt()
            writers, readers = [ledger.encrypt] * WRITERS, [ledger.decrypt] * READERS
            with running(*writers, *readers, ledger.people, lambda: rotate(both)) as errors:
                for number in range(kills):
                    time.sleep(random.uniform(0, 0.5))
                    both.lose(number % 2)
                    if errors:
                        break
        print(f"{kills} kills, {ledger.calls} calls, the longest took {ledger.longest:.2f} s")
        for ports in both.ports:
            with both.site.connect(ports, deadline=30) as remote, _gateway(remote, tmp_path) as gateway:
                ledger.verify(gateway.service("acme", "records"))


def _gateway(remote: openkcm.RemoteCore, folder: Path) -> openkcm.Gateway:
    return openkcm.Gateway(remote, keys=folder / "keys.db")
