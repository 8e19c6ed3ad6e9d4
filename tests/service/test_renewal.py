# SPDX-License-Identifier: Apache-2.0
"""A Gateway's certificate is replaced in its files while the Gateway is in use, over both transports."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import openkcm
from fault_support import running
from openkcm.errors import AccessDenied, CoreUnavailable
from openkcm.gateway import ServiceHandle
from openkcm.rpc.client.endpoint import Endpoint
from openkcm.rpc.client.grpc_client import GrpcTransport
from openkcm.rpc.client.own import OwnFiles
from openkcm.rpc.server.serving import CoreServer
from remote_support import until
from rpc_support import Site
from support import refused


class Used:
    """A server, and a Gateway of it that has decrypted something."""

    def __init__(
        self, site: Site, server: CoreServer, tls: openkcm.TLS, scheme: str, stack: ExitStack
    ) -> None:
        self.site = site
        self.server = server
        port = server.ports["grpc" if scheme else "data"]
        self.remote = stack.enter_context(openkcm.connect(f"{scheme}127.0.0.1:{port}", tls=tls))
        gateway = stack.enter_context(openkcm.Gateway(self.remote))
        self.service: ServiceHandle = gateway.service("acme", "records")
        self.blob = self.service.encrypt(b"x")
        assert self.service.decrypt(self.blob) == b"x"
        until(self.remote._heard)

    @property
    def endpoint(self) -> Endpoint:
        return self.remote._endpoints._all[0]

    @property
    def own(self) -> OwnFiles:
        return self.endpoint.own

    def shown(self) -> bytes:
        """The certificate that connections are made with."""
        assert self.endpoint._lines.line is not None
        return self.endpoint._lines.line.reading.credentials.leaf

    def watches_with_the_newest(self) -> bool:
        """Whether the watch stream is of the certificate in use, and heard."""
        watcher = self.remote._watcher
        return (
            watcher is not None
            and watcher._shown is self.own.reading
            and self.remote._endpoints.heard is not None
        )


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture(params=["", "grpc://"], ids=["frames", "grpc"])
def used(site: Site, request: pytest.FixtureRequest) -> Iterator[Used]:
    with site.serve() as server, ExitStack() as stack:
        yield Used(site, server, copied(site), request.param, stack)


def copied(site: Site, who: str = "gateway") -> openkcm.TLS:
    """The files of a Gateway, or an operator, in a place where they can be replaced one by one."""
    tls, folder = site.tls(who), site.folder / "own"
    folder.mkdir()
    paths = {name: folder / name for name in ("certificate", "key", "roots")}
    for name, path in paths.items():
        path.touch(0o600)
        path.write_bytes(Path(getattr(tls, name)).read_bytes())
    return openkcm.TLS(**paths)


def renew(site: Site, *names: str, who: str = "gateway") -> bytes:
    """Renew the certificate, and have these files be the new ones'; the certificate in DER."""
    issued = site.ca.renew(who)
    replace(site, *names, who=who)
    return issued.der


def replace(site: Site, *names: str, who: str = "gateway") -> None:
    found = site.ca.find(who)
    for name in names:
        new = site.folder / "own" / f"{name}.new"
        new.touch(0o600)
        new.write_bytes(Path(getattr(found, name)).read_bytes())
        new.rename(site.folder / "own" / name)


def test_a_gateway_under_use_survives_a_renewal(used: Used) -> None:
    old, events = used.shown(), used.remote._changes

    def use() -> None:
        assert used.service.decrypt(used.service.encrypt(b"y")) == b"y"
        assert used.service.decrypt_many([used.blob] * 3) == [b"x"] * 3

    with running(use, use, use) as errors:
        new = renew(used.site, "certificate", "key")
        until(lambda: errors or (used.shown() == new and used.watches_with_the_newest()))
        # Nothing of the old one is in use any more.
        used.server.core.revoke_certificate(old)
        assert used.service.decrypt(used.blob) == b"x"
    until(used.remote._heard)
    assert used.watches_with_the_newest()
    assert used.remote._changes == events, "nothing had to be wiped"


@pytest.mark.parametrize("first", ["certificate", "key"])
def test_files_that_are_replaced_one_after_the_other(
    used: Used, first: str, caplog: pytest.LogCaptureFixture
) -> None:
    old = used.shown()
    second = "key" if first == "certificate" else "certificate"
    new = renew(used.site, first)
    for _ in range(3):
        assert used.own.look().credentials.leaf == old
    used.endpoint.close()  # so that all is made anew, with what fits together
    assert used.service.decrypt(used.blob) == b"x"
    assert used.shown() == old
    assert sum("cannot be used now" in each.getMessage() for each in caplog.records) == 1
    replace(used.site, second)
    assert used.own.look().credentials.leaf == new
    assert used.service.decrypt(used.blob) == b"x"
    assert used.shown() == new


