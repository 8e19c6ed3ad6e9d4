# SPDX-License-Identifier: Apache-2.0
"""Google's SDK, bounded: its REST transport, its login, and the connections of both.

Invariant: a call makes one attempt, and its login and its request share one deadline. Nothing is followed elsewhere,
nothing of ours is sent without TLS but to a metadata server, no answer is read beyond ``MAX_ANSWER_BYTES``, and the SDK
logs nothing of what it carries. gRPC is not used: its threads do not survive a fork.

What the SDK would do by itself, and does not here: retry requests and logins with pauses of seconds, wait 120 seconds
for a login, follow redirects, put a .netrc password in the place of the token, write plaintexts to its debug log.
"""

from __future__ import annotations

import functools
import importlib
import io
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from ...errors import RootMisconfigured, RootUnavailable
from ..base import ANSWER_SECONDS, CONNECT_SECONDS
from .answers import answer, login_refusal, refusal

if TYPE_CHECKING:
    from requests import PreparedRequest, Response, Session

ENDPOINT_VARIABLE: Final = "OPENKCM_GCP_ENDPOINT"
UNIVERSE_VARIABLE: Final = "GOOGLE_CLOUD_UNIVERSE_DOMAIN"
UNIVERSE: Final = "googleapis.com"
SCOPES: Final = ("https://www.googleapis.com/auth/cloudkms",)
"""All that a token of ours may be used for."""

MAX_ANSWER_BYTES: Final = 256 * 1024
CHUNK_BYTES: Final = 16 * 1024
CALL_SECONDS: Final = CONNECT_SECONDS + ANSWER_SECONDS
"""One call with its login."""

_HOST: Final = re.compile(
    r"(?:https://)?(?P<host>[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{1,5}))?/?",
    re.ASCII,
)
_KMS: Final = "google.cloud.kms_v1.services.key_management_service"
_TALKATIVE: Final = ("google.auth.transport.requests", f"{_KMS}.transports.rest")
_call = threading.local()


@contextmanager
def one_call() -> Iterator[None]:
    """What is done inside ends by one deadline, and is not logged by the SDK; for this thread."""
    _call.deadline = time.monotonic() + CALL_SECONDS
    try:
        yield
    finally:
        _call.deadline = None


def _left() -> float:
    """The seconds that are left to this thread's call."""
    left = float(_call.deadline - time.monotonic())
    if left <= 0:
        raise RootUnavailable("Google did not answer in time, login included")
    return left


def _timeouts() -> tuple[float, float]:
    """How long a connection, and then each part of an answer, may take."""
    left = _left()
    return min(CONNECT_SECONDS, left), min(ANSWER_SECONDS, left)


class _Quiet(logging.Filter):
    """Drops the SDK's records of our own calls, which hold what is encrypted; other users' of the SDK pass."""

    def filter(self, record: logging.LogRecord) -> bool:
        return getattr(_call, "deadline", None) is None


_QUIET: Final = _Quiet()


class Client:
    """A Cloud KMS client with its login, for one process and all its threads.

    Args:
        endpoint: one of Google's hosts, None for the global one; ``OPENKCM_GCP_ENDPOINT`` goes before both.
    """

    def __init__(self, endpoint: str | None) -> None:
        for name in _TALKATIVE:
            logging.getLogger(name).addFilter(_QUIET)
        host = endpoint_of(endpoint)
        self._login = Login()
        self.credentials = _find_credentials(self._login)
        self._transport = _transport(host, self.credentials, self._login)
        self._api = _load(_KMS).KeyManagementServiceClient(transport=self._transport)

    def encrypt(self, **request: Any) -> Any:
        """Call Encrypt once."""
        return self._api.encrypt(request=request, retry=None, timeout=None)

    def decrypt(self, **request: Any) -> Any:
        """Call Decrypt once."""
        return self._api.decrypt(request=request, retry=None, timeout=None)

    def email(self) -> str | None:
        """Our service account; None for a person, or a federated identity without one."""
        email = getattr(self.credentials, "service_account_email", None)
        if email == "default":  # a metadata server's, which tells it with the first token
            self.credentials.refresh(self._login)
            email = getattr(self.credentials, "service_account_email", None)
        return email if isinstance(email, str) and "@" in email else None

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()
        self._login.close()


def _load(name: str) -> Any:
    """A module of the SDK, which says little of its types."""
    return importlib.import_module(name)


def check_installed() -> None:
    """Raise RootMisconfigured unless the SDK is there."""
    try:
        for name in (_KMS, "google_crc32c", "requests"):
            _load(name)
    except ImportError:
        raise RootMisconfigured("gcp-kms: roots need the extra: pip install 'openkcm[gcp]'") from None


def crc32c(data: bytes) -> int:
    """The checksum that Cloud KMS uses (RFC 3720, appendix B.4)."""
    return int(_load("google_crc32c").value(data))


def endpoint_of(host: str | None) -> str:
    """The URL of the endpoint to use: the operator's, the URI's, or the global one of the universe."""
    named = os.environ.get(ENDPOINT_VARIABLE)
    if named:
        match = _HOST.fullmatch(named)
        if match is None or int(match["port"] or 443) not in range(1, 65536):
            raise RootMisconfigured(
                f"{ENDPOINT_VARIABLE} is https://HOST[:PORT], without a path and never http:"
            )
        return f"https://{match['host']}:{match['port'] or 443}"
    return f"https://{host or f'cloudkms.{universe()}'}:443"


def universe() -> str:
    """Google's public cloud, or the sovereign one that the environment names."""
    return os.environ.get(UNIVERSE_VARIABLE) or UNIVERSE


