# SPDX-License-Identifier: Apache-2.0
"""A column of results: one run of bytes, and where each row begins in it.

Invariant: it has the buffers of an Arrow array and hands them over uncopied, to whoever speaks Arrow's PyCapsule
interface; without any Arrow library it is readable through the buffer protocol.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from typing import Any, overload

from ..crypto import export_array, export_schema
from ..errors import OpenKCMError


class Column:
    """Bytes (or text) a row, nulls among them; what ``encrypt_column`` and ``decrypt_column`` return.

    Attributes:
        offsets: n + 1 offsets into ``data``, as a memoryview of 32-bit integers ("i") or of 64-bit ones ("q").
        data: the rows, one after the other.
        validity: a bit a row, least significant first, 0 for a null; None when there are no nulls.
        null_count: how many rows are null.
        text: whether the rows are text.
    """

    __slots__ = ("data", "null_count", "offsets", "text", "validity")

    def __init__(self, offsets: Any, data: Any, validity: Any, null_count: int, text: bool) -> None:
        self.offsets: memoryview = offsets
        self.data: memoryview = data
        self.validity: memoryview | None = validity
        self.null_count = null_count
        self.text = text

    @property
    def nbytes(self) -> int:
        """The bytes of all its buffers."""
        bits = 0 if self.validity is None else self.validity.nbytes
        return self.offsets.nbytes + self.data.nbytes + bits

    @property
    def large(self) -> bool:
        """Whether its offsets have 64 bits."""
        return self.offsets.itemsize == 8

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[bytes | str | None]:
        return (self[at] for at in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> bytes | str | None: ...

    @overload
    def __getitem__(self, index: slice) -> list[bytes | str | None]: ...

    def __getitem__(self, index: int | slice) -> Any:
        """One row as bytes (or str), None for a null; a slice is a list of such."""
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError("a column has no such row")
        if self.validity is not None and not self.validity[at >> 3] >> (at & 7) & 1:
            return None
        row = bytes(self.data[self.offsets[at] : self.offsets[at + 1]])
        return row.decode() if self.text else row

    def __repr__(self) -> str:
        kind = ("large_" if self.large else "") + ("string" if self.text else "binary")
        return f"<Column {kind} rows={len(self)} nulls={self.null_count}>"

    # ---- Arrow -----------------------------------------------------------------------------------------

    @property
    def _format(self) -> str:
        return ("U" if self.large else "u") if self.text else ("Z" if self.large else "z")

    def __arrow_c_schema__(self) -> object:
        """The Arrow schema, in a PyCapsule: binary or string, or the large kind of either."""
        return export_schema(self._format)

    def __arrow_c_array__(self, requested_schema: object = None) -> tuple[object, object]:
        """The Arrow schema and array, in PyCapsules; nothing is copied, and another schema is not made."""
        return self.__arrow_c_schema__(), export_array(
            len(self), self.null_count, self.validity, self.offsets, self.data
        )


def reasons_column(count: int, failures: Mapping[int, OpenKCMError]) -> Column:
    """Why rows are missing: the code of each row's error, null where there is none."""
    rows = sorted(failures)
    offsets, validity = array("i"), bytearray((count + 7) // 8)
    data = bytearray()
    for at in rows:
        offsets.extend(array("i", [len(data)]) * (at + 1 - len(offsets)))
        data += failures[at].code.encode()
        validity[at >> 3] |= 1 << (at & 7)
    offsets.extend(array("i", [len(data)]) * (count + 1 - len(offsets)))
    return Column(memoryview(offsets), memoryview(data), memoryview(validity), count - len(rows), True)
