# SPDX-License-Identifier: Apache-2.0
"""Azure Key Vault, Managed HSM and Entra ID on loopback, written from Microsoft's documentation and REST reference.

One HTTPS server plays all three: ``127.0.0.1`` is the vault and Entra ID, ``localhost`` the managed HSM. Keys are real:
RSA, or AES of 256 bits, a fresh one for each version.

One thing is left out: a real vault lets whoever may read an RSA key wrap with it, since anybody could with its public
half; here wrapping needs the permission to wrap.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
import tempfile
import time
import uuid
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ..base import FakeKey, FakeProvider, KeyCondition
from ..https import Request, Response, Server
from .entra import ENTRA_ERRORS, HSM_AUDIENCE, VAULT_AUDIENCE, Entra, decode, encode

_PATH: Final = re.compile(r"/keys/([0-9A-Za-z-]{1,127})(?:/([0-9A-Za-z]*))?(?:/([a-z]+))?", re.ASCII)
_OPERATIONS: Final = {"wrapkey": "wrapKey", "unwrapkey": "unwrapKey"}

# name -> (status, code, inner code, message), as the real ones answer; {} is the operation or the key
_ERRORS: Final[Mapping[str, tuple[int, str, str, str]]] = {
    "KeyDisabled": (403, "Forbidden", "KeyDisabled", "Operation {} is not allowed on a disabled key."),
    "KeyExpired": (403, "Forbidden", "KeyExpired", "Operation {} is not allowed on an expired key."),
    "KeyNotYetValid": (
        403,
        "Forbidden",
        "KeyNotYetValid",
        "Operation {} is not allowed on a not yet valid key.",
    ),
    "KeyOperationForbidden": (
        403,
        "Forbidden",
        "KeyOperationForbidden",
        "Operation {} is not permitted on this key.",
    ),
    "ForbiddenByRbac": (
        403,
        "Forbidden",
        "ForbiddenByRbac",
        "Caller is not authorized to perform action on resource.\r\nAction: '{}'\r\nAssignment: (not found)",
    ),
    "ForbiddenByPolicy": (
        403,
        "Forbidden",
        "ForbiddenByPolicy",
        "The user, group or application 'appid=...' does not have keys {} permission on key vault 'acme'.",
    ),
    "ForbiddenByFirewall": (
        403,
        "Forbidden",
        "ForbiddenByFirewall",
        "Client address is not authorized and caller is not a trusted service.",
    ),
    "ForbiddenByConnection": (
        403,
        "Forbidden",
        "ForbiddenByConnection",
        "Public network access is disabled and request is not from a trusted service nor via an approved private link.",
    ),
    "AccessDenied": (403, "AccessDenied", "", "Not authorized to access {} on /keys (Activity ID: 0)"),
    "Forbidden": (403, "Forbidden", "", "Access denied"),
    "KeyNotFound": (404, "KeyNotFound", "", "A key with (name/id) {} was not found in this key vault."),
    "VaultNotFound": (404, "VaultNotFound", "", "The vault was not found."),
    "ObjectIsDeletedButRecoverable": (409, "Conflict", "ObjectIsDeletedButRecoverable", "Key {} is deleted."),
    "ObjectIsBeingDeleted": (409, "Conflict", "ObjectIsBeingDeleted", "Key {} is currently being deleted."),
    "ObjectIsBeingRecovered": (409, "Conflict", "ObjectIsBeingRecovered", "Key {} is being recovered."),
    "BadParameter": (400, "BadParameter", "", "Unable to decrypt specified value with this key."),
    "Unauthorized": (401, "Unauthorized", "", "AKV10000: Request is missing a Bearer or PoP token."),
    "AKV10022": (401, "Unauthorized", "", "AKV10022: Invalid audience."),
    "AKV10032": (401, "Unauthorized", "", "AKV10032: Invalid issuer."),
    "AKV10046": (
        401,
        "Unauthorized",
        "",
        "AKV10046: Unable to resolve the key used for signature validation.",
    ),
    "Throttled": (
        429,
        "Throttled",
        "",
        "Request was not processed because too many requests were received. Reason: VaultRequestTypeLimitReached",
    ),
    "InternalServerError": (500, "InternalServerError", "", "An internal error occurred."),
    "ServiceUnavailable": (503, "ServiceUnavailable", "", "The service is temporarily unavailable."),
}


@dataclass
class KeyVersion:
    """One version of a key: its material, and the attributes that its customer sets."""

    name: str
    material: Any = field(repr=False)
    enabled: bool = True
    not_before: float | None = None
    expires: float | None = None


@dataclass
class AzureKey(FakeKey):
    """A customer's key. ``permissions`` are the names that ``deny`` takes: to wrap, to unwrap, to read."""

    managed_hsm: bool = False
    bits: int = 3072
    permissions: tuple[str, ...] = ()
    refuses_with: str = "ForbiddenByRbac"
    kind: str = "RSA-HSM"
    operations: tuple[str, ...] = ("wrapKey", "unwrapKey")
    attributes: dict[str, Any] = field(default_factory=dict)
    versions: list[KeyVersion] = field(default_factory=list)
    answers_with: str | None = None
    entra: Entra | None = field(default=None, repr=False)

    def rotate(self) -> None:
        """Make a new version; older ones still unwrap."""
        self.versions.append(KeyVersion(uuid.uuid4().hex, _make_material(self.managed_hsm, self.bits)))

    def answer(self, name: str) -> None:
        """Answer the next requests with the provider's error of this name, until ``heal``.

        An AADSTS error is Entra ID's, so the next login is refused rather than the key's requests.
        """
        self.first_no = None
        if name in ENTRA_ERRORS and self.entra is not None:
            self.entra.answer(name)
        elif name in _ERRORS:
            self.answers_with = name
        else:
            raise ValueError(f"{name} is no answer of Azure's")

    def heal(self) -> None:
        super().heal()
        self.answers_with = None
        if self.entra is not None:
            self.entra.answers_with = None

    def find(self, version: str | None) -> KeyVersion | None:
        """Return a version, the newest for None or the empty name."""
        if not version:
            return self.versions[-1]
        return next((each for each in self.versions if each.name == version), None)


