# SPDX-License-Identifier: Apache-2.0
"""Tenants that the store says are off: killed, or unlinked.

Invariant: a refusal is repeated only while nothing was committed to the store since before it was read there, so that
it is never staler than another reading. It spares that reading, which costs as much as fifty decrypts: users who go
on calling after a kill must cost other tenants little.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from ..errors import OpenKCMError, TenantDark

if TYPE_CHECKING:
    from .store import Store


class Refusals:
    """What the store refused; one a process, safe for threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, tuple[int, Callable[[], OpenKCMError]]] = {}

    def check(self, tenant: str) -> int:
        """Raise the tenant's refusal again if the store is as it was; else the store's version, taken before a reading.

        Raises:
            TenantDark: killed.
            KeyDestroyed: unlinked.
            StoreUnavailable: the store does not say whether it changed.
        """
        version = self._store.data_version()
        known = self._known.get(tenant)
        if known is not None and known[0] == version:
            raise known[1]()
        return version

    def remember(self, tenant: str, version: int, error: OpenKCMError) -> None:
        """Repeat this error while the store's version, taken before it was read, stays what it is."""
        # Not the error itself, which holds on to every frame that it passes and to the caller's data in them.
        again: Callable[[], OpenKCMError] = partial(type(error), str(error))
        if isinstance(error, TenantDark):
            again = partial(TenantDark, str(error), told=error.told)
        self._known[tenant] = (version, again)
