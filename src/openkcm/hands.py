# SPDX-License-Identifier: Apache-2.0
"""Threads that lend a hand where one call spreads over cores.

Invariant: who asked for a hand waits until it has ended, whatever interrupts the wait. A thread that ended its part
stays for a few seconds: to start one takes as long as a few hundred rows of a column.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import Final

IDLE_SECONDS: Final = 5.0
"""How long a thread waits for the next call."""


class Hand:
    """A part of a call that another thread has been given."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._ended = threading.Event()

    def do(self, then: Callable[[], None]) -> None:
        """Do it, and ``then`` what is to come before whoever waits goes on, unless it failed."""
        try:
            self._work()
            then()
        finally:
            self._ended.set()

    def outlast(self) -> None:
        """Wait until it has ended; what interrupts that is raised afterwards."""
        interrupted: BaseException | None = None
        while True:
            try:
                self._ended.wait()
                break
            except BaseException as error:
                interrupted = error
        if interrupted is not None:
            raise interrupted


class Hands:
    """The threads of a process that do this."""

    def __init__(self) -> None:
        self._idle: list[queue.SimpleQueue[Hand]] = []

    def lend(self, work: Callable[[], None]) -> Hand:
        """Have ``work`` called in another thread.

        Raises:
            RuntimeError: no thread can be started.
        """
        hand = Hand(work)
        try:
            desk = self._idle.pop()
        except IndexError:
            desk = queue.SimpleQueue()
            desk.put(hand)
            threading.Thread(target=self._serve, args=(desk,), name="openkcm-hand", daemon=True).start()
        else:
            desk.put(hand)
        return hand

    def _serve(self, desk: queue.SimpleQueue[Hand]) -> None:
        while (hand := self._next(desk)) is not None:
            hand.do(lambda: self._idle.append(desk))
            del hand  # and with it what it worked on

    def _next(self, desk: queue.SimpleQueue[Hand]) -> Hand | None:
        while True:
            try:
                return desk.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                try:
                    self._idle.remove(desk)
                except ValueError:
                    continue  # whoever took it is about to give it something
                return None

    def after_fork(self) -> None:
        """Forget the threads: they are the parent's."""
        self._idle.clear()


HANDS: Final = Hands()

os.register_at_fork(after_in_child=HANDS.after_fork)
