# SPDX-License-Identifier: Apache-2.0
"""Which address is asked, how often and for how long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from openkcm.errors import AccessDenied, CoreUnavailable, InvalidInput, OpenKCMError
from openkcm.pki import DevelopmentCA
from openkcm.rpc import keys_pb2 as pb
from openkcm.rpc.client import endpoint as endpoint_module
from openkcm.rpc.client import remote as client_module
from openkcm.rpc.client.own import OwnFiles
from openkcm.rpc.client.remote import RemoteCore
from openkcm.rpc.credentials import read_files
from openkcm.rpc.transport import Stream
from remote_support import until
from support import refused

FOUND = pb.FindServiceReply(region="local", service_id=b"service-id-1").SerializeToString()


class FakeTransport:
    """One address: answers, fails, refuses, or says nothing until the time is up."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float]] = []
        self.act: Callable[[], None] = lambda: None
        self.closed = threading.Event()

    def call(self, method: str, request: bytes, seconds: float) -> bytes:
        self.calls.append((method, seconds))
        if self.act is SILENT:
            self.closed.wait(seconds)
            raise CoreUnavailable("it did not answer in time")
        self.act()
        if method == "OpenChannel":
            raise AccessDenied("an answer, which is all that matters here")
        return FOUND

    def stream(self, method: str, request: bytes) -> Stream:
        raise CoreUnavailable("nobody watches here")

    def retire(self) -> None:
        raise AssertionError("no certificate is replaced here")

    def close(self) -> None:
        self.closed.set()

    def asked(self) -> int:
        """How often a caller asked."""
        return sum(method == "FindService" for method, _ in self.calls)


def SILENT() -> None:  # a constant that can be called
    raise AssertionError


def fail(error: OpenKCMError) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


GONE = fail(CoreUnavailable("the connection was cut"))


class Addresses:
    """Three addresses and a client of them."""

    def __init__(self, own: OwnFiles) -> None:
        self.all = {f"127.0.0.1:{port}": FakeTransport() for port in (1, 2, 3)}
        self.first, self.second, self.third = self.all.values()
        self.own = own

    def connect(self, count: int = 3, **options: Any) -> RemoteCore:
        return RemoteCore(
            list(self.all)[:count], lambda address, reading: self.all[address], self.own, **options
        )

    def asked(self) -> list[int]:
        return [each.asked() for each in self.all.values()]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> OwnFiles:
    ca = DevelopmentCA.create(tmp_path_factory.mktemp("pki"))
    issued = ca.issue_client("gateway", spiffe="spiffe://example/gateway")
    return OwnFiles(lambda: read_files(issued.certificate, issued.key, ca.certificate_path))


@pytest.fixture
def addresses(own: OwnFiles) -> Iterator[Addresses]:
    made = Addresses(own)
    yield made
    for each in made.all.values():
        each.close()


def find(core: RemoteCore) -> object:
    return core.find_service("acme", "records")


def test_the_first_address_is_preferred(addresses: Addresses) -> None:
    with addresses.connect() as core:
        for _ in range(5):
            find(core)
    assert addresses.asked() == [5, 0, 0]


def test_an_address_that_fails_is_asked_last_until_it_is_back(
    addresses: Addresses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_module, "FIRST_PAUSE_SECONDS", 0.01)
    addresses.first.act = GONE
    with addresses.connect() as core:
        for _ in range(5):
            find(core)
        assert addresses.asked() == [1, 5, 0], "callers find out once"
        until(lambda: len(addresses.first.calls) > 3)  # it is tried again, by nobody's call
        assert addresses.asked() == [1, 5, 0]
        addresses.first.act = lambda: None
        until(lambda: core._endpoints.in_order()[0].address == "127.0.0.1:1")
        find(core)
        assert addresses.asked() == [2, 5, 0]


def test_one_that_says_nothing_does_not_use_up_the_time_of_the_others(addresses: Addresses) -> None:
    addresses.first.act = SILENT
    with addresses.connect(deadline=3.0) as core:
        begun = time.monotonic()
        find(core)
        assert time.monotonic() - begun < 3.0
        assert addresses.first.calls[0][1] <= 1.0
        assert addresses.asked() == [1, 1, 0]


def test_a_calls_whole_time_is_bounded(addresses: Addresses) -> None:
    for each in addresses.all.values():
        each.act = SILENT
    with addresses.connect(deadline=0.6) as core:
        begun = time.monotonic()
        assert refused(lambda: find(core), CoreUnavailable).retryable  # type: ignore[attr-defined]
        assert 0.5 < time.monotonic() - begun < 10
    # Where the machine was slow, there was no time left for the last.
    assert addresses.asked() in ([1, 1, 1], [1, 1, 0])


def test_an_address_that_is_alone_is_asked_twice(addresses: Addresses) -> None:
    addresses.first.act = GONE
    with addresses.connect(1) as core:
        refused(lambda: find(core), CoreUnavailable)
        assert addresses.asked() == [client_module.ROUNDS, 0, 0]

        def once() -> None:
            addresses.first.act = lambda: None
            raise CoreUnavailable("the connection was cut")

        addresses.first.act = once
        find(core)
        assert addresses.asked()[0] == client_module.ROUNDS + 2


@pytest.mark.parametrize("kind", [AccessDenied, InvalidInput, OpenKCMError])
def test_a_refusal_is_an_answer(addresses: Addresses, kind: type[OpenKCMError]) -> None:
    addresses.first.act = fail(kind("no"))
    with addresses.connect() as core:
        for _ in range(3):
            refused(lambda: find(core), kind)
    assert addresses.asked() == [3, 0, 0]


def test_a_closed_core_says_so(addresses: Addresses) -> None:
    core = addresses.connect()
    core.close()
    core.close()
    assert not refused(lambda: find(core), CoreUnavailable).retryable  # type: ignore[attr-defined]
    assert addresses.asked() == [0, 0, 0]


def test_nothing_is_connected_before_it_is_used(own: OwnFiles) -> None:
    made: list[object] = []
    before = threading.active_count()
    core = RemoteCore(["127.0.0.1:1"], lambda *given: made.append(given), own)  # type: ignore[arg-type]
    core.watch(lambda event: None)
    assert made == []
    assert threading.active_count() == before
    core.close()


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:65536", "host:x", "host:-1"])
def test_addresses_are_checked(address: str, own: OwnFiles, tmp_path: Path) -> None:
    refused(lambda: RemoteCore([address], FakeTransport, own), InvalidInput)  # type: ignore[arg-type]


def test_there_is_an_address_and_a_deadline(own: OwnFiles) -> None:
    refused(lambda: RemoteCore([], FakeTransport, own), InvalidInput)  # type: ignore[arg-type]
    refused(
        lambda: RemoteCore(["127.0.0.1:1"], FakeTransport, own, deadline=0),  # type: ignore[arg-type]
        InvalidInput,
    )
