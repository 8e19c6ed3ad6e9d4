# SPDX-License-Identifier: Apache-2.0
"""The acts of key management, one function each.

Invariant: an act is one write transaction with its audit record in it, begun only after every key and every
root's answer it needs is at hand, and it checks in that transaction that nobody changed the tenant meanwhile
(its generation). A new key is durable before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

import sqlalchemy as sql
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

from ..crypto import WrappingKey, generate_wrapping_key, random_bytes
from ..errors import (
    AlreadyExists,
    InvalidInput,
    KeyDestroyed,
    LimitExceeded,
    SecretMemoryError,
    ServiceNotFound,
    StoreUnavailable,
    TenantNotFound,
)
from ..keys import KeyState, Service
from ..limits import SERVICE_ID_BYTES
from . import audit, schema
from .keyring import ServiceKey
from .opening import open_service_key, seal_tenant_key, wrap_service_key, wrap_under_root
from .vault import KILLED, LIVE, OVERTAKEN, UNLINKED, OpenTenant, TenantRow, Vault

T = TypeVar("T")

MAX_REASON: Final = 256
MAX_ROOT_URI: Final = 1000
_TRIES: Final = 8


class _Overtaken(StoreUnavailable):
    """Somebody else changed the tenant between the reading and the writing of an act; nothing was done."""


def _attempt(vault: Vault, tenant: str, act: Callable[[], T], tries: int = _TRIES) -> T:
    """Carry an act out, from its start again where somebody else's change of the tenant overtook it."""
    for left in reversed(range(tries)):
        epoch = vault.ring.epoch(tenant)
        try:
            return act()
        except _Overtaken:
            if not left:
                break
        except SecretMemoryError:
            # A key that was dropped meanwhile; else no memory can be locked.
            vault.check_open()
            if not left or vault.ring.epoch(tenant) == epoch:
                raise
    raise StoreUnavailable(OVERTAKEN)


# ---- tenants -------------------------------------------------------------------------------------------


