# SPDX-License-Identifier: Apache-2.0
"""Open keys that nobody comes for again: they are zeroed when their time is over.

Invariant: there is one timer for all that wait the same way, a thread or an event loop's, and only while something
does; it keeps nobody alive. Where no timer is to be had no key waits: one that nobody would zero is not kept.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from heapq import heappop, heappush
from math import inf
from time import monotonic
from typing import Final, Protocol

from ..errors import Unavailable
from ..waiting import Timer, Waiting

logger = logging.getLogger("openkcm.gateway")

LEAST_SECONDS: Final = 0.01
MOST_SECONDS: Final = 3600.0
"""What a timer waits at least, so that many that end together are one, and at most, since it cannot wait for ever."""


class Holder(Protocol):
    """What keeps keys for a time."""

    def sweep(self) -> float | None:
        """Zero what is past its time; returns in how many seconds there is more, None where nothing is left."""

    def wipe(self) -> None:
        """Zero all."""


class Expiry:
    """Has holders sweep when the time of what they hold is over."""

    def __init__(self, waiting: Waiting) -> None:
        self._waiting = weakref.ref(waiting)
        self.after_fork()

    def after_fork(self) -> None:
        """Start with nobody: what they hold is the parent's, and so was the timer."""
        self._lock = threading.Lock()
        self._due: dict[int, tuple[float, weakref.ref[Holder]]] = {}
        self._queue: list[tuple[float, int]] = []  # also what ``_due`` has anew since
        self._timer: Timer | None = None
        self._goes_off = 0.0

    def ask(self, holder: Holder, seconds: float) -> bool:
        """Have a holder sweep in so many seconds; sooner where that was asked for already, never later.

        To be called when it holds what is to be swept, or with a lock that its ``sweep`` takes.

        Returns:
            False where no timer is to be had: then the holder is to give up what it asks for.
        """
        when, place = monotonic() + seconds, id(holder)
        with self._lock:
            known = self._due.get(place)
            if known is not None and known[1]() is not holder:
                known = None  # somebody who is gone had its place
            if when == inf or (known is not None and known[0] <= when):
                return True
            self._due[place] = when, weakref.ref(holder)
            heappush(self._queue, (when, place))
            if self._wind():
                return True
            del self._due[place]
            if known is not None:
                self._due[place] = known
            return False

    def _wind(self) -> bool:
        """See to it that a timer goes off for the first of the queue."""
        while self._queue and not self._is_due_then(*self._queue[0]):
            heappop(self._queue)
        waiting = self._waiting()
        if not self._queue or waiting is None:
            return True
        now, first, old = monotonic(), self._queue[0][0], self._timer
        goes_off = max(first, now + LEAST_SECONDS)
        if old is not None and self._goes_off <= goes_off:
            return True
        goes_off = min(goes_off, now + MOST_SECONDS)
        try:
            self._timer = waiting.timer(goes_off - now, self._tick)
        except (Unavailable, RuntimeError):
            return False  # no thread could be started; those that the old one is for are none the worse
        self._goes_off = goes_off
        if old is not None:
            old.cancel()
        return True

    def _is_due_then(self, when: float, place: int) -> bool:
        known = self._due.get(place)
        return known is not None and known[0] == when

    def _tick(self) -> None:
        with self._lock:
            self._timer = None
            due = self._take(monotonic())
        for holder in due:
            again = _swept(holder)
            if again is not None and not self.ask(holder, again):
                holder.wipe()
        del due
        with self._lock:
            left = [] if self._wind() else self._take(inf)
        for each in left:
            each.wipe()

    def _take(self, until: float) -> list[Holder]:
        """Take those that are due by then off the queue; the holders that are still there."""
        holders: list[Holder] = []
        while self._queue and self._queue[0][0] <= until:
            when, place = heappop(self._queue)
            if self._is_due_then(when, place):
                holder = self._due.pop(place)[1]()
                if holder is not None:
                    holders.append(holder)
        return holders


def _swept(holder: Holder) -> float | None:
    try:
        return holder.sweep()
    except Exception:  # the others' time is over too
        logger.exception("keys whose time is over could not be wiped")
        return None


_every: Final[weakref.WeakKeyDictionary[Waiting, Expiry]] = weakref.WeakKeyDictionary()


def expiry_of(waiting: Waiting) -> Expiry:
    """The one for all that wait this way."""
    found = _every.get(waiting)
    return found if found is not None else _every.setdefault(waiting, Expiry(waiting))


def _after_fork_in_child() -> None:
    for each in list(_every.values()):
        each.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
