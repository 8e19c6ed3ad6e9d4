# SPDX-License-Identifier: Apache-2.0
"""Where a column's rows lie and where a result's go, for the Python backend; as ``_fast.cells``, ``places``, ``table``.

Invariant: it refuses what the native backend refuses, at the same row; nothing is copied but the row at hand.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator
from typing import Any, Final

import cffi

from ..errors import InvalidInput
from .parts import CODES, FIXED, NOTHING, OFFSETS, VIEWS, Part, Source
from .pure_records import RecordCipher, address_of

_ffi: Final = cffi.FFI()
_VIEW: Final = 16
_WITHIN: Final = 12
_MOST_ROWS: Final = 1 << 56
_MOST_BYTES: Final = 1 << 56
_MOST_NARROW: Final = 2**31 - 1
_SIGNED: Final[dict[int, Any]] = {1: "b", 2: "h", 4: "i", 8: "q"}


class _MalformedError(Exception):
    """A row says that it is where it cannot be."""


class _Piece:
    """The rows of one part."""

    def __init__(self, part: Part, name: str) -> None:
        self._name = name
        self._part = part
        self.count = part.count
        self._start = part.start
        if not (0 <= part.start <= _MOST_ROWS and 0 <= part.count <= _MOST_ROWS):
            raise InvalidInput(f"the {name} has a negative length or offset")
        self._layout = part.layout if part.count else NOTHING
        end = part.start + part.count
        self.spans: list[tuple[int, int]] = []
        self._held: list[memoryview] = []
        self._validity = None
        if part.validity is not None and part.count:
            self._validity = self._pin(part.validity, (end + 7) >> 3, 1)
        self._pin_layout(part, end)

    def _pin_layout(self, part: Part, end: int) -> None:
        width = part.width
        widths = {OFFSETS: (4, 8), CODES: (1, 2, 4, 8)}.get(self._layout, (width,))
        if width not in widths:
            raise InvalidInput(f"offsets of the {self._name} have 4 or 8 bytes, and codes 1, 2, 4 or 8")
        if self._layout == OFFSETS:
            self._places = self._pin(part.places, (end + 1) * width, width).cast(_SIGNED[width])
            last = max(self._places[part.start : end + 1]) if isinstance(part.data, int) else 0
            self._data = self._pin(part.data, max(last, 0) if isinstance(part.data, int) else 0, 1)
        elif self._layout == FIXED:
            self._data = self._pin(part.data, end * width, 1)
        elif self._layout == VIEWS:
            self._places = self._pin(part.places, end * _VIEW, 4)
            self._buffers = [
                self._pin(each, part.sizes[at] if isinstance(each, int) else 0, 1)
                for at, each in enumerate(part.buffers)
            ]
        elif self._layout == CODES:
            kind: Any = _SIGNED[width] if part.signed else _SIGNED[width].upper()
            self._places = self._pin(part.places, end * width, width).cast(kind)
            if part.values is None:
                raise InvalidInput(f"the dictionary of the {self._name} has no values")
            self._values = _Piece(part.values, self._name)
            self.spans += self._values.spans

    def _pin(self, source: Source, needed: int, align: int) -> memoryview:
        """The bytes of a buffer; of an address as many as are needed."""
        if source is None or (isinstance(source, int) and not source):
            size, place, view = 0, 0, memoryview(b"")
        elif isinstance(source, int):
            size, place = needed, source
            view = memoryview(_ffi.buffer(_ffi.cast("char *", source), needed))
        else:
            given = memoryview(source)
            if not given.c_contiguous:
                raise InvalidInput(f"a buffer of the {self._name} is not contiguous")
            size, place = given.nbytes, address_of(given)
            # What was given is held beside the view: cffi's own way of holding it does not survive the collector.
            self._held.append(given)
            # A view of the size that is needed can be cast to items of its width.
            wanted = needed if needed and needed <= size else size
            view = memoryview(_ffi.buffer(_ffi.cast("char *", place), wanted))
        if size < needed:
            raise InvalidInput(f"a buffer of the {self._name} ends before its last row")
        if needed and place % align:
            raise InvalidInput(f"a buffer of the {self._name} is not aligned to {align} bytes")
        self.spans.append((place, place + len(view)))
        return view

    def cell(self, at: int) -> memoryview | None:
        """One row's bytes, None for a null."""
        at += self._start
        if self._validity is not None and not self._validity[at >> 3] >> (at & 7) & 1:
            return None
        if self._layout == OFFSETS:
            begin, end = self._places[at], self._places[at + 1]
            if not 0 <= begin <= end <= len(self._data):
                raise _MalformedError
            return self._data[begin:end]
        if self._layout == FIXED:
            return self._data[at * self._part.width : (at + 1) * self._part.width]
        if self._layout == VIEWS:
            return self._view_cell(at)
        if self._layout == CODES:
            if not 0 <= self._places[at] < self._values.count:
                raise _MalformedError
            return self._values.cell(self._places[at])
        return None

    def _view_cell(self, at: int) -> memoryview:
        view = self._places[at * _VIEW : (at + 1) * _VIEW]
        size, _, buffer, begin = (
            int.from_bytes(view[field : field + 4], sys.byteorder, signed=True) for field in range(0, 16, 4)
        )
        if size < 0:
            raise _MalformedError
        if size <= _WITHIN:
            return view[4 : 4 + size]
        if not 0 <= buffer < len(self._buffers) or begin < 0 or begin + size > len(self._buffers[buffer]):
            raise _MalformedError
        data: memoryview = self._buffers[buffer][begin : begin + size]
        return data


