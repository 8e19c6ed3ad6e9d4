# SPDX-License-Identifier: Apache-2.0
"""What Azure, Entra ID and the network answer, and what becomes of it: every row of the table, over the wire."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from azure_support import CONTEXT, SEALED, in_time, use
from azure_support import hsm_key as hsm_key
from azure_support import provider as provider
from azure_support import root as root
from azure_support import running as running
from openkcm.errors import (
    DecryptError,
    OpenKCMError,
    RootDenied,
    RootDestroyed,
    RootDisabled,
    RootMisconfigured,
    RootThrottled,
    RootUnavailable,
)
from openkcm.roots import Root, open_root
from openkcm.roots.azure import ANSWERS
from openkcm.roots.azure.answers import SAYS, refusal
from openkcm.roots.azure.uri import HOSTS_VARIABLE
from openkcm.testing.azure import AzureKey, AzureKeyVault
from openkcm.testing.azure.entra import ENTRA_ERRORS
from openkcm.testing.https import Response, make_certificate
from support import refused

ENTRA = sorted(name for name in ANSWERS if name.startswith("AADSTS"))
NETWORK = sorted(name for name in ANSWERS if name.endswith("Error") and not name.startswith("Internal"))
SERVICE = sorted(set(ANSWERS) - set(ENTRA) - set(NETWORK))


# ---- the table --------------------------------------------------------------------------------------------


def test_the_table_is_covered() -> None:
    assert len(SERVICE) > 20
    assert set(ENTRA) <= set(ENTRA_ERRORS)
    assert set(NETWORK) == {
        "CredentialUnavailableError",
        "SSLCertVerificationError",
        "ServiceRequestError",
        "ServiceRequestTimeoutError",
        "ServiceResponseError",
        "ServiceResponseTimeoutError",
    }
    assert set(SAYS) <= set(ANSWERS)
    assert {kind for kind in ANSWERS.values() if issubclass(kind, RootUnavailable)} == {
        RootUnavailable,
        RootThrottled,
    }


@pytest.mark.parametrize("name", SERVICE)
def test_an_answer_of_the_vault(key: AzureKey, root: Root, name: str) -> None:
    wrapped = use(root)
    key.answer(name)
    error = refused(lambda: root.unwrap(wrapped, CONTEXT), ANSWERS[name])
    wrapping = refused(
        lambda: root.wrap(SEALED, CONTEXT),
        RootMisconfigured if ANSWERS[name] is DecryptError else ANSWERS[name],
    )
    assert ANSWERS[name] is DecryptError or f"({name})" in str(error)
    assert f"({name})" in str(wrapping)
    assert "{" not in str(error) + str(wrapping)
    key.heal()
    assert root.unwrap(wrapped, CONTEXT) == SEALED


@pytest.mark.parametrize("name", ENTRA)
def test_an_answer_of_entra(key: AzureKey, root: Root, name: str) -> None:
    key.answer(name)
    for _ in range(2):
        error = refused(lambda: root.wrap(SEALED, CONTEXT), ANSWERS[name])
        assert f"({name})" in str(error)
        assert "Trace" not in str(error)
    key.heal()
    use(root)  # at once: the SDK would repeat Entra's refusal for a minute


def test_answers_that_nobody_knows(key: AzureKey, provider: AzureKeyVault, root: Root) -> None:
    provider.entra.answer("AADSTS50196")
    assert "(AADSTS50196)" in str(refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured))
    with pytest.raises(ValueError, match="no answer"):
        provider.entra.answer("KeyDisabled")
    with pytest.raises(ValueError, match="no answer"):
        key.answer("ServiceRequestError")


def error(code: object = "Forbidden", message: object = "", inner: object = None) -> dict[str, object]:
    return {"error": {"code": code, "message": message, "innererror": inner}}


@pytest.mark.parametrize(
    ("status", "document", "kind"),
    [
        (403, error(message="Operation unwrapKey is not allowed on a disabled key."), RootDisabled),
        (403, error(message="Operation wrapKey is not allowed on an expired key."), RootDisabled),
        (403, error(message="Operation wrapKey is not allowed on a not yet valid key."), RootDisabled),
        (403, error(message="Operation unwrapKey is not permitted on this key."), RootDenied),
        (403, error(inner={"code": "SomethingNew"}), RootDenied),
        (403, error(code="SomethingNew"), RootDenied),
        (403, error(code="Throttled"), RootMisconfigured),
        (403, error(code="ServiceUnavailable"), RootMisconfigured),
        (403, error(code="BadParameter"), RootMisconfigured),
        (403, {"error": {"code": "Forbidden", "innerError": {"code": "KeyDisabled"}}}, RootDisabled),
        (401, error(code="Unauthorized", message="AKV10099: new"), RootMisconfigured),
        (404, error(code="KeyNotFound"), RootDestroyed),
        (404, error(code="NotFound"), RootMisconfigured),
        (404, None, RootMisconfigured),
        (409, error(code="Conflict"), RootMisconfigured),
        (400, error(code="BadParameter"), DecryptError),
        (400, error(code="BadRequest"), RootMisconfigured),
        (407, None, RootMisconfigured),
        (408, None, RootUnavailable),
        (429, None, RootThrottled),
        (429, error(code="KeyDisabled"), RootThrottled),
        (500, None, RootUnavailable),
        (502, "<html>", RootUnavailable),
        (503, error(code="Forbidden"), RootUnavailable),
        (599, [], RootUnavailable),
        (302, None, RootMisconfigured),
        (403, [], RootDenied),
        (403, {"error": []}, RootDenied),
        (403, {"error": "KeyDisabled"}, RootDenied),
        (403, error(code=7, message=7, inner=[]), RootDenied),
        (403, error(code="a b {x} \n", message="{permission}", inner={"code": {}}), RootDenied),
        (403, error(code="x" * 5000), RootDenied),
    ],
)
def test_what_an_answer_means(status: int, document: object, kind: type[OpenKCMError]) -> None:
    found = refusal(status, document, "unwrapKey", unwrapping=True)
    assert type(found) is kind
    assert len(str(found)) < 400
    assert "\n" not in str(found)
    assert not isinstance(found, RootDenied) or found.permission == "unwrapKey"


def test_a_firewall_is_no_missing_permission(key: AzureKey, root: Root) -> None:
    key.answer("ForbiddenByFirewall")
    denied = refused(lambda: root.wrap(SEALED, CONTEXT), RootDenied)
    assert isinstance(denied, RootDenied)
    assert denied.permission is None


@pytest.mark.parametrize(
    ("status", "kind"),
    [(429, RootThrottled), (500, RootUnavailable), (502, RootUnavailable), (503, RootUnavailable)],
)
def test_a_failing_vault(key: AzureKey, root: Root, status: int, kind: type[OpenKCMError]) -> None:
    wrapped = use(root)
    key.fail(status)
    requests = key.requests
    with in_time():
        assert refused(lambda: root.unwrap(wrapped, CONTEXT), kind).retryable  # type: ignore[attr-defined]
    assert key.requests == requests + 1, "the SDK must not retry"
    key.heal()
    assert root.unwrap(wrapped, CONTEXT) == SEALED


@pytest.mark.parametrize("kind", ["application/json", "image/png", "text/html", ""])
@pytest.mark.parametrize(
    ("status", "answer"), [(503, RootUnavailable), (403, RootDenied), (429, RootThrottled)]
)
def test_refusals_that_cannot_be_read(
    provider: AzureKeyVault, key: AzureKey, root: Root, status: int, answer: type[OpenKCMError], kind: str
) -> None:
    wrapped = use(root)
    provider.raw_answer = Response(status, b"\x00{", (("Content-Type", kind),))
    refused(lambda: root.unwrap(wrapped, CONTEXT), answer)
    refused(lambda: root.wrap(SEALED, CONTEXT), answer)


# ---- the network ------------------------------------------------------------------------------------------


def test_black_holes(provider: AzureKeyVault, key: AzureKey, root: Root) -> None:
    wrapped = use(root)
    key.black_hole()
    with in_time():
        silent = refused(lambda: root.unwrap(wrapped, CONTEXT), RootUnavailable)
    assert "(ServiceResponseTimeoutError)" in str(silent)
    key.heal()
    assert root.unwrap(wrapped, CONTEXT) == SEALED
    root.close()
    provider.entra.black_hole()
    with in_time():
        silent = refused(lambda: root.unwrap(wrapped, CONTEXT), RootUnavailable)
    assert "Entra ID does not answer (ServiceResponseTimeoutError)" in str(silent)


def test_one_call_is_bounded_whatever_it_takes(provider: AzureKeyVault, key: AzureKey, root: Root) -> None:
    """A challenge, two requests to log in, and the call itself, each slow but in time."""
    key.slow(1.8)
    provider.entra.slow(1.8)
    with in_time():
        refused(lambda: root.wrap(SEALED, CONTEXT), RootUnavailable)


def test_a_closed_port() -> None:
    with AzureKeyVault() as provider:
        root = open_root(provider.make_hsm_key("root").uri)
        wrapped = use(root)
        provider.stop()
        with in_time():
            gone = refused(lambda: root.unwrap(wrapped, CONTEXT), RootUnavailable)
        assert "(Service" in str(gone)
        fresh = open_root(root.uri)
        closed = refused(lambda: fresh.wrap(SEALED, CONTEXT), RootUnavailable)
        assert "(ServiceRequestError)" in str(closed)
        for each in (root, fresh):
            each.close()


def test_entra_is_not_there(key: AzureKey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_AUTHORITY_HOST", "https://127.0.0.1:9")
    root = open_root(key.uri)
    closed = refused(lambda: root.wrap(SEALED, CONTEXT), RootUnavailable)
    assert "Entra ID does not answer (ServiceRequestError)" in str(closed)
    monkeypatch.setenv("AZURE_AUTHORITY_HOST", "https://login.invalid")
    with in_time():
        unnamed = refused(lambda: root.wrap(SEALED, CONTEXT), RootUnavailable)
    assert "the name of Entra ID does not resolve" in str(unnamed)
    root.close()


@pytest.mark.usefixtures("provider")
def test_a_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOSTS_VARIABLE, "vault.invalid=https://vault.azure.net")
    root = open_root("azure-kms://vault.invalid/keys/root")
    with in_time():
        unnamed = refused(lambda: root.wrap(SEALED, CONTEXT), RootUnavailable)
    assert "the name of the vault does not resolve" in str(unnamed)
    assert isinstance(unnamed, RootUnavailable)
    root.close()


def test_a_certificate_that_is_not_trusted(
    key: AzureKey, root: Root, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wrapped = use(root)
    root.close()
    make_certificate(tmp_path)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "authority.pem"))
    requests = key.requests
    untrusted = refused(lambda: root.unwrap(wrapped, CONTEXT), RootMisconfigured)
    assert "(SSLCertVerificationError)" in str(untrusted)
    assert "clock" in str(untrusted)
    assert key.requests == requests
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "none.pem"))
    assert "REQUESTS_CA_BUNDLE" in str(refused(lambda: root.unwrap(wrapped, CONTEXT), RootMisconfigured))
    monkeypatch.undo()
    assert root.unwrap(wrapped, CONTEXT) == SEALED


@contextmanager
def listening(
    monkeypatch: pytest.MonkeyPatch, serve: Callable[[socket.socket], None] | None = None
) -> Iterator[Root]:
    """A root at a server that does with each connection what ``serve`` does, or that accepts none."""
    with socket.create_server(("127.0.0.1", 0), backlog=0 if serve is None else 8) as server:
        host = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv(HOSTS_VARIABLE, f"{host}=https://vault.azure.net")
        waiting = []
        if serve is None:
            for _ in range(4):  # fill the queue, so that no other connection is made
                waiting.append(socket.socket())
                waiting[-1].setblocking(False)
                waiting[-1].connect_ex(server.getsockname())
        root = open_root(f"azure-kms://{host}/keys/root")
        server.settimeout(0.2)
        stop = threading.Event()

        def accept() -> None:
            while not stop.is_set():
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                with connection:
                    connection.settimeout(5)
                    with suppress(OSError):
                        serve(connection)  # type: ignore[misc]

        thread = threading.Thread(target=accept)
        if serve is not None:
            thread.start()
        try:
            yield root
        finally:
            stop.set()
            if serve is not None:
                thread.join(20)
            root.close()
            for each in waiting:
                each.close()


@pytest.mark.usefixtures("provider")
def test_a_host_that_takes_no_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(monkeypatch) as root, in_time():
        silent = refused(lambda: root.wrap(SEALED, CONTEXT), RootUnavailable)
    assert "(ServiceRequestTimeoutError)" in str(silent)


@pytest.mark.usefixtures("provider")
def test_a_host_that_hangs_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(monkeypatch, lambda connection: None) as root:
        refused(lambda: root.wrap(SEALED, CONTEXT), RootUnavailable)


@pytest.mark.usefixtures("provider")
def test_a_host_that_speaks_no_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"
    with listening(monkeypatch, lambda connection: connection.sendall(plain)) as root:
        refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"", RootUnavailable),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", RootUnavailable),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", RootUnavailable),
        (b"HTTP/1.1 503 No\r\nContent-Type: image/png\r\nContent-Length: 1\r\n\r\nx", RootUnavailable),
        (b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n", RootMisconfigured),
        (b"HTTP/1.1 401 No\r\nWWW-Authenticate: Basic\r\nContent-Length: 0\r\n\r\n", RootMisconfigured),
        (b"HTTP/1.1 401 No\r\nWWW-Authenticate: Bearer x=y\r\nContent-Length: 0\r\n\r\n", RootMisconfigured),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", RootMisconfigured),
    ],
)
@pytest.mark.usefixtures("provider")
def test_a_host_that_speaks_no_sense(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: bytes, kind: type[OpenKCMError]
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(make_certificate(tmp_path))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "authority.pem"))

    def serve(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secure:
            secure.recv(65536)
            secure.sendall(answer)

    with listening(monkeypatch, serve) as root, in_time():
        failed = refused(lambda: root.wrap(SEALED, CONTEXT), kind)
    assert answer or "(ServiceResponseError)" in str(failed)
