# SPDX-License-Identifier: Apache-2.0
"""Single keys that many threads want at once: how many calls they make, and that each gets its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from openkcm.crypto import SecretKeys, generate_keys, random_bytes
from openkcm.errors import CoreUnavailable, DecryptError, InternalError, KeyDestroyed, TenantDark
from openkcm.keys import Kind, OpenedKeys, Service, WrappedKeys
from openkcm.limits import KEY_ID_BYTES, WRAPPED_KEY_BYTES
from openkcm.rpc.client.joining import MOST_LANES, Joined, _Lane
from remote_support import SECONDS, until
from support import refused

SERVICE = Service("acme", "local", "records", b"service-id-1")


class FakeCore:
    """Opens keys when it is told to, and notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[WrappedKeys] = []
        self.given: list[SecretKeys] = []
        self.held = threading.Event()
        self.held.set()
        self.answer: Callable[[WrappedKeys], dict[int, Exception]] = lambda wrapped: {}

    def ask(self, service: Service, wrapped: WrappedKeys, end: float) -> OpenedKeys:
        self.asked.append(wrapped)
        assert self.held.wait(SECONDS)
        failures = self.answer(wrapped)
        keys = generate_keys(len(wrapped))
        self.given.append(keys)
        return keys, failures, 1.5  # type: ignore[return-value]


class Caller(threading.Thread):
    """A thread that wants one key."""

    def __init__(self, joined: Joined, wrapped: WrappedKeys, seconds: float = SECONDS) -> None:
        super().__init__(daemon=True)
        self.outcome: OpenedKeys | BaseException | None = None
        self._joined = joined
        self._wrapped = wrapped
        self._seconds = seconds
        self.start()

    def run(self) -> None:
        try:
            self.outcome = self._joined.unwrap(SERVICE, self._wrapped, time.monotonic() + self._seconds)
        except BaseException as error:
            self.outcome = error

    def result(self) -> OpenedKeys:
        self.join(SECONDS)
        assert isinstance(self.outcome, tuple), self.outcome
        return self.outcome

    def error(self) -> BaseException:
        self.join(SECONDS)
        assert isinstance(self.outcome, BaseException), self.outcome
        return self.outcome


def a_key(kind: Kind = Kind.INLINE, version: int = 1) -> WrappedKeys:
    ids = random_bytes(KEY_ID_BYTES) if kind.stored else b""
    return WrappedKeys(kind, version, random_bytes(WRAPPED_KEY_BYTES), ids)


def waiting(joined: Joined) -> int:
    """How many callers wait for the next call."""
    return sum(lane._waiting.takers for lane in joined._lanes.values() if lane._waiting is not None)


def sharing(joined: Joined) -> int:
    """How many callers have a part in calls under way."""
    flying = {batch for lane in joined._lanes.values() for batch in lane._flying.values()}
    return sum(batch.takers for batch in flying)


def occupied(core: FakeCore, joined: Joined, calls: int, kind: Kind = Kind.INLINE) -> list[Caller]:
    """Callers whose calls are under way until ``core.held`` is set."""
    core.held.clear()
    callers = [Caller(joined, a_key(kind)) for _ in range(calls)]
    until(lambda: len(core.asked) == calls)
    return callers


def test_who_is_alone_makes_a_call_and_gets_its_answer() -> None:
    core = FakeCore()
    joined = Joined(core.ask)
    wrapped = a_key()
    keys, failures, lease = joined.unwrap(SERVICE, wrapped, time.monotonic() + SECONDS)
    assert core.asked == [wrapped]
    assert keys is core.given[0]
    assert not keys.wiped
    assert (dict(failures), lease) == ({}, 1.5)


def test_so_many_calls_are_made_side_by_side() -> None:
    core = FakeCore()
    joined = Joined(core.ask, 3)
    callers = occupied(core, joined, 3)
    assert waiting(joined) == 0
    core.held.set()
    assert all(len(caller.result()[0]) == 1 for caller in callers)


def test_a_thousand_threads_that_want_one_key_make_one_call() -> None:
    core = FakeCore()
    joined = Joined(core.ask, 1)
    core.held.clear()
    wrapped = a_key()
    callers = [Caller(joined, wrapped) for _ in range(1000)]
    until(lambda: sharing(joined) == 1000)
    core.held.set()
    results = [caller.result()[0] for caller in callers]
    assert len(core.asked) == 1
    assert len({id(keys) for keys in results}) == 1000
    assert not any(keys.wiped for keys in results)
    results[0].wipe()
    assert not any(keys.wiped for keys in results[1:]), "each has a handle of its own"


