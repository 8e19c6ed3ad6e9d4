# SPDX-License-Identifier: Apache-2.0
"""Google's login on loopback: service accounts with real keys, the token endpoint, federation and impersonation.

A service account's file holds an RSA key of its own. What it signs is verified, whether it comes as a token of its own
making (https://google.aip.dev/auth/4111) or as an assertion to the token endpoint (RFC 7523). A federated identity
exchanges the token in a file (RFC 8693), and may then impersonate the first service account.
"""

from __future__ import annotations

import base64
import datetime
import json
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs

from ..base import Faults
from ..https import Request, Response
from .errors import error_info, status

AUDIENCE: Final = "https://cloudkms.googleapis.com/"
TOKEN_AUDIENCE: Final = "https://oauth2.googleapis.com/token"
"""google-auth names it in its assertions, wherever it sends them."""
SCOPES: Final = frozenset(
    {"https://www.googleapis.com/auth/cloudkms", "https://www.googleapis.com/auth/cloud-platform"}
)
TOKEN_SECONDS: Final = 3600
SKEW_SECONDS: Final = 300
FEDERATION: Final = (
    "//iam.googleapis.com/projects/123456789012/locations/global/workloadIdentityPools/pool/providers/openkcm"
)
FEDERATED: Final = "principal://iam.googleapis.com/projects/123456789012/locations/global/workloadIdentityPools/pool/subject/core"
_JWT_GRANT: Final = "urn:ietf:params:oauth:grant-type:jwt-bearer"
_EXCHANGE_GRANT: Final = "urn:ietf:params:oauth:grant-type:token-exchange"
_SHORT_LIVED: Final = (
    "Invalid JWT: Token must be a short-lived token (60 minutes) and in a reasonable timeframe. "
    "Check your iat and exp values in the JWT claim."
)


@dataclass
class ServiceAccount:
    """An account with one key; ``enabled`` is its owner's lever."""

    email: str
    project: str
    key: Any = field(repr=False)
    key_id: str = field(default_factory=lambda: secrets.token_hex(20))
    enabled: bool = True


