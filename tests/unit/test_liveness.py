# SPDX-License-Identifier: Apache-2.0
"""Live, grace, dark: what a root's answers do to its tenant, on a clock that moves when it is told to."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

import openkcm
from openkcm import crypto
from openkcm.clock import awake_clock
from openkcm.core import patience
from openkcm.core.liveness import REFUSAL_SECONDS, SLACK_SECONDS
from openkcm.core.prober import Lane, Turns
from openkcm.errors import (
    DecryptError,
    InvalidInput,
    OpenKCMError,
    RootDenied,
    RootDestroyed,
    RootDisabled,
    RootMisconfigured,
    RootThrottled,
    RootUnavailable,
    StoreUnavailable,
    TenantDark,
)
from openkcm.keys import Change, Event, Kind, Service, TenantState, WrappedKeys
from support import Clock, refused, url, without_threads

INTERVAL, GRACE = 10.0, 300.0
NO = [RootDisabled, RootDenied, RootDestroyed, RootMisconfigured, DecryptError, ZeroDivisionError]
SILENCE = [RootUnavailable, RootThrottled]


class ScriptedRoot:
    """A root that answers what the test says."""

    development = False

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.answer: BaseException | None = None
        self.lies = False
        self.asked = 0
        self.before: Callable[[], object] = lambda: None

    def wrap(self, sealed: bytes, context: Mapping[str, str]) -> bytes:
        return bytes(byte ^ 0x55 for byte in sealed)

    def unwrap(self, wrapped: bytes, context: Mapping[str, str]) -> bytes:
        self.asked += 1
        self.before()
        if self.answer is not None:
            raise self.answer
        return bytes(byte ^ (0x54 if self.lies else 0x55) for byte in wrapped)

    def warnings(self) -> list[str]:
        return []

    def close(self) -> None:
        """Nothing is open."""


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask a root that does not answer again at once."""
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.0)


@pytest.fixture
def core(tmp_path: Path, clock: Clock) -> Iterator[openkcm.Core]:
    with openkcm.Core.open(url(tmp_path), probe_interval=INTERVAL, grace=GRACE, clock=clock) as core:
        yield without_threads(core)


@pytest.fixture
def root(core: openkcm.Core) -> ScriptedRoot:
    return add_tenant(core, "acme")


@pytest.fixture
def service(core: openkcm.Core, root: ScriptedRoot) -> Service:
    return core.find_service("acme", "records")


@pytest.fixture
def keys(core: openkcm.Core, service: Service) -> WrappedKeys:
    return core.wrap_keys(service, crypto.generate_keys(2), Kind.INLINE)


def add_tenant(core: openkcm.Core, tenant: str, uri: str | None = None) -> ScriptedRoot:
    """Link a tenant with one service to a scripted root."""
    root = ScriptedRoot(uri or f"scripted:{tenant}")
    root = core._vault._roots.setdefault(root.uri, root)  # type: ignore[assignment]
    core.link_tenant(tenant, root=root.uri)
    core.create_service(tenant, "records")
    return root


def probe(core: openkcm.Core) -> None:
    """What the prober's thread does, in this one."""
    core._vault.liveness.run_due(run=lambda call: call())


def tick(core: openkcm.Core, clock: Clock, seconds: float, step: float = 0.5) -> None:
    """Let time pass with the prober at work."""
    end = clock.now + seconds
    while clock.now < end:
        clock.now = min(end, clock.now + step)
        probe(core)


def use(core: openkcm.Core, keys: WrappedKeys) -> bool:
    """Whether the tenant's keys open."""
    try:
        return not core.unwrap_keys(core.find_service("acme", "records"), keys)[1]
    except TenantDark:
        return False


def acts(core: openkcm.Core) -> Counter[str]:
    """The audit record's acts of root changes, counted."""
    return Counter(record.act for record in core.audit_records() if record.act.startswith("root-"))


def state(core: openkcm.Core, tenant: str = "acme") -> TenantState:
    return core.status(tenant)[0].state


# ---- live ----------------------------------------------------------------------------------------------


