# SPDX-License-Identifier: Apache-2.0
"""Threads that lend a hand where one call spreads over cores.

Invariant: who asked for a hand waits until it has ended, or sees to it that it never begins, whatever interrupts
that. A thread that ended its part stays for a few seconds: to start one takes as long as some hundred rows of a column.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import Final

IDLE_SECONDS: Final = 5.0
"""How long a thread waits for the next call."""


class Hand:
    """A part of a call that another thread is given, and that nobody misses if it never begins.

    What is waited for is no Event: one that is interrupted as it takes its lock keeps it, and then nobody can set it.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._begun: dict[str, bool] = {}
        self._has_ended = False
        self._end = threading.Lock()
        self._end.acquire()

    def do(self, then: Callable[[], None]) -> None:
        """Do it, unless it was given up, and ``then`` what comes before whoever waits goes on, unless it failed."""
        if not self._begun.setdefault("begun", True):
            then()
            return
        try:
            self._work()
            then()
        finally:
            self._work = _nothing  # whoever waits may give back what it was about
            self._has_ended = True
            self._end.release()

    def outlast(self) -> None:
        """Give it up, or wait until it has ended; to be called again where that was interrupted."""
        if not self._begun.setdefault("begun", False):
            self._work = _nothing
            return
        while not self._has_ended:
            self._end.acquire()


class Hands:
    """The threads of a process that do this."""

    def __init__(self) -> None:
        self._idle: list[queue.SimpleQueue[Hand]] = []

    def together(self, count: int, work: Callable[[], None]) -> None:
        """Call ``work`` here, and side by side up to so many times in all, where there are threads for it.

        All have ended when this returns or raises. An interrupt is raised after that.
        """
        hands = [Hand(work) for _ in range(1, count)]
        interrupted: BaseException | None = None
        try:
            with contextlib.suppress(RuntimeError):  # no more threads
                for each in hands:
                    self.lend(each)
            work()
        finally:
            # Not in a function of its own: an interrupt may come as that begins.
            while True:
                try:
                    for each in hands:
                        each.outlast()
                    break
                except BaseException as error:
                    interrupted = error
            if interrupted is not None:
                raise interrupted

    def lend(self, hand: Hand) -> None:
        """Have it done in another thread.

        Raises:
            RuntimeError: no thread can be started.
        """
        try:
            desk = self._idle.pop()
        except IndexError:
            if sys.is_finalizing():
                raise RuntimeError("a thread that is started now never begins") from None
            desk = queue.SimpleQueue()
            desk.put(hand)
            threading.Thread(target=self._serve, args=(desk,), name="openkcm-hand", daemon=True).start()
        else:
            desk.put(hand)

    def _serve(self, desk: queue.SimpleQueue[Hand]) -> None:
        while (hand := self._next(desk)) is not None:
            hand.do(lambda: self._idle.append(desk))
            del hand  # and with it what it worked on

    def _next(self, desk: queue.SimpleQueue[Hand]) -> Hand | None:
        for _ in range(2):
            try:
                return desk.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                try:
                    self._idle.remove(desk)
                except ValueError:
                    continue  # whoever took it is about to give it something, or was interrupted before
                return None
        return None

    def after_fork(self) -> None:
        """Forget the threads: they are the parent's."""
        self._idle.clear()


def _nothing() -> None:
    """What is left of work that has ended."""


HANDS: Final = Hands()

os.register_at_fork(after_in_child=HANDS.after_fork)
