# SPDX-License-Identifier: Apache-2.0
"""The threads that ask roots, and when each tenant's turn is.

Invariant: roots that do not answer never hold up those that do. What is suspect, because it was silent before, waits
in a lane of its own; and a call that takes long gives its place in the quick lane back, so that a provider's whole
region can go silent at one moment and the other tenants' probes go on. Threads are daemons: a module or SDK that
never returns must not keep the process from ending.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from ..clock import DICE

T = TypeVar("T")

logger = logging.getLogger("openkcm")

QUICK_THREADS: Final = 64
"""How many roots are asked at one time, not counting those that take longer than SLOW_SECONDS."""

SUSPECT_THREADS: Final = 64
MAX_THREADS: Final = 512
SLOW_SECONDS: Final = 0.25
IDLE_SECONDS: Final = 30.0


class Lane:
    """A queue of calls and the threads that make them; threads come as they are needed and leave when idle."""

    def __init__(self, name: str, threads: int, most: int) -> None:
        self._name = name
        self._threads = threads
        self._most = most
        self._ready = threading.Condition()
        self._calls: deque[Callable[[], None]] = deque()
        self._idle = 0
        self._started: dict[int, float] = {}
        self._alive = 0
        self._closed = False

    def submit(self, *calls: Callable[[], None]) -> None:
        """Queue calls, for one thread to begin with; dropped if the lane is closed.

        A thread takes what waits, one after the other: where roots are quick, one thread makes many calls, which costs
        a fraction of waking a thread for each. Where they are not, ``relieve`` sets more threads to it.
        """
        with self._ready:
            if self._closed or not calls:
                return
            idle = not self._calls
            self._calls.extend(calls)
            if idle:
                self._stir(1)

    def relieve(self) -> bool:
        """Set more threads to what still waits; to be called every few hundredths of a second while it returns True."""
        with self._ready:
            if self._calls and not self._closed:
                self._stir(len(self._calls))
            return bool(self._calls)

    def _stir(self, wanted: int) -> None:
        """Wake idle threads, or start new ones, for so many calls."""
        self._ready.notify(wanted)
        for _ in range(wanted - self._idle):
            if not self._may_grow():
                break
            self._alive += 1
            threading.Thread(target=self._work, name=self._name, daemon=True).start()

    def close(self) -> None:
        """Make no more calls."""
        with self._ready:
            self._closed = True
            self._calls.clear()
            self._ready.notify_all()

    def _may_grow(self) -> bool:
        if self._alive < self._threads:
            return True
        if self._alive >= self._most:
            return False
        late = time.monotonic() - SLOW_SECONDS
        return self._alive - sum(started < late for started in list(self._started.values())) < self._threads

    def _next(self) -> Callable[[], None] | None:
        """The next call; None to end the thread, if there is none for long or the lane is closed."""
        with self._ready:
            if not self._calls and not self._closed:
                self._idle += 1
                self._ready.wait(IDLE_SECONDS)
                self._idle -= 1
            if self._closed or not self._calls:
                self._alive -= 1
                return None
            self._started[threading.get_ident()] = time.monotonic()
            return self._calls.popleft()

    def _work(self) -> None:
        while (call := self._next()) is not None:
            try:
                call()
            except Exception:
                logger.exception("a probe failed")
            finally:
                self._started.pop(threading.get_ident(), None)
            del call


class Turns(Generic[T]):
    """Whose turn it is: a queue by time, spread evenly.

    Args:
        interval: seconds between two turns of one member; each comes up to ``jitter`` of it early.
    """

    def __init__(self, clock: Callable[[], float], interval: float, jitter: float) -> None:
        self._clock = clock
        self._interval = interval
        self._jitter = jitter
        self._lock = threading.Lock()
        self._queue: list[tuple[float, int, T, bool]] = []
        self._number = 0

    def join(self, member: T) -> None:
        """Begin anywhere within the interval, so that members who join at one moment spread."""
        self._push(DICE.random() * self._pause(), member, True)

    def once(self, member: T, at: float) -> None:
        """One more turn, at a moment of the clock."""
        self._push(at - self._clock(), member, False)

    def _pause(self) -> float:
        return self._interval * (1 - self._jitter * DICE.random())

    def _push(self, after: float, member: T, again: bool) -> None:
        with self._lock:
            self._number += 1
            heapq.heappush(self._queue, (self._clock() + after, self._number, member, again))

    def take(self, stays: Callable[[T], bool]) -> list[T]:
        """Those whose turn it is; each that ``stays`` gets another in time, the others are let go."""
        due, now = [], self._clock()
        with self._lock:
            while self._queue and self._queue[0][0] <= now:
                _, _, member, again = heapq.heappop(self._queue)
                if not stays(member):
                    continue
                due.append(member)
                if again:
                    self._number += 1
                    heapq.heappush(self._queue, (now + self._pause(), self._number, member, True))
        return due

    def wait(self) -> float:
        """Seconds to the next turn."""
        with self._lock:
            return max(0.0, self._queue[0][0] - self._clock()) if self._queue else self._interval

    def clear(self) -> None:
        """Let everybody go."""
        with self._lock:
            self._queue.clear()