def test_a_live_tenant_is_probed_once_an_interval(
    core: openkcm.Core, clock: Clock, root: ScriptedRoot, keys: WrappedKeys
) -> None:
    before = root.asked
    for _ in range(1000):
        tick(core, clock, 0.1)
        assert use(core, keys)
    # Each comes up to a tenth early: 10 to 11.1 in 100 seconds, and one for where in its interval it began.
    assert 9 <= root.asked - before <= 12
    assert acts(core) == {}
    assert core.liveness()["live"] == 0


def test_use_asks_by_itself_when_no_probe_comes(
    core: openkcm.Core, clock: Clock, root: ScriptedRoot, keys: WrappedKeys
) -> None:
    """With the prober starved, and the keys in use at every moment."""
    root.answer = RootDisabled("off")
    before, started = root.asked, clock.now
    while use(core, keys):
        clock.now += 0.01
    assert root.asked == before + 1
    assert clock.now - started <= INTERVAL + SLACK_SECONDS + 0.02
    assert not core._vault.ring.is_open("acme")


def test_using_a_key_never_extends_its_life(
    core: openkcm.Core, clock: Clock, root: ScriptedRoot, keys: WrappedKeys
) -> None:
    until = core._vault.liveness._watched["acme"].until
    for _ in range(100):
        clock.now += INTERVAL / 101
        assert use(core, keys)
        assert core._vault.liveness._watched["acme"].until == until


def test_an_answer_counts_from_when_it_was_asked_for(
    core: openkcm.Core, clock: Clock, root: ScriptedRoot, keys: WrappedKeys
) -> None:
    asked = clock.now

    def slow() -> None:
        clock.now += 4.0

    root.before = slow
    core.probe("acme")
    assert core._vault.liveness._watched["acme"].until == asked + INTERVAL + SLACK_SECONDS


# ---- no ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NO)
def test_a_no_is_dark_at_the_next_probe_and_told_once(
    core: openkcm.Core,
    clock: Clock,
    root: ScriptedRoot,
    keys: WrappedKeys,
    kind: type[Exception],
    caplog: pytest.LogCaptureFixture,
) -> None:
    events: list[Event] = []
    core.watch(events.append)
    caplog.set_level(logging.INFO, "openkcm")
    root.answer = kind("because")
    tick(core, clock, INTERVAL + 0.5)
    assert not core._vault.ring.is_open("acme")
    assert not use(core, keys)
    tick(core, clock, 5 * INTERVAL)
    assert next(event for event in events if event.change is Change.DARK) == Event(Change.DARK, "acme")
    assert acts(core) == {"root-dark": 1}
    assert core.liveness()["dark"] == 1
    assert len([record for record in caplog.records if "acme: dark" in record.getMessage()]) == 1
    (status,) = core.status("acme")
    assert status.state is TenantState.DARK
    assert status.reason


def test_keys_are_zeroed_before_anybody_is_told(
    core: openkcm.Core, clock: Clock, root: ScriptedRoot, keys: WrappedKeys, service: Service
) -> None:
    held = core._vault.active_key(service)
    seen: list[tuple[bool, int]] = []
    core.watch(lambda event: seen.append((held.key.wiped, acts(core).total())))
    root.answer = RootDisabled("off")
    core.probe("acme")
    assert seen == [(True, 0)]
    assert acts(core) == {"root-dark": 1}


def test_another_plaintext_is_a_no(
    core: openkcm.Core, clock: Clock, root: ScriptedRoot, keys: WrappedKeys
) -> None:
    root.lies = True
    found = core.probe("acme")
    assert found.state is TenantState.DARK
    assert "another plaintext" in found.reason
    assert not use(core, keys)


def test_another_plaintext_is_noticed_by_who_never_opened_the_key(
    tmp_path: Path, core: openkcm.Core, root: ScriptedRoot, keys: WrappedKeys
) -> None:
    with openkcm.Core.open(url(tmp_path)) as fresh:
        without_threads(fresh)._vault._roots[root.uri] = root
        assert fresh.probe("acme").state is TenantState.LIVE
        root.lies = True
        assert fresh.probe("acme").state is TenantState.DARK
        assert fresh._vault.liveness.tally() == {}