class AzureKeyVault(FakeProvider):
    """A vault, a managed HSM and Entra ID.

    Args:
        access_policies: the vault uses access policies in the place of role-based access.
        rsa_bits: of the keys in the vault: 2048, 3072 or 4096.

    ``entra`` has the levers of Entra ID itself: ``black_hole``, ``throttle``, ``fail``, ``answer``, ``heal``.
    """

    def __init__(self, *, access_policies: bool = False, rsa_bits: int = 3072) -> None:
        super().__init__()
        self.access_policies = access_policies
        self.rsa_bits = rsa_bits
        self.permissions = _permissions("vaults", access_policies)[:2]
        self.entra = Entra()
        self.vault_tenant = self.entra.tenants[0]
        self.keys: dict[tuple[bool, str], AzureKey] = {}
        self.challenge_audience: str | None = None
        self.raw_answer: Response | None = None
        self._server: Server | None = None
        self._trusted: Path | None = None
        self._port = 0

    # ---- a provider ----------------------------------------------------------------------------------

    def start(self) -> None:
        self._server = Server(self._handle, tls=True)
        self._trusted = None
        self._port = self._server.port
        self.entra.host = self.host(managed_hsm=False)
        self.forget_challenges()

    def forget_challenges(self) -> None:
        """Have Azure's SDK forget what it was told at this host and port; it remembers that for the process' life.

        Else a service that starts on a port which another had before is met with that one's Entra tenant.
        """
        cache = sys.modules.get(
            "azure.keyvault.keys._shared.http_challenge_cache"
        )  # the SDK need not be loaded
        if cache is not None:
            for managed_hsm in (False, True):
                cache.remove_challenge_for_url(f"https://{self.host(managed_hsm=managed_hsm)}")

    def stop(self) -> None:
        for key in [*self.keys.values(), self.entra]:
            key.heal()
        if self._server is not None:
            self._server.close()
            self._server = None

    def settings(self) -> Mapping[str, str]:
        return {
            "AZURE_AUTHORITY_HOST": f"https://{self.host(managed_hsm=False)}",
            "AZURE_TENANT_ID": self.entra.tenants[0],
            "AZURE_CLIENT_ID": self.entra.client,
            "AZURE_CLIENT_SECRET": self.entra.secret,
            "AZURE_TOKEN_CREDENTIALS": "EnvironmentCredential",
            "OPENKCM_AZURE_HOSTS": f"{self.host(managed_hsm=False)}={VAULT_AUDIENCE},"
            f"{self.host(managed_hsm=True)}={HSM_AUDIENCE}",
            "REQUESTS_CA_BUNDLE": self._bundle(),
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def make_key(self, name: str) -> AzureKey:
        """Make an RSA key in the vault."""
        refuses_with = "ForbiddenByPolicy" if self.access_policies else "ForbiddenByRbac"
        return self._make(name, False, _permissions("vaults", self.access_policies), refuses_with)

    def make_hsm_key(self, name: str) -> AzureKey:
        """Make an AES-256 key in the managed HSM."""
        return self._make(name, True, _permissions("managedHsm", False), "AccessDenied")

    def host(self, *, managed_hsm: bool) -> str:
        """Return the host and port of the vault or the managed HSM."""
        return f"{'localhost' if managed_hsm else '127.0.0.1'}:{self._port}"

    def _make(
        self, name: str, managed_hsm: bool, permissions: tuple[str, ...], refuses_with: str
    ) -> AzureKey:
        key = AzureKey(
            name,
            f"azure-kms://{self.host(managed_hsm=managed_hsm)}/keys/{name}",
            managed_hsm=managed_hsm,
            bits=self.rsa_bits,
            permissions=permissions,
            refuses_with=refuses_with,
            kind="oct-HSM" if managed_hsm else "RSA-HSM",
            entra=self.entra,
        )
        key.rotate()
        self.keys[managed_hsm, name.lower()] = key
        return key

    def _bundle(self) -> str:
        """Write our authority and those that were trusted before into one file."""
        if self._trusted is None:
            assert self._server is not None, "the provider is not started"
            assert self._server.authority is not None
            folder = Path(tempfile.mkdtemp(prefix="openkcm-testing-"))
            weakref.finalize(
                self, shutil.rmtree, folder, ignore_errors=True
            )  # it outlives ``stop``, an outage
            before = Path(os.environ.get("REQUESTS_CA_BUNDLE", ""))
            others = before.read_bytes() if before.is_file() else b""
            self._trusted = folder / "bundle.pem"
            self._trusted.write_bytes(self._server.authority.read_bytes() + b"\n" + others)
        return str(self._trusted)

    # ---- requests ------------------------------------------------------------------------------------

    def _handle(self, request: Request) -> Response:
        if self._server is None:  # a connection that was open before ``stop``
            raise ConnectionAbortedError("the provider has stopped")
        answer = self.entra.serve(request)
        if answer is not None:
            return answer
        match = _PATH.fullmatch(request.path)
        if match is None:
            return Response(404, {"error": {"code": "NotFound", "message": "no such resource"}})
        managed_hsm = request.headers.get("host", "").startswith("localhost")
        return self._vault(managed_hsm, match[1], match[2], match[3], request)

    def _vault(
        self, managed_hsm: bool, name: str, version: str | None, operation: str | None, request: Request
    ) -> Response:
        key = self.keys.get((managed_hsm, name.lower()))
        if key is not None:
            status = key.meet()
            if status is not None:
                return _error(_by_status(status), name, status)
            if key.answers_with is not None:
                key.say_no()
                return self._challenged(
                    _error(key.answers_with, _OPERATIONS.get(operation or "", "get")), managed_hsm
                )
        refused = self._authenticate(request, managed_hsm)
        if refused is not None:
            return refused
        if "api-version" not in request.query:
            return _error("BadParameter", message="api-version must be specified")
        if key is None:
            return _error("KeyNotFound", name)
        answer = self._serve(key, version, operation, request)
        if answer.status >= 400:
            key.say_no()
        return self.raw_answer if self.raw_answer is not None and answer.status < 400 else answer

    def _serve(self, key: AzureKey, version: str | None, operation: str | None, request: Request) -> Response:
        if operation is None and version in (*_OPERATIONS, "rotate", "versions"):
            version, operation = None, version
        wanted = {"wrapkey": 0, "unwrapkey": 1}.get(operation or "", 2)
        if not key.may(key.permissions[wanted]):
            return _error(key.refuses_with, key.permissions[wanted])
        found = key.find(version)
        if key.condition in (KeyCondition.PENDING_DELETION, KeyCondition.DESTROYED) or found is None:
            return _error("KeyNotFound", f"{key.name}/{version}" if version else key.name)
        if operation in _OPERATIONS and request.method == "POST":
            return self._operate(key, found, _OPERATIONS[operation], request)
        if operation == "rotate":
            key.rotate()
            found = key.versions[-1]
        elif operation == "versions":
            listed = [self._properties(key, each) for each in key.versions]
            return Response(
                200, {"value": [{"kid": each["key"]["kid"]} | each for each in listed], "nextLink": None}
            )
        return Response(200, self._properties(key, found))

    def _operate(self, key: AzureKey, version: KeyVersion, operation: str, request: Request) -> Response:
        now = time.time()
        if key.condition is KeyCondition.DISABLED or not version.enabled:
            return _error("KeyDisabled", operation)
        if operation == "wrapKey" and version.not_before is not None and now < version.not_before:
            return _error("KeyNotYetValid", operation)  # outside its dates a key still unwraps
        if operation == "wrapKey" and version.expires is not None and now >= version.expires:
            return _error("KeyExpired", operation)
        if operation not in key.operations:
            return _error("KeyOperationForbidden", operation)
        try:
            body = request.json()
            value = decode(body["value"])
            if body["alg"] != ("A256KW" if key.managed_hsm else "RSA-OAEP-256"):
                return _error("BadParameter", message="Key and algorithm are incompatible.")
        except (ValueError, KeyError, TypeError):
            return _error("BadParameter", message="Content of 'value' is not base64url.")
        result = _compute(version.material, operation, value)
        if result is None:
            return _error("BadParameter")
        if key.faults.lie and operation == "unwrapKey":
            result = os.urandom(len(result))
        return Response(200, {"kid": self._key_id(key, version), "value": encode(result)})

    def _key_id(self, key: AzureKey, version: KeyVersion) -> str:
        return f"https://{self.host(managed_hsm=key.managed_hsm)}/keys/{key.name}/{version.name}"

    def _properties(self, key: AzureKey, version: KeyVersion) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "kid": self._key_id(key, version),
            "kty": key.kind,
            "key_ops": list(key.operations),
        }
        if not key.managed_hsm:
            numbers = version.material.public_key().public_numbers()
            shown |= {"n": encode(_big_endian(numbers.n)), "e": encode(_big_endian(numbers.e))}
        attributes = {
            "enabled": version.enabled and key.condition is KeyCondition.ENABLED,
            "recoveryLevel": "Recoverable",
            "recoverableDays": 90,
            "exportable": False,
        }
        dates = {"nbf": version.not_before, "exp": version.expires}
        attributes |= {name: int(value) for name, value in dates.items() if value is not None}
        return {"key": shown, "attributes": attributes | key.attributes, "tags": {}}

    # ---- logging in ----------------------------------------------------------------------------------

    def _authenticate(self, request: Request, managed_hsm: bool) -> Response | None:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        claims = self.entra.verify(token) if kind.lower() == "bearer" else None
        if claims is None:
            return self._challenged(_error("Unauthorized"), managed_hsm)
        if claims["aud"] != (HSM_AUDIENCE if managed_hsm else VAULT_AUDIENCE):
            return self._challenged(_error("AKV10022"), managed_hsm)
        if claims["tid"] != self.vault_tenant:
            return self._challenged(_error("AKV10032"), managed_hsm)
        return None

    def _challenged(self, response: Response, managed_hsm: bool) -> Response:
        if response.status != 401:
            return response
        audience = self.challenge_audience or (HSM_AUDIENCE if managed_hsm else VAULT_AUDIENCE)
        authority = f"https://{self.host(managed_hsm=False)}/{self.vault_tenant}"
        header = f'Bearer authorization="{authority}", resource="{audience}"'
        return Response(401, response.body, (("WWW-Authenticate", header),))


