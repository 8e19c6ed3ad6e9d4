# SPDX-License-Identifier: Apache-2.0
"""A tenant is killed at one of three replicas: a second later nothing of it is decrypted anywhere.

On each replica there are two Gateways, one that asks for every key and one with a long open-lease, both decrypting all
the time. In half of the runs one replica's watch streams fall silent just before the kill, their calls going on, or all
of its Gateways' connections do, another replica being within their reach.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import pytest

import openkcm
from fault_support import SOAK, PostgresSite, until
from openkcm.errors import CoreUnavailable, TenantDark
from openkcm.rpc.client.own import OwnFiles
from openkcm.rpc.client.remote import RemoteCore
from openkcm.rpc.frames.client import FrameTransport
from openkcm.rpc.transport import Stream
from openkcm.testing.postgres import PostgresServer
from openkcm.testing.tcp_proxy import TcpProxy
from rpc_support import Replica

LEASE: Final = 60.0
PROMISE: Final = 1.0
"""Seconds from the kill's acknowledgement."""
STEP: Final = 0.003
"""Between two decrypts of a Gateway."""
HOW_CUT: Final = ("", "stream", "", "link")
"""What becomes of one replica's network, run by run."""


class Split:
    """A transport whose watch streams take another way than its calls, so that one can be cut and not the other."""

    def __init__(self, calls: FrameTransport, streams: FrameTransport) -> None:
        self.call = calls.call
        self._calls = calls
        self._streams = streams

    def stream(self, method: str, request: bytes) -> Stream:
        """As ``Transport.stream``."""
        return self._streams.stream(method, request)

    def retire(self) -> None:
        """As ``Transport.retire``."""
        raise AssertionError("no certificate is replaced here")

    def close(self) -> None:
        """As ``Transport.close``."""
        self._calls.close()
        self._streams.close()


class Place:
    """A replica, and the ways to it."""

    def __init__(self, site: PostgresSite, replica: Replica, stack: ExitStack) -> None:
        self._tls = site.tls()
        target = ("127.0.0.1", replica.ports["data"])
        self.replica = replica
        self.calls = stack.enter_context(TcpProxy(target))
        self.streams = stack.enter_context(TcpProxy(target))

    def transport(self) -> Split:
        """A connector's answer."""
        calls, streams = (
            FrameTransport(f"127.0.0.1:{proxy.port}", self._tls.pem) for proxy in (self.calls, self.streams)
        )
        return Split(calls, streams)

    def cut(self, what: str) -> None:
        """Nothing passes any more, and nobody is told."""
        for proxy in {"stream": (self.streams,), "link": (self.calls, self.streams)}[what]:
            proxy.black_hole()

    def heal(self) -> None:
        """Everything passes again."""
        self.calls.heal()
        self.streams.heal()


class Decrypting:
    """A Gateway that decrypts one record all the time, and when that last succeeded."""

    def __init__(self, site: PostgresSite, places: list[Place], service: str) -> None:
        ways = {f"127.0.0.1:{place.calls.port}": place for place in places}
        self.remote = RemoteCore(
            list(ways),
            lambda address, reading: ways[address].transport(),
            OwnFiles(site.tls().read),
            deadline=2.0,
        )
        self.gateway = openkcm.Gateway(self.remote)
        handle = self.gateway.service("acme", service)
        self._decrypt, self._blob = handle.decrypt, handle.encrypt(b"x")
        self._leased = service == "leased"
        self._service = self.remote.find_service("acme", service)
        self.name = f"{service} at {places[0].replica.config.stem}"
        self.last = self.begun = 0.0
        self.error: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(STEP):
            begun = time.monotonic()
            try:
                assert self._decrypt(self._blob) == b"x"
            except (TenantDark, CoreUnavailable):
                continue
            except BaseException as error:
                self.error = error
                return
            self.begun, self.last = begun, time.monotonic()

    def works(self) -> bool:
        """Whether it has just decrypted, hears its Core, and has the lease that it should."""
        if time.monotonic() - self.last > 0.2 or not self.remote._heard():
            return False
        return self._leased == bool(self.remote.lease(self._service))

    def close(self) -> None:
        """End it; raise what it came across."""
        self._stop.set()
        self._thread.join(30)
        self.gateway.close()
        self.remote.close()
        if self.error is not None:
            raise self.error


@contextmanager
def everywhere(
    folder: Path, server: PostgresServer
) -> Iterator[tuple[PostgresSite, list[Place], list[Decrypting]]]:
    """Three replicas and the Gateways; each prefers one replica, and can reach the next."""
    site = PostgresSite(folder, server, lease=LEASE)
    with ExitStack() as stack:
        names = ("one", "two", "three")
        places = [Place(site, stack.enter_context(site.start_replica(name)), stack) for name in names]
        gateways = []
        for at in range(len(places)):
            for service in ("records", "leased"):
                gateways.append(Decrypting(site, [places[at], places[(at + 1) % 3]], service))
                stack.callback(gateways[-1].close)
        yield site, places, gateways


def kill_and_measure(
    site: PostgresSite, places: list[Place], gateways: list[Decrypting], cut: str
) -> tuple[float, float]:
    """One run: from the kill's acknowledgement to the last success anywhere, and to when that was begun."""
    until(lambda: all(each.works() or each.error for each in gateways), what="decrypting everywhere")
    killer, victim = random.sample(places, 2)
    with site.admin(killer.replica) as admin:
        admin.status("acme")  # the connection is made
        if cut:
            victim.cut(cut)
            time.sleep(random.uniform(0, 0.3))
        admin.kill("acme")
        killed = time.monotonic()
        try:
            time.sleep(2 * PROMISE)
        finally:
            victim.heal()
        last = max(gateways, key=lambda each: each.last)
        measured = last.last - killed, last.begun - killed
        print(f"{cut or 'nothing'} cut: {measured[0] * 1000:.0f} ms after the kill, {last.name}")
        admin.restore("acme")
    return measured


@pytest.mark.parametrize("runs", [4, pytest.param(52, marks=SOAK)])
def test_a_kill_reaches_every_gateway(runs: int, tmp_path: Path, postgres_server: PostgresServer) -> None:
    with everywhere(tmp_path, postgres_server) as (site, places, gateways):
        measured = [
            kill_and_measure(site, places, gateways, HOW_CUT[number % len(HOW_CUT)]) for number in range(runs)
        ]
        last, begun = (max(each) for each in zip(*measured, strict=True))
        print(
            f"{runs} kills: the last decrypt was {last * 1000:.0f} ms after one, begun {begun * 1000:.0f} ms after"
        )
        assert begun < PROMISE  # when it ended is also a matter of when this process was given its turn
