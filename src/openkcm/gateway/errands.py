# SPDX-License-Identifier: Apache-2.0
"""What a Gateway does in the background: errands that are run when they are due.

Invariant: they run one after the other, in a thread that is there only while there are errands; one that fails is no
caller's failure. Nor is it one that no thread is to be had: then they wait for the next that is asked for. Errands do
not keep what they are for alive.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Hashable
from typing import Any, Final

from ..errors import Unavailable
from ..waiting import THREADS, Waiting

logger = logging.getLogger("openkcm.gateway")

Errand = Callable[[], float | None]
"""Does something; returns after how many seconds it is to be run again, None for not."""

_IDLE_SECONDS: Final = 5.0


class Errands:
    """Runs errands one after the other."""

    def __init__(self, name: str, waiting: Waiting = THREADS) -> None:
        self._name = name
        self._waiting = waiting
        self._told = False
        self.after_fork()

    def after_fork(self) -> None:
        """Start without errands: they were the parent's, and so was the thread."""
        self._wake = self._waiting.condition()
        self._due: dict[Hashable, tuple[float, weakref.WeakMethod[Errand]]] = {}
        self._running = False
        self._stopped = False

    def ask(self, errand: Errand, after: float = 0.0) -> None:
        """Have a method called, ``after`` seconds from now; sooner where it was asked for already, never later."""
        method: Any = errand
        key = (id(method.__self__), method.__func__)
        with self._wake:
            if self._stopped:
                return
            due = time.monotonic() + after
            known = self._due.get(key)
            if known is None or due < known[0] or known[1]() is None:
                self._due[key] = (due, weakref.WeakMethod(errand))
            if not self._running:
                self._running = self._begin()
            else:
                self._wake.notify()

    def stop(self) -> None:
        """Run no more errands; one that is under way ends by itself."""
        with self._wake:
            self._stopped = True
            self._due.clear()
            self._wake.notify()

    def _begin(self) -> bool:
        """Have somebody run the errands; False where nobody can now."""
        try:
            self._waiting.spawn(self._run, self._name)
        except Unavailable as error:
            if not self._told:
                self._told = True
                logger.warning("%s waits: %s", self._name, error)
            return False
        self._told = False
        return True

    def _run(self) -> None:
        while (errand := self._next()) is not None:
            again: float | None = None
            try:
                again = errand()
            except Exception:
                logger.exception("%s failed", self._name)
            if again is not None:
                self.ask(errand, again)
            del errand

    def _next(self) -> Errand | None:
        """The next errand when it is due; None when there is none for a while, and the thread is to end."""
        with self._wake:
            while not self._stopped:
                if not self._due:
                    self._wake.wait(_IDLE_SECONDS)
                    if not self._due:
                        break
                    continue
                key = min(self._due, key=lambda each: self._due[each][0])
                due, method = self._due[key]
                errand = method()
                left = due - time.monotonic()
                if errand is not None and left > 0:
                    del errand
                    self._wake.wait(left)
                    continue
                del self._due[key]
                if errand is not None:
                    return errand
            self._running = False
            return None
