# SPDX-License-Identifier: Apache-2.0
"""Open-leases: data keys kept for a moment, and never for a moment longer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import openkcm
from openkcm.crypto import SecretKeys
from openkcm.errors import (
    DecryptError,
    InvalidInput,
    KeyDestroyed,
    OpenKCMError,
    ServiceNotFound,
    TenantDark,
)
from openkcm.gateway import ServiceHandle
from openkcm.gateway.leases import MOST_KEPT, Leases
from openkcm.keys import OpenedKeys, Service, WrappedKeys
from support import Clock, make_vault, refused, url, without_threads

LEASE = 30.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def core(tmp_path: Path, clock: Clock) -> Iterator[openkcm.Core]:
    make_vault(tmp_path).close()
    with openkcm.Core.open(url(tmp_path), clock=clock) as core:
        yield without_threads(core)


@pytest.fixture
def calls(core: openkcm.Core, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many keys each of the Core's unwrap calls was for."""
    seen: list[int] = []
    unwrap = core.unwrap_keys

    def counted(service: Service, wrapped: WrappedKeys) -> OpenedKeys:
        seen.append(len(wrapped))
        return unwrap(service, wrapped)

    monkeypatch.setattr(core, "unwrap_keys", counted)
    return seen


@pytest.fixture
def leased(core: openkcm.Core, clock: Clock, calls: list[int]) -> ServiceHandle:
    """A handle on a service that has a lease, on the fake clock."""
    core.set_lease("acme", "records", LEASE)
    handle = openkcm.Gateway(core).service("acme", "records")
    handle._leases.clock = clock
    return handle


def kept(handle: ServiceHandle) -> list[SecretKeys]:
    return [each.keys for each in handle._leases.kept.values()]


def test_strict_is_the_default(core: openkcm.Core, calls: list[int]) -> None:
    handle = openkcm.Gateway(core).service("acme", "records")
    blob = handle.encrypt(b"x")
    for _ in range(3):
        assert handle.decrypt(blob) == b"x"
    assert calls == [1, 1, 1]
    assert kept(handle) == []
    assert core.status("acme")[0].services[0].lease == 0


@pytest.mark.parametrize("subject", [None, "user-42"])
def test_a_leased_key_is_opened_once(leased: ServiceHandle, calls: list[int], subject: str | None) -> None:
    blob = leased.encrypt(b"x", context={"row": "7"}, subject=subject)
    calls.clear()
    for _ in range(5):
        assert leased.decrypt(blob, context={"row": "7"}) == b"x"
    assert calls == [1]
    refused(lambda: leased.decrypt(blob, context={"row": "8"}), DecryptError)


def test_a_lease_does_not_slide(leased: ServiceHandle, clock: Clock, calls: list[int]) -> None:
    """Used at every moment, its key is opened again when, and only when, its time is over."""
    blob = leased.encrypt(b"x")
    calls.clear()
    for _ in range(10 * int(LEASE) + 5):
        assert leased.decrypt(blob) == b"x"
        clock.now += 0.1
    assert len(calls) == 2


