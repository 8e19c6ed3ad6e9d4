# SPDX-License-Identifier: Apache-2.0
"""The rows of one call, shared out among threads; and the keys that such a call holds open.

Invariant: runs of rows are handed out in their order, and when one fails no more are: the error that is raised is that
of the first run that failed, whichever thread had it. Keys held for a whole call are wiped when the tenant goes dark or
one of them was shredded, and are not decrypted with while the Core is out of touch, which could not tell of that.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Final

from ..crypto import Places, Turns
from ..errors import InvalidInput, StoreUnavailable
from ..keys import KeyService
from ..waiting import Waiting
from .touch import Touch
from .under_way import ShreddedError, UnderWay

MOST_THREADS: Final = 256
RUN_BYTES: Final = 16 * 1024 * 1024
"""A run of rows ends here at the latest, so that a kill does not wait for it long: 2 ms, or 4 on EVP of OpenSSL 3.0."""

SHARES: Final = 4
"""Runs a thread of a short column, so that one that was held up does not keep the others waiting."""

PART_BYTES: Final = 2 * 1024 * 1024
"""What would be one run is shared out where its rows are large, in parts of no less: 0.2 ms, or a call to the Core."""

LAST_RUNS: Final = 8
"""Into how many parts the last runs are cut, at most, so that all threads end at about the same time."""

_TRIES: Final = 8

Work = Callable[[int, int], None]


def check_threads(threads: object) -> int:
    """Return ``threads`` if so many can share a column."""
    if not isinstance(threads, int) or not 1 <= threads <= MOST_THREADS:
        raise InvalidInput(f"threads is a number from 1 to {MOST_THREADS}")
    return threads


def share(places: Places, rows: int, threads: int, work: Work, waiting: Waiting) -> None:
    """Call ``work(start, stop)`` for runs of at most ``rows`` rows until all are done, in up to so many threads."""
    parts = SHARES * threads
    if places.count <= rows:
        parts = min(parts, places.total // PART_BYTES, places.count)
    if threads == 1 or parts <= 1:
        start = 0
        while start < places.count:
            stop = places.stop_for(start, rows, RUN_BYTES)
            work(start, stop)
            start = stop
        return
    rows = min(rows, -(-places.count // parts))
    threads = min(threads, -(-places.count // rows))
    runs = _Runs(places, rows, threads, work)
    waiting.together(threads, runs.work)
    runs.settle()


class _Runs:
    """What is left to hand out, and what went wrong."""

    def __init__(self, places: Places, rows: int, threads: int, work: Work) -> None:
        self._places = places
        self._rows = rows
        self._threads = threads
        self._work = work
        self._lock = threading.Lock()
        self._next = 0
        self._failed: dict[int, BaseException] = {}
        self._turns = Turns()

    def work(self) -> None:
        try:
            with self._turns:
                while (run := self._take()) is not None:
                    try:
                        self._work(*run)
                    except Exception as error:
                        with self._lock:
                            self._failed[run[0]] = error
        finally:
            self.stop()  # interrupted, or there is nothing left

    def _take(self) -> tuple[int, int] | None:
        with self._lock:
            start = self._next
            if self._failed or start >= self._places.count:
                return None
            share = -(-(self._places.count - start) // self._threads)
            rows = min(self._rows, max(share, self._rows // LAST_RUNS))
            self._next = stop = self._places.stop_for(start, rows, RUN_BYTES)
            return start, stop

    def stop(self) -> None:
        with self._lock:
            self._next = self._places.count

    def settle(self) -> None:
        if self._failed:
            raise self._failed[min(self._failed)]


class HeldKeys(UnderWay):
    """The rings of open keys that the columns of one service hold."""

    def __init__(self, core: KeyService, tenant: str) -> None:
        super().__init__(tenant)
        self._core = core

    def touch(self) -> Touch:
        """To be made before keys are opened, and asked before each run that decrypts with them."""
        return Touch(self._core)

    def again(self, act: Callable[[], None]) -> None:
        """Do what opens keys, holds and uses them; once more, with keys opened anew, where some of them were shredded.

        Raises:
            StoreUnavailable: that happened again and again.
        """
        for _ in range(_TRIES):
            with contextlib.suppress(ShreddedError):
                act()
                return
        raise StoreUnavailable("subjects of this column are shredded again and again; try once more")
