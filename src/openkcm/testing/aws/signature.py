# SPDX-License-Identifier: Apache-2.0
"""Who signed a request: AWS Signature Version 4, checked as AWS does (IAM User Guide, "AWS API request signing").

Invariant: nobody is let through whose signature over method, path, signed headers and body was not made with the secret
of a known access key within five minutes of the service's clock, for the right service and region.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self

from ..https import Request

SKEW_MINUTES: Final = 5
ALGORITHM: Final = "AWS4-HMAC-SHA256"

_HEADER: Final = re.compile(
    ALGORITHM + r" Credential=([A-Z0-9]{16,128})/([0-9]{8})/([a-z0-9-]+)/([a-z0-9-]+)/aws4_request,\s*"
    r"SignedHeaders=([a-z0-9;-]+),\s*Signature=([0-9a-f]{64})",
    re.ASCII,
)
_TIME: Final = re.compile(r"[0-9]{8}T[0-9]{6}Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class Principal:
    """A session of a role: temporary credentials and whose they are."""

    access_key: str
    secret: str
    token: str
    role: str
    session: str
    expires: datetime.datetime | None = None

    @classmethod
    def session_of(cls, role: str, session: str, expires: datetime.datetime | None = None) -> Self:
        """Make credentials for a session of a role, given by its ARN."""
        access_key = "ASIA" + base64.b32encode(secrets.token_bytes(10)).decode()
        secret, token = (base64.b64encode(secrets.token_bytes(size)).decode() for size in (30, 96))
        return cls(access_key, secret, token, role, session, expires)

    @property
    def account(self) -> str:
        """The account's number."""
        return self.role.split(":")[4]

    @property
    def arn(self) -> str:
        """The session's ARN, in which the role's path is lost, as with AWS."""
        name = self.role.rpartition("/")[2]
        return f"arn:aws:sts::{self.account}:assumed-role/{name}/{self.session}"

    @property
    def user_id(self) -> str:
        """What AWS calls the session otherwise."""
        return f"AROA{self.access_key[4:]}:{self.session}"

    def __repr__(self) -> str:
        return f"<Principal {self.arn}>"


class Unauthenticated(Exception):
    """A refusal: the error's code as services with JSON protocols spell it, and the message."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code)
        self.code = code
        self.message = message


def authenticate(
    request: Request, service: str, principals: Mapping[str, Principal], now: datetime.datetime
) -> tuple[Principal, str]:
    """Return who signed the request and for which region.

    Raises:
        Unauthenticated: nobody did, or not so that AWS would accept it.
    """
    header = request.headers.get("authorization")
    if header is None:
        raise Unauthenticated("MissingAuthenticationTokenException", "Missing Authentication Token")
    parts = _HEADER.fullmatch(header.strip())
    stamp = request.headers.get("x-amz-date", "")
    if parts is None or not _TIME.fullmatch(stamp):
        raise Unauthenticated(
            "IncompleteSignatureException",
            "Authorization header requires 'Credential', 'Signature', 'SignedHeaders' and existence of either a "
            "'X-Amz-Date' or a 'Date' header.",
        )
    access_key, day, region, scope, signed, signature = parts.groups()
    principal = principals.get(access_key)
    token = request.headers.get("x-amz-security-token", "")
    if principal is None or not hmac.compare_digest(principal.token.encode(), token.encode()):
        raise Unauthenticated(
            "UnrecognizedClientException", "The security token included in the request is invalid."
        )
    if scope != service:
        raise _mismatch(f"Credential should be scoped to correct service: '{service}'. ")
    if not stamp.startswith(day):
        raise _mismatch("Date in Credential scope does not match YYYYMMDD from ISO-8601 version of date.")
    _check_time(stamp, now)
    names = signed.split(";")
    if "host" not in names or not hmac.compare_digest(
        signature, _sign(request, principal.secret, stamp, (day, region, scope), names)
    ):
        raise _mismatch(
            "The request signature we calculated does not match the signature you provided. Check your AWS Secret "
            "Access Key and signing method. Consult the service documentation for details."
        )
    if principal.expires is not None and principal.expires <= now:
        raise Unauthenticated(
            "ExpiredTokenException", "The security token included in the request is expired"
        )
    return principal, region


def _mismatch(message: str) -> Unauthenticated:
    return Unauthenticated("InvalidSignatureException", message)


def _check_time(stamp: str, now: datetime.datetime) -> None:
    signed_at = datetime.datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=datetime.UTC)
    skew = datetime.timedelta(minutes=SKEW_MINUTES)
    if signed_at < now - skew:
        raise _mismatch(
            f"Signature expired: {stamp} is now earlier than {_stamp(now - skew)} ({_stamp(now)} - {SKEW_MINUTES} min.)"
        )
    if signed_at > now + skew:
        raise _mismatch(
            f"Signature not yet current: {stamp} is still later than {_stamp(now + skew)} "
            f"({_stamp(now)} + {SKEW_MINUTES} min.)"
        )


def _stamp(moment: datetime.datetime) -> str:
    return moment.strftime("%Y%m%dT%H%M%SZ")


def _sign(request: Request, secret: str, stamp: str, scope: tuple[str, str, str], names: list[str]) -> str:
    headers = "".join(f"{name}:{' '.join(request.headers.get(name, '').split())}\n" for name in names)
    canonical = "\n".join(
        (request.method, request.path, "", headers, ";".join(names), hashlib.sha256(request.body).hexdigest())
    )
    to_sign = "\n".join(
        (ALGORITHM, stamp, "/".join((*scope, "aws4_request")), hashlib.sha256(canonical.encode()).hexdigest())
    )
    key = ("AWS4" + secret).encode()
    for part in (*scope, "aws4_request", to_sign):
        key = hmac.digest(key, part.encode(), "sha256")
    return key.hex()