def _permissions(kind: str, access_policies: bool) -> tuple[str, ...]:
    if access_policies:
        return ("wrapKey", "unwrapKey", "get")
    actions = ("wrap/action", "unwrap/action", "read" if kind == "vaults" else "read/action")
    return tuple(f"Microsoft.KeyVault/{kind}/keys/{action}" for action in actions)


def _make_material(managed_hsm: bool, bits: int) -> Any:
    if managed_hsm:
        return secrets.token_bytes(32)
    from cryptography.hazmat.primitives.asymmetric import rsa

    return rsa.generate_private_key(65537, bits)


def _compute(material: Any, operation: str, value: bytes) -> bytes | None:
    """Wrap or unwrap; None for what the key cannot have made, or does not take."""
    from cryptography.hazmat.primitives import hashes, keywrap
    from cryptography.hazmat.primitives.asymmetric import padding

    try:
        if isinstance(material, bytes):
            work = keywrap.aes_key_wrap if operation == "wrapKey" else keywrap.aes_key_unwrap
            return work(material, value)
        oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
        if operation == "wrapKey":
            return bytes(material.public_key().encrypt(value, oaep))
        return bytes(material.decrypt(value, oaep))
    except (ValueError, keywrap.InvalidUnwrap):
        return None


def _by_status(status: int) -> str:
    return {429: "Throttled", 503: "ServiceUnavailable"}.get(status, "InternalServerError")


def _error(name: str, about: str = "", status: int | None = None, *, message: str | None = None) -> Response:
    usual, code, inner, text = _ERRORS[name]
    error: dict[str, Any] = {"code": code, "message": message or text.replace("{}", about)}
    if inner:
        error["innererror"] = {"code": inner}
    headers = (("Retry-After", "1"),) if name == "Throttled" else ()
    return Response(status or usual, {"error": error}, headers)


def _big_endian(number: int) -> bytes:
    digits = f"{number:x}"
    return bytes.fromhex(digits.zfill(len(digits) + len(digits) % 2))