def test_it_comes_back_by_itself_with_the_first_yes(
    core: openkcm.Core, clock: Clock, root: ScriptedRoot, keys: WrappedKeys
) -> None:
    events: list[Event] = []
    core.watch(events.append)
    root.answer = RootDisabled("off")
    tick(core, clock, INTERVAL + 0.5)
    root.answer = None
    back = clock.now
    while not use(core, keys):
        tick(core, clock, 0.5)
    assert clock.now - back <= INTERVAL + 0.5
    assert [event.change for event in events] == [Change.DARK, Change.LIVE]
    assert acts(core) == {"root-dark": 1, "root-live": 1}
    assert state(core) is TenantState.LIVE


def test_a_dark_tenants_users_do_not_flood_its_root(
    core: openkcm.Core, clock: Clock, root: ScriptedRoot, keys: WrappedKeys
) -> None:
    root.answer = RootDenied("no")
    tick(core, clock, INTERVAL + 0.5)
    core.probe("acme")
    before = root.asked
    for _ in range(500):
        assert not use(core, keys)
        refused(lambda: core.create_service("acme", "more"), TenantDark)
    assert root.asked == before
    clock.now += REFUSAL_SECONDS
    refused(lambda: core.create_service("acme", "more"), TenantDark)
    refused(lambda: core.create_service("acme", "more"), TenantDark)
    assert root.asked == before + 1


def test_a_yes_that_a_refusal_overtook_does_not_count(
    core: openkcm.Core, clock: Clock, root: ScriptedRoot, keys: WrappedKeys
) -> None:
    """A slow yes arrives after a newer no."""
    liveness = core._vault.liveness
    watched = liveness._watched["acme"]

    def overtake() -> None:
        root.before = lambda: None
        clock.now += 1
        with watched.lock:
            liveness._no(watched, RootDisabled("off"))

    root.before = overtake
    liveness.probe(watched)
    assert watched.state is TenantState.DARK
    assert not use(core, keys)


# ---- grace ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SILENCE)
def test_silence_is_served_to_the_end_of_grace_and_not_longer(
    core: openkcm.Core, clock: Clock, root: ScriptedRoot, keys: WrappedKeys, kind: type[OpenKCMError]
) -> None:
    root.answer = kind("hm")
    last_yes = clock.now
    while state(core) is TenantState.LIVE:
        tick(core, clock, 0.5)
    began = clock.now
    assert began - last_yes <= INTERVAL + SLACK_SECONDS + 0.5
    while use(core, keys):
        tick(core, clock, 0.5)
    # Neither use nor one silent probe after the other moved the end.
    assert GRACE - 1 <= clock.now - began <= GRACE
    assert state(core) is TenantState.DARK
    assert not core._vault.ring.is_open("acme")
    assert acts(core) == {"root-grace": 1, "root-dark": 1}


def test_the_end_of_grace_is_kept_to_without_any_probe(
    core: openkcm.Core, clock: Clock, root: ScriptedRoot, keys: WrappedKeys
) -> None:
    root.answer = RootUnavailable("hm")
    tick(core, clock, INTERVAL + 0.5)
    clock.now += GRACE
    assert not use(core, keys)
    assert not core._vault.ring.is_open("acme")


@pytest.mark.parametrize("kind", NO)
def test_a_no_ends_grace_at_once(
    core: openkcm.Core, clock: Clock, root: ScriptedRoot, keys: WrappedKeys, kind: type[Exception]
) -> None:
    root.answer = RootUnavailable("hm")
    tick(core, clock, 3 * INTERVAL)
    assert use(core, keys)
    root.answer = kind("no")
    tick(core, clock, INTERVAL + 0.5)
    assert not use(core, keys)
    assert acts(core) == {"root-grace": 1, "root-dark": 1}