class GoogleLogin:
    """Accounts and tokens. ``faults`` are those of the login service; ``error`` is an OAuth error that it answers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._accounts: dict[str, ServiceAccount] = {}
        self._tokens: dict[str, tuple[str, float]] = {}
        self._subject_token = secrets.token_urlsafe(24)
        self.url = ""
        self.requests = 0
        self.faults = Faults()
        self.error: tuple[str, str] | None = None

    # ---- accounts and their files ----------------------------------------------------------------------

    def make_account(self, name: str, project: str) -> ServiceAccount:
        """Make a service account; its file is ``NAME.json``."""
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import rsa

        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        account = ServiceAccount(f"{name}@{project}.iam.gserviceaccount.com", project, key)
        self._accounts[account.email] = account
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        self._write(
            f"{name}.json",
            {
                "type": "service_account",
                "project_id": project,
                "private_key_id": account.key_id,
                "private_key": pem.decode(),
                "client_email": account.email,
                "client_id": "123456789012345678901",
                "token_uri": f"{self.url}/token",
            },
        )
        return account

    def federate(self, impersonate: ServiceAccount | None = None) -> Path:
        """Write a file for workload identity federation, whose subject token lies in a file beside it."""
        token = self._folder / "subject-token"
        token.write_text(self._subject_token)
        token.chmod(0o600)
        info = {
            "type": "external_account",
            "audience": FEDERATION,
            "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
            "token_url": f"{self.url}/v1/token",
            "credential_source": {"file": str(token)},
        }
        if impersonate is not None:
            info["service_account_impersonation_url"] = (
                f"{self.url}/v1/projects/-/serviceAccounts/{impersonate.email}:generateAccessToken"
            )
        return self._write("federated.json", info)

    def _write(self, name: str, info: dict[str, Any]) -> Path:
        path = self._folder / name
        path.touch(mode=0o600)
        path.write_text(json.dumps(info))
        return path

    # ---- who asks --------------------------------------------------------------------------------------

    def who(self, request: Request) -> str | Response:
        """The principal that a request's token stands for, or the refusal."""
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not token:
            return _unauthenticated("CREDENTIALS_MISSING")
        if token in self._tokens:
            principal, ends = self._tokens[token]
            return principal if time.time() < ends else _unauthenticated("ACCESS_TOKEN_EXPIRED")
        claims = self._verify(token)
        if claims is None:
            return _unauthenticated("ACCESS_TOKEN_TYPE_UNSUPPORTED")
        meant = claims.get("aud") == AUDIENCE or SCOPES & {*str(claims.get("scope", "")).split()}
        if claims.get("sub") != claims["iss"] or not meant:
            return _unauthenticated("ACCESS_TOKEN_TYPE_UNSUPPORTED")
        if not _timely(claims):
            return _unauthenticated("ACCESS_TOKEN_EXPIRED")
        if not self._accounts[claims["iss"]].enabled:
            return _unauthenticated("ACCOUNT_STATE_INVALID")
        return str(claims["iss"])

    def _verify(self, token: str) -> dict[str, Any] | None:
        """The claims of a token that an account's key signed (RS256), else None."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import padding

        try:
            head, body, signature = token.split(".")
            header, claims = json.loads(_decoded(head)), json.loads(_decoded(body))
            account = self._accounts[claims["iss"]]
            if (header["alg"], header["kid"]) != ("RS256", account.key_id):
                return None
            account.key.public_key().verify(
                _decoded(signature), f"{head}.{body}".encode(), padding.PKCS1v15(), hashes.SHA256()
            )
        except (ValueError, TypeError, KeyError, InvalidSignature):
            return None
        return dict(claims)

    # ---- the login service -----------------------------------------------------------------------------

    def serve(self, request: Request) -> Response | None:
        """Answer a request to the login service; None if it is to another one."""
        if request.path in ("/token", "/v1/token"):
            asked = {name: values[0] for name, values in parse_qs(request.body.decode()).items()}
            return self._suffer() or self._grant(asked)
        if request.path.endswith(":generateAccessToken"):
            return self._suffer() or self._impersonate(request)
        return None

    def _suffer(self) -> Response | None:
        self.requests += 1
        if self.faults.latency:
            time.sleep(self.faults.latency)
        if self.faults.status is not None:
            return Response(self.faults.status, {"error": "internal_failure"})
        if self.error is not None:
            return _oauth_error(*self.error)
        return None

    def _grant(self, asked: dict[str, str]) -> Response:
        if asked.get("grant_type") == _EXCHANGE_GRANT:
            if not secrets.compare_digest(asked.get("subject_token", ""), self._subject_token):
                return _oauth_error("invalid_grant", "The subject token is not valid.")
            if asked.get("audience") != FEDERATION:
                return _oauth_error(
                    "invalid_target", "The target service indicated by the audience is invalid."
                )
            return self._token(FEDERATED, issued_token_type="urn:ietf:params:oauth:token-type:access_token")
        if asked.get("grant_type") != _JWT_GRANT:
            return _oauth_error("unsupported_grant_type", "Invalid grant_type.")
        claims = self._verify(asked.get("assertion", ""))
        if claims is None:
            return _oauth_error("invalid_grant", "Invalid JWT Signature.")
        if claims.get("aud") not in (f"{self.url}/token", TOKEN_AUDIENCE):
            return _oauth_error("invalid_grant", "Invalid JWT: Failed audience check.")
        if not _timely(claims):
            return _oauth_error("invalid_grant", _SHORT_LIVED)
        if not self._accounts[claims["iss"]].enabled:
            return _oauth_error("invalid_grant", "Invalid grant: account not found")
        if not SCOPES & {*str(claims.get("scope", "")).split()}:
            return _oauth_error("invalid_scope", "Invalid OAuth scope or ID token audience provided.")
        return self._token(str(claims["iss"]))

    def _impersonate(self, request: Request) -> Response:
        principal = self.who(request)
        email = request.path.rpartition("/")[2].removesuffix(":generateAccessToken")
        if isinstance(principal, Response):
            return principal
        if principal != FEDERATED or email not in self._accounts:
            permission = "iam.serviceAccounts.getAccessToken"
            info = error_info("IAM_PERMISSION_DENIED", "iam.googleapis.com", permission=permission)
            return status("PERMISSION_DENIED", f"Permission '{permission}' denied on resource.", info)
        ends = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=TOKEN_SECONDS)
        given = {"accessToken": self._issue(email), "expireTime": ends.strftime("%Y-%m-%dT%H:%M:%SZ")}
        return Response(200, given)

    def _token(self, principal: str, **more: str) -> Response:
        given = {
            "access_token": self._issue(principal),
            "expires_in": TOKEN_SECONDS - 1,
            "token_type": "Bearer",
        }
        return Response(200, given | more)

    def _issue(self, principal: str) -> str:
        token = f"ya29.{secrets.token_urlsafe(48)}"
        self._tokens[token] = principal, time.time() + TOKEN_SECONDS
        return token

    def revoke(self, principal: str | None = None) -> None:
        """Take back every token that was issued to a principal, or to all."""
        for token, (owner, _) in list(self._tokens.items()):
            if principal in (None, owner):
                self._tokens[token] = owner, 0.0


def _timely(claims: dict[str, Any]) -> bool:
    begins, ends = claims.get("iat"), claims.get("exp")
    if type(begins) is not int or type(ends) is not int:
        return False
    now = time.time()
    return begins - SKEW_SECONDS <= now < ends + SKEW_SECONDS and ends - begins <= TOKEN_SECONDS


def _decoded(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


def _oauth_error(error: str, description: str) -> Response:
    return Response(400, {"error": error, "error_description": description})


def _unauthenticated(reason: str) -> Response:
    message = "Request had invalid authentication credentials. Expected OAuth 2 access token."
    return status("UNAUTHENTICATED", message, error_info(reason, service="cloudkms.googleapis.com"))
