# SPDX-License-Identifier: Apache-2.0
"""Store, seal key, roots and open keys of one process: everything that opens a key.

Invariant: a key is opened only for a tenant that the store calls live and whose root said yes just then. What was
overtaken does not stay open: a drop in this process moves the tenant's epoch, which was taken before the store was
read; and the store is read once more after a key was published, so that a change by another process is seen either
there or, the key being published, by ``poll``. No lock is held while a root is asked that another tenant would wait
for.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import sqlalchemy as sql
from sqlalchemy.engine import Connection

from ..crypto import WrappingKey
from ..errors import (
    AccessDenied,
    CoreUnavailable,
    DecryptError,
    KeyDestroyed,
    KeyDisabled,
    OpenKCMError,
    SealError,
    SecretMemoryError,
    ServiceNotFound,
    StoreUnavailable,
    TenantDark,
    TenantNotFound,
)
from ..keys import Change, Event, KeyState, Service
from ..roots import Root, open_root
from . import schema
from .keyring import Keyring, ServiceKey
from .opening import open_service_key, open_tenant_key
from .seal import open_seal
from .store import Store
from .watcher import Listeners

LIVE: Final = "live"
KILLED: Final = "killed"
UNLINKED: Final = "unlinked"

OVERTAKEN: Final = "the tenant was changed by somebody else meanwhile, again and again; try again"

logger = logging.getLogger("openkcm")

_TRIES: Final = 8
_CHUNK: Final = 500

REFUSAL_SECONDS: Final = 1.0
"""How long a root's "no" is repeated without asking it again, so that a busy tenant does not flood its root."""


@dataclass(frozen=True, slots=True)
class TenantRow:
    """A tenant and its active key as the store has them."""

    tenant: str
    region: str
    root_uri: str
    state: str
    reason: str
    generation: int
    key_version: int
    wrapped: bytes


@dataclass(frozen=True, slots=True)
class OpenTenant:
    """A tenant as the store had it, and its open key; ``epoch`` tells whether it was dropped since."""

    row: TenantRow
    epoch: int
    key: WrappingKey


class _FoundKey(NamedTuple):
    version: int
    wrapped: bytes
    active: bool


