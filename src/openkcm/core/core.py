# SPDX-License-Identifier: Apache-2.0
"""The Core: holds tenant and service keys, and is the only part that opens a wrapped key.

Invariant: every act of key management is recorded in the transaction that carries it out; a kill zeroes first
and is acknowledged last; what a Gateway gets are data keys in secret memory and packed wrapped keys.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final

from ..alive import Alive
from ..clock import awake_clock, utc_now
from ..crypto import SecretKeys
from ..errors import (
    ConfigurationError,
    InvalidInput,
    OpenKCMError,
    StoreUnavailable,
)
from ..keys import Change, Event, Kind, OpenedKeys, Service, TenantState, WrappedKeys, check_name
from . import audit, history, services, tenants, tombstones
from .access import Access
from .data_keys import DataKeys
from .liveness import MAX_GRACE, Probe
from .setup import initialise, open_existing
from .status import ServiceStatus, TenantStatus
from .store import open_store
from .tree import read_tree
from .vault import GRACE_SECONDS, PROBE_SECONDS, Vault
from .watcher import Repeater

POLL_SECONDS: Final = 0.25
"""How often a Core looks whether another process killed or changed a tenant."""

MIN_PROBE: Final = 0.1
MAX_PROBE: Final = 3600.0
SHORTEST_NAP: Final = 0.05
LONGEST_NAP: Final = 0.2
"""How often the prober looks for probes that are due, in seconds: seldom enough to find many at a time where there are
many, and sooner than the slack that a probe has."""

DEFAULT_URL: Final = "sqlite:///vault.db"


class Core(Access):
    """An embedded Core: a vault in a database, its seal key in a file.

    Make one with ``Core.open``. It is safe for threads; after ``fork`` the child's Core reopens keys through
    the roots. Use it as a context manager, or ``close`` it.
    """

    far: Final = False
    """See ``keys.KeyService``: its calls cross no network."""

    def __init__(self, vault: Vault, region: str, poll_interval: float) -> None:
        super().__init__(vault, poll_interval)
        self._region = region
        self._vault_id = b""
        self._repeaters: list[Repeater[Core]] = []
        self._starting = threading.Lock()
        self._know_data_keys()
        vault.store.on_news(_waker(self))
        _instances.add(self)

    @classmethod
    def open(
        cls,
        url: str = DEFAULT_URL,
        *,
        seal: str | os.PathLike[str] | None = None,
        region: str | None = None,
        poll_interval: float = POLL_SECONDS,
        probe_interval: float = PROBE_SECONDS,
        grace: float = GRACE_SECONDS,
        store_grace: float = GRACE_SECONDS,
        create: bool | None = None,
        clock: Callable[[], float] = awake_clock,
    ) -> Core:
        """Open a vault.

        Args:
            url: the store: ``sqlite:///PATH``, or ``postgresql://USER:PASSWORD@HOST:PORT/DATABASE`` with libpq's
                parameters (``sslmode=verify-full&sslrootcert=PATH``); ``listen=off`` does without LISTEN.
            seal: the seal file; for a SQLite store by default ``vault.seal`` beside ``vault.db``.
            region: the region of a new vault ("local" if not given); for an existing one, what it must be.
            poll_interval: seconds between looks at what other processes changed.
            probe_interval: seconds between two questions to the root of a tenant in use, 0.1 to 3600; a root that
                says no is noticed so much later at most, and one second.
            grace: seconds for which a root that does not answer is put up with, 0 to 3600.
            store_grace: seconds for which open keys are used while a database server does not answer, from four poll
                intervals to 3600: what others changed, a kill among it, is not seen in that time.
            create: whether to make a vault where there is none; by default only where the store is a file.
            clock: seconds that only ever grow; another one than the machine's is for tests.

        Raises:
            SealError: the seal file is missing, unsafe, or another vault's.
            StoreUnavailable: the database cannot be used.
            ConfigurationError: there is no vault, or it is another region's; or a server's vault has no ``seal``.
            InvalidInput: the URL is not one of a store, or a number of seconds is out of its range.
        """
        _check_seconds(poll_interval, probe_interval, grace, store_grace)
        store = open_store(url, poll_interval=poll_interval)
        if not store.implicit and store_grace < 4 * poll_interval:
            raise InvalidInput(
                "store_grace is at least four poll_intervals, so that none is taken for an outage"
            )
        seal_path = Path(seal) if seal is not None else store.default_seal
        if seal_path is None:
            raise ConfigurationError(
                f"name the seal file of the vault in {store.place} (seal=PATH, OPENKCM_SEAL)"
            )
        vault = Vault(store, seal_path, clock, probe_interval, grace, store_grace)
        try:
            return cls(vault, _unlock(vault, region, create), poll_interval)
        except BaseException:
            vault.close()
            raise

    def close(self) -> None:
        """Zero every key and close the store. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for repeater in self._repeaters:
            repeater.stop()
        self._stop_access()
        self._vault.close()

    def __enter__(self) -> Core:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Core {self._vault.store.place} region={self._region}{' closed' if self._closed else ''}>"

    # ---- what it is ----------------------------------------------------------------------------------

    @property
    def region(self) -> str:
        """The one region that this Core serves."""
        return self._region

    @property
    def seal_path(self) -> Path:
        """The seal file. Losing it loses everything."""
        return self._vault.seal_path

    @property
    def default_key_store(self) -> Path | None:
        """Where an embedded Gateway keeps its named data keys; None where the store is no file."""
        return self._vault.store.default_key_store

    # ---- key management ------------------------------------------------------------------------------

    def link_tenant(self, tenant: str, root: str) -> None:
        """Link a tenant to its root key and make its tenant key.

        The root is asked to wrap and to unwrap before anything is stored.

        Args:
            tenant: a name of 1 to 128 characters of ``A-Z a-z 0-9 . _ -``.
            root: a root URI. ``local:PATH`` makes the file if there is none.

        Raises:
            AlreadyExists: the tenant is linked.
            RootMisconfigured, RootDenied, RootDisabled, RootDestroyed, RootUnavailable: the root's answer.
        """
        self._check_open()
        tenants.link_tenant(self._vault, check_name(tenant, "tenant"), root, self._region, utc_now())

    def create_service(self, tenant: str, name: str) -> Service:
        """Make a service of a tenant, with version 1 of its key.

        Raises:
            AlreadyExists: the tenant has a service of that name.
            TenantNotFound, TenantDark, RootUnavailable.
        """
        self._look()
        return services.create_service(
            self._vault, check_name(tenant, "tenant"), check_name(name, "service"), utc_now()
        )

    def rotate_service(self, tenant: str, name: str) -> int:
        """Make a new version of a service key active; older versions only unwrap. Returns the new version."""
        self._look()
        service = self.find_service(tenant, name)
        version = services.rotate_service(self._vault, service, utc_now())
        self._vault.listeners.tell(Event(Change.ROTATED, tenant, service.service_id))
        return version

    def set_lease(self, tenant: str, name: str, seconds: float) -> None:
        """Let Gateways keep a service's data keys open for so long after each was opened; 0 takes it back.

        A lease spares a Core call for a key that is used again and again. It is counted from the opening and never
        extended, and a kill, or a root's no, ends it at once. What it costs: a key that another process shreds can
        be used to its lease's end.

        Args:
            seconds: 0 to 3600.

        Raises:
            InvalidInput: another number of seconds.
            TenantNotFound, ServiceNotFound, KeyDestroyed: there is no such service.
        """
        self._look()
        services.set_lease(self._vault, self.find_service(tenant, name), seconds, utc_now())
        self._vault.listeners.tell(Event(Change.ROTATED, tenant))

    def rotate_tenant(self, tenant: str) -> int:
        """Make a new tenant key, rewrap every service key under it, destroy the old. Returns the new version."""
        self._look()
        return tenants.rotate_tenant(self._vault, check_name(tenant, "tenant"), utc_now())

    def replace_root(self, tenant: str, root: str) -> None:
        """Move the tenant key under another root, of any provider; nothing below it changes."""
        self._look()
        tenants.replace_root(self._vault, check_name(tenant, "tenant"), root, utc_now())

    def kill(self, tenant: str, reason: str = "") -> None:
        """Switch a tenant off until ``restore``: its keys are zeroed first, then Gateways told, then it is recorded.

        If the store cannot record it, the tenant is dark in this process all the same and the error is raised.
        """
        self._check_open()
        tenants.kill(self._vault, check_name(tenant, "tenant"), reason, utc_now())

    def restore(self, tenant: str) -> None:
        """Bring a killed tenant back; its root must open its tenant key now.

        Raises:
            TenantDark: the root refuses.
            RootUnavailable: the root does not answer.
        """
        self._check_open()
        tenants.restore(self._vault, check_name(tenant, "tenant"), utc_now())

    def unlink(self, tenant: str) -> None:
        """Destroy a tenant's keys for good: its data can never be read again from this vault."""
        self._check_open()
        tenants.unlink(self._vault, check_name(tenant, "tenant"), utc_now())

    def list_tenants(self) -> list[TenantStatus]:
        """Every linked tenant with its services, sorted by name."""
        return self.status()

    def list_services(self, tenant: str) -> tuple[ServiceStatus, ...]:
        """A tenant's services, sorted by name."""
        return self.status(tenant)[0].services

    def status(self, tenant: str | None = None) -> list[TenantStatus]:
        """The tree of keys and their states, of one tenant or all.

        Raises:
            TenantNotFound: no such tenant.
        """
        self._check_open()
        return read_tree(self._vault, None if tenant is None else check_name(tenant, "tenant"))

    def audit_records(self, after: int = 0, most: int | None = None) -> list[audit.AuditRecord]:
        """Every act of key management, oldest first; or ``most`` of them at the most, behind number ``after``."""
        self._check_open()
        with self._vault.store.read() as connection:
            return audit.records(connection, after, most)

    def verify_audit(self) -> int | None:
        """Check the audit chain; returns the number of the first record that does not fit, or None."""
        self._check_open()
        with self._vault.store.read() as connection:
            return audit.verify(connection)

    # ---- roots ---------------------------------------------------------------------------------------

    def probe(self, tenant: str) -> Probe:
        """Ask a tenant's root now, with the bytes of its tenant key; what it says counts as in any probe.

        Raises:
            TenantNotFound, KeyDestroyed: there is no such tenant.
            TenantDark: an operator killed it; its root is not asked.
        """
        self._check_open()
        return tenants.probe(self._vault, check_name(tenant, "tenant"))

    def last_probe(self, tenant: str) -> Probe | None:
        """What the last probe of a tenant found; None if none of its keys was used in this process."""
        self._check_open()
        return self._vault.liveness.state_of(check_name(tenant, "tenant"))

    def root_changed(self, uri: str) -> dict[str, Probe]:
        """Ask, now, the root of every tenant that is linked to ``uri``: the push door for a provider's events.

        Returns what each tenant's root said. Other processes on the vault follow within their poll interval.
        """
        self._check_open()
        return tenants.probe_under(self._vault, str(uri))

    def liveness(self) -> dict[str, int]:
        """Counters since this process opened the vault: ``probes`` asked, changes to ``live``, ``grace``, ``dark``."""
        counts = self._vault.liveness.counts
        return {name: counts[name] for name in ("probes", *TenantState)}

    # ---- what a Gateway needs (keys.KeyService) ------------------------------------------------------

    def find_service(self, tenant: str, name: str) -> Service:
        """Look a service up; raises TenantNotFound, ServiceNotFound or KeyDestroyed."""
        self._check_open()
        return services.find_service(self._vault, check_name(tenant, "tenant"), check_name(name, "service"))

    def wrap_keys(self, service: Service, keys: SecretKeys, kind: Kind, ids: bytes = b"") -> WrappedKeys:
        """Wrap data keys under the service's active key.

        Args:
            keys: at most ``limits.MAX_KEYS_PER_CALL``.
            ids: n x 16 bytes for stored kinds, else nothing.

        Raises:
            TenantDark, RootUnavailable: the service's key may not, or cannot, be used.
            ServiceNotFound, TenantNotFound, KeyDestroyed: there is none, or none any more.
            DecryptError: the service's own key was altered in the store.
        """
        self._look()
        return self._data_keys.wrap(service, keys, kind, ids)

    def unwrap_keys(self, service: Service, wrapped: WrappedKeys) -> OpenedKeys:
        """Open wrapped data keys: the keys, the error of each position that did not open, and the open-lease.

        The lease is for how many seconds, from before the call, the keys may be kept open; 0 is strict.

        Raises:
            LimitExceeded: more than ``limits.MAX_KEYS_PER_CALL`` keys.
            TenantDark, RootUnavailable, ServiceNotFound, TenantNotFound: nothing was tried.
        """
        self._look()
        return self._data_keys.unwrap(service, wrapped)

    def rewrap_keys(
        self, service: Service, wrapped: WrappedKeys
    ) -> tuple[WrappedKeys, Mapping[int, OpenKCMError]]:
        """Move wrapped data keys under the active service key.

        Positions that did not open are zeros, and the mapping has the error of each. Raises as ``unwrap_keys``.
        """
        self._look()
        return self._data_keys.rewrap(service, wrapped)

    def lease(self, service: Service) -> float:
        """For how many seconds, from its opening, a data key that is kept may be used now; 0 for no longer.

        Raises:
            TenantDark: no key of the tenant may be used, kept ones included.
        """
        self._look()
        return self._vault.lease(service)

    def shred_keys(self, service: Service, ids: bytes) -> None:
        """Record data keys as destroyed, for good, only random ids are kept; LimitExceeded as ``unwrap_keys``."""
        self._check_open()
        tombstones.add(self._vault, service, ids, utc_now())
        key_ids = tuple(tombstones.split_ids(ids))
        self._vault.listeners.tell(Event(Change.SHREDDED, service.tenant, service.service_id, key_ids))

    def shredded(self, service: Service, ids: bytes) -> frozenset[bytes]:
        """Those of the ids that were shredded; LimitExceeded as ``unwrap_keys``."""
        self._check_open()
        return self._tombstones.shredded(service, ids)

    def watch(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Call ``listener`` on every change, keys being zeroed already, until the returned function is called."""
        self._look()
        return self._vault.listeners.add(listener)

    # ---- what a service around it needs (openkcm.rpc) ------------------------------------------------

    @property
    def vault_id(self) -> bytes:
        """The 16 random bytes that this vault was given when it was made; every replica of it has the same."""
        if not self._vault_id:
            self._check_open()
            with self._vault.store.read() as connection:
                self._vault_id = history.vault_id(connection)
        return self._vault_id

    def position(self) -> int:
        """The number of the last audit record that this process has acted on."""
        self._look()
        return self._vault.follower.number

    def changes_after(self, position: int, *, shreds: bool = True) -> list[Event] | None:
        """The events that stand for all changes after a position; None if they are too many to tell."""
        self._check_open()
        return history.changes_after(self._vault.store, position, shreds=shreds)

    def note(self, act: str, detail: str) -> None:
        """Write a line of the service's own into the audit record."""
        self._check_open()
        with self._vault.store.write() as connection:
            audit.append(connection, utc_now(), act, detail=detail[:1024])

    # ---- inside --------------------------------------------------------------------------------------

    def poll(self) -> None:
        """Look now at what other processes changed."""
        if not self._closed:
            self._vault.store.look()
            self._vault.follower.poll()

    def _look(self) -> None:
        """Before keys are used: make sure that changes by other processes are seen in time."""
        self._check_open()
        if not self._repeaters:
            with self._starting:
                if not self._repeaters:
                    self._repeaters = [
                        Repeater(self, "openkcm-watcher", _watch, self._interval),
                        Repeater(self, "openkcm-prober", _probe, SHORTEST_NAP),
                    ]
        # The thread may be starved; a use after twice its interval looks for itself.
        if self._vault.clock() - self._vault.follower.polled > 2 * self._interval:
            # Open keys outlive an outage of the store; the watcher logs it.
            with contextlib.suppress(StoreUnavailable):
                self._vault.follower.poll()

    def _after_fork(self) -> None:
        self._vault.forget()
        self._repeaters = []
        self._starting = threading.Lock()
        self._know_data_keys()
        self._forget_access()

    def _know_data_keys(self) -> None:
        self._tombstones = tombstones.Tombstones(self._vault.store)
        self._data_keys = DataKeys(self._vault, self._tombstones)


def _check_seconds(poll_interval: float, probe_interval: float, grace: float, store_grace: float) -> None:
    if not poll_interval > 0:
        raise InvalidInput("poll_interval is a number of seconds above zero")
    if not MIN_PROBE <= probe_interval <= MAX_PROBE:
        raise InvalidInput("probe_interval is 0.1 to 3600 seconds")
    if not (0 <= grace <= MAX_GRACE and 0 <= store_grace <= MAX_GRACE):
        raise InvalidInput("grace and store_grace are 0 to 3600 seconds")


def _unlock(vault: Vault, region: str | None, create: bool | None) -> str:
    """Check the vault, or make it where there is none; returns its region."""
    store = vault.store
    if not store.exists():
        if not (store.implicit if create is None else create):
            raise ConfigurationError(
                f"there is no vault in {store.place}; 'openkcm init' makes one, or Core.open(create=True)"
            )
        initialise(vault, check_name(region or "local", "region"), utc_now())
    vault.region = open_existing(vault, region, utc_now())
    return vault.region


def _watch(core: Core) -> float:
    if not core._closed:
        core._vault.follower.poll()
        core._tombstones.refresh()
    return core._interval


def _waker(core: Core) -> Callable[[], None]:
    """Has the watcher look at once; does not keep the Core alive."""
    reference = weakref.ref(core)

    def wake() -> None:
        held = reference()
        for repeater in held._repeaters[:1] if held is not None else ():
            repeater.wake()

    return wake


def _probe(core: Core) -> float:
    return min(max(core._vault.liveness.run_due(), SHORTEST_NAP), LONGEST_NAP)


_instances: Final[Alive[Core]] = Alive()


def _after_fork_in_child() -> None:
    for core in _instances.all():
        core._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
