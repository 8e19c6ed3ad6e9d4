# SPDX-License-Identifier: Apache-2.0
"""Store, seal key, roots and open keys of one process: everything that opens a key.

Invariant: a key is opened only for a tenant that the store calls live and whose root said yes just then. What was
overtaken does not stay open: a drop in this process moves the tenant's epoch, which was taken before the store was
read; and the store is read once more after a key was published, so that a change by another process is seen either
there or, the key being published, by ``Follower.poll``. No lock is held while a root is asked that another tenant
would wait for.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import sqlalchemy as sql
from sqlalchemy.engine import Connection

from ..clock import awake_clock, utc_now
from ..crypto import WrappingKey, unwrap_key
from ..errors import (
    AccessDenied,
    ConfigurationError,
    CoreUnavailable,
    DecryptError,
    KeyDestroyed,
    KeyDisabled,
    RootUnavailable,
    SealError,
    SecretMemoryError,
    StoreUnavailable,
    TenantDark,
)
from ..keys import Change, Event, Service, TenantState
from ..roots import Root, open_root
from . import audit, schema
from .follower import Follower
from .keyring import Keyring, ServiceKey
from .liveness import REFUSES, Liveness
from .opening import open_sealed_tenant_key, open_service_key, root_context
from .patience import patiently
from .refusals import Refusals
from .rows import LIVE, FoundKey, TenantRow, no_such_service, read_service_key, read_tenant, storable
from .seal import open_seal
from .store import Store
from .watcher import Listeners

OVERTAKEN: Final = "the tenant was changed by somebody else meanwhile, again and again; try again"

logger = logging.getLogger("openkcm")

_TRIES: Final = 8

PROBE_SECONDS: Final = 10.0
"""How often the root of each tenant in use is asked."""

GRACE_SECONDS: Final = 300.0
"""How long a root that does not answer is put up with."""


@dataclass(frozen=True, slots=True)
class OpenTenant:
    """A tenant as the store had it, and its open key; ``epoch`` tells whether it was dropped since."""

    row: TenantRow
    epoch: int
    key: WrappingKey


class Vault:
    """The Core's inside; one a process, safe for threads."""

    def __init__(
        self,
        store: Store,
        seal_path: Path,
        clock: Callable[[], float] = awake_clock,
        probe_interval: float = PROBE_SECONDS,
        grace: float = GRACE_SECONDS,
        store_grace: float = GRACE_SECONDS,
    ) -> None:
        self.store = store
        self.store_grace = store_grace
        self.region: str | None = None  # until the vault is there
        self.seal_path = seal_path
        self.listeners = Listeners()
        self.clock = clock
        self._probing = (probe_interval, grace)
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
        self.liveness = Liveness(self, *self._probing)
        self.follower = Follower(self)
        self._refusals = Refusals(self.store)

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
        self.liveness.close()
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
            self.check_open()
            seal = open_seal(self.seal_path)
            self._seal = seal
            if self._closed:  # meanwhile; whoever closed it did not see this one
                self._seal = None
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
                    row = read_tenant(connection, tenant)
                if self.follower.overtaken(row):
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
        asked = self.clock()
        key, sealed = self.open_through_root(row)
        self.liveness.opened(row, sealed, asked)
        if not self.ring.publish(row.tenant, epoch, row.generation, tenant_key=(row.key_version, key)):
            key.wipe()
            return None
        return OpenTenant(row, epoch, key) if self.follower.confirmed(row) else None

    def open_through_root(self, row: TenantRow) -> tuple[WrappingKey, bytes]:
        """Ask the root, now: the tenant key, and what the root unwrapped, which is sealed still.

        A refusal makes the tenant dark. It, and an outage, are remembered for a moment.
        """
        self.liveness.check_silent(row.tenant)
        try:
            sealed = patiently(self.ask_root, row)
            return open_sealed_tenant_key(
                self.seal(), sealed, row.tenant, row.region, row.key_version
            ), sealed
        except RootUnavailable as error:
            self.liveness.silent(row.tenant, error)
            raise
        except (KeyDisabled, KeyDestroyed, AccessDenied) as error:
            if row.state == LIVE:
                raise self.liveness.refused(row, error) from None
            told = f"the root of tenant {row.tenant} {REFUSES}"
            raise TenantDark(f"{told}: {error}", told=told) from None
        except SecretMemoryError:
            self.check_open()  # the seal key was wiped
            raise

    def ask_root(self, row: TenantRow) -> bytes:
        """Have the root unwrap the tenant key, once; what it gives back is sealed still.

        Raises:
            ConfigurationError: the tenant is another region's than this vault.
        """
        if row.region != self.region:
            raise ConfigurationError(
                f"the tenant {row.tenant} belongs to region {row.region} and this vault to {self.region}; a tenant is "
                "linked in each region by itself"
            )
        return self.root(row.root_uri).unwrap(
            row.wrapped, root_context(row.tenant, row.region, row.key_version)
        )

    def check_sealed(self, row: TenantRow, sealed: bytes) -> None:
        """Raise DecryptError unless this is the tenant's key, sealed by this vault."""
        open_sealed_tenant_key(self.seal(), sealed, row.tenant, row.region, row.key_version).wipe()

    def check_open(self) -> None:
        """Raise CoreUnavailable if the Core was closed."""
        if self._closed:
            raise CoreUnavailable("this Core was closed", retryable=False)

    def check_live(self, row: TenantRow) -> None:
        """Raise TenantDark unless the tenant may be used."""
        reason = self._dark.get(row.tenant)
        if row.state != LIVE or reason is not None:
            raise _killed(row.tenant, reason or row.reason)
        refusal = self.liveness.last_word(row.tenant)
        if refusal is not None:
            raise refusal

    def dark_here(self, tenant: str) -> str | None:
        """Why this process keeps a tenant dark that the store calls live, or None: a kill it could not record."""
        return self._dark.get(tenant)

    def active_key(self, service: Service) -> ServiceKey:
        """The service's active key, opened if need be; TenantDark if its root said no or is gone for too long."""
        self.liveness.check(service.tenant)
        held = self.ring.active(service.service_id)
        if held is None:
            return self._open_service_key(service, None)
        return _of_tenant(held, service)

    def lease(self, service: Service) -> float:
        """For how many seconds the service's data keys may be kept open; 0 if its keys are not open here.

        Raises:
            TenantDark: its root said no, or is gone for too long.
        """
        self.liveness.check(service.tenant)
        return self.ring.lease(service.service_id)

    def version_key(self, service: Service, version: int) -> ServiceKey:
        """A version of the service's key, opened if need be.

        Raises:
            DecryptError: there is no such version.
            KeyDestroyed: it was destroyed.
            ServiceNotFound: the tenant has no such service.
            TenantDark: its root said no, or is gone for too long.
        """
        self.liveness.check(service.tenant)
        held = self.ring.version(service.service_id, version)
        if held is None:
            return self._open_service_key(service, version)
        return _of_tenant(held, service)

    def _open_service_key(self, service: Service, version: int | None) -> ServiceKey:
        killed = self._dark.get(service.tenant)
        if killed is not None:  # which the store may not know, or not be there to say
            raise _killed(service.tenant, killed)
        seen = self._refusals.check(service.tenant)
        if not self.ring.is_open(service.tenant):
            self.liveness.check_silent(
                service.tenant
            )  # before the store is read: it may be asked for each record
        with self._lock_of(service.tenant):
            for _ in range(_TRIES):
                epoch = self.ring.epoch(service.tenant)
                with self.store.read() as connection:
                    row = self._read_user(connection, service.tenant, seen)
                    found = read_service_key(connection, service, version)
                if self.follower.overtaken(row):
                    continue
                parent = self._tenant_key(row, epoch)
                opened = self._open_under(parent, service, found) if parent is not None else None
                if opened is not None:
                    return opened
        raise StoreUnavailable(OVERTAKEN)

    def _read_user(self, connection: Connection, tenant: str, seen: int) -> TenantRow:
        """Read the tenant of a key's user, who will come again: that it is off is remembered."""
        try:
            row = read_tenant(connection, tenant)
        except KeyDestroyed as error:
            self._refusals.remember(tenant, seen, error)
            raise
        if row.state != LIVE:
            self._refusals.remember(tenant, seen, _killed(tenant, row.reason))
        return row

    def _open_under(self, parent: OpenTenant, service: Service, found: FoundKey) -> ServiceKey | None:
        row = parent.row
        try:
            key = open_service_key(
                parent.key, found.wrapped, row.tenant, row.region, service.service_id, found.version
            )
        except SecretMemoryError:
            if parent.key.wiped:  # dropped since; the caller looks again
                return None
            raise
        opened = ServiceKey(service, found.version, key, found.lease)
        if not self.ring.publish(
            row.tenant, parent.epoch, row.generation, service_key=opened, active=found.active
        ):
            key.wipe()
            return None
        return opened if self.follower.confirmed(row) else None

    def _lock_of(self, tenant: str) -> threading.RLock:
        return self._opening.setdefault(tenant, threading.RLock())

    # ---- what closes ---------------------------------------------------------------------------------

    def go_dark(self, tenant: str, *, killed: str | None = None) -> None:
        """Zero the tenant's keys, then tell the Gateways.

        ``killed`` keeps the tenant dark whatever the store says, until ``settle_dark`` or ``go_live``.
        """
        if killed is not None:
            self._dark[tenant] = killed
        self.liveness.forget(tenant)
        self.zero(tenant)

    def zero(self, tenant: str) -> None:
        """Zero the tenant's keys, then tell the Gateways."""
        self._drop(tenant)
        self.listeners.tell(Event(Change.DARK, tenant))

    def zero_again(self, tenant: str) -> None:
        """Zero what was opened since the tenant went dark, if anything was; Gateways hear of it only then."""
        if self._drop(tenant):
            self.listeners.tell(Event(Change.DARK, tenant))

    def _drop(self, tenant: str) -> bool:
        # In this order: who opens between the two is dropped, and no open key goes unwatched.
        self.follower.forget(tenant)
        return self.ring.drop(tenant)

    def settle_dark(self, tenant: str) -> None:
        """From here on the store, which has recorded it, says that the tenant is dark; and may say otherwise later."""
        # Once more: a thread that read the store before it was recorded has taken its epoch before this, and a
        # restore that was overtaken may have called the tenant live since.
        self.zero_again(tenant)
        self._dark.pop(tenant, None)

    def go_live(self, tenant: str) -> None:
        """Forget that the tenant was dark, and tell the Gateways."""
        self._dark.pop(tenant, None)
        self.liveness.forget(tenant)
        self.tell_live(tenant)

    def tell_live(self, tenant: str) -> None:
        """Tell the Gateways that a dark tenant may be used again."""
        self.listeners.tell(Event(Change.LIVE, tenant))

    def record_liveness(self, tenant: str, state: TenantState, reason: str) -> None:
        """Write what a root said into the vault and its audit record, if it is news; others then look too."""
        columns, reason = schema.tenants.c, storable(reason)
        with self.store.write() as connection:
            before = connection.execute(
                sql.select(columns.liveness).where(columns.tenant == tenant, columns.state == LIVE)
            ).scalar()
            if before is None or before == state:
                return
            # To and from dark only: in grace the keys of other processes stay good.
            step = 1 if TenantState.DARK in (state, before) else 0
            connection.execute(
                schema.tenants.update()
                .where(columns.tenant == tenant)
                .values(liveness=state, liveness_reason=reason, generation=columns.generation + step)
            )
            with audit.acting(""):  # it is the root's doing, whoever had it asked
                audit.append(connection, utc_now(), f"root-{state}", tenant, detail=reason)

    def changed(self, tenant: str, generation: int, *, keep: bool = False) -> None:
        """Take note of an act of this process, of which Gateways need not hear as of another's; drops open keys."""
        if not keep:
            self.ring.drop(tenant)
            self.liveness.forget(tenant)  # it may be another root's tenant now
        self.follower.changed(tenant, generation)


