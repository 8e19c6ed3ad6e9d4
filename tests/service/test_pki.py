# SPDX-License-Identifier: Apache-2.0
"""The development CA: certificates that every TLS library takes, files that are whole, keys that are never replaced."""

from __future__ import annotations

import datetime
import ipaddress
import os
import shutil
import ssl
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from openkcm import AlreadyExists, ConfigurationError, InvalidInput, KeyNotFound
from openkcm.identity import identity_of
from openkcm.pki import CertificateState, DevelopmentCA, Issued, Role
from openkcm.pki import authority as module
from support import refused

SPIFFE = "spiffe://example/gateway/one"


def long_ago() -> datetime.datetime:
    """When what has expired was made."""
    return datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=100)


@pytest.fixture
def ca(tmp_path: Path) -> DevelopmentCA:
    return DevelopmentCA.create(tmp_path / "pki")


def server_of(ca: DevelopmentCA, name: str = "core") -> Issued:
    return ca.issue_server(name, dns=["core.example", "localhost"], ips=["127.0.0.1", "::1"])


def load(issued: Issued) -> x509.Certificate:
    return x509.load_der_x509_certificate(issued.der)


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, links followed."""
    return {
        str(Path(parent, name).relative_to(folder)): Path(parent, name).read_bytes()
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
    }


# ---- what verifies --------------------------------------------------------------------------------------------


def verifier(ca: DevelopmentCA) -> PolicyBuilder:
    return PolicyBuilder().store(Store([x509.load_der_x509_certificate(ca.certificate_der)]))


def test_a_server_verifies_as_its_hosts_and_as_nothing_else(ca: DevelopmentCA) -> None:
    server = load(server_of(ca))
    for name in ("core.example", "localhost"):
        assert verifier(ca).build_server_verifier(x509.DNSName(name)).verify(server, [])
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    assert verifier(ca).build_server_verifier(address).verify(server, [])
    with pytest.raises(VerificationError):
        verifier(ca).build_server_verifier(x509.DNSName("other.example")).verify(server, [])
    with pytest.raises(VerificationError):
        verifier(ca).build_client_verifier().verify(server, [])


@pytest.mark.parametrize("spiffe", [SPIFFE, None])
def test_a_client_verifies_as_a_client_and_as_nothing_else(ca: DevelopmentCA, spiffe: str | None) -> None:
    issued = ca.issue_client("one", spiffe=spiffe)
    assert verifier(ca).build_client_verifier().verify(load(issued), []).subjects
    assert identity_of(issued.der) == issued.identity == (spiffe or "cn:one")
    with pytest.raises(VerificationError):
        verifier(ca).build_server_verifier(x509.DNSName("one")).verify(load(issued), [])


def test_neither_another_ca_nor_a_leaf_can_sign(ca: DevelopmentCA, tmp_path: Path) -> None:
    other = DevelopmentCA.create(tmp_path / "other")
    for issued in (other.issue_client("one", spiffe=SPIFFE), server_of(other)):
        with pytest.raises(VerificationError):
            verifier(ca).build_client_verifier().verify(load(issued), [])
    root = x509.load_der_x509_certificate(ca.certificate_der)
    constraints = root.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)


def openssl_says(ca: DevelopmentCA, issued: Issued, purpose: str) -> str:
    done = subprocess.run(
        [
            *("openssl", "verify", "-x509_strict", "-crl_check", "-CRLfile", ca.crl_path),
            *("-CAfile", ca.certificate_path, "-purpose", purpose, issued.certificate),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return "ok" if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl command; not checked")
def test_openssl_takes_certificates_and_crl(ca: DevelopmentCA) -> None:
    server, client = server_of(ca), ca.issue_client("one", spiffe=SPIFFE)
    assert openssl_says(ca, server, "sslserver") == "ok"
    assert openssl_says(ca, client, "sslclient") == "ok"
    assert openssl_says(ca, client, "sslserver") != "ok"
    (revoked,) = ca.revoke("one")
    assert "certificate revoked" in openssl_says(ca, revoked, "sslclient")
    assert openssl_says(ca, server, "sslserver") == "ok"


def test_serials_are_random_and_kept_to_what_the_rfc_allows(ca: DevelopmentCA) -> None:
    serials = [ca.issue_client(f"gateway-{number}").serial for number in range(8)]
    assert len(set(serials)) == 8
    assert all(0 < serial < 2**159 for serial in serials)
    assert max(serials) > 2**140


# ---- TLS ------------------------------------------------------------------------------------------------------


def contexts(
    ca: DevelopmentCA, server: Issued, client: Issued | None
) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Both ends of mutual TLS 1.3, as a Core and a Gateway have them."""
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.minimum_version = ssl.TLSVersion.TLSv1_3
    serving.load_cert_chain(server.certificate, server.key)
    serving.load_verify_locations(ca.certificate_path)
    serving.verify_mode = ssl.CERT_REQUIRED
    calling = ssl.create_default_context(cafile=str(ca.certificate_path))
    if client is not None:
        calling.load_cert_chain(client.certificate, client.key)
    return serving, calling


