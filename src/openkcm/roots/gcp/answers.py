# SPDX-License-Identifier: Apache-2.0
"""What Cloud KMS and Google's login answer, in this package's vocabulary.

Invariant: every failure is exactly one of our errors, whatever was sent as its body. Only what Google calls an outage,
or a connection that failed, is ``RootUnavailable``; what is not understood makes the tenant dark. Google's own text is
never repeated; its names for errors are, because operators look them up.

The structured parts of a ``google.rpc.Status`` decide, most particular first: the violations of a PreconditionFailure
(the state of the key, the error domain of an external key manager), the reason of an ErrorInfo, the status.
"""

from __future__ import annotations

import json
import re
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Any, Final

from ...errors import (
    DecryptError,
    OpenKCMError,
    RootDenied,
    RootDestroyed,
    RootDisabled,
    RootMisconfigured,
    RootThrottled,
    RootUnavailable,
)

ENCRYPT_PERMISSION: Final = "cloudkms.cryptoKeyVersions.useToEncrypt"
DECRYPT_PERMISSION: Final = "cloudkms.cryptoKeyVersions.useToDecrypt"
CLOCK_SECONDS: Final = 120.0
"""Google's login puts up with some minutes; less than this is not what it refuses."""

_KEY_STATES: Final[Mapping[str, type[OpenKCMError]]] = {
    "KEY_DISABLED": RootDisabled,
    "KEY_DESTROY_SCHEDULED": RootDestroyed,
    "KEY_DESTROYED": RootDestroyed,
    "KEY_PENDING_EXTERNAL_DESTRUCTION": RootDestroyed,
    "KEY_EXTERNAL_DESTRUCTION_FAILED": RootDestroyed,
    "KEY_PENDING_GENERATION": RootDisabled,
    "KEY_PENDING_IMPORT": RootDisabled,
    "KEY_GENERATION_FAILED": RootMisconfigured,
    "KEY_IMPORT_FAILED": RootMisconfigured,
}
"""Types of a PreconditionFailure's violations: the states of a key version, each after KEY_."""

_EXTERNAL: Final[Mapping[str, type[OpenKCMError]]] = {
    "EXTERNAL_PERMISSION_DENIED": RootDenied,
    "EXTERNAL_NOT_FOUND": RootDestroyed,
    "EXTERNAL_KEY_URI_INVALID": RootMisconfigured,
    "EXTERNAL_KEY_HOST_NOT_WHITELISTED": RootMisconfigured,
    "DNS": RootUnavailable,
    "EXTERNAL_RESOURCE_EXHAUSTED": RootThrottled,
    "UNREACHABLE_NETWORK": RootUnavailable,
    "OVERLOADED_EKM": RootUnavailable,
    "TIMEOUT": RootUnavailable,
    "REQUEST_CANCELLED": RootUnavailable,
    "TLS_CERT": RootMisconfigured,
    "UNEXPECTED_RESPONSE": RootMisconfigured,
    "EXTERNAL_SERVER_ERROR": RootUnavailable,
    "EXTERNAL_NOT_IMPLEMENTED": RootMisconfigured,
    "UNEXPECTED_ERROR": RootMisconfigured,
    "DECRYPTION_FAILED": DecryptError,
}
"""Error domains of Cloud EKM: what the key manager of an external key answered, or did not."""

_REASONS: Final[Mapping[str, type[OpenKCMError]]] = {
    "IAM_PERMISSION_DENIED": RootDenied,
    "SECURITY_POLICY_VIOLATED": RootDenied,
    "VPC_SERVICE_CONTROLS": RootDenied,
    "ORG_RESTRICTION_VIOLATION": RootDenied,
    "RESOURCE_USAGE_RESTRICTION_VIOLATED": RootDenied,
    "USER_PROJECT_DENIED": RootDenied,
    "SERVICE_DISABLED": RootMisconfigured,
    "BILLING_DISABLED": RootMisconfigured,
    "CONSUMER_SUSPENDED": RootMisconfigured,
    "CONSUMER_INVALID": RootMisconfigured,
    "GCP_SUSPENDED": RootMisconfigured,
    "ACCESS_TOKEN_EXPIRED": RootMisconfigured,
    "ACCESS_TOKEN_SCOPE_INSUFFICIENT": RootMisconfigured,
    "ACCESS_TOKEN_TYPE_UNSUPPORTED": RootMisconfigured,
    "ACCOUNT_STATE_INVALID": RootMisconfigured,
    "CREDENTIALS_MISSING": RootMisconfigured,
    "API_KEY_INVALID": RootMisconfigured,
    "RATE_LIMIT_EXCEEDED": RootThrottled,
    "RESOURCE_QUOTA_EXCEEDED": RootThrottled,
}
"""Reasons of an ErrorInfo (google.api.ErrorReason, and IAM's own); VPC_SERVICE_CONTROLS came as a violation before."""

