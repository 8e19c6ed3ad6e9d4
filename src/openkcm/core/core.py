# SPDX-License-Identifier: Apache-2.0
"""The Core: holds tenant and service keys, and is the only part that opens a wrapped key.

Invariant: every act of key management is recorded in the transaction that carries it out; a kill zeroes first
and is acknowledged last; what a Gateway gets are data keys in secret memory and packed wrapped keys.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Final, TypeVar

from .. import crypto
from ..crypto import SecretKeys
from ..errors import (
    CoreUnavailable,
    DecryptError,
    InvalidInput,
    KeyDestroyed,
    LimitExceeded,
    OpenKCMError,
    SecretMemoryError,
    StoreUnavailable,
)
from ..keys import Change, Event, Kind, Service, WrappedKeys, check_name
from ..limits import KEY_ID_BYTES, MAX_KEYS_PER_CALL, WRAPPED_KEY_BYTES
from . import audit, lifecycle, tombstones
from .keyring import ServiceKey
from .setup import initialise, open_existing
from .status import ServiceStatus, TenantStatus
from .store import Store, default_key_store
from .tree import read_tree
from .vault import OVERTAKEN, Vault
from .watcher import Watcher

POLL_SECONDS: Final = 0.25
"""How often a Core looks whether another process killed or changed a tenant."""

DEFAULT_URL: Final = "sqlite:///vault.db"

T = TypeVar("T")

_TRIES: Final = 8


class Core:
    """An embedded Core: a vault in a database file, its seal key beside it.

    Make one with ``Core.open``. It is safe for threads; after ``fork`` the child's Core reopens keys through
    the roots. Use it as a context manager, or ``close`` it.
    """

    def __init__(self, vault: Vault, region: str, poll_interval: float) -> None:
        self._vault = vault
        self._region = region
        self._interval = poll_interval
        self._closed = False
        self._watcher: Watcher | None = None
        self._starting = threading.Lock()
        self._tombstones = tombstones.Tombstones(vault.store)
        _instances.add(self)

    @classmethod
    def open(
        cls,
        url: str = DEFAULT_URL,
        *,
        seal: str | os.PathLike[str] | None = None,
        region: str | None = None,
        poll_interval: float = POLL_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> Core:
        """Open a vault, making it where there is none.

        Args:
            url: the store, ``sqlite:///PATH``.
            seal: the seal file; by default ``vault.seal`` beside ``vault.db``.
            region: the region of a new vault ("local" if not given); for an existing one, what it must be.
            poll_interval: seconds between looks at what other processes changed.
            clock: seconds that only ever grow; another one than the machine's is for tests.

        Raises:
            SealError: the seal file is missing, unsafe, or another vault's.
            StoreUnavailable: the database cannot be used.
            InvalidInput: the URL is not one of a SQLite file, or the poll interval is not above zero.
        """
        if not poll_interval > 0:
            raise InvalidInput("poll_interval is a number of seconds above zero")
        store = Store(url)
        vault = Vault(store, Path(seal) if seal is not None else store.path.with_suffix(".seal"), clock)
        try:
            if not store.exists():
                initialise(vault, check_name(region or "local", "region"), utc_now())
            return cls(vault, open_existing(vault, region, utc_now()), poll_interval)
        except BaseException:
            vault.close()
            raise

    def close(self) -> None:
        """Zero every key and close the store. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._watcher is not None:
            self._watcher.stop()
        self._vault.close()

    def __enter__(self) -> Core:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Core {self._vault.store.path} region={self._region}{' closed' if self._closed else ''}>"

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
    def seal_source(self) -> str:
        """Where the seal key comes from, in words for an operator."""
        return f"file {self._vault.seal_path}"

    @property
    def default_key_store(self) -> Path:
        """Where an embedded Gateway keeps its named data keys."""
        return default_key_store(self._vault.store.path)

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
        lifecycle.link_tenant(self._vault, check_name(tenant, "tenant"), root, self._region, utc_now())

    def create_service(self, tenant: str, name: str) -> Service:
        """Make a service of a tenant, with version 1 of its key.

        Raises:
            AlreadyExists: the tenant has a service of that name.
            TenantNotFound, TenantDark, RootUnavailable.
        """
        self._look()
        return lifecycle.create_service(
            self._vault, check_name(tenant, "tenant"), check_name(name, "service"), utc_now()
        )

    def rotate_service(self, tenant: str, name: str) -> int:
        """Make a new version of a service key active; older versions only unwrap. Returns the new version."""
        self._look()
        service = self.find_service(tenant, name)
        version = lifecycle.rotate_service(self._vault, service, utc_now())
        self._vault.listeners.tell(Event(Change.ROTATED, tenant, service.service_id))
        return version

    def rotate_tenant(self, tenant: str) -> int:
        """Make a new tenant key, rewrap every service key under it, destroy the old. Returns the new version."""
        self._look()
        return lifecycle.rotate_tenant(self._vault, check_name(tenant, "tenant"), utc_now())

    def replace_root(self, tenant: str, root: str) -> None:
        """Move the tenant key under another root, of any provider; nothing below it changes."""
        self._look()
        lifecycle.replace_root(self._vault, check_name(tenant, "tenant"), root, utc_now())

    def kill(self, tenant: str, reason: str = "") -> None:
        """Switch a tenant off until ``restore``: its keys are zeroed first, then Gateways told, then it is recorded.

        If the store cannot record it, the tenant is dark in this process all the same and the error is raised.
        """
        self._check_open()
        lifecycle.kill(self._vault, check_name(tenant, "tenant"), reason, utc_now())

    def restore(self, tenant: str) -> None:
        """Bring a killed tenant back; its root must open its tenant key now.

        Raises:
            TenantDark: the root refuses.
            RootUnavailable: the root does not answer.
        """
        self._check_open()
        lifecycle.restore(self._vault, check_name(tenant, "tenant"), utc_now())

    def unlink(self, tenant: str) -> None:
        """Destroy a tenant's keys for good: its data can never be read again from this vault."""
        self._check_open()
        lifecycle.unlink(self._vault, check_name(tenant, "tenant"), utc_now())

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

    def audit_records(self) -> list[audit.AuditRecord]:
        """Every act of key management, oldest first."""
        self._check_open()
        with self._vault.store.read() as connection:
            return audit.records(connection)

    def verify_audit(self) -> int | None:
        """Check the audit chain; returns the number of the first record that does not fit, or None."""
        self._check_open()
        with self._vault.store.read() as connection:
            return audit.verify(connection)

    # ---- what a Gateway needs (keys.KeyService) ------------------------------------------------------

    def find_service(self, tenant: str, name: str) -> Service:
        """Look a service up; raises TenantNotFound, ServiceNotFound or KeyDestroyed."""
        self._check_open()
        return lifecycle.find_service(self._vault, check_name(tenant, "tenant"), check_name(name, "service"))

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
        if type(kind) is not Kind:
            raise InvalidInput(f"a kind is an openkcm.Kind, not {type(kind).__name__}")

        def wrap(held: ServiceKey) -> WrappedKeys:
            wrapped = crypto.wrap_many(held.key, keys, held.aad[kind], ids)
            return WrappedKeys(kind, held.version, wrapped, ids)

        return self._with_key(service, None, wrap)

    def unwrap_keys(
        self, service: Service, wrapped: WrappedKeys
    ) -> tuple[SecretKeys, Mapping[int, OpenKCMError]]:
        """Open wrapped data keys; the mapping has the error of each position that did not open.

        Raises:
            LimitExceeded: more than ``limits.MAX_KEYS_PER_CALL`` keys.
            TenantDark, RootUnavailable, ServiceNotFound, TenantNotFound: nothing was tried.
        """
        self._look()
        blobs, failures = self._without_shredded(service, wrapped)

        def unwrap(held: ServiceKey) -> tuple[SecretKeys, list[int]]:
            return crypto.unwrap_many(held.key, blobs, held.aad[wrapped.kind], wrapped.ids)

        try:
            keys, failed = self._with_key(service, wrapped.version, unwrap)
        except (DecryptError, KeyDestroyed) as error:
            return crypto.generate_keys(len(wrapped)), _every(wrapped, error, failures)
        return keys, _errors(failed, failures)

    def rewrap_keys(
        self, service: Service, wrapped: WrappedKeys
    ) -> tuple[WrappedKeys, Mapping[int, OpenKCMError]]:
        """Move wrapped data keys under the active service key.

        Positions that did not open are zeros, and the mapping has the error of each. Raises as ``unwrap_keys``.
        """
        self._look()
        blobs, failures = self._without_shredded(service, wrapped)

        def rewrap(old: ServiceKey) -> tuple[WrappedKeys, list[int]]:
            new = self._vault.active_key(service)
            moved, failed = crypto.rewrap_many(
                old.key, new.key, blobs, old.aad[wrapped.kind], new.aad[wrapped.kind], wrapped.ids
            )
            return WrappedKeys(wrapped.kind, new.version, moved, wrapped.ids), failed

        try:
            moved, failed = self._with_key(service, wrapped.version, rewrap)
        except (DecryptError, KeyDestroyed) as error:
            nothing = bytes(len(wrapped.wrapped))
            moved = WrappedKeys(wrapped.kind, wrapped.version, nothing, wrapped.ids)
            return moved, _every(wrapped, error, failures)
        return moved, _errors(failed, failures)

    def shred_keys(self, service: Service, ids: bytes) -> None:
        """Record stored data keys as destroyed, for good; only random ids are kept."""
        self._check_open()
        tombstones.add(self._vault, service, ids, utc_now())
        key_ids = tuple(ids[at : at + KEY_ID_BYTES] for at in range(0, len(ids), KEY_ID_BYTES))
        self._vault.listeners.tell(Event(Change.SHREDDED, service.tenant, service.service_id, key_ids))

    def shredded(self, service: Service, ids: bytes) -> frozenset[bytes]:
        """Those of the ids that were shredded."""
        self._check_open()
        return self._tombstones.find(service, ids)

    def watch(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Call ``listener`` on every change, keys being zeroed already, until the returned function is called."""
        self._look()
        return self._vault.listeners.add(listener)

    # ---- inside --------------------------------------------------------------------------------------

    def poll(self) -> None:
        """Look now at what other processes changed."""
        if not self._closed:
            self._vault.poll()

    def _check_open(self) -> None:
        if self._closed:
            raise CoreUnavailable("this Core was closed", retryable=False)

    def _look(self) -> None:
        """Before keys are used: make sure that changes by other processes are seen in time."""
        self._check_open()
        if self._watcher is None:
            with self._starting:
                if self._watcher is None:
                    self._watcher = Watcher(self, self._interval)
        # The thread may be starved; a use after twice its interval looks for itself.
        if self._vault.clock() - self._vault.polled > 2 * self._interval:
            # Open keys outlive an outage of the store; the watcher logs it.
            with contextlib.suppress(StoreUnavailable):
                self._vault.poll()

    def _with_key(self, service: Service, version: int | None, use: Callable[[ServiceKey], T]) -> T:
        """Run ``use`` with a service key; again if the key was dropped between look-up and use."""
        vault = self._vault
        for _ in range(_TRIES):
            held = vault.active_key(service) if version is None else vault.version_key(service, version)
            try:
                return use(held)
            except SecretMemoryError:
                # Still in place: it is not our key that was wiped, or no memory can be locked.
                if vault.ring.version(service.service_id, held.version) is held:
                    raise
        raise StoreUnavailable(OVERTAKEN)

    def _without_shredded(
        self, service: Service, wrapped: WrappedKeys
    ) -> tuple[bytes, dict[int, OpenKCMError]]:
        """Blank out shredded keys, so that they are not even opened."""
        if len(wrapped) > MAX_KEYS_PER_CALL:
            raise LimitExceeded(f"{len(wrapped)} keys in one call; at most {MAX_KEYS_PER_CALL} are allowed")
        if not wrapped.kind.stored:
            return wrapped.wrapped, {}
        gone = self._tombstones.find(service, wrapped.ids)
        if not gone:
            return wrapped.wrapped, {}
        blobs = bytearray(wrapped.wrapped)
        failures: dict[int, OpenKCMError] = {}
        for at in range(len(wrapped)):
            if wrapped.ids[at * KEY_ID_BYTES : (at + 1) * KEY_ID_BYTES] in gone:
                blobs[at * WRAPPED_KEY_BYTES : (at + 1) * WRAPPED_KEY_BYTES] = bytes(WRAPPED_KEY_BYTES)
                failures[at] = KeyDestroyed(
                    "this data key was shredded; what it encrypted cannot be read again"
                )
        return bytes(blobs), failures

    def _after_fork(self) -> None:
        self._vault.forget()
        self._watcher = None
        self._starting = threading.Lock()
        self._tombstones = tombstones.Tombstones(self._vault.store)


def _every(
    wrapped: WrappedKeys, error: OpenKCMError, known: dict[int, OpenKCMError]
) -> Mapping[int, OpenKCMError]:
    return {at: known.get(at) or error for at in range(len(wrapped))}


def _errors(failed: list[int], known: dict[int, OpenKCMError]) -> Mapping[int, OpenKCMError]:
    return {at: known.get(at) or DecryptError() for at in failed}


def utc_now() -> str:
    """The time as the store keeps it: ISO 8601, UTC, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


_instances: weakref.WeakSet[Core] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for core in list(_instances):
        core._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