# ---- the login --------------------------------------------------------------------------------------------


def _find_credentials(login: Login) -> Any:
    """Application Default Credentials: a file, gcloud's, or the metadata server's.

    No scopes are given to ``google.auth.default``: with scopes it would log in to find the name of a project.
    """
    with login.probing():
        found, _ = _load("google.auth").default(request=login)
    if isinstance(found, _load("google.auth.compute_engine").Credentials):
        # Else it asks for its universe later, by itself and without bounds.
        found = found.with_universe_domain(universe())
    elif found.universe_domain != universe():
        raise RootMisconfigured(
            f"the credentials are of another universe of Google's than {universe()}; check {UNIVERSE_VARIABLE}"
        )
    found = _load("google.auth.credentials").with_scopes_if_required(found, None, default_scopes=list(SCOPES))
    if isinstance(found, _load("google.oauth2.service_account").Credentials):
        found = found.with_always_use_jwt_access(True)  # as the SDK does: it signs, and asks no login service
    return found


class Login:
    """Carries the requests of google-auth (its ``transport.Request``): one attempt each, by the call's deadline.

    ``session`` is there for google-auth, which mounts the client certificate of a metadata server that wants one.
    """

    def __init__(self) -> None:
        self.session = bound(_load("requests").Session(), also_plain=True)
        self._probing = threading.local()

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Inside, a metadata server that does not answer is none."""
        self._probing.on = True
        try:
            yield
        finally:
            self._probing.on = False

    def __call__(
        self,
        url: str,
        method: str = "GET",
        body: Any = None,
        headers: Any = None,
        timeout: object = None,
        **options: Any,
    ) -> LoginAnswer:
        try:
            response = self.session.request(
                method, url, data=body, headers=headers, timeout=_timeouts(), **options
            )
        except (_load("requests").RequestException, RootUnavailable):
            if getattr(self._probing, "on", False) and not urlsplit(url).path.strip("/"):
                raise answer("DefaultCredentialsError") from None
            raise
        refused = login_refusal(response.status_code, response.headers.get("Date"), response.content)
        if refused is not None:
            raise refused
        return LoginAnswer(response)

    def close(self) -> None:
        """Close the connections."""
        self.session.close()


class LoginAnswer:
    """What google-auth wants of an answer (its ``transport.Response``)."""

    def __init__(self, response: Response) -> None:
        self.status = response.status_code
        self.headers = response.headers
        self.data = response.content


# ---- connections ------------------------------------------------------------------------------------------


def bound(session: Session, *, also_plain: bool = False) -> Any:
    """Give a session our bounds; ``also_plain`` lets it use http:, which metadata servers speak."""
    adapter = _adapter_class()(max_retries=0)
    session.adapters.clear()
    session.mount("https://", adapter)
    if also_plain:
        session.mount("http://", adapter)
    session.max_redirects = 0
    session.headers["Accept-Encoding"] = "identity"
    session.auth = _keep  # or a .netrc entry would replace the token
    return session


def _keep(request: PreparedRequest) -> PreparedRequest:
    return request


@functools.cache
def _adapter_class() -> type[Any]:
    from requests.adapters import HTTPAdapter

    class Adapter(HTTPAdapter):
        """Sends a request by the call's deadline, and reads a bounded answer."""

        def send(self, request: PreparedRequest, *arguments: Any, **options: Any) -> Response:
            options |= {"stream": True, "timeout": _timeouts()}
            response = super().send(request, *arguments, **options)
            raw = response.raw
            try:
                response.raw = io.BytesIO(_read(raw))
            except BaseException:
                raw.close()  # or the rest of the answer would be taken for the next one's beginning
                raise
            finally:
                raw.release_conn()
            return response

    return Adapter


def _read(raw: Any) -> bytes:
    read = getattr(raw, "read1", raw.read)  # urllib3 1 has no read1
    body = bytearray()
    while chunk := read(CHUNK_BYTES):
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            raise answer("ParseError")
        _left()
    return bytes(body)


@functools.cache
def _session_class() -> Any:
    from google.auth.transport.requests import AuthorizedSession

    class BoundSession(AuthorizedSession):
        """Turns a refusal into our vocabulary before the SDK reads it, which takes the body's form on trust."""

        def request(self, *arguments: Any, **options: Any) -> Any:
            response: Response = super().request(*arguments, **options)  # type: ignore[no-untyped-call]
            if response.status_code >= 400:
                raise refusal(
                    response.status_code,
                    response.headers.get("Date"),
                    response.content,
                    decrypting=urlsplit(response.url).path.endswith(":decrypt"),
                )
            return response

    return BoundSession


def _transport(host: str, credentials: Any, login: Login) -> Any:
    """The SDK's REST transport on a session of ours; a 401 to an old token is worth a new one, once.

    The SDK has no public way to give it a session. If its insides change, this fails loudly, before a request is made.
    """
    rest = _load(f"{_KMS}.transports.rest")
    transport = rest.KeyManagementServiceRestTransport(host=host, credentials=credentials)
    try:
        transport._session.close()
        session = _session_class()(
            credentials, max_refresh_attempts=1, auth_request=login, default_host=transport.DEFAULT_HOST
        )
        transport._session = bound(session)
        transport._prep_wrapped_messages(rest.DEFAULT_CLIENT_INFO)  # made for the session that it had
    except AttributeError:
        raise RootMisconfigured(
            "this version of google-cloud-kms is not known; install openkcm[gcp] anew"
        ) from None
    return transport
