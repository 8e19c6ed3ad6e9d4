# SPDX-License-Identifier: Apache-2.0
"""gRPC calls whose message does not come: they keep nobody else waiting, least of all a kill."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

import openkcm
from openkcm import Core
from openkcm.rpc.server.arrivals import Arrivals
from remote_support import until
from rpc_support import Site

SECONDS = 20.0
METHODS = {"grpc": ("UnwrapKeys", "Watch"), "admin": ("KillTenant", "Status")}
SERVICES = {"grpc": "openkcm.v1.Keys", "admin": "openkcm.v1.Administration"}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Certificates, a vault and an operator."""
    site = Site(tmp_path)
    site.appoint()
    return site


@contextmanager
def silent(site: Site, ports: dict[str, int], who: dict[str, str], each: int) -> Iterator[list[grpc.Call]]:
    """Calls of every kind that were begun and never say anything."""
    never = threading.Event()
    calls: list[grpc.Call] = []
    channels = []
    for port, names in METHODS.items():
        key, chain, roots = site.tls(who[port]).pem()
        channel = grpc.secure_channel(
            f"127.0.0.1:{ports[port]}", grpc.ssl_channel_credentials(roots, key, chain)
        )
        channels.append(channel)
        for name in names:
            call = channel.stream_stream(f"/{SERVICES[port]}/{name}")
            calls += [call(iter(never.wait, True)) for _ in range(each)]
    try:
        yield calls
    finally:
        never.set()
        for each_call in calls:
            each_call.cancel()
        for channel in channels:
            channel.close()


def test_whoever_may_nothing_is_not_waited_for(site: Site) -> None:
    site.issue("stranger", "spiffe://example/stranger")
    listen = {"listen.admin": "127.0.0.1:0", "limits.threads": 2, "limits.streams": 4}
    with (
        site.serve(**listen) as server,
        silent(site, server.ports, {"grpc": "stranger", "admin": "stranger"}, 20) as calls,
    ):
        until(lambda: not any(each.is_active() for each in calls))
        assert {each.code() for each in calls} == {grpc.StatusCode.PERMISSION_DENIED}
        until(lambda: _recorded(server.core, "stranger"))


def _recorded(core: Core, identity: str) -> bool:
    return any(identity in record.detail for record in core.audit_records() if record.act == "refused")


def test_whoever_may_is_not_waited_for_for_long(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openkcm.rpc.server.serving.Arrivals", lambda: Arrivals(0.2))
    listen = {"listen.admin": "127.0.0.1:0", "limits.threads": 2, "limits.streams": 4}
    with (
        site.serve(**listen) as server,
        silent(site, server.ports, {"grpc": "gateway", "admin": "chief"}, 4) as calls,
        openkcm.connect(f"grpc://127.0.0.1:{server.ports['grpc']}", tls=site.tls(), deadline=SECONDS) as core,
        openkcm.connect_admin(
            f"127.0.0.1:{server.ports['admin']}", tls=site.tls("chief"), deadline=SECONDS
        ) as admin,
    ):
        assert core.find_service("acme", "records").name == "records"
        until(lambda: not any(each.is_active() for each in calls))
        admin.kill("acme")
        assert admin.status("acme")[0].state == "dark"


def test_a_call_without_a_message_is_refused(site: Site) -> None:
    with site.serve(**{"listen.admin": "127.0.0.1:0"}) as server:
        key, chain, roots = site.tls("chief").pem()
        with grpc.secure_channel(
            f"127.0.0.1:{server.ports['admin']}", grpc.ssl_channel_credentials(roots, key, chain)
        ) as channel:
            call = channel.stream_unary(f"/{SERVICES['admin']}/Status")
            with pytest.raises(grpc.RpcError) as caught:
                call(iter(()), timeout=SECONDS)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
