# SPDX-License-Identifier: Apache-2.0
"""Opened data keys that are kept for a moment, where an operator granted an open-lease.

Invariant: a lease begins before its key is opened and ends ``lease`` seconds later; use does not move it. A kept key
is used only on the Core's word, not older than ``RECENT_SECONDS``, that a lease still stands, so that a tenant that
went dark, a Core that is out of touch or a lease that was taken back ends it. A change of the tenant wipes every kept
key at once, and time does where nobody comes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from ..clock import awake_clock
from ..crypto import SecretKeys
from ..envelope import INLINE_PLACE_BYTES, pack_place
from ..errors import OpenKCMError, SecretMemoryError
from ..keys import KeyService, Service, WrappedKeys
from ..waiting import waiting_of
from .expiry import expiry_of

MOST_KEPT: Final = 1024
"""Keys kept for each service; the oldest goes first."""

MOST_READY: Final = 256
"""Up to here a key is kept with what the cipher makes of it, about a kilobyte of secret memory; later ones alone."""

RECENT_SECONDS: Final = 0.01
"""For how long the Core's word that a lease stands is good: it is about time, which it counts in tenths of a second."""


class _Kept(NamedTuple):
    keys: SecretKeys
    opened: float
    until: float


class Leases:
    """The kept keys of one service.

    Attributes:
        kept: keys by their places, each with the moments of its opening and of its end; to be read only.
        stands: up to which moment the Core's last word that a lease stands is good.
        clock: what these moments are of.
        waiting: how the Core's callers wait.
    """

    def __init__(self, core: KeyService, service: Service, clock: Callable[[], float] = awake_clock) -> None:
        self._core = core
        self._service = service
        self.clock = clock
        self.waiting = waiting_of(core)
        self._expiry = expiry_of(self.waiting)
        self.after_fork()

    def after_fork(self) -> None:
        """Start without keys: secret memory is not inherited."""
        self._lock = threading.Lock()
        self.kept: dict[bytes, _Kept] = {}
        self._epoch = 0
        self.stands = -math.inf

    def open(self, wrapped: WrappedKeys) -> tuple[SecretKeys, Mapping[int, OpenKCMError]]:
        """Open data keys: by a copy of the one that is kept, or by the Core. The caller wipes what this gives.

        A batch of several keys is always opened by the Core: it is one call for all.

        Raises:
            as ``KeyService.unwrap_keys``.
        """
        if len(wrapped) > 1:
            keys, failures, _ = self._core.unwrap_keys(self._service, wrapped)
            return keys, failures
        epoch, asked = self._epoch, self.clock()
        if self.kept and (copy := self._copy(_place(wrapped))) is not None:
            return copy, {}
        keys, failures, granted = self._core.unwrap_keys(self._service, wrapped)
        if granted > 0 and not failures:
            own = keys.keep(0) if len(self.kept) < MOST_READY else keys.select([0])
            self._keep(_place(wrapped), _Kept(own, asked, asked + granted), epoch)
        return keys, failures

    def find(self, place: bytes) -> SecretKeys | None:
        """The kept key of a place, if it may be used now; None otherwise.

        It is not the caller's to wipe, and may be wiped while it is used (SecretMemoryError).

        Raises:
            as ``KeyService.lease``.
        """
        kept = self.kept.get(place)
        if kept is None:
            return None
        keys, opened, until = kept
        now = self.clock()
        if now < self.stands and now < until:
            return keys
        granted = self._core.lease(self._service)
        if now < min(until, opened + granted):
            self.stands = now + RECENT_SECONDS
            return keys
        self._drop([place])
        return None

    def _copy(self, place: bytes) -> SecretKeys | None:
        keys = self.find(place)
        if keys is None:
            return None
        try:
            return keys.select([0])
        except SecretMemoryError:
            if not keys.wiped:
                raise
        self._drop([place])
        return None

    def forget(self, key_ids: frozenset[bytes]) -> None:
        """Zero the kept keys of these ids: they were shredded. What is being opened meanwhile is not kept."""
        with self._lock:
            self._epoch += 1
        self._drop([place for place in list(self.kept) if place[INLINE_PLACE_BYTES:] in key_ids])

    def wipe(self) -> None:
        """Zero every kept key; what is being opened meanwhile is not kept."""
        with self._lock:
            self._epoch += 1
            self.stands = -math.inf
            kept, self.kept = self.kept, {}
        for each in kept.values():
            each.keys.wipe()

    def sweep(self) -> float | None:
        """Zero what is past its time; in how many seconds there is more, None where nothing is kept."""
        now = self.clock()
        self._drop([place for place, kept in list(self.kept.items()) if now >= kept.until])
        with self._lock:
            return min((kept.until - now for kept in self.kept.values()), default=None)

    # ---- inside --------------------------------------------------------------------------------------

    def _keep(self, place: bytes, kept: _Kept, epoch: int) -> None:
        oldest: list[bytes] = []
        with self._lock:
            wanted = (
                epoch == self._epoch
                and place not in self.kept
                and self._expiry.ask(self, kept.until - self.clock())  # what time would not wipe is not kept
            )
            if wanted:
                self.kept[place] = kept
                if len(self.kept) > MOST_KEPT:
                    oldest = [next(iter(self.kept))]
        if not wanted:
            kept.keys.wipe()
        self._drop(oldest)

    def _drop(self, places: list[bytes]) -> None:
        with self._lock:
            gone = [kept for place in places if (kept := self.kept.pop(place, None)) is not None]
        for kept in gone:
            kept.keys.wipe()


def _place(wrapped: WrappedKeys) -> bytes:
    """All that a wrapped key is bound to besides its service: what is kept is found by nothing less.

    Of an inline key this is what stands in its envelope; a stored key's id follows it, which tells the two apart.
    """
    return pack_place(wrapped.version, wrapped.wrapped) + wrapped.ids
