# SPDX-License-Identifier: Apache-2.0
"""A Core that serves, as its operators see it: how it starts, ends, sheds load, logs and takes up new certificates."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc

import openkcm
from openkcm import CoreUnavailable
from openkcm.rpc.server.admin_handlers import SERVICE_NAME as ADMINISTRATION
from openkcm.rpc.server.certificates import Certificates
from openkcm.rpc.server.config import read_config
from openkcm.rpc.server.standard_error import reason_of
from openkcm.systemd import notify
from remote_support import until
from rpc_support import CHIEF, GATEWAY, Replica, Site
from support import refused

DEADLINE = 20.0


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Certificates, a vault and an operator."""
    site = Site(tmp_path)
    site.appoint()
    return site


def admin(site: Site, ports: dict[str, int], **options: float) -> openkcm.RemoteAdmin:
    """The administrative interface of a server."""
    return openkcm.connect_admin(f"127.0.0.1:{ports['admin']}", tls=site.tls("chief"), **options)


def start(site: Site, **settings: object) -> Replica:
    """A server with an administrative interface, in a process of its own."""
    return site.start(**({"listen.admin": "127.0.0.1:0", "roots": ["local:", "bao-transit:"]} | settings))


def served_serial(port: int, site: Site) -> int:
    """The serial number of the certificate that a port shows."""
    tls = site.tls()
    context = ssl.create_default_context(cafile=tls.roots)
    context.check_hostname = False
    context.load_cert_chain(tls.certificate, tls.key)
    with context.wrap_socket(socket.create_connection(("127.0.0.1", port), DEADLINE)) as made:
        shown = made.getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown).serial_number


# ---- starting and ending -------------------------------------------------------------------------------------------


def test_sigterm_ends_it_in_order(site: Site) -> None:
    with start(site) as replica, admin(site, replica.ports) as remote:
        core = site.connect(replica.ports)
        heard: list[object] = []
        core.watch(heard.append)  # a stream that never ends by itself
        assert remote.status("acme")[0].state == "live"
        began = time.monotonic()
        assert replica.stop() == 0
        assert time.monotonic() - began < 8
        core.close()
    assert "Traceback" not in replica.log.read_text()


