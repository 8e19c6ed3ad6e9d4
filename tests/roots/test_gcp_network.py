# SPDX-License-Identifier: Apache-2.0
"""What the Cloud KMS root meets on the way to Google: names, proxies, certificates, ports, and time."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gcp_support import CONTEXT, SEALED
from gcp_support import cloud as cloud
from gcp_support import key as key
from gcp_support import root as root
from gcp_support import wrapped as wrapped
from openkcm.errors import RootMisconfigured, RootUnavailable
from openkcm.roots.gcp import ANSWERS, GCPRoot
from openkcm.roots.gcp import session as gcp_session
from openkcm.testing.gcp import GCPKMS, GCPKey
from openkcm.testing.guarded import free_port
from openkcm.testing.https import Request, Response, Server
from support import refused

HERE = {name for name in ANSWERS if not name.isupper() and not name.islower()}
WHOLE_CALL_SECONDS = 8.0


@contextlib.contextmanager
def full() -> Iterator[int]:
    """A port whose queue of connections is full, so that it accepts none."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(4):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.connect(server.getsockname())
        yield server.getsockname()[1]


@contextlib.contextmanager
def talking(say: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port where each connection is met with these words, or none, and closed."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(8)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        say(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
    thread.join(10)


Cause = Callable[[GCPKMS, GCPKey, pytest.MonkeyPatch, contextlib.ExitStack], None]


def _endpoint(host: str) -> Cause:
    return lambda cloud, key, patch, stack: patch.setenv("OPENKCM_GCP_ENDPOINT", f"https://{host}")


def _no_credentials(
    cloud: GCPKMS, key: GCPKey, patch: pytest.MonkeyPatch, stack: contextlib.ExitStack
) -> None:
    patch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nonexistent.json")


def _may_not_impersonate(
    cloud: GCPKMS, key: GCPKey, patch: pytest.MonkeyPatch, stack: contextlib.ExitStack
) -> None:
    path = cloud.login.federate(cloud.core)
    path.write_text(path.read_text().replace("serviceAccounts/core@", "serviceAccounts/other@"))
    patch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))


def _odd_login_error(
    cloud: GCPKMS, key: GCPKey, patch: pytest.MonkeyPatch, stack: contextlib.ExitStack
) -> None:
    cloud.login.error = ("an_error_of_tomorrow", "text")
    patch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(cloud.login.federate()))


def _other_authorities(
    cloud: GCPKMS, key: GCPKey, patch: pytest.MonkeyPatch, stack: contextlib.ExitStack
) -> None:
    patch.delenv("REQUESTS_CA_BUNDLE")


def _redirected(cloud: GCPKMS, key: GCPKey, patch: pytest.MonkeyPatch, stack: contextlib.ExitStack) -> None:
    key.reply({}, 307, ("Location", f"{cloud.url}/v1/{key.resource}:encrypt"))


def _garbage(cloud: GCPKMS, key: GCPKey, patch: pytest.MonkeyPatch, stack: contextlib.ExitStack) -> None:
    key.reply(b"<html>")


def _no_authorities(
    cloud: GCPKMS, key: GCPKey, patch: pytest.MonkeyPatch, stack: contextlib.ExitStack
) -> None:
    patch.setenv("REQUESTS_CA_BUNDLE", "/nonexistent.pem")


def _no_proxy(cloud: GCPKMS, key: GCPKey, patch: pytest.MonkeyPatch, stack: contextlib.ExitStack) -> None:
    patch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{free_port()}")


def _full(cloud: GCPKMS, key: GCPKey, patch: pytest.MonkeyPatch, stack: contextlib.ExitStack) -> None:
    patch.setenv("OPENKCM_GCP_ENDPOINT", f"https://127.0.0.1:{stack.enter_context(full())}")


def _black_hole(cloud: GCPKMS, key: GCPKey, patch: pytest.MonkeyPatch, stack: contextlib.ExitStack) -> None:
    key.black_hole()


def _closed(cloud: GCPKMS, key: GCPKey, patch: pytest.MonkeyPatch, stack: contextlib.ExitStack) -> None:
    patch.setenv("OPENKCM_GCP_ENDPOINT", f"https://127.0.0.1:{free_port()}")


CAUSES: dict[str, Cause] = {
    "DefaultCredentialsError": _no_credentials,
    "RefreshError": _may_not_impersonate,
    "OAuthError": _odd_login_error,
    "SSLError": _other_authorities,
    "TooManyRedirects": _redirected,
    "ParseError": _garbage,
    "OSError": _no_authorities,
    "ProxyError": _no_proxy,
    "NameResolutionError": _endpoint("kms.openkcm.invalid"),
    "ConnectTimeout": _full,
    "ReadTimeout": _black_hole,
    "ConnectionError": _closed,
}


