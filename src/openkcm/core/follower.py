# SPDX-License-Identifier: Apache-2.0
"""Keeps a process in step with what others change in the store.

Invariant: a tenant's keys are open in this process only while the store's generation of it is the one that its
Gateways were told of. What others changed is seen by ``poll``, by ``overtaken`` before a key is opened, and by
``confirmed`` after one was published, so that there is no moment between the three. A store that is asked all the time
and does not answer is put up with for ``store_grace`` seconds; then every key is zeroed.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import sqlalchemy as sql
from sqlalchemy.engine import Connection

from ..keys import Change, Event, TenantState
from . import audit, schema
from .rows import LIVE, TenantRow

if TYPE_CHECKING:
    from .vault import Vault

logger = logging.getLogger("openkcm")

_CHUNK: Final = 500
_MOST_ACTS: Final = 5000
"""Acts since the last look up to which it is cheaper to read whom they are about than to look at every open tenant."""


class Follower:
    """What this process's Gateways know of each tenant, and what the store says now."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        # The generation that Gateways know of each tenant whose keys were used here since it was last dark.
        self.told: dict[str, int] = {}
        self._seen: int | None = None
        self._number: int | None = None
        self.polled = vault.clock()

    @property
    def number(self) -> int:
        """The last audit record up to which everything was acted on; 0 before the first look."""
        return self._number or 0

    def forget(self, tenant: str) -> None:
        """The tenant is dark: whoever uses it next learns its generation anew."""
        self.told.pop(tenant, None)

    def changed(self, tenant: str, generation: int) -> None:
        """Take note of an act of this process, of which Gateways need not hear as of another's."""
        if tenant in self.told:
            self.told[tenant] = generation

    def poll(self) -> None:
        """Act on what other processes changed: drop the keys of every tenant whose generation moved."""
        self.polled = self._vault.clock()
        seen = self._vault.store.data_version()
        if self._vault.store.silence() > self._vault.store_grace:
            self._lose_sight()
        if seen == self._seen:
            return
        with self._vault.store.read() as connection:
            number, acted_on = self._acts(connection)
        told = list(self._concerned(acted_on))
        columns = schema.tenants.c
        for start in range(0, len(told), _CHUNK):
            with self._vault.store.read() as connection:
                rows = connection.execute(
                    sql.select(columns.tenant, columns.generation, columns.state, columns.liveness).where(
                        columns.tenant.in_(told[start : start + _CHUNK])
                    )
                ).all()
            for row in rows:
                self._reconcile(row.tenant, row.generation, row.state, row.liveness)
                if row.liveness != TenantState.DARK:
                    self._vault.liveness.news(row.tenant, row.generation)
        # Only now: a look that failed half-way is made again.
        self._seen, self._number = seen, number

    def _lose_sight(self) -> None:
        """Zero every open key: what others changed was not to be seen for too long, and a kill may be among it."""
        for tenant in list(self.told):
            logger.warning(
                "tenant %s: its keys are zeroed, the vault's store being away for too long", tenant
            )
            self._vault.zero(tenant)

    def _acts(self, connection: Connection) -> tuple[int, set[str] | None]:
        """The last audit record's number, and whom the records since the last look are about; None for anybody.

        Every change of a generation has a record in its transaction, so that a look costs what was changed and not
        what is open. Anybody: at the first look, after very many acts, and where the store changed without one.
        """
        last = audit.last_number(connection)
        if self._number is None or not 0 < last - self._number <= _MOST_ACTS:
            return last, None
        columns = schema.audit.c
        acts = connection.execute(sql.select(columns.tenant).where(columns.number > self._number).distinct())
        return last, set(acts.scalars())

    def _concerned(self, acted_on: set[str] | None) -> set[str]:
        """Those whose change must be seen here: used in this process, or dark in it."""
        liveness = self._vault.liveness
        if acted_on is None:
            return {*list(self.told), *liveness.dark()}
        return {
            tenant
            for tenant in acted_on
            if tenant in self.told
            or ((known := liveness.state_of(tenant)) is not None and known.state is TenantState.DARK)
        }

    def overtaken(self, row: TenantRow) -> bool:
        """Whether the store has moved on since this process's Gateways were told of the tenant; tells them."""
        if row.state == LIVE:
            self.told.setdefault(row.tenant, row.generation)
        return self._reconcile(row.tenant, row.generation, row.state, row.liveness)

    def confirmed(self, row: TenantRow) -> bool:
        """Look again after a key was published: whether the tenant is as it was when it was read."""
        columns = schema.tenants.c
        try:
            with self._vault.store.read() as connection:
                now = connection.execute(
                    sql.select(columns.generation, columns.state, columns.liveness).where(
                        columns.tenant == row.tenant
                    )
                ).one()
        except BaseException:
            self._vault.ring.drop(row.tenant)
            raise
        if now.generation == row.generation:
            return True
        self._vault.ring.drop(row.tenant)
        self._reconcile(row.tenant, now.generation, now.state, now.liveness)
        return False

    def _reconcile(self, tenant: str, generation: int, state: str, liveness: str) -> bool:
        """Drop and tell if the store is ahead of what Gateways know; returns whether it was."""
        known = self.told.get(tenant)
        if known is None or generation <= known:
            return False
        if state != LIVE:
            self._vault.go_dark(tenant)
            return True
        self._vault.liveness.forget(tenant)
        if liveness == TenantState.DARK:
            # Its root said no to another process. Whoever uses it next asks the root himself.
            self._vault.zero(tenant)
            return True
        self.told[tenant] = generation
        self._vault.ring.drop(tenant)
        self._vault.listeners.tell(Event(Change.ROTATED, tenant))
        return True
