# SPDX-License-Identifier: Apache-2.0
"""Files of any size in constant memory.

Invariant: nothing is written to the target before the segment it is from has verified, and a stream that is
truncated, extended, reordered or spliced raises. What was written before the error is genuine, but not whole:
throw it away (the command line writes to a temporary file for that reason).

The format is in ``docs/formats.md``: header, 19 random bytes, then segments of 65,536 bytes of plaintext and a
tag each; STREAM (Hoang et al., CRYPTO 2015) over XAES-256-GCM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from ..crypto import StreamCipher
from ..envelope import FIXED_BYTES, Envelope, header_bytes, parse
from ..errors import DecryptError, FormatError, InvalidInput, LimitExceeded
from ..keys import Kind
from ..limits import COMMITMENT_BYTES, MAX_SEGMENTS, SEGMENT_BYTES, STREAM_NONCE_BYTES, TAG_BYTES

_SEALED: Final = SEGMENT_BYTES + TAG_BYTES


class Reader(Protocol):
    """A binary file object to read from; short reads are fine."""

    def read(self, size: int, /) -> bytes | None:
        """Up to ``size`` bytes; none at the end."""


class Writer(Protocol):
    """A binary file object to write to; short writes are fine."""

    def write(self, data: bytes, /) -> int | None:
        """Write some of ``data``; how much, or None for all."""


def read_exactly(source: Reader, size: int) -> bytes:
    """Read until ``size`` bytes are there or the source ends."""
    parts: list[bytes] = []
    while size:
        part = source.read(size)
        if part is None:
            raise InvalidInput("the source is not blocking and has nothing to read; give a blocking one")
        if not isinstance(part, (bytes, bytearray, memoryview)):
            raise InvalidInput("the source must be opened in binary mode")
        if not part:
            break
        parts.append(bytes(part))
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def write_fully(target: Writer, data: bytes) -> int:
    """Write all of ``data``; its length."""
    view = memoryview(data)
    while len(view):
        written = target.write(view)  # type: ignore[arg-type]
        if written is None or written >= len(view):
            break
        view = view[written:]
    return len(data)


def read_header(source: Reader) -> Envelope:
    """Read the start of a stream, up to its first segment.

    Raises:
        FormatError: not the start of a stream.
    """
    start = read_exactly(source, FIXED_BYTES)
    kind_byte = start[5] if len(start) == FIXED_BYTES else 0
    if start[:4] == b"OKC\x01" and kind_byte in (Kind.INLINE, Kind.STORED):
        raise FormatError("this is a single record and not a stream; decrypt it as one")
    if kind_byte in (Kind.INLINE_STREAM, Kind.STORED_STREAM):
        start += read_exactly(source, header_bytes(Kind(kind_byte)) + STREAM_NONCE_BYTES - FIXED_BYTES)
    return parse(start)


def seal_segments(cipher: StreamCipher, source: Reader, target: Writer) -> int:
    """Encrypt ``source`` to its end; the number of bytes written."""
    written = segments = 0
    data = read_exactly(source, SEGMENT_BYTES)
    while True:
        # One segment ahead, to know which is the last.
        following = read_exactly(source, SEGMENT_BYTES) if len(data) == SEGMENT_BYTES else b""
        written += write_fully(target, cipher.seal(data, not following))
        segments += 1
        if not following:
            return written
        if segments >= MAX_SEGMENTS:
            raise LimitExceeded("a stream holds at most 2**32 segments of 64 KiB")
        data = following


class Opening:
    """A stream's segments, while they are decrypted.

    Args:
        cipher: the stream's, before its first segment.
        source: read to its end.
        target: where the plaintext goes.
        may: asked before every segment whether it may be opened; None for always.

    Attributes:
        written: bytes so far.
    """

    def __init__(
        self, cipher: StreamCipher, source: Reader, target: Writer, may: Callable[[], bool] | None = None
    ) -> None:
        self._cipher = cipher
        self._source = source
        self._target = target
        self._may = may
        self._data = b""
        self._following: bytes | None = None
        self._first = True
        self.written = 0

    def run(self) -> bool:
        """Decrypt to the end; False where ``may`` said no: then call this again to go on there.

        Raises:
            DecryptError: a segment does not verify, or the stream does not end where it should.
        """
        while True:
            following = self._following if self._following is not None else self._read()
            if self._may is not None and not self._may():
                return False
            last = not following
            opened = self._cipher.open(self._data, last)
            # An empty last segment is canonical only as the first: the one before it should have been the last.
            if opened is None or (last and not opened and not self._first):
                raise DecryptError
            self.written += write_fully(self._target, opened)
            if last:
                return True
            self._data, self._following, self._first = following, None, False

    def _read(self) -> bytes:
        """Read one segment ahead, to know which is the last."""
        full = _SEALED
        if self._first:
            full += COMMITMENT_BYTES
            self._data = read_exactly(self._source, full)
        self._following = read_exactly(self._source, _SEALED) if len(self._data) == full else b""
        return self._following


def stream_shape(size: int) -> tuple[int, int]:
    """How many segments and bytes of plaintext a stream's segments hold.

    Args:
        size: bytes after the header and its nonce.

    Raises:
        FormatError: no stream has that length.
    """
    payload = size - COMMITMENT_BYTES
    segments = max(1, -(-payload // _SEALED))
    plaintext = payload - segments * TAG_BYTES
    if plaintext < 0 or (segments > 1 and plaintext <= (segments - 1) * SEGMENT_BYTES):
        raise FormatError("the stream is cut short")
    return segments, plaintext
