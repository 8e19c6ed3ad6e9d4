# SPDX-License-Identifier: Apache-2.0
"""Opening a column of envelopes, of any record kind and version among each other.

Invariant: as in ``opener``: plaintext stands only where tag and commitment were right; every other row's place is zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from .. import crypto
from ..context import Context
from ..crypto import Cells, KeyRing, Places, RecordCipher, SecretKeys, Table
from ..envelope import STORED_OVERHEAD
from ..errors import DecryptError, InvalidInput, OpenKCMError
from ..keys import Kind, Service, WrappedKeys
from ..limits import MAX_KEYS_PER_CALL
from .batches import at_index, parse_record
from .column import reasons_column
from .columns import LONG_RUN, ONE_KEY_RUN, RING, RUN, Job, row_contexts
from .leases import Leases
from .sharing import HeldKeys, check_threads
from .sources import read_source
from .subjects import OpenGroup, SubjectKeys

REPORT, PASS_OVER = 1, 2
"""What to do with the rows of a key that is not there: tell them, or leave them to another round."""


class _MixedError(Exception):
    """A column has rows of several kinds, or such as are none."""


class ColumnOpener:
    """Decrypts columns of one service."""

    def __init__(
        self,
        service: Service,
        leases: Leases,
        subjects: SubjectKeys,
        held: HeldKeys,
        inline: RecordCipher,
        stored: RecordCipher,
    ) -> None:
        self._service = service
        self._leases = leases
        self._subjects = subjects
        self._held = held
        self._inline = inline
        self._stored = stored
        self._waiting = waiting = leases.waiting
        self._open_rows = waiting.heavy_rows(crypto.open_rows)
        self._open_names = waiting.heavy_rows(crypto.open_named)

    def decrypt(
        self, column: Any, *, context: Context, contexts: Any, out: Any, threads: int, errors: str, text: bool
    ) -> Any:
        """As ``ServiceHandle.decrypt_column``."""
        if errors not in ("raise", "null"):
            raise InvalidInput('errors is "raise" or "null"')
        threads = check_threads(threads)
        source = read_source(column, "column")
        cells = Cells(source.parts, "column")
        bound = row_contexts(context, contexts, cells)
        most = cells.total
        # Here each row is an envelope, or the first that is none is all there is to say.
        if errors == "raise":
            most = max(most - STORED_OVERHEAD * (cells.count - cells.nulls), 0)

        def job() -> Job:
            return Job(source, cells, bound, Places(cells.count, most, source.wide), threads, self._waiting)

        if errors == "raise":
            with contextlib.suppress(_MixedError):
                return self._decrypt_alike(job(), out, text)
        return self._decrypt_any(job(), out, errors, text)

    def _decrypt_alike(self, job: Job, out: Any, text: bool) -> Any:
        """Decrypt a column whose rows are all of one kind, so that each is looked at once less.

        Raises:
            _MixedError: they are not, or would not fit in ``out``; what was written is zeroed.
        """
        kind = job.places.lay_alike(job.cells, self._inline, self._stored)
        if not kind:
            raise _MixedError
        # Inline rows that were taken for stored ones would be written beyond the result's end: ids are looked at first.
        ids = self._ids(job.cells, every=True) if kind == 2 else None
        failures = Failures(raising=True)
        try:
            job.attach(out)
        except InvalidInput:
            raise _MixedError from None
        try:
            if ids is None:
                self._share_inline(job, failures, alike=True)
            else:
                self._open_stored(job, failures, ids)
            if job.places.first_unfilled(0, job.places.count) >= 0:
                raise _MixedError
            return self._finish(job, failures, text)
        except BaseException:
            job.places.wipe()
            raise

    def _decrypt_any(self, job: Job, out: Any, errors: str, text: bool) -> Any:
        """Decrypt a column after a look at what each row is."""
        cells, places = job.cells, job.places
        inline, stored, bad = places.lay_opened(cells, self._inline, self._stored, errors == "null")
        failures = Failures(errors == "raise")
        for at in bad:
            failures.add(at, self._why(cells, at))
        failures.settle()
        job.attach(out, skipped=bad)
        try:
            if inline:
                self._share_inline(job, failures)
            if stored:
                self._open_stored(job, failures, self._ids(cells))
            job.check_filled()
            result = self._finish(job, failures, text)
            if errors == "raise":
                return result
            return result, job.source.give(reasons_column(places.count, failures.errors))
        except BaseException:
            places.wipe()
            raise

    def _finish(self, job: Job, failures: Failures, text: bool) -> Any:
        """The result, in which a row that failed is null."""
        places = job.places
        if text:
            job.share(LONG_RUN, lambda start, stop: _check_text(places, failures, start, stop))
        for at in failures.errors:
            places.clear(at)
        return job.result(text)

    def _why(self, cells: Cells, at: int) -> OpenKCMError:
        """What is wrong with a row that is no record of this service."""
        try:
            parse_record(cells.value(at) or b"", self._service.service_id)
        except OpenKCMError as error:
            return error
        return InvalidInput("too short or too long for a record")

    def _shares_keys(self, cells: Cells) -> bool:
        """Whether the column begins with records that share data keys, so that longer runs are worth trying."""
        gathered = crypto.gather_rows(self._inline, cells, 0, min(cells.count, RUN), 0, RUN // 8)
        return gathered is not None and gathered[0] != 0

    def _share_inline(self, job: Job, failures: Failures, alike: bool = False) -> None:
        """Open the envelopes in runs; with ``alike``, a run in which one was passed over raises _MixedError."""

        def open_inline(start: int, stop: int) -> None:
            self._open_inline(job, failures, start, stop)
            if alike and job.places.first_unfilled(start, stop) >= 0:
                raise _MixedError

        job.share(ONE_KEY_RUN if self._shares_keys(job.cells) else RUN, open_inline)

    def _open_inline(self, job: Job, failures: Failures, start: int, stop: int) -> None:
        """A run of envelopes at once where it carries few data keys, else a part at a time."""
        if not self._open_run(job, failures, start, stop):
            for first in range(start, stop, RUN):
                self._open_run(job, failures, first, min(first + RUN, stop))
        failures.settle()

    def _open_run(self, job: Job, failures: Failures, start: int, stop: int) -> bool:
        """One call for each version among the data keys, so mostly one; False if there are more keys than ``RUN``."""
        gathered = crypto.gather_rows(self._inline, job.cells, start, stop, 0, RUN)
        while gathered is not None:
            version, packed, more = gathered
            if not version:
                return False
            keys, failed = self._leases.open(WrappedKeys(Kind.INLINE, version, packed))
            try:
                refused = self._open_rows(
                    self._inline,
                    job.cells,
                    job.contexts,
                    job.places,
                    start,
                    stop,
                    version,
                    keys,
                    _marks(len(keys), failed) if failed else b"",
                )
            finally:
                keys.wipe()
            failures.add_all(refused, failed)
            gathered = (
                crypto.gather_rows(self._inline, job.cells, start, stop, version, RUN) if more else None
            )
        return True

    # ---- data keys of subjects -------------------------------------------------------------------------

    def _ids(self, cells: Cells, every: bool = False) -> Table:
        """The ids of the stored records; with ``every``, a row that is none and no null raises _MixedError."""
        ids = Table()
        if ids.add_ids(self._stored, cells) + cells.nulls < cells.count and every:
            raise _MixedError
        return ids

    def _open_stored(self, job: Job, failures: Failures, ids: Table) -> None:
        """Open the keys of all ids in a few calls, then go through the rows as they stand."""
        for first in range(0, len(ids), RING):
            self._held.again(lambda first=first: self._open_rings(job, failures, ids, first))  # type: ignore[misc]

    def _open_rings(self, job: Job, failures: Failures, table: Table, first: int) -> None:
        """Open the rows of one ring's worth of ids: a ring for each service key version among their keys."""
        since, touch = self._held.now(), self._held.touch()
        ids = table.values(first, first + RING)
        slices = self._open_ids(ids)
        failed = {
            first + number * MAX_KEYS_PER_CALL + at: error
            for number, each in enumerate(slices)
            for at, error in each.failures.items()
        }
        opened = next((each for at, each in enumerate(ids, first) if at not in failed), None)
        still = partial(touch.check, partial(self._open_again, opened)) if opened else _nothing
        rings, marks = [], []
        for turn in range(max(len(each.rounds) for each in slices)):
            rounds = [each.round(turn) for each in slices]
            rings.append(KeyRing(first, [keys for keys, _ in rounds], [each.ids for each in slices]))
            marks.append(b"".join([each for _, each in rounds]))
        with self._held.holding(rings, b"".join(ids), since):
            for ring, left_out in zip(rings, marks, strict=True):
                self._open_ring(job, failures, table, ring, left_out if any(left_out) else b"", failed, still)

    def _open_ring(
        self,
        job: Job,
        failures: Failures,
        table: Table,
        ring: KeyRing,
        marks: bytes,
        failed: dict[int, OpenKCMError],
        still: Callable[[], None],
    ) -> None:
        def open_run(start: int, stop: int) -> None:
            still()
            refused = self._open_names(
                self._stored, job.cells, job.contexts, job.places, start, stop, table, ring, marks
            )
            failures.add_all(refused, failed)
            failures.settle()

        job.share(LONG_RUN, open_run)

    def _open_again(self, key_id: bytes) -> None:
        """Have the Core say of one key what a kill would change for all."""
        groups, failures = self._subjects.open_ids([key_id])
        for each in groups:
            each.keys.wipe()
        if failures:
            raise failures[0]

    def _open_ids(self, ids: list[bytes]) -> list[_Slice]:
        """Open the keys of one ring's worth of ids, a call's worth at a time."""
        slices: list[_Slice] = []
        for opened, failures in self._subjects.open_ids_chunks(ids):
            start = len(slices) * MAX_KEYS_PER_CALL
            part = ids[start : start + MAX_KEYS_PER_CALL]
            slices.append(_Slice(b"".join(part), failures, _rounds(opened, failures, len(part))))
        return slices


