# SPDX-License-Identifier: Apache-2.0
"""The Gateway: makes data keys, encrypts and decrypts, and asks the Core for the rest.

Invariant: it holds no key above L4. On every change of a tenant its waiting, current and streaming keys are wiped
before the Core goes on; a forked child starts with none.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Final, cast

from ..alive import Alive
from ..errors import CoreUnavailable, InvalidInput
from ..keys import Change, Event, KeyService, check_name
from ..waiting import waiting_of
from .background import Background
from .keystore import KeyStore, NoKeyStore, open_key_store
from .policy import DataKeyPolicy, PoolPolicy
from .service import ServiceHandle

__all__ = ["Gateway", "ServiceHandle"]


class Gateway:
    """One a process; safe for threads and across ``fork``.

    Args:
        core: a Core, embedded or remote.
        keys: where named data keys are kept: a path (a SQLite file), a URL (``postgresql://...``, ``valkey://...``; see
            ``keystore.open_key_store``) or a key store. By default the file beside an
            embedded vault; with a Core that is far away, none is needed until a subject is named (InvalidInput).
        policy: how long a data key serves; by default one record.
        pool: how many data keys wait ready for single calls.

    Raises:
        ConfigurationError: the key store's driver is not installed, or the store would lose keys.
        StoreUnavailable: the key store cannot be opened.
    """

    def __init__(
        self,
        core: KeyService,
        *,
        keys: str | os.PathLike[str] | KeyStore | None = None,
        policy: DataKeyPolicy | None = None,
        pool: PoolPolicy | None = None,
    ) -> None:
        self._core = core
        self._keys = waiting_of(core).store(_key_store(core, keys))
        self._owns_keys = not hasattr(keys, "find_ids")
        self._policy = policy or DataKeyPolicy()
        self._pool = pool or PoolPolicy()
        self._background = Background(core, self._keys)
        self._lock = threading.Lock()
        self._handles: dict[tuple[str, str], ServiceHandle] = {}
        self._every: Alive[ServiceHandle] = Alive()
        self._closed = False
        self._unwatch = core.watch(_weak_listener(self))
        _instances.add(self)

    def service(self, tenant: str, name: str) -> ServiceHandle:
        """A handle on a service; cheap, shared by all who ask for the same.

        Raises:
            TenantNotFound, ServiceNotFound, KeyDestroyed: there is nothing to hold.
        """
        if self._closed:
            raise CoreUnavailable("this Gateway was closed", retryable=False)
        place = (check_name(tenant, "tenant"), check_name(name, "service"))
        handle = self._handles.get(place)
        if handle is None:
            found = self._core.find_service(*place)
            with self._lock:
                handle = self._handles.get(place)
                if handle is None:
                    handle = ServiceHandle(
                        self, self._core, self._keys, found, self._policy, self._pool, self._background
                    )
                    self._handles[place] = handle
                    self._every.add(handle)
            self._background.wake()
        return handle

    def close(self) -> None:
        """Wipe every key held and close the key store. Idempotent; the Core stays open."""
        if self._closed:
            return
        self._closed = True
        self._unwatch()
        self._background.stop()
        with self._lock:
            handles = self._every.all()
            self._handles.clear()
        for handle in handles:
            handle.wipe(closed=True)
        if self._owns_keys:
            self._keys.close()

    def __enter__(self) -> Gateway:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Gateway services={len(self._handles)}{' closed' if self._closed else ''}>"

    def _on_change(self, event: Event) -> None:
        with self._lock:
            handles = [handle for handle in self._every.all() if handle.tenant == event.tenant]
            if event.change is Change.DARK:
                # A tenant that is linked anew has other services by the same names: look them up again.
                self._handles = {
                    place: held for place, held in self._handles.items() if place[0] != event.tenant
                }
        for handle in handles:
            if event.change is Change.DARK:
                handle.wipe()
            elif event.change is Change.ROTATED and event.service_id in (b"", handle.service_id):
                handle.renew()
            elif event.change is Change.SHREDDED and event.service_id == handle.service_id:
                handle.forget(event.key_ids)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        self._keys.forget()
        self._background.after_fork()
        for handle in self._every.all():
            handle.after_fork()


def _weak_listener(gateway: Gateway) -> Callable[[Event], None]:
    """A listener that does not keep its Gateway alive."""
    reference = weakref.ref(gateway)

    def listen(event: Event) -> None:
        held = reference()
        if held is not None:
            held._on_change(event)

    return listen


def _key_store(core: KeyService, keys: str | os.PathLike[str] | KeyStore | None) -> KeyStore:
    if keys is None:
        keys = getattr(core, "default_key_store", None)
        if keys is None:
            if core.far:
                return cast(KeyStore, NoKeyStore())
            raise InvalidInput("name a key store (keys=PATH or URL) for the data keys of subjects")
    return open_key_store(keys) if isinstance(keys, (str, os.PathLike)) else keys


_instances: Final[Alive[Gateway]] = Alive()


def _after_fork_in_child() -> None:
    for gateway in _instances.all():
        gateway._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
