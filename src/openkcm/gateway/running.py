# SPDX-License-Identifier: Apache-2.0
"""Streams that are under way.

Invariant: a stream's key can be wiped from outside at any time, and then its next segment fails with the reason: a
kill or a shred does not wait for a large file. Nor does a kill where nobody can tell of it: a stream is decrypted on
only as long as the Core is in touch, or opens its key once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..crypto import SecretKeys, StreamCipher
from ..envelope import Envelope, fixed_header, payload_aad
from ..errors import DecryptError, KeyDestroyed
from ..keys import KeyService, Kind, Service, WrappedKeys
from ..waiting import waiting_of
from .streams import Opening, Reader, Writer, read_header, seal_segments, write_fully
from .subjects import SubjectKeys
from .touch import Touch
from .under_way import Moment, ShreddedError, UnderWay


class RunningStreams(UnderWay):
    """The streams of one service."""

    def __init__(self, core: KeyService, service: Service) -> None:
        super().__init__(service.tenant)
        self._core = core
        self._service = service
        waiting = waiting_of(core)
        # Files are read and written in these, which wait for them as files do.
        self._write = waiting.apart(_write)
        self._read_header = waiting.apart(read_header)
        self._open_segments = waiting.apart(Opening.run)

    def encrypt(
        self,
        kind: Kind,
        keys: SecretKeys,
        version: int,
        data_key: bytes,
        context: bytes,
        since: Moment,
        source: Reader,
        target: Writer,
    ) -> int:
        """Write header and segments; ``keys`` holds the one data key and is wiped.

        ``since`` was taken before the key was wrapped or opened, so that a kill or a shred since then is not missed.
        """
        with self._run(
            keys, _key_id(kind, data_key), self._aad(kind, data_key, context), None, since
        ) as cipher:
            header = fixed_header(kind, self._service.service_id, version) + data_key + cipher.nonce
            return self._write(cipher, header, source, target)

    def decrypt(self, source: Reader, target: Writer, context: bytes, subjects: SubjectKeys) -> int:
        """Read header and segments."""
        since = self.now()
        envelope = self._read_header(source)
        if envelope.service_id != self._service.service_id:
            raise DecryptError
        touch = Touch(self._core)
        keys = self._open_key(envelope, subjects)
        aad = self._aad(envelope.kind, envelope.data_key, context)
        with self._run(keys, _key_id(envelope.kind, envelope.data_key), aad, envelope.nonce, since) as cipher:
            opening = Opening(cipher, source, target, touch.stands)
            while not self._open_segments(opening):
                touch.check(lambda: self._open_key(envelope, subjects).wipe())
            return opening.written

    def _open_key(self, envelope: Envelope, subjects: SubjectKeys) -> SecretKeys:
        """Have the Core open a stream's data key; the caller wipes it."""
        if envelope.kind.stored:
            groups, failures = subjects.open_ids([envelope.data_key])
            keys = groups[0].keys if groups else None
        else:
            keys, found, _ = self._core.unwrap_keys(
                self._service, WrappedKeys(envelope.kind, envelope.version, envelope.data_key)
            )
            failures = dict(found)
        if failures or keys is None:
            raise failures[0]
        return keys

    def _aad(self, kind: Kind, data_key: bytes, context: bytes) -> bytes:
        return payload_aad(kind, self._service.service_id) + _key_id(kind, data_key) + context

    @contextmanager
    def _run(
        self, keys: SecretKeys, key_id: bytes, aad: bytes, nonce: bytes | None, since: Moment
    ) -> Iterator[StreamCipher]:
        try:
            cipher = StreamCipher(keys, 0, aad, nonce)
        finally:
            keys.wipe()
        try:
            with self.holding([cipher], key_id, since):
                yield cipher
        except ShreddedError:
            raise KeyDestroyed(
                "this subject's data key was shredded while the stream was running; it was stopped"
            ) from None


def _key_id(kind: Kind, data_key: bytes) -> bytes:
    """The id of a stored data key; an inline one has none."""
    return data_key if kind.stored else b""


def _write(cipher: StreamCipher, header: bytes, source: Reader, target: Writer) -> int:
    return write_fully(target, header) + seal_segments(cipher, source, target)
