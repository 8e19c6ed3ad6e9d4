# SPDX-License-Identifier: Apache-2.0
"""The watch streams of a Core: every Gateway hears of every change of what it may use, wherever the change was made.

Invariant: what a stream has called its position was told on it, or on the one it continues, before. A position is a
number of the audit chain, which all replicas share and every change has a record in; a stream may thus go on at any
replica. It trails by ``LAG_SECONDS``, so that a change is told twice rather than never.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from ...clock import awake_clock
from ...core import Core
from ...errors import AccessDenied, CoreUnavailable, LimitExceeded, StoreUnavailable
from ...keys import EVERY, Change, Event
from .. import keys_pb2 as pb
from .. import wire
from ..peer import Peer, Shares

logger = logging.getLogger("openkcm.rpc")

HEARTBEAT_SECONDS: Final = 0.25
LAG_SECONDS: Final = 2.0
MOST_WAITING: Final = 10_000
"""Events that wait for a slow peer; one that falls further behind must drop all it holds."""
MOST_IDS: Final = 16_384

OPENINGS: Final = 4
"""Streams that ask the store at a time what they missed: it may not answer, and others need its connections."""
OPENING_SECONDS: Final = 2.0
"""How long others wait for their turn; a Gateway waits no longer for a stream's first word."""


