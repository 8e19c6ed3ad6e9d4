# SPDX-License-Identifier: Apache-2.0
"""Records and streams of the Python backend; see ``pure`` for what its promises about memory are worth.

Invariant: plaintext leaves only after its tag and its commitment verified; every nonce is drawn in here.
"""

from __future__ import annotations

import os
import threading
from array import array
from collections.abc import Callable, Iterable
from functools import lru_cache
from hmac import compare_digest
from itertools import accumulate, compress, islice, repeat
from operator import ne
from typing import Any, Final, TypeVar

import cffi
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ..errors import InvalidInput, LimitExceeded, SecretMemoryError
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
from .pure import HALF, SecretKeys, cut, import_keys, xaes_subkey

_ffi: Final = cffi.FFI()
_ZEROS: Final = bytes(COMMITMENT_BYTES)
_VERSION_BYTES: Final = 4

# The parts of what AES-GCM opens.
_COMMITMENT: Final = slice(COMMITMENT_BYTES)
_RECORD: Final = slice(COMMITMENT_BYTES, None)

_CIPHERS_KEPT: Final = 1024
"""An AESGCM object takes 2.6 KB."""

T = TypeVar("T")


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
        if not view.c_contiguous:
            raise BufferError
        return view.cast("B")
    except (TypeError, ValueError, BufferError):
        said = f"bytes-like data is wanted, not {type(thing).__name__}"
        if isinstance(thing, memoryview):
            said = "a buffer must be contiguous, and not released"
        raise InvalidInput(said, index=index) from None


def address_of(view: memoryview) -> int:
    """Where a buffer's bytes are."""
    return int(_ffi.cast("uintptr_t", _ffi.from_buffer("char[]", view)))


def _place_output(size: int, source: bytes | memoryview, out: Any) -> memoryview | None:
    """Where one result goes: nowhere yet, or the buffer's first bytes."""
    if out is None:
        return None
    try:
        view = memoryview(out)
    except (TypeError, ValueError, BufferError):
        raise InvalidInput(f"out is a writable buffer, not {type(out).__name__}") from None
    if view.readonly or not view.c_contiguous:
        raise InvalidInput("out must be writable and contiguous")
    if view.nbytes < size:
        raise InvalidInput(f"the result takes {size} bytes and out has {view.nbytes}")
    first, start = address_of(memoryview(source)), address_of(view)
    if len(source) and start < first + len(source) and first < start + view.nbytes:
        raise InvalidInput("out overlaps what is read")
    return view.cast("B")[:size]


def _result(found: bytes, place: memoryview | None) -> bytes | int:
    """A result, or how many bytes of it were written to its place."""
    if place is None:
        return found
    place[:] = found
    return len(found)


def _all_bytes(things: Iterable[Any]) -> list[bytes | memoryview]:
    items = list(things)
    if set(map(type, items)) <= {bytes}:
        return items
    return [_bytes_of(thing, at) for at, thing in enumerate(items)]


def _first_outside(items: list[bytes | memoryview], least: int, most: int) -> int | None:
    """Position of the first item whose length is out of bounds."""
    sizes = set(map(len, items))
    if not sizes or (least <= min(sizes) and max(sizes) <= most):
        return None
    return next(at for at, item in enumerate(items) if not least <= len(item) <= most)


def _too_large(size: int, index: int | None) -> LimitExceeded:
    return LimitExceeded(
        f"a record has at most {MAX_RECORD_BYTES} bytes, not {size}; use a stream for larger data",
        index=index,
    )


def _contexts(contexts: Any, count: int) -> bytes | list[bytes]:
    if isinstance(contexts, bytes):
        return contexts
    each = list(contexts)
    if len(each) != count:
        raise InvalidInput("there must be one context for each record")
    if not all(type(one) is bytes for one in each):
        raise TypeError("encoded contexts are bytes")
    return each