class Vault:
    """The Core's inside; one a process, safe for threads."""

    def __init__(self, store: Store, seal_path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.store = store
        self.seal_path = seal_path
        self.listeners = Listeners()
        self.clock = clock
        self._inherited: list[object] = []
        self._reset()

    def _reset(self) -> None:
        self.ring = Keyring()
        self._seal: WrappingKey | None = None
        self._closed = False
        self._roots: dict[str, Root] = {}
        self._roots_lock = threading.Lock()
        self._opening: dict[str, threading.RLock] = {}
        # Kills that the store does not know of yet, or never will.
        self._dark: dict[str, str] = {}
        self._refusals: dict[str, tuple[float, OpenKCMError]] = {}
        # The generation that Gateways know of each tenant whose keys were used here since it was last dark.
        self._told: dict[str, int] = {}
        self._seen: int | None = None
        self.polled = self.clock()

    def forget(self) -> None:
        """Start anew in a forked child: nothing secret is inherited, and the parent's sessions are left alone."""
        closed = self._closed
        self._inherited += [self._roots, self.ring, self._seal]
        self.store.forget()
        self._reset()
        self._closed = closed
        self.listeners.after_fork()

    def close(self) -> None:
        """Zero every key and close everything, for good."""
        self._closed = True
        self.ring.close()
        self.store.retire()
        seal, self._seal = self._seal, None
        if seal is not None:
            seal.wipe()
        with self._roots_lock:
            roots, self._roots = {id(root): root for root in self._roots.values()}, {}
        for root in roots.values():
            root.close()

    # ---- what opens ----------------------------------------------------------------------------------

    def seal(self) -> WrappingKey:
        """The seal key, read on first use in each process."""
        seal = self._seal
        if seal is None:
            seal = open_seal(self.seal_path)
            self._seal = seal
            if self._closed:
                seal.wipe()
        return seal

    def root(self, uri: str, *, create: bool = False) -> Root:
        """A root by its URI; its session is kept."""
        with self._roots_lock:
            held = self._roots.get(uri)
        if held is not None:
            return held
        opened = open_root(uri, create=create)
        with self._roots_lock:
            # The URI as the root spells it (a relative path made absolute) finds the same session.
            kept = self._roots.setdefault(opened.uri, opened)
            self._roots[uri] = kept
        if kept is not opened:
            opened.close()
        return kept

    def tenant_row(self, connection: Connection, tenant: str) -> TenantRow:
        """Read a tenant with its active key; TenantNotFound or KeyDestroyed."""
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
            key.version,
            key.wrapped,
        )

    def open_tenant(self, tenant: str) -> OpenTenant:
        """The tenant's active key, opened through its root if it is not open.

        Raises:
            TenantDark: killed, or the root says no.
            RootUnavailable: the root does not answer, and the key was not open.
            TenantNotFound, KeyDestroyed: there is none.
        """
        with self._lock_of(tenant):
            for _ in range(_TRIES):
                epoch = self.ring.epoch(tenant)
                with self.store.read() as connection:
                    row = self.tenant_row(connection, tenant)
                if self._overtaken(row):
                    continue
                opened = self._tenant_key(row, epoch)
                if opened is not None:
                    return opened
        raise StoreUnavailable(OVERTAKEN)

    def _tenant_key(self, row: TenantRow, epoch: int) -> OpenTenant | None:
        """The key of a tenant as it was read; None if somebody changed the tenant since."""
        self.check_live(row)
        held = self.ring.tenant_key(row.tenant, row.key_version)
        if held is not None:
            return OpenTenant(row, epoch, held)
        key = self.open_through_root(row)
        if not self.ring.publish(row.tenant, epoch, row.generation, tenant_key=(row.key_version, key)):
            key.wipe()
            return None
        self._refusals.pop(row.tenant, None)
        return OpenTenant(row, epoch, key) if self._confirmed(row) else None

    def open_through_root(self, row: TenantRow) -> WrappingKey:
        """Ask the root, now; a refusal makes the tenant dark and is remembered for a second."""
        try:
            root = self.root(row.root_uri)
            return open_tenant_key(root, self.seal(), row.wrapped, row.tenant, row.region, row.key_version)
        except (KeyDisabled, KeyDestroyed, AccessDenied) as error:
            dark = TenantDark(f"the root of tenant {row.tenant} refuses: {error}")
            if row.tenant not in self._refusals:
                logger.warning("%s", dark)  # once, until it opens again
            self._refusals[row.tenant] = (self.clock() + REFUSAL_SECONDS, dark)
            self.go_dark(row.tenant)
            raise dark from None
        except SecretMemoryError:
            self.check_open()  # the seal key was wiped
            raise

    def check_open(self) -> None:
        """Raise CoreUnavailable if the Core was closed."""
        if self._closed:
            raise CoreUnavailable("this Core was closed", retryable=False)

    def check_live(self, row: TenantRow) -> None:
        """Raise TenantDark unless the tenant may be used."""
        reason = self._dark.get(row.tenant)
        if row.state != LIVE or reason is not None:
            why = reason or row.reason
            raise TenantDark(
                f"the tenant {row.tenant} was killed{f' ({why})' if why else ''}; "
                "'openkcm tenant restore' brings it back"
            )
        refusal = self._refusal(row.tenant)
        if refusal is not None:
            raise TenantDark(refusal)

    def dark_here(self, tenant: str) -> str | None:
        """Why a tenant that the store calls live is dark in this process, or None."""
        return self._dark.get(tenant) if tenant in self._dark else self._refusal(tenant)

    def _refusal(self, tenant: str) -> str | None:
        refusal = self._refusals.get(tenant)
        return str(refusal[1]) if refusal is not None and self.clock() < refusal[0] else None

    def active_key(self, service: Service) -> ServiceKey:
        """The service's active key, opened if need be."""
        held = self.ring.active(service.service_id)
        if held is None:
            return self._open_service_key(service, None)
        return _of_tenant(held, service)

    def version_key(self, service: Service, version: int) -> ServiceKey:
        """A version of the service's key, opened if need be.

        Raises:
            DecryptError: there is no such version.
            KeyDestroyed: it was destroyed.
            ServiceNotFound: the tenant has no such service.
        """
        held = self.ring.version(service.service_id, version)
        if held is None:
            return self._open_service_key(service, version)
        return _of_tenant(held, service)

    def _open_service_key(self, service: Service, version: int | None) -> ServiceKey:
        with self._lock_of(service.tenant):
            for _ in range(_TRIES):
                epoch = self.ring.epoch(service.tenant)
                with self.store.read() as connection:
                    row = self.tenant_row(connection, service.tenant)
                    found = _service_key_row(connection, service, version)
                if self._overtaken(row):
                    continue
                parent = self._tenant_key(row, epoch)
                opened = self._open_under(parent, service, found) if parent is not None else None
                if opened is not None:
                    return opened
        raise StoreUnavailable(OVERTAKEN)

    def _open_under(self, parent: OpenTenant, service: Service, found: _FoundKey) -> ServiceKey | None:
        row = parent.row
        try:
            key = open_service_key(
                parent.key, found.wrapped, row.tenant, row.region, service.service_id, found.version
            )
        except SecretMemoryError:
            if parent.key.wiped:  # dropped since; the caller looks again
                return None
            raise
        opened = ServiceKey(service, found.version, key)
        if not self.ring.publish(
            row.tenant, parent.epoch, row.generation, service_key=opened, active=found.active
        ):
            key.wipe()
            return None
        return opened if self._confirmed(row) else None

    def _lock_of(self, tenant: str) -> threading.RLock:
        return self._opening.setdefault(tenant, threading.RLock())

    # ---- what closes ---------------------------------------------------------------------------------

    def go_dark(self, tenant: str, *, killed: str | None = None) -> None:
        """Zero the tenant's keys, then tell the Gateways.

        ``killed`` keeps the tenant dark whatever the store says, until ``settle_dark`` or ``go_live``.
        """
        if killed is not None:
            self._dark[tenant] = killed
        # In this order: who opens between the two is dropped, and no open key goes unwatched.
        self._told.pop(tenant, None)
        self.ring.drop(tenant)
        self.listeners.tell(Event(Change.DARK, tenant))

    def settle_dark(self, tenant: str) -> None:
        """From here on the store, which has recorded it, says that the tenant is dark; and may say otherwise later."""
        # Once more: a thread that read the store before it was recorded has taken its epoch before this, and a
        # restore that was overtaken may have called the tenant live since.
        if self.ring.drop(tenant):
            self._told.pop(tenant, None)
            self.listeners.tell(Event(Change.DARK, tenant))
        self._dark.pop(tenant, None)

    def go_live(self, tenant: str) -> None:
        """Forget that the tenant was dark, and tell the Gateways."""
        self._dark.pop(tenant, None)
        self._refusals.pop(tenant, None)
        self.listeners.tell(Event(Change.LIVE, tenant))

    def changed(self, tenant: str, generation: int, *, keep: bool = False) -> None:
        """Take note of an act of this process, of which Gateways need not hear as of another's; drops open keys."""
        if not keep:
            self.ring.drop(tenant)
        if tenant in self._told:
            self._told[tenant] = generation

    def poll(self) -> None:
        """Act on what other processes changed: drop the keys of every tenant whose generation moved."""
        self.polled = self.clock()
        seen = self.store.data_version()
        if seen == self._seen:
            return
        columns = schema.tenants.c
        told = list(self._told)
        for start in range(0, len(told), _CHUNK):
            with self.store.read() as connection:
                rows = connection.execute(
                    sql.select(columns.tenant, columns.generation, columns.state).where(
                        columns.tenant.in_(told[start : start + _CHUNK])
                    )
                ).all()
            for row in rows:
                self._reconcile(row.tenant, row.generation, row.state)
        # Only now: a look that failed half-way is made again.
        self._seen = seen

    def _overtaken(self, row: TenantRow) -> bool:
        """Whether the store has moved on since this process's Gateways were told of the tenant; tells them."""
        if row.state == LIVE:
            self._told.setdefault(row.tenant, row.generation)
        return self._reconcile(row.tenant, row.generation, row.state)

    def _confirmed(self, row: TenantRow) -> bool:
        """Look again after a key was published: whether the tenant is as it was when it was read."""
        columns = schema.tenants.c
        try:
            with self.store.read() as connection:
                now = connection.execute(
                    sql.select(columns.generation, columns.state).where(columns.tenant == row.tenant)
                ).one()
        except BaseException:
            self.ring.drop(row.tenant)
            raise
        if now.generation == row.generation:
            return True
        self.ring.drop(row.tenant)
        self._reconcile(row.tenant, now.generation, now.state)
        return False

    def _reconcile(self, tenant: str, generation: int, state: str) -> bool:
        """Drop and tell if the store is ahead of what Gateways know; returns whether it was."""
        known = self._told.get(tenant)
        if known is None or generation <= known:
            return False
        if state == LIVE:
            self._told[tenant] = generation
            self.ring.drop(tenant)
            self.listeners.tell(Event(Change.ROTATED, tenant))
        else:
            self.go_dark(tenant)
        return True


