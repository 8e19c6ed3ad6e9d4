# SPDX-License-Identifier: Apache-2.0
"""One connection of the frame client.

Invariant: one thread at a time uses it, and it carries one call at a time; ``end`` alone may be called by others. What
fails on it is told as an outage, unless the Core said something else.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import time
from typing import Final

from ...errors import CoreUnavailable, FormatError, OpenKCMError
from ...waiting import Waiting
from .. import keys_pb2 as pb
from .. import wire
from ..client.endpoint import host_of
from . import format as frames
from .format import Frame

SILENT: Final = "the Core at {} did not answer in time"
CLOSED: Final = "the connection to the Core at {} was closed"


_ANSWERS: Final = (frames.REPLY, frames.FAILURE, frames.PONG)


class Stale(Exception):
    """The connection had ended before any of the answer came: a call may be made again on another."""


class Link:
    """A connection to ``address``, ``HOST:PORT``; ``used`` once it has carried a call."""

    __slots__ = ("_call", "_ended", "_poll", "_reader", "_sock", "_waiting", "address", "used")

    def __init__(self, address: str, waiting: Waiting) -> None:
        self.address = address
        self._waiting = waiting
        self.used = False
        self._sock: socket.socket | None = None
        self._reader = frames.Reader()
        self._poll = select.poll()
        self._ended = False
        self._call = 0

    def open(self, context: ssl.SSLContext, server_name: str | None, until: float) -> None:
        """Connect, and wait for the Core to say that it takes us; ``until`` is monotonic time, as everywhere here.

        Raises:
            CoreUnavailable: there is nobody, or somebody else, or no answer in time.
            OpenKCMError: the Core's refusal.
        """
        host, port = host_of(self.address), int(self.address.rpartition(":")[2])
        try:
            self._sock = plain = self._waiting.connect(host, port, _left(until))
            frames.set_options(plain)
            self._sock = sock = self._waiting.secure(context, plain, server_name or host, _left(until))
            self._greet(sock, until)
        except OpenKCMError:
            self.close()
            raise
        except (OSError, ValueError) as error:
            self.close()
            raise self._outage(error, server_name or host) from None
        except BaseException:
            self.close()
            raise
        self._poll.register(sock, select.POLLIN)

    def is_usable(self) -> bool:
        """Whether it is as it was left: all that can come on an idle connection is its end."""
        return not self._ended and not self._poll.poll(0)

    def ask(self, method: int, request: bytes, until: float) -> Frame:
        """Make a call, or a ping; the frame that answers it, a reply, a failure or a pong.

        Raises:
            Stale: the connection had ended.
            CoreUnavailable, FormatError: no answer, or none that is of use; close the connection.
        """
        try:
            sock, call = self._begin(method, request, until)
            frame = self._reader.read(sock, until)
        except TimeoutError:
            raise CoreUnavailable(SILENT.format(self.address)) from None
        except (OSError, ValueError) as error:
            if self._reader.held or isinstance(error, FormatError):
                raise CoreUnavailable(CLOSED.format(self.address)) from None
            raise Stale from None
        if frame is None:
            raise Stale
        if frame.type == frames.FAILURE and not frame.call:
            raise failure(frame)  # of the connection, which ends
        if frame.call != call or frame.type not in _ANSWERS:
            raise FormatError("what came is not the Core's answer to this call")
        self.used = True
        return frame

    def follow(self, method: int, request: bytes, until: float) -> None:
        """Begin a stream, whose replies ``next`` gives."""
        self._begin(method, request, until)[0].settimeout(None)

    def next(self) -> Frame | None:
        """A stream's next frame; None where the connection has ended."""
        sock = self._sock
        if not isinstance(sock, ssl.SSLSocket):
            return None
        frame = self._reader.read(sock)
        if frame is not None and frame.call != self._call:
            raise FormatError("what came is not of this stream")
        return frame

    def end(self) -> None:
        """Have it end, from any thread: who waits on it hears so at once, and closes it."""
        self._ended = True
        sock = self._sock
        if sock is not None:
            with contextlib.suppress(OSError):  # it has ended already
                socket.socket.shutdown(
                    sock, socket.SHUT_RDWR
                )  # past the TLS layer, which another thread is in

    def close(self) -> None:
        """Close it."""
        self._ended = True
        self._reader.close()
        sock, self._sock = self._sock, None
        if sock is not None:
            sock.close()

    def abandon(self) -> object:
        """In a forked child: close the descriptor and nothing else; returns what must not be collected.

        The parent may have been in the middle of a call, so that what the TLS layer holds is in no order.
        """
        self._ended = True
        self._reader.close()
        sock, self._sock = self._sock, None
        if sock is not None and (fd := sock.detach()) >= 0:
            os.close(fd)
        return sock

    # ---- inside --------------------------------------------------------------------------------------

    def _begin(self, method: int, request: bytes, until: float) -> tuple[ssl.SSLSocket, int]:
        sock = self._sock
        if not isinstance(sock, ssl.SSLSocket):
            raise ConnectionError
        self._call = call = self._call % 0xFFFF_FFFF + 1
        seconds = _left(until)
        sock.settimeout(seconds)
        frames.send(sock, frames.request_parts(method, call, seconds, request))
        return sock, call

    def _greet(self, sock: ssl.SSLSocket, until: float) -> None:
        if self._ended:
            raise ConnectionError
        if sock.selected_alpn_protocol() != frames.ALPN:
            raise CoreUnavailable(
                f"what answers at {self.address} does not speak {frames.ALPN}; is it the port of another interface?",
                retryable=False,
            )
        frame = self._reader.read(sock, until)
        if frame is None:
            raise ConnectionError
        if frame.type == frames.FAILURE:
            raise failure(frame)
        if frame.type != frames.HELLO:
            raise FormatError("the Core does not begin as this protocol does")

    def _outage(self, error: Exception, server_name: str) -> CoreUnavailable:
        if isinstance(error, TimeoutError):
            return CoreUnavailable(SILENT.format(self.address))
        if isinstance(error, ssl.SSLCertVerificationError):
            return CoreUnavailable(
                f"what answers at {self.address} has no certificate that is right for {server_name}: "
                f"{error.verify_message}",
                retryable=False,
            )
        if isinstance(error, ssl.SSLError) and "ALERT" in (error.reason or ""):
            return CoreUnavailable(
                f"the Core at {self.address} does not take this certificate; is it in time, and of its authorities?",
                retryable=False,
            )
        why = getattr(error, "strerror", None) or "the connection was closed before it was made"
        return CoreUnavailable(f"the Core at {self.address} cannot be reached: {why}")


def failure(frame: Frame) -> OpenKCMError:
    """The error that a failure tells of."""
    return wire.error_of(wire.parse(pb.Failure.FromString, frame.payload))


def _left(until: float) -> float:
    """Seconds that are left.

    Raises:
        TimeoutError: none.
    """
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