_STATUSES: Final[Mapping[str, type[OpenKCMError]]] = {
    "INVALID_ARGUMENT": DecryptError,
    "FAILED_PRECONDITION": RootMisconfigured,
    "OUT_OF_RANGE": RootMisconfigured,
    "UNAUTHENTICATED": RootMisconfigured,
    "PERMISSION_DENIED": RootDenied,
    "NOT_FOUND": RootDestroyed,
    "ALREADY_EXISTS": RootMisconfigured,
    "ABORTED": RootUnavailable,
    "RESOURCE_EXHAUSTED": RootThrottled,
    "CANCELLED": RootUnavailable,
    "UNKNOWN": RootUnavailable,
    "INTERNAL": RootUnavailable,
    "DATA_LOSS": RootUnavailable,
    "UNIMPLEMENTED": RootMisconfigured,
    "UNAVAILABLE": RootUnavailable,
    "DEADLINE_EXCEEDED": RootUnavailable,
}
"""google.rpc.Code. INVALID_ARGUMENT to an encryption is RootMisconfigured: the key has another purpose."""

_LOGIN: Final[Mapping[str, type[OpenKCMError]]] = {
    "invalid_grant": RootMisconfigured,
    "invalid_client": RootMisconfigured,
    "invalid_request": RootMisconfigured,
    "invalid_scope": RootMisconfigured,
    "invalid_target": RootMisconfigured,
    "unauthorized_client": RootMisconfigured,
    "access_denied": RootMisconfigured,
    "internal_failure": RootUnavailable,
    "server_error": RootUnavailable,
    "temporarily_unavailable": RootUnavailable,
}
"""Errors of an OAuth 2.0 token endpoint (RFC 6749, section 5.2; RFC 8693, section 2.2.2)."""

_HERE: Final[Mapping[str, type[OpenKCMError]]] = {
    "DefaultCredentialsError": RootMisconfigured,
    "RefreshError": RootMisconfigured,
    "OAuthError": RootMisconfigured,
    "SSLError": RootMisconfigured,
    "TooManyRedirects": RootMisconfigured,
    "ParseError": RootMisconfigured,
    "OSError": RootMisconfigured,
    "ProxyError": RootUnavailable,
    "NameResolutionError": RootUnavailable,
    "ConnectTimeout": RootUnavailable,
    "ReadTimeout": RootUnavailable,
    "ConnectionError": RootUnavailable,
}
"""What the SDK and its transport raise without an answer of Google's."""

_GOOGLE: Final = {**_KEY_STATES, **_EXTERNAL, **_REASONS, **_STATUSES}

ANSWERS: Final[Mapping[str, type[OpenKCMError]]] = {**_GOOGLE, **_LOGIN, **_HERE}
"""Google's name of an error, and what it is here."""

