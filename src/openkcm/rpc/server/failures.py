# SPDX-License-Identifier: Apache-2.0
"""The calls under way, and the log of those that failed.

Invariant: a line names who called what, how it ended and how long it took, and nothing of what was in the call; there
are at most ``LINES_A_SECOND`` of them, and the next says how many were left out.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any, Final, Protocol

from ...errors import OpenKCMError
from ..peer import Peer

logger = logging.getLogger("openkcm.rpc.calls")

LINES_A_SECOND: Final = 50


class Answers(Protocol):
    """What carries calls out."""

    @property
    def methods(self) -> Mapping[str, Any]:
        """The calls by their names."""

    def check_peer(self, peer: Peer) -> None:
        """Raise AccessDenied if the peer's certificate is not good any more."""

    def check_caller(self, peer: Peer) -> None:
        """Raise AccessDenied if the peer may not call anything."""

    def call(self, name: str, peer: Peer, data: bytes) -> bytes:
        """A request's bytes in, a reply's bytes out."""

    def refused(self, error: Exception, name: str, peer: Peer | None) -> None:
        """Note a call that failed before ``call`` could be called."""


class Logged:
    """Carries calls out, counts them and logs those that fail, for any transport.

    Args:
        handlers: what carries them out.
    """

    def __init__(self, handlers: Answers) -> None:
        self._handlers = handlers
        self.methods: Mapping[str, Any] = handlers.methods
        self.check_peer = handlers.check_peer
        self.check_caller = handlers.check_caller
        self._lock = threading.Lock()
        self._second = 0
        self._lines = 0
        self._left_out = 0
        self.under_way = 0
        """Calls being carried out."""

    def call(self, name: str, peer: Peer, data: bytes) -> bytes:
        """As the handlers' own."""
        began = time.perf_counter()
        with self._lock:
            self.under_way += 1
        try:
            return self._handlers.call(name, peer, data)
        except Exception as error:
            self._log(error, name, peer, time.perf_counter() - began)
            raise
        finally:
            with self._lock:
                self.under_way -= 1

    def refused(self, error: Exception, name: str, peer: Peer | None) -> None:
        """As the handlers' own."""
        self._log(error, name, peer, 0.0)
        self._handlers.refused(error, name, peer)

    def _log(self, error: Exception, name: str, peer: Peer | None, seconds: float) -> None:
        left_out = self._may_log()
        if left_out is None:
            return
        fields: dict[str, Any] = {
            "identity": peer.identity if peer else "",
            "address": peer.address if peer else "",
            "method": name,
            "code": error.code if isinstance(error, OpenKCMError) else "internal",
            "ms": round(seconds * 1000, 3),
        }
        if left_out:
            fields["left_out"] = left_out
        logger.info("a call failed", extra={"fields": fields})

    def _may_log(self) -> int | None:
        """How many lines were left out before this one; None if this one is too."""
        with self._lock:
            second = int(time.monotonic())
            if second != self._second:
                self._second, self._lines = second, 0
            if self._lines >= LINES_A_SECOND:
                self._left_out += 1
                return None
            self._lines += 1
            left_out, self._left_out = self._left_out, 0
            return left_out
