# SPDX-License-Identifier: Apache-2.0
"""A Core's watch streams: what an outage of its store leaves behind, and what beginning them can keep from others."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from frame_support import SECONDS, eventually
from openkcm import Core
from openkcm.errors import CoreUnavailable, LimitExceeded, OpenKCMError, StoreUnavailable
from openkcm.rpc import keys_pb2 as pb
from openkcm.rpc.client.grpc_client import GrpcTransport
from openkcm.rpc.frames.client import FrameTransport
from openkcm.rpc.peer import Peer
from openkcm.rpc.server import streams
from openkcm.rpc.server.streams import OPENINGS, Streams
from openkcm.rpc.transport import Transport
from rpc_support import Site
from support import make_vault, refused

GATEWAY = "cn:gateway"


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Core]:
    with make_vault(tmp_path) as core:
        core.grant(GATEWAY, "acme", "*", ["unwrap"])
        yield core


def peer(name: str = "one") -> Peer:
    """A peer of the Gateway's identity, with a certificate of this name."""
    return Peer(GATEWAY, name.encode(), (name.encode(), name.encode()), 1e12)


def since(core: Core, position: int = 1) -> pb.WatchRequest:
    """A request that takes a stream up."""
    return pb.WatchRequest(vault=core.vault_id, position=position)


class Away:
    """Stands in the place of something that asks the store, which does not answer."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise StoreUnavailable("the database is away")


class Silent:
    """As ``Away``, but it is waited for."""

    def __init__(self) -> None:
        self.asked = threading.Semaphore(0)
        self.go = threading.Event()

    def __call__(self, *_: Any, **__: Any) -> list[Any]:
        self.asked.release()
        assert self.go.wait(SECONDS)
        return []


def test_an_outage_of_the_store_leaves_no_streams_behind(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Streams(core, most=3)
    with monkeypatch.context() as patch:
        patch.setattr(core, "changes_after", Away())
        for _ in range(10):
            refused(lambda: watched.open(peer(), since(core)), StoreUnavailable)
    opened = [watched.open(peer(), since(core)) for _ in range(3)]
    for each in opened:
        watched.drop(each)
    watched.close()


def test_so_it_is_when_only_the_grants_are_not_known(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    watched, sees = Streams(core, most=3), core.access.sees

    def known_in_part(identity: str, tenant: str) -> bool:
        return sees(identity, tenant) if tenant == "*" else Away()()

    with monkeypatch.context() as patch:
        patch.setattr(core.access, "sees", known_in_part)
        for _ in range(10):
            refused(lambda: watched.open(peer(), since(core)), StoreUnavailable)
    for _ in range(3):
        watched.open(peer(), since(core))
    watched.close()


def test_few_streams_ask_the_store_at_a_time_and_others_are_told_to_try_again(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = Silent()
    monkeypatch.setattr(core, "changes_after", silent)
    monkeypatch.setattr(streams, "OPENING_SECONDS", 0.01)
    watched = Streams(core)
    first = [threading.Thread(target=watched.open, args=(peer(), since(core))) for _ in range(OPENINGS)]
    for each in first:
        each.start()
    try:
        for _ in first:
            assert silent.asked.acquire(timeout=SECONDS)
        error = refused(lambda: watched.open(peer(), since(core)), CoreUnavailable)
        assert error.retryable  # type: ignore[attr-defined]
        assert watched.open(peer(), pb.WatchRequest())  # who holds nothing missed nothing
    finally:
        silent.go.set()
        for each in first:
            each.join()
    assert watched.open(peer(), since(core))
    watched.close()


def test_one_certificate_has_not_all_streams(core: Core) -> None:
    watched = Streams(core, most=5, each=2)
    mine = [watched.open(peer("one"), since(core)) for _ in range(2)]
    for _ in range(9):
        refused(lambda: watched.open(peer("one"), since(core)), LimitExceeded)
    watched.open(peer("two"), since(core))
    watched.drop(mine[0])
    watched.drop(mine[0])  # once more, as who ends a stream twice does
    watched.open(peer("one"), since(core))
    refused(lambda: watched.open(peer("one"), since(core)), LimitExceeded)
    watched.close()


def test_none_is_begun_after_the_end(core: Core) -> None:
    watched = Streams(core)
    watched.close()
    refused(lambda: watched.open(peer(), since(core)), CoreUnavailable)


@pytest.mark.parametrize("way", ["data", "grpc"])
def test_a_server_takes_streams_again_after_an_outage(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path)
    with site.serve(**{"limits.streams": 3}) as server:
        address, pem = f"127.0.0.1:{server.ports[way]}", site.tls().pem
        transport: Transport = (
            FrameTransport(address, pem) if way == "data" else GrpcTransport(address, pem, None)
        )
        request = since(server.core).SerializeToString()
        try:
            with monkeypatch.context() as patch:
                patch.setattr(server.core, "changes_after", Away())
                for _ in range(5):
                    with pytest.raises(StoreUnavailable):
                        next(transport.stream("Watch", request))
            opened = [transport.stream("Watch", request) for _ in range(3)]
            for each in opened:
                assert pb.WatchReply.FromString(next(each)).vault == server.core.vault_id
            with pytest.raises(OpenKCMError, match="as many watch streams"):
                next(transport.stream("Watch", request))
            for each in opened:
                each.cancel()
            eventually(lambda: _begins(transport, request))
        finally:
            transport.close()


def _begins(transport: Transport, request: bytes) -> bool:
    stream = transport.stream("Watch", request)
    try:
        return bool(next(stream))
    except OpenKCMError:
        return False
    finally:
        stream.cancel()
