# SPDX-License-Identifier: Apache-2.0
"""A handle on one service: what an application calls.

Invariant: it only opens envelopes of its own service, and every way that one can fail to open looks the same
(DecryptError) unless the bytes are no envelope (FormatError) or a key is known to be off, shredded or missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import Any, Literal

from ..context import ABSENT, Buffer, Context, encode_context
from ..crypto import generate_keys
from ..errors import InvalidInput, LimitExceeded, OpenKCMError, SecretMemoryError
from ..keys import KeyService, Kind, Service
from ..waiting import waiting_of
from .background import Background
from .batches import (
    Contexts,
    Errors,
    as_list,
    check_errors,
    encode_contexts,
    first_bad_subject,
    index_of,
    length_of,
    one_by_one,
    part_of,
    settle,
    subjects_of,
)
from .ciphers import inline_cipher, stored_cipher
from .column_opener import ColumnOpener
from .columns import ColumnSealer
from .into import check_out, write_row, write_sealed
from .keystore import KeyStore
from .leases import Leases
from .opener import Opener
from .overlap import Overlap
from .policy import DataKeyPolicy, PoolPolicy
from .pool import Pool, SharedKeys
from .rewrapper import Rewrapper
from .running import RunningStreams
from .sharing import HeldKeys
from .streams import Reader, Writer
from .subjects import SubjectKeys


class ServiceHandle:
    """One service of one tenant; made by ``Gateway.service``, safe for threads."""

    def __init__(
        self,
        owner: object,
        core: KeyService,
        store: KeyStore,
        service: Service,
        policy: DataKeyPolicy,
        pool: PoolPolicy,
        background: Background,
    ) -> None:
        # Its Gateway hears of kills for it, and so must live as long as the handle does.
        self._owner = owner
        self._core = core
        self._service = service
        self._policy = policy
        self._pool_policy = pool
        self._background = background
        self._leases = Leases(core, service)
        self._held, self._running = HeldKeys(core, service.tenant), RunningStreams(core, service)
        under_way = self._held, self._running
        self._subjects = SubjectKeys(core, store, service, self._leases, under_way, background.delivery)
        self._inline = inline_cipher(service)
        self._stored = stored_cipher(service)
        self._opener = Opener(service, self._leases, self._subjects, self._inline, self._stored)
        self._rewrapper = Rewrapper(core, service, self._subjects)
        waiting = waiting_of(core)
        self._overlap = Overlap(core)
        self._seal_one = waiting.heavy(self._inline.seal_one, 5)
        self._open_kept = waiting.heavy(self._inline.open_kept, 4)
        self._seal_many = waiting.heavy(self._inline.seal_many, 5)
        self._seal_subjects = waiting.heavy(self._stored.seal_many, 5)
        self._seal_subject = waiting.heavy(self._stored.seal_one, 5)
        self._single_use = policy.records == 1
        ciphers = self._inline, self._stored
        self._sealer = ColumnSealer(core, service, policy, self._subjects, self._held, *ciphers)
        self._column_opener = ColumnOpener(service, self._leases, self._subjects, self._held, *ciphers)
        self.after_fork()

    @property
    def tenant(self) -> str:
        """The tenant's name."""
        return self._service.tenant

    @property
    def name(self) -> str:
        """The service's name."""
        return self._service.name

    @property
    def service_id(self) -> bytes:
        """The 12 random bytes that envelopes of this service carry."""
        return self._service.service_id

    def __repr__(self) -> str:
        return f"<ServiceHandle {self._service.tenant}/{self._service.name}>"

    # ---- one record ----------------------------------------------------------------------------------

    def encrypt(self, data: Buffer, *, context: Context = None, subject: str | None = None) -> bytes:
        """Encrypt one record.

        Args:
            data: bytes-like, up to 2 GiB less 1 KiB.
            context: what must be the same again to decrypt: None, bytes, or a mapping of text to text.
            subject: the person (or thing) whose data key to use, for ``shred``.

        Raises:
            InvalidInput, LimitExceeded: nothing was done.
            TenantDark, RootUnavailable, StoreUnavailable: no data key was to be had.
        """
        encoded = ABSENT if context is None else encode_context(context)
        if subject is not None:
            opened = self._subjects.open([subject])
            sealed: bytes = self._seal_subject(opened.keys, 0, 0, opened.ids, encoded, data, True)
            return sealed
        if not self._single_use:
            return self._encrypt_shared([data], encoded)[0]
        while True:
            ready = self._pool.ready
            if ready is None or monotonic() > ready.expires:
                ready = self._pool.refill(ready)
            try:
                position = ready.positions.pop()
                sealed = self._seal_one(
                    ready.keys, position, ready.version, ready.wrapped, encoded, data, True
                )
                return sealed
            except IndexError:
                self._pool.refill(ready)  # used up, perhaps by other threads; the next look finds new ones
            except SecretMemoryError:
                if not ready.keys.wiped:
                    raise
                # Wiped between look and use. The next round asks the Core, which says so if the tenant is dark.
                self._pool.discard(ready)

    def decrypt(self, blob: Buffer, *, context: Context = None) -> bytes:
        """Decrypt one record.

        Raises:
            FormatError: not an envelope of a known version.
            DecryptError: another key, context, service or key store, or altered.
            KeyDestroyed: the subject's data key was shredded.
            TenantDark, RootUnavailable, StoreUnavailable: its key cannot be opened now.
        """
        encoded = ABSENT if context is None else encode_context(context)
        leases = self._leases
        if leases.kept:
            record: bytes | None = self._open_kept(leases.kept, leases.stands, leases.clock, encoded, blob)
            if record is not None:
                return record
        if (place := self._inline.place(blob)) is not None:
            record = self._opener.open_inline(blob, place, encoded)  # type: ignore[arg-type]  # it is bytes
            if record is not None:
                return record
        try:
            return bytes(self.decrypt_many([blob], context=context)[0])
        except OpenKCMError as error:
            error.index = None
            raise

    def encrypt_into(
        self, data: Buffer, out: Any, *, context: Context = None, subject: str | None = None
    ) -> int:
        """Encrypt one record into a buffer, as ``encrypt`` does into a new object each time: for large ones.

        Args:
            out: a writable buffer, at least 156 bytes longer than ``data`` (100 with a subject), and apart from it.

        Returns:
            how many bytes were written, from the first one on.

        Raises:
            as ``encrypt``; then ``out`` is as it was, or zeroed.
        """
        encoded = ABSENT if context is None else encode_context(context)
        check_out(out)
        if subject is not None:
            opened = self._subjects.open([subject])
            written: int = self._seal_subject(opened.keys, 0, 0, opened.ids, encoded, data, True, out)
            return written
        if not self._single_use:
            return write_row(self.encrypt_column, data, out, context=context)
        return write_sealed(self._pool, self._seal_one, encoded, data, out)

    def decrypt_into(self, blob: Buffer, out: Any, *, context: Context = None) -> int:
        """Decrypt one record into a buffer, which its owner can zero, as he cannot zero bytes.

        Args:
            out: a writable buffer of at least the plaintext's size, and apart from ``blob``.

        Returns: how many bytes were written, from the first one on.

        Raises:
            as ``decrypt``; no byte of what does not verify is left in ``out``.
        """
        encoded = ABSENT if context is None else encode_context(context)
        check_out(out)
        leases = self._leases
        if leases.kept:
            size: int | None = self._open_kept(leases.kept, leases.stands, leases.clock, encoded, blob, out)
            if size is not None:
                return size
        if (place := self._inline.place(blob)) is not None:
            size = self._opener.open_inline(blob, place, encoded, out)  # type: ignore[arg-type]  # it is bytes
            if size is not None:
                return size
        return write_row(self.decrypt_column, blob, out, context=context)

    # ---- many records --------------------------------------------------------------------------------

    def encrypt_many(
        self,
        records: Sequence[Buffer],
        *,
        context: Context = None,
        contexts: Sequence[Context] | None = None,
        subject: str | None = None,
        subjects: Sequence[str] | None = None,
        errors: Errors = "raise",
    ) -> list[Any]:
        """Encrypt a batch: envelopes in the order of the records.

        Args:
            records: bytes-like each.
            context: one for all; or ``contexts``, one each.
            subject: one for all; or ``subjects``, one each.
            errors: "raise" makes it all or nothing, the error's ``index`` naming the record; "return" puts an error
                in the place of each record that cannot be encrypted.

        Raises:
            as ``encrypt``.
        """
        in_place = check_errors(errors)
        items = as_list(records)
        each = None if contexts is None else as_list(contexts)
        names = subjects_of(subject, subjects, len(items))
        try:
            return self._encrypt_all(items, encode_contexts(context, each, len(items)), names)
        except OpenKCMError as error:
            if not in_place or error.index is None:
                raise
            return one_by_one(self._encrypt_all, items, context, each, names)

    def decrypt_many(
        self,
        blobs: Sequence[Buffer],
        *,
        context: Context = None,
        contexts: Sequence[Context] | None = None,
        errors: Errors = "raise",
    ) -> list[Any]:
        """Decrypt a batch: records in the order of the envelopes, which may be of any record kind and version.

        Args:
            errors: "raise" makes it all or nothing, the error's ``index`` naming the envelope; "return" puts an
                error in the place of each envelope that does not open.

        Raises:
            as ``decrypt``.
        """
        in_place = check_errors(errors)
        items = as_list(blobs)
        encoded = encode_contexts(context, contexts, len(items))

        def open_part(start: int, stop: int) -> list[Any]:
            part = items if stop - start == len(items) else items[start:stop]
            try:
                return self._opener.open(part, part_of(encoded, start, stop), in_place)
            except OpenKCMError as error:
                if error.index is not None:
                    error.index += start
                raise

        return self._overlap.run(items, open_part)

    def rewrap_many(self, blobs: Sequence[Buffer], *, errors: Errors = "raise") -> list[Any]:
        """Move the data keys of envelopes under the active service key; the data is not touched.

        An envelope whose data key is stored comes back as it is, its key being moved in the key store.

        Raises:
            as ``decrypt``. The payload is not opened, so an altered payload is not noticed here.
        """
        in_place = check_errors(errors)
        return settle(self._rewrapper.rewrap(as_list(blobs)), in_place)

    # ---- columns -------------------------------------------------------------------------------------

    def encrypt_column(
        self,
        column: Any,
        *,
        context: Context = None,
        contexts: Any = None,
        subject: str | None = None,
        subjects: Any = None,
        out: Any = None,
        threads: int = 1,
    ) -> Any:
        """Encrypt a column: an envelope for each row, as ``encrypt`` makes it, and null for null (docs/columns.md).

        Args:
            column: an Arrow array of binary or text (pyarrow's, or anything with the PyCapsule interface), a NumPy
                array of a fixed width, or (offsets, data).
            context: one for all; or ``contexts``, a column whose bytes (or UTF-8) are each row's, null for none.
            subject: one for all; or ``subjects``, a column of their names.
            out: a writable buffer for the data; new memory if it is None.
            threads: how many work on it.

        Returns:
            a pyarrow array for a pyarrow array, chunks for chunks, an ``openkcm.Column`` for all else.

        Raises:
            InvalidInput, LimitExceeded: nothing was written; ``index`` is the row, if it is about one.
            TenantDark, RootUnavailable, StoreUnavailable: no data key was to be had; ``out`` was zeroed.
        """
        return self._sealer.encrypt(
            column,
            self._shared,
            context=context,
            contexts=contexts,
            subject=subject,
            subjects=subjects,
            out=out,
            threads=threads,
        )

    def decrypt_column(
        self,
        column: Any,
        *,
        context: Context = None,
        contexts: Any = None,
        out: Any = None,
        threads: int = 1,
        errors: Literal["raise", "null"] = "raise",
        text: bool = False,
    ) -> Any:
        """Decrypt a column of envelopes, of any record kind and version; arguments as ``encrypt_column``.

        Args:
            errors: "raise" makes it all or nothing, the error's ``index`` naming the row; "null" makes each row that
                does not open null, and returns (column, reasons), ``reasons`` having the code of each such row's error.
            text: give text, and check that it is UTF-8.

        Raises:
            as ``decrypt_many`` and ``encrypt_column``.
        """
        return self._column_opener.decrypt(
            column, context=context, contexts=contexts, out=out, threads=threads, errors=errors, text=text
        )

    # ---- subjects ------------------------------------------------------------------------------------

    def shred(self, subject: str) -> bool:
        """Destroy a subject's data key: everything encrypted for them is unreadable, in every backup too.

        Returns:
            whether there was a key. The subject may be used again, with a new key.
        """
        return self._subjects.shred([subject]) > 0

    def rewrap_subjects(self) -> int:
        """Move every stored data key under the active service key; returns how many moved."""
        return self._subjects.rewrap_all()

    # ---- streams -------------------------------------------------------------------------------------

    def encrypt_stream(
        self, source: Reader, target: Writer, *, context: Context = None, subject: str | None = None
    ) -> int:
        """Encrypt a binary file object of any size into another, in constant memory; returns the bytes written."""
        encoded, since = encode_context(context), self._running.now()
        if subject is not None:
            opened = self._subjects.open([subject])
            return self._running.encrypt(
                Kind.STORED_STREAM, opened.keys, 0, opened.ids, encoded, since, source, target
            )
        keys = generate_keys(1)
        wrapped = self._core.wrap_keys(self._service, keys, Kind.INLINE_STREAM)
        return self._running.encrypt(
            Kind.INLINE_STREAM, keys, wrapped.version, wrapped.wrapped, encoded, since, source, target
        )

    def decrypt_stream(self, source: Reader, target: Writer, *, context: Context = None) -> int:
        """Decrypt what ``encrypt_stream`` wrote; returns the bytes written.

        Only verified bytes reach ``target``; if an error is raised they are not the whole, so throw them away.

        Raises:
            as ``decrypt``; in the middle too: when the tenant is killed, or could be with nobody here hearing of it.
        """
        return self._running.decrypt(source, target, encode_context(context), self._subjects)

    # ---- encrypting, inside --------------------------------------------------------------------------

    def _encrypt_all(self, items: list[Any], contexts: Contexts, names: list[str] | None) -> list[Any]:
        if names is None and not self._single_use:
            return self._encrypt_shared(items, contexts)

        def seal_part(start: int, stop: int) -> list[Any]:
            whole = stop - start == len(items)
            part = items if whole else items[start:stop]
            encoded = part_of(contexts, start, stop)
            try:
                if names is None:
                    return self._seal_fresh(part, encoded)
                return self._seal_stored(
                    part, encoded, names if whole or len(names) == 1 else names[start:stop]
                )
            except OpenKCMError as error:
                if error.index is not None:
                    error.index += start
                raise

        return self._overlap.run(items, seal_part)

    def _seal_fresh(self, part: list[Any], contexts: Contexts) -> list[bytes]:
        """A new data key for every record."""
        keys = generate_keys(len(part))
        wrapped = self._core.wrap_keys(self._service, keys, Kind.INLINE)
        try:
            return self._seal_many(keys, None, wrapped.version, wrapped.wrapped, contexts, part)
        finally:
            keys.wipe()

    def _seal_stored(self, part: list[Any], contexts: Contexts, names: list[str]) -> list[bytes]:
        """The data key of each record's subject."""
        distinct, index = index_of(names)
        try:
            opened = self._subjects.open(distinct)
        except (InvalidInput, LimitExceeded) as error:
            error.index = first_bad_subject(names) if len(names) == len(part) else None
            raise
        try:
            return self._seal_subjects(opened.keys, index, 0, opened.ids, contexts, part)
        finally:
            opened.keys.wipe()

    def _encrypt_shared(self, items: list[Any], contexts: Contexts) -> list[bytes]:
        """Data keys that serve several records each."""
        results: list[bytes] = []
        sizes = None if self._policy.bytes is None else [length_of(item) for item in items]
        while len(results) < len(items):
            start = len(results)
            key, taken = self._shared.reserve(sizes, start, len(items) - start)
            part = items if taken == len(items) else items[start : start + taken]
            encoded = part_of(contexts, start, start + taken)
            try:
                results += self._seal_many(key.keys, None, key.version, key.wrapped, encoded, part)
            except SecretMemoryError:
                if not key.keys.wiped:
                    raise  # else the next round asks the Core
            except OpenKCMError as error:
                if error.index is not None:
                    error.index += start
                raise
        return results

    # ---- what the Gateway tells ----------------------------------------------------------------------

    def wipe(self, closed: bool = False) -> None:
        """The tenant went dark, or the Gateway is ``closed``: zero what waits or is used, forget what is wrapped."""
        self.renew()
        self._running.wipe(closed)
        self._held.wipe(closed)
        self._subjects.forget()

    def renew(self) -> None:
        """The service's keys or its lease changed: new data keys go under the new one, kept ones are opened anew."""
        self._pool.wipe()
        self._shared.wipe()
        self._leases.wipe()

    def forget(self, ids: Sequence[bytes]) -> None:
        """Drop the data keys of subjects that were shredded, wherever they are at hand."""
        self._subjects.gone(ids)

    def after_fork(self) -> None:
        """Start without keys and with fresh locks; what waited belongs to the parent."""
        background = self._background
        self._pool = Pool(self._core, self._service, self._pool_policy, background.refills)
        self._shared = SharedKeys(self._pool, self._policy)
        self._running.after_fork()
        self._subjects.after_fork()
        self._leases.after_fork()
        self._held.after_fork()
