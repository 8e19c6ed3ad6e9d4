# SPDX-License-Identifier: Apache-2.0
"""An independent reader of a vault: what the formats page says, on ``cryptography`` alone.

It shares no code with the package, so what it opens was written as documented. It needs what nobody but the
customer and the operator together have: the root, the seal file and the store.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM


def block(key: bytes, data: bytes) -> bytes:
    """One raw AES-256 block."""
    return Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(data)


def subkey(key: bytes, nonce: bytes) -> bytes:
    """The XAES-256-GCM subkey for the first 12 nonce bytes."""
    top = block(key, bytes(16))
    bits = "".join(f"{byte:08b}" for byte in top)
    shifted = bytearray(int(bits[1:] + "0", 2).to_bytes(16, "big"))
    if bits[0] == "1":
        shifted[15] ^= 0x87
    halves = []
    for counter in (1, 2):
        message = bytes([0, counter, 0x58, 0]) + nonce[:12]
        halves.append(block(key, bytes(a ^ b for a, b in zip(message, shifted, strict=True))))
    return b"".join(halves)


@lru_cache(4096)
def batch_cipher(key: bytes, half: bytes) -> AESGCM:
    """The cipher that a batch of wrapped keys shares."""
    return AESGCM(subkey(key, half))


def unwrap(key: bytes, blob: bytes, aad: bytes) -> bytes:
    """Open 72 bytes of XAES-256-GCM; InvalidTag if they are not these."""
    assert len(blob) == 72
    return batch_cipher(key, blob[:12]).decrypt(blob[12:24], blob[24:], aad)


def fields(*parts: bytes) -> bytes:
    """Each part with its length, two bytes, before it."""
    return b"".join(len(part).to_bytes(2, "big") + part for part in parts)


def encoded(**pairs: str) -> bytes:
    """The canonical encoding of a mapping."""
    out = b"\x02"
    for name, value in sorted((name.encode(), value.encode()) for name, value in pairs.items()):
        out += len(name).to_bytes(4, "big") + name + len(value).to_bytes(4, "big") + value
    return out


@dataclass(frozen=True)
class Secrets:
    """Every L2 and L3 of a vault, and the seal key."""

    seal: bytes
    tenant_keys: dict[str, bytes]
    service_keys: dict[tuple[bytes, int], bytes]
    tenants: dict[bytes, str]

    def all_keys(self) -> list[bytes]:
        """L2 and L3 keys."""
        return [*self.tenant_keys.values(), *self.service_keys.values()]

    def data_key(self, blob: bytes) -> bytes:
        """The plaintext data key of an inline envelope."""
        service_id, version = blob[8:20], blob[20:24]
        key = self.service_keys[service_id, int.from_bytes(version, "big")]
        tenant = self.tenants[service_id].encode()
        aad = fields(b"openkcm/v1/L4", tenant, b"local", service_id, version, blob[5:6], b"")
        return unwrap(key, blob[24:96], aad)

    def open(self, blob: bytes, encoded_context: bytes = b"\x00") -> bytes:
        """The plaintext of an inline record."""
        opened = AESGCM(self.data_key(blob)).decrypt(
            blob[96:108], blob[108:], blob[:6] + blob[8:20] + encoded_context
        )
        assert opened[:32] == bytes(32)
        return opened[32:]


def unwrap_local(uri: str, wrapped: bytes, context: dict[str, str]) -> bytes:
    """What a ``local:`` root does."""
    root = Path(uri.removeprefix("local:")).read_bytes()
    return AESGCM(root).decrypt(wrapped[1:13], wrapped[13:], encoded(**context))


def read_vault(
    folder: Path, unwrap_root: Callable[[str, bytes, dict[str, str]], bytes] = unwrap_local
) -> Secrets:
    """Open a vault from its files; ``unwrap_root`` is what its roots do."""
    connection = sqlite3.connect(f"{(folder / 'vault.db').as_uri()}?mode=ro", uri=True)
    seal = (folder / "vault.seal").read_bytes()
    tenant_keys, service_keys, tenants = {}, {}, {}
    rows = connection.execute(
        "SELECT k.tenant, k.version, k.wrapped, t.root_uri FROM tenant_keys k JOIN tenants t USING (tenant) "
        "WHERE k.state = 'active'"
    ).fetchall()
    for tenant, version, wrapped, uri in rows:
        bound = {"layer": "L2", "tenant": tenant, "region": "local", "version": str(version)}
        sealed = unwrap_root(uri, wrapped, bound)
        aad = fields(b"openkcm/v1/L2", tenant.encode(), b"local", b"", version.to_bytes(4, "big"), b"", b"")
        tenant_keys[tenant] = unwrap(seal, sealed, aad)
    for service_id, version, tenant, wrapped in connection.execute(
        "SELECT service_id, version, tenant, wrapped FROM service_keys"
    ):
        number = version.to_bytes(4, "big")
        aad = fields(b"openkcm/v1/L3", tenant.encode(), b"local", service_id, number, b"", b"")
        service_keys[service_id, version] = unwrap(tenant_keys[tenant], wrapped, aad)
        tenants[service_id] = tenant
    connection.close()
    return Secrets(seal, tenant_keys, service_keys, tenants)
