# SPDX-License-Identifier: Apache-2.0
"""``azure-kms:`` a root key in Azure Key Vault (RSA-OAEP-256) or Managed HSM (AES-256 key wrap, RFC 3394).

Invariant: the vault itself wraps and unwraps, so each call asks its customer's permissions and the key's state; a blob
names the key version that made it, and exactly that version is asked to open it. Neither algorithm binds a context, so
it travels inside what is wrapped (``binding``).

A wrapped blob is ``01 || algorithm 1 || key version 16 || ciphertext``, algorithm 01 for RSA-OAEP-256 and 02 for
A256KW. A URI without a version wraps with the newest and opens what any version made; one with a version wraps and
opens with that one alone, and a blob of another is not its own (``DecryptError``).

A version cannot be deleted by itself. Where the vault has no such version, the key is asked for: if it is there, the
blob was altered, or is that of a key that had the same name before; if not, the key was deleted.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import shlex
import threading
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from ...errors import DecryptError, OpenKCMError, RootDestroyed, RootMisconfigured
from ..base import Grant
from ..binding import bind, unbind
from .answers import ANSWERS, answer_name, refusal
from .uri import AzureURI, Service, find_service, parse_azure_uri

if TYPE_CHECKING:
    from .client import Client

__all__ = ["ANSWERS", "AzureRoot", "open_azure", "parse_blob"]

FORMAT: Final = 1
RSA_OAEP_256: Final = 1
A256KW: Final = 2
VERSION_BYTES: Final = 16
MAX_CIPHERTEXT_BYTES: Final = 512
"""RSA of 4096 bits, the longest that a vault takes."""

STRONG_RSA_BITS: Final = 3072
"""Below it a root is warned of: 2048 bits are worth 112 (NIST SP 800-57)."""

_ALGORITHMS: Final = {RSA_OAEP_256: "RSA-OAEP-256", A256KW: "A256KW"}
_KEY_ID: Final = re.compile(r"https://[^/?#]+/keys/([0-9A-Za-z-]{1,127})/([0-9a-f]{32})", re.ASCII)
_OBJECT_ID: Final = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", re.ASCII)
_NONSENSE: Final = (
    "the vault's answer is not Key Vault's; check the host in the root's URI, and what lies in between"
)
_VAULT_ROLE: Final = "Key Vault Crypto Service Encryption User"
_HSM_ROLE: Final = "Managed HSM Crypto Service Encryption User"

_roots: weakref.WeakSet[AzureRoot] = weakref.WeakSet()
_abandoned: list[Any] = []
"""A parent's clients in a forked child: kept, not used and not cleaned up, since their locks may be held for ever."""