def test_a_yes_ends_grace_and_shortens_the_life_again(
    core: openkcm.Core, clock: Clock, root: ScriptedRoot, keys: WrappedKeys
) -> None:
    root.answer = RootUnavailable("hm")
    tick(core, clock, 3 * INTERVAL)
    assert state(core) is TenantState.GRACE
    root.answer = None
    tick(core, clock, INTERVAL + 0.5)
    assert state(core) is TenantState.LIVE
    assert core._vault.liveness._watched["acme"].until <= clock.now + INTERVAL + SLACK_SECONDS
    root.answer = RootDisabled("off")
    tick(core, clock, INTERVAL + 0.5)
    assert not use(core, keys)
    assert acts(core) == {"root-grace": 1, "root-live": 1, "root-dark": 1}


def test_without_grace_silence_is_dark(tmp_path: Path, clock: Clock) -> None:
    with openkcm.Core.open(url(tmp_path), grace=0, clock=clock) as core:
        root = add_tenant(without_threads(core), "acme")
        keys = core.wrap_keys(core.find_service("acme", "records"), crypto.generate_keys(1), Kind.INLINE)
        root.answer = RootUnavailable("hm")
        tick(core, clock, INTERVAL + 0.5)
        assert not use(core, keys)
        assert acts(core) == {"root-dark": 1}


def test_a_cold_tenant_gets_no_grace_and_no_denial(
    tmp_path: Path, core: openkcm.Core, root: ScriptedRoot, keys: WrappedKeys
) -> None:
    """Nothing is open, so nothing can be served; but silence is not called a no either."""
    with openkcm.Core.open(url(tmp_path)) as fresh:
        without_threads(fresh)._vault._roots[root.uri] = root
        root.answer = RootUnavailable("hm")
        service = fresh.find_service("acme", "records")
        before = root.asked
        for _ in range(5):
            refused(lambda: fresh.unwrap_keys(service, keys), RootUnavailable)
        assert root.asked == before + patience.ATTEMPTS  # once for all five: it is remembered for a moment
    assert acts(core) == {}


# ---- operators, other processes, the store ---------------------------------------------------------------


def test_a_killed_tenant_is_not_probed_and_needs_its_operator(
    core: openkcm.Core, clock: Clock, root: ScriptedRoot, keys: WrappedKeys
) -> None:
    core.kill("acme", reason="audit")
    before = root.asked
    tick(core, clock, 5 * INTERVAL)
    assert root.asked == before
    assert not use(core, keys)
    refused(lambda: core.probe("acme"), TenantDark)
    assert core.root_changed(root.uri) == {}
    root.answer = RootDisabled("off")
    refused(lambda: core.restore("acme"), TenantDark)
    root.answer = None
    core.restore("acme")
    assert use(core, keys)


def test_a_no_in_one_process_is_dark_in_the_others_and_recorded_once(
    tmp_path: Path, core: openkcm.Core, clock: Clock, root: ScriptedRoot, keys: WrappedKeys
) -> None:
    with openkcm.Core.open(url(tmp_path), clock=clock) as other:
        without_threads(other)._vault._roots[root.uri] = root
        assert use(other, keys)
        root.answer = RootDisabled("off")
        core.probe("acme")
        other.poll()
        assert not other._vault.ring.is_open("acme")
        assert not use(other, keys)
        tick(other, clock, 2 * INTERVAL)
        tick(core, clock, 2 * INTERVAL)
        assert acts(core) == {"root-dark": 1}
        root.answer = None
        other.probe("acme")
        core.poll()
        probe(core)  # at once, and not only at its next turn
        assert use(core, keys)
        assert use(other, keys)
        tick(core, clock, INTERVAL)
        assert acts(core) == {"root-dark": 1, "root-live": 1}


def test_a_full_store_does_not_keep_a_tenant_lit(
    core: openkcm.Core,
    clock: Clock,
    root: ScriptedRoot,
    keys: WrappedKeys,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: object) -> None:
        raise StoreUnavailable("full")

    with monkeypatch.context() as patched:
        patched.setattr(core._vault, "record_liveness", full)
        root.answer = RootDisabled("off")
        tick(core, clock, INTERVAL + 0.5)
        assert not core._vault.ring.is_open("acme")
        assert not use(core, keys)
    assert acts(core) == {}
    tick(core, clock, INTERVAL + 0.5)
    assert acts(core) == {"root-dark": 1}


