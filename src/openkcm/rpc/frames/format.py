# SPDX-License-Identifier: Apache-2.0
"""Frames over TLS 1.3: the format, and the TLS settings of both ends (docs/formats.md, "The frame transport").

Invariant: one frame has one form. A header is checked whole before a byte of its payload is waited for, so that nobody
can have more memory set aside than they have sent; and there is no frame before both certificates were verified and
both ends agreed on this protocol by ALPN.
"""

from __future__ import annotations

import os
import socket
import ssl
import struct
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from ...errors import ConfigurationError, FormatError
from ..wire import MAX_MESSAGE_BYTES

ALPN: Final = "openkcm/1"

METHODS: Final = (
    "OpenChannel",
    "FindService",
    "WrapKeys",
    "UnwrapKeys",
    "RewrapKeys",
    "ShredKeys",
    "FindShredded",
    "Watch",
)
"""The methods of ``keys.proto`` in its order; a frame bears a method's place, from 1. Only ever added to."""

NUMBERS: Final = {name: number for number, name in enumerate(METHODS, 1)}
WATCH: Final = NUMBERS["Watch"]
NO_METHOD: Final = 0

HELLO: Final = 1
REQUEST: Final = 2
REPLY: Final = 3
FAILURE: Final = 4
ITEM: Final = 5
END: Final = 6
PING: Final = 7
PONG: Final = 8

LONGEST_MILLIS: Final = 2**31

_HEADER: Final = struct.Struct(">IBBII")
HEADER_BYTES: Final = _HEADER.size

RECORD_BYTES: Final = 16 * 1024
"""The largest plaintext of a TLS record (RFC 8446, section 5.1), which is what one read yields at the most."""

Part = bytes | memoryview
"""Part of a frame, to be sent."""

PEM = tuple[bytes, bytes, bytes]
"""A private key, its certificate's chain and the roots that the other end's must come from, each in PEM."""


class Frame(NamedTuple):
    """A frame. ``millis`` is how long the caller still waits."""

    type: int
    method: int = 0
    call: int = 0
    millis: int = 0
    payload: bytes = b""


class _Rule(NamedTuple):
    """What a type of frame bears: whether a call's number (None: either), and the most bytes of payload."""

    call: bool | None
    most: int


_RULES: Final = {
    HELLO: _Rule(False, 0),
    REQUEST: _Rule(True, MAX_MESSAGE_BYTES),
    REPLY: _Rule(True, MAX_MESSAGE_BYTES),
    FAILURE: _Rule(None, RECORD_BYTES),
    ITEM: _Rule(True, MAX_MESSAGE_BYTES),
    END: _Rule(True, 0),
    PING: _Rule(True, 0),
    PONG: _Rule(True, 0),
}


def check(length: int, kind: int, method: int, call: int, millis: int) -> None:
    """Raise FormatError unless this is a header that a frame can have."""
    rule = _RULES.get(kind)
    if rule is None:
        raise FormatError("no such type of frame")
    if length > rule.most:
        raise FormatError(f"a frame of this type has {rule.most} bytes at the most")
    if rule.call is not None and rule.call is not (call > 0):
        raise FormatError("a frame of this type has another call number")
    if kind == REQUEST:
        if not 1 <= method <= len(METHODS):
            raise FormatError("no such method; is the other end of a newer version?")
        if (millis == 0) is not (method == WATCH) or millis > LONGEST_MILLIS:
            raise FormatError("a call has a deadline, and a stream has none")
    elif method or millis:
        raise FormatError("only a request has a method and a deadline")


def reply_parts(kind: int, call: int, payload: bytes) -> list[Part]:
    """The parts of a frame that goes back, to be sent one after the other; its callers keep to the rules."""
    return _parts(_HEADER.pack(len(payload), kind, 0, call, 0), payload)


def request_parts(method: int, call: int, seconds: float, payload: bytes) -> list[Part]:
    """The parts of a request for a call that has so many seconds left; of no method, a ping."""
    if method == NO_METHOD:
        return reply_parts(PING, call, payload)
    millis = 0 if method == WATCH else min(max(int(seconds * 1000), 1), LONGEST_MILLIS)
    return _parts(_HEADER.pack(len(payload), REQUEST, method, call, millis), payload)


