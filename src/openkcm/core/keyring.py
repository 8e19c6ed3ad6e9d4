# SPDX-License-Identifier: Apache-2.0
"""The open tenant and service keys of one process.

Invariant: a key is published only if its tenant was not dropped since its opening began; dropping a tenant
zeroes every key of it before it returns, waiting for the batches in flight, and later look-ups find nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..crypto import WrappingKey
from ..envelope import data_key_aad, data_keys_aad
from ..keys import Kind, Service


class ServiceKey:
    """One version of a service key, open. There may be a million of these: every byte of one counts.

    ``lease`` is for how many seconds a Gateway may keep a data key that it had opened; 0 for not at all.
    """

    __slots__ = ("_aad", "key", "lease", "service", "version")

    def __init__(self, service: Service, version: int, key: WrappingKey, lease: float) -> None:
        self.service = service
        self.version = version
        self.key = key
        self.lease = lease
        self._aad = data_keys_aad(service.tenant, service.region, service.service_id, version)

    def aad(self, kind: Kind) -> bytes:
        """The associated data of the data keys under it, but for their ids."""
        return data_key_aad(self._aad, kind)


class _Tenant:
    __slots__ = ("generation", "service_keys", "tenant_keys")

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self.tenant_keys: dict[int, WrappingKey] = {}
        self.service_keys: dict[tuple[bytes, int], ServiceKey] = {}


class Keyring:
    """Open keys by tenant; safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Whoever drops a tenant that another thread is dropping waits until it is zeroed.
        self._wiping = threading.RLock()
        self._closed = False
        self._epochs: dict[str, int] = {}
        self._tenants: dict[str, _Tenant] = {}
        self._passing: dict[str, list[WrappingKey]] = {}
        self._active: dict[bytes, ServiceKey] = {}
        self._versions: dict[tuple[bytes, int], ServiceKey] = {}
        self._leases: dict[bytes, float] = {}

    # Plain dict look-ups: these three stand on the path of every batch and take no lock.

    def active(self, service_id: bytes) -> ServiceKey | None:
        """The open key that wraps new data keys of a service."""
        return self._active.get(service_id)

    def version(self, service_id: bytes, version: int) -> ServiceKey | None:
        """An open key of a service by its version."""
        return self._versions.get((service_id, version))

    def lease(self, service_id: bytes) -> float:
        """The open-lease of a service that has an open key; else 0."""
        return self._leases.get(service_id, 0.0)

    def tenant_key(self, tenant: str, version: int) -> WrappingKey | None:
        """An open tenant key."""
        with self._lock:
            held = self._tenants.get(tenant)
            return held.tenant_keys.get(version) if held else None

    def epoch(self, tenant: str) -> int:
        """A number that grows when the tenant is dropped; take it before the store is read for an opening."""
        with self._lock:
            return self._epochs.get(tenant, 0)

    def is_open(self, tenant: str) -> bool:
        """Whether any key of the tenant is open."""
        with self._lock:
            return tenant in self._tenants

    def generations(self) -> dict[str, int]:
        """The store's generation that each tenant's keys were opened at."""
        with self._lock:
            return {tenant: held.generation for tenant, held in self._tenants.items()}

    def publish(
        self,
        tenant: str,
        epoch: int,
        generation: int,
        *,
        tenant_key: tuple[int, WrappingKey] | None = None,
        service_key: ServiceKey | None = None,
        active: bool = False,
    ) -> bool:
        """Make opened keys available.

        Returns False, having kept nothing, if the tenant was dropped meanwhile or its other keys are of another
        generation.
        """
        with self._lock:
            if self._closed or self._epochs.get(tenant, 0) != epoch:
                return False
            held = self._tenants.setdefault(tenant, _Tenant(generation))
            if held.generation != generation:
                return False
            if tenant_key is not None:
                held.tenant_keys[tenant_key[0]] = tenant_key[1]
            if service_key is not None:
                self._add(held, service_key, active)
            return True

    def advance(self, tenant: str, epoch: int, before: int, after: int, active: ServiceKey) -> bool:
        """Put a new active key in place at a new generation, all other keys staying as they are.

        Returns False, having kept nothing, if the tenant was dropped meanwhile or is not at generation ``before``.
        """
        with self._lock:
            held = self._tenants.get(tenant)
            if held is None or held.generation != before or self._epochs.get(tenant, 0) != epoch:
                return False
            held.generation = after
            self._passing[tenant].remove(active.key)
            self._add(held, active, True)
            return True

    def _add(self, held: _Tenant, opened: ServiceKey, active: bool) -> None:
        place = (opened.service.service_id, opened.version)
        held.service_keys[place] = self._versions[place] = opened
        self._leases[opened.service.service_id] = opened.lease
        if active:
            self._active[opened.service.service_id] = opened

    @contextmanager
    def passing(self, tenant: str, epoch: int, key: WrappingKey) -> Iterator[WrappingKey]:
        """Wipe a key that an act is still making when the block ends, or when its tenant is dropped before that.

        ``advance`` takes the key over.
        """
        with self._lock:
            dropped = self._closed or self._epochs.get(tenant, 0) != epoch
            keys = self._passing.setdefault(tenant, [])
            keys.append(key)
        try:
            if dropped:
                key.wipe()
            yield key
        finally:
            with self._lock:
                kept = key not in keys
                if not kept:
                    keys.remove(key)
                if not keys and self._passing.get(tenant) is keys:
                    del self._passing[tenant]
            if not kept:
                key.wipe()

    def drop(self, tenant: str) -> bool:
        """Zero every key of a tenant; returns whether any was open."""
        with self._wiping:
            with self._lock:
                self._epochs[tenant] = self._epochs.get(tenant, 0) + 1
                passing = list(self._passing.get(tenant, ()))
                held = self._tenants.pop(tenant, None) or _Tenant(0)
                for place, opened in held.service_keys.items():
                    self._versions.pop(place, None)
                    self._leases.pop(place[0], None)
                    if self._active.get(place[0]) is opened:
                        del self._active[place[0]]
            # Tenant keys first: no service key can be opened under them while the others are waited for.
            keys = [*held.tenant_keys.values(), *(each.key for each in held.service_keys.values()), *passing]
            for key in keys:
                key.wipe()
            return bool(keys)

    def close(self) -> None:
        """Zero everything, for good."""
        with self._lock:
            self._closed = True
            names = {*self._tenants, *self._passing}
        for tenant in names:
            self.drop(tenant)
