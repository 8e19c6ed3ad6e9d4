# SPDX-License-Identifier: Apache-2.0
"""The acts of key management, one function each.

Invariant: an act is one write transaction with its audit record in it, begun only after every key and every
root's answer it needs is at hand, and it checks in that transaction that nobody changed the tenant meanwhile
(its generation). A new key is durable before it is used.
"""

from __future__ import annotations

import contextlib
from typing import Final

import sqlalchemy as sql
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

from ..crypto import WrappingKey, generate_wrapping_key, random_bytes
from ..errors import AlreadyExists, KeyDestroyed, ServiceNotFound, StoreUnavailable, TenantNotFound
from ..keys import KeyState, Service
from ..limits import SERVICE_ID_BYTES
from . import audit, schema
from .keyring import ServiceKey
from .opening import open_service_key, seal_tenant_key, wrap_service_key, wrap_under_root
from .vault import KILLED, LIVE, UNLINKED, TenantRow, Vault

MAX_REASON: Final = 256
_OVERTAKEN: Final = "the tenant was changed by somebody else meanwhile; nothing was done, try again"


# ---- tenants -------------------------------------------------------------------------------------------


def link_tenant(vault: Vault, tenant: str, root_uri: str, region: str, at: str) -> None:
    """Make a tenant key and wrap it under the seal key and the root."""
    with vault.store.read() as connection:
        _refuse_linked(connection, tenant)
    root = vault.root(root_uri, create=True)
    with contextlib.closing(_Fresh()) as fresh:
        sealed = seal_tenant_key(vault.seal(), fresh.key, tenant, region, 1)
    wrapped = wrap_under_root(root, sealed, tenant, region, 1)
    with vault.store.write() as connection:
        before = _refuse_linked(connection, tenant)
        row = {
            "region": region,
            "root_uri": root.uri,
            "state": LIVE,
            "reason": "",
            "generation": before + 1,
            "created_at": at,
            "changed_at": at,
        }
        if before:
            connection.execute(schema.tenants.update().where(schema.tenants.c.tenant == tenant).values(**row))
        else:
            connection.execute(schema.tenants.insert().values(tenant=tenant, **row))
        connection.execute(
            schema.tenant_keys.insert().values(
                tenant=tenant, version=1, state=KeyState.ACTIVE, wrapped=wrapped, created_at=at
            )
        )
        audit.append(connection, at, "link", tenant, detail=f"root {root.uri}")
    vault.go_live(tenant)


def kill(vault: Vault, tenant: str, reason: str, at: str) -> None:
    """Zero, tell, record: in this order."""
    reason = reason[:MAX_REASON]
    vault.go_dark(tenant, killed=reason)
    try:
        with vault.store.write() as connection:
            _linked(connection, tenant)
            _change(connection, tenant, at, state=KILLED, reason=reason)
            audit.append(connection, at, "kill", tenant, detail=reason)
    except (TenantNotFound, KeyDestroyed):
        vault.go_live(tenant)
        raise
    except StoreUnavailable as error:
        raise StoreUnavailable(
            f"the tenant {tenant} is dark in this process, but that could not be recorded, so other processes and a "
            f"restart do not know: {error}. Repeat the kill",
            retryable=error.retryable,
        ) from None


def restore(vault: Vault, tenant: str, at: str) -> None:
    """Open the tenant key through its root, and only then call the tenant live."""
    with vault.store.read() as connection:
        row = vault.tenant_row(connection, tenant)
    vault.open_through_root(row).wipe()
    with vault.store.write() as connection:
        _unchanged(connection, row)
        _change(connection, tenant, at, state=LIVE, reason="")
        audit.append(connection, at, "restore", tenant)
    vault.go_live(tenant)


def unlink(vault: Vault, tenant: str, at: str) -> None:
    """Delete every wrapped key of the tenant; SQLite overwrites what it deletes."""
    with vault.store.read() as connection:
        _linked(connection, tenant)
    vault.go_dark(tenant, killed="unlinked")
    with vault.store.write() as connection:
        _linked(connection, tenant)
        services = sql.select(schema.services.c.service_id).where(schema.services.c.tenant == tenant)
        for table in (schema.service_keys, schema.shredded_keys):
            connection.execute(table.delete().where(table.c.service_id.in_(services)))
        for table in (schema.services, schema.tenant_keys):
            connection.execute(table.delete().where(table.c.tenant == tenant))
        _change(connection, tenant, at, state=UNLINKED, reason="unlinked")
        audit.append(connection, at, "unlink", tenant)
    vault.store.checkpoint()


