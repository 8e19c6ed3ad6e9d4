# SPDX-License-Identifier: Apache-2.0
"""The open tenant and service keys of one process.

Invariant: a key is published only if its tenant was not dropped since its opening began; dropping a tenant
zeroes every key of it before it returns, waiting for the batches in flight, and later look-ups find nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from ..crypto import WrappingKey
from ..envelope import data_key_aad
from ..keys import Kind, Service


class ServiceKey:
    """One version of a service key, open, with the associated data of the data keys under it."""

    __slots__ = ("aad", "key", "service", "version")

    def __init__(self, service: Service, version: int, key: WrappingKey) -> None:
        self.service = service
        self.version = version
        self.key = key
        self.aad = {
            kind: data_key_aad(service.tenant, service.region, service.service_id, version, kind)
            for kind in Kind
        }


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
        self._epochs: dict[str, int] = {}
        self._tenants: dict[str, _Tenant] = {}
        self._active: dict[bytes, ServiceKey] = {}
        self._versions: dict[tuple[bytes, int], ServiceKey] = {}

    # Plain dict look-ups: these two stand on the path of every batch and take no lock.

    def active(self, service_id: bytes) -> ServiceKey | None:
        """The open key that wraps new data keys of a service."""
        return self._active.get(service_id)

    def version(self, service_id: bytes, version: int) -> ServiceKey | None:
        """An open key of a service by its version."""
        return self._versions.get((service_id, version))

    def tenant_key(self, tenant: str, version: int) -> WrappingKey | None:
        """An open tenant key."""
        with self._lock:
            held = self._tenants.get(tenant)
            return held.tenant_keys.get(version) if held else None

    def epoch(self, tenant: str) -> int:
        """A number that grows when the tenant is dropped; take it before an opening begins."""
        with self._lock:
            return self._epochs.get(tenant, 0)

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
        service_keys: Iterable[ServiceKey] = (),
        active: ServiceKey | None = None,
    ) -> bool:
        """Make opened keys available; returns False, having kept nothing, if the tenant was dropped meanwhile."""
        with self._lock:
            if self._epochs.get(tenant, 0) != epoch:
                return False
            held = self._tenants.setdefault(tenant, _Tenant(generation))
            held.generation = generation
            if tenant_key is not None:
                held.tenant_keys[tenant_key[0]] = tenant_key[1]
            for opened in service_keys:
                place = (opened.service.service_id, opened.version)
                held.service_keys[place] = self._versions[place] = opened
            if active is not None:
                self._active[active.service.service_id] = active
            return True

    def drop(self, tenant: str) -> bool:
        """Zero every key of a tenant; returns whether any was open."""
        with self._lock:
            self._epochs[tenant] = self._epochs.get(tenant, 0) + 1
            held = self._tenants.pop(tenant, None)
            if held is None:
                return False
            for place, opened in held.service_keys.items():
                self._versions.pop(place, None)
                if self._active.get(place[0]) is opened:
                    del self._active[place[0]]
        for opened in held.service_keys.values():
            opened.key.wipe()
        for key in held.tenant_keys.values():
            key.wipe()
        return True

    def drop_all(self) -> None:
        """Zero everything."""
        with self._lock:
            names = list(self._tenants)
        for tenant in names:
            self.drop(tenant)
