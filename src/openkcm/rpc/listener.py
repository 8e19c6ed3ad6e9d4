# SPDX-License-Identifier: Apache-2.0
"""A Gateway's end of the watch stream.

Invariant: ``is_heard`` is true only while replies come, the last one no longer ago than three heartbeats. A stream that
broke is taken up where it was, at any address, so that no change is missed; where that cannot be, everything held is
dropped.
"""

from __future__ import annotations

import logging
import random
import threading
import time
import weakref
from collections.abc import Callable
from typing import Final

from ..errors import AccessDenied, OpenKCMError
from ..keys import Change, Event
from ..limits import KEY_ID_BYTES
from . import keys_pb2 as pb
from . import wire
from .endpoint import Endpoint, Endpoints
from .transport import Stream

logger = logging.getLogger("openkcm.rpc")

MISSED_HEARTBEATS: Final = 3
PATIENCE_SECONDS: Final = 2.0
"""How long a stream may be silent before it is given up for another."""
LONGEST_PAUSE_SECONDS: Final = 2.0


class Watcher:
    """Keeps a stream open to one of the addresses, in a thread of its own.

    Args:
        endpoints: where.
        tell: is called for every change, weakly held; its end ends this.
    """

    def __init__(self, endpoints: Endpoints, tell: weakref.WeakMethod[Callable[[Event], None]]) -> None:
        self._endpoints = endpoints
        self._tell = tell
        self._stop = threading.Event()
        self._stream: Stream | None = None
        self._vault = b""
        self._position = 0
        self._heartbeat = 0.25
        self._heard = -1e9
        self._opened = 0.0
        threading.Thread(target=self._run, name="openkcm-watch", daemon=True).start()
        threading.Thread(target=self._guard, name="openkcm-watch-guard", daemon=True).start()

    def is_heard(self) -> bool:
        """Whether the Core was heard in the last three heartbeats."""
        return time.monotonic() - self._heard < MISSED_HEARTBEATS * self._heartbeat

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
            self._stop.wait(pause * random.uniform(0.5, 1.0))

    def _follow(self, endpoint: Endpoint) -> bool:
        """Listen to one address until its stream ends; returns whether anything was heard."""
        heard = False
        try:
            self._opened = time.monotonic()
            request = pb.WatchRequest(vault=self._vault, position=self._position)
            self._stream = endpoint.stream("Watch", request.SerializeToString())
            for data in self._stream:
                heard = True
                if not self._act(wire.parse(pb.WatchReply.FromString, data)):
                    return heard
        except AccessDenied:
            self._reset()
        except OpenKCMError as error:
            logger.info("the watch stream from %s ended: %s", endpoint.address, error)
        except Exception:
            logger.exception("the watch stream from %s failed", endpoint.address)
        finally:
            stream, self._stream = self._stream, None
            if stream is not None:
                stream.cancel()
        return heard

    def _act(self, reply: pb.WatchReply) -> bool:
        """Pass on what a reply tells; False when nobody listens any more."""
        tell = self._tell()
        if tell is None:
            return False
        if reply.reset or (self._vault and reply.vault != self._vault):
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
        self._heard = time.monotonic()
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
            stream = self._stream
            if stream is not None and time.monotonic() - max(self._heard, self._opened) > PATIENCE_SECONDS:
                stream.cancel()
