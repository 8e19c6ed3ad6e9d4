# SPDX-License-Identifier: Apache-2.0
"""Records and streams of the Python backend; see ``pure`` for what its promises about memory are worth.

Invariant: plaintext leaves only after its tag and its commitment verified; every nonce is drawn in here.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Sequence
from hmac import compare_digest
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ..errors import InvalidInput, LimitExceeded
from ..limits import (
    COMMITMENT_BYTES,
    KEY_BYTES,
    MAX_RECORD_BYTES,
    MAX_SEGMENTS,
    NONCE_BYTES,
    SEGMENT_BYTES,
    STREAM_NONCE_BYTES,
    TAG_BYTES,
)
from .pure import HALF, SecretKeys, import_keys, xaes_subkey

_ZEROS: Final = bytes(COMMITMENT_BYTES)
_VERSION_BYTES: Final = 4


def _bytes_of(thing: Any, index: int | None) -> bytes | memoryview:
    """A bytes-like object's bytes; ``cryptography`` takes any contiguous buffer."""
    if type(thing) is bytes:
        return thing
    if isinstance(thing, str):
        raise InvalidInput(
            "bytes are wanted, not str; encode the text first, for example with .encode()", index=index
        )
    try:
        view = memoryview(thing)
    except TypeError:
        raise InvalidInput(f"bytes-like data is wanted, not {type(thing).__name__}", index=index) from None
    if not view.c_contiguous:
        raise InvalidInput("a buffer must be contiguous", index=index)
    return view.cast("B")


def _check_size(size: int, index: int | None) -> None:
    if size > MAX_RECORD_BYTES:
        raise LimitExceeded(
            f"a record has at most {MAX_RECORD_BYTES} bytes, not {size}; use a stream for larger data",
            index=index,
        )


def _contexts(contexts: Any, count: int) -> list[bytes]:
    if isinstance(contexts, bytes):
        return [contexts] * count
    each = list(contexts)
    if len(each) != count:
        raise InvalidInput("there must be one context for each record")
    if not all(type(one) is bytes for one in each):
        raise TypeError("encoded contexts are bytes")
    return each


def _positions(index: Any, count: int, keys: int) -> Sequence[int]:
    if index is None:
        if keys != 1 and keys != count:
            raise InvalidInput("there must be one key, a key for each record, or an index")
        return [0] * count if keys == 1 else range(count)
    positions = list(index)
    if len(positions) != count:
        raise InvalidInput("there must be one key position for each record")
    for at, position in enumerate(positions):
        if not 0 <= position < keys:
            raise InvalidInput("no key at that position", index=at)
    return positions