class Cells:
    """The rows of one column, in any number of pieces; ``total`` counts their bytes without the nulls'."""

    def __init__(self, parts: list[Part], name: str) -> None:
        self.name = name
        self._parts = list(parts)
        self._pieces = [_Piece(part, name) for part in self._parts]
        self._firsts = [0]
        for piece in self._pieces:
            self._firsts.append(self._firsts[-1] + piece.count)
        self.count = self._firsts[-1]
        self._at = 0
        self.nulls = self.total = self.longest = 0
        for at, cell in enumerate(self.cells(0, self.count)):
            if cell is None:
                self.nulls += 1
            elif len(cell) > _MOST_BYTES - self.total:
                raise self._malformed(at)
            else:
                self.total += len(cell)
                self.longest = max(self.longest, len(cell))

    def __len__(self) -> int:
        return self.count

    def cells(self, start: int, stop: int) -> Iterator[memoryview | None]:
        """The rows from start to stop, None for a null."""
        if not 0 <= start <= stop <= self.count:
            raise IndexError("no such rows")
        for first, piece in zip(self._firsts, self._pieces, strict=False):
            for at in range(max(start, first), min(stop, first + piece.count)):
                try:
                    yield piece.cell(at - first)
                except _MalformedError:
                    raise self._malformed(at) from None

    def _malformed(self, at: int) -> InvalidInput:
        return InvalidInput(
            f"the {self.name} is malformed: this row's place is negative, out of order or past the end",
            index=at,
        )

    def value(self, at: int) -> bytes | None:
        """A copy of one row's bytes; None for a null."""
        (cell,) = self.cells(at, at + 1)
        return None if cell is None else bytes(cell)

    def first_over(self, limit: int) -> int:
        """The first row with more bytes than this; -1 if there is none."""
        if self.longest > limit:
            for at, cell in enumerate(self.cells(0, self.count)):
                if cell is not None and len(cell) > limit:
                    return at
        return -1

    def sizes(self, start: int, stop: int) -> array[int]:
        """The sizes of the rows from start to stop that are not null, in bytes."""
        return array("q", [len(cell) for cell in self.cells(start, stop) if cell is not None])

    def after(self, start: int, wanted: int) -> int:
        """The row behind the next ``wanted`` rows that are not null."""
        at = start
        for cell in self.cells(start, self.count):
            if wanted <= 0:
                break
            wanted -= cell is not None
            at += 1
        return at

    def valid(self, start: int, stop: int) -> int:
        """How many of the rows from start to stop are not null."""
        return len(self.sizes(start, stop)) if self.nulls else stop - start

    def overlaps(self, buffer: Any) -> bool:
        """Whether a row's bytes, or what says where they are, lie within a buffer."""
        begin = address_of(memoryview(buffer))
        end = begin + memoryview(buffer).nbytes
        spans = [span for piece in self._pieces for span in piece.spans]
        return any(first < end and begin < last for first, last in spans if first < last)


