# SPDX-License-Identifier: Apache-2.0
"""Columns with a data key a row or for many: the loops over rows that are alike, and where they have to stop."""

from __future__ import annotations

import random
from typing import Any

import pyarrow as pa
import pytest

import openkcm
from openkcm.errors import DecryptError, FormatError, InvalidInput
from openkcm.gateway import DataKeyPolicy, ServiceHandle
from support import refused

SIZES = [0, 1, 15, 64, 65, 2047, 2048, 2049, 5000, 7, 2048, 0, 0, 100]
ROWS = [bytes([at % 251]) * SIZES[at % len(SIZES)] for at in range(400)]


def sharing(core: openkcm.Core, records: int) -> ServiceHandle:
    return openkcm.Gateway(core, policy=DataKeyPolicy(records=records)).service("acme", "records")


@pytest.mark.parametrize("records", [1, 2, 7, 399, 2**31])
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_rows_of_every_size_under_keys_that_change(core: openkcm.Core, records: int, kind: Any) -> None:
    service = sharing(core, records)
    whole = pa.array(ROWS, kind)
    pieces = pa.chunked_array([whole[:1], whole[1:1], whole[1:150], whole[150:151], whole[151:]])
    nulls = pa.array([None if at % 50 == 7 else row for at, row in enumerate(ROWS)], kind)
    for column in (whole, whole[3:-5], pieces, nulls):
        for threads in (1, 2):
            sealed = service.encrypt_column(column, context=b"c", threads=threads)
            assert service.decrypt_many([row.as_py() for row in sealed if row.is_valid], context=b"c") == [
                row.as_py() for row in column if row.is_valid
            ]
            assert (
                service.decrypt_column(sealed, context=b"c", threads=threads).to_pylist()
                == column.to_pylist()
            )


@pytest.mark.parametrize("records", [1, 2**31])
@pytest.mark.parametrize("bad", [0, 1, 2, 200, 399])
def test_a_row_that_does_not_verify_is_named_and_no_other(core: openkcm.Core, bad: int, records: int) -> None:
    service = sharing(core, records)
    rows = [row.as_py() for row in service.encrypt_column(pa.array([b"r" * 64] * 400))]
    # The head, which makes it no envelope; the wrapped key; the nonce; the ciphertext; the tag.
    for place, kind in (
        (0, FormatError),
        (30, DecryptError),
        (100, DecryptError),
        (-17, DecryptError),
        (-1, DecryptError),
    ):
        altered = list(rows)
        blob = bytearray(rows[bad])
        blob[place] ^= 1
        altered[bad] = bytes(blob)
        column = pa.array(altered)
        error = refused(lambda column=column: service.decrypt_column(column), kind)
        assert error.index == bad  # type: ignore[attr-defined]
        opened, reasons = service.decrypt_column(column, errors="null")
        assert opened.to_pylist() == [None if at == bad else b"r" * 64 for at in range(400)]
        assert [at for at, reason in enumerate(reasons.to_pylist()) if reason] == [bad]


def test_kinds_and_keys_among_each_other(core: openkcm.Core) -> None:
    """Runs of rows under one key, cut by rows of another key, of subjects, and of a newer service key."""
    one, each = sharing(core, 2**31), sharing(core, 1)
    drawn = random.Random(4)
    blobs, rows = [], []
    for turn in range(60):
        row = bytes([turn]) * drawn.randrange(90)
        many = [row] * drawn.randrange(1, 30)
        way = drawn.randrange(4)
        if way == 0:
            blobs += each.encrypt_many(many)
        elif way == 1:
            blobs += one.encrypt_many(many, subject=f"user-{turn % 5}")
        else:
            blobs += one.encrypt_many(many)
        rows += many
        if turn == 30:
            core.rotate_service("acme", "records")
    assert one.decrypt_column(pa.array(blobs)).to_pylist() == rows
    blobs[40] = blobs[40][:-1] + bytes([blobs[40][-1] ^ 1])
    error = refused(lambda: one.decrypt_column(pa.array(blobs)), DecryptError)
    assert error.index == 40  # type: ignore[attr-defined]


# ---- rows that are taken to be alike ------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("other", [0, 1, 700, 1499])
@pytest.mark.parametrize("subject", [None, "ann"], ids=["inline", "stored"])
def test_one_row_of_the_other_kind(
    service: ServiceHandle, subject: str | None, other: int, threads: int
) -> None:
    """All are taken to be of the kind of the first until one is not; ``out`` need not hold what that would take."""
    rows = [b"%d" % at for at in range(1500)]
    blobs = service.encrypt_many(rows, subject=subject)
    blobs[other] = service.encrypt(rows[other], subject="ann" if subject is None else None)
    opened = service.decrypt_column(pa.array(blobs), threads=threads)
    assert opened.to_pylist() == rows
    out = bytearray(sum(map(len, rows)))
    assert service.decrypt_column(pa.array(blobs), out=out, threads=threads).to_pylist() == rows
    assert out == b"".join(rows)
    names = service.decrypt_column(pa.array(blobs), threads=threads, text=True)
    assert names.type == pa.string()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kinds", [["ann", None], [None, "ann"], ["ann", "bob", None]])
