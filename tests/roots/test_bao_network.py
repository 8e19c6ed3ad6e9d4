# SPDX-License-Identifier: Apache-2.0
"""The network before a ``bao-transit:`` root: failures, bounds in time, and who is trusted."""

from __future__ import annotations

import datetime
import shutil
import socket
import ssl
import threading
import time
import types
from contextlib import ExitStack
from pathlib import Path

import pytest

from bao_support import BLOB, CONTEXT, LIMIT, SEALED, answering, in_time, listening, own_context, root_at
from bao_support import bao as bao
from bao_support import key as key
from openkcm.errors import (
    OpenKCMError,
    RootMisconfigured,
    RootUnavailable,
)
from openkcm.roots import Root, open_root
from openkcm.roots.bao import ANSWERS
from openkcm.roots.bao import http as bao_http
from openkcm.testing.https import Request, Response, Server, make_certificate
from openkcm.testing.openbao import REPLIES, OpenBao, OpenBaoKey
from openkcm.testing.tcp_proxy import TcpProxy
from support import refused


def _read_timeout(stack: ExitStack, key: OpenBaoKey, folder: Path) -> Root:
    root = open_root(key.uri)
    root.wrap(SEALED, CONTEXT)
    key.black_hole()
    return root


def _refused(stack: ExitStack, key: OpenBaoKey, folder: Path) -> Root:
    key.refuse()
    return open_root(key.uri)


def _unknown_name(stack: ExitStack, key: OpenBaoKey, folder: Path) -> Root:
    return open_root("bao-transit://openbao.invalid/transit/key")


def _untrusted(stack: ExitStack, key: OpenBaoKey, folder: Path) -> Root:
    make_certificate(folder)
    return open_root(f"{key.uri}?ca={folder / 'authority.pem'}")


def _no_room(stack: ExitStack, key: OpenBaoKey, folder: Path) -> Root:
    """A port whose queue is full, so that connections are neither accepted nor refused."""
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
    for _ in range(8):
        waiting = stack.enter_context(socket.socket())
        waiting.setblocking(False)
        waiting.connect_ex(listener.getsockname())
    return open_root(f"bao-transit://127.0.0.1:{listener.getsockname()[1]}/transit/key")


SCENES = {
    "ConnectTimeout": _no_room,
    "ReadTimeout": _read_timeout,
    "ConnectionError": _refused,
    "ConnectionError (name does not resolve)": _unknown_name,
    "SSLError (certificate not trusted)": _untrusted,
}


@pytest.mark.parametrize("name", SCENES)
def test_each_failure_of_the_network(key: OpenBaoKey, tmp_path: Path, name: str) -> None:
    with ExitStack() as stack:
        root = SCENES[name](stack, key, tmp_path)
        error = in_time(lambda: root.unwrap(BLOB, CONTEXT), ANSWERS[name])
    assert f"({name})" in str(error)


