# SPDX-License-Identifier: Apache-2.0
"""What overtakes what in the Core: each interleaving is forced, not hoped for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import openkcm
from openkcm import crypto
from openkcm.core.act import attempt
from openkcm.core.keyring import Keyring, ServiceKey
from openkcm.errors import (
    CoreUnavailable,
    DecryptError,
    InvalidInput,
    SecretMemoryError,
    ServiceNotFound,
    StoreUnavailable,
    TenantDark,
)
from openkcm.keys import Change, Event, KeyState, Kind, Service, TenantState, WrappedKeys
from support import Clock, make_vault, refused, url, without_threads

IDLE = 3600.0
"""A poll interval at which the watcher never looks of itself."""


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def quiet(tmp_path: Path, clock: Clock) -> Iterator[openkcm.Core]:
    """A Core that looks at the store's changes only when it is told to."""
    make_vault(tmp_path).close()
    with openkcm.Core.open(url(tmp_path), poll_interval=IDLE, clock=clock) as core:
        yield without_threads(core)


@pytest.fixture
def other(tmp_path: Path, quiet: openkcm.Core) -> Iterator[openkcm.Core]:
    """Another Core on the same store: to ``quiet`` it is another process."""
    with openkcm.Core.open(url(tmp_path), poll_interval=IDLE) as core:
        yield without_threads(core)


@pytest.fixture
def records(quiet: openkcm.Core) -> Service:
    return quiet.find_service("acme", "records")


def wrapped(core: openkcm.Core, service: Service) -> WrappedKeys:
    return core.wrap_keys(service, crypto.generate_keys(2), Kind.INLINE)


def opens(core: openkcm.Core, service: Service, keys: WrappedKeys) -> bool:
    return not core.unwrap_keys(service, keys)[1]


def before(
    monkeypatch: pytest.MonkeyPatch, core: openkcm.Core, verb: str, act: Callable[[], object], times: int = 1
) -> list[str]:
    """Have ``act`` happen while the tenant's root is asked; returns a list that grows with each question."""
    root = core._vault.root(core.status("acme")[0].root)
    asked: list[str] = []
    answer = getattr(root, verb)

    def slow(*arguments: Any) -> bytes:
        asked.append(verb)
        result = answer(*arguments)
        if len(asked) <= times:
            act()
        return bytes(result)

    monkeypatch.setattr(root, verb, slow)
    return asked


def open_keys(core: openkcm.Core) -> dict[str, int]:
    return core._vault.ring.generations()


# ---- another process ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("looked", [False, True])
def test_a_kill_elsewhere_overtakes_an_opening(
    quiet: openkcm.Core,
    other: openkcm.Core,
    records: Service,
    monkeypatch: pytest.MonkeyPatch,
    looked: bool,
) -> None:
    """The change was looked at (or not) before the key is published: either way nothing stays open."""
    keys = wrapped(other, records)

    def kill() -> None:
        other.kill("acme", reason="elsewhere")
        if looked:
            quiet.poll()

    before(monkeypatch, quiet, "unwrap", kill)
    assert "elsewhere" in str(refused(lambda: quiet.unwrap_keys(records, keys), TenantDark))
    assert open_keys(quiet) == {}


