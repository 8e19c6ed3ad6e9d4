# SPDX-License-Identifier: Apache-2.0
"""Single keys that many threads want opened at the same time, in one call.

Invariant: nobody waits who could be asking: up to ``UNDERWAY`` calls of a service are under way at a time, and only
what comes then is joined into the call that follows. Each caller gets a handle of its own on its key, and its own
failure; whoever is interrupted in a call leaves it to those who had joined it. Who asks for an inline key that a call
under way is opening shares its answer, which is thus at most a call's time old. For a stored key that is not good
enough, since no record may be encrypted under a key whose shredding was acknowledged before: that waits for the next
call. What is kept between calls is bounded, whatever the records say that come.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, NamedTuple, TypeAlias

from ...errors import CoreUnavailable, InternalError, OpenKCMError
from ...keys import Kind, OpenedKeys, Service, WrappedKeys
from ...limits import MAX_KEYS_PER_CALL, WRAPPED_KEY_BYTES
from ...waiting import THREADS, Waiting

UNDERWAY: Final = 2
"""Calls of one service, kind and version at a time."""

MOST_LANES: Final = 64
"""From so many on, those that nobody is in are let go: a version is four bytes of a record that nobody vouched for."""

Ask: TypeAlias = Callable[[Service, WrappedKeys, float], OpenedKeys]
"""Opens keys; the answer is of use until a moment of ``time.monotonic``."""


class _Batch:
    """Keys opened in one call by the thread that began it; all but ``done`` and ``go`` are under its lane's lock."""

    __slots__ = ("answer", "done", "error", "go", "positions", "takers")

    def __init__(self, waiting: Waiting) -> None:
        self.positions: dict[bytes, int] = {}
        self.takers = 0
        self.go = waiting.event()
        self.done = waiting.event()
        self.answer: OpenedKeys | None = None
        self.error: BaseException | None = None

    def add(self, key: bytes) -> None:
        """Have one more caller wait for a key (wrapped, and its id)."""
        self.takers += 1
        self.positions.setdefault(key, len(self.positions))

    def packed(self, kind: Kind, version: int) -> WrappedKeys:
        """All its keys."""
        keys = list(self.positions)
        wrapped = b"".join([key[:WRAPPED_KEY_BYTES] for key in keys])
        return WrappedKeys(kind, version, wrapped, b"".join([key[WRAPPED_KEY_BYTES:] for key in keys]))


class _Place(NamedTuple):
    service_id: bytes
    kind: Kind
    version: int


class _Lane:
    """The calls of one service, kind and version."""

    def __init__(self, place: _Place, most: int, waiting: Waiting) -> None:
        self.place = place
        self._wait = waiting
        self._most = most
        self._lock = threading.Lock()
        self._underway = 0
        self._waiting: _Batch | None = None
        self._flying: dict[bytes, _Batch] = {}
        self._closed = False

    def close(self) -> bool:
        """Let nobody in any more; False, and no more than that, where somebody is under way or waits."""
        with self._lock:
            self._closed = not self._underway and self._waiting is None
            return self._closed

    def board(self, key: bytes) -> tuple[_Batch, bool] | None:
        """The batch that a key is opened in, and whether the caller makes its call; None where it is closed."""
        with self._lock:
            if self._closed:
                return None
            batch = self._flying.get(key) or self._waiting
            leads = False
            if key not in self._flying and (self._underway < self._most or _is_full(batch)):
                batch, leads = _Batch(self._wait), True
                batch.add(key)
                self._underway += 1
                self._depart(batch)
                return batch, True
            if batch is None:
                batch, leads = _Batch(self._wait), True
                self._waiting = batch
            batch.add(key)
            return batch, leads

    def _depart(self, batch: _Batch) -> None:
        """From now on nobody boards, except for an inline key that is on it."""
        if not self.place.kind.stored:
            self._flying.update(dict.fromkeys(batch.positions, batch))
        batch.go.set()

    def arrive(self, batch: _Batch) -> None:
        """A batch has its answer, or its error; the next one goes."""
        with self._lock:
            for key in batch.positions:
                if self._flying.get(key) is batch:
                    del self._flying[key]
            following, self._waiting = self._waiting, None
            if following is not None and following is not batch:
                self._depart(following)  # in its place among those under way
            elif batch.go.is_set():
                self._underway -= 1
        batch.done.set()

    def take(self, batch: _Batch, key: bytes) -> OpenedKeys:
        """One caller's part of what came; the last one gets, or wipes, what is left."""
        if batch.answer is None:
            raise _told(batch.error)
        keys, failures, lease = batch.answer
        position = batch.positions[key]
        with self._lock:
            if batch.takers == 1 and len(batch.positions) == 1:
                return batch.answer
        own = keys.select([position])
        self.leave(batch)
        error = failures.get(position)
        return own, {} if error is None else {0: _copied(error)}, lease

    def leave(self, batch: _Batch) -> None:
        """A caller has its part, or does not wait for it any more."""
        with self._lock:
            batch.takers -= 1
            last = not batch.takers
        if last and batch.answer is not None:
            batch.answer[0].wipe()