def test_a_black_hole_from_the_start(key: OpenBaoKey) -> None:
    root = open_root(key.uri)
    key.black_hole()
    in_time(lambda: root.wrap(SEALED, CONTEXT), RootUnavailable)
    key.heal()
    assert root.unwrap(root.wrap(SEALED, CONTEXT), CONTEXT) == SEALED


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nContent-Length: nonsense\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
    ],
    ids=range(8),
)
def test_broken_http(tmp_path: Path, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENKCM_BAO_TOKEN", "t")

    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(sent)

    with listening(serve, own_context(tmp_path)) as port:
        started = time.monotonic()
        with pytest.raises(OpenKCMError) as caught:
            root_at(port, tmp_path).unwrap(BLOB, CONTEXT)
        assert type(caught.value) in (RootUnavailable, RootMisconfigured)
        assert time.monotonic() - started < LIMIT


@pytest.mark.parametrize(
    ("start", "again"),
    [
        (b"", b"H"),
        (b"HTTP/1.1 200 OK\r\n", b"X"),
        (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b" "),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    ],
    ids=["status", "header", "headers", "continue", "body", "chunks"],
)
def test_an_answer_that_does_not_come_to_an_end(
    tmp_path: Path, start: bytes, again: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte now and then keeps a socket's timeout from ever coming."""
    monkeypatch.setenv("OPENKCM_BAO_TOKEN", "t")
    monkeypatch.setattr(bao_http, "ANSWER_SECONDS", 0.5)

    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(start)
        for _ in range(100):
            connection.sendall(again)
            time.sleep(0.2)

    with listening(serve, own_context(tmp_path)) as port:
        error = in_time(lambda: root_at(port, tmp_path).unwrap(BLOB, CONTEXT), RootUnavailable)
        assert "(ReadTimeout)" in str(error) or "(ConnectionError)" in str(error)


def test_a_server_that_hangs_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENKCM_BAO_TOKEN", "t")
    make_certificate(tmp_path)
    with listening(lambda connection: None) as port:  # before the handshake
        error = in_time(lambda: root_at(port, tmp_path).unwrap(BLOB, CONTEXT), RootUnavailable)
        assert ANSWERS["SSLError (connection lost)"] is type(error)


def test_a_server_that_speaks_plaintext(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENKCM_BAO_TOKEN", "t")
    make_certificate(tmp_path)

    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with listening(serve) as port:
        error = in_time(lambda: root_at(port, tmp_path).unwrap(BLOB, CONTEXT), ANSWERS["SSLError"])
        assert "(SSLError)" in str(error)


def test_plaintext_towards_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As to an agent beside us."""
    monkeypatch.setenv("OPENKCM_BAO_TOKEN", "t")
    seen: list[str] = []

    def handle(request: Request) -> Response:
        seen.append(request.headers["x-vault-token"])
        return Response(400, {"errors": ["encryption key not found"]})

    agent = Server(handle)
    try:
        root = open_root(f"bao-transit://127.0.0.1:{agent.port}/transit/key?tls=off")
        refused(lambda: root.unwrap(BLOB, CONTEXT), ANSWERS["encryption key not found"])
    finally:
        agent.close()
    assert seen


def test_a_certificate_of_another_host(tmp_path: Path, bao: OpenBao) -> None:
    name = "SSLError (certificate of another host)"
    with (
        listening(lambda connection: None, own_context(tmp_path)) as port,
        TcpProxy(("127.0.0.1", port)) as proxy,
    ):
        # The proxy listens at 127.0.0.1; "localhost" is in the certificate, ::ffff:127.0.0.1 is not.
        uri = f"bao-transit://[::ffff:127.0.0.1]:{proxy.port}/transit/key?ca={tmp_path / 'authority.pem'}"
        error = in_time(lambda: open_root(uri).unwrap(BLOB, CONTEXT), ANSWERS[name])
        assert f"({name})" in str(error)


@pytest.mark.parametrize("days", [-30, 30])
def test_a_certificate_that_is_out_of_date(
    tmp_path: Path, bao: OpenBao, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    """Or a clock that is off: the two cannot be told apart."""
    from openkcm.testing import https

    then = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    clock = types.SimpleNamespace(
        datetime=types.SimpleNamespace(now=lambda zone: then),
        timedelta=datetime.timedelta,
        UTC=datetime.UTC,
    )
    with monkeypatch.context() as patch:
        patch.setattr(https, "datetime", clock)
        context = own_context(tmp_path)
    name = "SSLError (certificate out of date)"
    with listening(lambda connection: None, context) as port:
        error = in_time(lambda: root_at(port, tmp_path).unwrap(BLOB, CONTEXT), ANSWERS[name])
        assert f"({name})" in str(error)
        assert "clock" in str(error)


def client_certificate(path: Path) -> None:
    """A certificate that vouches for itself, with its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "openkcm")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    pem = serialization.Encoding.PEM
    path.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain) + certificate.public_bytes(pem)
    )


def test_a_client_certificate(tmp_path: Path, bao: OpenBao, monkeypatch: pytest.MonkeyPatch) -> None:
    client = tmp_path / "client.pem"
    client_certificate(client)

    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        body = b'{"errors":["encryption key not found"]}'
        head = f"HTTP/1.1 400 Bad Request\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode() + body)

    context = own_context(tmp_path)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(client)
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # where the refusal is part of the handshake
    with listening(serve, context) as port:

        def use() -> None:
            root_at(port, tmp_path).unwrap(BLOB, CONTEXT)

        assert "BAO_CLIENT_CERT" in str(in_time(use, RootMisconfigured))
        monkeypatch.setenv("BAO_CLIENT_CERT", str(client))
        assert "BAO_CLIENT_KEY" in str(in_time(use, RootMisconfigured))
        monkeypatch.setenv("VAULT_CLIENT_KEY", str(client))
        in_time(use, ANSWERS["encryption key not found"])
        monkeypatch.setenv("BAO_CLIENT_KEY", str(tmp_path / "none.pem"))
        in_time(use, RootMisconfigured)