def seal_check_aad(vault_id: bytes, region: str | None) -> bytes:
    """What the vault's seal check is bound to; without a region in vaults of before it was."""
    if region is None:
        return b"openkcm/v1/seal-check" + vault_id
    return b"openkcm/v2/seal-check" + vault_id + region.encode()


def check_seal(seal: WrappingKey, check: bytes, vault_id: bytes, region: str) -> None:
    """Raise SealError unless the seal key is this vault's, and the vault is this region's."""
    # A vault of before binds each tenant's keys to its region, but not yet its own name for it.
    for bound in (region, None):
        with contextlib.suppress(DecryptError):
            unwrap_key(seal, check, seal_check_aad(vault_id, bound)).wipe()
            return
    raise SealError(
        "the seal file belongs to another vault, or is damaged, or the vault was given another region; put this "
        "vault's own seal file back"
    )


def _killed(tenant: str, why: str) -> TenantDark:
    told = f"the tenant {tenant} was killed"
    return TenantDark(
        f"{told}{f' ({why})' if why else ''}; 'openkcm tenant restore' brings it back", told=told
    )


def _of_tenant(held: ServiceKey, service: Service) -> ServiceKey:
    if held.service.tenant != service.tenant or held.service.region != service.region:
        raise no_such_service(service)
    return held