def test_a_stored_key_is_not_shared_with_a_call_that_is_under_way() -> None:
    core = FakeCore()
    joined = Joined(core.ask, 1)
    core.held.clear()
    wrapped = a_key(Kind.STORED)
    callers = [Caller(joined, wrapped)]
    until(lambda: len(core.asked) == 1)
    callers += [Caller(joined, wrapped) for _ in range(5)]
    until(lambda: waiting(joined) == 5)
    core.held.set()
    assert all(len(caller.result()[0]) == 1 for caller in callers)
    assert core.asked == [wrapped, wrapped]


@pytest.mark.parametrize("kind", [Kind.INLINE, Kind.STORED, Kind.INLINE_STREAM])
def test_what_comes_meanwhile_goes_together_and_comes_back_apart(kind: Kind) -> None:
    core = FakeCore()
    joined = Joined(core.ask, 2)
    first = occupied(core, joined, 2, kind)
    wanted = [a_key(kind) for _ in range(20)]
    gone = wanted[7]

    def answer(wrapped: WrappedKeys) -> dict[int, Exception]:
        at = wrapped.wrapped.find(gone.wrapped)
        return {} if at < 0 else {at // WRAPPED_KEY_BYTES: KeyDestroyed("it is gone", retryable=False)}

    core.answer = answer
    callers = [Caller(joined, wrapped) for wrapped in [*wanted, gone]]
    until(lambda: waiting(joined) == 21)
    core.held.set()
    results = [caller.result() for caller in callers]
    assert len(core.asked) == 3
    together = core.asked[2]
    assert len(together) == 20
    assert {together.wrapped[at * 72 : at * 72 + 72] for at in range(20)} == {each.wrapped for each in wanted}
    assert sorted(each.ids for each in wanted) == sorted(
        together.ids[at * 16 : at * 16 + 16] for at in range(20)
    )
    for at, (keys, failures, _) in enumerate(results):
        assert len(keys) == 1
        assert not keys.wiped
        assert list(failures) == ([0] if at in (7, 20) else [])
    mine, other = results[7][1][0], results[20][1][0]
    assert type(mine) is KeyDestroyed
    assert str(mine) == "it is gone"
    assert mine is not other
    assert [keys.wiped for keys in core.given if len(keys) == 20] == [True], "nobody holds the whole of it"
    assert all(caller.result()[0] is not None for caller in first)
    assert joined._lanes[next(iter(joined._lanes))]._underway == 0


def test_versions_and_kinds_are_not_mixed() -> None:
    core = FakeCore()
    joined = Joined(core.ask, 1)
    core.held.clear()
    callers = [
        Caller(joined, a_key(kind, version)) for kind in (Kind.INLINE, Kind.STORED) for version in (1, 2)
    ]
    until(lambda: len(core.asked) == 4)
    core.held.set()
    assert all(caller.result() for caller in callers)


def test_what_versions_are_made_up_does_not_stay() -> None:
    core = FakeCore()
    joined = Joined(core.ask)
    for version in range(1, 20 * MOST_LANES):
        joined.unwrap(SERVICE, a_key(version=version), time.monotonic() + SECONDS)
        assert len(joined._lanes) <= MOST_LANES


def test_a_lane_with_somebody_in_it_is_not_let_go() -> None:
    core = FakeCore()
    joined = Joined(core.ask, 1)
    busy = occupied(core, joined, 1)
    (lane,) = joined._lanes.values()
    others = [Caller(joined, a_key(version=version)) for version in range(2, MOST_LANES + 2)]
    until(lambda: len(core.asked) == len(others) + 1)
    assert lane in joined._lanes.values()
    assert len(joined._lanes) == len(others) + 1, "all are in use"
    queued = Caller(joined, a_key())
    until(lambda: waiting(joined) == 1)
    core.held.set()
    for caller in (*busy, *others, queued):
        assert len(caller.result()[0]) == 1
    joined.unwrap(SERVICE, a_key(version=9999), time.monotonic() + SECONDS)
    assert len(joined._lanes) == 1


def test_who_finds_a_lane_that_is_closed_looks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    core = FakeCore()
    joined = Joined(core.ask)
    joined.unwrap(SERVICE, a_key(), time.monotonic() + SECONDS)
    (lane,) = joined._lanes.values()
    board = _Lane.board

    def overtaken(self: _Lane, key: bytes) -> object:
        if self is lane:
            # By so many others, between look and use, that it is let go.
            for version in range(2, MOST_LANES + 2):
                joined._make(lane.place._replace(version=version))
        return board(self, key)

    monkeypatch.setattr(_Lane, "board", overtaken)
    keys, _, _ = joined.unwrap(SERVICE, a_key(), time.monotonic() + SECONDS)
    assert keys is core.given[1]
    assert lane not in joined._lanes.values()


def test_threads_with_versions_of_their_own_get_their_keys() -> None:
    core = FakeCore()
    joined = Joined(core.ask)
    errors: list[BaseException] = []

    def use(number: int) -> None:
        try:
            for at in range(300):
                wrapped = a_key(version=1 + (number + at * 7) % (2 * MOST_LANES))
                keys, failures, _ = joined.unwrap(SERVICE, wrapped, time.monotonic() + SECONDS)
                assert len(keys) == 1 and not failures
                keys.wipe()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(SECONDS)
    assert errors == []
    assert all(not lane._underway and lane._waiting is None for lane in joined._lanes.values())
    assert len(joined._lanes) <= MOST_LANES + len(threads)


def test_an_error_of_the_call_is_each_callers_own() -> None:
    core = FakeCore()
    joined = Joined(core.ask, 1)

    def dark(wrapped: WrappedKeys) -> dict[int, Exception]:
        raise TenantDark("it is dark")

    occupied(core, joined, 1)
    core.answer = dark
    callers = [Caller(joined, a_key()) for _ in range(5)]
    until(lambda: waiting(joined) == 5)
    core.held.set()
    errors = [caller.error() for caller in callers]
    assert {type(each) for each in errors} == {TenantDark}
    assert len({id(each) for each in errors}) == 5
    core.answer = lambda wrapped: {}
    assert joined.unwrap(SERVICE, a_key(), time.monotonic() + SECONDS)[2] == 1.5


@pytest.mark.parametrize("raised", [KeyboardInterrupt, ValueError])
def test_what_ends_the_caller_does_not_end_those_that_joined(raised: type[BaseException]) -> None:
    """One of them makes an interrupted call again; what would fail again is told."""
    core = FakeCore()
    joined = Joined(core.ask, 1)

    def fail_once(wrapped: WrappedKeys) -> dict[int, Exception]:
        core.answer = lambda wrapped: {}
        raise raised

    core.held.clear()
    core.answer = fail_once
    wrapped = a_key()
    leader = Caller(joined, wrapped)
    until(lambda: len(core.asked) == 1)
    followers = [Caller(joined, wrapped) for _ in range(3)]
    until(lambda: sharing(joined) == 4)
    core.held.set()
    assert type(leader.error()) is raised
    if raised is ValueError:
        assert {type(each.error()) for each in followers} == {InternalError}
    else:
        assert all(not each.result()[1] for each in followers)
    assert all(lane._underway == 0 and not lane._flying for lane in joined._lanes.values())


def test_nobody_waits_longer_than_they_said() -> None:
    core = FakeCore()
    joined = Joined(core.ask, 1)
    occupied(core, joined, 1)
    begun = time.monotonic()
    leader = Caller(joined, a_key(), 0.2)
    until(lambda: waiting(joined) == 1)
    follower = Caller(joined, a_key(), 0.2)
    assert {type(each.error()) for each in (leader, follower)} == {CoreUnavailable}
    assert time.monotonic() - begun < SECONDS / 2
    core.held.set()
    until(lambda: joined._lanes[next(iter(joined._lanes))]._underway == 0)
    assert refused_or_not(joined)


def refused_or_not(joined: Joined) -> bool:
    """The lane still works."""
    return len(joined.unwrap(SERVICE, a_key(), time.monotonic() + SECONDS)[0]) == 1


def test_a_failure_of_one_key_alone_is_as_the_core_said_it() -> None:
    core = FakeCore()
    core.answer = lambda wrapped: {0: DecryptError()}
    joined = Joined(core.ask)
    _, failures, _ = joined.unwrap(SERVICE, a_key(), time.monotonic() + SECONDS)
    assert type(failures[0]) is DecryptError


def test_a_call_without_time_is_not_made_by_who_waits() -> None:
    core = FakeCore()
    joined = Joined(core.ask, 1)
    occupied(core, joined, 1)
    refused(lambda: joined.unwrap(SERVICE, a_key(), time.monotonic() - 1), CoreUnavailable)
    assert len(core.asked) == 1
    assert waiting(joined) == 0
    core.held.set()
