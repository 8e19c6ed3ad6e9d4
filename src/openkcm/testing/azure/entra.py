# SPDX-License-Identifier: Apache-2.0
"""Microsoft Entra ID on loopback: one tenant, one application, and a machine's metadata service.

Tokens are signed with a secret of this process (HS256) in the place of Entra's keys; whoever plays the vault verifies
them with ``verify``.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
import secrets
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import parse_qs

from ..base import FakeKey
from ..https import Request, Response

VAULT_AUDIENCE: Final = "https://vault.azure.net"
HSM_AUDIENCE: Final = "https://managedhsm.azure.net"
TOKEN_SECONDS: Final = 3599
CLOCK_LEEWAY_SECONDS: Final = 300

# number -> (status, OAuth error, message)
ENTRA_ERRORS: Final[Mapping[str, tuple[int, str, str]]] = {
    "AADSTS7000215": (401, "invalid_client", "Invalid client secret provided."),
    "AADSTS7000216": (401, "invalid_client", "'client_assertion', 'client_secret' or 'request' is required."),
    "AADSTS7000222": (401, "invalid_client", "The provided client secret keys for app are expired."),
    "AADSTS700016": (400, "unauthorized_client", "Application was not found in the directory."),
    "AADSTS7000229": (401, "unauthorized_client", "The client application is missing service principal."),
    "AADSTS700024": (401, "invalid_client", "Client assertion is not within its valid time range."),
    "AADSTS700027": (401, "invalid_client", "The certificate is not registered on application."),
    "AADSTS700082": (400, "invalid_grant", "The refresh token has expired due to inactivity."),
    "AADSTS90002": (400, "invalid_request", "Tenant not found."),
    "AADSTS500011": (400, "invalid_resource", "The resource principal was not found in the tenant."),
    "AADSTS7000112": (400, "unauthorized_client", "Application is disabled."),
    "AADSTS53003": (400, "access_denied", "Access has been blocked by Conditional Access policies."),
    "AADSTS50196": (400, "invalid_request", "A client request loop was detected."),
}

_TOKEN_PATH: Final = re.compile(r"/([^/]+)/oauth2/v2\.0/token")
_DISCOVERY_PATH: Final = re.compile(r"/([^/]+)/v2\.0/\.well-known/openid-configuration")
_METADATA_PATH: Final = "/metadata/identity/oauth2/token"


def _identifier() -> str:
    return str(uuid.uuid4())


@dataclass
class Entra(FakeKey):
    """Entra ID, with the levers of a key: ``black_hole``, ``throttle``, ``fail``, ``slow``, ``answer``, ``heal``."""

    name: str = "entra"
    uri: str = ""
    host: str = ""
    tenants: list[str] = field(default_factory=lambda: [_identifier()])
    client: str = field(default_factory=_identifier)
    object_id: str = field(default_factory=_identifier)
    secret: str = field(default_factory=lambda: secrets.token_urlsafe(30), repr=False)
    federated_token: str | None = field(default=None, repr=False)
    token_seconds: int = TOKEN_SECONDS
    tokens_given: int = 0
    answers_with: str | None = None
    raw_answer: Response | None = None
    _signing: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    def answer(self, name: str) -> None:
        """Refuse logins with this AADSTS error until ``heal``."""
        if name not in ENTRA_ERRORS:
            raise ValueError(f"{name} is no answer of Entra ID's")
        self.first_no = None
        self.answers_with = name

    def heal(self) -> None:
        super().heal()
        self.answers_with = self.raw_answer = None

    def serve(self, request: Request) -> Response | None:
        """Answer a request that is Entra ID's or the metadata service's; None for any other."""
        discovery, token = _DISCOVERY_PATH.fullmatch(request.path), _TOKEN_PATH.fullmatch(request.path)
        if discovery is None and token is None and request.path != _METADATA_PATH:
            return None
        status = self.meet()
        if status is not None:
            return Response(
                status, {"error": "temporarily_unavailable", "error_description": "try again later"}
            )
        match = discovery or token
        if match is not None and match[1] not in self.tenants:
            return self._refuse("AADSTS90002")
        if self.raw_answer is not None:
            return self.raw_answer
        if discovery is not None:
            return self._discovery(discovery[1])
        if self.answers_with is not None:
            return self._refuse(self.answers_with)
        return self._token(token[1], request) if token is not None else self._metadata(request)

    def sign(self, audience: str, tenant: str) -> str:
        """Make a token of our application for an audience."""
        now = int(time.time())
        self.tokens_given += 1
        claims = {
            "aud": audience,
            "iss": f"https://sts.windows.net/{tenant}/",
            "iat": now,
            "nbf": now,
            "exp": now + self.token_seconds,
            "appid": self.client,
            "idtyp": "app",
            "oid": self.object_id,
            "sub": self.object_id,
            "tid": tenant,
            "uti": secrets.token_urlsafe(12),
            "ver": "1.0",
        }
        parts = [encode(json.dumps(part).encode()) for part in ({"typ": "JWT", "alg": "HS256"}, claims)]
        return ".".join([*parts, encode(self._mac(".".join(parts)))])

    def verify(self, token: str) -> dict[str, Any] | None:
        """Return a token's claims; None if it is not ours, or not valid now."""
        signed, _, signature = token.rpartition(".")
        try:
            if not hmac.compare_digest(decode(signature), self._mac(signed)):
                return None
            claims: dict[str, Any] = json.loads(decode(signed.partition(".")[2]))
        except ValueError:
            return None
        return claims if claims["nbf"] - CLOCK_LEEWAY_SECONDS <= time.time() < claims["exp"] else None

    def _discovery(self, tenant: str) -> Response:
        base = f"https://{self.host}/{tenant}"
        document = {
            "issuer": f"{base}/v2.0",
            "authorization_endpoint": f"{base}/oauth2/v2.0/authorize",
            "token_endpoint": f"{base}/oauth2/v2.0/token",
            "token_endpoint_auth_methods_supported": ["client_secret_post", "private_key_jwt"],
            "jwks_uri": f"{base}/discovery/v2.0/keys",
        }
        return Response(200, document)

    def _token(self, tenant: str, request: Request) -> Response:
        form = {name: values[0] for name, values in parse_qs(request.body.decode()).items()}
        if form.get("client_id") != self.client:
            return self._refuse("AADSTS700016")
        offered = form.get("client_secret") or form.get("client_assertion")
        wanted = self.secret if "client_secret" in form else self.federated_token
        if offered is None:
            return self._refuse("AADSTS7000216")
        if wanted is None or not hmac.compare_digest(offered.encode(), wanted.encode()):
            return self._refuse("AADSTS7000215" if "client_secret" in form else "AADSTS700027")
        audience = form.get("scope", "").split(" ")[0].removesuffix("/.default")
        if form.get("grant_type") != "client_credentials" or audience not in (VAULT_AUDIENCE, HSM_AUDIENCE):
            return self._refuse("AADSTS500011")
        seconds = self.token_seconds
        answer = {"token_type": "Bearer", "expires_in": seconds, "ext_expires_in": seconds}
        return Response(200, answer | {"access_token": self.sign(audience, tenant)})

    def _metadata(self, request: Request) -> Response:
        """The managed identity of a machine, as its metadata service gives it out."""
        if request.headers.get("metadata", "").lower() != "true":
            return Response(
                400, {"error": "invalid_request", "error_description": "Required metadata header"}
            )
        audience, seconds = request.query.get("resource", [""])[0], self.token_seconds
        token = {"token_type": "Bearer", "resource": audience, "expires_in": str(seconds)}
        token |= {"expires_on": str(int(time.time()) + seconds)}
        return Response(200, token | {"access_token": self.sign(audience, self.tenants[0])})

    def _refuse(self, name: str) -> Response:
        self.say_no()
        status, error, text = ENTRA_ERRORS[name]
        body = {
            "error": error,
            "error_description": f"{name}: {text} Trace ID: {uuid.uuid4()} Correlation ID: {uuid.uuid4()}",
            "error_codes": [int(name.removeprefix("AADSTS"))],
        }
        return Response(status, body)

    def _mac(self, signed: str) -> bytes:
        return hmac.digest(self._signing, signed.encode(), hashlib.sha256)


def encode(value: bytes) -> str:
    """Return base64url without padding (RFC 7515)."""
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


def decode(value: str) -> bytes:
    """Read base64url; ValueError if it is none."""
    try:
        return base64.b64decode(value.encode() + b"=" * (-len(value) % 4), b"-_", validate=True)
    except binascii.Error:
        raise ValueError("not base64url") from None