class Memory(bytearray):
    """Writable bytes for a result; ``again`` is the native backend's."""

    def __init__(self, source: int | bytes, again: bool = False) -> None:
        super().__init__(source)


Shared = memoryview
"""As the native backend's, but for one thread at a time: on the Python backend columns count on the GIL."""


class Places:
    """The places of a result's rows; a null takes none. ``wide`` asks for offsets of 8 bytes.

    ``most`` is the most that the rows take together: what is laid out to more was changed while it was read.
    """

    def __init__(self, count: int, most: int, wide: bool) -> None:
        self.count = count
        self.width = 8 if wide or most > _MOST_NARROW else 4
        self.total = self.nulls = 0
        self._most = most
        self._unfilled = bytearray()
        self.offsets = Memory((count + 1) * self.width)
        self.validity: Memory | None = None
        self.data: memoryview | None = None
        self._places = memoryview(self.offsets).cast(_SIGNED[self.width])
        self._target = memoryview(b"")

    def lay_sealed(self, cells: Cells, cipher: RecordCipher) -> None:
        """Give every row its own bytes and the cipher's overhead."""
        self._lay_all(cells, cipher.overhead)

    def lay_alike(self, cells: Cells, first: RecordCipher, second: RecordCipher) -> int:
        """Give every record its plaintext's bytes as if all were of one cipher, which the first row alone is asked for.

        Returns 1 for the first cipher, 2 for the second, 0 for neither or where a row is too short for it. Nothing
        else is looked at: that a row was of another is found when it is passed over.
        """
        cell = next((each for each in cells.cells(0, self.count) if each is not None), None)
        if cell is None:
            return 0
        if first.takes(cell) and first.version(cell):
            return 1 if self._lay_all(cells, -first.overhead) else 0
        if second.takes(cell) and not second.version(cell):
            return 2 if self._lay_all(cells, -second.overhead) else 0
        return 0

    def _lay_all(self, cells: Cells, more: int) -> bool:
        """Give every row its own bytes and so many more; False where a row has fewer than are to be taken away."""
        for at, cell in enumerate(cells.cells(0, self.count)):
            if cell is not None and len(cell) + more < 0:
                return False
            self._lay(at, None if cell is None else len(cell) + more)
        self._check_total()
        return True

    def lay_opened(
        self, cells: Cells, first: RecordCipher, second: RecordCipher, every: bool
    ) -> tuple[int, int, list[int]]:
        """Give every record its plaintext's bytes; (records of each cipher, rows that are of neither).

        Without ``every`` it ends at the first row of neither.
        """
        counts = [0, 0]
        bad: list[int] = []
        for at, cell in enumerate(cells.cells(0, self.count)):
            if cell is None:
                self._lay(at, None)
            elif first.takes(cell) and first.version(cell):
                counts[0] += 1
                self._lay(at, len(cell) - first.overhead)
            elif second.takes(cell) and not second.version(cell):
                counts[1] += 1
                self._lay(at, len(cell) - second.overhead)
            else:
                bad.append(at)
                if not every:
                    return counts[0], counts[1], bad
                self._lay(at, 0)
        self._check_total()
        return counts[0], counts[1], bad

    def _lay(self, at: int, size: int | None) -> None:
        self.total += size or 0
        self._places[at + 1] = min(self.total, self._most)
        if size is None:
            self._unset(at)

    def _check_total(self) -> None:
        """Not earlier: before a row that is no envelope there may be more than all take if that counts as one."""
        if self.total > self._most:
            raise InvalidInput("a buffer of the column was changed while it was read")

    def _unset(self, at: int) -> None:
        if self.validity is None:
            self.validity = Memory(b"\xff" * ((self.count + 7) >> 3))
            if self.count & 7:
                self.validity[-1] = (1 << (self.count & 7)) - 1
        self.nulls += self.validity[at >> 3] >> (at & 7) & 1
        self.validity[at >> 3] &= ~(1 << (at & 7))

    def expect(self, skipped: Iterable[int] = ()) -> None:
        """From now on every row that is not null has to be filled, but for these."""
        bits = self.validity
        self._unfilled = bytearray(
            1 if bits is None else bits[at >> 3] >> (at & 7) & 1 for at in range(self.count)
        )
        for at in skipped:
            self.filled(at)

    def filled(self, at: int) -> None:
        """A row is done with."""
        self._unfilled[at] = 0

    def first_unfilled(self, start: int, stop: int) -> int:
        """The first row from start on that has to be filled and was not; -1 if there is none."""
        return self._unfilled.find(1, start, stop)

    def attach(self, data: Any) -> None:
        """Set where the rows go: a writable, contiguous buffer that holds them all."""
        view = memoryview(data)
        if view.nbytes < self.total:
            raise InvalidInput(f"the result takes {self.total} bytes and out= has {view.nbytes}")
        self.data = view
        self._target = view.cast("B")

    def write(self, at: int, row: bytes) -> None:
        """Fill a row's place."""
        begin, end = self._places[at], self._places[at + 1]
        if end - begin != len(row):
            raise InvalidInput("a buffer of the column was changed while it was read")
        self._target[begin:end] = row
        self.filled(at)

    def wipe(self) -> None:
        """Zero the rows that were written."""
        self._target[: self.total] = bytes(min(self.total, len(self._target)))

    def clear(self, at: int) -> None:
        """Make a row null, and zero its place."""
        self._unset(at)
        if self.data is not None:
            self.write(at, bytes(self._places[at + 1] - self._places[at]))

    def first_no_text(self, start: int, stop: int) -> int:
        """The first row from start on that is not UTF-8, or ``stop``."""
        for at in range(start, stop):
            try:
                str(self._target[self._places[at] : self._places[at + 1]], "utf-8")
            except UnicodeDecodeError:
                return at
        return stop

    def stop_for(self, start: int, rows: int, size: int) -> int:
        """Where a run of at most so many rows and bytes, but one row at least, ends."""
        stop = min(start + rows, self.count)
        while stop > start + 1 and self._places[stop] - self._places[start] > size:
            stop = start + (stop - start) // 2
        return stop


