# SPDX-License-Identifier: Apache-2.0
"""Tenants and keys as the store has them.

Invariant: what is read here is a copy of one moment; whoever opens a key with it looks again afterwards
(``follower``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

import sqlalchemy as sql
from sqlalchemy.engine import Connection

from ..errors import DecryptError, KeyDestroyed, ServiceNotFound, TenantNotFound
from ..keys import KeyState, Service
from . import schema

LIVE: Final = "live"
KILLED: Final = "killed"
UNLINKED: Final = "unlinked"
"""What operators made of a tenant; what its root says is another column, ``liveness``."""

MAX_REASON: Final = 256


_MOST_VERSION: Final = 2**31 - 1
"""The greatest number that a column of versions holds; an envelope has room for more."""


def storable(reason: str) -> str:
    """A reason as any database takes it: no character that UTF-8 cannot carry, no NUL, and not too long."""
    return reason.encode("utf-8", "replace").decode().replace("\0", "?")[:MAX_REASON]


@dataclass(frozen=True, slots=True)
class TenantRow:
    """A tenant and its active key as the store has them."""

    tenant: str
    region: str
    root_uri: str
    state: str
    reason: str
    generation: int
    liveness: str
    key_version: int
    wrapped: bytes


class FoundKey(NamedTuple):
    """A version of a service key, wrapped, and the open-lease that its service was granted in seconds."""

    version: int
    wrapped: bytes
    active: bool
    lease: float


def read_tenant(connection: Connection, tenant: str) -> TenantRow:
    """Read a tenant with its active key.

    Raises:
        TenantNotFound, KeyDestroyed: there is none, or none any more.
    """
    tenants, keys = schema.tenants.c, schema.tenant_keys.c
    found = connection.execute(sql.select(schema.tenants).where(tenants.tenant == tenant)).first()
    if found is None:
        raise TenantNotFound(f"no tenant {tenant} is linked; link it with 'openkcm tenant link'")
    if found.state == UNLINKED:
        raise KeyDestroyed(
            f"the tenant {tenant} was unlinked and its keys destroyed; its data cannot be read again"
        )
    key = connection.execute(
        sql.select(keys.version, keys.wrapped).where(keys.tenant == tenant, keys.state == KeyState.ACTIVE)
    ).one()
    return TenantRow(
        tenant,
        found.region,
        found.root_uri,
        found.state,
        found.reason,
        found.generation,
        found.liveness,
        key.version,
        key.wrapped,
    )


def read_service_key(connection: Connection, service: Service, version: int | None) -> FoundKey:
    """Read a version of a service's key, the active one if none is named.

    Raises:
        ServiceNotFound: the tenant has no such service.
        DecryptError: it never had such a version.
        KeyDestroyed: the version was destroyed.
    """
    tenants, services, keys = schema.tenants.c, schema.services.c, schema.service_keys.c
    row = connection.execute(
        sql.select(services.active_version, services.lease)
        .join(schema.tenants, tenants.tenant == services.tenant)
        .where(
            services.service_id == service.service_id,
            services.tenant == service.tenant,
            tenants.region == service.region,
        )
    ).first()
    if row is None:
        raise no_such_service(service)
    wanted = row.active_version if version is None else version
    if wanted > _MOST_VERSION:
        raise DecryptError
    found = connection.execute(
        sql.select(keys.state, keys.wrapped).where(
            keys.service_id == service.service_id, keys.version == wanted
        )
    ).first()
    if found is None:
        raise DecryptError  # an envelope that names a version which never was
    if found.state == KeyState.DESTROYED:
        raise KeyDestroyed(f"version {wanted} of the service key was destroyed")
    return FoundKey(wanted, found.wrapped, wanted == row.active_version, float(row.lease))


def no_such_service(service: Service) -> ServiceNotFound:
    """What to raise for a service that is not, or not any more, its tenant's."""
    return ServiceNotFound(
        f"the tenant {service.tenant} has no such service as {service.name}, or not any more"
    )
