# SPDX-License-Identifier: Apache-2.0
"""Reads the tree of tenants, services and key versions out of the store."""

from __future__ import annotations

from collections import defaultdict
from operator import attrgetter
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
        ).all()
        services = _services(connection, tenant)
        shredded = _shredded(connection, tenant)
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
        # Sorted here: a server sorts as its own language does.
        for row, (state, reason) in ((row, _state_of(vault, row)) for row in sorted(rows, key=_TENANT))
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


_TENANT: Final = attrgetter("tenant")
_VERSION: Final = attrgetter("version")
_NAME: Final = attrgetter("service")


class _Shared:
    """Gives equal values as one object: a tree of a million keys has few different names, moments and states."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._keys: dict[tuple[int, str, str], tuple[ServiceKeyStatus, ...]] = {}

    def text(self, value: str) -> str:
        return self._texts.setdefault(value, value)

    def key(self, version: int, state: str, created_at: str) -> tuple[ServiceKeyStatus, ...]:
        place = (version, state, created_at)
        found = self._keys.get(place)
        if found is None:
            found = self._keys[place] = (ServiceKeyStatus(version, KeyState(state), self.text(created_at)),)
        return found


def _services(connection: sql.Connection, tenant: str | None) -> dict[str, list[ServiceStatus]]:
    # Sorted here: in the order of an index the store would fetch a million rows one by one, at twice the time.
    columns, keys = schema.services.c, schema.service_keys.c
    shared = _Shared()
    versions: dict[bytes, tuple[ServiceKeyStatus, ...]] = {}
    for service_id, *key in connection.execute(
        sql.select(keys.service_id, keys.version, keys.state, keys.created_at).where(
            sql.true() if tenant is None else keys.tenant == tenant
        )
    ):
        known = versions.get(service_id)
        added = shared.key(*key)
        versions[service_id] = added if known is None else tuple(sorted(known + added, key=_VERSION))
    found: dict[str, list[ServiceStatus]] = defaultdict(list)
    for owner, name, service_id, active, lease, created_at in connection.execute(
        sql.select(
            columns.tenant,
            columns.name,
            columns.service_id,
            columns.active_version,
            columns.lease,
            columns.created_at,
        ).where(sql.true() if tenant is None else columns.tenant == tenant)
    ):
        found[owner].append(
            ServiceStatus(
                shared.text(owner),
                shared.text(name),
                service_id,
                active,
                versions.get(service_id, ()),
                float(lease),
                shared.text(created_at),
            )
        )
    for services in found.values():
        services.sort(key=_NAME)
    return found


def _shredded(connection: sql.Connection, tenant: str | None) -> dict[bytes, int]:
    columns, services = schema.shredded_keys.c, schema.services.c
    own = sql.select(services.service_id).where(services.tenant == tenant)
    rows = connection.execute(
        sql.select(columns.service_id, sql.func.count())
        .where(sql.true() if tenant is None else columns.service_id.in_(own))
        .group_by(columns.service_id)
    )
    return {row[0]: row[1] for row in rows}
