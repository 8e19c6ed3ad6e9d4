# SPDX-License-Identifier: Apache-2.0
"""Things that are known as long as somebody else has them.

Invariant: asking who is there never fails, whatever other threads make or let go of meanwhile. A ``WeakSet`` is not to
be had for that: without a GIL one that lost a member while it was gone through raises, and a kill would not arrive.
"""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

T = TypeVar("T")


class Alive(Generic[T]):
    """Objects that it does not keep; safe for threads, each step being one of the interpreter's own."""

    def __init__(self) -> None:
        self._references: set[weakref.ref[T]] = set()

    def add(self, thing: T) -> None:
        """Know one more."""
        self._references.add(weakref.ref(thing, self._references.discard))

    def all(self) -> list[T]:
        """Those that are there now."""
        return [thing for each in list(self._references) if (thing := each()) is not None]
