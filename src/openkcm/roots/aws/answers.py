# SPDX-License-Identifier: Apache-2.0
"""What AWS answers, in this package's vocabulary.

Invariant: every error of the SDK becomes exactly one of ours, by one table. What is not in it is ``RootUnavailable`` if
the service failed (5xx) and ``RootMisconfigured`` otherwise: nothing unknown gets grace for a refusal. A provider's own
text is only searched for phrases that AWS documents, and never passed on.

Rows are AWS's error codes and the SDK's classes, with the case in parentheses where one name has several meanings.
Sources: the service models kms-2014-11-01 and sts-2011-06-15; AWS KMS Developer Guide, "Key states of AWS KMS keys" and
"Troubleshooting external key stores"; IAM User Guide, "Troubleshooting AWS API request signatures".
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

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
    """One answer: what it is here, and what to tell the operator.

    ``retryable`` is False where the next second brings no other answer although the class says so; ``renew`` marks
    what credentials that are read anew could change.
    """

    kind: type[OpenKCMError]
    words: str
    retryable: bool | None = None
    renew: bool = False


_DISABLED: Final = Row(RootDisabled, "the root key is disabled; its owner can enable it again")
_NO_MATERIAL: Final = Row(
    RootDisabled, "the root key's imported material was deleted or has expired; its owner can import it again"
)
_DISCONNECTED: Final = Row(
    RootDisabled, "the root key's custom key store was disconnected; its owner can connect it again"
)
_OTHER_STATE: Final = Row(
    RootDisabled, "the root key's state does not allow its use; its owner can see why with kms:DescribeKey"
)
_DENIED: Final = Row(
    RootDenied,
    "the root key may not be used by us, or there is none in that account; its key policy must allow {permission}; "
    "see: openkcm root grant",
)
_DENIED_ROLE: Final = Row(
    RootDenied,
    "the role may not be assumed by us; its trust policy (with external-id= if it asks for one) and our own policy "
    "must allow {permission}; see: openkcm root grant",
)
_PENDING: Final = Row(
    RootDestroyed, "the root key waits for its deletion; until then its owner can cancel that"
)
_GONE: Final = Row(
    RootDestroyed, "there is no such root key: it was deleted, or the ARN in the root's URI is wrong"
)
_NOT_OURS: Final = Row(DecryptError, "")
_THROTTLED: Final = Row(RootThrottled, "AWS says that it was asked too often")
_FAILED: Final = Row(RootUnavailable, "AWS failed to answer")
_SILENT: Final = Row(RootUnavailable, "AWS does not answer{place}")
_STORE_SILENT: Final = Row(RootUnavailable, "the root key's external key store does not answer AWS")
_WRONG_KEY: Final = Row(
    RootMisconfigured,
    "the key that the root's URI names cannot encrypt and decrypt: it must be a symmetric key (SYMMETRIC_DEFAULT, "
    "ENCRYPT_DECRYPT)",
)
_WRONG_REGION: Final = Row(
    RootMisconfigured,
    "the root's URI and the place that answers disagree on the region; check the ARN and AWS_ENDPOINT_URL_KMS",
)
_UNKNOWN_KEY_ID: Final = Row(
    RootMisconfigured,
    "AWS does not know our access key; it was deleted, or belongs to another partition",
    renew=True,
)
_EXPIRED: Final = Row(RootMisconfigured, "our AWS credentials have expired; renew them", renew=True)
_BAD_SECRET: Final = Row(
    RootMisconfigured,
    "our AWS secret access key does not fit the access key id; check the credentials",
    renew=True,
)
_CLOCK: Final = Row(RootMisconfigured, "this machine's clock is off by more than AWS allows; set it (NTP)")
_UNSIGNED: Final = Row(
    RootMisconfigured, "the request reached AWS without a whole signature; check proxies between here and AWS"
)
_NOT_SUBSCRIBED: Final = Row(
    RootMisconfigured, "our AWS account is not signed up for the service in this region"
)
_REFUSED: Final = Row(RootMisconfigured, "AWS does not take the request")
_NO_CREDENTIALS: Final = Row(
    RootMisconfigured,
    "no AWS credentials were found; give this process a role, a profile (AWS_PROFILE) or keys in its environment",
    renew=True,
)
_SETTINGS: Final = Row(RootMisconfigured, "the AWS configuration here is wrong or incomplete")
_TRUST: Final = Row(
    RootMisconfigured,
    "the certificate{place} is not trusted, or the TLS settings do not fit; somebody may be in between, or check "
    "AWS_CA_BUNDLE",
)
_NO_NAME: Final = Row(
    RootUnavailable, "the name{place} does not resolve; check it and this machine's DNS", retryable=False
)

ROWS: Final[Mapping[str, Row]] = {
    # The key says no.
    "DisabledException": _DISABLED,
    "DisabledException (pending deletion)": _PENDING,
    "KMSInvalidStateException": _OTHER_STATE,
    "KMSInvalidStateException (pending deletion)": _PENDING,
    "KMSInvalidStateException (pending import)": _NO_MATERIAL,
    "KMSInvalidStateException (unavailable)": _DISCONNECTED,
    "KMSInvalidStateException (creating)": Row(
        RootUnavailable, "the root key is a replica that is still being made", retryable=False
    ),
    "KMSInvalidStateException (external key disabled)": Row(
        RootDisabled, "the root key is disabled in its external key manager; its owner can enable it again"
    ),
    "KMSInvalidStateException (external key not found)": Row(
        RootDestroyed, "the external key manager no longer has the root key"
    ),
    "KMSInvalidStateException (external store denied)": Row(
        RootDenied, "the root key's external key store denies its use; its owner must allow it there"
    ),
    "KMSInvalidStateException (external store authentication)": Row(
        RootDenied,
        "the root key's external key store no longer accepts AWS; its owner must renew the credential there",
    ),
    "KMSInvalidStateException (external key usage)": _WRONG_KEY,
    "KMSInvalidStateException (external ciphertext)": _NOT_OURS,
    "KMSInvalidStateException (external store throttled)": Row(
        RootThrottled, "the root key's external key store says that it was asked too often"
    ),
    "KMSInvalidStateException (external store silent)": _STORE_SILENT,
    "NotFoundException": _GONE,
    "NotFoundException (other region)": _WRONG_REGION,
    "AccessDeniedException": _DENIED,
    "NotAuthorized": _DENIED,
    "IncorrectKeyException": _NOT_OURS,
    "InvalidCiphertextException": _NOT_OURS,
    "InvalidKeyUsageException": _WRONG_KEY,
    "UnsupportedOperationException": _WRONG_KEY,
    "InvalidArnException": _GONE._replace(
        kind=RootMisconfigured, words="AWS does not take the ARN in the root's URI"
    ),
    # AWS STS, when a role is assumed.
    "AccessDenied": _DENIED_ROLE,
    "RegionDisabledException": Row(
        RootMisconfigured, "AWS STS is switched off in this region for the role's account"
    ),
    "IDPCommunicationError": Row(
        RootUnavailable, "AWS STS cannot reach the identity provider of our web identity"
    ),
    "IDPRejectedClaim": Row(RootMisconfigured, "the identity provider rejects our web identity token"),
    "InvalidIdentityToken": Row(RootMisconfigured, "AWS STS does not accept our web identity token"),
    # Too often, or a failure of the service.
    "ThrottlingException": _THROTTLED,
    "Throttling": _THROTTLED,
    "ThrottledException": _THROTTLED,
    "RequestThrottled": _THROTTLED,
    "RequestThrottledException": _THROTTLED,
    "RequestLimitExceeded": _THROTTLED,
    "TooManyRequestsException": _THROTTLED,
    "LimitExceededException": _THROTTLED,
    "KeyUnavailableException": _FAILED,
    "DependencyTimeoutException": _FAILED,
    "KMSInternalException": _FAILED,
    "InternalFailure": _FAILED,
    "InternalError": _FAILED,
    "InternalServerError": _FAILED,
    "ServiceUnavailable": _FAILED,
    "ServiceUnavailableException": _FAILED,
    "RequestTimeout": _FAILED,
    # Our credentials, our clock, our request.
    "UnrecognizedClientException": _UNKNOWN_KEY_ID,
    "InvalidClientTokenId": _UNKNOWN_KEY_ID,
    "ExpiredTokenException": _EXPIRED,
    "ExpiredToken": _EXPIRED,
    "InvalidSignatureException": _BAD_SECRET,
    "InvalidSignatureException (clock)": _CLOCK,
    "InvalidSignatureException (scope)": _WRONG_REGION,
    "SignatureDoesNotMatch": _BAD_SECRET,
    "SignatureDoesNotMatch (clock)": _CLOCK,
    "SignatureDoesNotMatch (scope)": _WRONG_REGION,
    "RequestExpired": _CLOCK,
    "RequestTimeTooSkewed": _CLOCK,
    "IncompleteSignature": _UNSIGNED,
    "IncompleteSignatureException": _UNSIGNED,
    "MissingAuthenticationToken": _UNSIGNED,
    "MissingAuthenticationTokenException": _UNSIGNED,
    "OptInRequired": _NOT_SUBSCRIBED,
    "SubscriptionRequiredException": _NOT_SUBSCRIBED,
    "ValidationException": _REFUSED,
    "ValidationError": _REFUSED,
    "SerializationException": _REFUSED,
    "UnknownOperationException": _REFUSED,
    "InvalidAction": _REFUSED,
    # What the SDK itself finds.
    "EndpointConnectionError": _SILENT,
    "EndpointConnectionError (name does not resolve)": _NO_NAME,
    "ConnectTimeoutError": _SILENT,
    "ReadTimeoutError": _SILENT,
    "ConnectionClosedError": _SILENT,
    "ProxyConnectionError": _SILENT._replace(words="the proxy to AWS does not answer; check HTTPS_PROXY"),
    "HTTPClientError": _SILENT,
    "ResponseStreamingError": _SILENT,
    "IncompleteReadError": _SILENT,
    "SSLError": _TRUST,
    "SSLError (connection lost)": _SILENT,
    "NoCredentialsError": _NO_CREDENTIALS,
    "PartialCredentialsError": _NO_CREDENTIALS._replace(
        words="the AWS credentials are incomplete: an access key id and a secret access key go together"
    ),
    "CredentialRetrievalError": _NO_CREDENTIALS._replace(
        words="the AWS credentials could not be fetched from where the configuration says"
    ),
    "MetadataRetrievalError": _NO_CREDENTIALS._replace(
        words="the AWS credentials could not be fetched from this machine's metadata service"
    ),
    "TokenRetrievalError": _EXPIRED,
    "UnauthorizedSSOTokenError": _EXPIRED._replace(words="the AWS SSO login has expired; run: aws sso login"),
    "SSOTokenLoadError": _EXPIRED._replace(words="there is no AWS SSO login; run: aws sso login"),
    "ProfileNotFound": _SETTINGS._replace(
        words="AWS_PROFILE names a profile that the AWS configuration does not have"
    ),
    "InfiniteLoopConfigError": _SETTINGS,
    "InvalidConfigError": _SETTINGS,
    "ConfigParseError": _SETTINGS,
    "ConfigNotFound": _SETTINGS,
    "NoRegionError": _SETTINGS,
    "InvalidRegionError": _SETTINGS,
    "UnknownEndpointError": _SETTINGS,
    "EndpointProviderError": _SETTINGS,
    "InvalidProxiesConfigError": _SETTINGS,
    "MissingDependencyException": _SETTINGS._replace(
        words="the AWS configuration asks for a login that needs more: pip install 'botocore[crt]'"
    ),
    "ParamValidationError": _REFUSED,
}

ANSWERS: Final[Mapping[str, type[OpenKCMError]]] = {name: row.kind for name, row in ROWS.items()}
"""From the name that an operator looks up to what it is here."""

# Documented wording, lower case, to the case in a row's parentheses; the first that is found counts.
_STATES: Final = (
    ("is pending deletion", "pending deletion"),
    ("pending replica deletion", "pending deletion"),
    ("pending import", "pending import"),
    ("is unavailable", "unavailable"),
    ("is creating", "creating"),
    ("could not find the external key", "external key not found"),
    ("external key is not enabled", "external key disabled"),
    ("denied access to the operation", "external store denied"),
    ("could not authenticate", "external store authentication"),
    ("does not support the requested", "external key usage"),
    ("additional authenticated data is corrupted", "external ciphertext"),
    ("encryption context, is corrupted", "external ciphertext"),
    ("very high request rate", "external store throttled"),
    ("did not respond", "external store silent"),
    ("cannot communicate with the external key store", "external store silent"),
    ("unhealthy state", "external store silent"),
    ("cannot interpret the response", "external store silent"),
    ("cannot establish a tls connection", "external store silent"),
)
_SIGNATURES: Final = (
    ("signature expired", "clock"),
    ("signature not yet current", "clock"),
    ("credential should be scoped", "scope"),
)
_PHRASES: Final = {
    "DisabledException": _STATES[:1],
    "KMSInvalidStateException": _STATES,
    "NotFoundException": (("invalid arn", "other region"),),
    "InvalidSignatureException": _SIGNATURES,
    "SignatureDoesNotMatch": _SIGNATURES,
}
_PERMISSIONS: Final = {
    "Encrypt": "kms:Encrypt",
    "Decrypt": "kms:Decrypt",
    "AssumeRole": "sts:AssumeRole",
    "AssumeRoleWithWebIdentity": "sts:AssumeRoleWithWebIdentity",
    "GetCallerIdentity": "sts:GetCallerIdentity",
}
_NAMED_PERMISSION: Final = re.compile(r"not authorized to perform: ((?:kms|sts):[A-Za-z]{1,64})\b", re.ASCII)
_CODE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_LOST: Final = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionError)


class Answer(NamedTuple):
    """An error in our vocabulary, and whether credentials that are read anew could change it."""

    error: OpenKCMError
    renew: bool = False


def translate(error: Exception) -> Answer:
    """Say what an error that the SDK raised means."""
    from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]

    if isinstance(error, ClientError):
        return _from_service(error)
    if isinstance(error, BotoCoreError):
        return _from_sdk(error)
    # Parsers of the SDK raise what they run into: KeyError, TypeError, binascii.Error, UnicodeDecodeError.
    return Answer(malformed(type(error).__name__))


def malformed(what: str) -> RootMisconfigured:
    """The error for an answer that AWS KMS would not give."""
    return RootMisconfigured(
        f"something answers that is not AWS KMS ({what}); check the endpoint, proxies and the SDK's version"
    )


def _from_service(error: Any) -> Answer:
    told = error.response.get("Error", {})
    code, message = str(told.get("Code", "")), str(told.get("Message", ""))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    name = _case(code, message.lower())
    row = ROWS.get(name)
    if row is None:
        row = (
            _FAILED
            if isinstance(status, int) and status >= 500
            else _THROTTLED
            if status == 429
            else _REFUSED
        )
    shown = code if _CODE.fullmatch(code) else "an unknown answer"
    operation = str(error.operation_name)
    if name in ("AccessDenied", "AccessDeniedException", "NotAuthorized"):
        permission = _permission(message, operation)
        words = (_DENIED_ROLE if operation.startswith("AssumeRole") else _DENIED).words
        said = f"{words.format(permission=permission or 'it')} ({shown})"
        return Answer(RootDenied(said, permission=permission))
    return Answer(_made(row, shown), row.renew)


def _from_sdk(error: Any) -> Answer:
    name = next((base.__name__ for base in type(error).__mro__ if base.__name__ in ROWS), "")
    if name == "SSLError" and any(isinstance(cause, _LOST) for cause in _causes(error)):
        name = "SSLError (connection lost)"
    if name == "EndpointConnectionError" and (failure := _resolution(error)) is not None:
        name = "EndpointConnectionError (name does not resolve)"
        row = ROWS[name]._replace(retryable=failure)
    else:
        row = ROWS.get(name, _SETTINGS)
    return Answer(_made(row, type(error).__name__, _place(error)), row.renew)


def _made(row: Row, shown: str, place: str = "") -> OpenKCMError:
    if row.kind is DecryptError:
        return DecryptError()
    return row.kind(f"{row.words.format(place=place)} ({shown})", retryable=row.retryable)


def _case(code: str, text: str) -> str:
    for phrase, case in _PHRASES.get(code, ()):
        if phrase in text:
            return f"{code} ({case})"
    return code


def _permission(message: str, operation: str) -> str | None:
    found = _NAMED_PERMISSION.search(message)
    return found[1] if found else _PERMISSIONS.get(operation)


def _place(error: Any) -> str:
    """The host that was asked, from our own configuration; never the whole URL, which may hold a password."""
    settings = getattr(error, "kwargs", None)
    url = settings.get("endpoint_url") if isinstance(settings, dict) else None
    try:
        host = urlsplit(url).hostname if isinstance(url, str) else None
    except ValueError:
        host = None
    return f" at {host}" if host else ""


def _causes(error: BaseException) -> list[BaseException]:
    """What an error was made of: causes, contexts, wrapped errors; each once."""
    found: list[BaseException] = []
    waiting: list[Any] = [error]
    while waiting and len(found) < 32:
        each = waiting.pop()
        if not isinstance(each, BaseException) or any(each is known for known in found):
            continue
        found.append(each)
        settings = getattr(each, "kwargs", None)
        waiting += [*each.args, each.__cause__, each.__context__, getattr(each, "reason", None)]
        waiting += [settings.get("error")] if isinstance(settings, dict) else []
    return found


def _resolution(error: BaseException) -> bool | None:
    """None if the name was resolved; otherwise whether asking again at once may help."""
    import socket

    for cause in _causes(error):
        if isinstance(cause, socket.gaierror):
            return cause.errno == socket.EAI_AGAIN
    return None
