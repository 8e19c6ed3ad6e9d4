# SPDX-License-Identifier: Apache-2.0
"""Data keys made and wrapped in advance, so that a single ``encrypt`` asks nobody.

Invariant: a key is handed out once. A pool holds at most one batch, for a bounded time; what was made before a
kill, a rotation or a fork is wiped, and what was being made then is never handed out.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from .. import crypto
from ..crypto import SecretKeys
from ..errors import SecretMemoryError
from ..keys import KeyService, Kind, Service
from ..limits import WRAPPED_KEY_BYTES
from .policy import DataKeyPolicy, PoolPolicy


class ReadyKeys:
    """Wrapped keys that wait: ``positions`` has those not handed out; list.pop is atomic."""

    __slots__ = ("expires", "keys", "positions", "version", "wrapped")

    def __init__(self, keys: SecretKeys, version: int, wrapped: bytes, expires: float) -> None:
        self.keys = keys
        self.version = version
        self.wrapped = wrapped
        self.expires = expires
        self.positions = list(range(len(keys)))


class Pool:
    """The waiting keys of one service."""

    def __init__(self, core: KeyService, service: Service, policy: PoolPolicy) -> None:
        self._core = core
        self._service = service
        self._policy = policy
        self._filling = threading.Lock()
        self._epoch = 0
        self.ready: ReadyKeys | None = None

    def refill(self, used_up: ReadyKeys | None) -> ReadyKeys:
        """Replace ``used_up``; threads that come meanwhile wait and share the new batch.

        Raises:
            TenantDark and what else ``wrap_keys`` raises; then the pool stays empty.
        """
        with self._filling:
            ready = self.ready
            if ready is not None and ready is not used_up and ready.positions and not ready.keys.wiped:
                return ready
            epoch = self._epoch
            self.ready = None
            keys = crypto.generate_keys(max(1, self._policy.keys))
            wrapped = self._core.wrap_keys(self._service, keys, Kind.INLINE)
            ready = ReadyKeys(keys, wrapped.version, wrapped.wrapped, time.monotonic() + self._policy.seconds)
            if self._policy.keys and epoch == self._epoch:
                self.ready = ready
            # A wipe that came between the check and the assignment has to be done over.
            if epoch != self._epoch:
                self.ready = None
                keys.wipe()
            return ready

    def take(self) -> tuple[ReadyKeys, int]:
        """One waiting key: its batch, and its position there."""
        while True:
            ready = self.ready
            if ready is None or ready.keys.wiped or time.monotonic() > ready.expires:
                ready = self.refill(ready)
            try:
                return ready, ready.positions.pop()
            except IndexError:
                self.refill(ready)

    def discard(self, ready: ReadyKeys) -> None:
        """Forget keys that turned out to be wiped."""
        if self.ready is ready:
            self.ready = None

    def wipe(self) -> None:
        """Zero what waits; what is being made meanwhile is thrown away."""
        self._epoch += 1
        ready, self.ready = self.ready, None
        if ready is not None:
            ready.keys.wipe()


@dataclass(slots=True)
class CurrentKey:
    """A data key that serves several records."""

    keys: SecretKeys
    version: int
    wrapped: bytes
    records: int
    bytes: float
    expires: float
    wall_expires: float

    def fits(self, size: int) -> bool:
        """Whether one more record of this size is within the policy, on both clocks."""
        return (
            self.records > 0
            and self.bytes >= size
            and time.monotonic() < self.expires
            and time.time() < self.wall_expires
            and not self.keys.wiped
        )


class SharedKeys:
    """Hands out the data key that the policy lets serve several records."""

    def __init__(self, pool: Pool, policy: DataKeyPolicy) -> None:
        self._pool = pool
        self._policy = policy
        self._lock = threading.Lock()
        self._epoch = 0
        self._current: CurrentKey | None = None

    def reserve(self, sizes: Sequence[int] | None, start: int, count: int) -> tuple[CurrentKey, int]:
        """Reserve a key for as many of the ``count`` records from ``start`` on as the policy allows, at least one.

        Args:
            sizes: of each record of the batch, in bytes; None if the policy does not count bytes.
        """
        with self._lock:
            current = self._current
            if current is None or not current.fits(sizes[start] if sizes else 0):
                epoch = self._epoch
                current = self._current = self._make()
                # A wipe that came between the making and the assignment has to be done over.
                if epoch != self._epoch:
                    current.keys.wipe()
            if sizes is None:
                taken = min(count, current.records)
            else:
                taken, room = 1, current.bytes - sizes[start]
                while taken < min(count, current.records) and sizes[start + taken] <= room:
                    room -= sizes[start + taken]
                    taken += 1
                current.bytes = room
            current.records -= taken
            return current, taken

    def _make(self) -> CurrentKey:
        # In a handle of its own, which is collected, and so zeroed, after its last use.
        ready, position, keys = self._select()
        seconds = self._policy.seconds if self._policy.seconds is not None else float("inf")
        return CurrentKey(
            keys,
            ready.version,
            ready.wrapped[position * WRAPPED_KEY_BYTES : (position + 1) * WRAPPED_KEY_BYTES],
            self._policy.records,
            self._policy.bytes if self._policy.bytes is not None else float("inf"),
            time.monotonic() + seconds,
            time.time() + seconds,
        )

    def _select(self) -> tuple[ReadyKeys, int, SecretKeys]:
        while True:
            ready, position = self._pool.take()
            try:
                return ready, position, ready.keys.select([position])
            except SecretMemoryError:
                if not ready.keys.wiped:
                    raise
                # Wiped between look and use. The next round asks the Core, which says so if the tenant is dark.
                self._pool.discard(ready)

    def wipe(self) -> None:
        """Zero the current key."""
        self._epoch += 1
        current, self._current = self._current, None
        if current is not None:
            current.keys.wipe()
