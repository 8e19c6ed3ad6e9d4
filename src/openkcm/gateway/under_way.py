# SPDX-License-Identifier: Apache-2.0
"""Keys that are held open for longer than a call of the Core: by columns and streams that are under way.

Invariant: a kill, and a shred of one of their keys, wipes them, whatever is being done with them; also where it came
between the opening of the keys and their being held, for whoever opens keys takes ``now`` before that.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple, Protocol

from ..crypto import IdSet
from ..errors import CoreUnavailable, OpenKCMError, SecretMemoryError, TenantDark

_REMEMBERED: Final = 256
"""Shreds that are looked through for those since ``now``; where there were more, keys are wiped to be safe."""


class Moment(NamedTuple):
    """How many kills and shreds there were."""

    kills: int
    shreds: int


class Wipeable(Protocol):
    """What holds keys."""

    def wipe(self) -> None:
        """Zero them."""


class ShreddedError(Exception):
    """One of the keys was shredded while it was used."""


class UnderWay:
    """What is under way in one service."""

    def __init__(self, tenant: str) -> None:
        self._tenant = tenant
        self.after_fork()

    def after_fork(self) -> None:
        """Start with nothing: what is under way is the parent's."""
        self._lock = threading.Lock()
        self._kills = self._shreds = 0
        self._closed = False
        self._held: dict[int, tuple[Wipeable, bytes]] = {}
        self._shredded: set[int] = set()
        self._forgotten: deque[bytes] = deque(maxlen=_REMEMBERED)

    def now(self) -> Moment:
        """To be taken before keys are opened."""
        with self._lock:
            return Moment(self._kills, self._shreds)

    @contextmanager
    def holding(self, things: Sequence[Wipeable], ids: bytes, since: Moment) -> Iterator[None]:
        """Keep what holds keys within reach of ``wipe`` and ``forget`` while it is used; it is wiped at the end.

        Args:
            things: each of which holds some or all of the keys.
            ids: the packed ids of those keys that have one.
            since: the moment before the keys were opened.

        Raises:
            TenantDark: they were wiped by a kill.
            CoreUnavailable: they were wiped as the Gateway was closed.
            ShreddedError: they were wiped because one of them was shredded.
        """
        with self._lock:
            self._held.update((id(each), (each, ids)) for each in things)
            if self._shreds != since.shreds and self._met(ids, self._shreds - since.shreds):
                self._shredded.update(map(id, things))
            lost = since.kills != self._kills or not self._shredded.isdisjoint(map(id, things))
        try:
            if lost:
                _wipe(things)
            yield
        except SecretMemoryError:
            if since.kills != self._kills:
                raise self._stopped() from None
            if not self._shredded.isdisjoint(map(id, things)):
                raise ShreddedError from None
            raise
        finally:
            with self._lock:
                for each in things:
                    del self._held[id(each)]
                    self._shredded.discard(id(each))
            _wipe(things)

    def _stopped(self) -> OpenKCMError:
        if self._closed:
            return CoreUnavailable(
                "this Gateway was closed while keys were used; what was under way was stopped",
                retryable=False,
            )
        return TenantDark(
            f"the tenant {self._tenant} went dark while its keys were used; what was under way was stopped"
        )

    def wipe(self, closed: bool = False) -> None:
        """A kill, or the Gateway's end if it is ``closed``: zero every key that is held."""
        with self._lock:
            self._kills += 1
            self._closed = self._closed or closed
            things = [thing for thing, _ in self._held.values()]
        _wipe(things)

    def forget(self, ids: frozenset[bytes]) -> None:
        """A shred: zero whatever holds one of these keys."""
        packed = b"".join(ids)
        with self._lock:
            self._shreds += 1
            self._forgotten.append(packed)
            things = [thing for thing, own in self._held.values() if IdSet(own).positions(packed)]
            self._shredded.update(map(id, things))  # before they are wiped: who meets that knows why
        _wipe(things)

    def _met(self, ids: bytes, shreds: int) -> bool:
        """Whether one of the last shreds was of one of these keys, as far as that is known."""
        if not ids:
            return False
        own = IdSet(ids)
        recent = list(self._forgotten)[-shreds:]
        return shreds > len(recent) or any(own.positions(each) for each in recent)


def _wipe(things: Sequence[Wipeable]) -> None:
    for each in things:
        each.wipe()