def rotate_tenant(vault: Vault, tenant: str, at: str) -> int:
    """Move every service key under a new tenant key and destroy the old one."""
    with vault.store.read() as connection:
        row = vault.tenant_row(connection, tenant)
    old = vault.tenant_key(row)
    version = row.key_version + 1
    with contextlib.closing(_Fresh()) as fresh:
        sealed = seal_tenant_key(vault.seal(), fresh.key, tenant, row.region, version)
        wrapped = wrap_under_root(vault.root(row.root_uri), sealed, tenant, row.region, version)
        with vault.store.write() as connection:
            _unchanged(connection, row)
            connection.execute(
                schema.tenant_keys.insert().values(
                    tenant=tenant, version=version, state=KeyState.ACTIVE, wrapped=wrapped, created_at=at
                )
            )
            _rewrap_service_keys(connection, row, old, fresh.key, version)
            connection.execute(
                schema.tenant_keys.update()
                .where(schema.tenant_keys.c.tenant == tenant, schema.tenant_keys.c.version == row.key_version)
                .values(state=KeyState.DESTROYED, wrapped=b"")
            )
            _change(connection, tenant, at)
            audit.append(connection, at, "rotate-tenant", tenant, detail=f"version {version}")
    vault.ring.drop(tenant)
    vault.store.checkpoint()
    return version


def _rewrap_service_keys(
    connection: Connection, row: TenantRow, old: WrappingKey, new: WrappingKey, version: int
) -> None:
    keys = schema.service_keys.c
    held = connection.execute(sql.select(schema.service_keys).where(keys.tenant == row.tenant)).all()
    for each in held:
        wrapped = b""
        if each.state != KeyState.DESTROYED:
            place = (row.tenant, row.region, each.service_id, each.version)
            opened = open_service_key(old, each.wrapped, *place)
            wrapped = wrap_service_key(new, opened, *place)
            opened.wipe()
        connection.execute(
            schema.service_keys.update()
            .where(keys.service_id == each.service_id, keys.version == each.version)
            .values(wrapped=wrapped, tenant_key_version=version)
        )


def replace_root(vault: Vault, tenant: str, root_uri: str, at: str) -> None:
    """Wrap the tenant key under another root, having opened it through the old one."""
    with vault.store.read() as connection:
        row = vault.tenant_row(connection, tenant)
    root = vault.root(root_uri, create=True)
    vault.check_live(row)
    key = vault.open_through_root(row)
    sealed = seal_tenant_key(vault.seal(), key, tenant, row.region, row.key_version)
    key.wipe()
    wrapped = wrap_under_root(root, sealed, tenant, row.region, row.key_version)
    with vault.store.write() as connection:
        _unchanged(connection, row)
        connection.execute(
            schema.tenant_keys.update()
            .where(schema.tenant_keys.c.tenant == tenant, schema.tenant_keys.c.version == row.key_version)
            .values(wrapped=wrapped)
        )
        _change(connection, tenant, at, root_uri=root.uri)
        audit.append(connection, at, "replace-root", tenant, detail=f"root {root.uri}")
    vault.ring.drop(tenant)
    vault.store.checkpoint()


# ---- services ------------------------------------------------------------------------------------------


def find_service(vault: Vault, tenant: str, name: str) -> Service:
    """Look a service up by its names."""
    with vault.store.read() as connection:
        region = _linked(connection, tenant)
        columns = schema.services.c
        service_id = connection.execute(
            sql.select(columns.service_id).where(columns.tenant == tenant, columns.name == name)
        ).scalar()
    if service_id is None:
        raise ServiceNotFound(
            f"the tenant {tenant} has no service {name}; make it with 'openkcm service create {tenant} {name}'"
        )
    return Service(tenant, region, name, service_id)


