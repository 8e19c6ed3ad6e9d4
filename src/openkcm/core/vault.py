# SPDX-License-Identifier: Apache-2.0
"""Store, seal key, roots and open keys of one process: everything that opens a key.

Invariant: a key is opened only for a tenant that the store calls live and whose root said yes just then; what
a kill, an unlink or another process's change overtook is never published. No lock is held while a root is asked
that another tenant would wait for.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sql
from sqlalchemy.engine import Connection

from ..crypto import WrappingKey
from ..errors import (
    AccessDenied,
    DecryptError,
    KeyDestroyed,
    KeyDisabled,
    OpenKCMError,
    SealError,
    ServiceNotFound,
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


class Vault:
    """The Core's inside; one a process, safe for threads."""

    def __init__(self, store: Store, seal_path: Path) -> None:
        self.store = store
        self.seal_path = seal_path
        self.listeners = Listeners()
        self._reset()

    def _reset(self) -> None:
        self.ring = Keyring()
        self._seal: WrappingKey | None = None
        self._roots: dict[str, Root] = {}
        self._roots_lock = threading.Lock()
        self._opening: dict[str, threading.RLock] = defaultdict(threading.RLock)
        self._dark: dict[str, str] = {}
        self._refusals: dict[str, tuple[float, OpenKCMError]] = {}
        self._seen: int | None = None
        self.polled = time.monotonic()

    def forget(self) -> None:
        """Start anew in a forked child: nothing secret is inherited, and the parent's sessions are left alone."""
        self._inherited = (self._roots, self.ring, self._seal)
        self.store.forget()
        self._reset()
        self.listeners.after_fork()

    def close(self) -> None:
        """Zero every key and close everything."""
        self.ring.drop_all()
        if self._seal is not None:
            self._seal.wipe()
            self._seal = None
        with self._roots_lock:
            roots, self._roots = list(self._roots.values()), {}
        for root in roots:
            root.close()
        self.store.close()

    # ---- what opens ----------------------------------------------------------------------------------

    def seal(self) -> WrappingKey:
        """The seal key, read on first use in each process."""
        if self._seal is None:
            self._seal = open_seal(self.seal_path)
        return self._seal

    def root(self, uri: str, *, create: bool = False) -> Root:
        """A root by its URI; its session is kept."""
        with self._roots_lock:
            if uri not in self._roots:
                root = open_root(uri, create=create)
                # The URI as the root spells it (a relative path made absolute) finds the same session.
                self._roots.setdefault(root.uri, root)
                self._roots[uri] = self._roots[root.uri]
            return self._roots[uri]

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

    def tenant_key(self, row: TenantRow) -> WrappingKey:
        """The tenant's active key, opened through its root if it is not open.

        Raises:
            TenantDark: killed, or the root says no.
            RootUnavailable: the root does not answer, and the key was not open.
        """
        with self._opening[row.tenant]:
            epoch = self.ring.epoch(row.tenant)
            self.check_live(row)
            held = self.ring.tenant_key(row.tenant, row.key_version)
            if held is not None:
                return held
            key = self.open_through_root(row)
            if not self.ring.publish(row.tenant, epoch, row.generation, tenant_key=(row.key_version, key)):
                key.wipe()
                raise TenantDark(f"the tenant {row.tenant} went dark while its key was being opened")
            self._refusals.pop(row.tenant, None)
            return key

    def open_through_root(self, row: TenantRow) -> WrappingKey:
        """Ask the root, now; a refusal makes the tenant dark and is remembered for a second."""
        try:
            root = self.root(row.root_uri)
            return open_tenant_key(root, self.seal(), row.wrapped, row.tenant, row.region, row.key_version)
        except (KeyDisabled, KeyDestroyed, AccessDenied) as error:
            dark = TenantDark(f"the root of tenant {row.tenant} refuses: {error}")
            self._refusals[row.tenant] = (time.monotonic() + REFUSAL_SECONDS, dark)
            self.go_dark(row.tenant)
            raise dark from None

    def check_live(self, row: TenantRow) -> None:
        """Raise TenantDark unless the tenant may be used."""
        reason = self._dark.get(row.tenant)
        if row.state != LIVE or reason is not None:
            why = reason or row.reason
            raise TenantDark(
                f"the tenant {row.tenant} was killed{f' ({why})' if why else ''}; "
                "'openkcm tenant restore' brings it back"
            )
        refusal = self._refusals.get(row.tenant)
        if refusal is not None and time.monotonic() < refusal[0]:
            raise TenantDark(str(refusal[1]))

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
        """
        held = self.ring.version(service.service_id, version)
        if held is None:
            return self._open_service_key(service, version)
        return _of_tenant(held, service)

    def _open_service_key(self, service: Service, version: int | None) -> ServiceKey:
        with self._opening[service.tenant]:
            with self.store.read() as connection:
                row = self.tenant_row(connection, service.tenant)
                found = _service_key_row(connection, service, version)
            epoch = self.ring.epoch(service.tenant)
            tenant_key = self.tenant_key(row)
            key = open_service_key(
                tenant_key, found.wrapped, row.tenant, row.region, service.service_id, found.version
            )
            opened = ServiceKey(service, found.version, key)
            active = opened if found.version == found.active_version else None
            if not self.ring.publish(row.tenant, epoch, row.generation, service_keys=[opened], active=active):
                key.wipe()
                raise TenantDark(f"the tenant {row.tenant} went dark while its key was being opened")
            return opened

    # ---- what closes ---------------------------------------------------------------------------------

    def go_dark(self, tenant: str, *, killed: str | None = None) -> None:
        """Zero the tenant's keys, then tell the Gateways; ``killed`` keeps it dark until ``go_live``."""
        if killed is not None:
            self._dark[tenant] = killed
        self.ring.drop(tenant)
        self.listeners.tell(Event(Change.DARK, tenant))

    def go_live(self, tenant: str) -> None:
        """Forget that the tenant was dark, and tell the Gateways."""
        self._dark.pop(tenant, None)
        self._refusals.pop(tenant, None)
        self.listeners.tell(Event(Change.LIVE, tenant))

    def poll(self) -> None:
        """Act on what other processes changed: drop the keys of every tenant whose generation moved."""
        self.polled = time.monotonic()
        seen = self.store.data_version()
        if seen == self._seen:
            return
        opened = self.ring.generations()
        columns = schema.tenants.c
        with self.store.read() as connection:
            rows = connection.execute(
                sql.select(columns.tenant, columns.generation, columns.state).where(
                    columns.tenant.in_(opened)
                )
            ).all()
        now = {row.tenant: row for row in rows}
        for tenant, generation in opened.items():
            row = now.get(tenant)
            if row is not None and row.generation == generation:
                continue
            self.ring.drop(tenant)
            dark = row is None or row.state != LIVE
            self.listeners.tell(Event(Change.DARK if dark else Change.ROTATED, tenant))
        # Only now: a look that failed half-way is made again.
        self._seen = seen


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
        raise ServiceNotFound("the service is not one of this tenant")
    return held


def _service_key_row(
    connection: Connection, service: Service, version: int | None
) -> sql.Row[Any, Any, Any, Any]:
    services, keys = schema.services.c, schema.service_keys.c
    wanted = services.active_version if version is None else version
    found = connection.execute(
        sql.select(keys.version, keys.state, keys.wrapped, services.active_version)
        .join(schema.services, services.service_id == keys.service_id)
        .where(
            services.service_id == service.service_id,
            services.tenant == service.tenant,
            keys.version == wanted,
        )
    ).first()
    if found is None:
        if version is not None:
            raise DecryptError  # an envelope that names a version which never was
        raise ServiceNotFound(f"the tenant {service.tenant} has no service {service.name} any more")
    if found.state == KeyState.DESTROYED:
        raise KeyDestroyed(f"version {found.version} of the service key was destroyed")
    return found
