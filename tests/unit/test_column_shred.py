# SPDX-License-Identifier: Apache-2.0
"""Columns under way when somebody is shredded or the tenant is killed: the keys that they hold open are given up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

import openkcm
from openkcm import crypto
from openkcm.errors import CoreUnavailable, KeyDestroyed, StoreUnavailable, TenantDark
from openkcm.gateway import ServiceHandle, column_opener, columns
from support import refused

ROWS = 40
NAMES = ["ann", "bob"] * (ROWS // 2)
TEXTS = [b"row %d" % at for at in range(ROWS)]
COLUMN = pa.array(TEXTS)


@pytest.fixture
def between(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], list[int]]:
    """Has something done between two runs of eight rows each; gives the rows at which runs began."""

    def arrange(after: int, act: Callable[[], object]) -> list[int]:
        monkeypatch.setattr(columns, "LONG_RUN", 8)
        monkeypatch.setattr(column_opener, "LONG_RUN", 8)
        share, runs = columns.Job.share, list[int]()

        def cut(job: columns.Job, rows: int, work: Callable[[int, int], None]) -> None:
            def and_then(start: int, stop: int) -> None:
                work(start, stop)
                runs.append(start)
                if len(runs) == after:
                    act()

            share(job, rows, and_then)

        monkeypatch.setattr(columns.Job, "share", cut)
        return runs

    return arrange


def test_a_subject_that_is_shredded_is_not_encrypted_for_under_the_old_key(
    service: ServiceHandle, between: Callable[..., list[int]]
) -> None:
    between(2, lambda: service.shred("ann"))
    sealed = service.encrypt_column(COLUMN, subjects=pa.array(NAMES))
    assert service.decrypt_column(sealed).to_pylist() == TEXTS


def test_no_row_of_a_shredded_subject_is_decrypted_any_more(
    service: ServiceHandle, between: Callable[..., list[int]]
) -> None:
    sealed = service.encrypt_column(COLUMN, subjects=pa.array(NAMES))
    out = bytearray(b"\xaa" * sum(map(len, TEXTS)))
    runs = between(2, lambda: service.shred("ann"))
    error = refused(lambda: service.decrypt_column(sealed, out=out), KeyDestroyed)
    assert NAMES[error.index] == "ann"  # type: ignore[attr-defined]
    assert runs == [0, 8]
    assert not any(out)


def test_the_rows_of_others_are_decrypted_all_the_same(
    service: ServiceHandle, between: Callable[..., list[int]]
) -> None:
    sealed = service.encrypt_column(COLUMN, subjects=pa.array(NAMES))
    between(2, lambda: service.shred("ann"))
    opened, reasons = service.decrypt_column(sealed, errors="null")
    assert opened.to_pylist() == [
        None if name == "ann" else text for name, text in zip(NAMES, TEXTS, strict=True)
    ]
    assert reasons.to_pylist() == ["key_destroyed" if name == "ann" else None for name in NAMES]


def test_a_shred_of_somebody_else_disturbs_nobody(
    service: ServiceHandle, between: Callable[..., list[int]]
) -> None:
    service.encrypt(b"x", subject="carol")
    runs = between(2, lambda: service.shred("carol"))
    service.encrypt_column(COLUMN, subjects=pa.array(NAMES))
    assert runs == [0, 8, 16, 24, 32]


def test_a_shred_between_opening_and_the_first_run(
    service: ServiceHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed = service.encrypt_column(COLUMN, subjects=pa.array(NAMES))
    before = service._core.unwrap_keys

    def shredded(*arguments: Any) -> object:
        answer = before(*arguments)
        service.shred("ann")
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(service._core, "unwrap_keys", shredded)
        opened, _ = service.decrypt_column(sealed, errors="null")
    assert opened.to_pylist() == [
        None if name == "ann" else text for name, text in zip(NAMES, TEXTS, strict=True)
    ]


def test_shreds_without_end_are_an_end(service: ServiceHandle, between: Callable[..., list[int]]) -> None:
    service.encrypt(b"x", subject="ann")
    between(-1, lambda: None)
    share = columns.Job.share

    def shredding(job: columns.Job, rows: int, work: Callable[[int, int], None]) -> None:
        service.shred("ann")
        share(job, rows, work)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns.Job, "share", shredding)
        error = refused(lambda: service.encrypt_column(COLUMN, subjects=pa.array(NAMES)), StoreUnavailable)
    assert error.retryable  # type: ignore[attr-defined]


def test_a_kill_wipes_the_keys_of_every_version(
    core: openkcm.Core,
    between: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service = openkcm.Gateway(core).service("acme", "records")
    blobs: list[Any] = service.encrypt_column(COLUMN[:20], subjects=pa.array(NAMES[:20])).to_pylist()
    core.rotate_service("acme", "records")
    blobs += service.encrypt_column(
        COLUMN[20:], subjects=pa.array([f"new-{name}" for name in NAMES[20:]])
    ).to_pylist()
    rings: list[crypto.SecretKeys] = []
    make = crypto.KeyRing

    def noted(first: int, keys: Any, ids: Any) -> Any:
        rings.extend(keys)
        return make(first, keys, ids)

    monkeypatch.setattr(column_opener, "KeyRing", noted)
    wiped: list[bool] = []

    def kill() -> None:
        core.kill("acme")
        wiped.extend(each.wiped for each in rings)

    between(1, kill)
    refused(lambda: service.decrypt_column(pa.array(blobs)), TenantDark)
    assert len(wiped) > 1
    assert all(wiped)


@pytest.mark.parametrize("way", ["encrypt", "decrypt"])
def test_what_is_under_way_hears_that_its_gateway_was_closed(
    core: openkcm.Core, between: Callable[..., list[int]], way: str
) -> None:
    gateway = openkcm.Gateway(core)
    service = gateway.service("acme", "records")
    sealed = service.encrypt_column(COLUMN, subjects=pa.array(NAMES))
    between(1, gateway.close)
    work = {
        "encrypt": lambda: service.encrypt_column(COLUMN, subjects=pa.array(NAMES)),
        "decrypt": lambda: service.decrypt_column(sealed),
    }[way]
    error = refused(work, CoreUnavailable)
    assert "closed" in str(error) and not error.retryable  # type: ignore[attr-defined]