def create_service(vault: Vault, tenant: str, name: str, at: str) -> Service:
    """Make a service id and version 1 of its key."""
    with vault.store.read() as connection:
        row = vault.tenant_row(connection, tenant)
    tenant_key = vault.tenant_key(row)
    service = Service(tenant, row.region, name, random_bytes(SERVICE_ID_BYTES))
    with contextlib.closing(_Fresh()) as fresh:
        wrapped = wrap_service_key(tenant_key, fresh.key, tenant, row.region, service.service_id, 1)
    try:
        with vault.store.write() as connection:
            _unchanged(connection, row)
            connection.execute(
                schema.services.insert().values(
                    service_id=service.service_id, tenant=tenant, name=name, active_version=1, created_at=at
                )
            )
            _insert_service_key(connection, row, service, 1, wrapped, at)
            audit.append(connection, at, "create-service", tenant, name)
    except IntegrityError:
        raise AlreadyExists(f"the tenant {tenant} has a service {name} already") from None
    return service


def rotate_service(vault: Vault, service: Service, at: str) -> int:
    """Make a new active version; the one before only unwraps from now on."""
    with vault.store.read() as connection:
        row = vault.tenant_row(connection, service.tenant)
        active = connection.execute(
            sql.select(schema.services.c.active_version).where(
                schema.services.c.service_id == service.service_id
            )
        ).scalar_one()
    epoch = vault.ring.epoch(service.tenant)
    tenant_key = vault.tenant_key(row)
    version = int(active) + 1
    key = generate_wrapping_key()
    wrapped = wrap_service_key(tenant_key, key, row.tenant, row.region, service.service_id, version)
    with vault.store.write() as connection:
        _unchanged(connection, row)
        _insert_service_key(connection, row, service, version, wrapped, at)
        keys = schema.service_keys.c
        connection.execute(
            schema.service_keys.update()
            .where(keys.service_id == service.service_id, keys.version == active)
            .values(state=KeyState.DEACTIVATED)
        )
        connection.execute(
            schema.services.update()
            .where(schema.services.c.service_id == service.service_id)
            .values(active_version=version)
        )
        _change(connection, service.tenant, at)
        audit.append(connection, at, "rotate-service", service.tenant, service.name, f"version {version}")
    opened = ServiceKey(service, version, key)
    if not vault.ring.publish(
        service.tenant, epoch, row.generation + 1, service_keys=[opened], active=opened
    ):
        key.wipe()
    return version


# ---- pieces --------------------------------------------------------------------------------------------


class _Fresh:
    """A new wrapping key that is wiped when its block ends."""

    def __init__(self) -> None:
        self.key = generate_wrapping_key()

    def close(self) -> None:
        self.key.wipe()


def _insert_service_key(
    connection: Connection, row: TenantRow, service: Service, version: int, wrapped: bytes, at: str
) -> None:
    connection.execute(
        schema.service_keys.insert().values(
            service_id=service.service_id,
            version=version,
            tenant=row.tenant,
            tenant_key_version=row.key_version,
            state=KeyState.ACTIVE,
            wrapped=wrapped,
            created_at=at,
        )
    )


def _refuse_linked(connection: Connection, tenant: str) -> int:
    """Raise AlreadyExists if the tenant is linked; else the generation it once had, or 0."""
    columns = schema.tenants.c
    found = connection.execute(
        sql.select(columns.state, columns.generation).where(columns.tenant == tenant)
    ).first()
    if found is not None and found.state != UNLINKED:
        raise AlreadyExists(f"the tenant {tenant} is linked already; 'openkcm status' shows it")
    return int(found.generation) if found is not None else 0


def _linked(connection: Connection, tenant: str) -> str:
    """Raise TenantNotFound or KeyDestroyed unless the tenant is linked; its region."""
    columns = schema.tenants.c
    found = connection.execute(
        sql.select(columns.state, columns.region).where(columns.tenant == tenant)
    ).first()
    if found is None:
        raise TenantNotFound(f"no tenant {tenant} is linked; link it with 'openkcm tenant link'")
    if found.state == UNLINKED:
        raise KeyDestroyed(
            f"the tenant {tenant} was unlinked and its keys destroyed; its data cannot be read again"
        )
    return str(found.region)


def _unchanged(connection: Connection, row: TenantRow) -> None:
    columns = schema.tenants.c
    generation = connection.execute(
        sql.select(columns.generation).where(columns.tenant == row.tenant)
    ).scalar()
    if generation != row.generation:
        raise StoreUnavailable(_OVERTAKEN)


def _change(connection: Connection, tenant: str, at: str, **values: str) -> None:
    """Set columns of a tenant; the generation tells other processes."""
    columns = schema.tenants.c
    connection.execute(
        schema.tenants.update()
        .where(columns.tenant == tenant)
        .values(generation=columns.generation + 1, changed_at=at, **values)
    )
