# SPDX-License-Identifier: Apache-2.0
"""Logging in to Entra ID: our identity as Azure's DefaultAzureCredential finds it, in our vocabulary.

Invariant: a token is asked for one audience only, the one that belongs to the root's host, whatever a challenge says;
and why there is none is told apart: nothing configured, refused, throttled, or Entra ID not answering.

The sources are those that a service has: environment variables, workload identity, managed identity, the Azure CLI;
``AZURE_TOKEN_CREDENTIALS`` narrows them. DefaultAzureCredential makes them; they are asked in turn here, since it
reports an outage and a refusal in the same words. The SDK looks an authority up at login.microsoftonline.com before
using it; one that the operator named in ``AZURE_AUTHORITY_HOST`` and that is none of Microsoft's cannot be found there,
so that look-up is left out for it, as Microsoft says for private clouds.
"""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from http.cookiejar import DefaultCookiePolicy
from typing import Any, Final
from urllib.parse import urlsplit

import requests
from azure.core.credentials import AccessTokenInfo, TokenRequestOptions
from azure.core.exceptions import AzureError
from azure.core.pipeline.transport import RequestsTransport
from azure.identity import CredentialUnavailableError, DefaultAzureCredential, ManagedIdentityCredential
from requests.adapters import HTTPAdapter

from ...errors import OpenKCMError, RootMisconfigured, RootThrottled, RootUnavailable
from ..base import ANSWER_SECONDS, CONNECT_SECONDS
from .answers import ANSWERS, causes, entra_name, make

CALL_SECONDS: Final = CONNECT_SECONDS + ANSWER_SECONDS
"""How long one call may take in all, with whatever logging in it needs."""

AUTHORITIES: Final = frozenset(
    {
        "login.microsoftonline.com",
        "login.microsoftonline.us",
        "login.partner.microsoftonline.cn",
        "login.chinacloudapi.cn",
        "login.microsoft.com",
        "login.windows.net",
    }
)
"""Entra ID's own hosts; any other is the operator's."""

_IDENTIFIER: Final = re.compile(r"[0-9A-Za-z-]{1,64}", re.ASCII)
_CONNECTIONS: Final = 32
_NETWORK: Final = (requests.RequestException, ConnectionError, TimeoutError, socket.gaierror)
_HUNG_UP: Final = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
_NONE_CONFIGURED: Final = (
    "no Azure identity is configured here: set AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET (or"
    " AZURE_CLIENT_CERTIFICATE_PATH), run where there is a workload or managed identity, or log in with az login"
    " (CredentialUnavailableError)"
)


class Timer(threading.local):
    """When the call of this thread must be over."""

    ends = 0.0

    def start(self) -> None:
        self.ends = time.monotonic() + CALL_SECONDS

    def left(self) -> float:
        return self.ends - time.monotonic()


class _Seen(threading.local):
    status: int | None = None


class _BoundedAdapter(HTTPAdapter):
    """Sends one request, once, in what is left of its call's time."""

    def __init__(self, timer: Timer) -> None:
        self._timer = timer
        super().__init__(pool_connections=4, pool_maxsize=_CONNECTIONS)

    def send(self, request: Any, stream: Any = False, timeout: Any = None, *more: Any, **others: Any) -> Any:
        left = self._timer.left()
        if left <= 0:
            raise requests.exceptions.ReadTimeout("the call's time is over", request=request)
        connect, read = timeout
        return super().send(request, stream, (min(connect, left), min(read, left)), *more, **others)


def make_session(timer: Timer) -> requests.Session:
    """Make the HTTP session of one process: bounded in time, without retries, and keeping no cookies."""
    session = requests.Session()
    for scheme in ("https://", "http://"):  # http: a machine's own metadata service, for managed identities
        session.mount(scheme, _BoundedAdapter(timer))
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    return session


def make_transport(session: requests.Session) -> RequestsTransport:
    """Make a transport of the SDK's on a session that is ours to close."""
    return RequestsTransport(
        session=session,
        session_owner=False,
        connection_timeout=CONNECT_SECONDS,
        read_timeout=ANSWER_SECONDS,
    )


