# SPDX-License-Identifier: Apache-2.0
"""Data keys made and wrapped in advance, so that a single ``encrypt`` asks nobody.

Invariant: a key is handed out once. A pool holds at most ``PoolPolicy.keys``, for a bounded time, at whose end they are
zeroed whether anybody comes or not, and so is a key that serves several records. What was made before a kill, a
rotation or a fork is wiped, and what was being made then is never handed out. Where the Core is far away the keys are
in two halves: while one is used up, the other is fetched in the background.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from .. import crypto
from ..clock import DICE
from ..crypto import SecretKeys
from ..errors import OpenKCMError, SecretMemoryError, Unavailable
from ..keys import KeyService, Kind, Service
from ..limits import WRAPPED_KEY_BYTES
from ..waiting import waiting_of
from .errands import Errands
from .expiry import expiry_of
from .policy import DataKeyPolicy, PoolPolicy

RENEWED: Final = (0.4, 0.6)
"""Between which parts of its time a half that is in use is replaced: all Gateways at once would be a burst, and an
outage is to find keys that last for a while yet."""

FIRST_PAUSE_SECONDS: Final = 0.1
LONGEST_PAUSE_SECONDS: Final = 5.0
"""After how long a fetch that found no Core is tried again; doubled each time, and drawn from half of it up."""

LONGEST_LOOK_SECONDS: Final = 60.0
"""After how long the spare half is looked at again, at the latest."""


class ReadyKeys:
    """Wrapped keys that wait: ``positions`` has those not handed out; list.pop is atomic."""

    __slots__ = ("expires", "keys", "positions", "version", "wrapped")

    def __init__(self, keys: SecretKeys, version: int, wrapped: bytes, expires: float) -> None:
        self.keys = keys
        self.version = version
        self.wrapped = wrapped
        self.expires = expires
        self.positions = list(range(len(keys)))

    def good(self) -> bool:
        """Whether it has keys to hand out now."""
        return bool(self.positions) and not self.keys.wiped and time.monotonic() <= self.expires


class Pool:
    """The waiting keys of one service.

    Args:
        errands: fetches in the background, where the Core is far away; None where it is here.
    """

    def __init__(
        self, core: KeyService, service: Service, policy: PoolPolicy, errands: Errands | None = None
    ) -> None:
        self._core = core
        self._service = service
        self._policy = policy
        self._errands = errands if policy.keys > 1 else None
        self._count = max(1, policy.keys if self._errands is None else policy.keys // 2)
        self.waiting = waiting_of(core)
        self._expiry = expiry_of(self.waiting)
        self._filling = self.waiting.lock()
        self._lock = threading.Lock()
        self._epoch = 0
        self._spare: ReadyKeys | None = None
        self._pause = FIRST_PAUSE_SECONDS
        self._renew_at = 0.0
        self.ready: ReadyKeys | None = None

    def refill(self, used_up: ReadyKeys | None) -> ReadyKeys:
        """Replace ``used_up``; threads that come meanwhile wait and share the new batch.

        Raises:
            TenantDark and what else ``wrap_keys`` raises; then the pool stays empty.
        """
        with self._filling:
            ready = self.ready
            if ready is not None and ready is not used_up and ready.good():
                return ready
            with self._lock:
                epoch, spare = self._epoch, self._spare
                self._spare = self.ready = None
            ready = spare if spare is not None and spare.good() else self._make()
            with self._lock:
                if epoch != self._epoch:
                    ready.keys.wipe()
                elif self._policy.keys and self._ends(ready):
                    self.ready = ready
        if self._errands is not None:
            self._errands.ask(self.fetch)
        return ready

    def fetch(self) -> float | None:
        """Have a good spare half, and a newer one where the pool is in use; returns when to come again."""
        with self._lock:
            epoch, ready, spare = self._epoch, self.ready, self._spare
        if ready is None or time.monotonic() > ready.expires:
            return None  # nobody uses it; who does next asks for more
        used = len(ready.positions) < self._count
        if spare is not None and spare.good() and not (used and time.monotonic() >= self._renew_at):
            return self._until_renewal()
        try:
            fresh = self._make()
        except Unavailable:
            pause, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE_SECONDS)
            return pause * DICE.uniform(0.5, 1.0)
        except OpenKCMError:
            return None  # whoever finds the pool empty is told
        self._pause = FIRST_PAUSE_SECONDS
        self._renew_at = time.monotonic() + self._policy.seconds * DICE.uniform(*RENEWED)
        with self._lock:
            old: ReadyKeys | None = fresh
            if epoch == self._epoch and self._ends(fresh):
                old, self._spare = self._spare, fresh
        if old is not None:
            old.keys.wipe()
        return self._until_renewal()

    def _until_renewal(self) -> float:
        return min(max(self._renew_at - time.monotonic(), self._policy.seconds / 10), LONGEST_LOOK_SECONDS)

    def _make(self) -> ReadyKeys:
        keys = crypto.generate_keys(self._count)
        wrapped = self._core.wrap_keys(self._service, keys, Kind.INLINE)
        return ReadyKeys(keys, wrapped.version, wrapped.wrapped, time.monotonic() + self._policy.seconds)

    def _ends(self, keys: ReadyKeys) -> bool:
        """Whether keys will be swept when their time is over, without which they must not wait here."""
        return self._expiry.ask(self, keys.expires - time.monotonic())

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
        with self._lock:  # or what came in its place would go too
            if self.ready is ready:
                self.ready = None

    def wipe(self) -> None:
        """Zero what waits; what is being made meanwhile is thrown away."""
        with self._lock:
            self._epoch += 1
            ready, self.ready = self.ready, None
            spare, self._spare = self._spare, None
        for each in (ready, spare):
            if each is not None:
                each.keys.wipe()

    def sweep(self) -> float | None:
        """Zero what is past its time; in how many seconds there is more, None where nothing waits."""
        now = time.monotonic()
        with self._lock:
            waiting = [each for each in (self.ready, self._spare) if each is not None]
            gone = [each for each in waiting if now >= each.expires]
            if self.ready in gone:
                self.ready = None
            if self._spare in gone:
                self._spare = None
        for each in gone:
            each.keys.wipe()
        return min((each.expires - now for each in waiting if each not in gone), default=None)


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
        """Whether one more record of this size is within the policy."""
        return self.records > 0 and self.bytes >= size and self.left() > 0 and not self.keys.wiped

    def left(self) -> float:
        """For how many seconds it serves yet, on the clock that says less."""
        return min(self.expires - time.monotonic(), self.wall_expires - time.time())


class SharedKeys:
    """Hands out the data key that the policy lets serve several records."""

    def __init__(self, pool: Pool, policy: DataKeyPolicy) -> None:
        self._pool = pool
        self._policy = policy
        self._expiry = expiry_of(pool.waiting)
        self._reserving = pool.waiting.lock()
        self._lock = threading.Lock()
        self._epoch = 0
        self._current: CurrentKey | None = None

    def reserve(self, sizes: Sequence[int] | None, start: int, count: int) -> tuple[CurrentKey, int]:
        """Reserve a key for as many of the ``count`` records from ``start`` on as the policy allows, at least one.

        Args:
            sizes: of each record of the batch, in bytes; None if the policy does not count bytes.
        """
        with self._reserving:
            current = self._current
            if current is None or not current.fits(sizes[start] if sizes else 0):
                current = self._renew()
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

    def _renew(self) -> CurrentKey:
        """Have another key serve from now on."""
        epoch = self._epoch
        made = self._make()
        with self._lock:
            overtaken = epoch != self._epoch
            if not overtaken:
                self._current = made
        if overtaken:
            made.keys.wipe()
        elif not self._expiry.ask(self, made.left()):
            with self._lock:
                self._current = None  # it serves this once
        return made

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
                return ready, position, ready.keys.move(position)
            except SecretMemoryError:
                if not ready.keys.wiped:
                    raise
                # Wiped between look and use. The next round asks the Core, which says so if the tenant is dark.
                self._pool.discard(ready)

    def wipe(self) -> None:
        """Zero the current key."""
        with self._lock:  # not the one that is held while a key is made
            self._epoch += 1
            current, self._current = self._current, None
        if current is not None:
            current.keys.wipe()

    def sweep(self) -> float | None:
        """Zero the current key if its time is over; in how many seconds it is, None where there is none."""
        current = self._current
        if current is None or current.keys.wiped:
            return None
        left = current.left()
        if left > 0:
            return left
        current.keys.wipe()  # it stays where it is: without the lock another may have taken its place
        return None