class Subscriber:
    """One stream: what waits to be told on it."""

    def __init__(
        self, streams: Streams, peer: Peer, allows: Callable[[str], bool], woken: Callable[[], None]
    ) -> None:
        self._streams = streams
        self._woken = woken
        self.peer = peer
        self._allows = allows
        self._wake = threading.Condition()
        self._waiting: deque[Event] = deque()
        self._reset = False
        self._closed = False

    def add(self, event: Event) -> None:
        """Have an event told, if the peer may hear of its tenant."""
        if self._allows(event.tenant):
            self.put(event)

    def put(self, event: Event) -> None:
        """Have an event told; one of no tenant is about every tenant that the peer holds keys of."""
        with self._wake:
            if len(self._waiting) >= MOST_WAITING:
                self._waiting.clear()
                self._reset = True
            else:
                self._waiting.append(event)
            self._wake.notify()
        self._woken()

    def reset(self) -> None:
        """Have the peer drop everything it holds."""
        with self._wake:
            self._reset = True
            self._wake.notify()
        self._woken()

    def close(self) -> None:
        """End the stream."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._woken()

    def take(self, seconds: float = HEARTBEAT_SECONDS) -> pb.WatchReply | None:
        """What to send next, after ``seconds`` at the latest; None when the stream has ended."""
        position = self._streams.position()  # before what waits is looked at
        with self._wake:
            if not self._waiting and not self._reset and not self._closed:
                self._wake.wait(seconds)
            if self._closed:
                return None
            events, reset = list(self._waiting), self._reset
            self._waiting.clear()
            self._reset = False
        return pb.WatchReply(
            vault=self._streams.vault_id,
            position=position,
            heartbeat=round(HEARTBEAT_SECONDS * 1000),
            reset=reset,
            events=[_message(event) for event in events],
            clock=self._streams.clock,
            sent=round(awake_clock() * 1000),
        )


class Streams:
    """The streams of one process.

    Args:
        core: whose changes.
        most: streams at a time; more are refused.
        each: streams of one certificate.
    """

    def __init__(self, core: Core, most: int = 1000, each: int = 200) -> None:
        self._core = core
        self._most = most
        self._shares = Shares(each)
        self._lock = threading.Lock()
        self._subscribers: set[Subscriber] = set()
        self._opening = threading.Semaphore(OPENINGS)
        self._closed = False
        self._positions: deque[tuple[float, int]] = deque()
        self.vault_id = core.vault_id
        self.clock = os.urandom(8)
        self._unwatch = core.watch(self._tell)
        self._grants = core.access.changes
        self._telling = threading.Lock()
        core.poll()
        self._told = core.position()

    def open(
        self, peer: Peer, request: pb.WatchRequest, woken: Callable[[], None] = lambda: None
    ) -> Subscriber:
        """Begin a stream, with what the peer missed since its position told first.

        Args:
            peer: whose.
            request: where it left off.
            woken: is called when there is something to take, by whoever does not wait in ``take``.

        Raises:
            AccessDenied: the peer has no grant at all.
            LimitExceeded: there are too many streams, of all or of this peer.
            CoreUnavailable: too many are being begun, or this Core ends.
            StoreUnavailable: what was missed is not known.
        """
        access = self._core.access
        if not access.sees(peer.identity, EVERY):
            raise AccessDenied(wire.REFUSED)

        def allows(tenant: str) -> bool:
            return access.sees(peer.identity, tenant)

        subscriber = Subscriber(self, peer, allows, woken)
        with self._lock:
            if self._closed:
                raise CoreUnavailable("this Core ends; try another")
            if len(self._subscribers) >= self._most:
                raise LimitExceeded("this Core has as many watch streams as it takes; try another")
            if not self._shares.take(peer):
                raise LimitExceeded(
                    "this Core has as many watch streams of one certificate as it takes; try another"
                )
            self._subscribers.add(subscriber)
        try:
            # Only now, being told already of what comes: what came before.
            self._tell_missed(subscriber, request)
        except BaseException:
            self.drop(subscriber)
            raise
        return subscriber

    def drop(self, subscriber: Subscriber) -> None:
        """A stream has ended."""
        with self._lock:
            if subscriber in self._subscribers:
                self._subscribers.discard(subscriber)
                self._shares.give_back(subscriber.peer)

    def close(self) -> None:
        """End every stream, and begin none."""
        self._unwatch()
        with self._lock:
            self._closed = True
            subscribers = list(self._subscribers)
        for each in subscribers:
            each.close()

    def position(self) -> int:
        """Up to which record of the audit chain everything was told."""
        now, latest = time.monotonic(), self._catch_up(self._core.position())
        if (version := self._core.access.changes) != self._grants:
            self._grants = version
            self._renew_all()  # who may hear of what has changed, and somebody may have to let go of keys
        with self._lock:
            positions = self._positions
            if not positions or positions[-1][1] != latest:
                positions.append((now, latest))
            while len(positions) > 1 and positions[1][0] <= now - LAG_SECONDS:
                positions.popleft()
            first = positions[0]
            return first[1] if first[0] <= now - LAG_SECONDS else max(first[1] - 1, 0)

    def _catch_up(self, latest: int) -> int:
        """Tell of other replicas' acts on tenants that this one has no keys of; returns up to where all was told.

        The Core tells of those that are used in its own process. But a Gateway keeps its keys when it changes over from
        another replica, and must hear of a kill here though nobody has asked this one for a key of that tenant.
        """
        if latest == self._told or not self._telling.acquire(blocking=False):
            return self._told
        try:
            latest = self._core.position()  # again: another thread may have told of more meanwhile
            events = self._core.changes_after(self._told, shreds=False) if latest > self._told else None
            with self._lock:
                subscribers = list(self._subscribers)
            for each in subscribers:
                if events is None:
                    each.reset()
                for event in events or ():
                    each.add(event)
            self._told = latest
        except StoreUnavailable as error:
            logger.info("other replicas' acts are told when the store answers: %s", error)
        finally:
            self._telling.release()
        return self._told

    def _renew_all(self) -> None:
        with self._lock:
            subscribers = list(self._subscribers)
        for each in subscribers:
            each.put(Event(Change.ROTATED, ""))

    def _tell_missed(self, subscriber: Subscriber, request: pb.WatchRequest) -> None:
        missed = self._missed(request)
        if missed is None:
            subscriber.reset()
        else:
            for event in missed:
                subscriber.add(event)

    def _missed(self, request: pb.WatchRequest) -> list[Event] | None:
        if not request.vault:
            return []  # a Gateway that holds nothing yet
        if request.vault != self.vault_id:
            return None
        if not self._opening.acquire(timeout=OPENING_SECONDS):
            raise CoreUnavailable("this Core has more watch streams to begin than it can; try another")
        try:
            return self._core.changes_after(request.position)
        finally:
            self._opening.release()

    def _tell(self, event: Event) -> None:
        with self._lock:
            subscribers = list(self._subscribers)
        for each in subscribers:
            each.add(event)


def _message(event: Event) -> pb.ChangeEvent:
    ids = event.key_ids
    if len(ids) > MOST_IDS:
        # Too many to name: the service's keys are to be opened anew.
        return pb.ChangeEvent(change=Change.ROTATED.value, tenant=event.tenant, service_id=event.service_id)
    return pb.ChangeEvent(
        change=event.change.value, tenant=event.tenant, service_id=event.service_id, key_ids=b"".join(ids)
    )
