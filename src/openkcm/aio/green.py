# SPDX-License-Identifier: Apache-2.0
"""How the Gateway's own code waits in asyncio: in a greenlet on the loop's thread, which the loop goes on beside.

Invariant: there is one thread, and a greenlet gives way only in ``block``; between two calls of it nothing else of ours
runs, so that what is done under a condition's lock needs none. A task that is cancelled while it waits has
CancelledError raised where its greenlet stands, which unwinds as from any other error: what was locked is given back
and what was opened is wiped. What was handed to somebody who is gone by then is handed on. What works elsewhere, under
these keys or in the caller's memory, has ended before it unwinds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Final, ParamSpec, TypeVar, cast

from ..errors import ConfigurationError, InvalidInput

try:
    from greenlet import getcurrent, greenlet
except ImportError:
    raise ConfigurationError("openkcm.aio needs greenlet: pip install 'openkcm[aio]'") from None

logger = logging.getLogger("openkcm.aio")

P = ParamSpec("P")
T = TypeVar("T")

TOGETHER: Final = 64
"""Tasks that an event wakes in one turn of the loop: each opens a record then, in some 30 microseconds."""

_tasks: Final[set[asyncio.Task[Any]]] = set()
"""What runs in the background: the loop itself holds tasks only weakly."""


class Blocked(BaseException):
    """What was called outside a greenlet would have had to wait: call it again in one."""


class _Green(greenlet):  # type: ignore[misc]  # it has no type information
    """A greenlet that ``Loop.run`` waits for."""


def block(wanted: Awaitable[T]) -> T:
    """Wait for something, in a greenlet.

    Raises:
        Blocked: this is none.
        CancelledError: the task that the greenlet is run by was cancelled.
    """
    parent = _check_green().parent
    assert parent is not None
    return cast(T, parent.switch(wanted))


def _check_green() -> greenlet:
    current = getcurrent()
    if not isinstance(current, _Green):
        raise Blocked
    return current


class _Call:
    """A call in the executor, which may be given up before it begins, and else be waited for."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function: Callable[[], object] | None = function
        self._lock = threading.Lock()  # taken by who runs it, or for ever by who gives it up

    def __call__(self) -> object:
        if not self._lock.acquire(blocking=False):
            return None
        function, self._function = self._function, None
        try:
            return function() if function is not None else None
        finally:
            self._lock.release()

    def give_up(self, wait: bool = False) -> bool:
        """Have it not begin; False where it is under way, unless this is to ``wait``, with its thread, for its end."""
        if not self._lock.acquire(blocking=wait):
            return False
        self._function = None  # and what that holds on to
        return True


