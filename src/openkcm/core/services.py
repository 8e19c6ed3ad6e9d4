# SPDX-License-Identifier: Apache-2.0
"""The acts on services: create, find, rotate, and grant an open-lease.

Invariant: that of ``act``.
"""

from __future__ import annotations

import sys
from typing import Final, NamedTuple

import sqlalchemy as sql
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

from ..crypto import generate_wrapping_key, random_bytes
from ..errors import AlreadyExists, InvalidInput, ServiceNotFound
from ..keys import KeyState, Service
from ..limits import SERVICE_ID_BYTES
from . import audit, schema
from .act import attempt, change_tenant, check_unchanged, linked_region
from .keyring import ServiceKey
from .opening import wrap_service_key
from .rows import TenantRow
from .vault import Vault

MAX_LEASE_SECONDS: Final = 3600.0


def find_service(vault: Vault, tenant: str, name: str) -> Service:
    """Look a service up by its names."""
    with vault.store.read() as connection:
        region = linked_region(connection, tenant)
        columns = schema.services.c
        service_id = connection.execute(
            sql.select(columns.service_id).where(columns.tenant == tenant, columns.name == name)
        ).scalar()
    if service_id is None:
        raise ServiceNotFound(
            f"the tenant {tenant} has no service {name}; make it with 'openkcm service create {tenant} {name}'"
        )
    # One text for all: there are few regions, and may be a million services in memory.
    return Service(tenant, sys.intern(region), name, service_id)


def create_service(vault: Vault, tenant: str, name: str, at: str) -> Service:
    """Make a service id and version 1 of its key."""

    def act() -> Service:
        opened = vault.open_tenant(tenant)
        row = opened.row
        service = Service(tenant, row.region, name, random_bytes(SERVICE_ID_BYTES))
        with vault.ring.passing(tenant, opened.epoch, generate_wrapping_key()) as key:
            wrapped = wrap_service_key(opened.key, key, tenant, row.region, service.service_id, 1)
        with vault.store.write() as connection:
            check_unchanged(connection, row)
            connection.execute(
                schema.services.insert().values(
                    service_id=service.service_id,
                    tenant=tenant,
                    name=name,
                    active_version=1,
                    lease=0.0,
                    created_at=at,
                )
            )
            _insert_service_key(connection, row, service, 1, wrapped, at)
            audit.append(connection, at, "create-service", tenant, name)
        return service

    try:
        return attempt(vault, tenant, act)
    except IntegrityError:
        raise AlreadyExists(f"the tenant {tenant} has a service {name} already") from None


def rotate_service(vault: Vault, service: Service, at: str) -> int:
    """Make a new active version; the one before only unwraps from now on."""

    def act() -> int:
        opened = vault.open_tenant(service.tenant)
        row = opened.row
        with vault.ring.passing(row.tenant, opened.epoch, generate_wrapping_key()) as key:
            with vault.store.write() as connection:
                check_unchanged(connection, row)
                active_version, lease = _active_version(connection, service)
                version = active_version + 1
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
                generation = change_tenant(connection, row.tenant, at)
                audit.append(connection, at, "rotate-service", row.tenant, service.name, f"version {version}")
            # Only now that it is durable may anything be wrapped under it.
            active = ServiceKey(service, version, key, lease)
            kept = vault.ring.advance(row.tenant, opened.epoch, row.generation, generation, active)
        vault.changed(row.tenant, generation, keep=kept)
        return version

    return attempt(vault, service.tenant, act)


def set_lease(vault: Vault, service: Service, seconds: float, at: str) -> None:
    """Grant an open-lease, or take it back with 0; every process reads it with the service's keys."""
    if not 0 <= seconds <= MAX_LEASE_SECONDS:
        raise InvalidInput(f"an open-lease is 0 to {MAX_LEASE_SECONDS:.0f} seconds")
    with vault.store.write() as connection:
        linked_region(connection, service.tenant)
        _active_version(connection, service)
        connection.execute(
            schema.services.update()
            .where(schema.services.c.service_id == service.service_id)
            .values(lease=float(seconds))
        )
        generation = change_tenant(connection, service.tenant, at)
        audit.append(connection, at, "lease", service.tenant, service.name, f"{seconds:g} seconds")
    vault.changed(service.tenant, generation)


class _Active(NamedTuple):
    version: int
    lease: float


def _active_version(connection: Connection, service: Service) -> _Active:
    columns = schema.services.c
    row = connection.execute(
        sql.select(columns.active_version, columns.lease).where(columns.service_id == service.service_id)
    ).first()
    if row is None:
        raise ServiceNotFound(f"the tenant {service.tenant} has no service {service.name} any more")
    return _Active(row.active_version, float(row.lease))


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
