# SPDX-License-Identifier: Apache-2.0
"""The two clocks: one that only grows, for how long; one that people read, for when. And dice, which spread moments."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Final

# On the path of every use of a key: bound in C, which costs half of what a function of ours would.
awake_clock: Callable[[], float] = (
    partial(time.clock_gettime, time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic
)
"""Seconds that only ever grow, also while the machine is suspended, where the system has such a clock (Linux).

Key time must not stand still in a suspended machine: what it was told an hour ago is an hour old.
"""


DICE: Final = random.SystemRandom()
"""For jitter. Not the generator of the module ``random``: whoever seeded that one wants its numbers to himself."""


def utc_now() -> str:
    """The time as the store keeps it: ISO 8601, UTC, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
