# SPDX-License-Identifier: Apache-2.0
"""The Core's own blobs: a tenant key under its root, and service keys, open only as what they are."""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Iterator

from vault import VERSION, opened

from golden import GOLDEN
from openkcm.core import opening
from openkcm.core.seal import open_seal
from openkcm.crypto import WrappingKey
from openkcm.errors import DecryptError
from openkcm.roots import Root, open_root


@functools.cache
def stored() -> tuple[dict[int, bytes], dict[int, tuple[bytes, bytes]]]:
    """Tenant acme's wrapped tenant keys, and its wrapped service keys with their service ids, by version."""
    with sqlite3.connect(f"file:{GOLDEN / VERSION / 'vault.db'}?immutable=1", uri=True) as connection:
        tenants = connection.execute(
            "SELECT version, wrapped FROM tenant_keys WHERE tenant = 'acme' AND state != 'destroyed'"
        ).fetchall()
        services = connection.execute(
            "SELECT k.version, k.wrapped, s.service_id FROM service_keys k JOIN services s USING (service_id) "
            "WHERE s.tenant = 'acme' AND k.state != 'destroyed'"
        ).fetchall()
    connection.close()
    return dict(tenants), {version: (wrapped, service_id) for version, wrapped, service_id in services}


@functools.cache
def keys() -> tuple[Root, WrappingKey, WrappingKey, int]:
    """The root, the seal key, the tenant key and its version."""
    seal_path = opened()[0].seal_path
    root, seal = open_root(f"local:{seal_path.parent / 'acme.root'}"), open_seal(seal_path)
    version, wrapped = max(stored()[0].items())
    return (
        root,
        seal,
        open_tenant_key(root, seal, wrapped, opened()[0].region, version),
        version,
    )


def open_tenant_key(root: Root, seal: WrappingKey, wrapped: bytes, region: str, version: int) -> WrappingKey:
    """Open a tenant key as the vault does: the root first, then the seal key."""
    sealed = root.unwrap(wrapped, opening.root_context("acme", region, version))
    return opening.open_sealed_tenant_key(seal, sealed, "acme", region, version)


def seeds() -> Iterator[bytes]:
    tenants, services = stored()
    for wrapped in tenants.values():
        yield b"\x02" + wrapped
    for version, (wrapped, _) in services.items():
        yield bytes((3, version)) + wrapped
        yield bytes((3, version ^ 3)) + wrapped


def check(data: bytes) -> None:
    root, seal, tenant_key, tenant_version = keys()
    region = opened()[0].region
    if data[:1] == b"\x02":
        known = data[1:] == stored()[0][tenant_version]
        try:
            open_tenant_key(root, seal, data[1:], region, tenant_version).wipe()
        except DecryptError:
            assert not known
        else:
            assert known
    elif data[:1] == b"\x03" and len(data) > 1:
        version, wrapped = data[1], data[2:]
        service_id = next(iter(stored()[1].values()))[1]
        known = wrapped in [key for at, (key, _) in stored()[1].items() if at == version]
        try:
            opening.open_service_key(tenant_key, wrapped, "acme", region, service_id, version).wipe()
        except DecryptError:
            assert not known
        else:
            assert known