class Joined:
    """Opens single keys.

    Args:
        ask: makes a call.
        most: calls of a service that may be under way before others are joined.
        waiting: how callers wait for each other's calls.
    """

    def __init__(self, ask: Ask, most: int = UNDERWAY, waiting: Waiting = THREADS) -> None:
        self._waiting = waiting
        self._ask = ask
        self._most = most
        self._lanes: dict[_Place, _Lane] = {}
        self._making = threading.Lock()

    def unwrap(self, service: Service, wrapped: WrappedKeys, end: float) -> OpenedKeys:
        """Open one key; see ``KeyService.unwrap_keys``.

        Args:
            end: until when an answer is of use, on ``time.monotonic``.
        """
        place = _Place(service.service_id, wrapped.kind, wrapped.version)
        key = wrapped.wrapped + wrapped.ids
        while True:
            lane = self._lanes.get(place) or self._make(place)
            while (boarded := lane.board(key)) is None:
                lane = self._make(place)  # it was closed between look and use
            batch, leads = boarded
            try:
                if leads:
                    self._lead(lane, batch, service, end)
                elif not batch.done.wait(max(end - time.monotonic(), 0.0)):
                    raise CoreUnavailable("the Core did not answer in time")
            except BaseException:
                lane.leave(batch)
                raise
            if batch.error is None or isinstance(batch.error, Exception):
                return lane.take(batch, key)
            # Who made the call was interrupted in it, which is nobody else's concern: one of us makes it again.
            lane.leave(batch)

    def _make(self, place: _Place) -> _Lane:
        """The lane of a place, which is made where there is none."""
        with self._making:
            lane = self._lanes.get(place)
            if lane is None:
                if len(self._lanes) >= MOST_LANES:
                    self._lanes = {at: each for at, each in self._lanes.items() if not each.close()}
                lane = self._lanes[place] = _Lane(place, self._most, self._waiting)
            return lane

    def _lead(self, lane: _Lane, batch: _Batch, service: Service, end: float) -> None:
        """Make a batch's call when it is its turn, and let the next go; the error is for all who wait."""
        try:
            # Those under way began before this, and so end before it.
            if not batch.go.wait(max(end - time.monotonic(), 0.0)):
                raise CoreUnavailable("the Core did not answer in time")
            batch.answer = self._ask(service, batch.packed(lane.place.kind, lane.place.version), end)
        except BaseException as error:
            batch.error = error
            raise
        finally:
            lane.arrive(batch)


def _is_full(batch: _Batch | None) -> bool:
    return batch is not None and len(batch.positions) >= MAX_KEYS_PER_CALL


def _told(error: BaseException | None) -> OpenKCMError:
    """What those are told who waited for another's call."""
    if isinstance(error, OpenKCMError):
        return _copied(error)
    return InternalError()


def _copied(error: OpenKCMError) -> OpenKCMError:
    """An error object of the caller's own: it is given an index, and a traceback."""
    return type(error)(str(error), retryable=error.retryable)