def test_a_lease_counts_from_before_the_opening(
    core: openkcm.Core, leased: ServiceHandle, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = leased.encrypt(b"x")
    unwrap = core.unwrap_keys

    def slow(service: Service, wrapped: WrappedKeys) -> OpenedKeys:
        answer = unwrap(service, wrapped)
        clock.now += 5
        return answer

    monkeypatch.setattr(core, "unwrap_keys", slow)
    started = clock.now
    leased.decrypt(blob)
    (entry,) = leased._leases.kept.values()
    assert entry.until == started + LEASE


def test_time_zeroes_a_key_that_nobody_uses(tmp_path: Path, core: openkcm.Core) -> None:
    core.set_lease("acme", "records", 0.05)
    handle = openkcm.Gateway(core).service("acme", "records")
    assert handle.decrypt(handle.encrypt(b"x")) == b"x"
    (keys,) = kept(handle)
    end = time.monotonic() + 30
    while not keys.wiped and time.monotonic() < end:
        time.sleep(0.01)
    assert keys.wiped
    assert kept(handle) == []


def kill(core: openkcm.Core, handle: ServiceHandle, folder: Path) -> None:
    core.kill("acme")


def unplug(core: openkcm.Core, handle: ServiceHandle, folder: Path) -> None:
    (folder / "acme.root").rename(folder / "unplugged")
    assert core.probe("acme").state is openkcm.TenantState.DARK


@pytest.mark.parametrize("act", [kill, unplug])
def test_going_dark_zeroes_what_is_leased(
    core: openkcm.Core,
    leased: ServiceHandle,
    tmp_path: Path,
    act: Callable[[openkcm.Core, ServiceHandle, Path], None],
) -> None:
    blob = leased.encrypt(b"x")
    leased.decrypt(blob)
    (keys,) = kept(leased)
    act(core, leased, tmp_path)
    assert keys.wiped
    assert kept(leased) == []
    refused(lambda: leased.decrypt(blob), TenantDark)


def test_another_processes_kill_ends_leases(
    tmp_path: Path, core: openkcm.Core, leased: ServiceHandle
) -> None:
    blob = leased.encrypt(b"x")
    leased.decrypt(blob)
    (keys,) = kept(leased)
    with openkcm.Core.open(url(tmp_path)) as other:
        other.kill("acme")
    core.poll()
    assert keys.wiped
    refused(lambda: leased.decrypt(blob), TenantDark)


def test_a_leased_key_is_not_used_past_the_tenants_own_time(
    core: openkcm.Core, leased: ServiceHandle, clock: Clock, tmp_path: Path
) -> None:
    """The lease is long, the prober is starved, and the root says no: the next interval asks it."""
    core.set_lease("acme", "records", 3600)
    blob = leased.encrypt(b"x")
    assert leased.decrypt(blob) == b"x"
    (tmp_path / "acme.root").rename(tmp_path / "unplugged")
    started = clock.now
    while clock.now < started + 60:
        clock.now += 0.1
        try:
            leased.decrypt(blob)
        except TenantDark:
            break
    assert clock.now - started <= 11


def test_shredding_ends_the_lease(leased: ServiceHandle) -> None:
    blob = leased.encrypt(b"x", subject="user-42")
    leased.decrypt(blob)
    (keys,) = kept(leased)
    assert leased.shred("user-42")
    assert keys.wiped
    refused(lambda: leased.decrypt(blob), KeyDestroyed)


def test_a_lease_that_is_taken_back_ends_at_once(
    core: openkcm.Core, leased: ServiceHandle, calls: list[int]
) -> None:
    blob = leased.encrypt(b"x")
    leased.decrypt(blob)
    (keys,) = kept(leased)
    core.set_lease("acme", "records", 0)
    assert keys.wiped
    calls.clear()
    leased.decrypt(blob)
    leased.decrypt(blob)
    assert calls == [1, 1]


def test_what_is_kept_is_bound_to_all_that_its_wrap_is_bound_to(
    core: openkcm.Core, leased: ServiceHandle, calls: list[int]
) -> None:
    """An envelope altered in kind, version, key or id never meets the kept key."""
    blob = leased.encrypt(b"x")
    leased.decrypt(blob)
    core.create_service("acme", "other")
    for at in (5, 8, 20, 23, 24, 95):
        altered = blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :]
        with pytest.raises(OpenKCMError):
            leased.decrypt(altered)
    stored = leased.encrypt(b"x", subject="a")
    leased.decrypt(stored)
    other = leased.encrypt(b"y", subject="b")
    refused(lambda: leased.decrypt(stored[:20] + other[20:36] + stored[36:]), DecryptError)


def test_what_is_kept_is_bounded(core: openkcm.Core, leased: ServiceHandle) -> None:
    blobs = leased.encrypt_many([b"x"] * (MOST_KEPT + 20))
    for blob in blobs:
        leased.decrypt(blob)
    assert len(kept(leased)) == MOST_KEPT
    assert leased.decrypt(blobs[0]) == b"x"


def test_batches_ask_once_and_keep_nothing(leased: ServiceHandle, calls: list[int]) -> None:
    blobs = leased.encrypt_many([b"x"] * 10)
    calls.clear()
    leased.decrypt_many(blobs)
    leased.decrypt_many(blobs)
    assert calls == [10, 10]
    assert kept(leased) == []


