# SPDX-License-Identifier: Apache-2.0
"""An HTTP(S) server on loopback for providers to test against, with a certificate authority of its own.

The authority and the certificate are made when the server starts, are valid for a day, and lie in a private folder
that goes away with it.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import shutil
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

MAX_BODY_BYTES: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Request:
    """What came in."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON; ValueError if it is none."""
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Response:
    """What goes out: a JSON document (or bytes), a status, and more headers."""

    status: int
    body: Any
    headers: tuple[tuple[str, str], ...] = ()

    def encoded(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


class Server:
    """Serves ``handle(request) -> Response`` on a free port of 127.0.0.1, a thread a connection."""

    def __init__(self, handle: Callable[[Request], Response], *, tls: bool = False) -> None:
        self._handle = handle
        self._folder = Path(tempfile.mkdtemp(prefix="openkcm-testing-"))
        self._server = _Listener(("127.0.0.1", 0), self._handler())
        self.authority: Path | None = None
        if tls:
            self.authority = self._folder / "authority.pem"
            certificate = make_certificate(self._folder)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="openkcm-testing", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        """The port."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """Scheme, host and port; the certificate names 127.0.0.1 and localhost."""
        return f"http{'s' if self.authority else ''}://127.0.0.1:{self.port}"

    def close(self) -> None:
        """Stop listening, and cut every connection: to a client this is an outage, also on one it kept."""
        self._server.shutdown()
        self._server.server_close()
        self._server.cut()
        self._thread.join(timeout=10)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        handle = self._handle

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 60
            disable_nagle_algorithm = True  # headers and body leave in two packets; the second must not wait

            def _serve(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                if size > MAX_BODY_BYTES:
                    self.close_connection = True
                    return
                place = urlsplit(self.path)
                request = Request(
                    self.command,
                    place.path,
                    parse_qs(place.query, keep_blank_values=True),
                    {name.lower(): value for name, value in self.headers.items()},
                    self.rfile.read(size),
                )
                response = handle(request)
                body = response.encoded()
                self.send_response(response.status)
                names = {name.lower() for name, _ in response.headers}
                for name, value in response.headers:
                    self.send_header(name, value)
                if "content-type" not in names:
                    self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

            def log_message(self, *args: Any) -> None:
                """Say nothing: requests carry tokens and wrapped keys."""

        return Handler


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Remember the connection as long as it is served."""
        with self._lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forget it."""
        with self._lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def cut(self) -> None:
        """End every connection that is open."""
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, or does not trust us, is its own business."""


def make_certificate(folder: Path, names: tuple[str, ...] = ("localhost",)) -> Path:
    """Write ``authority.pem`` and a server's certificate with its key, ``server.pem``; returns the latter.

    The certificate names 127.0.0.1 and ``names``.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    now = datetime.datetime.now(datetime.UTC)

    def build(subject: str, issuer: str, key: Any, *, authority: bool) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(
                x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )

    signing, serving = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = "OpenKCM testing"
    root = (
        build(issuer, issuer, signing, authority=True)
        .add_extension(
            x509.KeyUsage(True, False, False, False, False, True, True, False, False), critical=True
        )
        .sign(signing, hashes.SHA256())
    )
    leaf = (
        build("127.0.0.1", issuer, serving, authority=False)
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), *map(x509.DNSName, names)]
            ),
            critical=False,
        )
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False
        )
        .sign(signing, hashes.SHA256())
    )
    (folder / "authority.pem").write_bytes(root.public_bytes(serialization.Encoding.PEM))
    path = folder / "server.pem"
    path.write_bytes(
        serving.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        + leaf.public_bytes(serialization.Encoding.PEM)
    )
    path.chmod(0o600)
    return path
