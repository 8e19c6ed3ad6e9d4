# SPDX-License-Identifier: Apache-2.0
"""What callers hand in as a column, and what they get back: Arrow arrays of any library, NumPy arrays, buffers.

Invariant: no library is imported for it. pyarrow's objects are known when pyarrow is loaded, because the caller loaded
it; everything else speaks Arrow's PyCapsule interface or the buffer protocol. Nothing is copied.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from ..crypto import CODES, FIXED, NOTHING, OFFSETS, VIEWS, Part, read_array, read_stream
from ..errors import InvalidInput, OpenKCMError
from .column import Column

Shape: TypeAlias = Literal["column", "array", "chunks"]

_OFFSETS: Final = {"z": 4, "u": 4, "Z": 8, "U": 8}
_CODES: Final = {
    "c": (1, True), "C": (1, False), "s": (2, True), "S": (2, False),
    "i": (4, True), "I": (4, False), "l": (8, True), "L": (8, False),
}  # fmt: skip
"""Arrow's format strings (C data interface, "Data type description")."""

WANTED: Final = (
    "an Arrow array or chunked array of binary or text, an object with Arrow's PyCapsule interface, a NumPy array of "
    "one dimension and a fixed width, or (offsets, data)"
)


class Source(NamedTuple):
    """A caller's column: where its rows are, and what shape the caller's result has.

    ``wide`` asks for 64-bit offsets; ``lengths`` are those of the chunks of a chunked array.
    """

    parts: list[Part]
    shape: Shape = "column"
    wide: bool = False
    lengths: tuple[int, ...] = ()

    def give(self, column: Column) -> Any:
        """The result in the caller's shape: a pyarrow array for a pyarrow array, chunks for chunks."""
        if self.shape == "column":
            return column
        whole = _to_pyarrow(column)
        if self.shape == "array":
            return whole
        chunks, start = [], 0
        for length in self.lengths:
            chunks.append(whole.slice(start, length))
            start += length
        return sys.modules["pyarrow"].chunked_array(chunks, type=whole.type)


def read_source(column: Any, name: str) -> Source:
    """Find out what a column is.

    Args:
        name: what to call it in an error: "column", "contexts" or "subjects".

    Raises:
        InvalidInput: it is nothing that has a run of bytes a row.
    """
    if isinstance(column, Column):
        return _wide([_column_part(column, name)])
    pyarrow = sys.modules.get("pyarrow")
    if pyarrow is not None and isinstance(column, pyarrow.ChunkedArray):
        lengths = tuple(map(len, column.chunks))
        parts = [_pyarrow_part(pyarrow, chunk, name) for chunk in column.chunks]
        return Source(parts, "chunks", _is_wide(parts), lengths)
    if pyarrow is not None and isinstance(column, pyarrow.Array):
        parts = [_pyarrow_part(pyarrow, column, name)]
        return Source(parts, "array", _is_wide(parts))
    if isinstance(column, tuple):
        return _wide([_buffers_part(column, name)])
    for method, read in (("__arrow_c_array__", _read_array), ("__arrow_c_stream__", _read_stream)):
        if hasattr(column, method) and not isinstance(column, type):
            return _wide([_node_part(node, name) for node in _ask(column, name, read)])
    return Source([_fixed_part(column, name)])


def _is_wide(parts: Sequence[Part]) -> bool:
    return any(part.layout == OFFSETS and part.width == 8 for part in parts)


def _wide(parts: list[Part]) -> Source:
    return Source(parts, wide=_is_wide(parts))


# ---- Arrow, through capsules -----------------------------------------------------------------------------


def _read_array(column: Any) -> list[Any]:
    return [read_array(*column.__arrow_c_array__())]


def _read_stream(column: Any) -> list[Any]:
    nodes: list[Any] = read_stream(column.__arrow_c_stream__())
    return nodes


def _ask(column: Any, name: str, read: Callable[[Any], list[Any]]) -> list[Any]:
    try:
        return read(column)
    except OpenKCMError:
        raise
    except Exception as error:  # another library's, of any kind
        raise InvalidInput(
            f"the {name} cannot be handed over through Arrow's interface: {type(error).__name__}"
        ) from error


def _node_part(node: Any, name: str) -> Part:
    layout, length, offset, addresses, sizes, dictionary, owner = node
    values = None if dictionary is None else _node_part(dictionary, name)
    if layout.startswith("v"):
        addresses = addresses[: 2 + len(sizes)]  # the buffer of the sizes is at the end
    return _part(layout, length, offset, [each or None for each in addresses], sizes, values, owner, name)


def _part(
    layout: str,
    length: int,
    offset: int,
    buffers: Sequence[Any],
    sizes: tuple[int, ...],
    values: Part | None,
    owner: Any,
    name: str,
) -> Part:
    """A part from Arrow's own terms; ``sizes`` is empty where the buffers know their own."""
    if values is not None and layout in _CODES and values.layout != CODES:
        _count(buffers, 2, name)
        width, signed = _CODES[layout]
        return Part(
            CODES, width, offset, length, buffers[0], buffers[1], values=values, signed=signed, owner=owner
        )
    if values is None and layout in _OFFSETS:
        _count(buffers, 3, name)
        validity, places, data = buffers
        return Part(OFFSETS, _OFFSETS[layout], offset, length, validity, places, data, owner=owner)
    if values is None and (fixed := re.fullmatch(r"w:([0-9]{1,9})", layout)):
        _count(buffers, 2, name)
        return Part(FIXED, int(fixed[1]), offset, length, buffers[0], None, buffers[1], owner=owner)
    if values is None and layout in ("vz", "vu"):
        _count(buffers[:2], 2, name)
        return Part(
            VIEWS, 16, offset, length, buffers[0], buffers[1], None, tuple(buffers[2:]), sizes, owner=owner
        )
    if values is None and layout == "n":
        return Part(NOTHING, 0, 0, length, owner=owner)
    raise InvalidInput(
        f"a row of the {name} is binary or text, not of Arrow's type {layout!r}; give one column, or cast it to binary"
    )


