# SPDX-License-Identifier: Apache-2.0
"""What becomes of an ``aws-kms:`` root when the network fails, or something answers that is not AWS KMS."""

from __future__ import annotations

import contextlib
import gzip
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import botocore.exceptions
import pytest

from openkcm.errors import RootMisconfigured, RootUnavailable
from openkcm.roots import Root, open_root
from openkcm.roots.aws.answers import translate
from openkcm.testing.aws import ACCOUNT, AWSKMS
from openkcm.testing.https import Response, Server, make_certificate
from support import refused

CONTEXT = {"layer": "L2", "tenant": "acme", "region": "local", "version": "1"}
SEALED = bytes(range(72))
ARN = f"arn:aws:kms:eu-central-1:{ACCOUNT}:key/1234abcd-12ab-34cd-56ef-1234567890ab"
URI = f"aws-kms://{ARN}"
BLOB = b"\x01" + bytes(120)
LONGEST_SECONDS = 8.0


@pytest.fixture
def provider() -> Iterator[AWSKMS]:
    with AWSKMS() as provider:
        yield provider


@pytest.fixture
def nowhere(provider: AWSKMS, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Root]:
    """A root whose KMS is at a URL, with credentials."""

    def build(url: str) -> Root:
        monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", url)
        return open_root(URI)

    return build


def unwrap(root: Root) -> bytes:
    return root.unwrap(BLOB, CONTEXT)


# ---- the network ---------------------------------------------------------------------------------------------------


def test_a_stopped_service(provider: AWSKMS) -> None:
    root = open_root(provider.make_key("root").uri)
    root.wrap(SEALED, CONTEXT)
    provider.stop()
    refused(lambda: root.wrap(SEALED, CONTEXT), RootUnavailable)  # the open connection ends
    assert "EndpointConnectionError" in str(refused(lambda: root.wrap(SEALED, CONTEXT), RootUnavailable))


def test_a_name_that_does_not_resolve(nowhere: Callable[[str], Root]) -> None:
    error = refused(lambda: unwrap(nowhere("https://kms.openkcm.invalid")), RootUnavailable)
    assert "kms.openkcm.invalid does not resolve" in str(error)


def test_whether_a_lookup_is_worth_another_try() -> None:
    for number, retryable in ((socket.EAI_NONAME, False), (socket.EAI_AGAIN, True)):
        error = botocore.exceptions.EndpointConnectionError(
            endpoint_url="https://kms.example", error=socket.gaierror(number, "x")
        )
        translated = translate(error).error
        assert type(translated) is RootUnavailable
        assert translated.retryable is retryable


def test_a_connection_that_is_not_accepted(nowhere: Callable[[str], Root]) -> None:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):  # fill the queue, so that the kernel drops the next one's SYN
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        root = nowhere(f"https://127.0.0.1:{listener.getsockname()[1]}")
        started = time.monotonic()
        error = refused(lambda: unwrap(root), RootUnavailable)
        assert time.monotonic() - started < LONGEST_SECONDS
        assert "ConnectTimeoutError" in str(error)


