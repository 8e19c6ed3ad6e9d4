# SPDX-License-Identifier: Apache-2.0
"""The rows of one call, shared out among threads; and the keys that such a call holds open.

Invariant: runs of rows are handed out in their order, and when one fails no more are: the error that is raised is that
of the first run that failed, whichever thread had it. Keys held for a whole call are wiped when the tenant goes dark or
one of them was shredded, and are not decrypted with while the Core is out of touch, which could not tell of that.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from ..crypto import IdSet, KeyRing, Places
from ..errors import InvalidInput, SecretMemoryError, StoreUnavailable, TenantDark
from ..keys import KeyService
from ..waiting import Waiting
from .touch import Touch

MOST_THREADS: Final = 256
RUN_BYTES: Final = 16 * 1024 * 1024
"""A run of rows ends here at the latest, so that a kill does not wait for it long: 2 ms, or 4 on EVP of OpenSSL 3.0."""

SHARES: Final = 4
"""Runs a thread of a short column, so that one that was held up does not keep the others waiting."""

_TRIES: Final = 8

Work = Callable[[int, int], None]


def check_threads(threads: object) -> int:
    """Return ``threads`` if so many can share a column."""
    if not isinstance(threads, int) or not 1 <= threads <= MOST_THREADS:
        raise InvalidInput(f"threads is a number from 1 to {MOST_THREADS}")
    return threads


def share(places: Places, rows: int, threads: int, work: Work, waiting: Waiting) -> None:
    """Call ``work(start, stop)`` for runs of at most ``rows`` rows until all are done, in up to so many threads."""
    if threads == 1 or places.count <= rows:
        start = 0
        while start < places.count:
            stop = places.stop_for(start, rows, RUN_BYTES)
            work(start, stop)
            start = stop
        return
    rows = min(rows, -(-places.count // (SHARES * threads)))
    runs = _Runs(places, rows, work)
    waiting.together(min(threads, -(-places.count // rows)), runs.work, "openkcm-column")
    runs.settle()


class _Runs:
    """What is left to hand out, and what went wrong."""

    def __init__(self, places: Places, rows: int, work: Work) -> None:
        self._places = places
        self._rows = rows
        self._work = work
        self._lock = threading.Lock()
        self._next = 0
        self._failed: dict[int, BaseException] = {}

    def work(self) -> None:
        try:
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
            self._next = stop = self._places.stop_for(start, self._rows, RUN_BYTES)
            return start, stop

    def stop(self) -> None:
        with self._lock:
            self._next = self._places.count

    def settle(self) -> None:
        if self._failed:
            raise self._failed[min(self._failed)]


class _ShreddedError(Exception):
    """Keys of the ring were shredded while it was used."""


class HeldKeys:
    """The rings of open keys that calls of one service hold."""

    def __init__(self, core: KeyService, tenant: str) -> None:
        self._core = core
        self._tenant = tenant
        self.after_fork()

    def after_fork(self) -> None:
        """Start without rings: those under way are the parent's."""
        self._lock = threading.Lock()
        self._epoch = 0
        self._rings: dict[KeyRing, bytes] = {}
        self._shredded: weakref.WeakSet[KeyRing] = weakref.WeakSet()

    @property
    def epoch(self) -> int:
        """A number that grows when every ring is wiped; taken before keys are opened."""
        return self._epoch

    def touch(self) -> Touch:
        """To be made before keys are opened, and asked before each run that decrypts with them."""
        return Touch(self._core)

    def again(self, act: Callable[[], None]) -> None:
        """Do what opens keys, holds and uses them; once more, with keys opened anew, where some of them were shredded.

        Raises:
            StoreUnavailable: that happened again and again.
        """
        for _ in range(_TRIES):
            with contextlib.suppress(_ShreddedError):
                act()
                return
        raise StoreUnavailable("subjects of this column are shredded again and again; try once more")

    @contextmanager
    def hold(self, rings: Sequence[KeyRing], ids: bytes, epoch: int) -> Iterator[None]:
        """Keep rings within reach of ``wipe`` and ``forget`` while they are used; they are wiped at the end.

        Args:
            rings: of the same keys' ids, at most one of which is used at a time.
            ids: the packed ids of their keys.
            epoch: as it was before the keys were opened.

        Raises:
            TenantDark: they were wiped meanwhile.
        """
        with self._lock:
            self._rings.update(dict.fromkeys(rings, ids))
            dark = epoch != self._epoch
        try:
            if dark:
                _wipe(rings)
            yield
        except SecretMemoryError:
            if epoch != self._epoch:
                raise TenantDark(
                    f"the tenant {self._tenant} went dark while a column was worked on; it was stopped"
                ) from None
            if any(each in self._shredded for each in rings):
                raise _ShreddedError from None
            raise
        finally:
            with self._lock:
                for each in rings:
                    del self._rings[each]
            _wipe(rings)

    def wipe(self) -> None:
        """Zero every key that is held; the calls that use them stop at their next run."""
        with self._lock:
            self._epoch += 1
            rings = list(self._rings)
        _wipe(rings)

    def forget(self, ids: frozenset[bytes]) -> None:
        """Data keys were shredded: wipe the rings that hold one, whose calls open what is left of them anew."""
        packed = b"".join(ids)
        with self._lock:
            held = list(self._rings.items())
        rings = [ring for ring, own in held if IdSet(own).positions(packed)]
        self._shredded.update(rings)  # before they are wiped, so that who meets that knows why
        _wipe(rings)


def _wipe(rings: Iterable[KeyRing]) -> None:
    for ring in rings:
        ring.wipe()