class Table:
    """Distinct byte strings, numbered in the order in which they first appear."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._rows: list[int] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add_names(self, names: Cells, cells: Cells) -> int:
        """Take in the name of each row that is not null in ``cells``; the first row without a name, or -1."""
        if names.count != cells.count:
            raise InvalidInput(f"there are {cells.count} records and {names.count} subjects")
        pairs = zip(names.cells(0, names.count), cells.cells(0, cells.count), strict=True)
        for at, (name, cell) in enumerate(pairs):
            if cell is None:
                continue
            if name is None:
                return at
            self._add(bytes(name), at)
        return -1

    def add_ids(self, cipher: RecordCipher, cells: Cells) -> int:
        """Take in the part behind the version of each record of this cipher; how many records those are."""
        taken = 0
        for at, cell in enumerate(cells.cells(0, cells.count)):
            if cell is not None and cipher.takes(cell) and not cipher.version(cell):
                self._add(cipher.middle(cell), at)
                taken += 1
        return taken

    def _add(self, value: bytes, row: int) -> None:
        if value not in self._numbers:
            self._numbers[value] = len(self._rows)
            self._rows.append(row)

    def values(self, start: int, stop: int) -> list[bytes]:
        """The distinct values from one number to another."""
        return list(self._numbers)[max(start, 0) : stop]

    def row(self, number: int) -> int:
        """The row in which a value first appeared."""
        return self._rows[number]

    def find(self, value: bytes) -> int:
        """A value's number."""
        found = self._numbers.get(value)
        if found is None:
            raise InvalidInput("a buffer of the column was changed while it was read")
        return found
