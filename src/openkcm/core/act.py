# SPDX-License-Identifier: Apache-2.0
"""What every act of key management is made of.

Invariant: an act is one write transaction with its audit record in it, begun only after every key and every
root's answer it needs is at hand, and it checks in that transaction that nobody changed the tenant meanwhile
(its generation). A new key is durable before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

import sqlalchemy as sql
from sqlalchemy.engine import Connection

from ..errors import KeyDestroyed, SecretMemoryError, StoreUnavailable, TenantNotFound
from . import schema
from .rows import UNLINKED, TenantRow
from .vault import OVERTAKEN, Vault

T = TypeVar("T")

_TRIES: Final = 8


class Overtaken(StoreUnavailable):
    """Somebody else changed the tenant between the reading and the writing of an act; nothing was done."""


def attempt(vault: Vault, tenant: str, act: Callable[[], T], tries: int = _TRIES) -> T:
    """Carry an act out, from its start again where somebody else's change of the tenant overtook it."""
    for _ in range(tries):
        epoch = vault.ring.epoch(tenant)
        try:
            return act()
        except Overtaken:
            continue
        except SecretMemoryError:
            # A key that was dropped meanwhile; else no memory can be locked.
            vault.check_open()
            if vault.ring.epoch(tenant) == epoch:
                raise
    raise StoreUnavailable(OVERTAKEN)


def linked_region(connection: Connection, tenant: str) -> str:
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


def check_unchanged(connection: Connection, row: TenantRow) -> None:
    columns = schema.tenants.c
    generation = connection.execute(
        sql.select(columns.generation).where(columns.tenant == row.tenant)
    ).scalar()
    if generation != row.generation:
        raise Overtaken


def change_tenant(connection: Connection, tenant: str, at: str, **values: str) -> int:
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