_BY_CLASS: Final[Mapping[type[OpenKCMError], str]] = {
    RootDisabled: "the customer's key is disabled, or not usable yet; the customer must enable its version",
    RootDestroyed: "the customer's key was destroyed, or waits for its destruction",
    RootDenied: "the customer's key refuses us, or is not there; the customer must grant us its use",
    RootThrottled: "Cloud KMS was asked too often; raise the quota of the project that is charged",
    RootUnavailable: "Cloud KMS does not answer as it should; look at Google's status page",
    RootMisconfigured: "Cloud KMS does not serve us; look its answer up in Google's documentation",
}
_LOGIN_BY_CLASS: Final[Mapping[type[OpenKCMError], str]] = {
    RootUnavailable: "Google's login service does not answer as it should",
    RootThrottled: "Google's login service was asked too often",
    RootMisconfigured: (
        "Google's login refuses our credentials: the account, its key or its federation was removed, or is not "
        "allowed this; check GOOGLE_APPLICATION_CREDENTIALS"
    ),
}
_SAYS: Final[Mapping[str, str]] = {
    "KEY_IMPORT_FAILED": "the import of the customer's key failed; the customer must import it again",
    "KEY_GENERATION_FAILED": "the customer's key could not be generated; the customer must make a version anew",
    "EXTERNAL_PERMISSION_DENIED": "the customer's external key manager refuses Cloud KMS; the customer must allow it",
    "EXTERNAL_NOT_FOUND": "the customer's external key manager has no such key: it was deleted, or its path is wrong",
    "EXTERNAL_KEY_URI_INVALID": "the key's path in the external key manager is malformed; the customer must correct it",
    "EXTERNAL_KEY_HOST_NOT_WHITELISTED": "Google does not support the external key manager's host; check the key's URI",
    "DNS": "Google cannot resolve the external key manager's host name; the customer must check it",
    "EXTERNAL_RESOURCE_EXHAUSTED": "the customer's external key manager was asked too often",
    "UNREACHABLE_NETWORK": "Google does not reach the customer's external key manager",
    "OVERLOADED_EKM": "the customer's external key manager is overloaded",
    "TIMEOUT": "the customer's external key manager does not answer Google in time",
    "REQUEST_CANCELLED": "the customer's external key manager does not answer Google in time",
    "EXTERNAL_SERVER_ERROR": "the customer's external key manager fails",
    "TLS_CERT": "Google does not trust the external key manager's certificate; the customer must renew it",
    "SECURITY_POLICY_VIOLATED": "a VPC Service Controls perimeter of the customer's keeps us out; it must let us in",
    "VPC_SERVICE_CONTROLS": "a VPC Service Controls perimeter of the customer's keeps us out; it must let us in",
    "ORG_RESTRICTION_VIOLATION": "an organisation's restriction keeps us from the customer's key",
    "RESOURCE_USAGE_RESTRICTION_VIOLATED": "an organisation policy forbids the use of Cloud KMS",
    "USER_PROJECT_DENIED": "we may not charge the quota project that our credentials name; grant it or unset it",
    "SERVICE_DISABLED": "the Cloud KMS API is off in the project that is charged; enable cloudkms.googleapis.com in it",
    "BILLING_DISABLED": "billing is off for the project that is charged; switch it on",
    "ACCESS_TOKEN_EXPIRED": "Google takes our login for expired; check this machine's clock and the credentials",
    "ACCESS_TOKEN_SCOPE_INSUFFICIENT": "this machine's login lacks the scope cloudkms or cloud-platform; add it",
    "ACCESS_TOKEN_TYPE_UNSUPPORTED": "Google refuses our credentials; check GOOGLE_APPLICATION_CREDENTIALS",
    "ACCOUNT_STATE_INVALID": "our own account is disabled or deleted; enable it, or use other credentials",
    "CREDENTIALS_MISSING": "our request came without credentials; check that no proxy takes them out",
    "UNAUTHENTICATED": "Google refuses our credentials; check GOOGLE_APPLICATION_CREDENTIALS",
    "NOT_FOUND": "Cloud KMS has no such key: it was deleted, or the root's URI or its endpoint is wrong",
    "DefaultCredentialsError": (
        "no usable credentials for Google Cloud: set GOOGLE_APPLICATION_CREDENTIALS to a file with them, or run where "
        "a metadata server gives them"
    ),
    "SSLError": (
        "the certificate of Google's endpoint is not trusted: something intercepts TLS, or REQUESTS_CA_BUNDLE names "
        "other authorities"
    ),
    "TooManyRedirects": "the endpoint sends us elsewhere, where we do not go; check OPENKCM_GCP_ENDPOINT",
    "ParseError": "what answers is not Cloud KMS; check OPENKCM_GCP_ENDPOINT and this network's proxies",
    "OSError": "a file for the connection cannot be read; check REQUESTS_CA_BUNDLE and GOOGLE_APPLICATION_CREDENTIALS",
    "ProxyError": "this network's proxy does not answer; check HTTPS_PROXY",
    "NameResolutionError": "the host name of Google's endpoint does not resolve; check it, and this network's DNS",
    "ConnectTimeout": "Google's endpoint accepts no connection in time",
    "ReadTimeout": "Google's endpoint does not answer in time",
    "ConnectionError": "the connection to Google's endpoint fails",
}

_PERMISSION: Final = re.compile(r"[a-z]+(?:\.[A-Za-z]+){2}", re.ASCII)
_PERMISSION_TEXT: Final = re.compile(r"Permission '([a-z]+(?:\.[A-Za-z]+){2})' denied", re.ASCII)
_STATE_TEXT: Final = re.compile(
    r"current state is: ([A-Z_]+)|has value ([A-Z_]+) in field crypto_key_version\.state", re.ASCII
)
_CHECKSUM_TEXT: Final = re.compile(r"checksum in field [a-z_]+_crc32c did not match", re.ASCII)
_now = time.time


