# SPDX-License-Identifier: Apache-2.0
"""Columns that are malformed, hostile or no columns at all: a typed error, and not a byte of the result written."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openkcm.crypto import CODES, FIXED, OFFSETS, VIEWS, Cells, Part
from openkcm.envelope import INLINE_OVERHEAD
from openkcm.errors import InvalidInput, LimitExceeded
from openkcm.gateway import ServiceHandle, columns
from optional import optional
from support import closed, refused, released

pl = optional("polars")

INTS = pa.array([1, 2])


def from_buffers(kind: Any, count: int, *buffers: Any, offset: int = 0, null_count: int = -1) -> Any:
    """A pyarrow array of buffers that nobody looked at."""
    held = [None if each is None else pa.py_buffer(each) for each in buffers]
    return pa.Array.from_buffers(kind, count, held, null_count, offset)


def ints(*values: int) -> bytes:
    return array("i", values).tobytes()


def longs(*values: int) -> bytes:
    return array("q", values).tobytes()


def view(size: int, buffer: int = 0, begin: int = 0) -> bytes:
    return ints(size, 0x61616161, buffer, begin)


def dictionary(codes: bytes, kind: Any, values: Any) -> Any:
    indices = from_buffers(kind, len(codes) * 8 // kind.bit_width, None, codes)
    return pa.DictionaryArray.from_arrays(indices, values, safe=False)


MALFORMED: dict[str, tuple[Callable[[], Any], int | None]] = {
    "out of order": (lambda: from_buffers(pa.binary(), 3, None, ints(0, 5, 3, 9), b"x" * 9), 1),
    "negative": (lambda: from_buffers(pa.binary(), 2, None, ints(0, -1, 3), b"xxx"), 0),
    "view past the end": (lambda: from_buffers(pa.binary_view(), 1, None, view(20, 0, 5), b"x" * 24), 0),
    "view of no buffer": (lambda: from_buffers(pa.binary_view(), 1, None, view(20, 1), b"x" * 24), 0),
    "view of buffer -1": (lambda: from_buffers(pa.binary_view(), 1, None, view(20, -1), b"x" * 24), 0),
    "view before the start": (lambda: from_buffers(pa.binary_view(), 1, None, view(20, 0, -1), b"x" * 24), 0),
    "negative view": (lambda: from_buffers(pa.binary_view(), 2, None, view(1) + view(-1), b"x" * 24), 1),
    "code past the end": (lambda: dictionary(b"\x00\x02", pa.int8(), pa.array([b"a", b"b"])), 1),
    "negative code": (lambda: dictionary(b"\x00\xff", pa.int8(), pa.array([b"a", b"b"])), 1),
    "large code": (lambda: dictionary(b"\x00\xff", pa.uint8(), pa.array([b"a", b"b"])), 1),
    "huge code": (lambda: dictionary(b"\xff" * 8, pa.uint64(), pa.array([b"a", b"b"])), 0),
    "plain out of order": (lambda: (array("i", [0, 5, 3]), b"x" * 9), 1),
    "plain past the end": (lambda: (array("q", [0, 5, 10]), b"x" * 9), 1),
    "plain negative": (lambda: (array("q", [-1, 5]), b"x" * 9), 0),
    "no offset": (lambda: (array("i"), b""), None),
    "unsigned offsets": (lambda: (np.array([0, 1], np.uint32), b"x"), None),
    "offsets as bytes": (lambda: (ints(0, 1), b"x"), None),
    "floating offsets": (lambda: (np.array([0.0, 1.0]), b"x"), None),
    "offsets of the other end": (lambda: (np.array([0, 1], ">i4"), b"x"), None),
    "offsets in two dimensions": (lambda: (np.zeros((2, 2), np.int32), b"x"), None),
    "offsets with gaps": (lambda: (np.zeros(6, np.int32)[::2], b"x"), None),
    "data with gaps": (lambda: (array("i", [0, 1]), np.zeros(6, np.uint8)[::2]), None),
    "unaligned offsets": (lambda: (np.frombuffer(b"x" + ints(0, 1), np.int32, 2, 1), b"x"), None),
    "validity of the wrong size": (lambda: (array("i", [0] * 10), b"x", b"\xff"), None),
    "validity that is no buffer": (lambda: (array("i", [0, 1]), b"x", 7), None),
    "four buffers": (lambda: (array("i", [0, 1]), b"x", b"\xff", b""), None),
    "a list": (lambda: [b"a", b"b"], None),
    "bytes": (lambda: b"abc", None),
    "bytearray": (lambda: bytearray(b"abc"), None),
    "memoryview of bytes": (lambda: memoryview(b"abc"), None),
    "text": (lambda: "abc", None),
    "nothing": (lambda: None, None),
    "a number": (lambda: 7, None),
    "numbers": (lambda: INTS, None),
    "lists": (lambda: pa.array([[b"a"]]), None),
    "dictionary of numbers": (lambda: pa.array([1, 1]).dictionary_encode(), None),
    "runs": (lambda: pa.RunEndEncodedArray.from_arrays(pa.array([2], pa.int32()), pa.array([b"a"])), None),
    "a table": (lambda: pa.table({"a": [b"x"]}), None),
    "a polars frame": (lambda: pl.DataFrame({"a": [b"x"]}), None),
    "polars numbers": (lambda: pl.Series([1, 2]), None),
    "pandas numbers": (lambda: pd.Series([1.5]), None),
    "objects": (lambda: np.array([b"a", None], dtype=object), None),
    "objects inside": (lambda: np.zeros(2, np.dtype([("a", "i8"), ("b", "O")])), None),
    "every other item": (lambda: np.arange(6)[::2], None),
    "a matrix": (lambda: np.zeros((2, 2)), None),
    "a masked array": (lambda: np.ma.masked_array(np.arange(2), [True, False]), None),
    "a class": (lambda: pa.Array, None),
}


@pytest.mark.parametrize("name", sorted(MALFORMED))
@pytest.mark.parametrize("place", ["column", "contexts", "subjects", "decrypt"])
def test_malformed_columns_are_refused(service: ServiceHandle, name: str, place: str) -> None:
    make, index = MALFORMED[name]
    out = bytearray(b"\xaa" * 4096)
    rows = pa.array([b"x"] * (1 if index == 0 else 2))
    if index is not None and place in ("contexts", "subjects"):
        rows = pa.array([b"x"] * {"out of order": 3}.get(name, len_of(make())))
    calls = {
        "column": lambda: service.encrypt_column(make(), out=out),
        "contexts": lambda: service.encrypt_column(rows, contexts=make(), out=out),
        "subjects": lambda: service.encrypt_column(rows, subjects=make(), out=out),
        "decrypt": lambda: service.decrypt_column(make(), out=out),
    }
    if name == "nothing" and place in ("contexts", "subjects"):
        return  # None says that there are none
    error = refused(calls[place], InvalidInput)
    assert error.index == index  # type: ignore[attr-defined]
    assert out == b"\xaa" * 4096


def len_of(column: Any) -> int:
    return len(column[0]) - 1 if isinstance(column, tuple) else len(column)


# ---- out= ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "out",
    [
        bytearray(2 * INLINE_OVERHEAD + 5),
        bytes(1000),
        memoryview(bytearray(2000))[::2],
        np.zeros((1000, 2), np.uint8)[:, 0],
        "text",
        7,
        released(),
        closed(),
        np.empty(1000, "M8[s]"),
    ],
    ids=[
        *("one byte short", "read-only", "gaps", "a column of a matrix", "text", "number"),
        *("released", "closed", "dates"),
    ],
)
def test_out_that_does_not_do(service: ServiceHandle, out: Any) -> None:
    rows = pa.array([b"abc", b"def"])
    before = bytes(out) if isinstance(out, bytearray) else None
    refused(lambda: service.encrypt_column(rows, out=out), InvalidInput)
    assert before is None or before == out


def test_out_that_is_large_enough_says_how_large(service: ServiceHandle) -> None:
    error = refused(lambda: service.encrypt_column(pa.array([b"abc"]), out=bytearray(3)), InvalidInput)
    assert f"takes {INLINE_OVERHEAD + 3} bytes" in str(error)
    exact = bytearray(INLINE_OVERHEAD + 3)
    assert len(service.encrypt_column(pa.array([b"abc"]), out=exact)[0].as_py()) == len(exact)


def test_out_must_not_be_what_is_read(service: ServiceHandle) -> None:
    shared = np.zeros(4096, np.uint8)
    offsets = np.array([0, 8, 16], np.int32)
    refused(lambda: service.encrypt_column((offsets, shared[100:200]), out=shared), InvalidInput)
    refused(lambda: service.encrypt_column(shared[:64].view("V8"), out=shared), InvalidInput)
    rows = pa.array([b"a", b"b"])
    for each in ("contexts", "subjects"):
        refused(
            lambda each=each: service.encrypt_column(rows, **{each: (offsets, shared)}, out=shared),
            InvalidInput,
        )
    within = shared[:12].view(np.int32)
    within[:] = (0, 8, 16)
    refused(lambda: service.encrypt_column((within, b"x" * 16), out=shared), InvalidInput)
    assert (
        service.encrypt_column((offsets, shared[:16]), out=shared[16:]).null_count == 0
    )  # side by side is fine


# ---- arguments -------------------------------------------------------------------------------------------


def test_columns_of_different_lengths(service: ServiceHandle) -> None:
    rows, short = pa.array([b"a", b"b"]), pa.array(["x"])
    refused(lambda: service.encrypt_column(rows, contexts=short), InvalidInput)
    refused(lambda: service.encrypt_column(rows, subjects=short), InvalidInput)
    refused(lambda: service.decrypt_column(service.encrypt_column(rows), contexts=short), InvalidInput)


def test_arguments_that_exclude_each_other(service: ServiceHandle) -> None:
    rows, names = pa.array([b"a"]), pa.array(["x"])
    refused(lambda: service.encrypt_column(rows, context=b"a", contexts=names), InvalidInput)
    refused(lambda: service.encrypt_column(rows, subject="a", subjects=names), InvalidInput)
    for threads in (0, -1, 1.5, "2", 1000):
        refused(lambda threads=threads: service.encrypt_column(rows, threads=threads), InvalidInput)
    refused(lambda: service.decrypt_column(rows, errors="return"), InvalidInput)
    refused(lambda: service.encrypt_column(rows, subject=""), InvalidInput)


def test_a_context_that_is_too_long_is_named(service: ServiceHandle) -> None:
    rows = pa.array([b"a", b"b"])
    contexts = pa.array([b"x" * 65_535, b"x" * 65_536])
    error = refused(lambda: service.encrypt_column(rows, contexts=contexts), LimitExceeded)
    assert error.index == 1  # type: ignore[attr-defined]


def test_a_record_that_is_too_long_is_named(service: ServiceHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "MAX_RECORD_BYTES", 3)
    out = bytearray(b"\xaa" * 1000)
    rows = pa.array([b"abc", None, b"abcd", b"abcde"])
    error = refused(lambda: service.encrypt_column(rows, out=out), LimitExceeded)
    assert error.index == 2  # type: ignore[attr-defined]
    assert out == b"\xaa" * 1000


@pytest.mark.parametrize(
    "part",
    [
        Part(OFFSETS, 4, 0, 3, None, array("i", [0, 1, 2]), b"xxx"),
        Part(OFFSETS, 8, 1, 2, None, array("q", [0, 1, 2]), b"xxx"),
        Part(OFFSETS, 4, 0, 9, b"\xff", array("i", [0] * 10), b"xxx"),
        Part(FIXED, 4, 0, 3, data=b"x" * 11),
        Part(FIXED, 4, 1, 2, data=b"x" * 11),
        Part(VIEWS, 16, 0, 2, None, array("i", [0] * 7)),
        Part(CODES, 2, 0, 2, None, b"xxx", values=Part(FIXED, 1, 0, 1, data=b"x")),
        Part(CODES, 1, 0, 2, None, b"xx", values=Part(FIXED, 1, 0, 2, data=b"x")),
        Part(OFFSETS, 4, 0, 1),
        Part(FIXED, 4, 0, 1),
    ],
)
def test_buffers_that_end_too_soon(part: Part) -> None:
    assert "ends before its last row" in str(refused(lambda: Cells([part], "column"), InvalidInput))


# ---- through capsules, where buffers do not tell their sizes -------------------------------------------------


class Fake:
    """An exporter of a malformed array: pyarrow's structures with some fields written over."""

    def __init__(self, held: Any, **fields: int) -> None:
        self._held = held
        self._fields = fields

    def __arrow_c_array__(self, requested_schema: object = None) -> Any:
        schema, held = self._held.__arrow_c_array__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        words = (ctypes.c_int64 * 5).from_address(pointer(held, b"arrow_array"))
        for at, name in enumerate(("length", "null_count", "offset", "n_buffers", "n_children")):
            words[at] = self._fields.get(name, words[at])
        return schema, held


