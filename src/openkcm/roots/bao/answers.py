# SPDX-License-Identifier: Apache-2.0
"""What OpenBao and Vault answer, in this package's vocabulary.

Invariant: every answer becomes exactly one of ours, by one table. Their errors have no codes, only texts: a row's name
is the fixed part of a text, or the HTTP status where there is none, or the class of the error that the HTTP library
raises. Texts are searched for these names and never passed on. What is not in the table is ``RootUnavailable`` if the
server failed (5xx), ``RootDenied`` if the server itself says 403, and ``RootMisconfigured`` otherwise: nothing unknown
gets grace for a refusal.

Sources: openbao 2.7 (builtin/logical/transit, credential/approle, credential/kubernetes, vault/request_handling), each
text seen from a server; Vault's documentation, "Tokens: error responses" and "HTTP API: status codes".
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

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


class Row(NamedTuple):
    """One answer: what it is here, what to tell the operator, and whether the next second may bring another."""

    kind: type[OpenKCMError]
    words: str
    retryable: bool | None = None


_NOT_OURS: Final = Row(DecryptError, "")
_WRONG_KEY: Final = Row(
    RootMisconfigured,
    "the key that the root's URI names cannot bind a context: it must be of type aes256-gcm96 or chacha20-poly1305, "
    "neither derived nor convergent",
)
_GONE: Final = Row(
    RootDestroyed,
    "there is no such Transit key: it was deleted, or the mount or key in the root's URI is wrong",
)
_NOT_ADMITTED: Final = Row(
    RootDenied,
    "the Kubernetes role at the customer's server does not admit our service account; its owner must add it to the "
    "role's bound_service_account_names and bound_service_account_namespaces",
)
_TRUST: Final = Row(
    RootMisconfigured,
    "the server's certificate is not trusted; somebody may be in between, or name its authority by ca= in the root's "
    "URI or BAO_CACERT",
)
_SILENT: Final = Row(RootUnavailable, "the customer's server does not answer")

ROWS: Final[Mapping[str, Row]] = {
    # The key says no.
    "refusing to use soft-deleted key": Row(
        RootDisabled, "the root key is soft-deleted; its owner can restore it"
    ),
    "ciphertext or signature version is disallowed by policy (too old)": Row(
        RootDisabled,
        "the root key's min_decryption_version was raised above the version that wrapped this; its owner can lower it "
        "again, unless the old versions were trimmed",
    ),
    "API access to this namespace has been locked": Row(
        RootDisabled, "the root key's namespace is locked; its owner can unlock it"
    ),
    "encryption key not found": _GONE,
    "unknown key type": _GONE,  # said only to who may make keys, in the place of making one
    "invalid token": Row(
        RootMisconfigured, "our token has expired or was revoked; give this process a new one"
    ),  # before the next one: Vault says both
    "permission denied": Row(
        RootDenied, "the root key may not be used by us; its owner must allow us {permission}"
    ),
    # Not this key's ciphertext.
    "message authentication failed": _NOT_OURS,
    "invalid ciphertext": _NOT_OURS,
    # The key, the mount or the namespace is another than the URI means.
    "provided for non-AEAD cipher suite": _WRONG_KEY,
    "missing 'context' for key derivation": _WRONG_KEY,
    "no handler for route": Row(
        RootMisconfigured,
        "nothing is mounted where the root's URI says; check its mount and namespace (or the engine was disabled, and "
        "its keys are gone)",
    ),
    "unsupported path": Row(
        RootMisconfigured, "what is mounted where the root's URI says is not a Transit engine"
    ),
    "namespace not found": Row(
        RootMisconfigured, "there is no such namespace; check namespace= in the root's URI or BAO_NAMESPACE"
    ),
    # Our login.
    "invalid role or secret ID": Row(
        RootMisconfigured,
        "the role id or the secret id is wrong, used up or expired; get a new secret id (the same one is not tried "
        "again for some minutes, lest the server lock the role)",
    ),
    "invalid role name": Row(
        RootMisconfigured, "the server has no such Kubernetes role; check role= and auth= in the root's URI"
    ),
    "missing client token": Row(RootMisconfigured, "no token reached the server; check proxies on the way"),
    "token is expired": Row(
        RootMisconfigured,
        "our service account's token has expired; see that it is renewed where it is mounted",
    ),
    "token is not valid yet": Row(
        RootMisconfigured,
        "our service account's token is not valid yet; a clock is off, here or at the server",
    ),
    "service account name not authorized": _NOT_ADMITTED,
    "namespace not authorized": _NOT_ADMITTED,
    # Too often, or a failure of the service.
    "rate limit quota exceeded": Row(RootThrottled, "the customer's server says that it was asked too often"),
    "Vault is sealed": Row(
        RootUnavailable, "the customer's server is sealed; its operator must unseal it", retryable=False
    ),
    "HTTP 307": Row(
        RootUnavailable,
        "the server is a standby that does not forward requests; our token is sent to no other host, so name the "
        "active node, or a load balancer that finds it",
    ),
    "HTTP 412": Row(RootUnavailable, "this node of the customer's server has not caught up with the others"),
    "HTTP 429": Row(RootThrottled, "the customer's server says that it was asked too often"),
    "HTTP 5xx": Row(RootUnavailable, "the customer's server failed to answer"),
    # What the HTTP library finds.
    "ConnectTimeout": _SILENT,
    "ReadTimeout": _SILENT,
    "ConnectionError": _SILENT,
    "ConnectionError (name does not resolve)": Row(
        RootUnavailable,
        "the server's name does not resolve; check it and this machine's DNS",
        retryable=False,
    ),
    "ProxyError": Row(
        RootUnavailable, "the proxy to the customer's server does not answer; check HTTPS_PROXY"
    ),
    "SSLError": Row(
        RootMisconfigured,
        "no TLS with the server: it speaks plaintext or another TLS version, or wants a client certificate "
        "(BAO_CLIENT_CERT, BAO_CLIENT_KEY)",
    ),
    "SSLError (certificate not trusted)": _TRUST,
    "SSLError (certificate out of date)": Row(
        RootMisconfigured,
        "the server's certificate has expired or is not valid yet; or this machine's clock is off",
    ),
    "SSLError (certificate of another host)": Row(
        RootMisconfigured, "the server's certificate is for another host; check the host in the root's URI"
    ),
    "SSLError (connection lost)": _SILENT,
}

ANSWERS: Final[Mapping[str, type[OpenKCMError]]] = {name: row.kind for name, row in ROWS.items()}
"""From the name that an operator looks up to what it is here."""

_STATUSES: Final = {307: "HTTP 307", 412: "HTTP 412", 429: "HTTP 429"}
_OUT_OF_DATE: Final = {9, 10}  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED
_OTHER_HOST: Final = {62, 64}  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
_LOST: Final = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionError)


class Answer(NamedTuple):
    """A whole answer: the HTTP status, and the JSON document if the body is one."""

    status: int
    document: Mapping[str, Any] | None

    def texts(self) -> list[str]:
        """The server's error texts; none if the answer is not in its form."""
        told = self.document.get("errors") if self.document is not None else None
        return [text for text in told if isinstance(text, str)] if isinstance(told, list) else []

    def part(self, name: str) -> Mapping[str, Any]:
        """One part ("data", "auth") of a successful answer.

        Raises:
            RootMisconfigured: the answer has no such part.
        """
        part = self.document.get(name) if self.document is not None else None
        if not isinstance(part, dict):
            raise malformed(f"no {name}")
        return part


