# SPDX-License-Identifier: Apache-2.0
"""Columns that are changed while they are read: an error, and nothing of a result in which a row was passed over.

The caller's buffers may lie in memory that others write to. What a row says of itself is looked at each time it is
read, so it may be a record when the result is laid out, and none when it is worked on.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import openkcm
from openkcm import crypto
from openkcm.envelope import STORED_OVERHEAD
from openkcm.errors import FormatError, InvalidInput
from openkcm.gateway import ServiceHandle, columns
from support import ON_FAST, refused, run_python

ROWS = 40
TEXT = b"x" * 24


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Has something done once the result of the next column is laid out, and again before each further pass."""

    def arrange(change: Callable[[], None]) -> None:
        share = columns.Job.share

        def changed(job: columns.Job, *arguments: Any) -> None:
            change()
            share(job, *arguments)

        monkeypatch.setattr(columns.Job, "share", changed)

    return arrange


def plain() -> tuple[Any, bytearray, bytearray]:
    """Rows between offsets with a validity bit each: the column, its data and its validity."""
    data, validity = bytearray(TEXT * ROWS), bytearray(b"\xff" * (ROWS // 8))
    offsets = array("i", [len(TEXT) * at for at in range(ROWS + 1)])
    return (offsets, data, validity), data, validity


def assert_refused(act: Callable[[], Any], out: bytearray) -> None:
    error = refused(act, InvalidInput)
    assert "changed while it was read" in str(error)
    assert not any(out), "something is left in the result"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "how",
    [{}, {"subject": "ann"}, {"subjects": pa.array(["ann", "bob"] * (ROWS // 2))}],
    ids=["fresh", "one", "named"],
)
def test_a_row_that_becomes_null_is_not_passed_over(
    service: ServiceHandle, meanwhile: Callable[..., None], how: dict[str, Any], threads: int
) -> None:
    column, _, validity = plain()

    def clear() -> None:
        validity[2] = 0b11110111

    meanwhile(clear)
    out = bytearray(b"\xaa" * 20_000)
    error = refused(lambda: service.encrypt_column(column, out=out, threads=threads, **how), InvalidInput)
    assert "changed while it was read" in str(error)
    assert out.find(b"\xaa" * 64) >= ROWS * (len(TEXT) + 100) - 64  # all that was laid out is zero


def test_all_rows_become_null(core: openkcm.Core, meanwhile: Callable[..., None]) -> None:
    with openkcm.Gateway(core, policy=openkcm.DataKeyPolicy(records=1000)) as gateway:
        for service in (gateway.service("acme", "records"), openkcm.Gateway(core).service("acme", "records")):
            column, _, validity = plain()
            meanwhile(lambda validity=validity: validity.__setitem__(slice(None), bytes(len(validity))))  # type: ignore[misc]
            assert "changed" in str(refused(lambda: service.encrypt_column(column), InvalidInput))  # noqa: B023


def envelopes(service: ServiceHandle, subject: str | None) -> tuple[tuple[Any, Any], bytearray, int]:
    blobs = [service.encrypt(TEXT, subject=subject) for _ in range(ROWS)]
    size = len(blobs[0])
    data = bytearray(b"".join(blobs))
    return (array("i", [size * at for at in range(ROWS + 1)]), data), data, size


@pytest.mark.parametrize("errors", ["raise", "null"])
@pytest.mark.parametrize("subject", [None, "ann"])
@pytest.mark.parametrize(
    ("place", "value"), [(0, 0), (4, 77), (5, 1), (5, 2)], ids=["magic", "suite", "inline", "stored"]
)
def test_a_row_that_is_no_record_any_more_is_not_passed_over(
    service: ServiceHandle,
    meanwhile: Callable[..., None],
    errors: Any,
    subject: str | None,
    place: int,
    value: int,
) -> None:
    column, data, size = envelopes(service, subject)
    if data[7 * size + place] == value:
        return  # it is this already

    def alter() -> None:
        data[7 * size + place] = value

    meanwhile(alter)
    out = bytearray(b"\xaa" * (ROWS * len(TEXT)))
    if errors == "null":
        assert_refused(lambda: service.decrypt_column(column, out=out, errors=errors), out)
        return
    # Passed over, and so looked at once more: then it says itself that it is none.
    assert refused(lambda: service.decrypt_column(column, out=out), FormatError).index == 7
    assert not any(out), "something is left in the result"


def test_the_other_kind_at_each_look(service: ServiceHandle, meanwhile: Callable[..., None]) -> None:
    """Inline while the stored ones are opened, and stored while the inline ones are: nobody would fill its place."""
    inline, stored = (service.encrypt(bytes(size), subject=who) for size, who in ((24, None), (80, "ann")))
    assert len(inline) == len(stored)
    size = len(inline)
    data = bytearray(inline + stored + inline)
    column = (array("i", [size * at for at in range(4)]), data)
    turns = iter([inline, stored, inline])  # the first while all are taken to be inline, as the first row is

    def swap() -> None:
        data[2 * size :] = next(turns)

    meanwhile(swap)
    out = bytearray(b"\xaa" * (24 + 80 + 24))
    assert_refused(lambda: service.decrypt_column(column, out=out), out)


class Bare:
    """An array through its capsules, which tell no size of a buffer."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __arrow_c_stream__(self, requested: object = None) -> Any:
        return pa.chunked_array(self.array).__arrow_c_stream__()


@pytest.mark.parametrize("coded", [False, True], ids=["plain", "dictionary"])
@pytest.mark.parametrize("subject", [None, "ann"])
def test_offsets_are_not_followed_to_where_no_row_was(
    service: ServiceHandle, meanwhile: Callable[..., None], subject: str | None, coded: bool
) -> None:
    """Where only a pointer tells of the data, its size is what the rows had when the column was first read."""
    (_, data), _, size = envelopes(service, subject)
    offsets = np.arange(0, 21, dtype=np.int64) * size
    column = pa.Array.from_buffers(pa.large_binary(), 20, [None, pa.py_buffer(offsets), pa.py_buffer(data)])
    if coded:
        column = pa.DictionaryArray.from_arrays(pa.array(range(20), pa.int8()), column)

    def move() -> None:
        offsets[:] += size * 10

    meanwhile(move)
    out = bytearray(b"\xaa" * (20 * len(TEXT)))
    error = refused(lambda: service.decrypt_column(Bare([column]), out=out), InvalidInput)
    assert "changed" in str(error) or "malformed" in str(error)
    assert not any(out), "something is left in the result"


@pytest.mark.parametrize("code", [1, 2, 3, -1], ids=["not seen", "null", "past the end", "negative"])
def test_codes_of_subjects_that_were_not_there_when_all_were_opened(
    service: ServiceHandle, meanwhile: Callable[..., None], code: int
) -> None:
    codes = np.zeros(ROWS, np.int8)
    names = pa.array(["ann", "bob", None])
    coded = pa.Array.from_buffers(names.type, 3, names.buffers())
    subjects = pa.DictionaryArray.from_arrays(
        pa.Array.from_buffers(pa.int8(), ROWS, [None, pa.py_buffer(codes)]), coded
    )

    def change() -> None:
        codes[ROWS // 2] = code

    meanwhile(change)
    out = bytearray(b"\xaa" * (ROWS * (STORED_OVERHEAD + len(TEXT))))
    column = pa.array([TEXT] * ROWS)
    error = refused(lambda: service.encrypt_column(column, subjects=subjects, out=out), InvalidInput)
    assert "changed" in str(error) or "malformed" in str(error)
    assert not any(out), "something is left in the result"


@pytest.mark.parametrize("errors", ["raise", "null"])
def test_sizes_whose_sum_overflows(service: ServiceHandle, errors: Any) -> None:
    """They come to what fits again: 2 ** 64 bytes in all, in rows between which there are nulls."""
    good = pa.array(service.encrypt_many([TEXT] * 10), pa.large_binary())
    offsets = np.zeros(9, np.int64)
    buffers = [pa.py_buffer(b"\x55"), pa.py_buffer(offsets), pa.py_buffer(b"")]
    bad = pa.Array.from_buffers(pa.large_binary(), 8, buffers)
    offsets[1::2] = 1 << 62
    error = refused(lambda: service.decrypt_column(Bare([good, bad]), errors=errors), InvalidInput)
    assert "malformed" in str(error)
    assert error.index == 10  # type: ignore[attr-defined]
    assert refused(lambda: service.encrypt_column(Bare([bad])), InvalidInput).index == 0  # type: ignore[attr-defined]


def test_what_is_laid_out_to_more_than_was_measured(service: ServiceHandle) -> None:
    offsets = np.array([0, 3000], np.int64)
    data = bytearray(10_000)

    class Contexts:
        def __arrow_c_array__(self, requested: object = None) -> Any:
            offsets[1] = 9000
            return pa.array([b"context"]).__arrow_c_array__()

    out = bytearray(10_000)
    assert_refused(lambda: service.encrypt_column((offsets, data), contexts=Contexts(), out=out), out)


def test_rows_that_are_no_records_do_not_shrink_the_result(service: ServiceHandle) -> None:
    """They have less than an envelope takes, which must not be counted as saved: offsets of 32 bits would overflow."""
    blobs = [
        b"",
        service.encrypt(b"a" * 50),
        b"",
        b"short",
        service.encrypt(b"b" * 60, subject="ann"),
        *[b""] * 30,
    ]
    found, reasons = service.decrypt_column(pa.array(blobs), errors="null")
    assert found.to_pylist() == [None, b"a" * 50, None, None, b"b" * 60, *[None] * 30]
    assert reasons.null_count == 2


@pytest.mark.slow  # 2 GiB
def test_offsets_of_32_bits_do_not_overflow(service: ServiceHandle) -> None:
    blobs = [service.encrypt(bytes(64 << 20), subject="ann"), service.encrypt(b"small"), b""]
    codes = pa.array([0] * 32 + [1] + [2] * 20, pa.int8())
    found, _ = service.decrypt_column(pa.DictionaryArray.from_arrays(codes, pa.array(blobs)), errors="null")
    assert found.type == pa.large_binary()
    assert found[32].as_py() == b"small"


# ---- bytes that change while they are deciphered ------------------------------------------------------------

FLIPPED = """
import sys, threading, time
from pathlib import Path
import numpy as np
from support import open_service

ROWS = 100


def look(service, size):
    text, ended = bytes(size), threading.Event()
    sealed = np.frombuffer(bytearray(b"".join(service.encrypt_many([text] * ROWS))), np.uint8)
    width = len(sealed) // ROWS
    mask = np.zeros_like(sealed)
    mask[width - 16 - size // 2 :: width] = 1  # a bit in the middle of each ciphertext

    def flip():
        while not ended.is_set():
            np.bitwise_xor(sealed, mask, out=sealed)

    thread = threading.Thread(target=flip)
    thread.start()
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        opened, _ = service.decrypt_column((np.arange(ROWS + 1) * width, sealed), errors="null")
        if not set(opened) <= {None, text}:
            print(f"of {size} bytes some came out that did not verify")
            break
    ended.set()
    thread.join()


sys.setswitchinterval(1e-5)
with open_service(Path(sys.argv[1])) as service:
    for size in (64, 2000, 50_000):
        look(service, size)
"""


@pytest.mark.skipif(not ON_FAST, reason="the Python backend's cipher is given copies, as the next test sees")
@pytest.mark.parametrize("settings", [{"OPENKCM_AES": "evp"}, {}], ids=["evp", "default"])
def test_what_changes_as_it_is_deciphered_does_not_come_out(settings: dict[str, str], tmp_path: Path) -> None:
    """OpenSSL reads a ciphertext twice: for its tag, and for its plaintext."""
    assert not run_python(FLIPPED, str(tmp_path), **settings).stdout


@pytest.mark.skipif(ON_FAST, reason="nothing can stand in for the native backend's cipher")
def test_a_cipher_is_given_copies(service: ServiceHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    from openkcm.crypto import pure_records

    given: list[type] = []
    real = pure_records.AESGCM

    class Noted:
        def __init__(self, key: bytes) -> None:
            self.real = real(key)

        def decrypt(self, nonce: Any, data: Any, aad: Any) -> bytes:
            given.append(type(data))
            return self.real.decrypt(nonce, data, aad)

    for subject in (None, "ann"):
        column, _, _ = envelopes(service, subject)
        with monkeypatch.context() as patch:
            patch.setattr(pure_records, "AESGCM", Noted)
            service.decrypt_column(column)
    assert set(given) == {bytes}


# ---- what is read -------------------------------------------------------------------------------------


def test_the_offset_of_a_null_says_nothing_of_where_the_data_ends(service: ServiceHandle) -> None:
    memory = bytearray(b"z" * 40_000)
    column = (array("i", [0, 1000, 0]), memory, b"\x01")
    assert "overlaps" in str(
        refused(lambda: service.encrypt_column(column, out=memoryview(memory)[10:]), InvalidInput)
    )
    buffer = pa.py_buffer(memory)
    values = pa.Array.from_buffers(pa.binary(), 2, [None, pa.py_buffer(array("i", [0, 1000, 0])), buffer])
    named = pa.DictionaryArray.from_arrays(pa.array([0], pa.int8()), values)
    assert "overlaps" in str(
        refused(lambda: service.encrypt_column(named, out=memoryview(memory)[10:]), InvalidInput)
    )
    assert memory == b"z" * 40_000


def test_a_column_of_ours_is_looked_at_like_any(service: ServiceHandle) -> None:
    odd = openkcm.Column(memoryview(np.zeros(1000, np.int16)), memoryview(b""), None, 0, False)
    assert "32 or 64 bits" in str(refused(lambda: service.encrypt_column(odd), InvalidInput))
    good = service.encrypt_column((array("i", [0, 1, 3]), b"abc"))
    assert list(service.decrypt_column(good)) == [b"a", b"bc"]


@pytest.mark.parametrize(("layout", "width"), [(crypto.OFFSETS, 2), (crypto.OFFSETS, 16), (crypto.CODES, 3)])
def test_widths_that_nothing_has(layout: int, width: int) -> None:
    values = crypto.Part(crypto.OFFSETS, 4, 0, 1, places=bytes(8), data=b"")
    part = crypto.Part(layout, width, 0, 1, places=bytes(64), data=b"", values=values)
    assert "have 4 or 8 bytes" in str(refused(lambda: crypto.Cells([part], "column"), InvalidInput))