def test_a_key_that_is_opened_during_a_kill_is_not_kept(
    core: openkcm.Core, leased: ServiceHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = leased.encrypt(b"x")
    unwrap = core.unwrap_keys

    def kill_meanwhile(service: Service, wrapped: WrappedKeys) -> OpenedKeys:
        answer = unwrap(service, wrapped)
        assert answer[2] == LEASE
        leased._leases.wipe()  # what the Gateway does when it is told of a kill
        return answer

    monkeypatch.setattr(core, "unwrap_keys", kill_meanwhile)
    assert leased.decrypt(blob) == b"x"
    assert kept(leased) == []


def test_one_call_opens_a_key_and_says_for_how_long(
    core: openkcm.Core, leased: ServiceHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A strict decrypt, and a first one under a lease, are one call; each use of a kept key asks whether it may."""
    asked: list[float] = []
    lease = core.lease

    def counted(service: Service) -> float:
        asked.append(lease(service))
        return asked[-1]

    monkeypatch.setattr(core, "lease", counted)
    blob = leased.encrypt(b"x")
    leased.decrypt(blob)
    assert (len(kept(leased)), asked) == (1, [])
    leased.decrypt(blob)
    assert asked == [LEASE]
    core.set_lease("acme", "records", 0)
    leased.decrypt(blob)
    leased.decrypt(blob)
    assert (kept(leased), asked) == ([], [LEASE])


def test_a_key_that_does_not_open_is_not_kept(core: openkcm.Core, leased: ServiceHandle) -> None:
    blob = leased.encrypt(b"x")
    refused(lambda: leased.decrypt(blob[:30] + bytes([blob[30] ^ 1]) + blob[31:]), DecryptError)
    assert kept(leased) == []
    leased.decrypt(blob)
    assert len(kept(leased)) == 1


def test_a_forked_child_has_no_leased_key(leased: ServiceHandle) -> None:
    blob = leased.encrypt(b"x")
    leased.decrypt(blob)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            assert kept(leased) == []
            assert leased.decrypt(blob) == b"x"
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert len(kept(leased)) == 1


def test_leases_do_not_outlive_their_gateway(core: openkcm.Core, leased: ServiceHandle) -> None:
    leased.decrypt(leased.encrypt(b"x"))
    (keys,) = kept(leased)
    leased._owner.close()  # type: ignore[attr-defined]
    assert keys.wiped
    assert isinstance(leased._leases, Leases)


def test_a_lease_is_shown_recorded_and_durable(
    tmp_path: Path, core: openkcm.Core, leased: ServiceHandle
) -> None:
    with openkcm.Core.open(url(tmp_path)) as other:
        assert other.status("acme")[0].services[0].lease == LEASE
    assert [(each.act, each.detail) for each in core.audit_records()][-1] == ("lease", "30 seconds")
    core.rotate_service("acme", "records")
    blob = leased.encrypt(b"x")
    leased.decrypt(blob)
    assert len(kept(leased)) == 1


@pytest.mark.parametrize("seconds", [-1, 3601, float("nan"), float("inf")])
def test_a_lease_is_bounded(core: openkcm.Core, seconds: float) -> None:
    refused(lambda: core.set_lease("acme", "records", seconds), InvalidInput)
    refused(lambda: core.set_lease("acme", "nothing", 5), ServiceNotFound)


def test_the_core_is_asked_again_after_a_hundredth_of_a_second(
    core: openkcm.Core, leased: ServiceHandle, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    lease = core.lease
    monkeypatch.setattr(core, "lease", lambda service: (asked.append(clock()), lease(service))[1])
    blob = leased.encrypt(b"x")
    for seconds in (0.0, 0.0, 0.005, 0.006, 0.001):
        clock.now += seconds
        assert leased.decrypt(blob) == b"x"
    assert len(asked) == 2  # the first use opened it; the second asked, and so did the one after 11 ms


def test_a_key_that_is_wiped_while_it_is_used_is_opened_anew(
    core: openkcm.Core, leased: ServiceHandle, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = leased.encrypt(b"x")
    assert leased.decrypt(blob) == b"x"
    (keys,) = kept(leased)
    keys.wipe()
    monkeypatch.setattr(leased._leases, "find", lambda place: keys)
    assert leased.decrypt(blob) == b"x"
    assert calls == [1, 1]


def test_an_altered_record_is_refused_under_a_kept_key_too(leased: ServiceHandle) -> None:
    blob = leased.encrypt(b"x", context=b"c")
    assert leased.decrypt(blob, context=b"c") == b"x"
    bad = blob[:-1] + bytes([blob[-1] ^ 1])
    assert refused(lambda: leased.decrypt(bad, context=b"c"), DecryptError).index is None
    refused(lambda: leased.decrypt(blob, context=b"d"), DecryptError)
