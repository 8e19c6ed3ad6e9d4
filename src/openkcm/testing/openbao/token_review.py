# SPDX-License-Identifier: Apache-2.0
"""As much of a Kubernetes API server as a login by service account needs: tokens, and the TokenReview that checks them.

Invariant: a token passes only if this server signed it, it has not expired, its service account was not removed since,
and who asks has the reviewer's token. Written from the Kubernetes API reference (authentication.k8s.io/v1).
"""

from __future__ import annotations

import base64
import binascii
import json
import secrets
import time
from pathlib import Path
from typing import Any, Final

from ..https import Request, Response, Server

PATH: Final = "/apis/authentication.k8s.io/v1/tokenreviews"
ISSUER: Final = "https://kubernetes.default.svc"
AUDIENCE: Final = "https://kubernetes.default.svc"


class TokenReviewServer:
    """Signs tokens of service accounts and reviews them over HTTPS, on a free port of 127.0.0.1."""

    def __init__(self) -> None:
        from cryptography.hazmat.primitives.asymmetric import ec

        self._key = ec.generate_private_key(ec.SECP256R1())
        self._accounts: dict[tuple[str, str], str] = {}
        self.reviewer_token = secrets.token_urlsafe(32)
        self.reviews = 0
        self._server = Server(self._handle, tls=True)

    @property
    def url(self) -> str:
        """The API server's address."""
        return self._server.url

    @property
    def authority(self) -> Path:
        """The authority of its certificate."""
        assert self._server.authority is not None
        return self._server.authority

    def close(self) -> None:
        """Close the port."""
        self._server.close()

    def token(self, namespace: str, account: str, *, seconds: int = 3600) -> str:
        """A token of a service account, which is made if it is not there; ``seconds`` may be negative."""
        uid = self._accounts.setdefault((namespace, account), secrets.token_hex(16))
        now = int(time.time())
        claims = {
            "aud": [AUDIENCE],
            "exp": now + seconds,
            "iat": now + min(seconds, 0) - 60,
            "iss": ISSUER,
            "kubernetes.io": {"namespace": namespace, "serviceaccount": {"name": account, "uid": uid}},
            "nbf": now + min(seconds, 0) - 60,
            "sub": f"system:serviceaccount:{namespace}:{account}",
        }
        signed = f"{_part({'alg': 'ES256', 'kid': 'testing', 'typ': 'JWT'})}.{_part(claims)}"
        return f"{signed}.{_encode(self._sign(signed.encode()))}"

    def remove(self, namespace: str, account: str) -> None:
        """Remove a service account: its tokens pass no more."""
        self._accounts.pop((namespace, account), None)

    def _handle(self, request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {self.reviewer_token}":
            return Response(401, _status(401, "Unauthorized"))
        if request.method != "POST" or request.path != PATH:
            return Response(404, _status(404, "NotFound"))
        self.reviews += 1
        try:
            status = self._review(str(request.json()["spec"]["token"]))
        except (ValueError, KeyError, TypeError):
            return Response(400, _status(400, "BadRequest"))
        return Response(
            201, {"kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1", "status": status}
        )

    def _review(self, token: str) -> dict[str, Any]:
        claims = self._claims(token)
        if claims is None or claims["exp"] < time.time():
            return {"authenticated": False, "error": "invalid bearer token"}
        subject = claims["kubernetes.io"]
        namespace, account = subject["namespace"], subject["serviceaccount"]
        if self._accounts.get((namespace, account["name"])) != account["uid"]:
            return {"authenticated": False, "error": "service account has been deleted"}
        user = {"username": claims["sub"], "uid": account["uid"], "groups": ["system:serviceaccounts"]}
        return {"authenticated": True, "user": user, "audiences": claims["aud"]}

    def _sign(self, data: bytes) -> bytes:
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec, utils

        r, s = utils.decode_dss_signature(self._key.sign(data, ec.ECDSA(hashes.SHA256())))
        return bytes.fromhex(f"{r:064x}{s:064x}")

    def _claims(self, token: str) -> Any:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec, utils

        try:
            signed, _, signature = token.rpartition(".")
            raw = _decode(signature)
            pair = utils.encode_dss_signature(int(raw[:32].hex(), 16), int(raw[32:].hex(), 16))
            self._key.public_key().verify(pair, signed.encode(), ec.ECDSA(hashes.SHA256()))
            return json.loads(_decode(signed.partition(".")[2]))
        except (InvalidSignature, ValueError, binascii.Error):
            return None


def _status(code: int, reason: str) -> dict[str, Any]:
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code}


def _part(value: object) -> str:
    return _encode(json.dumps(value).encode())


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