def link_tenant(vault: Vault, tenant: str, root_uri: str, region: str, at: str) -> None:
    """Make a tenant key and wrap it under the seal key and the root."""
    with vault.store.read() as connection:
        _refuse_linked(connection, tenant)
    root = vault.root(_check_root(root_uri), create=True)
    key = generate_wrapping_key()
    try:
        sealed = seal_tenant_key(vault.seal(), key, tenant, region, 1)
    finally:
        key.wipe()
    wrapped = wrap_under_root(root, sealed, tenant, region, 1)
    with vault.store.write() as connection:
        before = _refuse_linked(connection, tenant)
        row = {
            "region": region,
            "root_uri": _check_root(root.uri),
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
    # Whatever was given as a reason, it must not stand in the way.
    reason = str(reason).encode("utf-8", "replace").decode()[:MAX_REASON]
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
    vault.settle_dark(tenant)


def restore(vault: Vault, tenant: str, at: str) -> None:
    """Open the tenant key through its root, and only then call the tenant live.

    Not tried again when overtaken: what came between may have been a kill, which stands.
    """

    def act() -> None:
        with vault.store.read() as connection:
            row = vault.tenant_row(connection, tenant)
        vault.open_through_root(row).wipe()
        with vault.store.write() as connection:
            _unchanged(connection, row)
            generation = _change(connection, tenant, at, state=LIVE, reason="")
            audit.append(connection, at, "restore", tenant)
        vault.changed(tenant, generation)
        vault.go_live(tenant)

    _attempt(vault, tenant, act, tries=1)


def unlink(vault: Vault, tenant: str, at: str) -> None:
    """Delete every wrapped key of the tenant; SQLite overwrites what it deletes."""
    with vault.store.read() as connection:
        _linked(connection, tenant)
    vault.go_dark(tenant, killed="being unlinked")
    try:
        with vault.store.write() as connection:
            _linked(connection, tenant)
            _delete_keys(connection, tenant)
            _change(connection, tenant, at, state=UNLINKED, reason="unlinked")
            audit.append(connection, at, "unlink", tenant)
    except BaseException:
        vault.go_live(tenant)  # unlike a kill, an unlink that failed was none
        raise
    vault.settle_dark(tenant)
    vault.store.checkpoint()


def _delete_keys(connection: Connection, tenant: str) -> None:
    services = sql.select(schema.services.c.service_id).where(schema.services.c.tenant == tenant)
    for table in (schema.service_keys, schema.shredded_keys):
        connection.execute(table.delete().where(table.c.service_id.in_(services)))
    for table in (schema.services, schema.tenant_keys):
        connection.execute(table.delete().where(table.c.tenant == tenant))


def rotate_tenant(vault: Vault, tenant: str, at: str) -> int:
    """Move every service key under a new tenant key and destroy the old one."""

    def act() -> int:
        opened = vault.open_tenant(tenant)
        row, version = opened.row, opened.row.key_version + 1
        with vault.ring.passing(tenant, opened.epoch, generate_wrapping_key()) as key:
            sealed = seal_tenant_key(vault.seal(), key, tenant, row.region, version)
            wrapped = wrap_under_root(vault.root(row.root_uri), sealed, tenant, row.region, version)
            with vault.store.write() as connection:
                _unchanged(connection, row)
                connection.execute(
                    schema.tenant_keys.insert().values(
                        tenant=tenant, version=version, state=KeyState.ACTIVE, wrapped=wrapped, created_at=at
                    )
                )
                _rewrap_service_keys(connection, opened, key, version)
                connection.execute(
                    schema.tenant_keys.update()
                    .where(
                        schema.tenant_keys.c.tenant == tenant, schema.tenant_keys.c.version == row.key_version
                    )
                    .values(state=KeyState.DESTROYED, wrapped=b"")
                )
                generation = _change(connection, tenant, at)
                audit.append(connection, at, "rotate-tenant", tenant, detail=f"version {version}")
        vault.changed(tenant, generation)
        return version

    version = _attempt(vault, tenant, act)
    vault.store.checkpoint()
    return version


def _rewrap_service_keys(connection: Connection, opened: OpenTenant, new: WrappingKey, version: int) -> None:
    keys, row = schema.service_keys.c, opened.row
    held = connection.execute(sql.select(schema.service_keys).where(keys.tenant == row.tenant)).all()
    for each in held:
        wrapped = b""
        if each.state != KeyState.DESTROYED:
            place = (row.tenant, row.region, each.service_id, each.version)
            key = open_service_key(opened.key, each.wrapped, *place)
            wrapped = wrap_service_key(new, key, *place)
            key.wipe()
        connection.execute(
            schema.service_keys.update()
            .where(keys.service_id == each.service_id, keys.version == each.version)
            .values(wrapped=wrapped, tenant_key_version=version)
        )


def replace_root(vault: Vault, tenant: str, root_uri: str, at: str) -> None:
    """Wrap the tenant key under another root, having opened it through the old one."""
    root = vault.root(_check_root(root_uri), create=True)

    def act() -> None:
        with vault.store.read() as connection:
            row = vault.tenant_row(connection, tenant)
        vault.check_live(row)
        key = vault.open_through_root(row)
        try:
            sealed = seal_tenant_key(vault.seal(), key, tenant, row.region, row.key_version)
        finally:
            key.wipe()
        wrapped = wrap_under_root(root, sealed, tenant, row.region, row.key_version)
        with vault.store.write() as connection:
            _unchanged(connection, row)
            connection.execute(
                schema.tenant_keys.update()
                .where(schema.tenant_keys.c.tenant == tenant, schema.tenant_keys.c.version == row.key_version)
                .values(wrapped=wrapped)
            )
            generation = _change(connection, tenant, at, root_uri=_check_root(root.uri))
            audit.append(connection, at, "replace-root", tenant, detail=f"root {root.uri}")
        vault.changed(tenant, generation)

    _attempt(vault, tenant, act)
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

    def act() -> Service:
        opened = vault.open_tenant(tenant)
        row = opened.row
        service = Service(tenant, row.region, name, random_bytes(SERVICE_ID_BYTES))
        with vault.ring.passing(tenant, opened.epoch, generate_wrapping_key()) as key:
            wrapped = wrap_service_key(opened.key, key, tenant, row.region, service.service_id, 1)
        with vault.store.write() as connection:
            _unchanged(connection, row)
            connection.execute(
                schema.services.insert().values(
                    service_id=service.service_id, tenant=tenant, name=name, active_version=1, created_at=at
                )
            )
            _insert_service_key(connection, row, service, 1, wrapped, at)
            audit.append(connection, at, "create-service", tenant, name)
        return service

    try:
        return _attempt(vault, tenant, act)
    except IntegrityError:
        raise AlreadyExists(f"the tenant {tenant} has a service {name} already") from None


def rotate_service(vault: Vault, service: Service, at: str) -> int:
    """Make a new active version; the one before only unwraps from now on."""

    def act() -> int:
        opened = vault.open_tenant(service.tenant)
        row = opened.row
        with vault.ring.passing(row.tenant, opened.epoch, generate_wrapping_key()) as key:
            with vault.store.write() as connection:
                _unchanged(connection, row)
                version = _active_version(connection, service) + 1
                wrapped = wrap_service_key(
                    opened.key, key, row.tenant, row.region, service.service_id, version
                )
                _deactivate(connection, service, version - 1)
                _insert_service_key(connection, row, service, version, wrapped, at)
                connection.execute(
                    schema.services.update()
                    .where(schema.services.c.service_id == service.service_id)
                    .values(active_version=version)
                )
                generation = _change(connection, row.tenant, at)
                audit.append(connection, at, "rotate-service", row.tenant, service.name, f"version {version}")
            # Only now that it is durable may anything be wrapped under it.
            active = ServiceKey(service, version, key)
            kept = vault.ring.advance(row.tenant, opened.epoch, row.generation, generation, active)
        vault.changed(row.tenant, generation, keep=kept)
        return version

    return _attempt(vault, service.tenant, act)


def _active_version(connection: Connection, service: Service) -> int:
    version = connection.execute(
        sql.select(schema.services.c.active_version).where(schema.services.c.service_id == service.service_id)
    ).scalar()
    if version is None:
        raise ServiceNotFound(f"the tenant {service.tenant} has no service {service.name} any more")
    return int(version)


def _deactivate(connection: Connection, service: Service, version: int) -> None:
    keys = schema.service_keys.c
    connection.execute(
        schema.service_keys.update()
        .where(
            keys.service_id == service.service_id,
            keys.version == version,
            keys.state == KeyState.ACTIVE,
        )
        .values(state=KeyState.DEACTIVATED)
    )


# ---- pieces --------------------------------------------------------------------------------------------


def _check_root(uri: object) -> str:
    if not isinstance(uri, str):
        raise InvalidInput(f"a root is a URI in text, not {type(uri).__name__}")
    if len(uri) > MAX_ROOT_URI:
        raise LimitExceeded(f"a root URI takes at most {MAX_ROOT_URI} characters, not {len(uri)}")
    return uri


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
        raise _Overtaken


def _change(connection: Connection, tenant: str, at: str, **values: str) -> int:
    """Set columns of a tenant and its next generation, which tells other processes; returns that."""
    columns = schema.tenants.c
    connection.execute(
        schema.tenants.update()
        .where(columns.tenant == tenant)
        .values(generation=columns.generation + 1, changed_at=at, **values)
    )
    return int(
        connection.execute(sql.select(columns.generation).where(columns.tenant == tenant)).scalar_one()
    )
