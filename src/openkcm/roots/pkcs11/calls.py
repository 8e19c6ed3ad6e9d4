# SPDX-License-Identifier: Apache-2.0
"""Calls into a PKCS#11 module: one at a time, and none waited for longer than it may take.

Invariant: every call into one module is made by one thread of its own, since modules promise nothing about threads; and
whoever waits for it waits no longer than he says, however long the call takes. A call in C cannot be interrupted: one
that hangs keeps the module's thread, and until it returns every other call into that module is refused at once. Calls
into other modules, and everything else in the process, go on.

Around a fork the thread is idle, so that a child inherits no half-done call; a child of a process whose module hangs
cannot use that module. The thread is not ended for it: a thread that ends still holds locks of C libraries for a
moment after Python calls it ended, and a child would inherit them.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

from ...alive import Alive
from ...errors import RootUnavailable

T = TypeVar("T")

FORK_SECONDS: Final = 1.0
"""How long a fork waits for a call that is under way."""

_STUCK: Final = (
    "a call into the PKCS#11 module does not return; look after the HSM, then start this process anew"
)
_SLOW: Final = "the PKCS#11 module did not answer in time; look after the HSM"
_FORKED: Final = (
    "this process was forked during a call into the PKCS#11 module, which it cannot use; start it anew"
)


class _Call:
    """One call: what to run, and what came of it."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.run: Callable[[], Any] | None = run
        self.done = threading.Event()
        self.given_up = False
        self.result: Any = None
        self.error: BaseException | None = None

    def perform(self) -> None:
        run, self.run = self.run, None
        assert run is not None
        try:
            self.result = run()
        except BaseException as error:
            # The frames of the call stay behind: they hold sessions, and at a login the PIN.
            self.error = error.with_traceback(None)
            error.__context__ = None
        finally:
            del run
            self.done.set()


class Caller:
    """The thread that makes the calls into one module; it is started when first needed."""

    def __init__(self) -> None:
        self._renew()
        self._usable = True
        _callers.add(self)

    def _renew(self) -> None:
        self.gate = threading.RLock()
        self._calls: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._current: _Call | None = None
        self._idle = threading.Condition()
        self._pending = 0

    def run(self, call: Callable[[], T], seconds: float) -> T:
        """Make a call and return what it returns, or raise what it raises.

        Raises:
            RootUnavailable: it did not return within ``seconds``, or an earlier one never did; no retry at once helps.
        """
        waiting = _Call(call)
        with self.gate:
            if not self._usable:
                raise RootUnavailable(_FORKED, retryable=False)
            current = self._current
            if current is not None and current.given_up:
                raise RootUnavailable(_STUCK, retryable=False)
            self._put(waiting)
        try:
            waiting.done.wait(max(seconds, 0.0))
        finally:  # also when the wait is interrupted
            waiting.given_up = not waiting.done.is_set()
        if waiting.given_up:
            raise RootUnavailable(_SLOW, retryable=False)
        error, result = waiting.error, waiting.result
        del waiting
        if error is not None:
            try:
                raise error
            finally:
                del error  # which would keep this frame, and this frame it
        return result  # type: ignore[no-any-return]

    def _put(self, call: _Call) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._work, args=(self._calls,), name="openkcm-pkcs11", daemon=True
            )
            self._thread.start()
        with self._idle:
            self._pending += 1
        self._calls.put(call)

    def _work(self, calls: queue.SimpleQueue[_Call]) -> None:
        while True:
            call = self._current = calls.get()
            if not call.given_up:
                call.perform()
            self._current = None
            del call  # nothing that was returned is kept while waiting
            with self._idle:
                self._pending -= 1
                self._idle.notify_all()

    # ---- forks ---------------------------------------------------------------------------------------

    def pause(self, ends: float) -> None:
        """Let no call begin, and wait until the thread is idle, but no longer than until ``ends``."""
        self.gate.acquire()
        with self._idle:
            self._idle.wait_for(lambda: not self._pending, max(ends - time.monotonic(), 0.0))

    def resume(self) -> None:
        """Let calls begin again."""
        self.gate.release()

    def start_anew(self) -> None:
        """Begin afresh in a forked child."""
        self._usable = self._usable and not self._pending
        self._renew()


_callers: Final[Alive[Caller]] = Alive()
_forking = threading.RLock()
_paused: list[Caller] = []


def _before_fork() -> None:
    _forking.acquire()  # two threads that fork must not each wait for what the other has paused
    ends = time.monotonic() + FORK_SECONDS
    for caller in _callers.all():
        caller.pause(ends)
        _paused.append(caller)


def _after_fork_in_parent() -> None:
    while _paused:
        _paused.pop().resume()
    _forking.release()


def _after_fork_in_child() -> None:
    global _forking
    _forking = threading.RLock()
    _paused.clear()
    for caller in _callers.all():
        caller.start_anew()


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
)
