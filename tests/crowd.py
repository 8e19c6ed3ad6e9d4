# SPDX-License-Identifier: Apache-2.0
"""Threads that begin at one moment and get in each other's way as often as they can."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import TypeAlias

Going: TypeAlias = Callable[[], bool]
"""Asked before each round: whether to go on."""

SWITCH_SECONDS = 1e-5
"""With a GIL threads take turns; this often."""


def crowd(works: Sequence[Callable[[Going], None]], rounds: int) -> None:
    """Do all of it side by side until each was asked so many times; the first error of any is raised."""
    wrong: list[BaseException] = []
    start = threading.Barrier(len(works))
    left = [rounds] * len(works)

    def body(number: int, work: Callable[[Going], None]) -> None:
        def going() -> bool:
            left[number] -= 1
            return not wrong and any(each > 0 for each in left)

        try:
            start.wait(60)
            work(going)
        except BaseException as error:
            wrong.append(error)
        finally:
            left[number] = 0

    threads = [threading.Thread(target=body, args=each, daemon=True) for each in enumerate(works)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(240)
    finally:
        sys.setswitchinterval(before)
    assert not any(thread.is_alive() for thread in threads)
    if wrong:
        raise wrong[0]
