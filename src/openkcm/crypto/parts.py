# SPDX-License-Identifier: Apache-2.0
"""How a column is described to a backend: where its buffers are, and how to read them.

Invariant: a description only points. A buffer is an object with the buffer protocol, whose size is then known, or a
bare address as the Arrow C data interface hands it out; whoever makes the description keeps its owner alive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, TypeAlias

Source: TypeAlias = Any
"""A buffer, an address, or None for a buffer that is left out."""

OFFSETS: Final = 1
"""A row's data lies between two offsets, of 4 or 8 bytes each."""
FIXED: Final = 2
"""Every row has ``width`` bytes."""
VIEWS: Final = 3
"""16 bytes a row: a length (4 bytes), then up to 12 bytes of data, or a prefix, a buffer's number and an offset."""
CODES: Final = 4
"""A dictionary: each row is the number of its value in ``values``; codes have 1, 2, 4 or 8 bytes."""
NOTHING: Final = 5
"""Every row is null."""


@dataclass(slots=True)
class Part:
    """A run of rows of one layout (Arrow Columnar Format 1.5, "Physical Memory Layout").

    Args:
        layout: one of the numbers above.
        width: bytes of an offset, of a code, or of a row.
        start: Arrow's offset: how many rows at the front of the buffers are not the column's.
        count: how many rows there are.
        validity: a bit a row, least significant first; None: no nulls.
        places: offsets, views or codes.
        buffers: a view's data, with the size of each in ``sizes``.
        values: a dictionary's.
        signed: whether codes have a sign.
        owner: what must live as long as the buffers.
    """

    layout: int
    width: int
    start: int
    count: int
    validity: Source = None
    places: Source = None
    data: Source = None
    buffers: tuple[Source, ...] = ()
    sizes: tuple[int, ...] = ()
    values: Part | None = None
    signed: bool = True
    owner: Any = None