@pytest.mark.parametrize(
    "fields",
    [
        {"length": -1},
        {"offset": -1},
        {"n_buffers": 2},
        {"n_buffers": 1 << 40},
        {"n_buffers": -1},
        {"length": 1 << 62},
    ],
    ids=str,
)
def test_structures_that_lie(service: ServiceHandle, fields: dict[str, int]) -> None:
    refused(lambda: service.encrypt_column(Fake(pa.array([b"abc"] * 3), **fields)), InvalidInput)


def test_exporters_that_fail(service: ServiceHandle) -> None:
    class Broken:
        def __arrow_c_array__(self) -> Any:
            raise RuntimeError("not today")

        def __len__(self) -> int:
            return 1

    refused(lambda: service.encrypt_column(Broken()), InvalidInput)
    error = refused(
        lambda: service.encrypt_column(Fake(pa.array(["a"]).cast(pa.binary()), offset=-5)), InvalidInput
    )
    assert error.index is None  # type: ignore[attr-defined]


def test_a_capsule_of_another_kind(service: ServiceHandle) -> None:
    class Wrong:
        def __arrow_c_array__(self) -> Any:
            return pa.array([b"a"]).__arrow_c_array__()[::-1]

    refused(lambda: service.encrypt_column(Wrong()), InvalidInput)


