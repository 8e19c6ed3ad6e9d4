# SPDX-License-Identifier: Apache-2.0
"""Asking a root again when it did not answer, within bounds.

Invariant: only what may succeed without anybody changing anything is tried again: ``RootUnavailable`` that calls itself
retryable. One tenant's call makes at most ``ATTEMPTS`` attempts and starts none after ``DEADLINE_SECONDS``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

from ..errors import OpenKCMError, RootUnavailable

P = ParamSpec("P")
T = TypeVar("T")

ATTEMPTS: Final = 3
DEADLINE_SECONDS: Final = 2.0
FIRST_PAUSE_SECONDS: Final = 0.05
LONGEST_PAUSE_SECONDS: Final = 0.5


def patiently(call: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Call, and call again after a pause with full jitter where the root did not answer."""
    started = time.monotonic()
    try:
        return call(*arguments, **options)
    except RootUnavailable as error:
        left = started + DEADLINE_SECONDS - time.monotonic()
        if not error.retryable or left <= 0:
            raise
    # Only now: most calls succeed at once, and a probe should cost little.
    from tenacity import (
        Retrying,
        retry_if_exception,
        stop_after_attempt,
        stop_after_delay,
        wait_random_exponential,
    )

    again = Retrying(
        retry=retry_if_exception(_may_pass),
        stop=stop_after_attempt(ATTEMPTS - 1) | stop_after_delay(left),
        wait=wait_random_exponential(multiplier=FIRST_PAUSE_SECONDS, max=LONGEST_PAUSE_SECONDS),
        reraise=True,
    )
    return again(call, *arguments, **options)


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, OpenKCMError) and isinstance(error, RootUnavailable) and error.retryable
