# SPDX-License-Identifier: Apache-2.0
"""Wrapping L2 under the customer's root, and opening it again.

Invariant: dual lock. What the root wraps is the tenant key sealed under the Core's seal key, so the root's
plaintext is ciphertext to us and to its provider, and neither root nor seal key alone opens anything.
"""

from __future__ import annotations

import hmac

from ..crypto import WrappingKey, unwrap_key, wrap_key
from ..envelope import wrap_aad
from ..errors import RootMisconfigured
from ..roots import Root


def root_context(tenant: str, region: str, version: int) -> dict[str, str]:
    """The context that a root binds to a wrapped tenant key."""
    return {"layer": "L2", "tenant": tenant, "region": region, "version": str(version)}


def wrap_under_root(root: Root, sealed: bytes, tenant: str, region: str, version: int) -> bytes:
    """Have the root wrap a sealed tenant key, and prove at once that it gives it back.

    Raises:
        RootMisconfigured: the root answered with another plaintext.
    """
    context = root_context(tenant, region, version)
    wrapped = root.wrap(sealed, context)
    if not hmac.compare_digest(root.unwrap(wrapped, context), sealed):
        raise RootMisconfigured("the root does not give back what it wrapped; nothing was changed")
    return wrapped


def seal_tenant_key(seal: WrappingKey, key: WrappingKey, tenant: str, region: str, version: int) -> bytes:
    """Seal a tenant key under the Core's seal key: 72 bytes."""
    return wrap_key(seal, key, wrap_aad(2, tenant, region, version=version))


def open_sealed_tenant_key(
    seal: WrappingKey, sealed: bytes, tenant: str, region: str, version: int
) -> WrappingKey:
    """Open what the root unwrapped with the seal key.

    Raises:
        DecryptError: the blob was altered or belongs elsewhere, or the seal key is not its own.
    """
    return unwrap_key(seal, bytes(sealed), wrap_aad(2, tenant, region, version=version))


def wrap_service_key(
    tenant_key: WrappingKey, key: WrappingKey, tenant: str, region: str, service_id: bytes, version: int
) -> bytes:
    """Wrap a service key under its tenant key: 72 bytes."""
    return wrap_key(tenant_key, key, wrap_aad(3, tenant, region, service_id=service_id, version=version))


def open_service_key(
    tenant_key: WrappingKey, wrapped: bytes, tenant: str, region: str, service_id: bytes, version: int
) -> WrappingKey:
    """Open a service key; DecryptError if it was altered or belongs elsewhere."""
    return unwrap_key(
        tenant_key, wrapped, wrap_aad(3, tenant, region, service_id=service_id, version=version)
    )
