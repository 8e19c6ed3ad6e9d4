# SPDX-License-Identifier: Apache-2.0
"""A customer's key in AWS KMS, with AES-256-GCM inside.

A ciphertext is ``01 02 02 00 || the key's id 16 || material 1 || nonce 12 || ciphertext and tag``, the encryption
context being associated data; the real one's layout is AWS's secret, and it too names the key and the material.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from ..base import FakeKey, KeyCondition
from .errors import FAILURES, KMS_FAILURES
from .wire import Refused

DEFAULT_WINDOW: Final = 30
"""Days until a key is deleted, unless asked for otherwise."""

MAGIC: Final = b"\x01\x02\x02\x00"
_NAME: Final = slice(len(MAGIC), len(MAGIC) + 16)
_MATERIAL: Final = _NAME.stop
_NONCE: Final = slice(_MATERIAL + 1, _MATERIAL + 13)

_STATES: Final = {
    KeyCondition.ENABLED: "Enabled",
    KeyCondition.DISABLED: "Disabled",
    KeyCondition.PENDING_DELETION: "PendingDeletion",
}


@dataclass
class AWSKey(FakeKey):
    """A symmetric KMS key of a customer, and the role that alone may use it if there is one."""

    arn: str = ""
    account: str = ""
    region: str = ""
    role: str | None = None
    external_id: str | None = None
    created: float = field(default_factory=time.time)
    window: int = DEFAULT_WINDOW
    material: list[bytes] = field(default_factory=lambda: [secrets.token_bytes(32)], repr=False)
    answering: str | None = None

    @property
    def key_id(self) -> str:
        """The last part of the ARN."""
        return self.arn.rpartition("/")[2]

    def rotate(self) -> None:
        """Make new key material; what the older ones encrypted still opens, as with AWS."""
        self.material.append(secrets.token_bytes(32))

    def answer(self, name: str) -> None:
        """Answer what uses the key with this error, a name of ``aws_errors.FAILURES``, until ``heal``.

        Errors of AWS STS alone are answered when the key's role is assumed, if it has one.
        """
        if name not in FAILURES:
            raise ValueError(f"AWS has no error {name}; it has {', '.join(sorted(FAILURES))}")
        self.first_no = None
        self.answering = name

    def heal(self) -> None:
        """End every fault, and ``answer``."""
        self.answering = None
        super().heal()

    # ---- for the service ---------------------------------------------------------------------------------

    def wrapped(self, blob: bytes) -> bool:
        """Whether a ciphertext names this key."""
        return blob.startswith(MAGIC) and blob[_NAME] == self._number()

    def encrypt(self, plaintext: bytes, context: Mapping[str, str]) -> bytes:
        """Encrypt with the newest material."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        version = len(self.material) - 1
        head = MAGIC + self._number() + bytes((version,))
        nonce = os.urandom(12)
        sealed = AESGCM(self.material[version]).encrypt(nonce, plaintext, head + _canonical(context))
        return head + nonce + sealed

    def decrypt(self, blob: bytes, context: Mapping[str, str]) -> tuple[bytes, int]:
        """Return the plaintext and the material's number.

        Raises:
            Refused: as AWS refuses another key's ciphertext, an altered one, and another context.
        """
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        if not blob.startswith(MAGIC) or len(blob) < _NONCE.stop + 16:
            raise Refused(KMS_FAILURES["InvalidCiphertextException"])
        if not self.wrapped(blob):
            raise Refused(KMS_FAILURES["IncorrectKeyException"])
        version = blob[_MATERIAL]
        try:
            aes = AESGCM(self.material[version])
            opened = aes.decrypt(
                blob[_NONCE], blob[_NONCE.stop :], blob[: _NONCE.start] + _canonical(context)
            )
        except (InvalidTag, IndexError):
            raise Refused(KMS_FAILURES["InvalidCiphertextException"]) from None
        if self.faults.lie:
            opened = bytes(byte ^ 0xFF for byte in opened)
        return opened, version

    def material_id(self, version: int = -1) -> str:
        """What DescribeKey and Decrypt call a version of the material."""
        return hashlib.sha256(b"material" + self.material[version]).hexdigest()

    def deletion_date(self) -> float:
        """When the key will be deleted, in seconds since 1970."""
        return time.time() + self.window * 86400.0

    def metadata(self) -> dict[str, Any]:
        """What DescribeKey says."""
        metadata: dict[str, Any] = {
            "AWSAccountId": self.account,
            "Arn": self.arn,
            "CreationDate": self.created,
            "CurrentKeyMaterialId": self.material_id(),
            "CustomerMasterKeySpec": "SYMMETRIC_DEFAULT",
            "Description": self.name,
            "Enabled": self.condition is KeyCondition.ENABLED,
            "EncryptionAlgorithms": ["SYMMETRIC_DEFAULT"],
            "KeyId": self.key_id,
            "KeyManager": "CUSTOMER",
            "KeySpec": "SYMMETRIC_DEFAULT",
            "KeyState": _STATES[self.condition],
            "KeyUsage": "ENCRYPT_DECRYPT",
            "MultiRegion": self.key_id.startswith("mrk-"),
            "Origin": "AWS_KMS",
        }
        if metadata["MultiRegion"]:
            metadata["MultiRegionConfiguration"] = {
                "MultiRegionKeyType": "PRIMARY",
                "PrimaryKey": {"Arn": self.arn, "Region": self.region},
                "ReplicaKeys": [],
            }
        if self.condition is KeyCondition.PENDING_DELETION:
            metadata["DeletionDate"] = self.deletion_date()
        return metadata

    def _number(self) -> bytes:
        return bytes.fromhex(self.key_id.removeprefix("mrk-").replace("-", ""))


def _canonical(context: Mapping[str, str]) -> bytes:
    return json.dumps(context, sort_keys=True).encode()
