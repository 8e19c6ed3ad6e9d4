# SPDX-License-Identifier: Apache-2.0
"""Columns of envelopes of every kind: subjects, mixed and spoilt rows, text, and a tenant that goes dark."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import openkcm
from openkcm.errors import DecryptError, InvalidInput, KeyDestroyed, LimitExceeded, TenantDark
from openkcm.gateway import ServiceHandle, column_opener
from openkcm.gateway import columns as columns_module
from openkcm.gateway import subjects as subjects_module
from support import refused

PLAIN = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def other(core: openkcm.Core, **options: object) -> ServiceHandle:
    return openkcm.Gateway(core, **options).service("acme", "records")  # type: ignore[arg-type]


# ---- subjects --------------------------------------------------------------------------------------------


def test_a_subject_a_row(core: openkcm.Core, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (columns_module, column_opener):
        monkeypatch.setattr(module, "RING", 300)
    for module in (column_opener, subjects_module):
        monkeypatch.setattr(module, "MAX_KEYS_PER_CALL", 100)
    service = other(core)
    names = [f"user-{at * 7919 % 1000}" for at in range(5000)]
    column = pa.array([None if at % 11 == 0 else b"%d" % at for at in range(5000)], pa.binary())
    for subjects in (pa.array(names), pa.array(names).dictionary_encode()):
        sealed = service.encrypt_column(column, subjects=subjects, threads=2)
        assert service.decrypt_column(sealed, threads=2).equals(column)
        ids = {name: set() for name in names}  # type: dict[str, set[bytes]]
        for name, cell in zip(names, sealed.to_pylist(), strict=True):
            if cell is not None:
                ids[name].add(cell[24:40])
        assert all(len(found) == 1 for found in ids.values())
        assert len(set.union(*ids.values())) == 1000
    assert service.shred("user-5")
    opened, reasons = service.decrypt_column(sealed, errors="null")
    for name, row, was, reason in zip(
        names, opened.to_pylist(), column.to_pylist(), reasons.to_pylist(), strict=True
    ):
        gone = name == "user-5" and was is not None
        assert reason == ("key_destroyed" if gone else None)
        assert row == (None if gone else was)
    error = refused(lambda: service.decrypt_column(sealed), KeyDestroyed)
    assert names[error.index] == "user-5"  # type: ignore[attr-defined]


def test_null_rows_need_no_subject(service: ServiceHandle) -> None:
    sealed = service.encrypt_column(pa.array([b"a", None]), subjects=pa.array(["ann", None]))
    assert service.decrypt_column(sealed).to_pylist() == [b"a", None]


@pytest.mark.parametrize(
    ("subjects", "kind"),
    [
        (["ann", None], InvalidInput),
        (["ann", ""], InvalidInput),
        (["ann", "a" * 1025], LimitExceeded),
        ([b"ann", b"\xff"], InvalidInput),
    ],
)
def test_bad_subjects_are_named(service: ServiceHandle, subjects: list[Any], kind: type[Exception]) -> None:
    out = bytearray(b"\xaa" * 500)
    rows = pa.array([b"x", b"y"])
    error = refused(lambda: service.encrypt_column(rows, subjects=pa.array(subjects), out=out), kind)
    assert error.index == 1  # type: ignore[attr-defined]
    assert out == b"\xaa" * 500


# ---- mixed and bad envelopes -------------------------------------------------------------------------------


def mixed(core: openkcm.Core, service: ServiceHandle) -> tuple[list[bytes], list[bytes]]:
    """Envelopes of both kinds and three service key versions, each record its own."""
    blobs: list[bytes] = []
    for turn in range(3):
        records = [b"%d-%d" % (turn, at) for at in range(600)]
        blobs += service.encrypt_many(records[:200])
        blobs += service.encrypt_many(
            records[200:400], subjects=[f"user-{turn}-{at % 9}" for at in range(200)]
        )
        blobs += service.encrypt_many(records[400:], subject="everybody")
        core.rotate_service("acme", "records")
    order = sorted(range(len(blobs)), key=lambda at: at * 7919 % len(blobs))
    rows = [b"%d-%d" % (at // 600, at % 600) for at in order]
    return [blobs[at] for at in order], rows


@pytest.mark.parametrize("threads", [1, 2])
def test_any_mix_that_lists_take(core: openkcm.Core, threads: int) -> None:
    service = other(core)
    blobs, rows = mixed(core, service)
    assert service.decrypt_many(blobs) == rows
    assert service.decrypt_column(pa.array(blobs), threads=threads).to_pylist() == rows


def spoil(service: ServiceHandle, blobs: list[bytes], stranger: bytes) -> dict[int, tuple[bytes, str]]:
    """A bad envelope of each kind, and the reason that is given for it."""
    flipped = bytearray(blobs[70])
    flipped[-1] ^= 1
    key = bytearray(blobs[71])
    key[30] ^= 1
    version = bytearray(blobs[72])
    version[20:24] = bytes(4) if version[5] == 1 else b"\0\0\0\1"
    return {
        5: (b"", "format"),
        6: (b"not an envelope at all, but long enough to be one" * 9, "format"),
        7: (blobs[7][:99], "format"),
        8: (stranger, "decrypt"),
        70: (bytes(flipped), "decrypt"),
        71: (bytes(key), "decrypt"),
        72: (bytes(version), "format"),
    }


def test_bad_rows_come_out_null_with_a_reason(core: openkcm.Core) -> None:
    service = other(core)
    core.create_service("acme", "others")
    stranger = openkcm.Gateway(core).service("acme", "others").encrypt(b"theirs")
    blobs, rows = mixed(core, service)
    bad = spoil(service, blobs, stranger)
    spoilt = [bad[at][0] if at in bad else blob for at, blob in enumerate(blobs)]
    listed = service.decrypt_many(spoilt, errors="return")
    for threads in (1, 2):
        opened, reasons = service.decrypt_column(pa.array(spoilt), errors="null", threads=threads)
        opened.validate(full=True)
        assert opened.null_count == len(bad) == len(rows) - reasons.null_count
        for at, (row, reason) in enumerate(zip(opened.to_pylist(), reasons.to_pylist(), strict=True)):
            assert row == (None if at in bad else rows[at])
            assert reason == (bad[at][1] if at in bad else None)
            if at in bad:
                assert listed[at].code == reason
    for at, (blob, code) in bad.items():
        one = [*blobs[:at], blob, *blobs[at + 1 :]]
        with pytest.raises(openkcm.OpenKCMError) as caught:
            service.decrypt_column(pa.array(one), threads=2)
        assert (caught.value.code, caught.value.index) == (code, at)


def test_what_did_not_verify_leaves_nothing_behind(service: ServiceHandle) -> None:
    sealed = service.encrypt_column(pa.array([b"s" * 3000, b"t" * 30]), context=b"right").to_pylist()
    out = bytearray(b"\xaa" * 4000)
    refused(lambda: service.decrypt_column(pa.array(sealed), context=b"wrong", out=out), DecryptError)
    assert out == bytes(3030) + b"\xaa" * 970
    column, _ = service.decrypt_column(
        pa.array([*sealed, service.encrypt(b"u", context=b"wrong")]), context=b"wrong", out=out, errors="null"
    )
    assert column.to_pylist() == [None, None, b"u"]
    assert out[:3031] == bytes(3030) + b"u"


@pytest.mark.parametrize("errors", ["raise", "null"])
def test_an_interrupt_at_the_very_end_leaves_nothing_behind(
    service: ServiceHandle, monkeypatch: pytest.MonkeyPatch, errors: Any
) -> None:
    """As the result is put in its shape, or the reasons beside it."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    sealed, out = service.encrypt_column(pa.array([b"secret"] * 10)), bytearray(60)
    monkeypatch.setattr(columns_module, "Column", interrupt)
    refused(lambda: service.decrypt_column(sealed, out=out, errors=errors), KeyboardInterrupt)
    assert not any(out)
    monkeypatch.undo()
    monkeypatch.setattr(column_opener, "reasons_column", interrupt)
    refused(lambda: service.decrypt_column(sealed, out=out, errors="null"), KeyboardInterrupt)
    assert not any(out)