def test_calls_under_way_finish_while_new_ones_are_refused(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    with site.serve(**{"listen.admin": "127.0.0.1:0"}) as server:
        asked, go, answers = threading.Event(), threading.Event(), []
        probe = server.core.probe

        def slow(tenant: str) -> object:
            asked.set()
            assert go.wait(DEADLINE)
            return probe(tenant)

        monkeypatch.setattr(server.core, "probe", slow)
        with admin(site, server.ports) as remote, health(site, server.ports["admin"]) as states:
            assert next(states) == "SERVING"
            caller = threading.Thread(target=lambda: answers.append(remote.probe("acme").state))
            caller.start()
            assert asked.wait(DEADLINE)
            stopper = threading.Thread(target=server.stop, args=(DEADLINE,))
            stopper.start()
            assert next(states) == "NOT_SERVING"
            with admin(site, server.ports, deadline=5) as late:
                until(lambda: _is_refused(lambda: late.status("acme")))
            assert not answers
            go.set()
            caller.join(DEADLINE)
            stopper.join(DEADLINE)
        assert answers == ["live"]


def _is_refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except CoreUnavailable as error:
        return error.retryable
    return False


class health:
    """The states that the standard health service tells."""

    def __init__(self, site: Site, port: int) -> None:
        key, chain, roots = site.tls().pem()
        credentials = grpc.ssl_channel_credentials(roots, key, chain)
        self._channel = grpc.secure_channel(f"127.0.0.1:{port}", credentials)
        stub = health_pb2_grpc.HealthStub(self._channel)
        self._stream = stub.Watch(health_pb2.HealthCheckRequest(service=ADMINISTRATION), timeout=60)

    def __enter__(self) -> Iterator[str]:
        return (health_pb2.HealthCheckResponse.ServingStatus.Name(each.status) for each in self._stream)

    def __exit__(self, *error: object) -> None:
        self._stream.cancel()
        self._channel.close()


def test_a_second_signal_ends_it_at_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAO_TOKEN", "none")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        # A root that does not answer keeps a call under way.
        silent.settimeout(DEADLINE)
        root = f"bao-transit://127.0.0.1:{silent.getsockname()[1]}/transit/key"
        with start(site, drain=60) as replica, admin(site, replica.ports, deadline=60) as remote:
            link = threading.Thread(
                target=refused, args=(lambda: remote.link_tenant("slow", root), CoreUnavailable)
            )
            link.start()
            asked, _ = silent.accept()
            os.kill(replica.pid, signal.SIGTERM)
            until(lambda: "draining" in replica.log.read_text())
            os.kill(replica.pid, signal.SIGTERM)
            assert replica.process.wait(5) == 128 + signal.SIGTERM
            link.join(DEADLINE)
            asked.close()


def test_what_was_acknowledged_before_sigkill_is_there_after_it(site: Site) -> None:
    with start(site) as replica:
        with admin(site, replica.ports) as remote:
            remote.kill("acme", "last words")
            replica.kill()
            refused(lambda: remote.status("acme"), CoreUnavailable)
        replica.start()
        with admin(site, replica.ports) as remote:
            assert remote.status("acme")[0].reason == "last words"
            assert remote.verify_audit() is None
            remote.restore("acme")


def test_systemd_hears_of_it(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.settimeout(DEADLINE)
        listener.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with start(site) as replica:
            assert listener.recv(100) == b"READY=1"
            assert replica.stop() == 0
            assert listener.recv(100) == b"STOPPING=1"
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
        assert notify("READY=1") is False
        monkeypatch.delenv("NOTIFY_SOCKET")
        assert notify("READY=1") is False


def test_a_start_that_fails_says_why_and_leaves_nothing_open(site: Site) -> None:
    from openkcm.cli.app import run
    from openkcm.rpc.server.serving import CoreServer

    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = site.config(**{"listen.admin": f"127.0.0.1:{taken.getsockname()[1]}"})
        before = threading.active_count()
        error = refused(CoreServer(read_config(config)).start, CoreUnavailable)
        assert "cannot be listened on" in str(error)
        until(lambda: threading.active_count() <= before + 1)
    os.rename(site.folder / "vault.db", site.folder / "moved.db")
    assert run(["serve", "core", "--config", str(config)]) == 10
    assert not (site.folder / "vault.db").exists()


# ---- certificates --------------------------------------------------------------------------------------------------


def test_new_certificates_are_taken_up_without_a_restart(site: Site) -> None:
    with start(site) as replica:
        old = {name: served_serial(port, site) for name, port in replica.ports.items()}
        assert set(old.values()) == {site.server.serial}
        core = site.connect(replica.ports)
        renewed = site.ca.renew("core")
        for port in replica.ports.values():
            until(lambda port=port: served_serial(port, site) == renewed.serial)  # type: ignore[misc]
        # The inner channel shows the new one too, and a client that was connected goes on.
        assert core.find_service("acme", "records").name == "records"
        core.close()
        assert "new certificates are in use" in replica.log.read_text()


def test_files_that_are_not_whole_change_nothing(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = {name: tmp_path / name for name in ("certificate", "key", "roots")}
    tls = site.tls()
    for name, path in paths.items():
        path.touch(0o600)
        path.write_bytes(Path(getattr(tls, name)).read_bytes())
    certificates = Certificates(openkcm.TLS(**paths), seconds=3600)
    told: list[object] = []
    certificates.listen(told.append)
    try:
        before = certificates.pem()
        key = before[0]
        for broken in (b"", key[: len(key) // 2], site.server.key.read_bytes()):
            paths["key"].write_bytes(broken)
            assert certificates.look() is False
            assert certificates.look() is False
            assert certificates.pem() == before
        paths["key"].unlink()
        assert certificates.look() is False
        paths["key"].touch(0o600)
        assert sum("cannot be used" in each.message for each in caplog.records) >= 2
        assert key.decode() not in caplog.text
        renewed = site.ca.renew("gateway")
        paths["key"].write_bytes(renewed.key.read_bytes())
        assert certificates.look() is False  # half of it: the certificate is the old one
        paths["certificate"].write_bytes(renewed.certificate.read_bytes())
        assert certificates.look() is True
        assert certificates.credentials.leaf == renewed.der
        assert told[-1] is certificates.credentials
    finally:
        certificates.close()


# ---- load, and what is said ----------------------------------------------------------------------------------------


def test_more_calls_than_it_takes_are_told_to_try_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with site.serve(**{"limits.threads": 1, "limits.calls": 2, "limits.streams": 1}) as server:
        go, asked = threading.Event(), threading.Semaphore(0)
        find = server.core.find_service

        def slow(tenant: str, name: str) -> object:
            asked.release()
            assert go.wait(DEADLINE)
            return find(tenant, name)

        monkeypatch.setattr(server.core, "find_service", slow)
        ports = {"grpc": server.ports["grpc"]}
        cores = [
            openkcm.connect(f"grpc://127.0.0.1:{ports['grpc']}", tls=site.tls(), deadline=DEADLINE)
            for _ in range(8)
        ]
        answers: list[object] = []

        def call(core: openkcm.RemoteCore) -> None:
            try:
                answers.append(core.find_service("acme", "records").name)
            except CoreUnavailable as error:
                answers.append(error.retryable)

        threads = [threading.Thread(target=call, args=(core,)) for core in cores]
        for thread in threads:
            thread.start()
        assert asked.acquire(timeout=DEADLINE)
        until(lambda: len(answers) >= 5)  # three are under way or wait
        assert set(answers) == {True}
        go.set()
        for thread in threads:
            thread.join(DEADLINE)
        assert sorted(map(str, answers)) == ["True"] * 5 + ["records"] * 3
        for core in cores:
            core.close()


def test_health_and_reflection_take_nothing_from_the_calls(site: Site) -> None:
    """Streams that anybody with a certificate may open and keep open."""
    stranger = site.issue("stranger", "spiffe://example/stranger")
    with site.serve(**{"listen.admin": "127.0.0.1:0", "limits.threads": 2, "limits.calls": 2}) as server:
        key, chain, roots = stranger.pem()
        never = threading.Event()
        streams, channels = [], []
        for name in ("grpc", "admin"):
            channel = grpc.secure_channel(
                f"127.0.0.1:{server.ports[name]}", grpc.ssl_channel_credentials(roots, key, chain)
            )
            channels.append(channel)
            for _ in range(40):
                reflect = channel.stream_stream(
                    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
                )
                streams.append(reflect(iter(never.wait, True), timeout=60))
                watch = channel.unary_stream("/grpc.health.v1.Health/Watch")
                streams.append(watch(b"", timeout=60))
        until(lambda: sum(not each.is_active() for each in streams) >= 2 * (80 - 16))
        assert sum(each.is_active() for each in streams) == 2 * 16
        address = f"grpc://127.0.0.1:{server.ports['grpc']}"
        with openkcm.connect(address, tls=site.tls(), deadline=10) as core:
            assert core.find_service("acme", "records").name == "records"
        with admin(site, server.ports, deadline=10) as remote:
            assert remote.status("acme")[0].state == "live"
        for each in streams:
            each.cancel()
        never.set()
        # Their places are free again.
        again = channels[0].unary_stream("/grpc.health.v1.Health/Watch")
        until(lambda: _begins(again))
        for channel in channels:
            channel.close()


def _begins(watch: grpc.UnaryStreamMultiCallable) -> bool:
    stream = watch(b"", timeout=10)
    try:
        next(stream)
    except grpc.RpcError:
        return False
    finally:
        stream.cancel()
    return True


def test_a_message_that_is_too_long_is_refused_unread(site: Site) -> None:
    with site.serve(**{"listen.admin": "127.0.0.1:0"}) as server:
        key, chain, roots = site.tls("chief").pem()
        with grpc.secure_channel(
            f"127.0.0.1:{server.ports['admin']}", grpc.ssl_channel_credentials(roots, key, chain)
        ) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(f"/{ADMINISTRATION}/Status")(bytes(70_000), timeout=DEADLINE)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_the_log_is_one_object_a_line(site: Site) -> None:
    with start(site) as replica, admin(site, replica.ports) as remote:
        refused(lambda: remote.status("nobody"), openkcm.TenantNotFound)
        replica.stop()
        lines = [json.loads(line) for line in replica.log.read_text().splitlines()]
    (failed,) = [line for line in lines if line["message"] == "a call failed"]
    assert (failed["identity"], failed["method"], failed["code"]) == (CHIEF, "Status", "tenant_not_found")
    assert failed["ms"] >= 0
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)


def test_failures_are_logged_within_bounds(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openkcm.rpc.peer import Peer
    from openkcm.rpc.server.failures import LINES_A_SECOND, Logged

    class Failing:
        def __init__(self) -> None:
            self.methods = {"Status": None}

        def check_peer(self, peer: Peer) -> None:
            pass

        def check_caller(self, peer: Peer) -> None:
            pass

        def call(self, name: str, peer: Peer, data: bytes) -> bytes:
            raise openkcm.TenantDark("secret-looking text")

        def refused(self, error: Exception, name: str, peer: Peer | None) -> None:
            pass

    now = [100.0]
    monkeypatch.setattr("openkcm.rpc.server.failures.time.monotonic", lambda: now[0])
    caplog.set_level("INFO", logger="openkcm.rpc.calls")
    logged = Logged(Failing())
    peer = Peer(GATEWAY, b"", (b"", b""), 0.0)
    for _ in range(LINES_A_SECOND + 30):
        refused(lambda: logged.call("Status", peer, b""), openkcm.TenantDark)
    assert len(caplog.records) == LINES_A_SECOND
    now[0] += 1
    refused(lambda: logged.call("Status", peer, b""), openkcm.TenantDark)
    assert vars(caplog.records[-1])["fields"]["left_out"] == 30
    assert "secret-looking" not in str([vars(each) for each in caplog.records])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            b"I1124 ssl.cc:2563] Handshake failed with error SSL_ERROR_SSL: PEER_DID_NOT_RETURN_A_CERTIFICATE: y",
            "no certificate",
        ),
        (
            b"Handshake failed with error SSL_ERROR_SSL: x:CERTIFICATE_VERIFY_FAILED: certificate has expired",
            "expired certificate",
        ),
        (
            b"Handshake failed with error SSL_ERROR_SSL: x:CERTIFICATE_VERIFY_FAILED: unable to get",
            "certificate of no authority of ours",
        ),
        (b"Handshake failed with error SSL_ERROR_SSL: x:NO_SHARED_CIPHER: y", "TLS below 1.3"),
        (b"Handshake failed with error SSL_ERROR_SSL: x:HTTP_REQUEST: y", "not TLS"),
        (b"Handshake failed with error SSL_ERROR_SSL: \xff\xfe", "malformed"),
        (b"something else", None),
    ],
    ids=str,
)
def test_what_grpc_says_of_a_handshake_is_understood(line: bytes, reason: str | None) -> None:
    assert reason_of(line) == reason
