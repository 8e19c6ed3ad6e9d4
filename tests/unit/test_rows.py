# SPDX-License-Identifier: Apache-2.0
"""Rows of delimited text: what they hold and how they are written again, on both backends alike."""

from __future__ import annotations

import base64
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openkcm import crypto
from openkcm.errors import InvalidInput
from support import refused

DATA = b"1,one,x\n2,,\n3,three,z\n"


def split(data: bytes, columns: int = 3, end: bytes = b"\n") -> Any:
    return crypto.split_rows(data, columns, b",", end)


def backends() -> list[ModuleType]:
    """Both backends' rows, or the Python one's where the native layer is not built."""
    native = find_spec("openkcm._fast.rows")
    both = (
        ["openkcm.crypto.pure_rows"] if native is None else ["openkcm.crypto.pure_rows", "openkcm._fast.rows"]
    )
    return [import_module(name) for name in both]


def test_columns_are_the_fields_that_were_read() -> None:
    rows = split(DATA)
    assert rows.count == 3
    assert [rows.column(at) for at in range(3)] == [
        [b"1", b"2", b"3"],
        [b"one", b"", b"three"],
        [b"x", b"", b"z"],
    ]
    assert rows.dump() == DATA


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_columns_are_replaced_and_all_else_is_kept(end: bytes) -> None:
    rows = split(DATA.replace(b"\n", end), end=end)
    rows.replace(2, [b"", b"longer than it was", b"!"])
    rows.replace(0, [b"a", b"bb", b""])
    assert rows.dump() == b"a,one,\nbb,,longer than it was\n,three,!\n".replace(b"\n", end)
    assert rows.column(0) == [b"1", b"2", b"3"]
    rows.replace(0, [b"1", b"2", b"3"])
    rows.replace(2, [b"x", b"", b"z"])
    assert rows.dump() == DATA.replace(b"\n", end)


def test_base64_of_every_length() -> None:
    values = [bytes(range(256 - size, 256)) for size in range(256)]
    rows = split(b"a,b\n" * len(values), 2)
    rows.replace(1, values, True)
    assert rows.dump() == b"".join(b"a,%s\n" % base64.b64encode(value) for value in values)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1,2,3",
        b"1,2\n",
        b"1,2,3,4\n",
        b"1,2,3\n\n",
        b"1,2\n3,4,5,6\n",
        b'1,"2",3\n',
        b"1,2\r,3\n",
        b"1,2,3\r\n",
    ],
)
def test_text_that_is_not_plain_rows_is_left_to_others(data: bytes) -> None:
    assert split(data) is None


@pytest.mark.parametrize(
    "data", [b"1,2,3\n", b"1,2,3\r\n4,5,6\n", b"1\r,2,3\n", b"\n1,2,\r\n", b"1,2,3\n\r\n"]
)
def test_mixed_line_ends_are_left_to_others(data: bytes) -> None:
    assert split(data, end=b"\r\n") is None


def test_one_column_is_left_to_others() -> None:
    assert split(b"1\n2\n", 1) is None


def test_what_does_not_fit_is_refused() -> None:
    rows = split(DATA)
    refused(lambda: rows.column(3), InvalidInput)
    refused(lambda: rows.column(-1), InvalidInput)
    refused(lambda: rows.replace(3, [b""] * 3), InvalidInput)
    refused(lambda: rows.replace(0, [b""] * 2), InvalidInput)
    refused(lambda: rows.replace(0, [b"", "", b""]), TypeError)
    refused(lambda: rows.replace(0, [b"", bytearray(), b""]), TypeError)
    for delimiter in (b"", b",,", b"\n", b"\r", b'"'):
        refused(lambda mark=delimiter: crypto.split_rows(DATA, 2, mark, b"\n"), InvalidInput)
    refused(lambda: crypto.split_rows(DATA, 3, b",", b"\r"), InvalidInput)
    assert rows.dump() == DATA


def test_values_outlive_their_list() -> None:
    rows = split(DATA)
    values = [bytes([65 + at]) * 100 for at in range(3)]
    rows.replace(1, values)
    values.clear()
    assert rows.dump() == b"1,%s,x\n2,%s,\n3,%s,z\n" % (b"A" * 100, b"B" * 100, b"C" * 100)


@settings(max_examples=500, deadline=None)
@given(
    data=st.text(alphabet=st.sampled_from('a,,\n\n\r"'), max_size=30),
    end=st.sampled_from([b"\n", b"\r\n"]),
    columns=st.integers(1, 4),
    value=st.binary(max_size=5),
    chosen=st.sets(st.integers(0, 3)),
    encode=st.booleans(),
)
def test_the_backends_agree(
    data: str, end: bytes, columns: int, value: bytes, chosen: set[int], encode: bool
) -> None:
    seen = []
    for backend in backends():
        rows = backend.split_rows(data.encode() + end, columns, b",", end)
        if rows is None:
            seen.append(None)
            continue
        read = [rows.column(at) for at in range(columns)]
        for index in chosen & set(range(columns)):
            rows.replace(index, [value] * rows.count, encode)
        seen.append((rows.count, read, rows.dump()))
    assert all(one == seen[0] for one in seen)
