# SPDX-License-Identifier: Apache-2.0
"""A process that may start no more threads: what a Gateway would do beside its callers is done by them, or later."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

import openkcm
from openkcm import waiting
from openkcm.errors import CoreUnavailable, TenantDark, Unavailable
from openkcm.gateway import PoolPolicy
from openkcm.gateway.errands import Errands
from openkcm.gateway.expiry import Expiry
from openkcm.hands import Hands
from openkcm.rpc.server.serving import CoreServer
from openkcm.testing.tcp_proxy import TcpProxy
from openkcm.waiting import THREADS
from remote_support import until
from rpc_support import Site
from support import refused

OURS = (
    "openkcm-refill",
    "openkcm-shred",
    "openkcm-watch",
    "openkcm-retry",
    "openkcm-hand",
    "test-errands",
)
"""What a Gateway's threads are called; a server in this process has its own."""


@contextlib.contextmanager
def no_threads(monkeypatch: pytest.MonkeyPatch, first: int = 0) -> Iterator[list[str]]:
    """Let a Gateway start no thread, but for so many; what would have been started."""
    start, wanted = threading.Thread.start, []

    def refuse(self: threading.Thread) -> None:
        if isinstance(self, threading.Timer) or self.name.startswith(OURS):
            wanted.append(self.name)
            if len(wanted) > first:
                raise RuntimeError("can't start new thread")
        start(self)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        patch.setattr(waiting, "HANDS", Hands())  # those that wait for the next call would lend one
        yield wanted


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def server(site: Site) -> Iterator[CoreServer]:
    with site.serve() as server:
        yield server


class Worker:
    """An errand."""

    def __init__(self) -> None:
        self.runs = 0

    def run(self) -> None:
        self.runs += 1


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was told of threads."""
    return [each.getMessage() for each in caplog.records if "no thread" in each.getMessage()]


def test_errands_wait_for_the_next_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    errands, first, second = Errands("test-errands"), Worker(), Worker()
    with no_threads(monkeypatch):
        for _ in range(3):
            errands.ask(first.run)
    assert len(said(caplog)) == 1
    assert first.runs == 0
    errands.ask(second.run)
    until(lambda: first.runs == second.runs == 1)
    errands.stop()


def test_side_by_side_is_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for first, count in ((0, 1), (1, 2), (9, 4)):
        calls: list[int] = []

        def work(calls: list[int] = calls) -> None:
            calls.append(1)
            time.sleep(0.05)  # so that it is not lent again for the same call

        with no_threads(monkeypatch, first):
            THREADS.together(4, work)
        assert len(calls) == count


def test_what_needs_a_thread_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with no_threads(monkeypatch):
        for start in (
            lambda: THREADS.spawn(lambda: None, "openkcm-watch"),
            lambda: THREADS.timer(1.0, lambda: None),
        ):
            assert refused(start, Unavailable).retryable  # type: ignore[attr-defined]


def test_columns_and_batches(
    site: Site, server: CoreServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with (
        site.connect(server.ports, deadline=20) as remote,
        openkcm.Gateway(remote, keys=tmp_path / "keys.db") as gateway,
        no_threads(monkeypatch) as wanted,
    ):
        service = gateway.service("acme", "records")
        rows = [b"%d" % at for at in range(5000)]
        assert service.decrypt_many(service.encrypt_many(rows)) == rows
        names = pa.array([f"u{at % 7}" for at in range(5000)])
        sealed = service.encrypt_column(pa.array(rows), subjects=names, threads=3)
        assert service.decrypt_column(sealed, threads=3).to_pylist() == rows
        assert {"openkcm-watch-guard", "openkcm-hand"} <= set(wanted)


@pytest.mark.parametrize("first", [0, 1])
def test_a_gateway_works_without_being_told_and_listens_when_it_can(
    site: Site,
    server: CoreServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    first: int,
) -> None:
    server.core.set_lease("acme", "records", 600)
    with site.connect(server.ports, deadline=20) as remote, openkcm.Gateway(remote) as gateway:
        with no_threads(monkeypatch, first):
            service = gateway.service("acme", "records")
            blob = service.encrypt(b"x")
            for _ in range(3):
                assert service.decrypt(blob) == b"x"
            assert remote._watcher is None
            assert not service._leases.kept, "a kill would not be heard of"
            until(lambda: not any(each.name == "openkcm-watch-guard" for each in threading.enumerate()))
        assert len([each for each in said(caplog) if "listened to" in each]) == 1
        held = service._pool.ready
        assert service.decrypt(blob) == b"x"
        until(remote._heard)
        until(lambda: held is None or held.keys.wiped)  # of the time before the Core was heard
        server.core.kill("acme")
        refused(lambda: service.decrypt(blob), TenantDark)


def test_no_key_is_kept_that_time_would_not_wipe(
    site: Site, server: CoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.core.set_lease("acme", "records", 600)
    with site.connect(server.ports, deadline=20) as remote, openkcm.Gateway(remote) as gateway:
        service = gateway.service("acme", "records")
        blob = service.encrypt(b"x")
        until(remote._heard)
        service._leases._expiry = expiry = Expiry(THREADS)  # with no timer yet of what others wait for
        with no_threads(monkeypatch):
            assert service.decrypt(blob) == b"x"
            assert not service._leases.kept
        until(remote._heard)
        assert service.decrypt(blob) == b"x"
        assert len(service._leases.kept) == 1
        with no_threads(monkeypatch):
            expiry._tick()  # and has no timer any more
            assert not service._leases.kept


def test_pools_and_tombstones(
    site: Site, server: CoreServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with (
        TcpProxy(("127.0.0.1", server.ports["data"])) as proxy,
        site.connect({"data": proxy.port}, deadline=1.0) as remote,
        openkcm.Gateway(remote, keys=tmp_path / "keys.db", pool=PoolPolicy(keys=8)) as gateway,
    ):
        service = gateway.service("acme", "records")
        blobs = [service.encrypt(b"x", subject=name) for name in ("ann", "bob")]
        # Of what was asked for so far nothing is left to do.
        until(lambda: not any(each._due for each in gateway._background._every))
        until(lambda: not any(each._running for each in gateway._background._every))
        with no_threads(monkeypatch) as wanted:
            assert len({service.encrypt(b"y") for _ in range(30)}) == 30
            assert "openkcm-refill" in wanted
            proxy.refuse()
            assert service.shred("ann")
            assert "openkcm-shred" in wanted
            refused(lambda: service.decrypt(blobs[0]), openkcm.KeyDestroyed)
        proxy.heal()
        assert service.encrypt(b"y")
        proxy.refuse()
        assert service.shred("bob")
        proxy.heal()
        until(lambda: not gateway._keys.pending(b"", 10))


def test_an_address_that_failed_is_tried_when_there_is_a_thread_again(
    site: Site, server: CoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TcpProxy(("127.0.0.1", server.ports["data"])) as proxy:
        ports = [{"data": proxy.port}, server.ports]
        with site.connect(ports, deadline=5.0) as remote:
            first = remote._endpoints._all[0]
            proxy.refuse()
            with no_threads(monkeypatch):
                for _ in range(3):
                    remote.find_service("acme", "records")
                assert first.failures and not remote._endpoints._trying
            proxy.heal()
            remote.find_service("acme", "records")  # which the second answers
            until(lambda: not first.failures)
    refused(lambda: remote.find_service("acme", "records"), CoreUnavailable)