def refusal(answer: Answer, permission: str | None = None) -> OpenKCMError:
    """Say what an answer that is not a success means."""
    texts = answer.texts()
    for name, row in ROWS.items():
        if any(name in text for text in texts):
            return _made(name, row, permission)
    name = _STATUSES.get(answer.status, "HTTP 5xx" if 500 <= answer.status < 600 else "")
    if name:
        return _made(f"HTTP {answer.status}", ROWS[name], permission)
    if answer.status == 403 and texts:
        return RootDenied("the customer's server refuses us (HTTP 403)", permission=permission)
    if not texts:
        return malformed(f"HTTP {answer.status}")
    return RootMisconfigured(f"the customer's server does not take the request (HTTP {answer.status})")


def known(name: str) -> OpenKCMError:
    """The error of one row, for what is known without asking."""
    return _made(name, ROWS[name], None)


def is_invalid_token(answer: Answer) -> bool:
    """Whether a 403 says that the token itself is no good, rather than that its policies do not allow this.

    Vault says "invalid token". OpenBao says nothing but "permission denied" before it has looked at a policy, and wraps
    the same words in "1 error occurred" after it has.
    """
    texts = answer.texts()
    return answer.status == 403 and (
        texts == ["permission denied"] or any("invalid token" in text for text in texts)
    )


def malformed(what: str) -> RootMisconfigured:
    """The error for an answer that no OpenBao or Vault would give."""
    return RootMisconfigured(
        f"something answers that is not OpenBao or Vault ({what}); check host and port in the root's URI, and proxies"
    )


def transport_error(error: BaseException) -> OpenKCMError:
    """Say what an error of the HTTP library means."""
    if isinstance(error, ValueError) and not isinstance(error, ssl.SSLError):
        return RootMisconfigured(
            f"the request cannot be sent; check HTTPS_PROXY and the root's URI ({type(error).__name__})"
        )
    name = next((base.__name__ for base in type(error).__mro__ if base.__name__ in ROWS), "ConnectionError")
    causes = list(_causes(error))
    row = ROWS[name]
    if name == "SSLError":
        name = _tls_case(causes)
        row = ROWS[name]
    for cause in causes:
        if name == "ConnectionError" and isinstance(cause, socket.gaierror):
            name = "ConnectionError (name does not resolve)"
            row = ROWS[name]._replace(retryable=cause.errno == socket.EAI_AGAIN)
    return _made(name, row, None)


def _made(name: str, row: Row, permission: str | None) -> OpenKCMError:
    if row.kind is DecryptError:
        return DecryptError()
    words = f"{row.words.format(permission=permission or 'to log in')} ({name})"
    if row.kind is RootDenied:
        return RootDenied(words, permission=permission)
    return row.kind(words, retryable=row.retryable)


def _tls_case(causes: list[BaseException]) -> str:
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            code = getattr(cause, "verify_code", 0)
            if code in _OUT_OF_DATE:
                return "SSLError (certificate out of date)"
            return f"SSLError (certificate {'of another host' if code in _OTHER_HOST else 'not trusted'})"
    return "SSLError (connection lost)" if any(isinstance(cause, _LOST) for cause in causes) else "SSLError"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """What an error was made of: causes, contexts, wrapped errors; each once, and not endlessly."""
    seen: list[BaseException] = []
    waiting: list[Any] = [error]
    while waiting and len(seen) < 32:
        each = waiting.pop()
        if not isinstance(each, BaseException) or any(each is known for known in seen):
            continue
        seen.append(each)
        yield each
        waiting += [*each.args, each.__cause__, each.__context__, getattr(each, "reason", None)]