class RecordCipher:
    """One layout of record: head || version (4, big-endian) || middle || nonce 12 || ciphertext || tag 16.

    The associated data of a record is ``aad``, then the middle if it is bound, then the record's context.
    """

    def __init__(self, head: bytes, middle_bytes: int, bind_middle: bool, aad: bytes) -> None:
        if not 0 < len(head) <= 64 or not 0 <= middle_bytes <= 256 or len(aad) > 256:
            raise InvalidInput("the layout's parts are out of bounds")
        self._head = head
        self._middle_bytes = middle_bytes
        self._bound = bind_middle
        self._aad = aad
        self._middle = len(head) + _VERSION_BYTES
        self._nonce = self._middle + middle_bytes
        self._body = self._nonce + NONCE_BYTES
        self.overhead = self._body + COMMITMENT_BYTES + TAG_BYTES

    def takes(self, blob: bytes | memoryview) -> bool:
        """Whether bytes have this layout's head and a size that fits it."""
        return (
            self.overhead <= len(blob) <= self.overhead + MAX_RECORD_BYTES
            and blob[: len(self._head)] == self._head
        )

    def version(self, blob: bytes | memoryview) -> int:
        """The version in a record that ``takes`` took."""
        return int.from_bytes(blob[len(self._head) : self._middle], "big")

    def middle(self, blob: bytes | memoryview) -> bytes:
        """What stands between a record's version and its nonce."""
        return bytes(blob[self._middle : self._nonce])

    def seal_one(
        self,
        keys: SecretKeys,
        position: int,
        version: int,
        middles: bytes,
        context: bytes,
        record: Any,
        consume: bool = False,
    ) -> bytes:
        """Seal one record under the key at ``position``; ``consume`` zeroes that key afterwards."""
        data = _bytes_of(record, None)
        _check_size(len(data), None)
        if not 0 <= position < len(keys):
            raise InvalidInput("no key at that position")
        self._check_middles(keys, middles)
        with keys as slot:
            place = slice(position * KEY_BYTES, (position + 1) * KEY_BYTES)
            cipher = AESGCM(bytes(slot[place]))
            if consume:
                slot[place] = bytes(KEY_BYTES)
        middle = middles[position * self._middle_bytes : (position + 1) * self._middle_bytes]
        nonce = os.urandom(NONCE_BYTES)
        aad = self._aad + (middle if self._bound else b"") + context
        head = self._head + version.to_bytes(_VERSION_BYTES, "big") + middle + nonce
        return head + cipher.encrypt(nonce, _ZEROS + data, aad)

    def _check_middles(self, keys: SecretKeys, middles: bytes) -> None:
        if len(middles) != len(keys) * self._middle_bytes:
            raise InvalidInput("each key needs its own middle part")

    def seal_many(
        self,
        keys: SecretKeys,
        index: Any,
        version: int,
        middles: bytes,
        contexts: Any,
        records: Iterable[Any],
    ) -> list[bytes]:
        """Seal a batch; record i uses the key at index[i], or its own key, or the only one."""
        items = [_bytes_of(record, at) for at, record in enumerate(records)]
        aads = _contexts(contexts, len(items))
        positions = _positions(index, len(items), len(keys))
        self._check_middles(keys, middles)
        for at, item in enumerate(items):
            _check_size(len(item), at)
        width = self._middle_bytes
        parts = (
            [middles[at : at + width] for at in range(0, len(middles), width)] if width else [b""] * len(keys)
        )
        head = self._head + version.to_bytes(_VERSION_BYTES, "big")
        nonces = os.urandom(NONCE_BYTES * len(items))
        fixed, bound = self._aad, self._bound
        out: list[bytes] = []
        last = -1
        with keys as slot:
            raw = bytes(slot)
        for at, (item, position, context) in enumerate(zip(items, positions, aads, strict=True)):
            if position != last:
                cipher = AESGCM(raw[position * KEY_BYTES : (position + 1) * KEY_BYTES])
                last = position
            middle = parts[position]
            nonce = nonces[at * NONCE_BYTES : (at + 1) * NONCE_BYTES]
            aad = fixed + middle + context if bound else fixed + context
            out.append(head + middle + nonce + cipher.encrypt(nonce, _ZEROS + item, aad))
        return out

    def _open(self, cipher: AESGCM, blob: bytes | memoryview, context: bytes) -> bytes | None:
        aad = self._aad + (bytes(blob[self._middle : self._nonce]) if self._bound else b"") + context
        try:
            opened = cipher.decrypt(bytes(blob[self._nonce : self._body]), blob[self._body :], aad)
        except InvalidTag:
            return None
        return opened[COMMITMENT_BYTES:] if compare_digest(opened[:COMMITMENT_BYTES], _ZEROS) else None

    def open_one(self, keys: SecretKeys, position: int, context: bytes, blob: Any) -> bytes | None:
        """Open one record; None when it does not verify."""
        data = _bytes_of(blob, None)
        if not self.overhead <= len(data) <= self.overhead + MAX_RECORD_BYTES:
            return None
        if not 0 <= position < len(keys):
            raise InvalidInput("no key at that position")
        with keys as slot:
            cipher = AESGCM(bytes(slot[position * KEY_BYTES : (position + 1) * KEY_BYTES]))
        return self._open(cipher, data, context)

    def open_many(
        self, keys: SecretKeys, index: Any, contexts: Any, blobs: Iterable[Any], outcomes: bool
    ) -> tuple[list[bytes | None], list[int]]:
        """Open a batch: (records, positions that did not verify); without ``outcomes`` the first one ends it."""
        items = [_bytes_of(blob, at) for at, blob in enumerate(blobs)]
        aads = _contexts(contexts, len(items))
        positions = _positions(index, len(items), len(keys))
        for at, item in enumerate(items):
            if not self.overhead <= len(item) <= self.overhead + MAX_RECORD_BYTES:
                raise InvalidInput("too short or too long for a record", index=at)
        opened: list[bytes | None] = []
        failed: list[int] = []
        last = -1
        with keys as slot:
            raw = bytes(slot)
        for at, (item, position, context) in enumerate(zip(items, positions, aads, strict=True)):
            if position != last:
                cipher = AESGCM(raw[position * KEY_BYTES : (position + 1) * KEY_BYTES])
                last = position
            record = self._open(cipher, item, context)
            if record is None:
                failed.append(at)
                if not outcomes:
                    return [], failed
            opened.append(record)
        return opened, failed

    def place(self, blob: Any) -> bytes | None:
        """The version and the middle of one record, side by side; None if it is not exact bytes of this layout."""
        if type(blob) is not bytes or len(blob) < self.overhead or not blob.startswith(self._head):
            return None
        return blob[len(self._head) : self._nonce]

    def gather(self, blobs: Iterable[Any], runs: bool = False) -> tuple[int, bytes, array[int] | None] | None:
        """Collect the middles of a batch, if every blob has this head and layout and all share one version.

        Returns None, or (version, packed middles, index). With ``runs``, neighbours with the same middle share one,
        and the index tells which is each blob's; it is None where they are all one's own, or all the same.
        """
        items = list(blobs)
        if not items or type(items[0]) is not bytes or not items[0].startswith(self._head):
            return None
        start = items[0][: self._middle]
        middles: list[bytes] = []
        index = array("I")
        for item in items:
            if type(item) is not bytes or len(item) < self.overhead or not item.startswith(start):
                return None
            middle = item[self._middle : self._nonce]
            if not runs or not middles or middle != middles[-1]:
                middles.append(middle)
            index.append(len(middles) - 1)
        version = int.from_bytes(start[len(self._head) :], "big")
        return version, b"".join(middles), index if 1 < len(middles) < len(items) else None


