# SPDX-License-Identifier: Apache-2.0
"""The administrative interface: the same acts as on a vault, for those who may and in their name."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import openkcm
from openkcm import AccessDenied, InvalidInput, RemoteAdmin
from openkcm.cli.app import run
from openkcm.core import Core as CoreType
from openkcm.crypto import generate_keys
from openkcm.keys import Kind
from openkcm.rpc import admin_pb2 as pb
from openkcm.rpc.peer import Peer
from openkcm.rpc.server.admin_handlers import CLOUD_ROOTS, AdminHandlers, _begins
from openkcm.rpc.server.denials import Denials
from openkcm.rpc.server.serving import CoreServer
from rpc_support import CHIEF, GATEWAY, Site
from support import refused

CLERK = "spiffe://example/operator/clerk"
"""May administer everything; may administer the tenant acme."""


class Served(NamedTuple):
    """A Core that serves, its certificates, and its two operators."""

    site: Site
    server: CoreServer
    chief: RemoteAdmin
    clerk: RemoteAdmin

    @property
    def core(self) -> CoreType:
        """What is administered."""
        return self.server.core

    def root(self, name: str) -> str:
        """A development root."""
        return f"local:{self.site.folder / name}.root"

    def as_whom(self, name: str) -> RemoteAdmin:
        """The interface to the holder of a certificate."""
        return openkcm.connect_admin(f"127.0.0.1:{self.server.ports['admin']}", tls=self.site.tls(name))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Certificates and a vault with the tenants acme and bolt."""
    site = Site(tmp_path_factory.mktemp("site"), "acme", "bolt")
    site.appoint()
    site.appoint("clerk", CLERK, "acme")
    site.issue("stranger", "spiffe://example/stranger")
    return site


@pytest.fixture(scope="module")
def served(site: Site) -> Iterator[Served]:
    """A Core that serves them."""
    with site.serve(**{"listen.admin": "127.0.0.1:0", "roots": ["local:"]}) as server:
        address = f"127.0.0.1:{server.ports['admin']}"
        with (
            openkcm.connect_admin(address, tls=site.tls("chief")) as chief,
            openkcm.connect_admin(address, tls=site.tls("clerk")) as clerk,
        ):
            yield Served(site, server, chief, clerk)


def test_it_does_what_the_core_does_and_answers_alike(served: Served) -> None:
    chief, core = served.chief, served.core
    chief.link_tenant("corp", served.root("corp"))
    made = chief.create_service("corp", "files")
    assert made == core.find_service("corp", "files")
    assert chief.rotate_service("corp", "files") == 2
    assert chief.rotate_tenant("corp") == 2
    chief.set_lease("corp", "files", 2.5)
    assert chief.status("corp") == core.status("corp")
    assert chief.status() == core.status()
    assert chief.list_tenants() == core.list_tenants()
    assert chief.list_services("corp") == core.list_services("corp")
    assert chief.list_services("corp")[0].lease == 2.5
    assert chief.probe("corp").state == "live"
    assert set(chief.root_changed(served.root("corp"))) == {"corp"}
    chief.replace_root("corp", served.root("other"))
    assert core.status("corp")[0].root == served.root("other")
    chief.kill("corp", "a reason")
    assert core.status("corp")[0].reason == "a reason"
    chief.restore("corp")
    assert core.status("corp")[0].state == "live"
    chief.unlink("corp")
    refused(lambda: chief.status("corp"), openkcm.TenantNotFound)


def test_grants_and_revocations_are_the_cores(served: Served) -> None:
    chief, core = served.chief, served.core
    assert chief.grant("cn:batch", "acme", "records", ["unwrap", "wrap"]) == ("wrap", "unwrap")
    assert chief.grant("cn:batch", "acme", "records", ["wrap"]) == ()
    assert chief.grants("cn:batch") == core.grants("cn:batch") != []
    assert chief.grants() == core.grants()
    assert chief.withdraw("cn:batch", "acme", "records", ["wrap"]) == ("wrap",)
    assert chief.withdraw("cn:batch", "acme", "records") == ("unwrap",)
    certificate = served.site.ca.issue_client("lost", spiffe="spiffe://example/lost")
    assert chief.revoke_certificate(certificate.der, "stolen") == chief.revoked()[0].fingerprint
    assert chief.revoked() == core.revoked()
    assert chief.verify_audit() is None
    assert chief.audit_records() == core.audit_records()
    assert chief.audit_records(after=3, most=2) == core.audit_records(3, 2)


