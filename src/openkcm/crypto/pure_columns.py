# SPDX-License-Identifier: Apache-2.0
"""Columns on the Python backend: the records of a run are batches of ``pure_records``.

Invariant: the same names, results and errors as ``openkcm._fast.column``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from ..errors import InvalidInput
from .pure import SecretKeys
from .pure_cells import Cells, Places, Table
from .pure_records import RecordCipher

Refused: TypeAlias = list[tuple[int, int]]

_ABSENT = 1


class RowContexts:
    """A context for each row: ``present`` and its bytes, or ``absent`` alone for a null; one byte each."""

    def __init__(self, cells: Cells, absent: bytes, present: bytes) -> None:
        self.cells = cells
        self._absent = absent
        self._present = present

    def encoded(self, at: int) -> bytes:
        """The context of a row."""
        value = self.cells.value(at)
        return self._absent if value is None else self._present + value


class KeyRing:
    """Open keys of the values of a table, from number ``first`` on, with the middle part of each."""

    def __init__(self, first: int, keys: Sequence[SecretKeys], middles: Sequence[bytes]) -> None:
        self.first = first
        self.handles = list(keys)
        self.middles = list(middles)
        self.count = sum(len(each) for each in self.handles)

    def wipe(self) -> None:
        """Zero every key."""
        for handle in self.handles:
            handle.wipe()

    def place(self, number: int) -> tuple[int, int]:
        """The handle and the position in it of the key with this number on the ring."""
        return divmod(number, len(self.handles[0]))


class Turns:
    """The threads of one call, which here wait for the interpreter as all do."""

    def __enter__(self) -> None:
        """Take part."""

    def __exit__(self, *raised: object) -> None:
        """Have done."""


def _contexts_of(contexts: Any, rows: Sequence[int]) -> Any:
    return [contexts.encoded(at) for at in rows] if isinstance(contexts, RowContexts) else contexts


def _check(cells: Cells, contexts: Any) -> None:
    if isinstance(contexts, RowContexts) and contexts.cells.count != cells.count:
        raise InvalidInput("there must be one context for each record")


def _rows(cells: Cells, start: int, stop: int) -> dict[int, Any]:
    return {at: cell for at, cell in enumerate(cells.cells(start, stop), start) if cell is not None}


def seal_rows(
    cipher: RecordCipher,
    cells: Cells,
    contexts: Any,
    places: Places,
    start: int,
    stop: int,
    keys: SecretKeys,
    shared: bool,
    version: int,
    middles: bytes,
) -> None:
    """Seal a run of rows: each that is not null under the next of the keys, or with ``shared`` all under the first."""
    _check(cells, contexts)
    rows = _rows(cells, start, stop)
    index = [0] * len(rows) if shared else range(len(rows))
    bound = _contexts_of(contexts, list(rows))
    sealed = cipher.seal_many(keys, index, version, middles, bound, rows.values())
    for at, blob in zip(rows, sealed, strict=True):
        places.write(at, blob)


def seal_named(
    cipher: RecordCipher,
    cells: Cells,
    contexts: Any,
    places: Places,
    start: int,
    stop: int,
    table: Table,
    names: Cells,
    ring: KeyRing,
) -> None:
    """Seal those of a run of rows whose name's key is on the ring."""
    _check(cells, contexts)
    rows = _rows(cells, start, stop)
    found = {at: table.find(names.value(at) or b"") - ring.first for at in rows}
    for handle, owners in _by_handle(found, ring).items():
        bound = _contexts_of(contexts, list(owners))
        sealed = cipher.seal_many(
            ring.handles[handle],
            list(owners.values()),
            0,
            ring.middles[handle],
            bound,
            [rows[at] for at in owners],
        )
        for at, blob in zip(owners, sealed, strict=True):
            places.write(at, blob)


def _by_handle(numbers: dict[int, int], ring: KeyRing) -> dict[int, dict[int, int]]:
    """Rows whose key is on the ring: for each handle the position of each row's key."""
    groups: dict[int, dict[int, int]] = {}
    for at, number in numbers.items():
        if 0 <= number < ring.count:
            handle, position = ring.place(number)
            groups.setdefault(handle, {})[at] = position
    return groups


