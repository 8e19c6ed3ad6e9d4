# SPDX-License-Identifier: Apache-2.0
"""NDJSON tables: what is protected comes back byte for byte, and hostile bytes give a typed error, both ways."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator

from vault import handle

from openkcm.cli.ndjson_table import NdjsonTable
from openkcm.cli.tables import ColumnCipher, Columns
from openkcm.errors import DecryptError, FormatError, InvalidInput, LimitExceeded

ERRORS = (FormatError, DecryptError, InvalidInput, LimitExceeded)
CHOICES = (
    Columns(("b",)),
    Columns(("a", "b")),
    Columns(("b",), context=("a",)),
    Columns((": ", "b")),
)


def seeds() -> Iterator[bytes]:
    yield b'\x00{"a": 1, "b": 2}\n{"b":"x"}\n'
    yield b'\x01{"a":null,"b":[1,{"b":2}]}\r\n\n{"a":"\\u00e9\\"","b":-1.5e3}'
    yield b'\x02{"a":true,"b":false}\n{"c":0}\n'
    yield b'\x03{": ":"b","b":": "}\n'
    for columns in (b"\x00", b"\x01"):
        with io.BytesIO() as target:
            table(0).protect(io.BytesIO(b'{"a":1,"b":"two"}\n'), target)
            yield columns + target.getvalue()


def check(data: bytes) -> None:
    choice, data = data[0] & 3 if data else 0, data[1:]
    protected = io.BytesIO()
    try:
        table(choice).protect(io.BytesIO(data), protected)
    except ERRORS:
        with contextlib.suppress(*ERRORS):
            table(choice).unprotect(io.BytesIO(data), io.BytesIO())
        return
    for line in protected.getvalue().split(b"\n"):
        if line.strip(b" \t\r"):
            fields = json.loads(line)
            for name in CHOICES[choice].protected:
                assert fields.get(name) is None or fields[name].startswith("T0tDA")
    back = io.BytesIO()
    table(choice).unprotect(io.BytesIO(protected.getvalue()), back)
    assert back.getvalue() == data


def table(choice: int) -> NdjsonTable:
    return NdjsonTable(ColumnCipher(handle()), CHOICES[choice])