# ---- streams -------------------------------------------------------------------------------------------


class StreamCipher:
    """The segments of one stream, in order: STREAM (Hoang et al., CRYPTO 2015) over XAES-256-GCM.

    The first carries the key commitment. The counter moves only forwards and the last segment ends the stream.
    """

    def __init__(self, keys: SecretKeys, position: int, aad: bytes, nonce: bytes | None = None) -> None:
        start = os.urandom(STREAM_NONCE_BYTES) if nonce is None else bytes(nonce)
        if len(start) != STREAM_NONCE_BYTES:
            raise InvalidInput("a stream's nonce has 19 bytes")
        if not 0 <= position < len(keys):
            raise InvalidInput("no key at that position")
        with keys as slot:
            key = bytes(slot[position * KEY_BYTES : (position + 1) * KEY_BYTES])
        self._subkey = import_keys(xaes_subkey(key, start))
        self._start = start
        self._aad = aad
        self._counter = 0
        self._ended = False

    @property
    def nonce(self) -> bytes:
        """The 19 random bytes to put into the stream's header."""
        return self._start

    def wipe(self) -> None:
        """Zero the subkey; the stream cannot go on."""
        self._subkey.wipe()

    @property
    def wiped(self) -> bool:
        """Whether the subkey is gone."""
        return self._subkey.wiped

    def _next(self, last: bool) -> tuple[AESGCM, bytes]:
        with self._subkey as key:
            if self._ended or self._counter >= MAX_SEGMENTS:
                raise LimitExceeded("the stream has ended, or is over 2**32 segments")
            nonce = self._start[HALF:] + self._counter.to_bytes(4, "big") + bytes((last,))
            self._counter += 1
            self._ended = last
            return AESGCM(bytes(key)), nonce

    def seal(self, data: Any, last: bool) -> bytes:
        """Seal the next segment: its ciphertext and tag, with the commitment before it in the first."""
        item = _bytes_of(data, None)
        if len(item) > SEGMENT_BYTES:
            raise LimitExceeded("a segment has at most 65,536 bytes")
        lead = _ZEROS if self._counter == 0 else b""
        cipher, nonce = self._next(bool(last))
        return cipher.encrypt(nonce, lead + item, self._aad)

    def open(self, data: Any, last: bool) -> bytes | None:
        """Open the next segment; None when it does not verify, after which the stream is over."""
        item = _bytes_of(data, None)
        lead = COMMITMENT_BYTES if self._counter == 0 else 0
        if not lead + TAG_BYTES <= len(item) <= lead + SEGMENT_BYTES + TAG_BYTES:
            self._ended = True
            return None
        cipher, nonce = self._next(bool(last))
        try:
            opened = cipher.decrypt(nonce, item, self._aad)
        except InvalidTag:
            self._ended = True
            return None
        if not compare_digest(opened[:lead], _ZEROS[:lead]):
            self._ended = True
            return None
        return opened[lead:]
