# SPDX-License-Identifier: Apache-2.0
"""One record into memory of the caller's: a column of one row.

Invariant: as with a column, nothing is written before all that is handed in was checked, and what was written is zeroed
where the call fails.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

from ..context import Buffer
from ..errors import InvalidInput, OpenKCMError


def write_row(act: Callable[..., Any], data: Buffer, out: Any, **arguments: Any) -> int:
    """Have ``encrypt_column`` or ``decrypt_column`` work on one record; returns the bytes written."""
    if out is None:
        raise InvalidInput("out is a writable buffer")
    try:
        view = memoryview(data)
        if not view.c_contiguous:
            raise BufferError
        column = array("q", [0, view.nbytes]), view
    except (TypeError, ValueError, BufferError):
        raise InvalidInput(f"bytes-like data in one piece is wanted, not {type(data).__name__}") from None
    try:
        written: int = act(column, out=out, **arguments).data.nbytes
    except OpenKCMError as error:
        error.index = None
        raise
    return written