def shake_hands(serving: ssl.SSLContext, calling: ssl.SSLContext, host: str = "localhost") -> bytes:
    """A handshake, and a byte each way, in memory; what the server knows of the client, in DER."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = serving.wrap_bio(to_server, to_client, server_side=True)
    client = calling.wrap_bio(to_client, to_server, server_hostname=host)

    def advance(step: Callable[[], object]) -> bool:
        try:
            step()
        except ssl.SSLWantReadError:
            return False
        return True

    done = [False, False]
    while not all(done):
        done = [done[0] or advance(client.do_handshake), done[1] or advance(server.do_handshake)]
    # TLS 1.3 tells a client only afterwards that the server does not take its certificate.
    client.write(b"?")
    assert server.read(1) == b"?"
    server.write(b"!")
    assert client.read(1) == b"!"
    found = server.getpeercert(binary_form=True)
    assert found is not None
    return found


@pytest.mark.parametrize("host", ["localhost", "core.example", "127.0.0.1", "::1"])
def test_mutual_tls(ca: DevelopmentCA, host: str) -> None:
    one = ca.issue_client("one", spiffe=SPIFFE)
    serving, calling = contexts(ca, server_of(ca), one)
    assert shake_hands(serving, calling, host) == one.der


def test_tls_refuses_every_wrong_certificate(tmp_path: Path) -> None:
    ca = DevelopmentCA.create(tmp_path / "pki")
    old = DevelopmentCA.open(tmp_path / "pki", now=long_ago)
    other = DevelopmentCA.create(tmp_path / "other")
    server, one = server_of(ca), ca.issue_client("one", spiffe=SPIFFE)
    expired = old.issue_client("expired", spiffe=SPIFFE, days=1)
    expired_server = old.issue_server("old", dns=["localhost"], days=1)
    foreign, foreign_server = other.issue_client("one", spiffe=SPIFFE), server_of(other)
    assert shake_hands(*contexts(ca, server, one)) == one.der
    for client in (None, expired, foreign, server):
        with pytest.raises(ssl.SSLError):
            shake_hands(*contexts(ca, server, client))
    for wrong in (expired_server, foreign_server, one):
        with pytest.raises(ssl.SSLCertVerificationError):
            shake_hands(*contexts(ca, wrong, one))
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(*contexts(ca, server, one), host="other.example")


def credentials(ca: DevelopmentCA, issued: Issued) -> tuple[bytes, bytes, bytes]:
    return ca.certificate_path.read_bytes(), issued.key.read_bytes(), issued.certificate.read_bytes()


@contextmanager
def serving(ca: DevelopmentCA, server: Issued) -> Iterator[str]:
    """A gRPC server that says who calls it; its address."""

    def who(request: bytes, context: grpc.ServicerContext) -> bytes:
        (pem,) = context.auth_context()["x509_pem_cert"]
        return identity_of(x509.load_pem_x509_certificate(pem)).encode()

    handler = grpc.method_handlers_generic_handler("t", {"Who": grpc.unary_unary_rpc_method_handler(who)})
    root, key, chain = credentials(ca, server)
    running = grpc.server(ThreadPoolExecutor(2), handlers=[handler])
    port = running.add_secure_port(
        "127.0.0.1:0", grpc.ssl_server_credentials([(key, chain)], root, require_client_auth=True)
    )
    running.start()
    try:
        yield f"localhost:{port}"
    finally:
        running.stop(None).wait()


def ask(ca: DevelopmentCA, client: Issued, address: str) -> str:
    root, key, chain = credentials(ca, client)
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(root, key, chain)) as channel:
        return bytes(channel.unary_unary("/t/Who")(b"", timeout=20)).decode()


def test_grpc_knows_who_calls(ca: DevelopmentCA) -> None:
    one, two = ca.issue_client("one", spiffe=SPIFFE), ca.issue_client("two")
    with serving(ca, server_of(ca)) as address:
        assert ask(ca, one, address) == SPIFFE
        assert ask(ca, two, address) == "cn:two"


def test_grpc_refuses_wrong_certificates(ca: DevelopmentCA, tmp_path: Path) -> None:
    old = DevelopmentCA.open(ca.folder, now=long_ago)
    other = DevelopmentCA.create(tmp_path / "other")
    expired, foreign = old.issue_client("old", days=1), other.issue_client("foreign")
    with serving(ca, server_of(ca)) as address:
        for client in (expired, foreign):
            with pytest.raises(grpc.RpcError) as caught:
                ask(ca, client, address)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    with serving(other, server_of(other)) as address, pytest.raises(grpc.RpcError) as caught:
        ask(ca, ca.issue_client("one"), address)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


# ---- the folder -----------------------------------------------------------------------------------------------


def test_keys_are_for_their_owner_only(ca: DevelopmentCA) -> None:
    before = os.umask(0)
    try:
        issued = server_of(ca)
        ca.renew("core")
    finally:
        os.umask(before)
    for path in (ca.folder / "ca.key", issued.key):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for folder in (ca.folder, ca.folder / "issued", issued.key.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_nothing_that_is_there_is_replaced(ca: DevelopmentCA, tmp_path: Path) -> None:
    server_of(ca)
    before = files(ca.folder)
    refused(lambda: DevelopmentCA.create(ca.folder), AlreadyExists)
    refused(lambda: server_of(ca), AlreadyExists)
    refused(lambda: ca.issue_client("core"), AlreadyExists)
    assert files(ca.folder) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "ca.key").write_bytes(b"precious")
    refused(lambda: DevelopmentCA.create(tmp_path / "mine"), AlreadyExists)
    assert files(tmp_path / "mine") == {"ca.key": b"precious"}
    assert {path.name for path in tmp_path.iterdir()} == {"pki", "mine"}
    (tmp_path / "empty").mkdir()
    assert DevelopmentCA.create(tmp_path / "empty").issued() == ()


def test_of_many_that_make_a_ca_or_a_certificate_one_wins(tmp_path: Path) -> None:
    def race(act: Callable[[], object]) -> list[object]:
        barrier = threading.Barrier(6)

        def run(_: int) -> object:
            barrier.wait()
            try:
                return act()
            except AlreadyExists:
                return None

        with ThreadPoolExecutor(6) as pool:
            return [each for each in pool.map(run, range(6)) if each is not None]

    (made,) = race(lambda: DevelopmentCA.create(tmp_path / "pki"))
    assert isinstance(made, DevelopmentCA)
    assert len(race(lambda: DevelopmentCA.open(tmp_path / "pki").issue_client("one"))) == 1
    (issued,) = made.issued()
    shake_hands(*contexts(made, server_of(made), issued))


@pytest.mark.parametrize("step", ["write", "switch", "sync"])
def test_a_failure_on_the_way_leaves_what_was_there(
    ca: DevelopmentCA, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    server, one = server_of(ca), ca.issue_client("one", spiffe=SPIFFE)

    def fail(*arguments: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, step, fail)
        with pytest.raises(OSError, match="No space"):
            ca.renew("one")
        with pytest.raises(OSError, match="No space"):
            ca.issue_client("two")
    assert ca.find("one") == one
    assert shake_hands(*contexts(ca, server, ca.find("one"))) == one.der
    refused(lambda: ca.find("two"), KeyNotFound)
    assert ca.issue_client("two").state is CertificateState.VALID
    assert [each.name for each in ca.issued()] == ["core", "one", "two"]
    assert not [name for name in files(ca.folder) if name.endswith(".part")]
    (ca.folder / "issued" / "half").mkdir()  # what a crash leaves
    assert len(ca.issued()) == 3


def test_renewing_keeps_the_names_and_changes_the_key(ca: DevelopmentCA) -> None:
    for issued in (server_of(ca), ca.issue_client("one", spiffe=SPIFFE), ca.issue_client("two")):
        key = issued.key.read_bytes()
        renewed = ca.renew(issued.name, days=10)
        assert (renewed.identity, renewed.sans, renewed.role) == (issued.identity, issued.sans, issued.role)
        assert (renewed.certificate, renewed.key) == (issued.certificate, issued.key)
        assert renewed.serial != issued.serial
        assert renewed.key.read_bytes() != key
        states = [each.state for each in ca.issued() if each.name == issued.name]
        assert states == [CertificateState.VALID, CertificateState.REPLACED]
    assert shake_hands(*contexts(ca, ca.find("core"), ca.find("one"))) == ca.find("one").der
    assert sum(name.startswith("issued/") and name.endswith(".key") for name in files(ca.folder)) == 3


def test_revoking_takes_every_valid_one_of_a_name_and_frees_it(ca: DevelopmentCA) -> None:
    old = DevelopmentCA.open(ca.folder, now=long_ago)
    old.issue_client("one", spiffe=SPIFFE, days=1)
    ca.renew("one")
    ca.renew("one")
    ca.issue_client("two")
    assert len(ca.unexpired("one")) == 2
    revoked = ca.revoke("one")
    assert {each.state for each in revoked} == {CertificateState.REVOKED}
    assert len(revoked) == 2
    states = sorted((each.name, each.state.value) for each in ca.issued())
    assert states == [("one", "expired"), ("one", "revoked"), ("one", "revoked"), ("two", "valid")]
    assert not any(each.key.exists() for each in ca.issued() if each.name == "one")
    for call in (lambda: ca.find("one"), lambda: ca.renew("one"), lambda: ca.revoke("one")):
        refused(call, KeyNotFound)
    assert ca.issue_client("one", spiffe=SPIFFE).state is CertificateState.VALID
    assert len(ca.revoke("one")) == 1
    crl = x509.load_pem_x509_crl(ca.crl_path.read_bytes())
    assert {each.serial_number for each in crl} == {
        each.serial for each in ca.issued() if each.state is CertificateState.REVOKED
    }
    assert len(crl) == 3


def test_many_revoke_at_once_and_none_is_forgotten(ca: DevelopmentCA) -> None:
    names = [f"gateway-{number}" for number in range(6)]
    for name in names:
        ca.issue_client(name)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda name: DevelopmentCA.open(ca.folder).revoke(name), names))
    assert [each.state for each in ca.issued()] == [CertificateState.REVOKED] * 6


def test_a_ca_whose_files_are_not_right_is_not_used(ca: DevelopmentCA, tmp_path: Path) -> None:
    def opened() -> object:
        return DevelopmentCA.open(ca.folder).issued()

    other = DevelopmentCA.create(tmp_path / "other")
    key, crl = ca.folder / "ca.key", ca.folder / "crl.pem"
    kept = {path: path.read_bytes() for path in (key, crl, ca.certificate_path)}
    for path, bad in (
        (key, (other.folder / "ca.key").read_bytes()),
        (key, b"nonsense"),
        (crl, other.crl_path.read_bytes()),
        (crl, b"nonsense"),
        (ca.certificate_path, b"nonsense"),
    ):
        path.write_bytes(bad)
        refused(opened, ConfigurationError)
        path.write_bytes(kept[path])
        opened()
    for path in (key, crl):
        path.unlink()
        refused(opened, ConfigurationError)
        path.write_bytes(kept[path])
        path.chmod(0o600)
        opened()
    key.chmod(0o640)
    assert "read by others" in str(refused(opened, ConfigurationError))
    key.unlink()
    key.symlink_to(other.folder / "ca.key")
    refused(opened, ConfigurationError)
    refused(lambda: DevelopmentCA.open(tmp_path / "nowhere"), KeyNotFound)
    assert "PRIVATE" not in repr(ca)


# ---- what may be asked for ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", "-x", "a/b", "..", ".hidden", "a b", "a\n", "issued", "ca.key", "crl.pem", "n" * 65, None, "\u00e4"]
)  # fmt: skip
def test_names_are_checked(ca: DevelopmentCA, name: str) -> None:
    before = files(ca.folder)
    for call in (
        lambda: ca.issue_client(name),
        lambda: ca.issue_server(name, dns=["localhost"]),
        lambda: ca.find(name),
        lambda: ca.renew(name),
        lambda: ca.revoke(name),
    ):
        refused(call, InvalidInput)
    assert files(ca.folder) == before


@pytest.mark.parametrize(
    ("dns", "ips"),
    [
        ([], []),
        ([""], []),
        (["a b"], []),
        (["127.0.0.1"], []),
        (["::1"], []),
        (["-x.example"], []),
        (["x..example"], []),
        (["*"], []),
        (["x.*.example"], []),
        (["b\u00fccher.example"], []),
        (["x\0.example"], []),
        (["localhost\n"], []),
        (["a" * 64 + ".example"], []),
        ([".".join(["a" * 60] * 5)], []),
        (["localhost"], ["localhost"]),
        ([], ["1.2.3"]),
        ([], ["1.2.3.4/8"]),
        ([], ["fe80::1%eth0"]),
        ([], [""]),
    ],
)
def test_hosts_and_addresses_are_checked(ca: DevelopmentCA, dns: list[str], ips: list[str]) -> None:
    refused(lambda: ca.issue_server("core", dns=dns, ips=ips), InvalidInput)
    assert ca.issued() == ()


def test_hosts_are_taken_in_lower_case_and_with_a_star(ca: DevelopmentCA) -> None:
    issued = ca.issue_server("core", dns=["*.Core.Example", "LOCALHOST"], ips=["0:0:0:0:0:0:0:1"])
    assert issued.sans == ("dns:*.core.example", "dns:localhost", "ip:::1")
    assert issued.role is Role.SERVER


@pytest.mark.parametrize(
    "spiffe", ["", "cn:one", "https://x/y", "spiffe://Example/x", "spiffe://example", SPIFFE + "\n"]
)
def test_spiffe_ids_are_checked(ca: DevelopmentCA, spiffe: str) -> None:
    refused(lambda: ca.issue_client("one", spiffe=spiffe), InvalidInput)
    assert ca.issued() == ()


@pytest.mark.parametrize("days", [0, -1, 3651, float("nan"), float("inf")])
def test_days_are_checked(ca: DevelopmentCA, tmp_path: Path, days: float) -> None:
    ca.issue_client("two")
    for call in (
        lambda: ca.issue_client("one", days=days),
        lambda: ca.issue_server("one", dns=["localhost"], days=days),
        lambda: ca.renew("two", days=days),
        lambda: DevelopmentCA.create(tmp_path / "more", days=days),
    ):
        refused(call, InvalidInput)
    assert not (tmp_path / "more").exists()


def test_no_certificate_outlives_its_ca(tmp_path: Path) -> None:
    ca = DevelopmentCA.create(tmp_path / "pki", days=10)
    assert "ends on" in str(refused(lambda: ca.issue_client("one", days=11), InvalidInput))
    assert ca.issue_client("one", days=9).not_after < ca.expires
    (tmp_path / "old").mkdir()
    DevelopmentCA.create(tmp_path / "old", days=10, now=long_ago)
    expired = DevelopmentCA.open(tmp_path / "old")
    refused(lambda: expired.issue_client("one", days=0.01), InvalidInput)


def test_a_certificate_ends_when_it_was_said_to(tmp_path: Path) -> None:
    now = datetime.datetime(2026, 5, 1, 12, tzinfo=datetime.UTC)
    ca = DevelopmentCA.create(tmp_path / "pki", now=lambda: now)
    issued = ca.issue_client("one", days=2)
    assert (issued.not_before, issued.not_after) == (
        now - datetime.timedelta(minutes=5),
        now + datetime.timedelta(days=2),
    )
    just_before = DevelopmentCA.open(
        tmp_path / "pki", now=lambda: issued.not_after - datetime.timedelta(seconds=1)
    )
    at_its_end = DevelopmentCA.open(tmp_path / "pki", now=lambda: issued.not_after)
    assert just_before.find("one").state is CertificateState.VALID
    assert at_its_end.find("one").state is CertificateState.EXPIRED
