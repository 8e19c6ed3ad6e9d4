# SPDX-License-Identifier: Apache-2.0
"""Whom a Gateway asks and whom it listens to: the same replica if that can be, and a key is kept on its word alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import openkcm
from openkcm.errors import CoreUnavailable
from openkcm.rpc.client import listener as listener_module
from openkcm.rpc.client.listener import MOST_CLOCKS, Dates
from openkcm.rpc.client.own import OwnFiles
from openkcm.rpc.client.remote import RemoteCore
from openkcm.rpc.frames.client import FrameTransport
from openkcm.rpc.transport import Stream
from remote_support import until
from rpc_support import Site


class Partial:
    """A transport of which calls, streams or both may fail."""

    def __init__(self, address: str, tls: openkcm.TLS) -> None:
        self._inner = FrameTransport(address, tls.pem)
        self.opens = self.streams = True
        self.asked = 0

    def call(self, method: str, request: bytes, seconds: float) -> bytes:
        """As ``Transport.call``."""
        if method == "UnwrapKeys":
            self.asked += 1
            if not self.opens:
                raise CoreUnavailable("this Core has more calls than it takes; try another")
        return self._inner.call(method, request, seconds)

    def stream(self, method: str, request: bytes) -> Stream:
        """As ``Transport.stream``."""
        if not self.streams:
            raise CoreUnavailable("nobody watches here")
        return self._inner.stream(method, request)

    def retire(self) -> None:
        """As ``Transport.retire``."""
        self._inner.retire()

    def close(self) -> None:
        """As ``Transport.close``."""
        self._inner.close()


class Two:
    """Two replicas, the first of which is preferred, and a Gateway that was granted a lease."""

    def __init__(self, site: Site, ports: list[int]) -> None:
        with openkcm.Core.open(site.store) as core:
            core.set_lease("acme", "records", 600)
        self.all = {f"127.0.0.1:{port}": Partial(f"127.0.0.1:{port}", site.tls()) for port in ports}
        self.first, self.second = self.all.values()
        own = OwnFiles(site.tls().read)
        self.remote = RemoteCore(list(self.all), lambda address, reading: self.all[address], own, deadline=20)
        self.gateway = openkcm.Gateway(self.remote)

    def listens_to(self, transport: Partial) -> bool:
        """Whether the watch stream is there."""
        heard = self.remote._endpoints.heard
        return heard is not None and self.all[heard.address] is transport and self.remote._heard()

    def kept(self) -> int:
        """Decrypt twice: the keys that are kept afterwards."""
        handle = self.gateway.service("acme", "records")
        blob = handle.encrypt(b"x")
        assert [handle.decrypt(blob), handle.decrypt(blob)] == [b"x", b"x"]
        return len(handle._opener._leases.kept)

    def close(self) -> None:
        """Close everything."""
        self.gateway.close()
        self.remote.close()


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Two]:
    site = Site(tmp_path)
    with site.serve(name="one") as one, site.serve(name="two") as other:
        both = Two(site, [one.ports["data"], other.ports["data"]])
        yield both
        both.close()


def test_the_one_that_is_listened_to_is_asked(two: Two) -> None:
    two.first.streams = False
    two.kept()
    until(lambda: two.listens_to(two.second) and not two.remote._endpoints._all[0].failures)
    before = two.first.asked
    assert two.kept() > 0
    assert two.first.asked == before


def test_a_key_from_another_than_the_one_listened_to_is_not_kept(two: Two) -> None:
    assert two.kept() > 0
    assert two.listens_to(two.first)
    two.first.opens = False
    two.gateway.service("acme", "records").wipe()
    assert two.kept() == 0
    assert two.second.asked >= 2, "it was answered, by the other"
    two.first.opens = True
    until(lambda: two.kept() > 0)


def test_a_stream_goes_back_to_the_preferred_address(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "RETURN_SECONDS", 0.5)
    two.first.streams = False
    two.kept()
    until(lambda: two.listens_to(two.second))
    two.first.streams = True
    until(lambda: two.listens_to(two.first))
    assert not two.remote._endpoints._all[1].failures, "it was left, and did not fail"


# ---- when a reply was sent ---------------------------------------------------------------------------------


def test_what_comes_late_is_dated_by_what_came_faster() -> None:
    dates = Dates()
    assert dates.of(b"one", 100.0, 7.3) == pytest.approx(7.3)  # nothing was faster
    assert dates.of(b"one", 100.25, 7.5) == pytest.approx(7.5)  # by 0.05 s
    assert dates.of(b"one", 100.5, 7.9) == pytest.approx(7.75, abs=0.001)
    assert dates.of(b"one", 101.0, 11.0) == pytest.approx(8.25, abs=0.005)
    assert dates.of(b"two", 5.0, 11.1) == pytest.approx(11.1)  # another replica, or the same after a restart
    assert dates.of(b"one", 103.8, 11.2) == pytest.approx(11.05, abs=0.005)
    assert dates.of(b"", 0.0, 12.0) == 12.0  # a Core that does not say


@pytest.mark.parametrize("rate", [0.9991, 1.0009])
def test_clocks_that_part_slowly(rate: float) -> None:
    dates = Dates()
    for step in range(0, 400_000, 250):
        now = step / 1000
        assert now - 0.05 < dates.of(b"core", 50 + now * rate, now) <= now


def test_clocks_that_are_remembered() -> None:
    dates = Dates()
    dates.of(b"first", 0.0, 0.0)
    for at in range(MOST_CLOCKS - 1):
        dates.of(b"%d" % at, 0.0, 0.0)
    assert dates.of(b"first", 1.0, 4.0) == pytest.approx(1.0, abs=0.01)
    for at in range(100):
        dates.of(b"%d" % at, 0.0, 0.0)
    assert len(dates._differences) == MOST_CLOCKS