class Login:
    """The credential that the SDK's client asks for tokens. ``failed`` says that it is not worth asking again."""

    def __init__(self, audience: str, tenant: str | None, session: requests.Session) -> None:
        self._audience = audience
        self._tenant = tenant
        self._status: int | None = None  # of Entra's last answer, to anyone
        self._seen = _Seen()
        self._served: Any = None
        self.failed = False
        self.claims: Mapping[str, str] = {}
        try:
            self._sources = _sources(tenant, make_transport(session), self._note)
        except Exception:  # a value or a file that is wrong
            raise RootMisconfigured(
                "Azure's environment variables contradict each other or are malformed; check AZURE_AUTHORITY_HOST,"
                " AZURE_TENANT_ID, AZURE_TOKEN_CREDENTIALS and AZURE_CLIENT_CERTIFICATE_PATH"
            ) from None

    def get_token_info(self, *scopes: str, options: TokenRequestOptions | None = None) -> AccessTokenInfo:
        """Return a token; called by the SDK, from inside a request."""
        try:
            self._check(scopes, options or {})
            token = self._ask(scopes, options)
        except OpenKCMError:
            self.failed = True
            raise
        self.claims = _claims(token.token)
        return token

    def close(self) -> None:
        """Nothing of its own is open: the session belongs to the client."""

    def _check(self, scopes: tuple[str, ...], options: TokenRequestOptions) -> None:
        if [scope.removesuffix("/.default").rstrip("/").lower() for scope in scopes] != [self._audience]:
            raise RootMisconfigured(
                "the vault asks for a token for something else than itself; it gets none. Check the root's host"
            )
        asked = (options.get("tenant_id") or "").lower()
        if self._tenant and asked and asked != self._tenant:
            raise RootMisconfigured(
                "the vault belongs to another Entra tenant than tenant= in the root's URI says"
            )

    def _ask(self, scopes: tuple[str, ...], options: TokenRequestOptions | None) -> AccessTokenInfo:
        self._seen.status = None
        for source in [self._served] if self._served else self._sources:
            try:
                token: AccessTokenInfo = source.get_token_info(*scopes, options=options)
            except CredentialUnavailableError as error:
                if isinstance(source, ManagedIdentityCredential) and self._served and self._outage(error):
                    raise RootUnavailable(
                        "the machine's managed identity service, which logged us in before, does not answer"
                    ) from None
            except Exception as error:
                raise self._refusal(error) from None
            else:
                self._served = source
                return token
        raise RootMisconfigured(_NONE_CONFIGURED)

    def _note(self, response: Any) -> None:
        self._seen.status = self._status = response.http_response.status_code

    def _last_status(self) -> int:
        """The status of Entra's answer to this call; of its last one where the SDK repeats that without asking."""
        return self._seen.status or self._status or 0

    def _outage(self, error: BaseException) -> bool:
        status = self._last_status()
        return is_network(error) or status >= 500 or status == 429

    def _refusal(self, error: Exception) -> OpenKCMError:
        name = entra_name(error)
        if name is not None and name in ANSWERS:
            return make(ANSWERS[name], name, "a token", fallback="Entra ID refuses us")
        trouble = network_error(error, "Entra ID")
        if trouble is not None:
            return trouble
        shown, status = f" ({name})" if name else "", self._last_status()
        if status == 429:
            return RootThrottled(f"Entra ID was asked too often{shown}")
        if status >= 500:
            return RootUnavailable(f"Entra ID fails (HTTP {status}){shown}")
        if "additionally_allowed_tenants" in str(error):
            return RootMisconfigured(
                "the vault belongs to another Entra tenant than AZURE_TENANT_ID; if it is the customer's, add"
                " ?tenant=ID to the root's URI"
            )
        return RootMisconfigured(
            f"Entra ID gives us no token{shown}; check AZURE_TENANT_ID, AZURE_CLIENT_ID, AZURE_AUTHORITY_HOST and"
            " AZURE_FEDERATED_TOKEN_FILE"
        )


def is_network(error: BaseException) -> bool:
    """Whether an error began below HTTP; not in a file, an address or a document, whose errors look alike."""
    return any(isinstance(each, _NETWORK) and not isinstance(each, ValueError) for each in causes(error))


def network_error(error: BaseException, who: str) -> OpenKCMError | None:
    """Say what an error below HTTP means; None if it did not begin there."""
    found = list(causes(error))
    if any(isinstance(each, ssl.SSLCertVerificationError) for each in found):
        return RootMisconfigured(
            f"the certificate of {who} is not trusted: something in between intercepts TLS (add its authority to"
            " REQUESTS_CA_BUNDLE if that is meant), or this machine's clock is off (SSLCertVerificationError)"
        )
    if any(isinstance(each, ssl.SSLError) and not isinstance(each, _HUNG_UP) for each in found):
        return RootMisconfigured(
            f"no TLS can be agreed with {who}: check the host and what lies in between (SSLError)"
        )
    if any(type(each) is OSError and each.errno is None and "certificate" in str(each) for each in found):
        return RootMisconfigured("REQUESTS_CA_BUNDLE names no file of certificates; correct or unset it")
    if not is_network(error):
        return None
    called = [type(each).__name__ for each in found if isinstance(each, AzureError)]
    shown = next((f" ({name})" for name in called if ANSWERS.get(name) is RootUnavailable), "")
    names = [each for each in found if isinstance(each, socket.gaierror)]
    if names:
        passing = any(each.errno == socket.EAI_AGAIN for each in names)
        message = f"the name of {who} does not resolve; check it, and the network{shown}"
        return RootUnavailable(message, retryable=passing)
    return RootUnavailable(f"{who} does not answer{shown}")


def _sources(tenant: str | None, transport: RequestsTransport, note: Any) -> tuple[Any, ...]:
    host = urlsplit("//" + os.environ.get("AZURE_AUTHORITY_HOST", "").rpartition("//")[2]).netloc.lower()
    more: dict[str, Any] = {"disable_instance_discovery": True} if host and host not in AUTHORITIES else {}
    if tenant:
        more["additionally_allowed_tenants"] = [tenant]
    credential = DefaultAzureCredential(
        exclude_shared_token_cache_credential=True,
        exclude_visual_studio_code_credential=True,
        exclude_powershell_credential=True,
        exclude_developer_cli_credential=True,
        exclude_interactive_browser_credential=True,
        exclude_broker_credential=True,
        process_timeout=CALL_SECONDS,
        transport=transport,
        retry_total=0,
        raw_response_hook=note,
        **more,
    )
    return tuple(credential.credentials)


def _claims(token: str) -> dict[str, str]:
    """Read who we are out of a token; nothing if it is not a JWT. Only for showing: the vault verifies it."""
    try:
        body = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
        found = {name: claims.get(name) for name in ("oid", "appid", "tid")} | {"scp": claims.get("scp")}
    except (ValueError, IndexError, AttributeError):
        return {}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, str) and (name == "scp" or _IDENTIFIER.fullmatch(value))
    }