def check_seal(seal: WrappingKey, check: bytes, vault_id: bytes) -> None:
    """Raise SealError unless the seal key is this vault's."""
    from ..crypto import unwrap_key

    try:
        unwrap_key(seal, check, b"openkcm/v1/seal-check" + vault_id).wipe()
    except DecryptError:
        raise SealError(
            "the seal file belongs to another vault, or is damaged; put this vault's own seal file back"
        ) from None


def _of_tenant(held: ServiceKey, service: Service) -> ServiceKey:
    if held.service.tenant != service.tenant or held.service.region != service.region:
        raise _not_of_tenant(service)
    return held


def _not_of_tenant(service: Service) -> ServiceNotFound:
    return ServiceNotFound(
        f"the tenant {service.tenant} has no such service as {service.name}, or not any more"
    )


def _service_key_row(connection: Connection, service: Service, version: int | None) -> _FoundKey:
    tenants, services, keys = schema.tenants.c, schema.services.c, schema.service_keys.c
    active = connection.execute(
        sql.select(services.active_version)
        .join(schema.tenants, tenants.tenant == services.tenant)
        .where(
            services.service_id == service.service_id,
            services.tenant == service.tenant,
            tenants.region == service.region,
        )
    ).scalar()
    if active is None:
        raise _not_of_tenant(service)
    wanted = active if version is None else version
    found = connection.execute(
        sql.select(keys.state, keys.wrapped).where(
            keys.service_id == service.service_id, keys.version == wanted
        )
    ).first()
    if found is None:
        raise DecryptError  # an envelope that names a version which never was
    if found.state == KeyState.DESTROYED:
        raise KeyDestroyed(f"version {wanted} of the service key was destroyed")
    return _FoundKey(wanted, found.wrapped, wanted == active)