# ---- any bytes as a layout ---------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_buffers_are_read_or_refused(data: st.DataObject) -> None:
    sizes = st.binary(max_size=80)
    layout = data.draw(st.sampled_from([OFFSETS, FIXED, VIEWS, CODES]))
    width = data.draw(
        st.sampled_from({OFFSETS: [4, 8], CODES: [1, 2, 4, 8], FIXED: [0, 3], VIEWS: [16]}[layout])
    )
    small = st.integers(-2, 12)
    values = Part(OFFSETS, 4, 0, 2, None, array("i", [0, 1, 3]), b"abc")
    part = Part(
        layout,
        width,
        data.draw(small),
        data.draw(small),
        data.draw(st.none() | st.binary(max_size=3)),
        array("q", data.draw(sizes.map(lambda raw: raw + bytes(-len(raw) % 8)))),
        data.draw(sizes),
        (data.draw(sizes),),
        values=values if layout == CODES else None,
        signed=data.draw(st.booleans()),
    )
    try:
        cells = Cells([part], "column")
    except InvalidInput:
        return
    rows = [cells.value(at) for at in range(len(cells))]
    assert sum(len(row) for row in rows if row is not None) == cells.total
    assert rows.count(None) == cells.nulls
    assert list(cells.sizes(0, len(cells))) == [len(row) for row in rows if row is not None]
    assert max((len(row) for row in rows if row is not None), default=0) == cells.longest


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(blobs=st.lists(st.one_of(st.none(), st.binary(max_size=300)), max_size=20), cut=st.integers(0, 400))
def test_any_bytes_decrypt_or_come_out_null(
    service: ServiceHandle, blobs: list[bytes | None], cut: int
) -> None:
    good = service.encrypt(b"good")
    column = pa.array([*blobs, good, good[:cut]], pa.binary())
    opened, reasons = service.decrypt_column(column, errors="null")
    assert opened[len(blobs)].as_py() == b"good"
    for blob, row, reason in zip(column.to_pylist(), opened.to_pylist(), reasons.to_pylist(), strict=True):
        assert (row, reason) == (b"good", None) if blob == good else row is None
        assert (reason is None) == (blob is None or blob == good)


def test_a_column_of_nothing_but_nulls(service: ServiceHandle) -> None:
    assert service.encrypt_column(pa.nulls(5)).to_pylist() == [None] * 5
