# SPDX-License-Identifier: Apache-2.0
"""``openkcm.waiting`` for an event loop.

Invariant: the loop's thread does no work that takes longer than about a millisecond for its size alone: what is larger
than ``HEAVY_BYTES`` goes to a thread of the loop's executor, and so does all that waits for a database or a file.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, Final, TypeVar, cast

from .. import waiting
from ..errors import CoreUnavailable
from ..gateway.keystore import NoKeyStore
from .green import GreenCondition, GreenEvent, GreenLock, GreenTimer, Loop
from .sockets import connect, secure

F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S")

HEAVY_BYTES: Final = 1024 * 1024
"""From here on a batch, a column or a record is worked on in the loop's executor: some 0.3 ms of AES-GCM."""

RECORD_BYTES: Final = 512
"""As how many bytes a record counts beside its own: what it costs to change the key."""


def is_heavy(data: Any) -> bool:
    """Whether bytes, or a list of them, take long to work on."""
    if type(data) is bytes:
        return len(data) > HEAVY_BYTES
    if not isinstance(data, list):
        try:
            return memoryview(data).nbytes > HEAVY_BYTES
        except (TypeError, ValueError, BufferError):
            return False  # it is nothing that can be worked on, which is soon said
    size = len(data) * RECORD_BYTES
    if size <= HEAVY_BYTES:
        try:
            size += sum(map(len, data))
        except (TypeError, ValueError):
            return False
    return size > HEAVY_BYTES


class Green:
    """Each caller has a greenlet, and its event loop waits (``openkcm.waiting.Waiting``)."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def lock(self) -> waiting.Lock:
        """As ``Waiting``."""
        return GreenLock(self.loop)

    def event(self) -> waiting.Event:
        """As ``Waiting``."""
        return GreenEvent(self.loop)

    def condition(self) -> waiting.Condition:
        """As ``Waiting``."""
        return GreenCondition(self.loop)

    def sleep(self, seconds: float) -> None:
        """As ``Waiting``."""
        self.loop.wait(self.loop.future(), seconds)

    def spawn(self, work: Callable[[], object], name: str) -> None:
        """As ``Waiting``."""
        self.loop.spawn(self.loop.run(work), name)

    def timer(self, seconds: float, call: Callable[[], None]) -> waiting.Timer:
        """As ``Waiting``."""
        return GreenTimer(self.loop, seconds, call)

    def together(self, count: int, work: Callable[[], None]) -> None:
        """As ``Waiting``."""
        others = [
            self.loop.spawn(self.loop.run(work), f"openkcm-hand-{number}") for number in range(1, count)
        ]
        try:
            work()
        finally:
            self.loop.outlast(others)
        if any(each.cancelled() for each in others):
            # By the Core's close, which ends what was spawned; what was theirs to do may not have been done.
            raise CoreUnavailable("this Core was closed while it was worked on", retryable=False)

    def connect(self, host: str, port: int, seconds: float) -> socket.socket:
        """As ``Waiting``."""
        return connect(self.loop, host, port, seconds)

    def secure(
        self, context: ssl.SSLContext, plain: socket.socket, server_name: str, seconds: float
    ) -> ssl.SSLSocket:
        """As ``Waiting``."""
        return secure(self.loop, context, plain, server_name, seconds)

    def heavy(self, function: F, at: int) -> F:
        """As ``Waiting``."""

        @wraps(function)
        def call(*args: Any) -> Any:
            if is_heavy(args[at]):
                return self.loop.apart_to_the_end(partial(function, *args))
            return function(*args)

        return cast(F, call)

    def heavy_rows(self, function: F) -> F:
        """As ``Waiting``."""

        @wraps(function)
        def call(*args: Any) -> Any:
            cells = args[1]
            if cells.total + cells.count * RECORD_BYTES > HEAVY_BYTES:
                return self.loop.apart_to_the_end(partial(function, *args))
            return function(*args)

        return cast(F, call)

    def apart(self, function: F) -> F:
        """As ``Waiting``."""

        @wraps(function)
        def call(*args: Any) -> Any:
            return self.loop.apart(partial(function, *args))

        return cast(F, call)

    def store(self, store: S) -> S:
        """As ``Waiting``."""
        return cast(S, store if isinstance(store, NoKeyStore) else _StoreApart(self, store))


class _StoreApart:
    """A key store whose methods are called in the loop's executor."""

    def __init__(self, waiting: Green, store: Any) -> None:
        self.salt = store.salt
        self.forget = store.forget  # in a forked child, where there is no loop
        for name in _METHODS:
            setattr(self, name, waiting.apart(getattr(store, name)))


_METHODS: Final = (
    *("find_subjects", "find_ids", "add", "rewrap", "remove", "bury", "buried"),
    *("pending", "delivered", "scan", "count", "close"),
)
