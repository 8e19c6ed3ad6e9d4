# SPDX-License-Identifier: Apache-2.0
"""A Gateway's end of the watch stream.

Invariant: ``is_heard`` is true only while replies come, the last one sent no longer ago than three heartbeats, by the
clock of who sent it: what a link has held back is as old as it is. A stream that
broke is taken up where it was, at any address, so that no change is missed; where that cannot be, because the Core says
so or because keys were held before the first word came, everything held is dropped.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Final

from ...clock import DICE, awake_clock
from ...errors import AccessDenied, CoreUnavailable, OpenKCMError
from ...keys import Change, Event
from ...limits import KEY_ID_BYTES
from ...waiting import THREADS, Waiting
from .. import keys_pb2 as pb
from .. import wire
from ..credentials import Reading
from ..transport import Stream
from .endpoint import Endpoint, Endpoints

logger = logging.getLogger("openkcm.rpc")

MISSED_HEARTBEATS: Final = 3
PATIENCE_SECONDS: Final = 2.0
"""How long a stream may be silent before it is given up for another."""
LONGEST_PAUSE_SECONDS: Final = 2.0
MOST_DRIFT: Final = 0.001
"""Seconds a second by which two clocks may part: each may be slewed by 500 us (adjtimex(2))."""
MOST_CLOCKS: Final = 16
RETURN_SECONDS: Final = 30.0
"""After how long a stream goes back to an address that is preferred and answers again; its calls go with it."""


class Dates:
    """When replies were sent, on the clock of whoever hears them.

    Two clocks differ by what the fastest reply shows, or less; what came slower than it was sent that much before. A
    link on which nothing was ever faster is not found out.
    """

    def __init__(self) -> None:
        self._differences: dict[bytes, tuple[float, float]] = {}

    def of(self, clock: bytes, sent: float, now: float) -> float:
        """The time ``now`` or before, in seconds of ``awake_clock``; ``sent`` is in seconds of that other clock."""
        if not clock:
            return now
        difference = now - sent
        least, noted = self._differences.pop(clock, (difference, now))
        least = min(difference, least + MOST_DRIFT * (now - noted))
        self._differences[clock] = least, now
        if len(self._differences) > MOST_CLOCKS:
            del self._differences[next(iter(self._differences))]
        return sent + least


class Watcher:
    """Keeps a stream open to one of the addresses, in the background.

    Args:
        endpoints: where.
        tell: is called for every change, weakly held; its end ends this.
        waiting: how it waits.
        late: whether keys may be held from before, of which nobody could tell.

    Raises:
        Unavailable: no thread is to be had for it.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        tell: weakref.WeakMethod[Callable[[Event], None]],
        waiting: Waiting = THREADS,
        late: bool = False,
    ) -> None:
        self._endpoints = endpoints
        self._tell = tell
        self._stop = waiting.event()
        self._stream: Stream | None = None
        self._endpoint: Endpoint | None = None
        self._shown: Reading | None = None
        self._vault = b""
        self._position = 0
        self._heartbeat = 0.25
        self._heard = -1e9
        self._dates = Dates()
        self._opened = 0.0
        self._late = late
        self._returning = False
        self._spoken = waiting.event()
        waiting.spawn(self._guard, "openkcm-watch-guard")
        try:
            waiting.spawn(self._run, "openkcm-watch")
        except BaseException:
            self.stop()
            raise

    def is_heard(self) -> bool:
        """Whether the Core was heard in the last three heartbeats."""
        return awake_clock() - self._heard < MISSED_HEARTBEATS * self._heartbeat

    @property
    def spoken(self) -> bool:
        """Whether the first word came, or did not come from the first address that was asked for it."""
        return self._spoken.is_set()

    def wait(self, seconds: float) -> None:
        """Wait until ``spoken``; where that takes too long, keys are used without, and dropped at the first word."""
        if not self._spoken.wait(seconds):
            self._late = True

    def stop(self) -> None:
        """End the stream."""
        self._stop.set()
        stream = self._stream
        if stream is not None:
            stream.cancel()

    # ---- inside --------------------------------------------------------------------------------------

    def _run(self) -> None:
        failures = 0
        while not self._stop.is_set() and self._tell() is not None:
            for endpoint in self._endpoints.in_order():
                if self._stop.is_set():
                    return
                if self._follow(endpoint):
                    failures = 0
            failures += 1
            pause = min(0.05 * 2**failures, LONGEST_PAUSE_SECONDS)
            self._stop.wait(pause * DICE.uniform(0.5, 1.0))

    def _follow(self, endpoint: Endpoint) -> bool:
        """Listen to one address until its stream ends; returns whether anything was heard."""
        heard = False
        self._returning = False
        try:
            self._opened = awake_clock()
            self._endpoint, self._shown = endpoint, endpoint.own.now()
            request = pb.WatchRequest(vault=self._vault, position=self._position)
            self._stream = endpoint.stream("Watch", request.SerializeToString())
            for data in self._stream:
                heard = True
                self._endpoints.heard = endpoint
                if not self._act(wire.parse(pb.WatchReply.FromString, data)):
                    return heard
        except AccessDenied:
            if endpoint.own.look() is self._shown:  # else it is the old certificate that was refused
                self._reset()
        except CoreUnavailable as error:
            if not self._returning:
                self._endpoints.failed(endpoint)
            logger.info("the watch stream from %s ended: %s", endpoint.address, error)
        except OpenKCMError as error:
            logger.info("the watch stream from %s ended: %s", endpoint.address, error)
        except Exception:
            logger.exception("the watch stream from %s failed", endpoint.address)
        finally:
            self._endpoints.heard = None
            self._late = self._late or not self._vault
            self._spoken.set()
            stream, self._stream = self._stream, None
            if stream is not None:
                stream.cancel()
        return heard

    def _act(self, reply: pb.WatchReply) -> bool:
        """Pass on what a reply tells; False when nobody listens any more."""
        arrived, tell = awake_clock(), self._tell()
        if tell is None:
            return False
        if reply.reset or (reply.vault != self._vault if self._vault else self._late):
            tell(Event(Change.DARK, ""))
        for each in reply.events:
            ids = each.key_ids
            key_ids = tuple(ids[at : at + KEY_ID_BYTES] for at in range(0, len(ids), KEY_ID_BYTES))
            tell(Event(Change(each.change), each.tenant, each.service_id, key_ids))
        same = reply.vault == self._vault
        self._position = max(self._position, reply.position) if same else reply.position
        self._vault = reply.vault
        self._heartbeat = min(max(reply.heartbeat / 1000, 0.05), 10.0)
        # Only now: what a reply tells was acted on before anything relies on having heard it.
        self._heard = self._dates.of(reply.clock, reply.sent / 1000, arrived)
        self._spoken.set()
        return not self._stop.is_set()

    def _reset(self) -> None:
        tell = self._tell()
        if tell is not None:
            tell(Event(Change.DARK, ""))

    def _guard(self) -> None:
        """Give up a stream that is silent, which its reader cannot notice."""
        while not self._stop.wait(self._heartbeat):
            if self._tell() is None:
                self.stop()
                return
            stream, now = self._stream, awake_clock()
            if stream is None:
                continue
            if now - max(self._heard, self._opened) > PATIENCE_SECONDS:
                stream.cancel()  # which its reader takes for an outage
            elif self._is_renewed() or (now - self._opened > RETURN_SECONDS and self._may_return()):
                self._returning = True
                stream.cancel()

    def _is_renewed(self) -> bool:
        """Whether the stream shows a certificate that was replaced, which may end before the stream does."""
        endpoint = self._endpoint
        return endpoint is not None and endpoint.own.now() is not self._shown

    def _may_return(self) -> bool:
        heard = self._endpoints.heard
        return heard is not None and not self._endpoints.is_best(heard)
