# SPDX-License-Identifier: Apache-2.0
"""How a Gateway and a remote Core wait: for each other's locks, for time, and for the network.

Invariant: all waiting that lasts longer than a few instructions goes through here. A lock that is not made here is
never held across a call, so that whoever waits otherwise (``openkcm.aio``) can have the same code wait its way.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Protocol, TypeVar

from .errors import Unavailable
from .hands import HANDS

F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S")


class Lock(Protocol):
    """As ``threading.Lock``; may be held across a call."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take it; False when the time is up."""

    def release(self) -> None:
        """Give it back."""

    def __enter__(self) -> bool:
        """Take it."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        """Give it back."""


class Event(Protocol):
    """As ``threading.Event``."""

    def is_set(self) -> bool:
        """Whether it was set."""

    def set(self) -> None:
        """Have all who wait go on."""

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set; False when the time is up."""


class Condition(Protocol):
    """As ``threading.Condition``; held for a few instructions only, save for ``wait``."""

    def __enter__(self) -> bool:
        """Take its lock."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        """Give its lock back."""

    def wait(self, timeout: float | None = None) -> bool:
        """Let go of it until notified; False when the time is up."""

    def notify(self, n: int = 1) -> None:
        """Have one who waits go on."""

    def notify_all(self) -> None:
        """Have all who wait go on."""


class Timer(Protocol):
    """A call that is to come."""

    def cancel(self) -> None:
        """Have it not come. From any thread."""


class Waiting(Protocol):
    """A way to wait."""

    def lock(self) -> Lock:
        """A lock that may be held across a call."""

    def event(self) -> Event:
        """An event."""

    def condition(self) -> Condition:
        """A condition."""

    def sleep(self, seconds: float) -> None:
        """Wait for so long."""

    def spawn(self, work: Callable[[], object], name: str) -> None:
        """Begin something that nobody waits for; raises Unavailable where no thread is to be had."""

    def timer(self, seconds: float, call: Callable[[], None]) -> Timer:
        """Have something called, which does not wait itself, in so many seconds; raises as ``spawn``."""

    def together(self, count: int, work: Callable[[], None]) -> None:
        """Call ``work`` up to so many times side by side, here for one; all have ended when this returns or raises."""

    def connect(self, host: str, port: int, seconds: float) -> socket.socket:
        """A TCP connection; OSError (TimeoutError after so many seconds) where there is none to be had."""

    def secure(
        self, context: ssl.SSLContext, plain: socket.socket, server_name: str, seconds: float
    ) -> ssl.SSLSocket:
        """TLS over a connection, which is used up; raises as ``wrap_socket`` does, TimeoutError when the time is up."""

    def heavy(self, function: F, at: int) -> F:
        """A function that works for long where its positional argument ``at``, bytes or a list of them, is large."""

    def heavy_rows(self, function: F) -> F:
        """As ``heavy`` for a function that works on a run of a column, whose cells are its second argument."""

    def apart(self, function: F) -> F:
        """A function that works for long, or waits for what does not wait this way."""

    def store(self, store: S) -> S:
        """A key store, whose methods wait for a database in ways of their own."""


class Threads:
    """Each caller has a thread, and it waits."""

    def lock(self) -> Lock:
        """As ``Waiting``."""
        return threading.Lock()

    def event(self) -> Event:
        """As ``Waiting``."""
        return threading.Event()

    def condition(self) -> Condition:
        """As ``Waiting``."""
        return threading.Condition(threading.Lock())

    def sleep(self, seconds: float) -> None:
        """As ``Waiting``."""
        time.sleep(seconds)

    def spawn(self, work: Callable[[], object], name: str) -> None:
        """As ``Waiting``."""
        _start(threading.Thread(target=work, name=name, daemon=True))

    def timer(self, seconds: float, call: Callable[[], None]) -> Timer:
        """As ``Waiting``."""
        timer = threading.Timer(seconds, call)
        timer.name, timer.daemon = "openkcm-timer", True
        _start(timer)
        return timer

    def together(self, count: int, work: Callable[[], None]) -> None:
        """As ``Waiting``; fewer times where no more threads are to be had."""
        HANDS.together(count, work)

    def connect(self, host: str, port: int, seconds: float) -> socket.socket:
        """As ``Waiting``."""
        return socket.create_connection((host, port), seconds)

    def secure(
        self, context: ssl.SSLContext, plain: socket.socket, server_name: str, seconds: float
    ) -> ssl.SSLSocket:
        """As ``Waiting``."""
        plain.settimeout(seconds)
        return context.wrap_socket(plain, server_hostname=server_name)

    def heavy(self, function: F, at: int) -> F:
        """As ``Waiting``: the function itself, so that nothing is added to what it costs."""
        return function

    def heavy_rows(self, function: F) -> F:
        """As ``heavy``."""
        return function

    def apart(self, function: F) -> F:
        """As ``heavy``."""
        return function

    def store(self, store: S) -> S:
        """As ``heavy``."""
        return store


def _start(thread: threading.Thread) -> None:
    try:
        thread.start()
    except RuntimeError:
        raise Unavailable(
            "no thread can be started; raise this process's limits on threads and memory"
        ) from None


THREADS: Final = Threads()


def waiting_of(core: object) -> Waiting:
    """How a Core's callers wait: in threads, unless it says otherwise."""
    found: Waiting = getattr(core, "waiting", THREADS)
    return found
