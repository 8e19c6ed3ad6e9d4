# SPDX-License-Identifier: Apache-2.0
"""A column of results: one run of bytes, and where each row begins in it.

Invariant: it has the buffers of an Arrow array and hands them over uncopied, to whoever speaks Arrow's PyCapsule
interface; without any Arrow library it is readable through the buffer protocol.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeAlias, overload

from ..crypto import Shared, export_array, export_schema
from ..errors import OpenKCMError

_FREE_THREADED: Final = "t" in sys.abiflags
"""Whether whoever asks for a buffer gets a view of his own: threads must not make views of one view (``Shared``)."""

Views: TypeAlias = tuple[memoryview, memoryview, memoryview | None]


class Column:
    """Bytes (or text) a row, nulls among them; what ``encrypt_column`` and ``decrypt_column`` return.

    Attributes:
        null_count: how many rows are null.
        text: whether the rows are text.
    """

    __slots__ = ("_buffers", "_kind", "null_count", "text")

    def __init__(self, offsets: Any, data: Any, validity: Any, null_count: int, text: bool) -> None:
        buffers = offsets, data, validity
        self._buffers: Any = tuple(map(_shared, buffers)) if _FREE_THREADED else buffers
        self._kind = offsets.format
        self.null_count = null_count
        self.text = text

    @property
    def offsets(self) -> memoryview:
        """n + 1 offsets into ``data``: 32-bit integers ("i") or 64-bit ones ("q")."""
        return self.views()[0]

    @property
    def data(self) -> memoryview:
        """The rows, one after the other."""
        return self.views()[1]

    @property
    def validity(self) -> memoryview | None:
        """A bit a row, least significant first, 0 for a null; None when there are no nulls."""
        return self.views()[2]

    def views(self) -> Views:
        """Offsets, data and validity."""
        views: Views = self._buffers
        if not _FREE_THREADED:
            return views
        offsets, data, validity = views
        bits = None if validity is None else memoryview(validity)
        return memoryview(offsets).cast(self._kind), memoryview(data), bits

    @property
    def nbytes(self) -> int:
        """The bytes of all its buffers."""
        return sum(each.nbytes for each in self.views() if each is not None)

    @property
    def large(self) -> bool:
        """Whether its offsets have 64 bits."""
        return bool(self._kind == "q")

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
        offsets, data, validity = self.views()
        count = len(offsets) - 1
        at = index + count if index < 0 else index
        if not 0 <= at < count:
            raise IndexError("a column has no such row")
        if validity is not None and not validity[at >> 3] >> (at & 7) & 1:
            return None
        row = bytes(data[offsets[at] : offsets[at + 1]])
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
        offsets, data, validity = self.views()
        return self.__arrow_c_schema__(), export_array(len(self), self.null_count, validity, offsets, data)


def _shared(view: Any) -> Any:
    return None if view is None else Shared(view)


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