class AzureRoot:
    """A key in a vault or a managed HSM."""

    development = False

    def __init__(self, parsed: AzureURI, service: Service) -> None:
        self._parsed = parsed
        self._service = service
        self._algorithm = A256KW if service.managed_hsm else RSA_OAEP_256
        self._lock = threading.Lock()
        self._client: Client | None = None
        self.uri = str(parsed)
        _roots.add(self)

    def __repr__(self) -> str:
        return f"<AzureRoot {self.uri}>"

    def wrap(self, sealed: bytes, context: Mapping[str, str]) -> bytes:
        """Have the vault wrap ``sealed`` and the context's digest."""
        plaintext = bind(sealed, context)
        status, answer = self._operate("wrapkey", self._parsed.version or "", plaintext)
        if status != 200:
            raise refusal(status, answer, self._permission("wrap"), unwrapping=False)
        version, ciphertext = self._read(answer)
        blob = bytes((FORMAT, self._algorithm)) + bytes.fromhex(version) + ciphertext
        if self._parsed.version not in (None, version) or not _fits(self._algorithm, ciphertext):
            raise RootMisconfigured(_NONSENSE)
        return blob

    def unwrap(self, wrapped: bytes, context: Mapping[str, str]) -> bytes:
        """Have the vault unwrap; DecryptError for what this key did not wrap, or under another context."""
        algorithm, version, ciphertext = parse_blob(wrapped)
        if algorithm != self._algorithm or self._parsed.version not in (None, version):
            raise DecryptError
        status, answer = self._operate("unwrapkey", version, ciphertext)
        if status != 200:
            error = refusal(status, answer, self._permission("unwrap"), unwrapping=True)
            if isinstance(error, RootDestroyed) and answer_name(answer) == "KeyNotFound":
                self._demand_key()
            raise error
        answered, plaintext = self._read(answer)
        if answered != version:
            raise RootMisconfigured(_NONSENSE)
        return unbind(plaintext, context)

    def grant(self, identity: str | None = None) -> Grant:
        """Say what the customer must allow, as Azure CLI commands.

        Args:
            identity: the object ID of our service principal or managed identity in the vault's tenant; if it is not
                given, the vault's challenge tells the tenant and our token the object ID.

        Raises:
            RootMisconfigured: no identity was given, and logging in did not tell one.
        """
        claims = {"oid": identity} if identity else self._who_we_are()
        who = claims.get("oid") or claims.get("appid")
        if not who:
            raise RootMisconfigured(
                "who we are in the vault's tenant cannot be told; give the object ID of our service principal there"
            )
        make = _grant_hsm if self._service.managed_hsm else _grant_vault
        permissions = (self._permission("wrap"), self._permission("unwrap"))
        text = make(self._resource(), self._parsed.name, _assignee(who, user="scp" in claims), who)
        return Grant("role assignment", text, permissions, who)

    def warnings(self) -> list[str]:
        """What is weak about the key, if our identity may read it; nothing is known otherwise."""
        version = f"/{self._parsed.version}" if self._parsed.version else "/"
        try:
            status, answer = self._connected().ask("GET", f"/keys/{self._parsed.name}{version}")
        except OpenKCMError:
            return []
        return _weaknesses(answer) if status == 200 and isinstance(answer, dict) else []

    def close(self) -> None:
        """Close connections and forget tokens; later use logs in anew."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    # ---- inside --------------------------------------------------------------------------------------

    def _connected(self) -> Client:
        from .client import Client

        with self._lock:
            if self._client is None or not self._client.usable:
                if self._client is not None:
                    self._client.close()
                self._client = Client(self._parsed.host, self._service, self._parsed.tenant)
            return self._client

    def _operate(self, operation: str, version: str, value: bytes) -> tuple[int, Any]:
        body = {"alg": _ALGORITHMS[self._algorithm], "value": _encode(value)}
        return self._connected().ask("POST", f"/keys/{self._parsed.name}/{version}/{operation}", body)

    def _read(self, answer: Any) -> tuple[str, bytes]:
        """Return the key version and the value of an answer, which may be anything."""
        key_id, value = (answer.get("kid"), answer.get("value")) if isinstance(answer, dict) else (None, None)
        match = _KEY_ID.fullmatch(key_id) if isinstance(key_id, str) else None
        decoded = _decode(value) if isinstance(value, str) else None
        if match is None or match[1].lower() != self._parsed.name.lower() or decoded is None:
            raise RootMisconfigured(_NONSENSE)
        return match[2], decoded

    def _demand_key(self) -> None:
        """Raise DecryptError if the key is there, so that only a version is not; else return or raise why not."""
        if self._parsed.version is not None:
            return
        status, answer = self._operate("wrapkey", "", bind(b"", {}))
        if status == 200:
            raise DecryptError
        raise refusal(status, answer, self._permission("wrap"), unwrapping=False)

    def _who_we_are(self) -> Mapping[str, str]:
        client = self._connected()
        try:
            client.ask(
                "GET", f"/keys/{self._parsed.name}/"
            )  # may be refused: it is the challenge that is wanted
        except OpenKCMError:
            if not client.login.claims:
                raise RootMisconfigured(
                    "who we are in the vault's tenant cannot be told, as logging in to it fails; give the object ID of"
                    " our service principal there"
                ) from None
        return client.login.claims

    def _permission(self, action: str) -> str:
        kind = "managedHsm" if self._service.managed_hsm else "vaults"
        return f"Microsoft.KeyVault/{kind}/keys/{action}/action"

    def _resource(self) -> str:
        return self._service.resource or self._parsed.host.partition(":")[0]


def open_azure(uri: str, *, create: bool = False) -> AzureRoot:
    """Open an ``azure-kms:`` root; the vault is asked when the key is first used. ``create`` has no effect.

    Raises:
        RootMisconfigured: a malformed URI, a host that is not Azure's and not named, or the SDK is not installed.
    """
    parsed = parse_azure_uri(uri)
    service = find_service(parsed.host)
    try:
        from . import client  # noqa: F401
    except ImportError:
        raise RootMisconfigured("azure-kms: roots need Azure's SDK: pip install 'openkcm[azure]'") from None
    return AzureRoot(parsed, service)


def parse_blob(wrapped: bytes) -> tuple[int, str, bytes]:
    """Split a wrapped blob: (algorithm, key version, ciphertext); DecryptError for anything malformed."""
    head = 2 + VERSION_BYTES
    if len(wrapped) < head or wrapped[0] != FORMAT or not _fits(wrapped[1], wrapped[head:]):
        raise DecryptError
    return wrapped[1], wrapped[2:head].hex(), bytes(wrapped[head:])


def _fits(algorithm: int, ciphertext: bytes) -> bool:
    size = len(ciphertext)
    if algorithm == RSA_OAEP_256:
        return size in (256, 384, 512)
    return algorithm == A256KW and 24 <= size <= MAX_CIPHERTEXT_BYTES and size % 8 == 0


def _encode(value: bytes) -> str:
    # Unpadded, as RFC 7515 says: managed HSMs were seen to keep the padding as a byte of the key.
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


def _decode(value: str) -> bytes | None:
    try:
        decoded = base64.b64decode(value.encode() + b"=" * (-len(value) % 4), b"-_", validate=True)
    except (binascii.Error, ValueError):
        return None
    return decoded if _encode(decoded) == value else None


def _weaknesses(bundle: Mapping[str, Any]) -> list[str]:
    key, attributes = bundle.get("key"), bundle.get("attributes")
    found = []
    if isinstance(key, dict) and key.get("kty") == "RSA":
        found.append("the root key is kept in software; a customer who wants an HSM makes it as RSA-HSM")
    modulus = _decode(key["n"]) if isinstance(key, dict) and isinstance(key.get("n"), str) else None
    if modulus and len(modulus) * 8 < STRONG_RSA_BITS:
        found.append("the root key is RSA of 2048 bits, worth 112; 3072 and 4096 are worth 128 and more")
    if isinstance(attributes, dict):
        if attributes.get("exportable") is True:
            found.append("the root key can be released from the vault (exportable)")
        level = attributes.get("recoveryLevel")
        if isinstance(level, str) and "Purgeable" in level:
            found.append(
                "the root key can be purged at once, by mistake too: the vault has no purge protection"
            )
        if isinstance(attributes.get("exp"), int):
            found.append(
                "the root key's version expires: from then on nothing new is wrapped, but Key Vault goes on unwrapping"
            )
    return found


def _assignee(who: str, *, user: bool) -> str:
    if _OBJECT_ID.fullmatch(who) is None:
        return f"--assignee {shlex.quote(who)}"
    return f"--assignee-object-id {who} --assignee-principal-type {'User' if user else 'ServicePrincipal'}"


def _grant_vault(vault: str, name: str, assignee: str, who: str) -> str:
    vault = shlex.quote(vault)
    return (
        "# a vault with role-based access (the role allows wrap, unwrap and reading the public key)\n"
        f'az role assignment create --role "{_VAULT_ROLE}" {assignee}'
        f' --scope "$(az keyvault show --name {vault} --query id --output tsv)/keys/{name}"\n'
        "# a vault with access policies\n"
        f"az keyvault set-policy --name {vault} --object-id {shlex.quote(who)} --key-permissions wrapKey unwrapKey\n"
    )


def _grant_hsm(hsm: str, name: str, assignee: str, _: str) -> str:
    return (
        f'az keyvault role assignment create --hsm-name {shlex.quote(hsm)} --role "{_HSM_ROLE}" {assignee}'
        f" --scope /keys/{name}\n"
    )


def _forked() -> None:
    for root in list(_roots):
        root._lock = threading.Lock()
        _abandoned.append(root._client)
        root._client = None


os.register_at_fork(after_in_child=_forked)
