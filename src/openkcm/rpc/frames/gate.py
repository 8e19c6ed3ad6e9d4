# SPDX-License-Identifier: Apache-2.0
"""What the frame server takes: how many requests are carried out at a time, and how many wait.

Invariant: at most ``threads`` are under way; whoever finishes one goes on with the one that has waited the longest;
what waits has a bound in number and in bytes, and what is above it is turned away at once.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

from .format import Frame

C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a server takes: counts, those of one peer among them, bytes, and seconds."""

    connections: int = 5000
    peer_connections: int = 1000
    handshakes: int = 512
    threads: int = 16
    waiting: int = 256
    waiting_bytes: int = 64 * 2**20
    held_bytes: int = 256 * 2**20
    handshake_seconds: float = 5.0
    frame_seconds: float = 10.0


class Gate(Generic[C]):
    """Lets requests through.

    Args:
        threads: requests under way.
        waiting: requests that wait.
        waiting_bytes: the bytes of those.
    """

    def __init__(self, threads: int, waiting: int, waiting_bytes: int) -> None:
        self._threads = threads
        self._most = waiting
        self._most_bytes = waiting_bytes
        self._lock = threading.Lock()
        self._running = 0
        self._bytes = 0
        self._queue: deque[tuple[C, Frame]] = deque()

    def enter(self, connection: C, frame: Frame) -> bool | None:
        """True: carry it out, and call ``done`` then. False: it waits, and ``done`` gives it to somebody. None: no."""
        with self._lock:
            if self._running < self._threads:
                self._running += 1
                return True
            size = len(frame.payload)
            if len(self._queue) >= self._most or self._bytes + size > self._most_bytes:
                return None
            self._queue.append((connection, frame))
            self._bytes += size
            return False

    def done(self) -> tuple[C, Frame] | None:
        """One was carried out; the caller goes on with what this returns."""
        with self._lock:
            if not self._queue:
                self._running -= 1
                return None
            following = self._queue.popleft()
            self._bytes -= len(following[1].payload)
            return following

    def is_busy(self) -> bool:
        """Whether anything is under way or waits."""
        return self._running > 0