def test_the_proxy_to_the_outside(bao: OpenBao, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    root = open_root("bao-transit://openbao.invalid/transit/key")
    error = in_time(lambda: root.unwrap(BLOB, CONTEXT), ANSWERS["ProxyError"])
    assert "(ProxyError)" in str(error)
    monkeypatch.setenv("NO_PROXY", ".invalid")
    again = in_time(lambda: open_root(root.uri).unwrap(BLOB, CONTEXT), RootUnavailable)
    assert "resolve" in str(again)


def test_a_connection_that_is_cut_is_opened_again(key: OpenBaoKey) -> None:
    root = open_root(key.uri)
    wrapped = root.wrap(SEALED, CONTEXT)
    for _ in range(3):
        key.proxy.cut()
        assert root.unwrap(wrapped, CONTEXT) == SEALED


def test_a_slow_server(key: OpenBaoKey) -> None:
    root = open_root(key.uri)
    wrapped = root.wrap(SEALED, CONTEXT)
    key.slow(0.3)
    started = time.monotonic()
    assert root.unwrap(wrapped, CONTEXT) == SEALED
    assert time.monotonic() - started >= 0.3
    key.slow(30)
    in_time(lambda: root.unwrap(wrapped, CONTEXT), RootUnavailable)
    key.heal()
    assert root.unwrap(wrapped, CONTEXT) == SEALED


def test_eight_threads_before_a_black_hole(key: OpenBaoKey) -> None:
    """None waits for the others' logins longer than for its own."""
    root = open_root(key.uri_by("approle"))
    key.black_hole()
    ended: list[BaseException] = []
    threads = [
        threading.Thread(
            target=lambda: ended.append(refused(lambda: root.wrap(SEALED, CONTEXT), RootUnavailable))
        )
        for _ in range(8)
    ]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert time.monotonic() - started < LIMIT
    assert len(ended) == 8


# ---- who is trusted -----------------------------------------------------------------------------------------


def test_what_requests_would_take_from_the_environment(
    bao: OpenBao, key: OpenBaoKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """REQUESTS_CA_BUNDLE would replace the authority that was named, and a .netrc send a password along."""
    make_certificate(tmp_path)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "authority.pem"))
    monkeypatch.setenv("CURL_CA_BUNDLE", str(tmp_path / "authority.pem"))
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login user password hunter2\n")
    monkeypatch.setenv("NETRC", str(netrc))
    root = open_root(key.uri)
    assert root.unwrap(root.wrap(SEALED, CONTEXT), CONTEXT) == SEALED
    seen: list[set[str]] = []

    def handle(request: Request) -> Response:
        seen.append(set(request.headers))
        return Response(400, {"errors": ["encryption key not found"]})

    with answering(handle) as other, pytest.raises(OpenKCMError):
        other.unwrap(BLOB, CONTEXT)
    assert seen
    assert not any("authorization" in headers or "cookie" in headers for headers in seen)


def test_authorities_from_the_uri_and_the_environment(
    bao: OpenBao, key: OpenBaoKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def use(uri: str) -> None:
        root = open_root(uri)
        root.unwrap(root.wrap(SEALED, CONTEXT), CONTEXT)

    bundle = str(bao.file("authorities.pem"))
    make_certificate(tmp_path)
    monkeypatch.setenv("BAO_CACERT", str(tmp_path / "authority.pem"))
    monkeypatch.setenv("VAULT_CACERT", bundle)
    refused(lambda: use(key.uri), RootMisconfigured)
    use(f"{key.uri}?ca={bundle}")
    monkeypatch.delenv("BAO_CACERT")
    use(key.uri)
    monkeypatch.delenv("VAULT_CACERT")
    refused(lambda: use(key.uri), RootMisconfigured)  # this machine does not trust it
    monkeypatch.setenv("SSL_CERT_FILE", bundle)
    use(key.uri)  # now it does
    monkeypatch.setenv("BAO_SKIP_VERIFY", "true")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    refused(lambda: use(key.uri), RootMisconfigured)
    missing = refused(lambda: use(f"{key.uri}?ca=/nowhere/ca.pem"), RootMisconfigured)
    assert "/nowhere/ca.pem" in str(missing)
    (tmp_path / "empty.pem").touch()
    refused(lambda: use(f"{key.uri}?ca={tmp_path / 'empty.pem'}"), RootMisconfigured)
    folder = tmp_path / "folder"
    folder.mkdir()
    refused(lambda: use(f"{key.uri}?ca={folder}"), RootMisconfigured)
    shutil.rmtree(folder)


def test_the_table_is_whole() -> None:
    """Each row is tested: as an answer of the server, or by a scene of its own."""
    by_scene = {
        *SCENES,
        "ProxyError",
        "SSLError",
        "SSLError (connection lost)",
        "SSLError (certificate of another host)",
        "SSLError (certificate out of date)",
    }
    assert set(ANSWERS) == by_scene | set(REPLIES)