def _parts(header: bytes, payload: bytes) -> list[Part]:
    # A full first record, and the rest as it lies: a new megabyte costs more than to encrypt it.
    first = RECORD_BYTES - HEADER_BYTES
    if len(payload) <= first:
        return [header + payload]
    view = memoryview(payload)
    return [header + view[:first], view[first:]]


def send(sock: ssl.SSLSocket, parts: list[Part]) -> None:
    """Send parts and take them from the list; where the socket does not wait, what was not sent is left in it."""
    while parts:
        part = parts[0]
        sent = sock.send(part)
        if sent == len(part):
            del parts[0]
        else:
            parts[0] = memoryview(part)[sent:]


class _Buffers:
    """Memory that frames of more than a record are read into, used again and again, since fresh memory is slow.

    Without a lock, which a fork could leave taken in the child: a list's ``pop`` and ``append`` need none.
    """

    def __init__(self, most: int) -> None:
        self._free: list[bytearray | None] = [None] * most  # None: not made yet

    def take(self) -> bytearray | None:
        """One of the buffers, or None when all are in use."""
        try:
            buffer = self._free.pop()
        except IndexError:
            return None
        return bytearray(MAX_MESSAGE_BYTES) if buffer is None else buffer

    def give(self, buffer: bytearray) -> None:
        """Give one back."""
        self._free.append(buffer)


_buffers: Final = _Buffers(16)


class Reader:
    """Reads the frames of a connection, whatever pieces they come in.

    ``held`` is the bytes of a frame of which more is to come. On a socket that does not wait, or not for long, ``read``
    raises what the socket does and goes on where it was at the next call.
    """

    __slots__ = ("_buffer", "_frame", "_left", "_parts", "held")

    def __init__(self) -> None:
        self.held = 0
        self._frame: Frame | None = None
        self._parts: list[bytes] = []
        self._left = HEADER_BYTES
        self._buffer: bytearray | None = None

    def read(self, sock: ssl.SSLSocket, until: float | None = None) -> Frame | None:
        """The next frame; None where the connection ended between two frames.

        Args:
            sock: where from.
            until: monotonic time after which a frame that still comes in pieces is a TimeoutError.

        Raises:
            FormatError: what comes is no frame.
            ConnectionError: the connection ended within a frame.
        """
        if self._frame is None:
            head = self._take(sock, until)
            if head is None:
                return None
            length, kind, method, call, millis = _HEADER.unpack(head)
            check(length, kind, method, call, millis)
            frame = Frame(kind, method, call, millis)
            if not length:
                self._left, self.held = HEADER_BYTES, 0
                return frame
            self._frame, self._left, self.held = frame, length, HEADER_BYTES
            if length > RECORD_BYTES:
                self._buffer = _buffers.take()
        payload = self._take(sock, until) if self._buffer is None else self._fill(sock, until, self._buffer)
        if payload is None:
            raise ConnectionError("the connection ended within a frame")
        frame, self._frame, self._left, self.held = self._frame, None, HEADER_BYTES, 0
        return frame._replace(payload=payload)

    def close(self) -> None:
        """Give up what was read of a frame."""
        self._parts.clear()
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            _buffers.give(buffer)

    def _take(self, sock: ssl.SSLSocket, until: float | None) -> bytes | None:
        """What is left of the header or payload, joined with what came of it before."""
        parts, left = self._parts, self._left
        while True:
            part = sock.read(min(left, RECORD_BYTES))
            if not part:
                if self.held:
                    raise ConnectionError("the connection ended within a frame")
                return None
            left -= len(part)
            if not left and not parts:
                return part
            parts.append(part)
            if not left:
                whole = b"".join(parts)
                parts.clear()
                return whole
            self._left = left
            self.held += len(part)
            _check_time(sock, until)

    def _fill(self, sock: ssl.SSLSocket, until: float | None, buffer: bytearray) -> bytes:
        """As ``_take`` for a payload of many records, by way of a buffer."""
        view = memoryview(buffer)
        at = self.held - HEADER_BYTES
        end = at + self._left
        while at < end:
            got = sock.recv_into(view[at:end])
            if not got:
                raise ConnectionError("the connection ended within a frame")
            at += got
            self._left = end - at
            self.held += got
            if at < end:
                _check_time(sock, until)
        payload = bytes(view[:end])
        self.close()
        return payload


