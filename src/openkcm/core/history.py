# SPDX-License-Identifier: Apache-2.0
"""What has changed since a record of the audit chain, for Gateways that were away.

Invariant: every change that a Gateway must hear of has a record in its transaction, so that nothing between two
positions is missed; what a tenant went through in between is told as what it is now.
"""

from __future__ import annotations

from typing import Final

import sqlalchemy as sql
from sqlalchemy.engine import Connection

from ..keys import Change, Event, TenantState
from . import audit, schema
from .rows import LIVE
from .store import Store

MOST_RECORDS: Final = 5000
"""Records that are looked through; a Gateway that missed more drops all it holds."""

_CHUNK: Final = 500

_HARMLESS: Final = ("shred", "create-service", "link", "grant", "withdraw")
"""Acts after which every key that a Gateway holds may be used as before, but for single shredded ones."""


def vault_id(connection: Connection) -> bytes:
    """The vault's id, 16 bytes."""
    return bytes(connection.execute(sql.select(schema.vault.c.vault_id)).scalar_one())


def changes_after(store: Store, position: int, *, shreds: bool = True) -> list[Event] | None:
    """The events that stand for all changes after a position; None where that is too long ago, or ahead of the store.

    Args:
        store: where to look.
        position: the number of the last audit record that is known.
        shreds: whether shredded data keys count, which take no tenant's keys out of use.

    Raises:
        StoreUnavailable: the store does not answer.
    """
    with store.read() as connection:
        last = audit.last_number(connection)
        if not 0 <= last - position <= MOST_RECORDS:
            return None
        columns = schema.audit.c
        query = sql.select(columns.tenant).where(columns.number > position, columns.tenant != "").distinct()
        if not shreds:
            query = query.where(columns.act.not_in(_HARMLESS))
        tenants = connection.execute(query).scalars()
        return _as_they_are(connection, sorted(tenants))


def _as_they_are(connection: Connection, tenants: list[str]) -> list[Event]:
    columns = schema.tenants.c
    events = []
    for start in range(0, len(tenants), _CHUNK):
        rows = connection.execute(
            sql.select(columns.tenant, columns.state, columns.liveness).where(
                columns.tenant.in_(tenants[start : start + _CHUNK])
            )
        )
        for row in rows:
            off = row.state != LIVE or row.liveness == TenantState.DARK
            # Whoever is told that keys were rotated makes and opens them anew, shredded ones among them.
            events.append(Event(Change.DARK if off else Change.ROTATED, row.tenant))
    return events