def _rounds(
    opened: list[OpenGroup], failures: Mapping[int, OpenKCMError], count: int
) -> list[tuple[SecretKeys, bytes]]:
    """The keys of each service key version are one round: a key for each id, and what to do with its rows."""
    rounds: list[tuple[SecretKeys, bytes]] = []
    for group in opened or (None,):
        marks = bytearray([PASS_OVER]) * count
        for at in group.positions if group is not None else ():
            marks[at] = 0
        for at in failures:
            marks[at] = PASS_OVER if rounds else REPORT  # told once
        rounds.append((_in_order(group, count), bytes(marks)))
    return rounds


class _Slice:
    """One call's worth of ids, and the rounds in which their keys are used."""

    def __init__(
        self, ids: bytes, failures: dict[int, OpenKCMError], rounds: list[tuple[SecretKeys, bytes]]
    ) -> None:
        self.ids = ids
        self.failures = failures
        self.rounds = rounds

    def round(self, turn: int) -> tuple[SecretKeys, bytes]:
        """The keys of a round, or keys that open nothing where there are no more."""
        if turn < len(self.rounds):
            return self.rounds[turn]
        count = len(self.rounds[0][1])
        return crypto.generate_keys(count), bytes([PASS_OVER]) * count


def _in_order(group: OpenGroup | None, count: int) -> SecretKeys:
    """A key for each id in the order of the ids; a key that nobody has where there is none."""
    if group is None:
        return crypto.generate_keys(count)
    if len(group.positions) == count:
        return group.keys
    where = {at: local for local, at in enumerate(group.positions)}
    chosen = group.keys.select([where.get(at, 0) for at in range(count)])
    group.keys.wipe()
    return chosen