def _count(buffers: Sequence[Any], wanted: int, name: str) -> None:
    if len(buffers) != wanted:
        raise InvalidInput(f"the Arrow array of the {name} is malformed: it has not {wanted} buffers")


# ---- pyarrow ---------------------------------------------------------------------------------------------


def _pyarrow_part(pyarrow: Any, column: Any, name: str) -> Part:
    """As through the capsules, but its buffers tell their sizes, so that offsets past the end are noticed."""
    kind = column.type
    layout = _pyarrow_layouts(pyarrow).get(kind.id)
    if layout is None:
        if isinstance(column, pyarrow.ExtensionArray):
            return _pyarrow_part(pyarrow, column.storage, name)
        if isinstance(column, pyarrow.DictionaryArray):
            values, codes = _pyarrow_part(pyarrow, column.dictionary, name), column.indices
            layout = _pyarrow_code(codes.type)
            return _part(layout, len(codes), codes.offset, codes.buffers(), (), values, column, name)
        layout = f"w:{kind.byte_width}" if pyarrow.types.is_fixed_size_binary(kind) else str(kind)
    return _part(layout, len(column), column.offset, column.buffers(), (), None, column, name)


def _pyarrow_code(kind: Any) -> str:
    letter = {8: "c", 16: "s", 32: "i", 64: "l"}[kind.bit_width]
    return letter.upper() if str(kind).startswith("u") else letter


@functools.cache
def _pyarrow_layouts(pyarrow: Any) -> Mapping[int, str]:
    """Arrow's format strings by pyarrow's numbers of types; versions before 16 know no views."""
    makers = {
        "binary": "z", "string": "u", "large_binary": "Z", "large_string": "U", "binary_view": "vz",
        "string_view": "vu", "null": "n",
    }  # fmt: skip
    return {getattr(pyarrow, name)().id: layout for name, layout in makers.items() if hasattr(pyarrow, name)}


def _to_pyarrow(column: Column) -> Any:
    pyarrow = sys.modules["pyarrow"]
    kind = ("large_" if column.large else "") + ("string" if column.text else "binary")
    offsets, data, validity = column.views()
    wrap = pyarrow.py_buffer
    buffers = [None if validity is None else wrap(validity), wrap(offsets), wrap(data)]
    return pyarrow.Array.from_buffers(getattr(pyarrow, kind)(), len(offsets) - 1, buffers, column.null_count)


# ---- plain buffers ---------------------------------------------------------------------------------------


def _view(thing: Any, what: str) -> memoryview:
    try:
        view = memoryview(thing)
    except (TypeError, ValueError, BufferError):
        raise InvalidInput(f"{what} is not a {type(thing).__name__}") from None
    if not view.c_contiguous:
        raise InvalidInput(f"{what} must be contiguous")
    return view


def _buffers_part(column: tuple[Any, ...], name: str) -> Part:
    """(offsets, data) or (offsets, data, validity)."""
    if len(column) not in (2, 3):
        raise InvalidInput(
            f"the {name} as buffers is (offsets, data) or (offsets, data, validity); a batch of records is a "
            "list and goes to encrypt_many"
        )
    offsets, data = _view(column[0], f"offsets of the {name}"), _view(column[1], f"data of the {name}")
    kind = offsets.format.lstrip("@=<" if sys.byteorder == "little" else "@=>")
    if offsets.ndim != 1 or kind not in ("i", "l", "q") or offsets.itemsize not in (4, 8):
        raise InvalidInput(f"offsets of the {name} are signed integers of 32 or 64 bits, in one dimension")
    if len(offsets) < 1:
        raise InvalidInput(f"there is one offset more than rows in the {name}, and so at least one")
    validity = None if len(column) == 2 else _view(column[2], f"validity of the {name}")
    return Part(OFFSETS, offsets.itemsize, 0, len(offsets) - 1, validity, offsets, data, owner=column)


def _column_part(column: Column, name: str) -> Part:
    buffers = (column.offsets, column.data, column.validity)
    return _buffers_part(buffers if column.validity is not None else buffers[:2], name)


def _fixed_part(column: Any, name: str) -> Part:
    """A NumPy array, or another buffer of items of one width."""
    if isinstance(column, (bytes, bytearray, str)) or type(column).__name__ == "MaskedArray":
        raise InvalidInput(f"the {name} is {WANTED}, not a {type(column).__name__}")
    view = _view(column, f"the {name} is {WANTED}, and")
    # In a structured type the names of the fields stand between colons.
    kind = re.sub(r":[^:]*:", "", view.format)
    if "O" in kind or "&" in kind or "P" in kind:
        raise InvalidInput(f"the {name} holds references to objects, not bytes of a fixed width")
    if view.ndim != 1 or (isinstance(column, memoryview) and view.itemsize == 1):
        raise InvalidInput(f"the {name} is {WANTED}; this one has not one dimension of items")
    return Part(FIXED, view.itemsize, 0, len(view), data=view, owner=column)