def answer(name: str, *, permission: str | None = None) -> OpenKCMError:
    """The error for one of Google's names, which the message gives in parentheses."""
    kind = ANSWERS[name]
    if kind is DecryptError:
        return DecryptError()
    by_class = _LOGIN_BY_CLASS if name in _LOGIN or name in ("RefreshError", "OAuthError") else _BY_CLASS
    says = f"{_SAYS.get(name) or by_class[kind]} ({name})"
    if kind is RootDenied:
        missing = f"; {permission} is missing" if permission else ""
        return RootDenied(f"{says}{missing}", permission=permission)
    return kind(says, retryable=False) if name == "DNS" else kind(says)


def clock_off(date: str | None) -> RootMisconfigured | None:
    """Say so if this machine's clock differs from a ``Date`` header by more than a login can."""
    try:
        seconds = _now() - parsedate_to_datetime(date or "").timestamp()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
    if abs(seconds) <= CLOCK_SECONDS:
        return None
    way = "ahead of" if seconds > 0 else "behind"
    return RootMisconfigured(
        f"this machine's clock is off, {abs(seconds):.0f} seconds {way} Google's; set it right, or no login holds"
    )


# ---- what Cloud KMS answers ---------------------------------------------------------------------------------


def refusal(status: int, date: str | None, body: bytes, *, decrypting: bool) -> OpenKCMError:
    """What an answer with an HTTP status of 400 or more means.

    Args:
        status: the HTTP status.
        date: the ``Date`` header.
        body: a ``google.rpc.Status`` as JSON, or whatever a stranger sent.
        decrypting: whether a decryption was asked for, else an encryption.
    """
    error = _error_of(body)
    name = None if error is None else _name_of(error)
    if error is None or name is None:
        return _stranger(status)
    if status == 401 or name == "UNAUTHENTICATED":
        return clock_off(date) or answer(name)
    if ANSWERS[name] is DecryptError:
        return _not_opened(name, error, decrypting)
    return answer(name, permission=_permission_of(name, error, decrypting))


def _stranger(status: int) -> OpenKCMError:
    """An answer that is not in Google's form: from a balancer on the way, or from something else altogether."""
    if status == 429:
        return RootThrottled(f"{_BY_CLASS[RootThrottled]} (HTTP {status})")
    if status >= 500 or status == 408:
        return RootUnavailable(f"{_BY_CLASS[RootUnavailable]} (HTTP {status})")
    return RootMisconfigured(f"{_SAYS['ParseError']} (HTTP {status})")