def test_records_come_in_parts(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openkcm.rpc.server.admin_handlers.MOST_RECORDS", 3)
    assert len(served.core.audit_records()) > 6
    assert served.chief.audit_records() == served.core.audit_records()


def test_every_act_names_who_had_it_done(served: Served) -> None:
    before = len(served.core.audit_records())
    served.clerk.kill("acme", "for a test")
    served.clerk.restore("acme")
    served.clerk.create_service("acme", "mail")
    served.chief.grant("cn:named", "acme", "*", ["wrap"])
    served.core.withdraw("cn:named", "acme", "*")  # embedded: nobody's name
    assert [(each.act, each.detail) for each in served.core.audit_records(before)] == [
        ("kill", f"for a test; by {CLERK}"),
        ("restore", f"by {CLERK}"),
        ("create-service", f"by {CLERK}"),
        ("grant", f"cn:named: wrap on acme *; by {CHIEF}"),
        ("withdraw", "cn:named: wrap on acme *"),
    ]


def test_the_name_of_who_did_it_is_never_cut_off(served: Served) -> None:
    served.chief.kill("acme", "x" * 5000)
    served.chief.restore("acme")
    killed = served.core.audit_records()[-2]
    assert killed.act == "kill"
    assert killed.detail.endswith(f"; by {CHIEF}")
    assert len(killed.detail) <= 1024
    assert served.core.verify_audit() is None


def test_what_a_tenants_operator_may(served: Served) -> None:
    clerk = served.clerk
    assert [each.tenant for each in clerk.status("acme")] == ["acme"]
    assert clerk.probe("acme").state == "live"
    clerk.set_lease("acme", "records", 0)
    for call in (
        lambda: clerk.status(),
        lambda: clerk.status("bolt"),
        lambda: clerk.kill("bolt"),
        lambda: clerk.probe("bolt"),
        lambda: clerk.rotate_service("bolt", "records"),
        lambda: clerk.unlink("acme"),
        lambda: clerk.link_tenant("mine", served.root("mine")),
        lambda: clerk.replace_root("acme", served.root("mine")),
        lambda: clerk.grant(CLERK, "bolt", "*", ["administer"]),
        lambda: clerk.withdraw(GATEWAY, "acme", "*"),
        lambda: clerk.grants(CLERK),
        lambda: clerk.revoke_certificate(bytes(32)),
        lambda: clerk.revoked(),
        lambda: clerk.audit_records(),
        lambda: clerk.verify_audit(),
        lambda: clerk.root_changed(served.root("acme")),
    ):
        refused(call, AccessDenied)
    assert served.core.status("bolt")[0].state == "live"


@pytest.mark.parametrize("name", ["chief", "clerk"])
def test_who_administers_does_not_use_data_keys(served: Served, name: str) -> None:
    service = served.core.find_service("acme", "records")
    keys = generate_keys(1)
    wrapped = served.core.wrap_keys(service, keys, Kind.INLINE)
    with served.site.connect(served.server.ports, name) as core:
        for call in (
            lambda: core.find_service("acme", "records"),
            lambda: core.wrap_keys(service, keys, Kind.INLINE),
            lambda: core.unwrap_keys(service, wrapped),
            lambda: core.rewrap_keys(service, wrapped),
            lambda: core.shred_keys(service, bytes(16)),
            lambda: core.shredded(service, bytes(16)),
        ):
            refused(call, AccessDenied)


def test_who_uses_data_keys_does_not_administer(served: Served) -> None:
    with served.site.connect(served.server.ports) as core:
        assert core.find_service("acme", "records") == served.core.find_service("acme", "records")
    with served.as_whom("gateway") as gateway:
        refused(lambda: gateway.status("acme"), AccessDenied)
        refused(lambda: gateway.kill("acme"), AccessDenied)


def test_nobody_is_given_both_over_the_network(served: Served) -> None:
    for identity, verbs in (
        (CHIEF, ["unwrap"]),
        (GATEWAY, ["administer"]),
        ("cn:new", ["wrap", "administer"]),
    ):
        refused(
            lambda identity=identity, verbs=verbs: served.chief.grant(identity, "acme", "*", verbs),
            InvalidInput,
        )  # type: ignore[misc]
    assert {each.verb for each in served.core.grants(CHIEF)} == {"administer"}


def test_only_named_roots_are_linked_over_the_network(served: Served) -> None:
    denials = Denials(lambda line: None)
    handlers = AdminHandlers(
        served.core, denials, (*CLOUD_ROOTS, "bao-transit://bao.example/transit", "pkcs11:")
    )
    for uri in (
        "aws-kms://arn:aws:kms:eu-central-1:1:key/x",
        "bao-transit://bao.example/transit/key",
        "pkcs11:object=k",
    ):
        assert handlers._check_root(uri) == uri
    for uri in (
        "local:/etc/passwd",
        "LOCAL:/etc/passwd",
        "bao-transit://bao.example.org/transit/key",
        "bao-transit://bao.example/transit2/key",
        "pkcs11:object=k?module-path=/tmp/evil.so",
        "pkcs11:object=k?pin-source=file:/etc/shadow",
        "aws-kms:x",
        "",
    ):
        refused(lambda uri=uri: handlers._check_root(uri), InvalidInput)  # type: ignore[misc]
    assert _begins("local:x", "local:x")
    refused(lambda: served.chief.link_tenant("corp2", "bao-transit://bao.example/transit/key"), InvalidInput)
    assert not (Path("/etc") / "openkcm-nothing").exists()


def test_a_refusal_says_the_same_whatever_exists(served: Served) -> None:
    with served.as_whom("stranger") as stranger:
        said = {
            str(refused(call, AccessDenied))
            for call in (
                lambda: stranger.status("acme"),
                lambda: stranger.status("nobody"),
                lambda: stranger.status(),
                lambda: stranger.create_service("acme", "records"),
                lambda: stranger.kill("acme"),
                lambda: stranger.link_tenant("acme", served.root("acme")),
            )
        }
    assert len(said) == 1


def test_refusals_are_recorded(served: Served) -> None:
    before = len(served.core.audit_records())
    with served.as_whom("stranger") as stranger:
        for _ in range(3):
            refused(lambda: stranger.unlink("acme"), AccessDenied)
    served.server.denials.flush()
    found = [each.detail for each in served.core.audit_records(before) if each.act == "refused"]
    assert any("UnlinkTenant refused to spiffe://example/stranger at" in each for each in found)


def test_a_kill_waits_for_no_other_call(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """All threads of the interface wait for a slow root; a kill goes through."""
    waiting, go = threading.Semaphore(0), threading.Event()

    def slow(tenant: str) -> object:
        waiting.release()
        go.wait(30)
        raise openkcm.RootUnavailable("slow")

    monkeypatch.setattr(served.core, "probe", slow)
    threads = [
        threading.Thread(target=refused, args=(lambda: served.chief.probe("bolt"), openkcm.RootUnavailable))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in range(4):
            assert waiting.acquire(timeout=10)
        began = time.monotonic()
        served.chief.kill("bolt")
        assert time.monotonic() - began < 5
        assert served.core.status("bolt")[0].state == "dark"
    finally:
        go.set()
        for thread in threads:
            thread.join(30)
    served.chief.restore("bolt")


def test_hostile_requests_are_refused_by_type(served: Served) -> None:
    handlers = AdminHandlers(served.core, Denials(lambda line: None), ("local:",))
    peer = Peer(CHIEF, b"leaf", (b"a", b"b"), time.time() + 60)
    requests = {
        "KillTenant": pb.KillTenantRequest(tenant="no such\n", reason="x").SerializeToString(),
        "CreateService": pb.ServiceRequest(tenant="acme", service="*").SerializeToString(),
        "RotateTenant": pb.TenantRequest().SerializeToString(),
        "SetLease": pb.SetLeaseRequest(
            tenant="acme", service="records", seconds=float("nan")
        ).SerializeToString(),
        "AddGrant": pb.GrantRequest(
            identity="root", tenant="*", service="*", verbs=["wrap"]
        ).SerializeToString(),
        "RevokeCertificate": pb.RevokeCertificateRequest(certificate=b"x").SerializeToString(),
        "AuditRecords": b"\xff\xff\xff",
    }
    for name, data in requests.items():
        with pytest.raises((openkcm.InvalidInput, openkcm.FormatError, openkcm.KeyNotFound)):
            handlers.call(name, peer, data)
    most = pb.AuditRecordsRequest(after=2**64 - 1, most=2**32 - 1).SerializeToString()
    assert handlers.call("AuditRecords", peer, most) == b""
    refused(lambda: handlers.call("Status", Peer(CHIEF, b"leaf", (b"a", b"b"), 0.0), b""), AccessDenied)


def test_the_command_line_works_on_a_core_elsewhere(
    served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # where no vault is
    monkeypatch.delenv("OPENKCM_VAULT", raising=False)
    tls = served.site.tls("clerk")
    core = f"127.0.0.1:{served.server.ports['admin']}"
    files = ["--certificate", str(tls.certificate), "--key", str(tls.key), "--roots", str(tls.roots)]

    def call(*arguments: str) -> tuple[int, dict[str, object]]:
        code = run(["--json", *arguments])
        said = capsys.readouterr()
        return code, json.loads(said.out or said.err)

    assert call("tenant", "kill", "acme", "--reason", "drill", "--core", core, *files)[0] == 0
    assert served.core.status("acme")[0].reason == "drill"
    code, said = call("tenant", "restore", "acme", "--core", core)
    assert (code, said["error"]["code"]) == (10, "configuration")  # type: ignore[index]
    for name, value in zip(
        ("CERTIFICATE", "KEY", "ROOTS"), (tls.certificate, tls.key, tls.roots), strict=True
    ):
        monkeypatch.setenv(f"OPENKCM_TLS_{name}", str(value))
    monkeypatch.setenv("OPENKCM_CORE", core)
    assert call("tenant", "restore", "acme")[0] == 0
    assert call("status", "acme")[1]["vault"] == core
    assert call("service", "rotate", "acme", "records")[0] == 0
    assert call("grant", "list")[0] == 9
    assert call("tenant", "probe", "bolt")[0] == 9
    # A vault that is named goes before the environment, and both in one command are a mistake.
    assert call("--vault", "none.db", "status")[0] == 10
    assert call("--vault", "none.db", "status", "--core", core)[0] == 2
    # What needs the keys themselves works on a vault only.
    assert run(["encrypt", "acme", "records", "--core", core]) == 2
    capsys.readouterr()


def test_an_address_that_does_not_answer_is_passed_over_where_that_does_no_harm(served: Served) -> None:
    good = f"127.0.0.1:{served.server.ports['admin']}"
    with openkcm.connect_admin(["127.0.0.1:1", good], tls=served.site.tls("chief"), deadline=10) as admin:
        assert admin.status("acme")
        admin.kill("bolt")
        refused(lambda: admin.restore("bolt"), openkcm.CoreUnavailable)
    served.chief.restore("bolt")
    for wrong in ([], ["nowhere"], "127.0.0.1:x"):
        refused(lambda wrong=wrong: openkcm.connect_admin(wrong, tls=served.site.tls("chief")), InvalidInput)  # type: ignore[misc]
