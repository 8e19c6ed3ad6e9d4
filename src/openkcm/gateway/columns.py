# SPDX-License-Identifier: Apache-2.0
"""Columns: encrypted and decrypted from where they lie into one result, with no Python object a record.

Invariant: everything a caller hands in is checked before a byte of the result is written, and a result that is not
whole is zeroed. Apart from the result a thread takes less than 64 KiB: ``RUN`` keys, wrapped and open, at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from .. import crypto
from ..context import ABSENT, RAW_TAG, Context, encode_context
from ..crypto import Cells, KeyRing, Memory, Places, RecordCipher, RowContexts, SecretKeys, Table
from ..envelope import INLINE_OVERHEAD, STORED_OVERHEAD
from ..errors import InvalidInput, LimitExceeded, OpenKCMError, SecretMemoryError
from ..keys import KeyService, Kind, Service, check_subject
from ..limits import MAX_CONTEXT_BYTES, MAX_KEYS_PER_CALL, MAX_RECORD_BYTES
from ..waiting import Waiting, waiting_of
from .column import Column
from .policy import DataKeyPolicy
from .pool import SharedKeys
from .sharing import HeldKeys, check_threads, share
from .sources import Source, read_source
from .subjects import SubjectKeys

RUN: Final = 512
"""Rows with a data key each that are worked on at a time: 16 KiB of keys and 36 KiB of wrapped ones."""

LONG_RUN: Final = 2048
"""Rows that share keys with rows anywhere in the column."""

ONE_KEY_RUN: Final = 8192
"""Rows that share a key with those beside them; half a millisecond's work where they are small."""

RING: Final = 4 * MAX_KEYS_PER_CALL
"""Subjects whose keys are open at a time: 2 MiB of secret memory."""


@dataclass(slots=True)
class Job:
    """One call: the caller's column, checked, and the places of its result."""

    source: Source
    cells: Cells
    contexts: Any
    places: Places
    threads: int
    waiting: Waiting

    def attach(
        self, out: Any, others: Iterable[Cells] = (), *, sealed: bool = False, skipped: Iterable[int] = ()
    ) -> None:
        """Give the result its memory: the caller's, if it holds all of it and none of what is read.

        Memory of a result that is sealed is used again once nobody has it; plaintext goes back to the system. From now
        on every row but those ``skipped`` has to be filled.
        """
        self.places.expect(skipped)
        if out is None:
            self.places.attach(Memory(self.places.total, sealed))
            return
        try:
            view = memoryview(out)
        except (TypeError, ValueError, BufferError):
            raise InvalidInput(f"out= is a writable buffer, not {type(out).__name__}") from None
        if view.readonly or not view.c_contiguous:
            raise InvalidInput("out= must be writable and contiguous")
        if view.ndim != 1 or view.format != "B":
            try:
                view = view.cast("B")
            except (TypeError, ValueError):
                raise InvalidInput("out= is a buffer of plain bytes or numbers") from None
        bound = [self.contexts.cells] if isinstance(self.contexts, RowContexts) else []
        for each in (self.cells, *bound, *others):
            if each.overlaps(view):
                raise InvalidInput("out= overlaps a buffer that is read")
        self.places.attach(view)

    def share(self, rows: int, work: Callable[[int, int], None]) -> None:
        """Work on runs of the rows, in the caller's number of threads."""
        share(self.places, rows, self.threads, work, self.waiting)

    def check_filled(self) -> None:
        """Raise InvalidInput if a row was passed over, which its buffer has to have been changed for."""
        row = self.places.first_unfilled(0, self.places.count)
        if row >= 0:
            raise InvalidInput(f"a buffer of the {self.cells.name} was changed while it was read", index=row)

    def result(self, text: bool = False) -> Any:
        """The finished column, in the shape of the caller's."""
        places = self.places
        validity = None if places.validity is None else memoryview(places.validity)
        offsets = memoryview(places.offsets).cast("i" if places.width == 4 else "q")
        assert places.data is not None
        data = memoryview(places.data)[: places.total]
        return self.source.give(Column(offsets, data, validity, places.nulls, text))


def row_contexts(context: Context, contexts: Any, cells: Cells) -> Any:
    """One encoded context for all rows, or one a row: the row's bytes as they would be given to ``encrypt``."""
    if contexts is None:
        return encode_context(context)
    if context is not None:
        raise InvalidInput("give context= for all records or contexts= for each, not both")
    each = Cells(read_source(contexts, "contexts").parts, "contexts")
    if each.count != cells.count:
        raise InvalidInput(f"there are {cells.count} records and {each.count} contexts")
    over = each.first_over(MAX_CONTEXT_BYTES - len(RAW_TAG))
    if over >= 0:
        raise LimitExceeded(
            f"a context takes at most {MAX_CONTEXT_BYTES} bytes, with one for its kind", index=over
        )
    return RowContexts(each, ABSENT, RAW_TAG)


