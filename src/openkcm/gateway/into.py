# SPDX-License-Identifier: Apache-2.0
"""One record into memory of the caller's.

Invariant: nothing is written before all that is handed in was checked, and no plaintext that did not verify stays.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

from ..context import Buffer
from ..errors import InvalidInput, OpenKCMError, SecretMemoryError
from .pool import Pool


def check_out(out: Any) -> None:
    """Raise InvalidInput if there is no buffer; whether it will do is seen where its size is known."""
    if out is None:
        raise InvalidInput("out is a writable buffer")


def write_sealed(pool: Pool, seal_one: Callable[..., Any], context: bytes, data: Buffer, out: Any) -> int:
    """Encrypt under a key that waits, as ``ServiceHandle.encrypt`` does; returns the bytes written."""
    while True:
        ready, at = pool.take()
        try:
            written: int = seal_one(ready.keys, at, ready.version, ready.wrapped, context, data, True, out)
            return written
        except SecretMemoryError:
            if not ready.keys.wiped:
                raise
            pool.discard(ready)  # wiped between look and use: the next round asks the Core


def write_row(act: Callable[..., Any], data: Buffer, out: Any, **arguments: Any) -> int:
    """Have ``encrypt_column`` or ``decrypt_column`` work on a column of one row; returns the bytes written."""
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