def test_whoever_asks_does_not_wait_for_the_record(
    core: openkcm.Core,
    clock: Clock,
    root: ScriptedRoot,
    keys: WrappedKeys,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    writing, written = threading.Event(), threading.Event()

    def slow(*_: object) -> None:
        writing.set()
        assert written.wait(30)

    monkeypatch.setattr(core._vault, "record_liveness", slow)
    root.answer = RootDisabled("off")
    prober = threading.Thread(target=core.probe, args=("acme",))
    prober.start()
    try:
        assert writing.wait(30)
        assert not use(core, keys)  # answered, while the other thread still writes
    finally:
        written.set()
        prober.join()


def test_status_shows_grace_and_why(
    tmp_path: Path, core: openkcm.Core, clock: Clock, root: ScriptedRoot, keys: WrappedKeys
) -> None:
    root.answer = RootThrottled("slow down")
    tick(core, clock, INTERVAL + 0.5)
    with openkcm.Core.open(url(tmp_path)) as another:
        for one in (core, another):
            (status,) = one.status("acme")
            assert (status.state, status.reason) == (TenantState.GRACE, "slow down")


# ---- probing on demand, the push door ----------------------------------------------------------------------


def test_a_probe_tells_what_was_found(core: openkcm.Core, clock: Clock, root: ScriptedRoot) -> None:
    def slow() -> None:
        clock.now += 0.25

    root.before = slow
    found = core.probe("acme")
    assert (found.state, found.reason, found.seconds) == (TenantState.LIVE, "", 0.25)
    root.answer = RootDenied("not allowed")
    found = core.probe("acme")
    assert (found.state, found.reason) == (TenantState.DARK, "not allowed")
    assert found.asked_at < found.refused_at <= found.zeroed_at
    refused(lambda: core.probe("nobody"), openkcm.TenantNotFound)


def test_a_push_reaches_every_tenant_of_the_root_and_no_other(core: openkcm.Core, clock: Clock) -> None:
    shared, *_ = (add_tenant(core, f"shared-{number}", "scripted:shared") for number in range(20))
    lone = add_tenant(core, "lone")
    shared.answer = RootDisabled("off")
    lone.answer = RootDisabled("off")
    found = core.root_changed("scripted:shared")
    assert sorted(found) == sorted(f"shared-{number}" for number in range(20))
    assert {probe.state for probe in found.values()} == {TenantState.DARK}
    assert state(core, "lone") is TenantState.LIVE
    assert core.root_changed("scripted:lone")["lone"].state is TenantState.DARK
    assert acts(core) == {"root-dark": 21}


def test_a_push_asks_side_by_side(core: openkcm.Core) -> None:
    root, *_ = (add_tenant(core, f"t{number}", "scripted:shared") for number in range(8))
    together = threading.Barrier(8)
    root.before = lambda: together.wait(30)
    assert len(core.root_changed("scripted:shared")) == 8


# ---- settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"probe_interval": 0.09},
        {"probe_interval": 3601},
        {"grace": -1},
        {"grace": 3601},
        {"grace": float("nan")},
    ],
)
def test_settings_out_of_range_are_refused(tmp_path: Path, wrong: dict[str, float]) -> None:
    refused(lambda: openkcm.Core.open(url(tmp_path), **wrong), InvalidInput)  # type: ignore[arg-type]
    assert not (tmp_path / "vault.db").exists()


def test_the_clock_runs_while_the_machine_sleeps() -> None:
    assert abs(awake_clock() - time.clock_gettime(time.CLOCK_BOOTTIME)) < 1
    assert openkcm.Core.open.__func__.__kwdefaults__["clock"] is awake_clock  # type: ignore[attr-defined]


# ---- asking again ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (RootUnavailable("hm"), 3),
        (RootThrottled("hm"), 3),
        (RootUnavailable("hm", retryable=False), 1),
        (RootDisabled("off"), 1),
        (RootDenied("no"), 1),
        (RootDestroyed("gone"), 1),
        (RootMisconfigured("wrong"), 1),
        (DecryptError(), 1),
    ],
)
def test_only_what_may_pass_is_asked_again(error: OpenKCMError, attempts: int) -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        raise error

    refused(lambda: patience.patiently(fail), type(error))
    assert len(calls) == attempts


