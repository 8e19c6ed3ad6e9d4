# SPDX-License-Identifier: Apache-2.0
"""What refused users cost: no reading, no lock, no garbage; and that what is repeated to them is never out of date."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy.engine import Connection

import openkcm
from openkcm import crypto
from openkcm.errors import KeyDestroyed, OpenKCMError, RootUnavailable, TenantDark
from openkcm.keys import Kind, Service, TenantState, WrappedKeys
from support import make_vault, refused, url, without_threads


@pytest.fixture
def core(tmp_path: Path) -> Iterator[openkcm.Core]:
    with make_vault(tmp_path, "acme", "other") as core:
        yield without_threads(core)


@pytest.fixture
def elsewhere(tmp_path: Path, core: openkcm.Core) -> Iterator[openkcm.Core]:
    """Another Core on the same store: to ``core`` it is another process."""
    with openkcm.Core.open(url(tmp_path)) as other:
        yield without_threads(other)


@pytest.fixture
def records(core: openkcm.Core) -> Service:
    return core.find_service("acme", "records")


@pytest.fixture
def keys(core: openkcm.Core, records: Service) -> WrappedKeys:
    return core.wrap_keys(records, crypto.generate_keys(1), Kind.INLINE)


@pytest.fixture
def readings(core: openkcm.Core, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each time that the store is read."""
    seen: list[str] = []
    read = core._vault.store.read

    @contextmanager
    def counted() -> Iterator[Connection]:
        seen.append("read")
        with read() as connection:
            yield connection

    monkeypatch.setattr(core._vault.store, "read", counted)
    return seen


def test_a_killed_tenants_users_do_not_read_the_store_each_time(
    core: openkcm.Core, records: Service, keys: WrappedKeys, readings: list[str]
) -> None:
    core.kill("acme", reason="audit")
    readings.clear()
    said = {str(refused(lambda: core.unwrap_keys(records, keys), TenantDark)) for _ in range(20)}
    said |= {str(refused(lambda: core.wrap_keys(records, crypto.generate_keys(1), Kind.INLINE), TenantDark))}
    assert len(said) == 1
    assert "was killed (audit)" in said.pop()
    assert len(readings) == 1


def test_a_restore_is_seen_at_once_whoever_made_it(
    core: openkcm.Core, elsewhere: openkcm.Core, records: Service, keys: WrappedKeys
) -> None:
    for who in (core, elsewhere):
        core.kill("acme")
        for _ in range(2):
            refused(lambda: core.unwrap_keys(records, keys), TenantDark)
        who.restore("acme")
        assert not core.unwrap_keys(records, keys)[1]


def test_another_commit_has_it_read_again(
    core: openkcm.Core, elsewhere: openkcm.Core, records: Service, keys: WrappedKeys, readings: list[str]
) -> None:
    core.kill("acme", reason="first")
    refused(lambda: core.unwrap_keys(records, keys), TenantDark)
    readings.clear()
    elsewhere.kill("acme", reason="second")
    for _ in range(2):
        assert "second" in str(refused(lambda: core.unwrap_keys(records, keys), TenantDark))
    assert len(readings) == 1


def test_a_restore_during_the_reading_is_not_overlooked(
    core: openkcm.Core,
    elsewhere: openkcm.Core,
    records: Service,
    keys: WrappedKeys,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was read before the restore must not be repeated after it."""
    core.kill("acme")
    read = core._vault.store.read

    @contextmanager
    def slow() -> Iterator[Connection]:
        with read() as connection:
            connection.exec_driver_sql("SELECT state FROM tenants").all()  # the transaction's view is taken
            monkeypatch.undo()
            elsewhere.restore("acme")
            yield connection

    monkeypatch.setattr(core._vault.store, "read", slow)
    refused(lambda: core.unwrap_keys(records, keys), TenantDark)
    assert not core.unwrap_keys(records, keys)[1]


def test_an_unlinked_tenants_users_do_not_read_the_store_each_time(
    core: openkcm.Core, records: Service, keys: WrappedKeys, readings: list[str]
) -> None:
    core.unlink("acme")
    readings.clear()

    def error() -> OpenKCMError:
        _, failures, lease = core.unwrap_keys(records, keys)
        assert lease == 0
        return failures[0]

    assert {type(error()) for _ in range(20)} == {KeyDestroyed}
    assert len(readings) == 1


def test_one_tenants_refusal_is_not_anothers(core: openkcm.Core, records: Service, keys: WrappedKeys) -> None:
    other = core.find_service("other", "records")
    theirs = core.wrap_keys(other, crypto.generate_keys(1), Kind.INLINE)
    core.kill("acme")
    refused(lambda: core.unwrap_keys(records, keys), TenantDark)
    core._vault.ring.drop("other")
    assert not core.unwrap_keys(other, theirs)[1]


def test_a_dark_tenants_users_wait_for_no_lock(
    core: openkcm.Core, records: Service, keys: WrappedKeys, tmp_path: Path
) -> None:
    (tmp_path / "acme.root").unlink()
    assert core.probe("acme").state is TenantState.DARK
    said: list[OpenKCMError] = []
    user = threading.Thread(
        target=lambda: said.append(refused(lambda: core.unwrap_keys(records, keys), TenantDark)), daemon=True
    )
    with core._vault.liveness._watched["acme"].lock:
        user.start()
        user.join(30)
        assert len(said) == 1
    assert "acme refuses" in str(said[0])


def test_a_silent_roots_users_do_not_read_the_store_each_time(
    core: openkcm.Core,
    records: Service,
    keys: WrappedKeys,
    readings: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    silence(core, monkeypatch)
    readings.clear()
    for _ in range(20):
        refused(lambda: core.unwrap_keys(records, keys), RootUnavailable)
    assert len(readings) == 1
    core.kill("acme")
    refused(lambda: core.unwrap_keys(records, keys), TenantDark)


def silence(core: openkcm.Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """The root of the tenant, whose keys are not open, does not answer."""

    def hang_up(*_: object) -> bytes:
        raise RootUnavailable("hm", retryable=False)

    monkeypatch.setattr(core._vault.root(core.status("acme")[0].root), "unwrap", hang_up)
    core._vault.ring.drop("acme")


class Plaintext:
    """Something in a caller's frame."""


def test_a_remembered_outage_does_not_keep_the_callers_data(
    core: openkcm.Core, records: Service, keys: WrappedKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    silence(core, monkeypatch)

    def use() -> tuple[weakref.ref[Plaintext], bool]:
        data = Plaintext()
        try:
            core.unwrap_keys(records, keys)
        except RootUnavailable as error:
            return weakref.ref(data), error.retryable
        raise AssertionError("it opened")

    gc.collect()
    gc.disable()
    try:
        first, second = use(), use()  # the one asks the root, the other is told what was remembered
    finally:
        gc.enable()
    assert [(data(), retryable) for data, retryable in (first, second)] == [(None, False)] * 2


def test_refusals_leave_no_garbage(
    core: openkcm.Core, records: Service, keys: WrappedKeys, tmp_path: Path
) -> None:
    """Neither a refused use nor a refused probe makes cycles, which would hold frames until the collector comes."""
    (tmp_path / "acme.root").unlink()
    core.probe("acme")
    refused(lambda: core.unwrap_keys(records, keys), TenantDark)
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            core._vault.liveness.probe(core._vault.liveness._watched["acme"])
            refused(lambda: core.unwrap_keys(records, keys), TenantDark)
        assert gc.collect() == 0
    finally:
        gc.enable()