class Failures:
    """The rows that did not open and why; shared by threads, each of which adds rows of its own."""

    def __init__(self, raising: bool) -> None:
        self._raising = raising
        self.errors: dict[int, OpenKCMError] = {}

    def add(self, row: int, error: OpenKCMError) -> None:
        """Note a row's error."""
        self.errors[row] = at_index(error, row)

    def add_all(self, refused: list[tuple[int, int]], failed: Any) -> None:
        """Note rows that were refused; each comes with its key's number in ``failed``, or -1."""
        for row, number in refused:
            self.add(row, failed[number] if number >= 0 else DecryptError())

    def settle(self) -> None:
        """Raise the error of the first row, if errors are to be raised."""
        if self._raising and self.errors:
            raise self.errors[min(self.errors.copy())]


def _nothing() -> None:
    """What is to be checked where no key is open."""


def _marks(count: int, failed: Any) -> bytes:
    marks = bytearray(count)
    for at in failed:
        marks[at] = REPORT
    return bytes(marks)


def _check_text(places: Places, failures: Failures, start: int, stop: int) -> None:
    """Rows of text are UTF-8."""
    while (start := places.first_no_text(start, stop)) < stop:
        failures.add(
            start,
            InvalidInput("this row was decrypted and is no text (UTF-8); ask for bytes, without text=True"),
        )
        failures.settle()
        start += 1