class Loop:
    """The event loop of one Core or Gateway: the first that it is used in."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0
        self._own: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()
        _instances.add(self)

    def get(self) -> asyncio.AbstractEventLoop:
        """The loop.

        Raises:
            InvalidInput: another one is running.
        """
        running = asyncio.get_running_loop()
        if self._loop is not running:
            if self._loop is not None:
                raise InvalidInput(
                    "this belongs to another event loop; make a Core and a Gateway for each loop"
                )
            self._loop, self._thread = running, threading.get_ident()
        return running

    def is_here(self) -> bool:
        """Whether this thread is the loop's."""
        return self._thread == threading.get_ident()

    async def run(self, function: Callable[P, T], /, *args: P.args, **options: P.kwargs) -> T:
        """Call something that waits as its own code says, and give way to others while it does."""
        self.get()
        green = _Green(function, getcurrent())
        green.gr_context = getcurrent().gr_context
        wanted: Any = green.switch(*args, **options)
        while not green.dead:
            try:
                outcome = await wanted
            except BaseException as error:
                wanted = green.throw(error)
            else:
                wanted = green.switch(outcome)
        return cast(T, wanted)

    def spawn(self, work: Coroutine[Any, Any, object], name: str) -> asyncio.Task[Any]:
        """Begin something that nobody waits for."""
        task = self.get().create_task(work, name=name)
        _tasks.add(task)
        self._own.add(task)
        task.add_done_callback(_ended)
        return task

    async def settle(self) -> None:
        """End what was spawned."""
        tasks = [each for each in self._own if each is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def wait(self, future: asyncio.Future[bool], seconds: float | None) -> bool:
        """Wait for a future, in a greenlet; False when the time is up."""
        if seconds is None:
            return block(future)
        expiry = self.get().call_later(max(seconds, 0.0), _expire, future)
        try:
            return block(future)
        finally:
            expiry.cancel()

    def future(self) -> asyncio.Future[bool]:
        """Something to wait for."""
        return self.get().create_future()

    def apart(self, function: Callable[[], T]) -> T:
        """Call something in a thread of the loop's default executor; where this is one, here.

        Who is cancelled does not wait for it: it ends by itself, and its result is dropped.
        """
        if self._thread and not self.is_here():
            return function()
        _check_green()  # before it has begun
        return block(self.get().run_in_executor(None, function))

    def apart_to_the_end(self, function: Callable[[], T]) -> T:
        """As ``apart``; when this returns or raises, it has ended, or has not begun and never will.

        For what works under keys, or in memory, that whoever called wipes or gives back on the way out.
        """
        if self._thread and not self.is_here():
            return function()
        _check_green()
        call = _Call(function)
        future = self.get().run_in_executor(None, call)
        try:
            self._until_done(future)
        except asyncio.CancelledError:
            if call.give_up():
                future.cancel()
            else:
                self.outlast([future])
            raise
        except BaseException:
            call.give_up(wait=True)  # the loop has ended, and there is nothing else to wait with
            raise
        return cast(T, future.result())

    def outlast(self, futures: Sequence[asyncio.Future[Any]]) -> None:
        """Wait until all have ended, in a greenlet that may be cancelled meanwhile: it hears of that afterwards."""
        cancelled: asyncio.CancelledError | None = None
        for each in futures:
            while not each.done():
                try:
                    self._until_done(each)
                except asyncio.CancelledError as error:
                    cancelled = error
        if cancelled is not None:
            raise cancelled

    def _until_done(self, future: asyncio.Future[Any]) -> None:
        """Wait for a future, which goes on where who waits is cancelled."""
        ended = self.future()

        def tell(done: asyncio.Future[Any]) -> None:
            if not done.cancelled():
                done.exception()  # else asyncio logs it where who waits was cancelled
            _wake(ended)

        future.add_done_callback(tell)
        block(ended)

    def after_fork(self) -> None:
        """The parent's loop is not the child's."""
        self._loop = None
        self._own = weakref.WeakSet()


def _ended(task: asyncio.Task[Any]) -> None:
    _tasks.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("%s failed", task.get_name(), exc_info=error)


def _expire(future: asyncio.Future[bool]) -> None:
    if not future.done():
        future.set_result(False)


def _wake(future: asyncio.Future[bool]) -> bool:
    """Have who waits for it go on; False where nobody does any more."""
    if future.done():
        return False
    future.set_result(True)
    return True


def _was_woken(future: asyncio.Future[bool]) -> bool:
    return future.done() and not future.cancelled() and future.result()


class GreenLock:
    """As ``waiting.Lock``; who waits longest gets it next."""

    __slots__ = ("_held", "_loop", "_waiters")

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._held = False
        self._waiters: dict[asyncio.Future[bool], None] = {}

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """As ``Lock.acquire``."""
        if not self._held:
            self._held = True
            return True
        if not blocking:
            return False
        future = self._loop.future()
        self._waiters[future] = None
        try:
            return self._loop.wait(future, None if timeout < 0 else timeout)
        except BaseException:
            if _was_woken(future):
                self.release()  # it was handed to us
            raise
        finally:
            self._waiters.pop(future, None)

    def release(self) -> None:
        """As ``Lock.release``."""
        # It stays held, by whoever is woken.
        self._held = any(map(_wake, self._waiters))

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class GreenEvent:
    """As ``waiting.Event``."""

    __slots__ = ("_loop", "_set", "_waiters")

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._set = False
        self._waiters: dict[asyncio.Future[bool], None] = {}

    def is_set(self) -> bool:
        """As ``Event.is_set``."""
        return self._set

    def set(self) -> None:
        """As ``Event.set``; those who wait go on ``TOGETHER`` at a time, so that others have a turn between."""
        self._set = True
        self._wake_some()

    def _wake_some(self) -> None:
        woken = 0
        for each in self._waiters:
            if woken == TOGETHER:
                self._loop.get().call_soon(self._wake_some)
                return
            woken += _wake(each)

    def wait(self, timeout: float | None = None) -> bool:
        """As ``Event.wait``."""
        if self._set:
            return True
        future = self._loop.future()
        self._waiters[future] = None
        try:
            return self._loop.wait(future, timeout)
        finally:
            del self._waiters[future]


class GreenCondition:
    """As ``waiting.Condition``."""

    __slots__ = ("_loop", "_waiters")

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._waiters: dict[asyncio.Future[bool], None] = {}

    def __enter__(self) -> bool:
        return True

    def __exit__(self, *_: object) -> None:
        """Nobody else has run."""

    def wait(self, timeout: float | None = None) -> bool:
        """As ``Condition.wait``."""
        future = self._loop.future()
        self._waiters[future] = None
        try:
            return self._loop.wait(future, timeout)
        except BaseException:
            if _was_woken(future):
                self.notify()  # it was meant for one who goes on
            raise
        finally:
            self._waiters.pop(future, None)

    def notify(self, n: int = 1) -> None:
        """As ``Condition.notify``."""
        for each in self._waiters:
            if n <= 0:
                break
            n -= _wake(each)

    def notify_all(self) -> None:
        """As ``Condition.notify_all``."""
        self.notify(len(self._waiters))


class GreenTimer:
    """As ``waiting.Timer``."""

    __slots__ = ("_handle", "_loop")

    def __init__(self, loop: Loop, seconds: float, call: Callable[[], None]) -> None:
        self._loop = loop
        self._handle = loop.get().call_later(seconds, call)

    def cancel(self) -> None:
        """As ``Timer.cancel``."""
        # An embedded Core tells of a kill on a thread of its own, when the loop may have ended.
        if self._loop.is_here():
            self._handle.cancel()
        else:
            with contextlib.suppress(RuntimeError):
                self._loop_of().call_soon_threadsafe(self._handle.cancel)

    def _loop_of(self) -> asyncio.AbstractEventLoop:
        loop = self._loop._loop
        if loop is None:
            raise RuntimeError("the loop was the parent's")
        return loop


def left_until(until: float | None) -> float | None:
    """Seconds up to a moment of ``time.monotonic``."""
    return None if until is None else until - time.monotonic()


_instances: Final[weakref.WeakSet[Loop]] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    # The parent's tasks stay as they are: to end them here would take from the parent's selector what it waits for.
    for each in list(_instances):
        each.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