class ColumnSealer:
    """Encrypts columns for one service."""

    def __init__(
        self,
        core: KeyService,
        service: Service,
        policy: DataKeyPolicy,
        subjects: SubjectKeys,
        held: HeldKeys,
        inline: RecordCipher,
        stored: RecordCipher,
    ) -> None:
        self._core = core
        self._service = service
        self._policy = policy
        self._subjects = subjects
        self._held = held
        self._inline = inline
        self._stored = stored
        self._waiting = waiting = waiting_of(core)
        self._seal_rows = waiting.heavy_rows(crypto.seal_rows)
        self._seal_names = waiting.heavy_rows(crypto.seal_named)

    def encrypt(
        self,
        column: Any,
        shared: SharedKeys,
        *,
        context: Context,
        contexts: Any,
        subject: str | None,
        subjects: Any,
        out: Any,
        threads: int,
    ) -> Any:
        """As ``ServiceHandle.encrypt_column``; ``shared`` has the keys that serve several records each."""
        if subject is not None and subjects is not None:
            raise InvalidInput("give subject= for all records or subjects= for each, not both")
        source = read_source(column, "column")
        cells = Cells(source.parts, "column")
        over = cells.first_over(MAX_RECORD_BYTES)
        if over >= 0:
            raise LimitExceeded(
                f"a record has at most {MAX_RECORD_BYTES} bytes; use a stream for larger data", index=over
            )
        stored = subject is not None or subjects is not None
        if subject is not None:
            check_subject(subject)
        names = None if subjects is None else self._names(subjects, cells)
        bound = row_contexts(context, contexts, cells)
        most = cells.total + (STORED_OVERHEAD if stored else INLINE_OVERHEAD) * (cells.count - cells.nulls)
        places = Places(cells.count, most, source.wide)
        places.lay_sealed(cells, self._stored if stored else self._inline)
        job = Job(source, cells, bound, places, check_threads(threads), self._waiting)
        job.attach(out, () if names is None else (names[0],), sealed=True)
        try:
            if names is not None:
                self._seal_named(job, *names)
            elif subject is not None:
                job.share(ONE_KEY_RUN, lambda start, stop: self._seal_subject(job, subject, start, stop))
            elif self._policy.records == 1:
                job.share(RUN, lambda start, stop: self._seal_fresh(job, start, stop))
            else:
                job.share(ONE_KEY_RUN, lambda start, stop: self._seal_shared(job, shared, start, stop))
            job.check_filled()
        except BaseException:
            places.wipe()
            raise
        return job.result()

    def _seal_fresh(self, job: Job, start: int, stop: int) -> None:
        """A new data key for every record."""
        count = job.cells.valid(start, stop)
        if count:
            keys = crypto.generate_keys(count)
            try:
                wrapped = self._core.wrap_keys(self._service, keys, Kind.INLINE)
                self._seal_run(job, self._inline, start, stop, keys, False, wrapped.version, wrapped.wrapped)
            finally:
                keys.wipe()

    def _seal_shared(self, job: Job, shared: SharedKeys, start: int, stop: int) -> None:
        """Data keys that serve several records each."""
        while count := job.cells.valid(start, stop):
            sizes = None if self._policy.bytes is None else job.cells.sizes(start, stop)
            key, taken = shared.reserve(sizes, 0, count)
            end = stop if taken == count else job.cells.after(start, taken)
            try:
                self._seal_run(job, self._inline, start, end, key.keys, True, key.version, key.wrapped)
            except SecretMemoryError:
                if not key.keys.wiped:
                    raise
                continue  # the next round asks the Core
            start = end

    def _seal_subject(self, job: Job, subject: str, start: int, stop: int) -> None:
        """One subject's data key, opened anew for every run: a shred in between is seen."""
        if job.cells.valid(start, stop):
            opened = self._subjects.open([subject])
            try:
                self._seal_run(job, self._stored, start, stop, opened.keys, True, 0, opened.ids)
            finally:
                opened.keys.wipe()

    def _seal_run(
        self,
        job: Job,
        cipher: RecordCipher,
        start: int,
        stop: int,
        keys: SecretKeys,
        shared: bool,
        version: int,
        middles: bytes,
    ) -> None:
        self._seal_rows(
            cipher, job.cells, job.contexts, job.places, start, stop, keys, shared, version, middles
        )

    # ---- a subject a row -------------------------------------------------------------------------------

    def _names(self, subjects: Any, cells: Cells) -> tuple[Cells, Table]:
        """The subjects of the rows, each found once and fit to be one."""
        names = Cells(read_source(subjects, "subjects").parts, "subjects")
        table = Table()
        missing = table.add_names(names, cells)
        if missing >= 0:
            raise InvalidInput("a record that is not null needs a subject", index=missing)
        for start in range(0, len(table), RING):
            decode_subjects(table, start)
        return names, table

    def _seal_named(self, job: Job, names: Cells, table: Table) -> None:
        """Open the keys of all subjects in a few calls, then go through the rows as they stand."""
        for first in range(0, len(table), RING):
            self._held.again(lambda first=first: self._seal_ring(job, names, table, first))  # type: ignore[misc]

    def _seal_ring(self, job: Job, names: Cells, table: Table, first: int) -> None:
        """Seal the rows of one ring's worth of subjects."""
        since = self._held.now()
        opened = list(self._subjects.open_chunks(decode_subjects(table, first)))
        ring = KeyRing(first, [each.keys for each in opened], [each.ids for each in opened])

        def seal(start: int, stop: int) -> None:
            self._seal_names(
                self._stored, job.cells, job.contexts, job.places, start, stop, table, names, ring
            )

        with self._held.holding([ring], b"".join([each.ids for each in opened]), since):
            job.share(LONG_RUN, seal)


def decode_subjects(table: Table, start: int) -> list[str]:
    """The names of one ring's worth of subjects, checked."""
    names: list[str] = []
    try:
        for value in table.values(start, start + RING):
            names.append(check_subject(value.decode()))
    except UnicodeDecodeError:
        raise InvalidInput(
            "a subject is text, and this one is no UTF-8", index=table.row(start + len(names))
        ) from None
    except OpenKCMError as error:
        error.index = table.row(start + len(names))
        raise
    return names