def test_a_certificate_that_was_revoked_before_the_new_one_was_seen(used: Used) -> None:
    old, events = used.shown(), used.remote._changes
    used.own._next = math.inf  # it is not looked at the files by themselves
    new = renew(used.site, "certificate", "key")
    used.server.core.revoke_certificate(old)
    assert used.service.decrypt(used.blob) == b"x"
    assert used.shown() == new
    until(used.watches_with_the_newest)
    assert used.remote._changes == events, "nothing had to be wiped"


def test_a_watch_stream_of_a_revoked_certificate_goes_on_with_the_new_one(used: Used) -> None:
    old, events = used.shown(), used.remote._changes
    used.own._next = math.inf
    new = renew(used.site, "certificate", "key")
    used.server.core.revoke_certificate(old)
    # Without a call.
    until(lambda: used.own.reading.credentials.leaf == new and used.watches_with_the_newest())
    assert used.remote._changes == events, "nothing had to be wiped"


def test_who_is_refused_without_a_new_certificate_is_refused(used: Used) -> None:
    used.server.core.revoke_certificate(used.shown())
    refused(lambda: used.service.decrypt(used.blob), AccessDenied)
    renew(used.site, "certificate", "key")
    assert used.service.decrypt(used.blob) == b"x"


def test_calls_under_way_end_with_the_certificate_that_they_began_with(
    used: Used, monkeypatch: pytest.MonkeyPatch
) -> None:
    unwrap, go, came = used.server.core.unwrap_keys, threading.Event(), threading.Event()

    def held(*given: Any) -> Any:
        if not came.is_set():
            came.set()
            assert go.wait(20)
        return unwrap(*given)

    monkeypatch.setattr(used.server.core, "unwrap_keys", held)
    got: list[Any] = []
    caller = threading.Thread(target=lambda: got.append(outcome(lambda: used.service.decrypt(used.blob))))
    caller.start()
    assert came.wait(20)
    line = used.endpoint._lines.line
    assert line is not None
    new = renew(used.site, "certificate", "key")
    used.own.look()
    other = used.service.encrypt_many([b"y"])[0]
    assert used.service.decrypt(other) == b"y"
    assert used.shown() == new
    assert caller.is_alive() and not is_closed(line.transport)
    go.set()
    caller.join(20)
    assert got == [b"x"]
    until(lambda: is_closed(line.transport))


def test_a_gateway_that_is_closed_ends_what_was_retired(used: Used) -> None:
    line = used.endpoint._lines.line
    assert line is not None
    until(lambda: used.remote._endpoints.heard is not None)
    stream = line.transport.stream("Watch", b"")
    assert next(stream)
    renew(used.site, "certificate", "key")
    used.own.look()
    assert used.service.decrypt(used.blob) == b"x"
    assert next(stream)  # it goes on
    used.remote.close()
    refused(lambda: list(stream), CoreUnavailable)


def outcome(act: Callable[[], Any]) -> Any:
    try:
        return act()
    except Exception as error:
        return error


def is_closed(transport: Any) -> bool:
    """Whether a transport has no connection any more."""
    if isinstance(transport, GrpcTransport):
        return not transport._under_way and refused_by_grpc(transport)
    return not transport._links


def refused_by_grpc(transport: GrpcTransport) -> bool:
    try:
        transport._channel.unary_unary("/none/None")(b"", timeout=5)
    except ValueError:
        return True
    except Exception:
        return False
    return False


def test_an_operator_goes_on_with_the_new_one(site: Site) -> None:
    site.appoint()
    with (
        site.serve(**{"listen.admin": "127.0.0.1:0"}) as server,
        openkcm.connect_admin(f"127.0.0.1:{server.ports['admin']}", tls=copied(site, "chief")) as chief,
    ):
        old = site.ca.find("chief").der
        assert chief.status()
        new = renew(site, "certificate", "key", who="chief")
        assert new != old
        server.core.revoke_certificate(old)
        chief._own._next = math.inf  # only who is refused looks
        assert chief.status()
        server.core.revoke_certificate(new)
        refused(chief.status, AccessDenied)
        renew(site, "certificate", "key", who="chief")
        chief._own._next = 0.0
        assert chief.status()