def _check_time(sock: ssl.SSLSocket, until: float | None) -> None:
    # What is decrypted already is no reason to stop, and nothing would tell that it is there.
    if until is not None and time.monotonic() > until and not sock.pending():
        raise TimeoutError("a frame comes in pieces")


# ---- TCP and TLS -------------------------------------------------------------------------------------


def set_options(sock: socket.socket) -> None:
    """Send small frames at once, and notice within a minute and a half that the other machine is gone."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def server_context(pem: PEM) -> ssl.SSLContext:
    """TLS as a server has it: 1.3, with a client's certificate, and no resumption.

    A session that is resumed shows its certificate to nobody, so a revoked one would live on in it; hence no tickets.

    Raises:
        ConfigurationError: the key or a certificate cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0
    return _load(context, pem)


def client_context(pem: PEM) -> ssl.SSLContext:
    """TLS as a client has it: 1.3, the server's certificate for its host's name, and our own.

    Raises:
        ConfigurationError: the key or a certificate cannot be used.
    """
    return _load(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), pem)


def _load(context: ssl.SSLContext, pem: PEM) -> ssl.SSLContext:
    key, chain, roots = pem
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([ALPN])
    try:
        context.load_verify_locations(cadata=roots.decode("ascii"))
    except (ssl.SSLError, ValueError):
        raise ConfigurationError("the roots of the other end are not certificates in PEM") from None
    # The ssl module loads a key only from a file; this one is in memory, and gone when it was read.
    file = os.memfd_create("openkcm-tls")
    try:
        os.write(file, key + b"\n" + chain)
        context.load_cert_chain(f"/proc/self/fd/{file}", password=_no_password)
    except (ssl.SSLError, OSError, ValueError):
        raise ConfigurationError(
            "the TLS certificate and its key do not load, or not belong together"
        ) from None
    finally:
        os.close(file)
    return context


def _no_password() -> str:
    raise ValueError("a key under a password cannot be used here")


Fetch = Callable[[], PEM]
"""Reads key, chain and roots; again when they may have been replaced."""

_VERIFY: Final = {
    9: "a certificate that is not valid yet",
    10: "an expired certificate",
    18: "a certificate of an unknown authority",
    19: "a certificate of an unknown authority",
    20: "a certificate of an unknown authority",
    21: "a certificate of an unknown authority",
    26: "a certificate for another purpose",
}
"""OpenSSL's X509_V_ERR codes (openssl/x509_vfy.h) that say who is to do something about it."""

_REASONS: Final = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "no certificate",
    "UNSUPPORTED_PROTOCOL": "TLS below 1.3",
    "NO_PROTOCOLS_AVAILABLE": "TLS below 1.3",
    "HTTP_REQUEST": "no TLS",
    "HTTPS_PROXY_REQUEST": "no TLS",
    "WRONG_VERSION_NUMBER": "no TLS",
    "RECORD_LAYER_FAILURE": "no TLS",
    "PACKET_LENGTH_TOO_LONG": "no TLS",
    "UNEXPECTED_MESSAGE": "no TLS",
}


def refusal_of(error: BaseException) -> str | None:
    """The class of reason for which a handshake was refused here; None where the peer ended it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _VERIFY.get(error.verify_code, "a certificate that does not verify")
    if isinstance(error, ssl.SSLEOFError) or not isinstance(error, ssl.SSLError):
        return None
    reason = error.reason or ""
    if "ALERT" in reason:
        return None
    return _REASONS.get(reason, "a broken handshake")