def _positions(index: Any, count: int, keys: int) -> list[int] | None:
    """The key of each record; None for a key each, or for one key for all."""
    if index is None:
        if keys != 1 and keys != count:
            raise InvalidInput("there must be one key, a key for each record, or an index")
        return None
    positions = list(index)
    if len(positions) != count:
        raise InvalidInput("there must be one key position for each record")
    if positions and not (min(positions) >= 0 and max(positions) < keys):
        raise InvalidInput("no key at that position", index=[0 <= at < keys for at in positions].index(False))
    return positions


def _spread(of_keys: Iterable[T], keys: int, positions: list[int] | None, count: int) -> Iterable[T]:
    """What belongs to the key of each record, from what belongs to each key."""
    if positions is not None:
        return map(list(of_keys).__getitem__, positions)
    return of_keys if keys == count else repeat(next(iter(of_keys)), count)


def _cipher(keys: SecretKeys, position: int) -> AESGCM:
    with keys as slot:
        return AESGCM(bytes(slot[position * KEY_BYTES : (position + 1) * KEY_BYTES]))


def _ciphers(keys: SecretKeys, positions: list[int] | None, count: int) -> Iterable[AESGCM]:
    """The cipher of each record, made when it is used: one at a time where each has a key of its own."""
    with keys as slot:
        copies = list(cut(slot, KEY_BYTES))
    if positions is None:
        return _spread(map(AESGCM, copies), len(keys), None, count)
    # Rows of the same few subjects come in any order. What is kept for them goes when the batch has ended.
    return map(lru_cache(_CIPHERS_KEPT)(lambda position: AESGCM(copies[position])), positions)


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
        start = len(head) + _VERSION_BYTES
        self._middle = slice(start, start + middle_bytes)
        self._nonce = slice(self._middle.stop, self._middle.stop + NONCE_BYTES)
        self._body = slice(self._nonce.stop, None)
        self.overhead = self._nonce.stop + COMMITMENT_BYTES + TAG_BYTES
        self._most = self.overhead + MAX_RECORD_BYTES

    def takes(self, blob: bytes | memoryview) -> bool:
        """Whether bytes have this layout's head and a size that fits it."""
        return self.overhead <= len(blob) <= self._most and blob[: len(self._head)] == self._head

    def version(self, blob: bytes | memoryview) -> int:
        """The version in a record that ``takes`` took."""
        return int.from_bytes(blob[len(self._head) : self._middle.start], "big")

    def middle(self, blob: bytes | memoryview) -> bytes:
        """What stands between a record's version and its nonce."""
        return bytes(blob[self._middle])

    def seal_one(
        self,
        keys: SecretKeys,
        position: int,
        version: int,
        middles: bytes,
        context: bytes,
        record: Any,
        consume: bool = False,
        out: Any = None,
    ) -> Any:
        """Seal one record under the key at ``position``; ``consume`` zeroes that key afterwards.

        Returns it as bytes, or writes it to ``out``, a buffer, and returns its size.
        """
        data = _bytes_of(record, None)
        if len(data) > MAX_RECORD_BYTES:
            raise _too_large(len(data), None)
        if not 0 <= position < len(keys):
            raise InvalidInput("no key at that position")
        self._check_middles(keys, middles)
        target = _place_output(len(data) + self.overhead, data, out)
        with keys as slot:
            place = slice(position * KEY_BYTES, (position + 1) * KEY_BYTES)
            cipher = AESGCM(bytes(slot[place]))
            if consume:
                slot[place] = bytes(KEY_BYTES)
        middle = middles[position * self._middle_bytes : (position + 1) * self._middle_bytes]
        nonce = os.urandom(NONCE_BYTES)
        aad = self._aad + (middle if self._bound else b"") + context
        head = self._head + version.to_bytes(_VERSION_BYTES, "big") + middle + nonce
        return _result(head + cipher.encrypt(nonce, _ZEROS + data, aad), target)

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
        items = _all_bytes(records)
        count = len(items)
        encoded = _contexts(contexts, count)
        positions = _positions(index, count, len(keys))
        self._check_middles(keys, middles)
        large = _first_outside(items, 0, MAX_RECORD_BYTES)
        if large is not None:
            raise _too_large(len(items[large]), large)
        parts = list(cut(middles, self._middle_bytes)) if middles else [b""] * len(keys)
        head = self._head + version.to_bytes(_VERSION_BYTES, "big")
        leads = _spread([head + part for part in parts], len(keys), positions, count)
        bound = _spread(parts, len(keys), positions, count) if self._bound else None
        return [
            lead + nonce + cipher.encrypt(nonce, _ZEROS + item, aad)
            for lead, cipher, nonce, item, aad in zip(
                leads,
                _ciphers(keys, positions, count),
                cut(os.urandom(NONCE_BYTES * count), NONCE_BYTES),
                items,
                self._aads(bound, encoded, count),
                strict=True,
            )
        ]

    def _aads(
        self, middles: Iterable[bytes | memoryview] | None, contexts: bytes | list[bytes], count: int
    ) -> Iterable[bytes]:
        """The associated data of each record; ``middles`` are given where they are bound."""
        fixed = self._aad
        if middles is None and isinstance(contexts, bytes):
            return repeat(fixed + contexts, count)
        each = repeat(contexts, count) if isinstance(contexts, bytes) else contexts
        if middles is None:
            return [fixed + context for context in each]
        return [fixed + middle + context for middle, context in zip(middles, each, strict=True)]

    def open_one(self, keys: SecretKeys, position: int, context: bytes, blob: Any, out: Any = None) -> Any:
        """Open one record: its bytes, or how many were written to ``out``, a buffer; None when it does not verify."""
        data = _bytes_of(blob, None)
        if not self.overhead <= len(data) <= self._most:
            return None
        if not 0 <= position < len(keys):
            raise InvalidInput("no key at that position")
        place = _place_output(len(data) - self.overhead, data, out)
        cipher = _cipher(keys, position)
        aad = self._aad + (data[self._middle] if self._bound else b"") + context
        try:
            opened = cipher.decrypt(data[self._nonce], data[self._body], aad)
        except InvalidTag:
            return None
        return _result(opened[_RECORD], place) if compare_digest(opened[_COMMITMENT], _ZEROS) else None

    def open_kept(
        self,
        kept: dict[bytes, Any],
        stands: float,
        clock: Callable[[], float],
        context: bytes,
        blob: Any,
        out: Any = None,
    ) -> Any:
        """Open one record under the key that is kept for its version and middle; None if there is none to be had.

        ``kept`` maps what ``place`` returns to tuples of (keys, since, until), in seconds of ``clock``: a key is
        used before ``until``, and none from ``stands`` on. What does not verify, or was wiped meanwhile, is None too:
        the caller finds out the long way.
        """
        if (now := clock()) >= stands:
            return None
        place = self.place(blob)
        found = None if place is None else kept.get(place)
        if found is None or now >= found[2]:
            return None
        try:
            return self.open_one(found[0], 0, context, blob, out)
        except SecretMemoryError:
            return None

    def open_many(
        self, keys: SecretKeys, index: Any, contexts: Any, blobs: Iterable[Any], outcomes: bool
    ) -> tuple[list[bytes | None], list[int]]:
        """Open a batch: (records, positions that did not verify); without ``outcomes`` the first one ends it."""
        items = _all_bytes(blobs)
        count = len(items)
        encoded = _contexts(contexts, count)
        positions = _positions(index, count, len(keys))
        misfit = _first_outside(items, self.overhead, self._most)
        if misfit is not None:
            raise InvalidInput("too short or too long for a record", index=misfit)
        if len(keys) == 1 and isinstance(encoded, bytes) and not self._bound:
            alike = self._open_alike(keys, self._aad + encoded, items)
            if alike is not None:
                return alike, []
        ciphers = _ciphers(keys, positions, count)
        aads = self._aads([item[self._middle] for item in items] if self._bound else None, encoded, count)
        nonce, body = self._nonce, self._body
        records: list[bytes | None] = []
        failed: list[int] = []
        for cipher, item, aad in zip(ciphers, items, aads, strict=True):
            try:
                opened = cipher.decrypt(item[nonce], item[body], aad)
            except InvalidTag:
                opened = b""  # which does not hold the commitment either
            if compare_digest(opened[_COMMITMENT], _ZEROS):
                records.append(opened[_RECORD])
                continue
            failed.append(len(records))
            if not outcomes:
                return [], failed
            records.append(None)
        return records, failed

    def _open_alike(
        self, keys: SecretKeys, aad: bytes, items: list[bytes | memoryview]
    ) -> list[bytes | None] | None:
        """Open records of one key and one context, the quickest loop there is; None if any does not verify."""
        decrypt, nonce, body = _cipher(keys, 0).decrypt, self._nonce, self._body
        records: list[bytes | None] = []
        try:
            for item in items:
                opened = decrypt(item[nonce], item[body], aad)
                if not compare_digest(opened[_COMMITMENT], _ZEROS):
                    return None
                records.append(opened[_RECORD])
        except InvalidTag:
            return None
        return records

    def place(self, blob: Any) -> bytes | None:
        """The version and the middle of one record, side by side; None if it is not exact bytes of this layout."""
        if type(blob) is not bytes or len(blob) < self.overhead or not blob.startswith(self._head):
            return None
        return blob[len(self._head) : self._middle.stop]

    def gather(self, blobs: Iterable[Any], runs: bool = False) -> tuple[int, bytes, array[int] | None] | None:
        """Collect the middles of a batch, if every blob has this head and layout and all share one version.

        Returns None, or (version, packed middles, index). With ``runs``, neighbours with the same middle share one,
        and the index tells which is each blob's; it is None where they are all one's own, or all the same.
        """
        items = list(blobs)
        if set(map(type, items)) != {bytes} or min(set(map(len, items))) < self.overhead:
            return None
        # The least and the greatest of them stand for all: what is between two that start alike starts so too.
        middle, least, greatest = self._middle, min(items), max(items)
        start = least[: middle.start]
        if not start.startswith(self._head) or not greatest.startswith(start):
            return None
        version = int.from_bytes(start[len(self._head) :], "big")
        if runs and least[middle] == greatest[middle]:
            return version, least[middle], None
        middles = [item[middle] for item in items]
        changes = list(map(ne, islice(middles, 1, None), middles)) if runs else []
        if all(changes):
            return version, b"".join(middles), None
        index = array("I", accumulate(changes, initial=0))
        return version, b"".join(compress(middles, [True, *changes])), index


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
        self._counting = threading.Lock()
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

    def _next(self, last: bool) -> tuple[AESGCM, bytes, bytes]:
        """The cipher, the nonce and the commitment of the next segment."""
        with self._subkey as key:
            with self._counting:
                number = self._counter
                if self._ended or number >= MAX_SEGMENTS:
                    raise LimitExceeded("the stream has ended, or is over 2**32 segments")
                self._counter = number + 1
                if last:
                    self._ended = True
            nonce = self._start[HALF:] + number.to_bytes(4, "big") + bytes((last,))
            return AESGCM(bytes(key)), nonce, b"" if number else _ZEROS

    def seal(self, data: Any, last: bool) -> bytes:
        """Seal the next segment: its ciphertext and tag, with the commitment before it in the first."""
        item = _bytes_of(data, None)
        if len(item) > SEGMENT_BYTES:
            raise LimitExceeded("a segment has at most 65,536 bytes")
        cipher, nonce, lead = self._next(bool(last))
        return cipher.encrypt(nonce, lead + item, self._aad)

    def open(self, data: Any, last: bool) -> bytes | None:
        """Open the next segment; None when it does not verify, after which the stream is over."""
        item = _bytes_of(data, None)
        cipher, nonce, commitment = self._next(bool(last))
        lead = len(commitment)
        if not lead + TAG_BYTES <= len(item) <= lead + SEGMENT_BYTES + TAG_BYTES:
            self._ended = True
            return None
        try:
            opened = cipher.decrypt(nonce, item, self._aad)
        except InvalidTag:
            self._ended = True
            return None
        if not compare_digest(opened[:lead], _ZEROS[:lead]):
            self._ended = True
            return None
        return opened[lead:]