def test_the_table_has_the_rows_that_are_tested() -> None:
    assert CAUSES.keys() == HERE


@pytest.mark.parametrize("name", sorted(CAUSES))
def test_each_failure_on_the_way(
    cloud: GCPKMS, key: GCPKey, root: GCPRoot, wrapped: bytes, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with contextlib.ExitStack() as stack, monkeypatch.context() as patch:
        CAUSES[name](cloud, key, patch, stack)
        before, start = key.requests, time.monotonic()
        error = refused(lambda: root.unwrap(wrapped, CONTEXT), ANSWERS[name])
        assert f"({name})" in str(error)
        assert time.monotonic() - start < WHOLE_CALL_SECONDS
        assert key.requests - before <= 1
        key.heal()
        root.close()
    cloud.login.error = None
    assert root.unwrap(wrapped, CONTEXT) == SEALED


@pytest.mark.parametrize(
    ("say", "kind"),
    [
        (lambda connection: None, RootUnavailable),
        (lambda connection: connection.recv(1), RootUnavailable),
        (lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n"), RootMisconfigured),
    ],
    ids=["cut off", "cut off in the handshake", "no TLS"],
)
def test_what_speaks_no_tls(
    root: GCPRoot,
    monkeypatch: pytest.MonkeyPatch,
    say: Callable[[socket.socket], None],
    kind: type[Exception],
) -> None:
    with talking(say) as port:
        monkeypatch.setenv("OPENKCM_GCP_ENDPOINT", f"https://127.0.0.1:{port}")
        refused(lambda: root.wrap(SEALED, CONTEXT), kind)


@pytest.mark.parametrize(("answer", "kind"), [("407 Proxy", RootMisconfigured), ("502 Bad", RootUnavailable)])
def test_what_a_proxy_answers(
    root: GCPRoot, monkeypatch: pytest.MonkeyPatch, answer: str, kind: type[Exception]
) -> None:
    def say(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(f"HTTP/1.1 {answer}\r\nContent-Length: 0\r\n\r\n".encode())

    with talking(say) as port:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
        refused(lambda: root.wrap(SEALED, CONTEXT), kind)


@pytest.mark.parametrize("way", ["slow", "drip"])
def test_an_answer_that_never_ends(
    cloud: GCPKMS, key: GCPKey, root: GCPRoot, wrapped: bytes, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    start = time.monotonic()
    if way == "slow":
        key.slow(4.0)
        refused(lambda: root.unwrap(wrapped, CONTEXT), RootUnavailable)
    else:
        with dripping(cloud) as port:
            monkeypatch.setenv("OPENKCM_GCP_ENDPOINT", f"https://127.0.0.1:{port}")
            refused(lambda: root.unwrap(wrapped, CONTEXT), RootUnavailable)
    assert time.monotonic() - start < WHOLE_CALL_SECONDS


def test_a_connection_with_half_an_answer_on_it_is_not_used_again(
    cloud: GCPKMS, root: GCPRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gcp_session, "CALL_SECONDS", 0.4)
    connections: list[int] = []
    with dripping(cloud, connections) as port:
        monkeypatch.setenv("OPENKCM_GCP_ENDPOINT", f"https://127.0.0.1:{port}")
        for _ in range(2):
            refused(lambda: root.wrap(SEALED, CONTEXT), RootUnavailable)
    assert len(connections) == 2


@contextlib.contextmanager
def dripping(cloud: GCPKMS, connections: list[int] | None = None) -> Iterator[int]:
    """A TLS server with the provider's certificate that sends a byte of its answer now and then."""
    import ssl

    folder = Path(str(cloud.settings()["REQUESTS_CA_BUNDLE"])).parent
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")

    def say(plain: socket.socket) -> None:
        if connections is not None:
            connections.append(plain.fileno())
        with contextlib.suppress(OSError), context.wrap_socket(plain, server_side=True) as connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            for _ in range(100):
                connection.sendall(b" ")
                time.sleep(0.1)

    with talking(say) as port:
        yield port


def test_redirects_are_not_followed(cloud: GCPKMS, key: GCPKey, root: GCPRoot) -> None:
    seen: list[Request] = []

    def elsewhere(request: Request) -> Response:
        seen.append(request)
        return Response(200, {})

    server = Server(elsewhere)
    for status in (301, 302, 303, 307, 308):
        key.reply({}, status, ("Location", f"{server.url}/v1/x:encrypt"))
        refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured)
    server.close()
    assert seen == []


def test_a_netrc_password_does_not_replace_the_token(
    key: GCPKey, root: GCPRoot, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("default login somebody password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert root.unwrap(root.wrap(SEALED, CONTEXT), CONTEXT) == SEALED
