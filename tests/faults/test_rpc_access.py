# SPDX-License-Identifier: Apache-2.0
"""Every call of both interfaces, by everybody who may not make it: refused, recorded, and told nothing.

The calls are those of the protocol's own descriptors, so that a new one cannot be forgotten.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

import openkcm
from openkcm import AccessDenied, Core
from openkcm.pki import DevelopmentCA
from openkcm.rpc import admin_pb2, keys_pb2, wire
from openkcm.rpc.frames.client import FrameTransport
from openkcm.rpc.session import Credentials, begin
from rpc_support import VERBS, Replica, Site
from support import refused

KEYS = keys_pb2.DESCRIPTOR.services_by_name["Keys"]
ADMINISTRATION = admin_pb2.DESCRIPTOR.services_by_name["Administration"]
CALLS = [(service, method) for service in (KEYS, ADMINISTRATION) for method in service.methods]
PORTS = {KEYS.full_name: "grpc", ADMINISTRATION.full_name: "admin"}

UNKNOWN = "spiffe://example/unknown"
OTHER = "spiffe://example/other"
"""Has no grant; may do everything with the tenant bolt and nothing with acme."""
OTHERS_OWN = ("OpenChannel", "Watch")
"""What is about no tenant, and a tenant's identity may do therefore."""
DEADLINE = 15.0
UNREACHABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class Place(NamedTuple):
    """A Core that serves in a process of its own, and who is to be refused there."""

    site: Site
    replica: Replica
    elsewhere: DevelopmentCA

    def address(self, service: Any) -> str:
        """Where a service is."""
        return f"127.0.0.1:{self.replica.ports[PORTS[service.full_name]]}"

    def audited(self, after: int) -> list[str]:
        """What was refused since a record."""
        with Core.open(self.site.store) as core:
            details = [each.detail for each in core.audit_records(after) if each.act == "refused"]
        return [each for detail in details for each in detail.split("; ")]

    def audited_of(self, identity: str, after: int) -> set[str]:
        """The calls that were refused to an identity since a record."""
        lines = [each.split(" refused to ") for each in self.audited(after)]
        calls = [calls.split(", ") for calls, whom in lines if whom.partition(" at ")[0] == identity]
        return {call.rpartition(" x ")[2] for each in calls for call in each}

    def last(self) -> int:
        """The number of the last record."""
        with Core.open(self.site.store) as core:
            return core.audit_records()[-1].number


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Two tenants, their identities, and another CA."""
    folder = tmp_path_factory.mktemp("site")
    site = Site(folder, "acme", "bolt")
    elsewhere = DevelopmentCA.create(folder / "elsewhere")
    elsewhere.issue_client("gateway", spiffe="spiffe://example/gateway/one")
    past = DevelopmentCA.open(
        folder / "pki", now=lambda: datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=10)
    )
    past.issue_client("expired", spiffe="spiffe://example/gateway/one", days=5)
    site.issue("unknown", UNKNOWN)
    site.issue("other", OTHER)
    with Core.open(site.store) as core:
        core.grant(OTHER, "bolt", "*", [*VERBS, "administer"])
    with site.start(**{"listen.admin": "127.0.0.1:0", "roots": ["local:"]}) as replica:
        yield Place(site, replica, elsewhere)
    said = replica.log.read_text()
    assert "Traceback" not in said
    assert "exception" not in said


# ---- requests that are whole ---------------------------------------------------------------------------------------

_VALUES: dict[str, Any] = {
    "service_id": bytes(12),
    "session": bytes(16),
    "nonce": bytes(16),
    "wrapped": bytes(72),
    "sealed_keys": bytes(8 + 32 + 16),
    "public_key": bytes(32),
    "kind": 1,
    "version": 1,
    "root": "local:/nowhere",
    "identity": "cn:somebody",
    "verbs": ["wrap"],
    "certificate": bytes(32),
}


def fill(message: Message, tenant: str) -> Message:
    """A request about a tenant, with every field that there is something sensible for."""
    for field in message.DESCRIPTOR.fields:
        if field.name == "service" and field.type == FieldDescriptor.TYPE_MESSAGE:
            fill(message.service, tenant)  # type: ignore[attr-defined]
        elif field.name in ("tenant", "service"):
            setattr(message, field.name, tenant if field.name == "tenant" else "records")
        elif field.name in _VALUES:
            value = _VALUES[field.name]
            if isinstance(value, list):
                getattr(message, field.name).extend(value)
            else:
                setattr(message, field.name, value)
    return message


def request(method: Any, tenant: str = "acme") -> bytes:
    """The bytes of a request of a method."""
    return fill(GetMessageClass(method.input_type)(), tenant).SerializeToString()


class Refusal(NamedTuple):
    """All that a caller is told."""

    code: grpc.StatusCode
    details: str
    failure: bytes


def ask(channel: grpc.Channel, service: Any, method: Any, data: bytes) -> Refusal | None:
    """Make a call; None if it was answered."""
    path = f"/{service.full_name}/{method.name}"
    try:
        if method.server_streaming:
            stream = channel.unary_stream(path)(data, timeout=DEADLINE)
            next(stream)
            stream.cancel()
        else:
            channel.unary_unary(path)(data, timeout=DEADLINE)
    except grpc.RpcError as error:
        trailing = dict(error.trailing_metadata() or ())
        return Refusal(error.code(), error.details() or "", trailing.get(wire.FAILURE_KEY, b""))
    return None


@contextlib.contextmanager
def channel(place: Place, service: Any, tls: openkcm.TLS | None) -> Iterator[grpc.Channel]:
    """A gRPC channel with a certificate, or without."""
    roots = place.site.ca.certificate_path.read_bytes()
    key, chain = (None, None) if tls is None else tls.pem()[:2]
    credentials = grpc.ssl_channel_credentials(roots, key, chain)
    with grpc.secure_channel(
        place.address(service), credentials, options=[("grpc.use_local_subchannel_pool", 1)]
    ) as made:
        yield made


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.05)


def test_all_calls_are_known_here() -> None:
    assert {len(service.methods) for service in (KEYS, ADMINISTRATION)} == {8, 19}
    for _, method in CALLS:
        assert (
            request(method) != request(method, "missing") or "tenant" not in method.input_type.fields_by_name
        )


# ---- who has no certificate that counts --------------------------------------------------------------------------


def bearer(place: Place, kind: str) -> openkcm.TLS | None:
    """Who is turned away at the handshake."""
    if kind == "no certificate":
        return None
    if kind == "expired certificate":
        return place.site.tls("expired")
    found = place.elsewhere.find("gateway")
    return openkcm.TLS(found.certificate, found.key, place.site.ca.certificate_path)


@pytest.mark.parametrize(
    "kind", ["no certificate", "expired certificate", "certificate of no authority of ours"]
)
def test_no_call_is_reached_without_a_good_certificate(place: Place, kind: str) -> None:
    before = place.last()
    for service, method in CALLS:
        with channel(place, service, bearer(place, kind)) as made:
            refusal = ask(made, service, method, request(method))
        assert refusal is not None
        assert refusal.code in UNREACHABLE
        assert refusal.failure == b""
    until(lambda: sum(kind in each for each in place.audited(before)) >= 1)


def connection(place: Place, service: Any, tls: openkcm.TLS | None, version: ssl.TLSVersion) -> ssl.SSLSocket:
    """A TLS connection of one version."""
    context = ssl.create_default_context(cafile=place.site.ca.certificate_path)
    context.check_hostname = False
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    if tls is not None:
        context.load_cert_chain(tls.certificate, tls.key)
    host, port = place.address(service).split(":")
    return context.wrap_socket(socket.create_connection((host, int(port)), DEADLINE))


def test_tls_is_1_3_or_there_is_none(place: Place) -> None:
    before = place.last()
    for service in (KEYS, ADMINISTRATION):
        with connection(place, service, place.site.tls(), ssl.TLSVersion.TLSv1_3) as made:
            assert made.version() == "TLSv1.3"
        with pytest.raises(OSError, match=r"EOF|reset|alert|handshake"):
            connection(place, service, place.site.tls(), ssl.TLSVersion.TLSv1_2)
    until(lambda: any("TLS below 1.3" in each for each in place.audited(before)))


def test_plaintext_is_no_way_in(place: Place) -> None:
    before = place.last()
    for service, method in CALLS:
        with grpc.insecure_channel(place.address(service)) as made:
            refusal = ask(made, service, method, request(method))
        assert refusal is not None
        assert refusal.code in UNREACHABLE
    until(lambda: any("not TLS" in each for each in place.audited(before)))


# ---- who has a certificate, and may not ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["unknown", "other"])
def test_who_has_no_grant_there_is_told_nothing(place: Place, name: str) -> None:
    before, seen = place.last(), set()
    identity = {"unknown": UNKNOWN, "other": OTHER}[name]
    for service, method in CALLS:
        if name == "other" and method.name in OTHERS_OWN:
            continue
        with channel(place, service, place.site.tls(name)) as made:
            for tenant in ("acme", "missing"):
                refusal = ask(made, service, method, request(method, tenant))
                assert refusal is not None, f"{method.name} was answered"
                seen.add(refusal)
    # The same bytes for every call, whether what it is about is there or not.
    assert len(seen) == 1
    (refusal,) = seen
    assert refusal.code is grpc.StatusCode.PERMISSION_DENIED
    assert refusal.details == wire.REFUSED
    wanted = {m.name for _, m in CALLS if name == "unknown" or m.name not in OTHERS_OWN}
    until(lambda: wanted <= place.audited_of(identity, before))


@pytest.mark.parametrize("name", ["unknown", "other"])
def test_it_is_the_same_over_frames(place: Place, name: str) -> None:
    transport = FrameTransport(f"127.0.0.1:{place.replica.ports['data']}", place.site.tls(name).pem)
    said = set()
    try:
        for method in KEYS.methods:
            if method.server_streaming or (name == "other" and method.name in OTHERS_OWN):
                continue
            for tenant in ("acme", "missing"):
                with pytest.raises(AccessDenied) as caught:
                    transport.call(method.name, request(method, tenant), DEADLINE)
                said.add(str(caught.value))
    finally:
        transport.close()
    assert said == {wire.REFUSED}


def test_a_whole_hello_of_one_without_a_grant_opens_no_channel(place: Place) -> None:
    tls = place.site.tls("unknown")
    offer, hello = begin(Credentials.load(tls.certificate, tls.key, tls.roots))
    data = keys_pb2.ChannelHello(
        lowest_version=hello.lowest_version,
        highest_version=hello.highest_version,
        public_key=hello.public_key,
        certificates=hello.certificates,
        signature=hello.signature,
    ).SerializeToString()
    offer.key.wipe()
    with channel(place, KEYS, tls) as made:
        refusal = ask(made, KEYS, KEYS.methods_by_name["OpenChannel"], data)
    assert refusal is not None
    assert refusal.code is grpc.StatusCode.PERMISSION_DENIED


def test_what_another_tenants_identity_may_watch_is_its_own(place: Place) -> None:
    with channel(place, KEYS, place.site.tls("other")) as made:
        stream = made.unary_stream(f"/{KEYS.full_name}/Watch")(b"", timeout=DEADLINE)
        heard = keys_pb2.WatchReply.FromString(next(stream))
        assert not any(each.tenant for each in heard.events)
        with Core.open(place.site.store) as core:
            for tenant in ("acme", "bolt"):
                core.kill(tenant)
                core.restore(tenant)
        tenants: set[str] = set()
        while "bolt" not in tenants:
            tenants |= {each.tenant for each in keys_pb2.WatchReply.FromString(next(stream)).events}
        assert tenants - {""} == {"bolt"}  # of no tenant: that grants have changed
        stream.cancel()


def test_a_revoked_certificate_does_nothing_more_on_open_connections_too(place: Place) -> None:
    identity = "spiffe://example/leaver"
    tls = place.site.issue("leaver", identity)
    with Core.open(place.site.store) as core:
        core.grant(identity, "acme", "*", [*VERBS])
        core.grant(identity, "*", "*", ["administer"])
    with contextlib.ExitStack() as stack:
        made = {each: stack.enter_context(channel(place, each, tls)) for each in (KEYS, ADMINISTRATION)}
        find, status = KEYS.methods_by_name["FindService"], ADMINISTRATION.methods_by_name["Status"]
        until(lambda: ask(made[KEYS], KEYS, find, request(find)) is None)
        until(lambda: ask(made[ADMINISTRATION], ADMINISTRATION, status, request(status)) is None)
        before = place.last()
        with Core.open(place.site.store) as core:
            core.revoke_certificate(place.site.ca.find("leaver").der, "left")
        until(lambda: ask(made[KEYS], KEYS, find, request(find)) is not None)
        seen = {
            ask(made[service], service, method, request(method, tenant))
            for service, method in CALLS
            for tenant in ("acme", "missing")
        }
        assert len(seen) == 1
        (refusal,) = seen
        assert refusal is not None
        assert refusal.code is grpc.StatusCode.PERMISSION_DENIED
        with Core.open(place.site.store) as core:
            assert core.status("acme")[0].state == "live"
        wanted = {method.name for _, method in CALLS}
        until(lambda: wanted <= place.audited_of(identity, before))
    with channel(place, KEYS, tls) as again:
        refusal = ask(again, KEYS, find, request(find))
        assert refusal is not None
        assert refusal.code is grpc.StatusCode.PERMISSION_DENIED


def test_the_log_has_who_what_and_how_long_and_nothing_of_the_call(place: Place) -> None:
    def failed() -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in place.replica.log.read_text().splitlines()]
        return [line for line in lines if line["message"] == "a call failed"]

    before = len(failed())
    address = f"grpc://127.0.0.1:{place.replica.ports['grpc']}"
    with openkcm.connect(address, tls=place.site.tls("unknown"), deadline=20) as core:
        refused(lambda: core.find_service("acme", "records"), AccessDenied)
    until(lambda: len(failed()) > before)
    for line in failed():
        assert {"identity", "method", "code", "ms", "address"} <= set(line)
    assert Path(place.replica.log).stat().st_size < 2_000_000
