# SPDX-License-Identifier: Apache-2.0
"""Large batches with a Core that is far away: while one part waits for the Core, another is worked on here.

Invariant: results stand where their inputs stood, and the error of the first part that failed is raised when no part is
under way any more. With a Core in this process, and for an event loop, parts come one after the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import chain
from typing import Any, Final, TypeAlias

from ..keys import KeyService
from ..waiting import THREADS, waiting_of
from .batches import chunks

SIDE_BY_SIDE: Final = 3
"""Parts under way: one at the Core, one here, and one on the way."""

LEAST: Final = 3000
"""Records from which a batch is cut for this: below, the calls cost more than the waiting."""

Act: TypeAlias = Callable[[int, int], list[Any]]


class Overlap:
    """Works on the parts of batches."""

    def __init__(self, core: KeyService) -> None:
        waiting = waiting_of(core)
        self._together = waiting.together if core.far and waiting is THREADS else None

    def run(self, items: list[Any], act: Act) -> list[Any]:
        """Have ``act`` work on slices (start, stop) of a batch; what it gives, in their order."""
        parts = chunks(items)
        if self._together is None or len(items) < LEAST:
            if len(parts) == 1:
                return act(*parts[0])
            return list(chain.from_iterable([act(*part) for part in parts]))
        if len(parts) < SIDE_BY_SIDE:
            step = -(-len(items) // SIDE_BY_SIDE)
            parts = [(at, min(at + step, len(items))) for at in range(0, len(items), step)]
        return self._side_by_side(parts, act)

    def _side_by_side(self, parts: list[tuple[int, int]], act: Act) -> list[Any]:
        assert self._together is not None
        results: list[list[Any]] = [[] for _ in parts]
        failed: dict[int, BaseException] = {}
        left = iter(enumerate(parts))
        lock = threading.Lock()

        def work() -> None:
            while not failed:
                with lock:
                    at, part = next(left, (-1, (0, 0)))
                if at < 0:
                    return
                try:
                    results[at] = act(*part)
                except Exception as error:
                    failed[at] = error

        self._together(SIDE_BY_SIDE, work)
        if failed:
            raise failed[min(failed)]
        return list(chain.from_iterable(results))