def test_a_rotation_elsewhere_overtakes_an_opening(
    quiet: openkcm.Core, other: openkcm.Core, records: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old tenant key, destroyed meanwhile, does not stay open; the use goes on under the new one."""
    keys = wrapped(other, records)
    before(monkeypatch, quiet, "unwrap", lambda: other.rotate_tenant("acme"))
    assert opens(quiet, records, keys)
    assert list(quiet._vault.ring._tenants["acme"].tenant_keys) == [2]


def test_a_restore_elsewhere_ends_a_kill_here(
    quiet: openkcm.Core, other: openkcm.Core, records: Service
) -> None:
    keys = wrapped(quiet, records)
    quiet.kill("acme")
    other.restore("acme")
    assert opens(quiet, records, keys)
    assert quiet.status("acme")[0].state is TenantState.LIVE


def test_a_rotation_here_does_not_hide_one_elsewhere(
    quiet: openkcm.Core, other: openkcm.Core, records: Service
) -> None:
    first = wrapped(quiet, records)
    other.rotate_service("acme", "records")
    other.rotate_tenant("acme")
    assert quiet.rotate_service("acme", "records") == 3
    new = wrapped(quiet, records)
    assert new.version == 3
    assert opens(quiet, records, first)
    assert opens(other, records, new)
    assert open_keys(quiet)["acme"] == quiet._vault.follower.told["acme"]


@pytest.mark.parametrize("act", ["rotate_tenant", "replace_root"])
def test_gateways_hear_of_a_kill_elsewhere_though_no_key_is_open(
    quiet: openkcm.Core, other: openkcm.Core, records: Service, tmp_path: Path, act: str
) -> None:
    """A Gateway's pool outlives the keys it was wrapped under; it must hear of the kill all the same."""
    wrapped(quiet, records)
    events: list[Event] = []
    quiet.watch(events.append)
    if act == "rotate_tenant":
        quiet.rotate_tenant("acme")
    else:
        quiet.replace_root("acme", f"local:{tmp_path / 'new.root'}")
    assert open_keys(quiet) == {}
    quiet.poll()
    assert events == []
    other.kill("acme")
    quiet.poll()
    quiet.poll()
    assert events == [Event(Change.DARK, "acme")]


def test_changes_elsewhere_are_told_once(quiet: openkcm.Core, other: openkcm.Core, records: Service) -> None:
    wrapped(quiet, records)
    events: list[Event] = []
    stop = quiet.watch(events.append)
    other.rotate_service("acme", "records")
    quiet.poll()
    quiet.poll()
    assert events == [Event(Change.ROTATED, "acme")]
    assert wrapped(quiet, records).version == 2
    stop()
    other.kill("acme")
    quiet.poll()
    assert len(events) == 1


def test_a_starved_watcher_is_made_up_for_at_the_next_use(
    quiet: openkcm.Core, other: openkcm.Core, records: Service, clock: Clock
) -> None:
    keys = wrapped(quiet, records)
    other.kill("acme")
    clock.now += 2 * IDLE + 1
    refused(lambda: quiet.unwrap_keys(records, keys), TenantDark)


def test_open_keys_outlive_an_outage_of_the_store(
    quiet: openkcm.Core, records: Service, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = wrapped(quiet, records)

    def fail() -> int:
        raise StoreUnavailable("the store does not answer")

    monkeypatch.setattr(quiet._vault.store, "data_version", fail)
    clock.now += 2 * IDLE + 1
    assert opens(quiet, records, keys)
    refused(quiet.poll, StoreUnavailable)


# ---- this process -------------------------------------------------------------------------------------------------


def test_closing_overtakes_an_opening(
    quiet: openkcm.Core, other: openkcm.Core, records: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = wrapped(other, records)
    before(monkeypatch, quiet, "unwrap", quiet.close)
    refused(lambda: quiet.unwrap_keys(records, keys), CoreUnavailable)
    assert open_keys(quiet) == {}
    assert quiet._vault._seal is None
    assert quiet._vault.store._engine is None


def test_a_kill_is_not_undone_by_a_restore_that_began_before(
    quiet: openkcm.Core, other: openkcm.Core, records: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet.kill("acme", reason="first")
    before(monkeypatch, quiet, "unwrap", lambda: other.kill("acme", reason="second"))
    assert refused(lambda: quiet.restore("acme"), StoreUnavailable).retryable
    assert [(each.state, each.reason) for each in other.status()] == [(TenantState.DARK, "second")]
    refused(lambda: wrapped(quiet, records), TenantDark)


def test_keys_in_the_making_die_with_their_tenant(
    quiet: openkcm.Core, records: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rotation waits for its root while an operator kills: the new tenant key is zeroed by the kill."""
    keys = wrapped(quiet, records)
    made: list[bool] = []

    def kill() -> None:
        passing = list(quiet._vault.ring._passing["acme"])
        quiet.kill("acme")
        made.extend(key.wiped for key in passing)

    before(monkeypatch, quiet, "wrap", kill)
    refused(lambda: quiet.rotate_tenant("acme"), TenantDark)
    assert made == [True]
    assert quiet._vault.ring._passing == {}
    quiet.restore("acme")
    assert opens(quiet, records, keys)
    assert quiet.status()[0].key_version == 1


def test_a_rotation_that_was_overtaken_begins_again(
    quiet: openkcm.Core, other: openkcm.Core, records: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = wrapped(quiet, records)
    before(monkeypatch, quiet, "wrap", lambda: other.rotate_service("acme", "records"))
    assert quiet.rotate_tenant("acme") == 2
    assert opens(quiet, records, keys)
    assert wrapped(quiet, records).version == 2
    acts = [record.act for record in quiet.audit_records()]
    assert acts.count("rotate-tenant") == 1


def test_an_act_that_is_overtaken_every_time_gives_up(
    quiet: openkcm.Core, other: openkcm.Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    before(monkeypatch, quiet, "wrap", lambda: other.rotate_service("acme", "records"), times=100)
    assert refused(lambda: quiet.rotate_tenant("acme"), StoreUnavailable).retryable


@pytest.mark.parametrize("verb", ["wrap_many", "unwrap_many", "rewrap_many"])
def test_a_key_dropped_between_look_up_and_use(
    quiet: openkcm.Core, records: Service, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    keys = wrapped(quiet, records)
    quiet.rotate_service("acme", "records")
    work = getattr(crypto, verb)
    dropped: list[bool] = []

    def late(*arguments: Any) -> Any:
        if not dropped:
            dropped.append(quiet._vault.ring.drop("acme"))
        return work(*arguments)

    monkeypatch.setattr(crypto, verb, late)
    if verb == "wrap_many":
        assert wrapped(quiet, records).version == 2
    elif verb == "unwrap_many":
        assert opens(quiet, records, keys)
    else:
        assert quiet.rewrap_keys(records, keys)[1] == {}
    assert dropped == [True]


def test_a_callers_own_wiped_key_is_not_tried_again(quiet: openkcm.Core, records: Service) -> None:
    keys = crypto.generate_keys(1)
    keys.wipe()
    refused(lambda: quiet.wrap_keys(records, keys, Kind.INLINE), SecretMemoryError)


def test_a_refusal_is_asked_for_once_and_again_by_the_probe(
    quiet: openkcm.Core,
    other: openkcm.Core,
    records: Service,
    tmp_path: Path,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = wrapped(other, records)
    asked = before(monkeypatch, quiet, "unwrap", lambda: None, times=0)
    (tmp_path / "acme.root").rename(tmp_path / "unplugged")
    for _ in range(5):
        refused(lambda: quiet.unwrap_keys(records, keys), TenantDark)
    assert len(asked) == 1
    (tenant,) = quiet.status("acme")
    assert tenant.state is TenantState.DARK
    assert "is not there" in tenant.reason
    (tmp_path / "unplugged").rename(tmp_path / "acme.root")
    refused(lambda: quiet.unwrap_keys(records, keys), TenantDark)
    clock.now += 10.01
    refused(lambda: quiet.unwrap_keys(records, keys), TenantDark)  # users are told, and do not ask
    assert len(asked) == 1
    quiet._vault.liveness.run_due(run=lambda probe: probe())
    assert len(asked) == 2
    assert quiet.status("acme")[0].state is TenantState.LIVE
    assert opens(quiet, records, keys)


def test_threads_that_kill_restore_rotate_and_use(
    quiet: openkcm.Core, other: openkcm.Core, records: Service
) -> None:
    """Whatever interleaves: uses succeed or the tenant is dark, each key opens at the end, and a kill is final."""
    keys = [wrapped(quiet, records)]
    stop = threading.Event()
    wrong: list[BaseException] = []

    def repeat(act: Callable[[], object]) -> threading.Thread:
        return threading.Thread(target=_until, args=(stop, act, wrong))

    def use() -> None:
        fresh = wrapped(quiet, records)
        assert opens(quiet, records, fresh)
        moved, failed = quiet.rewrap_keys(records, fresh)
        assert not failed
        if len(keys) < 200:
            keys.append(moved)

    threads = [repeat(use), repeat(use), repeat(lambda: quiet.rotate_service("acme", "records"))]
    threads += [repeat(lambda: other.rotate_tenant("acme")), repeat(quiet.poll)]
    for thread in threads:
        thread.start()
    for round_ in range(12):
        killer, healer = (quiet, other) if round_ % 2 else (other, quiet)
        killer.kill("acme")
        assert open_keys(killer) == {}
        stop.wait(0.01)
        assert open_keys(killer) == {}
        healer.restore("acme")
        stop.wait(0.03)
    quiet.kill("acme")
    stop.wait(0.02)
    assert open_keys(quiet) == {}
    quiet.restore("acme")
    stop.set()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    quiet.poll()
    assert all(opens(quiet, records, each) for each in keys)
    assert quiet.verify_audit() is None


def _until(stop: threading.Event, act: Callable[[], object], wrong: list[BaseException]) -> None:
    while not stop.is_set():
        try:
            act()
        except TenantDark:
            pass
        except BaseException as error:
            if type(error) is not StoreUnavailable or not error.retryable:
                wrong.append(error)
                return


# ---- the ring ------------------------------------------------------------------------------------------------------


class SlowKey:
    """Stands for a key that is in use: its wiping waits."""

    def __init__(self) -> None:
        self.begun, self.go_on, self.wiped = threading.Event(), threading.Event(), False

    def wipe(self) -> None:
        self.begun.set()
        assert self.go_on.wait(20)
        self.wiped = True


def test_a_second_drop_waits_until_the_first_has_zeroed() -> None:
    """Two operators kill at once: neither is told that it is done while a key is still in use."""
    ring, key = Keyring(), SlowKey()
    assert ring.publish("acme", ring.epoch("acme"), 1, tenant_key=(1, key))  # type: ignore[arg-type]
    first = threading.Thread(target=ring.drop, args=("acme",))
    first.start()
    assert key.begun.wait(20)
    seen: list[bool] = []
    second = threading.Thread(target=lambda: seen.append((ring.drop("acme"), key.wiped)[1]))
    second.start()
    second.join(0.05)
    assert seen == []
    key.go_on.set()
    second.join(20)
    first.join(20)
    assert seen == [True]


def test_the_ring_refuses_what_was_overtaken() -> None:
    ring = Keyring()
    service = Service("acme", "local", "records", bytes(12))
    one, two = crypto.generate_wrapping_key(), crypto.generate_wrapping_key()
    epoch = ring.epoch("acme")
    assert ring.publish("acme", epoch, 5, tenant_key=(1, one))
    assert not ring.publish("acme", epoch, 6, service_key=ServiceKey(service, 1, two, 0.0), active=True)
    assert ring.active(service.service_id) is None
    ring.drop("acme")
    assert one.wiped
    assert not ring.publish("acme", epoch, 5, service_key=ServiceKey(service, 1, two, 0.0), active=True)
    with ring.passing("acme", epoch, two) as passing:
        assert passing.wiped
    ring.close()
    three = crypto.generate_wrapping_key()
    assert not ring.publish("acme", ring.epoch("acme"), 7, tenant_key=(1, three))
    with ring.passing("acme", ring.epoch("acme"), three):
        assert three.wiped


# ---- states and wrong arguments ---------------------------------------------------------------------------------


def test_the_states_of_a_version_decide_what_it_may_do(quiet: openkcm.Core, records: Service) -> None:
    first = wrapped(quiet, records)
    quiet.rotate_service("acme", "records")
    second = wrapped(quiet, records)
    from openkcm.core import schema

    with quiet._vault.store.write() as connection:
        keys = schema.service_keys.c
        connection.execute(
            schema.service_keys.update()
            .where(keys.version == 1)
            .values(state=KeyState.DESTROYED, wrapped=b"")
        )
    quiet._vault.ring.drop("acme")
    for call in (quiet.unwrap_keys, quiet.rewrap_keys):
        failures = call(records, first)[1]
        assert [type(error).__name__ for error in failures.values()] == ["KeyDestroyed"] * 2
        assert call(records, second)[1] == {}
    assert quiet.rotate_tenant("acme") == 2
    assert opens(quiet, records, second)


def test_a_key_altered_in_the_store_is_one_failure_like_any_other(
    quiet: openkcm.Core, records: Service
) -> None:
    keys = wrapped(quiet, records)
    from openkcm.core import schema

    for table in (schema.service_keys, schema.tenant_keys):
        quiet._vault.ring.drop("acme")
        with quiet._vault.store.write() as connection:
            (good,) = connection.execute(table.select().with_only_columns(table.c.wrapped)).one()
            connection.execute(table.update().values(wrapped=good[:-1] + bytes((good[-1] ^ 1,))))
        refused(lambda: wrapped(quiet, records), DecryptError)
        _, failures, _ = quiet.unwrap_keys(records, keys)
        assert [type(error) for error in failures.values()] == [DecryptError] * 2
        assert {str(error) for error in failures.values()} == {str(DecryptError())}
        with quiet._vault.store.write() as connection:
            connection.execute(table.update().values(wrapped=good))
    assert opens(quiet, records, keys)


@pytest.mark.parametrize("opened", [True, False])
def test_a_forged_service_is_not_found_whether_its_keys_are_open_or_not(
    quiet: openkcm.Core, records: Service, tmp_path: Path, opened: bool
) -> None:
    quiet.link_tenant("globex", root=f"local:{tmp_path / 'globex.root'}")
    keys = wrapped(quiet, records)
    for forged in (
        Service("globex", "local", "records", records.service_id),
        Service("acme", "elsewhere", "records", records.service_id),
        Service("acme", "local", "records", bytes(12)),
    ):
        if not opened:
            quiet._vault.ring.drop("acme")
        refused(lambda forged=forged: wrapped(quiet, forged), ServiceNotFound)
        refused(lambda forged=forged: quiet.unwrap_keys(forged, keys), ServiceNotFound)
        refused(lambda forged=forged: quiet.rewrap_keys(forged, keys), ServiceNotFound)


def test_wrong_arguments_are_named(quiet: openkcm.Core, records: Service, tmp_path: Path) -> None:
    for bad in (5, None, b"acme", "a b", "../x"):
        for call in (quiet.kill, quiet.restore, quiet.unlink, quiet.rotate_tenant):
            refused(lambda call=call, bad=bad: call(bad), InvalidInput)
        refused(lambda bad=bad: quiet.find_service(bad, "records"), InvalidInput)
        refused(lambda bad=bad: quiet.find_service("acme", bad), InvalidInput)
    for kind in (1, 9, "INLINE"):
        refused(
            lambda kind=kind: quiet.wrap_keys(records, crypto.generate_keys(1), kind),  # type: ignore[arg-type]
            InvalidInput,
        )
    refused(lambda: quiet.link_tenant("globex", 7), InvalidInput)  # type: ignore[arg-type]
    refused(lambda: openkcm.Core.open(url(tmp_path), poll_interval=0), InvalidInput)


@pytest.mark.parametrize("reason", ["\ud800 a lone surrogate", "x" * 10_000, 7, None])
def test_no_reason_stands_in_the_way_of_a_kill(quiet: openkcm.Core, records: Service, reason: object) -> None:
    wrapped(quiet, records)
    quiet.kill("acme", reason=reason)  # type: ignore[arg-type]
    assert quiet.status("acme")[0].state is TenantState.DARK
    assert len(quiet.status("acme")[0].reason) <= 256


def test_an_act_whose_keys_are_dropped_again_and_again_is_to_be_tried_later(core: openkcm.Core) -> None:
    """As by thirty threads that rotate one service: the last time is told as the ones before would be."""

    def act() -> None:
        core._vault.ring.drop("acme")
        raise SecretMemoryError("this key was wiped")

    error = refused(lambda: attempt(core._vault, "acme", act), StoreUnavailable)
    assert error.retryable  # type: ignore[attr-defined]

    def starve() -> None:
        raise SecretMemoryError("no memory can be locked")

    refused(lambda: attempt(core._vault, "acme", starve), SecretMemoryError)
