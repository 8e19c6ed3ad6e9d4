# SPDX-License-Identifier: Apache-2.0
"""CSV tables: what is protected comes back cell for cell, and hostile bytes give a typed error, both ways."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterator

from vault import handle

from openkcm.cli.csv_table import DELIMITERS, CsvTable
from openkcm.cli.tables import ColumnCipher, Columns
from openkcm.errors import DecryptError, FormatError, InvalidInput, LimitExceeded

ERRORS = (FormatError, DecryptError, InvalidInput, LimitExceeded)
CHOICES = (
    Columns(("b",)),
    Columns(("a", "b")),
    Columns(("b",), context=("a",)),
)


def seeds() -> Iterator[bytes]:
    yield b"\x00a,b\n1,2\n3,4\n"
    yield b'\x01\xef\xbb\xbfa,b\r\n1,2\r\n"3,""\n",4'
    yield b'\x02a,b,"c\nd"\n"x","y\n",z\n\n'
    yield b"\x04a;b\n;\n"
    yield b'\x08a\tb\n1\t""\n'
    yield b"\x0cb|a\n\xff|\xfe\n"
    for columns in (b"\x00", b"\x01"):
        with io.BytesIO() as target:
            table(0).protect(io.BytesIO(b"a,b\n1,2\n"), target)
            yield columns + target.getvalue()


def check(data: bytes) -> None:
    choice, data = data[0] if data else 0, data[1:]
    protected = io.BytesIO()
    try:
        table(choice).protect(io.BytesIO(data), protected)
    except ERRORS:
        with contextlib.suppress(*ERRORS):
            table(choice).unprotect(io.BytesIO(data), io.BytesIO())
        return
    back = io.BytesIO()
    table(choice).unprotect(io.BytesIO(protected.getvalue()), back)
    delimiter = DELIMITERS[choice >> 2 & 3]
    assert cells(back.getvalue(), delimiter) == cells(data, delimiter)
    assert data.endswith(b"\r") or back.getvalue().endswith(b"\n") == data.endswith(b"\n")


def table(choice: int) -> CsvTable:
    columns, delimiter = CHOICES[choice & 3 if choice & 3 < 3 else 0], DELIMITERS[choice >> 2 & 3]
    return CsvTable(ColumnCipher(handle()), columns, delimiter=delimiter)


def cells(data: bytes, delimiter: str) -> list[list[str]]:
    """The rows; a blank line has no cells, and one that is a lone carriage return is not kept."""
    lines = io.StringIO(data.decode("latin-1"), newline="\n")
    return [row for row in csv.reader(lines, delimiter=delimiter, strict=True) if row]
