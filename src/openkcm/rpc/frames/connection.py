# SPDX-License-Identifier: Apache-2.0
"""A connection as the frame server knows it.

Invariant: one thread at a time has it in hand; others may only have it end.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from typing import Final

from ...errors import CoreUnavailable
from ..client.endpoint import host_of
from ..peer import Peer
from . import format as frames
from .format import Frame
from .streams import Stream

BACKLOG: Final = 1024


class Connection:
    """One connection, in the hands of one thread at a time.

    ``peer`` is None until the handshake is done; ``frame`` is a request that was let through, of use ``until`` then;
    ``out`` is what is still to be sent; after ``deadline`` it is ended for being ``slow``.
    """

    __slots__ = (
        "address",
        "counted",
        "deadline",
        "frame",
        "idle",
        "out",
        "peer",
        "reader",
        "slow",
        "sock",
        "stream",
        "until",
    )

    def __init__(self, sock: ssl.SSLSocket, address: str, deadline: float) -> None:
        self.sock = sock
        self.address = address
        self.deadline: float | None = deadline
        self.reader = frames.Reader()
        self.peer: Peer | None = None
        self.frame: Frame | None = None
        self.out: list[frames.Part] = []
        self.stream: Stream | None = None
        self.until = 0.0
        self.counted = 0
        self.idle = False
        self.slow = False

    def end(self) -> None:
        """Have the connection end: whoever has it, or the next to get it, sees that and closes it."""
        with contextlib.suppress(OSError):  # it has ended already
            # Past the TLS layer, which another thread may be in.
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)


class Refused(Exception):
    """A peer that TLS has let in, and we do not; ``accepted`` says whether that is its certificate's doing."""

    def __init__(self, reason: str, identity: str = "", *, accepted: bool = False) -> None:
        super().__init__(reason)
        self.identity = identity
        self.accepted = accepted


def listen(address: str) -> socket.socket:
    """A socket that listens on ``HOST:PORT``.

    Raises:
        CoreUnavailable: the address is taken, or not this machine's.
    """
    host, port = host_of(address), int(address.rpartition(":")[2])
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError:
        raise CoreUnavailable(f"{address} cannot be listened on; is it in use?", retryable=False) from None
    listener.setblocking(False)
    return listener
