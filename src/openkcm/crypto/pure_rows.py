# SPDX-License-Identifier: Apache-2.0
"""Rows of delimited text without quotes, for the Python backend: split and joined in one call a block.

Invariant: what is not replaced is written as it was read, byte for byte.
"""

from __future__ import annotations

from binascii import b2a_base64
from collections.abc import Iterable

from ..errors import InvalidInput


class FlatRows:
    """The rows of one text; made by ``split_rows``.

    Where a row ends, its last field, the line end and the next row's first field are one element of ``flat``.
    """

    def __init__(self, flat: list[bytes], columns: int, delimiter: bytes, end: bytes) -> None:
        self._flat = flat
        self._stride = columns - 1
        self._delimiter = delimiter
        self._end = end
        self._replaced: dict[int, list[bytes]] = {}
        self._edges: tuple[list[bytes], list[bytes]] | None = None
        self.count = (len(flat) - 1) // self._stride

    def column(self, index: int) -> list[bytes]:
        """The values of a column, as they were read."""
        self._check(index)
        if 0 < index < self._stride:
            return self._flat[index :: self._stride]
        return list(self._first_and_last()[index == self._stride])

    def replace(self, index: int, values: Iterable[bytes], encode: bool = False) -> None:
        """Put other values into a column, or with ``encode`` their base64 text (RFC 4648, section 4)."""
        held = list(values)
        self._check(index)
        if len(held) != self.count:
            raise InvalidInput("there must be one value for each row")
        if not all(type(value) is bytes for value in held):
            raise TypeError("the values of a column are bytes")
        self._replaced[index] = [b2a_base64(value, newline=False) for value in held] if encode else held

    def dump(self) -> bytes:
        """The text, with the columns that were replaced."""
        stride = self._stride
        flat = list(self._flat)
        if 0 in self._replaced or stride in self._replaced:
            first, last = self._first_and_last()
            first, last = self._replaced.get(0, first), self._replaced.get(stride, last)
            joints = [before + self._end + after for before, after in zip(last, first[1:], strict=False)]
            flat[::stride] = [first[0], *joints, last[-1]]
        for index, values in self._replaced.items():
            if 0 < index < stride:
                flat[index::stride] = values
        return self._delimiter.join(flat) + self._end

    def _first_and_last(self) -> tuple[list[bytes], list[bytes]]:
        if self._edges is None:
            edges = self._end.join(self._flat[:: self._stride]).split(self._end)
            self._edges = edges[::2], edges[1::2]
        return self._edges

    def _check(self, index: int) -> None:
        if not 0 <= index <= self._stride:
            raise InvalidInput("there is no column at that position")


def split_rows(data: bytes, columns: int, delimiter: bytes, end: bytes) -> FlatRows | None:
    """Find the fields of whole rows; None unless all have that many columns, that line end, and no quote.

    Args:
        data: rows, each with its end.
        columns: how many fields each row has, two or more.
        delimiter: one byte.
        end: a newline, or a carriage return and a newline.
    """
    if len(delimiter) != 1 or delimiter in b'\n\r"' or end not in (b"\n", b"\r\n"):
        raise InvalidInput(
            "a delimiter is one byte, and a line end a newline with or without a carriage return"
        )
    rows = data.count(b"\n")
    returns = data.count(b"\r")
    if columns < 2 or b'"' in data or not data.endswith(end) or returns != (rows if end == b"\r\n" else 0):
        return None
    if end == b"\r\n" and data.count(end) != rows:
        return None
    flat = data[: -len(end)].split(delimiter)
    # There are rows - 1 line ends inside; if each place where a row must end has one, none is elsewhere.
    ends = [1 for joint in flat[columns - 1 : -1 : columns - 1] if end in joint]
    if len(flat) != rows * (columns - 1) + 1 or len(ends) != rows - 1:
        return None
    return FlatRows(flat, columns, delimiter, end)
