# SPDX-License-Identifier: Apache-2.0
"""Reads the tree of tenants, services and key versions out of the store."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Final

import sqlalchemy as sql
from sqlalchemy.engine import Row

from ..errors import TenantNotFound
from ..keys import KeyState, TenantState
from . import schema
from .rows import LIVE, UNLINKED
from .status import ServiceKeyStatus, ServiceStatus, TenantStatus
from .vault import Vault

_BY_OPERATOR: Final = "killed by an operator"


def read_tree(vault: Vault, tenant: str | None) -> list[TenantStatus]:
    """Status of one tenant or of all that are linked, sorted by name."""
    wanted = sql.true() if tenant is None else schema.tenants.c.tenant == tenant
    with vault.store.read() as connection:
        rows = connection.execute(
            sql.select(schema.tenants, schema.tenant_keys.c.version.label("key_version"))
            .join(schema.tenant_keys, schema.tenant_keys.c.tenant == schema.tenants.c.tenant)
            .where(wanted, schema.tenants.c.state != UNLINKED, schema.tenant_keys.c.state == KeyState.ACTIVE)
            .order_by(schema.tenants.c.tenant)
        ).all()
        services = _services(connection, tenant)
        shredded = _shredded(connection)
    if tenant is not None and not rows:
        raise TenantNotFound(f"no tenant {tenant} is linked; link it with 'openkcm tenant link'")
    opened = vault.ring.generations()
    return [
        TenantStatus(
            tenant=row.tenant,
            region=row.region,
            state=state,
            reason=reason,
            root=row.root_uri,
            development=row.root_uri.startswith("local:"),
            key_version=row.key_version,
            open=row.tenant in opened,
            shredded=sum(shredded.get(service.service_id, 0) for service in services[row.tenant]),
            services=tuple(services[row.tenant]),
            created_at=row.created_at,
        )
        for row, (state, reason) in ((row, _state_of(vault, row)) for row in rows)
    ]


def _state_of(vault: Vault, row: Row[Any]) -> tuple[TenantState, str]:
    """A tenant's state and the reason for it, as this process or, failing that, the store knows it."""
    killed = row.reason or _BY_OPERATOR if row.state != LIVE else vault.dark_here(row.tenant)
    if killed is not None:
        return TenantState.DARK, killed or _BY_OPERATOR
    here = vault.liveness.state_of(row.tenant)
    if here is not None:
        return here.state, here.reason
    return TenantState(row.liveness), row.liveness_reason


def _services(connection: sql.Connection, tenant: str | None) -> dict[str, list[ServiceStatus]]:
    columns = schema.services.c
    wanted = sql.true() if tenant is None else columns.tenant == tenant
    versions: dict[bytes, list[ServiceKeyStatus]] = defaultdict(list)
    keys = schema.service_keys.c
    for key in connection.execute(
        sql.select(keys.service_id, keys.version, keys.state, keys.created_at)
        .where(sql.true() if tenant is None else keys.tenant == tenant)
        .order_by(keys.version)
    ):
        versions[key.service_id].append(ServiceKeyStatus(key.version, KeyState(key.state), key.created_at))
    found: dict[str, list[ServiceStatus]] = defaultdict(list)
    for row in connection.execute(sql.select(schema.services).where(wanted).order_by(columns.name)):
        found[row.tenant].append(
            ServiceStatus(
                row.tenant,
                row.name,
                row.service_id,
                row.active_version,
                tuple(versions[row.service_id]),
                float(row.lease),
                row.created_at,
            )
        )
    return found


def _shredded(connection: sql.Connection) -> dict[bytes, int]:
    columns = schema.shredded_keys.c
    rows = connection.execute(sql.select(columns.service_id, sql.func.count()).group_by(columns.service_id))
    return {row[0]: row[1] for row in rows}