def test_nothing_is_written_behind_the_result(
    service: ServiceHandle, kinds: list[str | None], threads: int
) -> None:
    """An inline row has more that is taken away than a stored one, which it must not be taken for there."""
    rows = [b"%d" % at for at in range(1500)]
    each = kinds + [kinds[-1]] * (len(rows) - len(kinds))
    blobs = pa.array([service.encrypt(row, subject=who) for row, who in zip(rows, each, strict=True)])
    size = sum(map(len, rows))
    out = bytearray(b"\xaa" * 200_000)
    service.decrypt_column(blobs, out=out, threads=threads)
    assert out[:size] == b"".join(rows)
    assert out[size:] == b"\xaa" * (200_000 - size)


def test_a_result_that_is_too_small_for_rows_of_two_kinds(service: ServiceHandle) -> None:
    blobs = pa.array([service.encrypt(b"x" * 100), service.encrypt(b"x" * 100, subject="ann")])
    out = bytearray(b"\xaa" * 199)
    assert "takes 200 bytes" in str(refused(lambda: service.decrypt_column(blobs, out=out), InvalidInput))
    assert set(out) <= {0, 0xAA}


@pytest.mark.parametrize("subject", [None, "ann"], ids=["inline", "stored"])
def test_rows_that_have_less_than_an_envelope_takes(service: ServiceHandle, subject: str | None) -> None:
    """They are told of as what they are, however much the rows before them have."""
    rows = pa.array([service.encrypt(b"x" * 1000, subject=subject), *[b""] * 20])
    assert refused(lambda: service.decrypt_column(rows), FormatError).index == 1  # type: ignore[attr-defined]


def test_rows_too_short_for_the_kind_of_the_first(service: ServiceHandle) -> None:
    """A stored row without a byte is shorter than an inline one can be."""
    blobs = [service.encrypt(b""), service.encrypt(b"", subject="ann")]
    assert len(blobs[1]) < len(blobs[0])
    for rows in (blobs, blobs[::-1], [None, *blobs]):
        assert service.decrypt_column(pa.array(rows)).to_pylist() == [row and b"" for row in rows]
    found = refused(lambda: service.decrypt_column(pa.array([blobs[0], b"short"])), FormatError)
    assert found.index == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("threads", [1, 2])
def test_two_bad_rows(service: ServiceHandle, threads: int) -> None:
    """What does not verify is found before what is no envelope further on; nothing stays of what was decrypted."""
    blobs = service.encrypt_many([b"x" * 64] * 2000)
    blobs[10] = blobs[10][:-1] + bytes([blobs[10][-1] ^ 1])
    blobs[1990] = b"no envelope" * 30
    out = bytearray(b"\xaa" * (2000 * 400))
    error = refused(lambda: service.decrypt_column(pa.array(blobs), threads=threads, out=out), DecryptError)
    assert error.index == 10  # type: ignore[attr-defined]
    assert not any(out[: 1999 * 64])


@pytest.mark.parametrize("rows", [6, 3000])
def test_subjects_of_a_dictionary_that_says_a_name_twice(core: openkcm.Core, rows: int) -> None:
    """Chunks with dictionaries of their own, with nulls, unused values, and more values than rows."""
    service = openkcm.Gateway(core).service("acme", "records")
    values = [["ann", "bob", "ann", None, "cy"], [f"unused {at}" for at in range(5000)] + ["bob", "ann"]]
    codes = [[(0, 1, 2, 4)[at % 4] for at in range(rows)], [5000 + at % 2 for at in range(rows)]]
    chunks = [
        pa.DictionaryArray.from_arrays(pa.array(code, pa.int32()), pa.array(value)).slice(1)
        for code, value in zip(codes, values, strict=True)
    ]
    names = [value[code] for chunk, value in zip(codes, values, strict=True) for code in chunk[1:]]
    column = pa.array([f"row {at}" for at in range(len(names))])
    sealed = service.encrypt_column(column, subjects=pa.chunked_array(chunks), threads=2)
    assert service.decrypt_column(sealed, text=True).to_pylist() == column.to_pylist()
    keys: dict[bytes, set[str | None]] = {}
    for name, cell in zip(names, sealed.to_pylist(), strict=True):
        keys.setdefault(cell[24:40], set()).add(name)
    assert sorted(map(sorted, keys.values())) == [["ann"], ["bob"], ["cy"]]  # type: ignore[arg-type, type-var]
    service.shred("bob")
    opened, _ = service.decrypt_column(sealed, errors="null", text=True)
    kept = [None if name == "bob" else row for name, row in zip(names, column.to_pylist(), strict=True)]
    assert opened.to_pylist() == kept


def test_a_code_whose_value_is_null_has_no_subject(service: ServiceHandle) -> None:
    names = pa.DictionaryArray.from_arrays(pa.array([0, 0, 1, 0], pa.int8()), pa.array(["ann", None]))
    error = refused(lambda: service.encrypt_column(pa.array([b"x"] * 4), subjects=names), InvalidInput)
    assert error.index == 2
    sealed = service.encrypt_column(pa.array([b"x", b"x", None, b"x"]), subjects=names)
    assert service.decrypt_column(sealed).to_pylist() == [b"x", b"x", None, b"x"]
