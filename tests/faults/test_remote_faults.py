# SPDX-License-Identifier: Apache-2.0
"""The network and the machines fail under a Gateway's load: nothing is lost, nothing hangs, and outages say so."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import openkcm
from openkcm.errors import CoreUnavailable, TenantDark
from openkcm.gateway import PoolPolicy, ServiceHandle
from openkcm.rpc.client.remote import RemoteCore
from openkcm.testing.tcp_proxy import TcpProxy
from remote_support import until
from rpc_support import Site
from support import refused

DEADLINE = 2.0


class Load:
    """Threads that encrypt and decrypt records and subjects' records, each checking what it gets back.

    Attributes:
        outcomes: how often each came: "ok", or the name of an error's class.
        slowest: the longest call, in seconds.
    """

    def __init__(self, service: ServiceHandle, threads: int = 4) -> None:
        self._service = service
        self._stop = threading.Event()
        self.outcomes: Counter[str] = Counter()
        self.kept: list[tuple[bytes, bytes]] = []
        self.slowest = 0.0
        self.wrong: list[str] = []
        self._threads = [threading.Thread(target=self._work, args=(number,)) for number in range(threads)]
        for each in self._threads:
            each.start()

    def _work(self, number: int) -> None:
        count = 0
        while not self._stop.is_set():
            count += 1
            data = b"%d-%d" % (number, count)
            subject = f"user-{count % 5}" if count % 3 == 0 else None
            begun = time.monotonic()
            try:
                blob = self._service.encrypt(data, subject=subject)
                self.kept.append((blob, data))  # acknowledged
                if self._service.decrypt(blob) != data:
                    self.wrong.append("another record came back")
                self.outcomes["ok"] += 1
            except CoreUnavailable:
                self.outcomes["CoreUnavailable"] += 1
            except Exception as error:
                self.wrong.append(f"{type(error).__name__}: {error}")
            self.slowest = max(self.slowest, time.monotonic() - begun)

    def goes_on(self) -> None:
        """Wait for successes that began after now."""
        seen = self.outcomes["ok"]
        until(lambda: self.outcomes["ok"] > seen + 20)

    def stop(self) -> None:
        self._stop.set()
        for each in self._threads:
            each.join(60)
        assert not any(each.is_alive() for each in self._threads), "a call hangs"
        assert not self.wrong, self.wrong[:3]

    def all_decrypt(self) -> None:
        """What was acknowledged is there."""
        some = random.sample(self.kept, min(len(self.kept), 5000))
        assert self._service.decrypt_many([blob for blob, _ in some]) == [data for _, data in some]


@contextmanager
def loaded(remote: RemoteCore, folder: Path) -> Iterator[Load]:
    with openkcm.Gateway(remote, keys=folder / "k.db", pool=PoolPolicy(keys=32)) as gateway:
        load = Load(gateway.service("acme", "records"))
        try:
            load.goes_on()
            yield load
        finally:
            load.stop()
        load.all_decrypt()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_connections_that_are_cut_are_made_again(site: Site, tmp_path: Path) -> None:
    with (
        site.serve() as server,
        TcpProxy(("127.0.0.1", server.ports["data"])) as proxy,
        site.connect({"data": proxy.port}, deadline=DEADLINE) as remote,
        loaded(remote, tmp_path) as load,
    ):
        for _ in range(15):
            proxy.cut()
            load.goes_on()
    # Each cut meets at most the four calls that are under way, and most of these are made again.
    assert load.outcomes["CoreUnavailable"] <= 15
    assert load.outcomes["ok"] > 300


@pytest.mark.parametrize("fault", ["black_hole", "refuse", "cut"])
def test_the_second_address_takes_over_and_the_first_comes_back(
    site: Site, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openkcm.rpc.client.listener.RETURN_SECONDS", 0.5)
    with ExitStack() as stack:
        server = stack.enter_context(site.serve())
        target = ("127.0.0.1", server.ports["data"])
        first, second = (stack.enter_context(TcpProxy(target)) for _ in range(2))
        ports = [{"data": first.port}, {"data": second.port}]
        remote = stack.enter_context(site.connect(ports, deadline=DEADLINE))
        load = stack.enter_context(loaded(remote, tmp_path))
        getattr(first, fault)()
        load.goes_on()
        if fault != "cut":
            until(lambda: remote._endpoints.in_order()[0].address.endswith(str(second.port)))
            first.heal()
        until(lambda: remote._endpoints.in_order()[0].address.endswith(str(first.port)))
        load.goes_on()
    assert load.outcomes["CoreUnavailable"] == 0, "the other address was there all the time"
    # An encrypt for a subject and a decrypt are up to four calls.
    assert load.slowest < 4 * DEADLINE + 2


def test_an_outage_is_told_in_time_and_ends_by_itself(site: Site, tmp_path: Path) -> None:
    with (
        site.serve() as server,
        TcpProxy(("127.0.0.1", server.ports["data"])) as proxy,
        site.connect({"data": proxy.port}, deadline=DEADLINE) as remote,
        loaded(remote, tmp_path) as load,
    ):
        proxy.black_hole()
        until(lambda: load.outcomes["CoreUnavailable"] >= 4)
        proxy.heal()
        load.goes_on()
    assert load.slowest < 4 * DEADLINE + 2


def test_a_slow_network_is_no_outage(site: Site, tmp_path: Path) -> None:
    with (
        site.serve() as server,
        TcpProxy(("127.0.0.1", server.ports["data"])) as proxy,
        site.connect({"data": proxy.port}, deadline=DEADLINE) as remote,
        loaded(remote, tmp_path) as load,
    ):
        proxy.delay(0.1)
        load.goes_on()
        assert remote._watcher is not None
        assert remote._watcher.is_heard()
    assert load.outcomes["CoreUnavailable"] == 0


def test_what_a_link_held_back_is_as_old_as_it_is(site: Site) -> None:
    """Heartbeats that come late and evenly are no word of now: a kill would be heard of as late as they are."""
    with (
        site.serve() as server,
        TcpProxy(("127.0.0.1", server.ports["data"])) as proxy,
        site.connect({"data": proxy.port}, deadline=20) as remote,
        openkcm.Gateway(remote) as gateway,
    ):
        server.core.set_lease("acme", "records", 600)
        service = gateway.service("acme", "records")
        blob = service.encrypt(b"x")
        until(lambda: service.decrypt(blob) == b"x" and len(service._leases.kept) == 1)
        watcher = remote._watcher
        assert watcher is not None
        proxy.delay(1.5)
        last = watcher._heard
        until(lambda: watcher._heard > last + 1.0)  # what was sent since then comes in
        until(lambda: not watcher.is_heard())
        ends = time.monotonic() + 1.5
        while time.monotonic() < ends:
            assert not watcher.is_heard()
            time.sleep(0.005)
        server.core.kill("acme")
        refused(lambda: service.decrypt(blob), TenantDark)
        proxy.delay(0.0)
        until(watcher.is_heard)


def test_replicas_that_are_killed_are_not_missed(site: Site, tmp_path: Path) -> None:
    with ExitStack() as stack:
        replicas = [stack.enter_context(site.start(name)) for name in ("one", "two")]
        proxies = [stack.enter_context(TcpProxy(("127.0.0.1", each.ports["data"]))) for each in replicas]
        ports = [{"data": each.port} for each in proxies]
        remote = stack.enter_context(site.connect(ports, deadline=5))
        load = stack.enter_context(loaded(remote, tmp_path))
        for at in (0, 1, 0, 1):
            time.sleep(random.uniform(0, 0.2))
            replicas[at].kill()
            load.goes_on()
            replicas[at].start()
            proxies[at].divert(("127.0.0.1", replicas[at].ports["data"]))
            address = f":{proxies[at].port}"
            until(lambda address=address: _is_well(remote, address))
    assert load.outcomes["CoreUnavailable"] == 0, "the other replica was there all the time"


def _is_well(remote: RemoteCore, address: str) -> bool:
    return any(each.address.endswith(address) and not each.failures for each in remote._endpoints.in_order())


def test_a_core_that_is_restarted_knows_no_session_and_is_met_anew(site: Site, tmp_path: Path) -> None:
    with ExitStack() as stack:
        first, second = (stack.enter_context(site.serve()) for _ in range(2))
        proxy = stack.enter_context(TcpProxy(("127.0.0.1", first.ports["data"])))
        remote = stack.enter_context(site.connect({"data": proxy.port}, deadline=5))
        load = stack.enter_context(loaded(remote, tmp_path))
        for server in (second, first, second):
            before = remote._endpoints.in_order()[0].peek()
            proxy.divert(("127.0.0.1", server.ports["data"]))
            until(lambda before=before: remote._endpoints.in_order()[0].peek() is not before)
            load.goes_on()
    assert load.outcomes["CoreUnavailable"] <= 4
    assert load.outcomes["ok"] > 60


def test_somebody_in_between_who_answers_nonsense(site: Site) -> None:
    with (
        site.serve() as server,
        site.serve() as other,
        TcpProxy(("127.0.0.1", server.ports["data"])) as proxy,
        site.connect({"data": proxy.port}, deadline=1) as remote,
        openkcm.Gateway(remote) as gateway,
    ):
        service = gateway.service("acme", "records")
        blob = service.encrypt(b"x")
        proxy.divert(
            ("127.0.0.1", other.ports["grpc"])
        )  # whose certificate is right, and whose words are not
        begun = time.monotonic()
        refused(lambda: service.decrypt(blob), CoreUnavailable)
        assert time.monotonic() - begun < 5