def test_text_is_checked(service: ServiceHandle) -> None:
    rows = [b"ok", b"\xff", None, "ü".encode(), b"\xed\xa0\x80", b"12345678\x80", b"\xf4\x90\x80\x80"]
    bad = [1, 4, 5, 6]
    sealed = service.encrypt_column(pa.array(rows, pa.binary()))
    error = refused(lambda: service.decrypt_column(sealed, text=True), InvalidInput)
    assert error.index == 1  # type: ignore[attr-defined]
    column, reasons = service.decrypt_column(sealed, text=True, errors="null")
    column.validate(full=True)
    assert column.to_pylist() == ["ok", None, None, "ü", None, None, None]
    assert [at for at, reason in enumerate(reasons.to_pylist()) if reason] == bad


@PLAIN
@given(rows=st.lists(st.binary(max_size=12), min_size=1, max_size=20))
def test_text_is_what_python_says_it_is(service: ServiceHandle, rows: list[bytes]) -> None:
    column, _ = service.decrypt_column(service.encrypt_column(pa.array(rows)), text=True, errors="null")
    for row, text in zip(rows, column.to_pylist(), strict=True):
        try:
            assert text == row.decode()
        except UnicodeDecodeError:
            assert text is None


# ---- a tenant that goes dark --------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["each", "subjects", "decrypt", "decrypt subjects"])
def test_a_kill_stops_a_column(core: openkcm.Core, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    rows = pa.array([b"x"] * 5000)
    names = pa.array([f"user-{at % 50}" for at in range(5000)])
    out = bytearray(5000 * 157)
    calls: list[int] = []

    def kill_in_the_middle(start: int) -> None:
        calls.append(start)
        if len(calls) == 2:
            core.kill("acme")

    def watched(call: Callable[..., Any], at: int) -> Callable[..., Any]:
        def wrapper(*arguments: Any) -> Any:
            kill_in_the_middle(arguments[at])
            return call(*arguments)

        return wrapper

    for name in ("seal_rows", "seal_named", "open_rows", "open_named"):
        monkeypatch.setattr(openkcm.crypto, name, watched(getattr(openkcm.crypto, name), 4))
    service = other(core)  # only now: a handle takes these functions when it is made
    calls += (0, 0)
    each, named = service.encrypt_column(rows), service.encrypt_column(rows, subjects=names)
    calls.clear()
    work = {
        "each": lambda: service.encrypt_column(rows, out=out),
        "subjects": lambda: service.encrypt_column(rows, subjects=names, out=out),
        "decrypt": lambda: service.decrypt_column(each, out=out),
        "decrypt subjects": lambda: service.decrypt_column(named, out=out),
    }[what]
    refused(work, TenantDark)
    assert len(calls) == 2
    assert out == bytes(len(out))


def test_threads_of_many_callers(service: ServiceHandle) -> None:
    column = pa.array([None if at % 7 == 3 else bytes(at % 90) for at in range(1500)], pa.binary())
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(3):
                assert service.decrypt_column(service.encrypt_column(column, threads=2), threads=2).equals(
                    column
                )
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