def _error_of(body: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    error = found.get("error") if isinstance(found, dict) else None
    return error if isinstance(error, dict) else None


def _details(error: dict[str, Any], kind: str) -> Iterator[dict[str, Any]]:
    details = error.get("details")
    for detail in details if isinstance(details, list) else ():
        if isinstance(detail, dict) and detail.get("@type") == f"type.googleapis.com/google.rpc.{kind}":
            yield detail


def _name_of(error: dict[str, Any]) -> str | None:
    """The name that decides: a particular one, and among several one that makes the tenant dark; else the status."""
    particular: list[Any] = []
    for detail in _details(error, "PreconditionFailure"):
        violations = detail.get("violations")
        particular += [
            violation.get("type")
            for violation in (violations if isinstance(violations, list) else ())
            if isinstance(violation, dict)
        ]
    particular += [detail.get("reason") for detail in _details(error, "ErrorInfo")]
    known = [name for name in particular if isinstance(name, str) and name in _GOOGLE]
    for name in sorted(known, key=lambda name: issubclass(_GOOGLE[name], RootUnavailable)):
        return name
    status = error.get("status")
    if status == "FAILED_PRECONDITION":
        found = _STATE_TEXT.search(_text(error))
        state = f"KEY_{found[1] or found[2]}" if found else None
        return state if state in _KEY_STATES else "FAILED_PRECONDITION"
    return status if isinstance(status, str) and status in _STATUSES else None


def _not_opened(name: str, error: dict[str, Any], decrypting: bool) -> OpenKCMError:
    """A ciphertext or context that is not this key's; to an encryption, or if it came altered, it means another."""
    if _CHECKSUM_TEXT.search(_text(error)):
        return RootUnavailable(f"what we sent came altered to Cloud KMS ({name}); try again")
    if decrypting:
        return DecryptError()
    return RootMisconfigured(
        f"Cloud KMS does not encrypt with the key; its purpose must be ENCRYPT_DECRYPT ({name})"
    )


def _permission_of(name: str, error: dict[str, Any], decrypting: bool) -> str | None:
    """The permission that is missing, in Google's words; None where something else keeps us out."""
    if name == "USER_PROJECT_DENIED":
        return "serviceusage.services.use"
    if name not in ("PERMISSION_DENIED", "IAM_PERMISSION_DENIED"):
        return None
    for detail in _details(error, "ErrorInfo"):
        metadata = detail.get("metadata")
        permission = metadata.get("permission") if isinstance(metadata, dict) else None
        if isinstance(permission, str) and _PERMISSION.fullmatch(permission):
            return permission
    found = _PERMISSION_TEXT.search(_text(error))
    if found:
        return found[1]
    return DECRYPT_PERMISSION if decrypting else ENCRYPT_PERMISSION


def _text(error: dict[str, Any]) -> str:
    message = error.get("message")
    return message if isinstance(message, str) else ""


# ---- what Google's login answers ----------------------------------------------------------------------------


def login_refusal(status: int, date: str | None, body: bytes) -> OpenKCMError | None:
    """What a login service's answer means, where the SDK would ask again or not say why; None where it may go on."""
    if status == 429:
        return RootThrottled(f"{_LOGIN_BY_CLASS[RootThrottled]} (HTTP {status})")
    if status >= 500 or status == 408:
        return RootUnavailable(f"{_LOGIN_BY_CLASS[RootUnavailable]} (HTTP {status})")
    if status < 400:
        return None
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    name = found.get("error") if isinstance(found, dict) else None
    if not isinstance(name, str) or name not in _LOGIN:
        return None
    return (clock_off(date) if name == "invalid_grant" else None) or answer(name)


# ---- what the SDK and the connection raise ------------------------------------------------------------------


@contextmanager
def translated() -> Iterator[None]:
    """Turn whatever the SDK raises into this package's vocabulary."""
    try:
        yield
    except OpenKCMError:
        raise
    except Exception as error:
        raise explain(error) from None


def explain(error: BaseException) -> OpenKCMError:
    """What an exception of the SDK, of its transport or of the system means."""
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, OpenKCMError):
            return link
        if isinstance(link, (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)):
            return answer("ConnectionError")  # cut off in the handshake, which says nothing of certificates
    names = {kind.__name__ for link in chain for kind in type(link).__mro__}
    if "ProxyError" in names and any(_TUNNEL_REFUSED in str(link) for link in chain):
        return RootMisconfigured(
            "this network's proxy refuses the connection; check HTTPS_PROXY (ProxyError)"
        )
    if any(getattr(link, "retryable", False) is True for link in chain):
        return answer("temporarily_unavailable")
    for name, known in _RAISED:
        if names & known:
            found = answer(name)
            if name == "NameResolutionError":
                found.retryable = any(getattr(link, "errno", None) == socket.EAI_AGAIN for link in chain)
            return found
    return RootMisconfigured(f"Google's SDK failed in a way that is not known here ({type(error).__name__})")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and what it was made from, as requests, urllib3 and google-auth keep that."""
    link: object = error
    for _ in range(_DEEPEST):
        if not isinstance(link, BaseException):
            return
        yield link
        inside = (
            link.__cause__,
            getattr(link, "reason", None),
            getattr(link, "original_error", None),
            *link.args,
        )
        link = next((part for part in inside if isinstance(part, BaseException)), None)


_DEEPEST: Final = 10
_TUNNEL_REFUSED: Final = "Tunnel connection failed: 4"
_RAISED: Final = (
    ("SSLError", {"SSLError", "CertificateError"}),
    ("ProxyError", {"ProxyError"}),
    ("NameResolutionError", {"NameResolutionError", "gaierror"}),
    ("TooManyRedirects", {"TooManyRedirects"}),
    ("ConnectionError", {"NewConnectionError"}),  # refused, though urllib3 derives it from its timeouts
    ("ConnectTimeout", {"ConnectTimeout"}),
    ("ReadTimeout", {"ReadTimeout", "ReadTimeoutError", "TimeoutError"}),
    ("ConnectionError", {"ConnectionError", "ProtocolError", "ClosedPoolError"}),
    ("DefaultCredentialsError", {"DefaultCredentialsError"}),
    ("OAuthError", {"OAuthError"}),
    ("RefreshError", {"RefreshError"}),
    ("ParseError", {"ParseError"}),
    ("OSError", {"OSError"}),
)
"""Names of exception classes for each row of the table, in the order in which they decide."""
