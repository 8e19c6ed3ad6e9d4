# SPDX-License-Identifier: Apache-2.0
"""The two clocks: one that only grows, for how long; one that people read, for when."""

from __future__ import annotations

import time
from datetime import UTC, datetime


def awake_clock() -> float:
    """Seconds that only ever grow, also while the machine is suspended, where the system has such a clock.

    Key time must not stand still in a suspended machine: what it was told an hour ago is an hour old.
    """
    return time.clock_gettime(time.CLOCK_BOOTTIME)


if not hasattr(time, "CLOCK_BOOTTIME"):  # not Linux
    awake_clock = time.monotonic


def utc_now() -> str:
    """The time as the store keeps it: ISO 8601, UTC, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
