# SPDX-License-Identifier: Apache-2.0
"""A customer's key in Cloud KMS: its versions, their states, and their material.

Invariant: a ciphertext opens with the very version that made it, under the same associated data, and only while that
version's material is there.
"""

from __future__ import annotations

import enum
import secrets
from dataclasses import dataclass, field
from typing import Final

from ..base import FakeKey, KeyCondition
from ..https import Response
from . import errors

MARK_BYTES: Final = 8
NONCE_BYTES: Final = 12


class VersionState(enum.StrEnum):
    """The states of a CryptoKeyVersion that a customer brings about."""

    ENABLED = "ENABLED"
    DISABLED = "DISABLED"
    DESTROY_SCHEDULED = "DESTROY_SCHEDULED"
    DESTROYED = "DESTROYED"


_CONDITIONS: Final = {
    KeyCondition.ENABLED: VersionState.ENABLED,
    KeyCondition.DISABLED: VersionState.DISABLED,
    KeyCondition.PENDING_DELETION: VersionState.DESTROY_SCHEDULED,
    KeyCondition.DESTROYED: VersionState.DESTROYED,
}


@dataclass
class Version:
    """One version of a key's material."""

    number: int
    material: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    state: VersionState = VersionState.ENABLED

    def move(self, state: VersionState) -> None:
        """Change the state; a destroyed version stays one."""
        if self.state is not VersionState.DESTROYED:
            self.state = state
            if state is VersionState.DESTROYED:
                self.material = b""


@dataclass
class GCPKey(FakeKey):
    """A CryptoKey: levers act on all its versions, as Cloud KMS itself disables versions only.

    ``resource`` is its resource name, ``purpose`` its CryptoKeyPurpose, ``level`` its ProtectionLevel.
    """

    resource: str = ""
    purpose: str = "ENCRYPT_DECRYPT"
    level: str = "HSM"
    primary: int = 1
    versions: dict[int, Version] = field(default_factory=lambda: {1: Version(1)})
    mark: bytes = field(default_factory=lambda: secrets.token_bytes(MARK_BYTES), repr=False)
    _named: str | None = field(default=None, repr=False)
    _reply: Response | None = field(default=None, repr=False)

    def version_name(self, number: int | None = None) -> str:
        """A version's resource name; the primary one's if none is named."""
        return f"{self.resource}/cryptoKeyVersions/{number or self.primary}"

    def rotate(self) -> None:
        """Make a new version the primary one; what older ones wrapped still opens."""
        self.primary = self.add_version()

    def add_version(self) -> int:
        """Make a version that is not the primary one yet; returns its number."""
        number = max(self.versions) + 1
        self.versions[number] = Version(number)
        return number

    def move(self, number: int, state: VersionState) -> None:
        """Change one version's state."""
        self.first_no = None
        self.versions[number].move(state)

    def answer(self, name: str) -> None:
        """Answer the next requests with an error by Google's name of it, until ``heal``."""
        errors.named(name, self.version_name())
        self._named = name

    def reply(self, body: object, status: int = 200, *headers: tuple[str, str]) -> None:
        """Answer the next requests with this body (JSON, or bytes as they are), until ``heal``."""
        self._reply = Response(status, body, headers)

    def heal(self) -> None:
        """End every fault; what the customer did stays."""
        self._named = self._reply = None
        super().heal()

    def fault(self) -> Response | None:
        """Count a request, suffer its faults, and say what to answer instead of serving it."""
        code = self.meet()
        if code is not None:
            return errors.failed(code)
        if self._reply is not None:
            return self._reply
        return None if self._named is None else errors.named(self._named, self.version_name())

    def _change(self, condition: KeyCondition) -> None:
        super()._change(condition)
        for version in self.versions.values():
            version.move(_CONDITIONS[condition])
        if self.versions[self.primary].state is VersionState.DESTROYED:
            self.condition = KeyCondition.DESTROYED

    # ---- encryption ------------------------------------------------------------------------------------

    def seal(self, number: int, plaintext: bytes, aad: bytes) -> bytes:
        """Mark of the key 8 || number of the version 2 || nonce 12 || AES-256-GCM ciphertext and tag."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        head = self.mark + bytes(divmod(number, 256))
        nonce = secrets.token_bytes(NONCE_BYTES)
        return head + nonce + AESGCM(self.versions[number].material).encrypt(nonce, plaintext, head + aad)

    def version_of(self, ciphertext: bytes) -> int | Response:
        """The version that a ciphertext names, or the refusal."""
        if ciphertext[:MARK_BYTES] != self.mark:
            return errors.not_decrypted("verify that 'name' refers to the correct CryptoKey.")
        number = ciphertext[8] * 256 + ciphertext[9] if len(ciphertext) > 9 else 0
        return number if number in self.versions else errors.not_decrypted("the ciphertext is invalid.")

    def open(self, number: int, ciphertext: bytes, aad: bytes) -> bytes | Response:
        """The plaintext, or the refusal."""
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        head, nonce, rest = ciphertext[:10], ciphertext[10 : 10 + NONCE_BYTES], ciphertext[10 + NONCE_BYTES :]
        try:
            return AESGCM(self.versions[number].material).decrypt(nonce, rest, head + aad)
        except (InvalidTag, ValueError):
            return errors.not_decrypted("the ciphertext is invalid.")
