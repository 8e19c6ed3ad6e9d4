# SPDX-License-Identifier: Apache-2.0
"""Tells Gateways of changes, and notices those that other processes make in the store.

Invariant: a listener is called for every change exactly once, with keys already zeroed; a listener that fails
does not keep the others from hearing. The thread holds only a weak reference to its Core, so a Core that
nobody holds any more ends it.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from ..errors import OpenKCMError
from ..keys import Event

T = TypeVar("T")

logger = logging.getLogger("openkcm")


class Listeners:
    """Callbacks of this process's Gateways."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: dict[int, Callable[[Event], None]] = {}
        self._next = 0

    def add(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Register; the returned function takes the listener out again."""
        with self._lock:
            self._next += 1
            number = self._next
            self._listeners[number] = listener

        def remove() -> None:
            with self._lock:
                self._listeners.pop(number, None)

        return remove

    def after_fork(self) -> None:
        """Keep the listeners, whose Gateways the child has too; another thread may have held the lock."""
        self._lock = threading.Lock()

    def tell(self, event: Event) -> None:
        """Call every listener."""
        with self._lock:
            listeners = list(self._listeners.values())
        for listener in listeners:
            try:
                listener(event)
            except Exception:
                logger.exception("a Gateway failed to act on a %s event", event.change)


class Repeater(Generic[T]):
    """A daemon thread that has a Core do something over and over.

    Args:
        act: does it, and returns the seconds to wait before the next time.
        first: the seconds to wait before the first time.
    """

    def __init__(self, core: T, name: str, act: Callable[[T], float], first: float) -> None:
        self._core = weakref.ref(core)
        self._name = name
        self._act = act
        self._wait = first
        self._stopped = False
        self._woken = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        failing, wait = False, self._wait
        while True:
            self._woken.wait(wait)
            self._woken.clear()
            if self._stopped:
                return
            core = self._core()
            if core is None:
                return
            try:
                wait = self._act(core)
                failing = False
            except OpenKCMError as error:
                if not failing:  # once for each outage, not once for each look
                    logger.warning("%s: the vault's store does not answer: %s", self._name, error)
                failing = True
            except Exception:
                logger.exception("%s failed", self._name)
            del core

    def wake(self) -> None:
        """Do it now, and not only when its time has come."""
        self._woken.set()

    def stop(self) -> None:
        """End the thread; it is waited for unless it is the caller."""
        self._stopped = True
        self._woken.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=5)