def gather_rows(
    cipher: RecordCipher, cells: Cells, start: int, stop: int, after: int, most: int
) -> tuple[int, bytes, bool] | None:
    """Collect the middles of this cipher's records of the lowest version above ``after``: (version, packed middles,
    whether there are higher versions), or None. Records that follow each other with one middle give it once.

    With more than ``most`` middles the version is 0, and nothing was collected.
    """
    rows = [cell for cell in _rows(cells, start, stop).values() if cipher.takes(cell)]
    versions = {found for cell in rows if (found := cipher.version(cell)) > after}
    if not versions:
        return None
    version = min(versions)
    middles: list[bytes] = []
    for cell in rows:
        if cipher.version(cell) == version and (middle := cipher.middle(cell)) not in middles[-1:]:
            middles.append(middle)
    if len(middles) > most:
        return 0, b"", True
    return version, b"".join(middles), len(versions) > 1


def open_rows(
    cipher: RecordCipher,
    cells: Cells,
    contexts: Any,
    places: Places,
    start: int,
    stop: int,
    version: int,
    keys: SecretKeys,
    without: bytes,
) -> Refused:
    """Open this cipher's records of one version, with a key for each middle that ``gather_rows`` gave.

    ``without`` has a byte for each key that is not there, or is empty. Returns the rows that did not verify and those
    whose key is not there, each with its key's number (-1 if it is there).
    """
    _check(cells, contexts)
    owners: dict[int, int] = {}
    last, number = b"", -1
    rows = _rows(cells, start, stop)
    for at, cell in rows.items():
        if cipher.takes(cell) and cipher.version(cell) == version:
            number += (middle := cipher.middle(cell)) != last
            owners[at], last = number, middle
    if number >= len(keys):
        raise InvalidInput("a buffer of the column was changed while it was read")
    refused = [(at, number) for at, number in owners.items() if without and without[number]]
    left = {at: number for at, number in owners.items() if not (without and without[number])}
    for at, _ in refused:
        places.filled(at)
    return sorted(refused + _open(cipher, keys, left, rows, contexts, places))


def open_named(
    cipher: RecordCipher,
    cells: Cells,
    contexts: Any,
    places: Places,
    start: int,
    stop: int,
    table: Table,
    ring: KeyRing,
    without: bytes,
) -> Refused:
    """Open those of this cipher's records whose key is on the ring; gives what ``open_rows`` does, with numbers of the
    table.

    ``without`` is empty, or has a byte for each key of the ring: 1 for one that is not there, 2 for one whose rows are
    not to be looked at.
    """
    _check(cells, contexts)
    rows = {
        at: cell
        for at, cell in _rows(cells, start, stop).items()
        if cipher.takes(cell) and not cipher.version(cell)
    }
    numbers = {at: table.find(cipher.middle(cell)) - ring.first for at, cell in rows.items()}
    numbers = {at: number for at, number in numbers.items() if 0 <= number < ring.count}
    refused = [
        (at, number + ring.first) for at, number in numbers.items() if without and without[number] == _ABSENT
    ]
    left = {at: number for at, number in numbers.items() if not (without and without[number])}
    for at, _ in refused:
        places.filled(at)
    for handle, owners in _by_handle(left, ring).items():
        refused += _open(cipher, ring.handles[handle], owners, rows, contexts, places)
    return sorted(refused)


def _open(
    cipher: RecordCipher,
    keys: SecretKeys,
    owners: dict[int, int],
    rows: dict[int, Any],
    contexts: Any,
    places: Places,
) -> Refused:
    """Open rows under the key at each one's position; those that did not verify."""
    # Copies: a cipher may read a ciphertext twice, and what lies in a caller's buffer may be changed in between.
    blobs = [bytes(rows[at]) for at in owners]
    bound = _contexts_of(contexts, list(owners))
    opened, _ = cipher.open_many(keys, list(owners.values()), bound, blobs, True)
    refused: Refused = []
    for at, row, blob in zip(owners, opened, blobs, strict=True):
        if row is None:
            refused.append((at, -1))
        places.write(at, bytes(len(blob) - cipher.overhead) if row is None else row)
    return refused