@contextlib.contextmanager
def raw_server(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """Accept connections one after the other and leave each to ``serve``."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(5)
                    serve(connection)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)
        assert not thread.is_alive()


def replies(answer: bytes) -> Callable[[socket.socket], None]:
    """Read a whole request, lest what was not read resets the connection, and answer it."""

    def serve(connection: socket.socket) -> None:
        request = b""
        while not request.endswith(b"}"):
            received = connection.recv(65536)
            if not received or received[:1] == b"\x16":  # gone, or a TLS handshake
                break
            request += received
        connection.sendall(answer)

    return serve


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nonsense\r\n\r\n",
        b'HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"Plain',
        b'HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"Plaintext": "AAAA"}',
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n20\r\nab",
        b"HTTP/1.1 400 Bad Request\r\nContent-Length: 99\r\n\r\n{",
        b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 14\r\n\r\n<html>x</html>",
    ],
)
def test_answers_that_are_cut_off(nowhere: Callable[[str], Root], answer: bytes) -> None:
    with raw_server(replies(answer)) as port:
        refused(lambda: unwrap(nowhere(f"http://127.0.0.1:{port}")), RootUnavailable)


def test_a_connection_lost_in_the_handshake(nowhere: Callable[[str], Root]) -> None:
    with raw_server(lambda connection: None) as port:
        error = refused(lambda: unwrap(nowhere(f"https://127.0.0.1:{port}")), RootUnavailable)
    assert "AWS does not answer at 127.0.0.1" in str(error)


def test_a_service_that_does_not_speak_tls(nowhere: Callable[[str], Root]) -> None:
    with raw_server(replies(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as port:
        refused(lambda: unwrap(nowhere(f"https://127.0.0.1:{port}")), RootMisconfigured)


def test_a_certificate_of_somebody_else(
    provider: AWSKMS, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_certificate(tmp_path)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "authority.pem"))
    error = refused(lambda: unwrap(open_root(URI)), RootMisconfigured)
    assert "not trusted" in str(error)
    assert "AWS_CA_BUNDLE" in str(error)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "none.pem"))
    assert "AWS_CA_BUNDLE" in str(refused(lambda: unwrap(open_root(URI)), RootMisconfigured))


def test_a_proxy_that_does_not_answer(
    nowhere: Callable[[str], Root], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://user:hunter2@127.0.0.1:1")
    monkeypatch.setenv("https_proxy", "http://user:hunter2@127.0.0.1:1")
    error = refused(lambda: unwrap(nowhere("https://kms.openkcm.invalid")), RootUnavailable)
    assert "HTTPS_PROXY" in str(error)
    assert "hunter2" not in str(error)


# ---- answers of something else ---------------------------------------------------------------------------------------


def decrypted(**fields: Any) -> dict[str, Any]:
    return {"KeyId": ARN, "Plaintext": "AAAA", **fields}


BODIES = {
    "empty": b"",
    "garbage": b"garbage",
    "binary": os.urandom(64) + b"\xff",
    "html": b"<html>Log in to the Wi-Fi</html>",
    "null": b"null",
    "list": b"[]",
    "number": b"5",
    "text": b'"text"',
    "nothing": {},
    "no plaintext": {"KeyId": ARN},
    "no key": {"Plaintext": "AAAA"},
    "another key": decrypted(KeyId=ARN[:-1] + "0"),
    "key as number": decrypted(KeyId=7),
    "key as list": decrypted(KeyId=[ARN]),
    "plaintext as number": decrypted(Plaintext=5),
    "plaintext as list": decrypted(Plaintext=["AAAA"]),
    "plaintext as mapping": decrypted(Plaintext={"a": "AAAA"}),
    "plaintext not base64": decrypted(Plaintext="A"),
    "plaintext not ascii": decrypted(Plaintext="äää"),
    "empty plaintext": decrypted(Plaintext=""),
    "long plaintext": decrypted(Plaintext="A" * 8192),
    "huge": decrypted(More="A" * 100_000),
    "deep": b"[" * 60_000,
    "compressed": gzip.compress(b'{"Plaintext": "AAAA"}'),
}


@pytest.mark.parametrize("status", [200, 400])
@pytest.mark.parametrize("body", sorted(BODIES))
def test_hostile_bodies(nowhere: Callable[[str], Root], body: str, status: int) -> None:
    server = Server(lambda request: Response(status, BODIES[body]))
    try:
        root = nowhere(server.url)
        error = refused(lambda: unwrap(root), RootMisconfigured)
        assert "Wi-Fi" not in str(error)
        refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured)
        root.close()
    finally:
        server.close()


@pytest.mark.parametrize(
    "kind", [5, None, [], {}, "", "A" * 5000, "x\x1b[31m", "aws.kms#Weird:http://x", ["DisabledException"]]
)
@pytest.mark.parametrize("status", [301, 400, 403])
def test_hostile_errors(nowhere: Callable[[str], Root], kind: Any, status: int) -> None:
    server = Server(lambda request: Response(status, {"__type": kind, "message": 7}))
    try:
        root = nowhere(server.url)
        error = refused(lambda: unwrap(root), RootMisconfigured)
        assert "\x1b" not in str(error)
        assert len(str(error)) < 400
        root.close()
    finally:
        server.close()


def test_a_well_formed_answer_is_taken(nowhere: Callable[[str], Root]) -> None:
    """What shows that the bodies above fail for their own reasons."""
    server = Server(lambda request: Response(200, decrypted()))
    try:
        root = nowhere(server.url)
        assert unwrap(root) == b"\x00\x00\x00"
        root.close()
    finally:
        server.close()
