# SPDX-License-Identifier: Apache-2.0
"""Requests to OpenBao and Vault: hvac's API classes over an adapter that trusts no answer.

Invariant: one attempt a request, bounded in time and in size. A request goes to the URI's host and no other: redirects
are not followed, since ``requests`` would take the token along. Nothing is taken from the environment behind our back
(no .netrc, no REQUESTS_CA_BUNDLE in the place of the authority that was named), and no answer raises anything but our
own errors.

This module imports hvac and requests; import it when they are needed.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import socket
import ssl
import time
from typing import Any, Final

import requests
from hvac.adapters import Adapter  # type: ignore[import-untyped]
from requests.adapters import HTTPAdapter
from requests.utils import get_environ_proxies
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError

from ...errors import OpenKCMError, RootMisconfigured, RootUnavailable
from ..base import ANSWER_SECONDS, CONNECT_SECONDS
from .answers import Answer, transport_error
from .uri import BaoURI, is_this_machine

MAX_ANSWER_BYTES: Final = 256 * 1024
"""More than any answer to what is asked here."""

CHUNK_BYTES: Final = 16 * 1024
CONNECTIONS_KEPT: Final = 32


class BoundedAdapter(Adapter):  # type: ignore[misc]  # hvac has no type information
    """hvac's way to the server, for one call of ours: its token, and the moment by which it must be over."""

    def __init__(
        self,
        session: requests.Session,
        address: str,
        namespace: str | None,
        token: str | None,
        deadline: float,
    ) -> None:
        super().__init__(
            base_uri=address, token=token, session=session, namespace=namespace, allow_redirects=False
        )
        self._deadline = deadline

    def get_login_token(self, response: Any) -> str:
        """Not used: a login's answer is read where its lease is."""
        raise NotImplementedError

    def request(
        self, method: str, url: str, headers: Any = None, raise_exception: bool = True, **options: Any
    ) -> Answer:
        """Send one request; every status is an answer, and what is not an answer is one of our errors."""
        given = {"X-Vault-Request": "true"}
        if self.token:
            given["X-Vault-Token"] = self.token
        if self.namespace:
            given["X-Vault-Namespace"] = self.namespace
        failure: OpenKCMError
        try:
            return self._exchange(method, self.urljoin(self.base_uri, url), given, options.get("json"))
        except (requests.RequestException, HTTPError, OSError, ValueError) as error:
            failure = transport_error(error)
        raise failure  # out here, where no request with its token hangs on to it as the context

    def _exchange(self, method: str, url: str, headers: dict[str, str], body: Any) -> Answer:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise RootUnavailable("the customer's server took too long to log us in")
        with self.session.request(
            method=method,
            url=url,
            headers=headers,
            json=body,
            allow_redirects=False,
            stream=True,
            timeout=(min(CONNECT_SECONDS, remaining), min(ANSWER_SECONDS, remaining)),
        ) as response:
            return Answer(response.status_code, _document(self._body(response)))

    def _body(self, response: requests.Response) -> bytes:
        """The body as it came over the wire; empty if it is too long to be an answer."""
        body = b""
        while chunk := response.raw.read(CHUNK_BYTES, decode_content=False):
            body += chunk
            if len(body) > MAX_ANSWER_BYTES:
                return b""
        return body


class _InTime(io.RawIOBase):
    """What comes over a socket until a moment: a socket's own timeout begins anew with every byte."""

    def __init__(self, source: io.RawIOBase, connection: socket.socket) -> None:
        super().__init__()
        self._source = source
        self._connection = connection
        self._seconds = connection.gettimeout()
        self._deadline = time.monotonic() + (ANSWER_SECONDS if self._seconds is None else self._seconds)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("timed out")
        self._connection.settimeout(remaining)
        return self._source.readinto(buffer)

    def close(self) -> None:
        if not self.closed:
            self._source.close()
            if self._connection.fileno() >= 0:  # it is kept for the next request
                self._connection.settimeout(self._seconds)
        super().close()


class _Response(http.client.HTTPResponse):
    """An answer that is over in time as a whole: status line, headers (and any "100 Continue") and body."""

    def __init__(self, sock: socket.socket, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self.fp: io.BufferedReader = io.BufferedReader(_InTime(self.fp.detach(), sock))


class _Connection(HTTPConnection):
    response_class = _Response


class _SecureConnection(HTTPSConnection):
    response_class = _Response


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


_POOLS: Final = {"http": _Pool, "https": _SecurePool}


class _Transport(HTTPAdapter):
    """requests' transport with our connections."""

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **options)
        manager.pool_classes_by_scheme = _POOLS
        return manager


def open_session(parsed: BaoURI) -> requests.Session:
    """Open a session whose every setting is ours.

    Raises:
        RootMisconfigured: the certificate authorities or the client certificate that are named are not there.
    """
    session = requests.Session()
    session.trust_env = False
    session.headers.update({"User-Agent": "openkcm", "Accept-Encoding": "identity"})
    session.mount(
        f"{parsed.address}/", _Transport(pool_connections=1, pool_maxsize=CONNECTIONS_KEPT, max_retries=0)
    )
    if parsed.tls:
        session.verify = _authorities(parsed)
        session.cert = _client_certificate()
    if not is_this_machine(parsed.host):
        session.proxies = get_environ_proxies(parsed.address)
    return session


def _authorities(parsed: BaoURI) -> str | bool:
    """Who may vouch for the server: what was named, else what this machine trusts, else what requests brings."""
    named = parsed.ca or setting("CACERT", "CAPATH")
    if named is not None:
        if not os.access(named, os.R_OK):
            raise RootMisconfigured(
                f"the certificate authorities {named} cannot be read; check ca= or BAO_CACERT"
            )
        return named
    machine = ssl.get_default_verify_paths()  # a path is None where there is nothing
    folder = machine.capath
    return machine.cafile or (
        folder if folder and os.access(folder, os.R_OK) and os.listdir(folder) else True
    )


def _client_certificate() -> tuple[str, str] | None:
    certificate, key = setting("CLIENT_CERT"), setting("CLIENT_KEY")
    if certificate is None:
        return None
    if key is None or not os.access(certificate, os.R_OK) or not os.access(key, os.R_OK):
        raise RootMisconfigured("the files that BAO_CLIENT_CERT and BAO_CLIENT_KEY name cannot both be read")
    return certificate, key


def setting(*names: str) -> str | None:
    """A setting of OpenBao's and Vault's own clients: the first of BAO_NAME and VAULT_NAME that is set."""
    for name in names:
        for prefix in ("BAO_", "VAULT_"):
            if value := os.environ.get(prefix + name):
                return value
    return None


def _document(body: bytes) -> dict[str, Any] | None:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None
