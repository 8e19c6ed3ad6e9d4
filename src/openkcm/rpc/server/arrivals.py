# SPDX-License-Identifier: Apache-2.0
"""Messages of gRPC calls that are yet to come.

gRPC gives a call a thread when its headers are there, whether its message ever comes or not. So whoever holds no grant
is refused before it is waited for, and whoever does has seconds to send it: a thread is held by nobody else, and not
for long.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Final

from ...errors import CoreUnavailable
from ..tls13 import grpc

SECONDS: Final = 10.0
"""For how long a message is waited for."""

_LOOK_SECONDS: Final = 0.5


class Arrivals:
    """Waits for messages, and ends the calls whose message does not come.

    Args:
        seconds: for how long it is waited for, to within half a second.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._waiting: dict[grpc.ServicerContext, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="openkcm-arrivals", daemon=True)
        self._thread.start()

    def take(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        """A call's only message.

        Raises:
            CoreUnavailable: none came.
        """
        self._waiting[context] = time.monotonic() + self._seconds
        try:
            return next(messages)
        except StopIteration:
            raise CoreUnavailable("the call had no message") from None
        except grpc.RpcError:
            raise CoreUnavailable("the call ended before its message came") from None
        finally:
            self._waiting.pop(context, None)

    def close(self) -> None:
        """End no more calls."""
        self._stop.set()
        self._thread.join(timeout=5)

    def _look(self) -> None:
        while not self._stop.wait(_LOOK_SECONDS):
            now = time.monotonic()
            for context, until in list(self._waiting.items()):
                if until < now:
                    context.cancel()