def test_an_outage_that_turns_into_a_no_is_a_no() -> None:
    answers: list[OpenKCMError] = [RootUnavailable("hm"), RootDisabled("off")]

    def fail() -> None:
        raise answers.pop(0)

    refused(lambda: patience.patiently(fail), RootDisabled)


def test_no_attempt_begins_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "DEADLINE_SECONDS", 0.05)
    calls = []

    def hang() -> None:
        calls.append(1)
        time.sleep(0.1)
        raise RootUnavailable("hm")

    refused(lambda: patience.patiently(hang), RootUnavailable)
    assert len(calls) == 1


# ---- many tenants ------------------------------------------------------------------------------------------


def test_turns_are_spread_evenly() -> None:
    clock = Clock()
    turns: Turns[int] = Turns(clock, 10.0, 0.1)
    members = 10_000
    for member in range(members):
        turns.join(member)
    buckets: list[int] = []
    seen: Counter[int] = Counter()
    for _ in range(200):
        clock.now += 0.1
        due = turns.take(lambda member: True)
        buckets.append(len(due))
        seen.update(due)
    assert set(seen) == set(range(members))
    assert 1 <= min(seen.values()) <= max(seen.values()) <= 3
    # 1,053 a second, in every tenth of a second from the first on: half of that nowhere, nor half as much again.
    assert all(52 <= count <= 158 for count in buckets), buckets


def test_who_left_gets_no_turn() -> None:
    clock = Clock()
    turns: Turns[str] = Turns(clock, 10.0, 0.1)
    turns.join("stays")
    turns.join("leaves")
    clock.now += 10
    assert turns.take(lambda member: member == "stays") == ["stays"]
    clock.now += 10
    assert turns.take(lambda member: True) == ["stays"]


def test_slow_calls_do_not_hold_up_quick_ones() -> None:
    """A region goes silent: a hundred calls hang on a lane of four, and what comes after is made all the same."""
    lane = Lane("test", 4, 128)
    healed, done = threading.Event(), threading.Event()
    for _ in range(100):
        lane.submit(lambda: healed.wait(30) and None)
    lane.submit(done.set)
    try:
        end = time.monotonic() + 30
        while not done.is_set() and time.monotonic() < end:
            lane.relieve()
            time.sleep(0.01)
        assert done.is_set()
        assert not healed.is_set()
    finally:
        healed.set()
        lane.close()


def test_a_lane_has_no_more_threads_than_it_may() -> None:
    lane = Lane("test", 4, 8)
    healed = threading.Event()
    at_work = []
    for _ in range(50):
        lane.submit(lambda: at_work.append(1) or (healed.wait(30) and None))
    for _ in range(40):
        lane.relieve()
        time.sleep(0.01)
    assert len(at_work) <= 8
    healed.set()
    end = time.monotonic() + 30
    while len(at_work) < 50 and time.monotonic() < end:
        time.sleep(0.01)
    assert len(at_work) == 50
    lane.close()


def test_a_call_that_fails_does_not_end_its_lane(caplog: pytest.LogCaptureFixture) -> None:
    lane = Lane("test", 1, 1)
    done = threading.Event()

    def fail() -> None:
        raise ZeroDivisionError

    lane.submit(fail)
    lane.submit(done.set)
    assert done.wait(30)
    lane.close()


def test_silent_roots_do_not_delay_the_probes_of_others(tmp_path: Path) -> None:
    """With threads and a real clock: 80 tenants hang, one is disabled, and it is dark in its time."""
    with openkcm.Core.open(url(tmp_path), probe_interval=0.5) as core:
        healed = threading.Event()
        hanging = [add_tenant(core, f"t{number}") for number in range(80)]
        lone = add_tenant(core, "lone")
        for root in hanging:
            root.before = lambda: healed.wait(60)
        time.sleep(1.0)
        lone.answer = RootDisabled("off")
        started = time.monotonic()
        try:
            while core._vault.ring.is_open("lone") and time.monotonic() - started < 30:
                time.sleep(0.005)
            assert time.monotonic() - started < 5  # 0.5 on a quiet machine
        finally:
            healed.set()
