# SPDX-License-Identifier: Apache-2.0
"""Open keys that nobody comes for again: zeroed when their time is over, by one timer, or not kept."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import openkcm
from openkcm import DataKeyPolicy, PoolPolicy, aio, crypto
from openkcm.crypto import SecretKeys
from openkcm.gateway import ServiceHandle, expiry
from openkcm.gateway.expiry import LEAST_SECONDS, MOST_SECONDS, Expiry, expiry_of
from openkcm.gateway.pool import ReadyKeys
from openkcm.waiting import THREADS, Threads, Timer
from remote_support import SECONDS, until
from support import Clock, make_vault, refused, without_threads


class Timers(Threads):
    """Timers that a test has go off."""

    def __init__(self) -> None:
        self.set: list[FakeTimer] = []
        self.none_left = False

    def timer(self, seconds: float, call: Callable[[], None]) -> Timer:
        if self.none_left:
            raise RuntimeError("can't start new thread")
        self.set.append(FakeTimer(seconds, call))
        return self.set[-1]

    def going(self) -> FakeTimer:
        """The one that was not cancelled and has not gone off."""
        (timer,) = [each for each in self.set if not each.over]
        return timer


class FakeTimer:
    def __init__(self, seconds: float, call: Callable[[], None]) -> None:
        self.seconds = seconds
        self.over = False
        self._call = call

    def cancel(self) -> None:
        self.over = True

    def go_off(self) -> None:
        self.over = True
        self._call()


class Holder:
    """Keeps one key up to a moment of the test's clock."""

    def __init__(self, clock: Clock, until: float) -> None:
        self._clock = clock
        self.until: float | None = until
        self.swept = 0
        self.wiped = False

    def sweep(self) -> float | None:
        self.swept += 1
        if self.until is not None and self._clock() >= self.until:
            self.until = None
        return None if self.until is None else self.until - self._clock()

    def wipe(self) -> None:
        self.wiped = True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(expiry, "monotonic", clock)
    return clock


@pytest.fixture
def timers() -> Timers:
    return Timers()


# ---- the timer ----------------------------------------------------------------------------------------


def test_one_timer_for_all(clock: Clock, timers: Timers) -> None:
    some, started = Expiry(timers), clock.now
    holders = [Holder(clock, started + seconds) for seconds in (30, 10, 20, 10)]
    for each, seconds in zip(holders, (30, 10, 20, 10), strict=True):
        assert some.ask(each, seconds)
    assert len(timers.set) == 2
    for seconds, left in ((10, [0, 2]), (20, [0]), (30, [])):
        assert timers.going().seconds == pytest.approx(started + seconds - clock.now)
        clock.now = started + seconds
        timers.going().go_off()
        assert [at for at, each in enumerate(holders) if each.until is not None] == left
    assert [each.swept for each in holders] == [1, 1, 1, 1]
    assert all(each.over for each in timers.set)


def test_who_has_more_is_asked_again(clock: Clock, timers: Timers) -> None:
    some, holder = Expiry(timers), Holder(clock, clock.now + 10)
    assert some.ask(holder, 10) and some.ask(holder, 15)  # the later one is seen to by the sweep
    assert len(timers.set) == 1
    holder.until = clock.now + 15
    clock.now += 10
    timers.going().go_off()
    assert timers.going().seconds == pytest.approx(5)
    assert some.ask(holder, 1)  # and what is sooner is sooner
    assert timers.going().seconds == pytest.approx(1)
    clock.now += 1
    timers.going().go_off()
    assert (holder.swept, timers.going().seconds) == (2, pytest.approx(4))


def test_a_timer_that_is_about_to_go_off_is_left_alone(clock: Clock, timers: Timers) -> None:
    """Else whoever comes again and again within its shortest time would put it off for ever."""
    some, holders = Expiry(timers), [Holder(clock, clock.now) for _ in range(50)]
    for each in holders:
        assert some.ask(each, 0)
        clock.now += LEAST_SECONDS / 100
    assert len(timers.set) == 1
    clock.now += LEAST_SECONDS
    timers.going().go_off()
    assert all(each.until is None for each in holders)


def test_times_without_end(clock: Clock, timers: Timers) -> None:
    some, ever, long = Expiry(timers), Holder(clock, clock.now), Holder(clock, clock.now + 1e12)
    assert some.ask(ever, float("inf"))
    assert not timers.set
    assert some.ask(long, 1e12)
    assert timers.going().seconds == MOST_SECONDS
    clock.now += MOST_SECONDS
    timers.going().go_off()
    assert timers.going().seconds == MOST_SECONDS and not long.swept


def test_nobody_is_kept_alive(clock: Clock, timers: Timers) -> None:
    some, holder = Expiry(timers), Holder(clock, clock.now + 10)
    assert some.ask(holder, 10)
    gone = weakref.ref(holder)
    del holder
    gc.collect()
    assert gone() is None
    clock.now += 10
    timers.going().go_off()
    assert all(each.over for each in timers.set) and not some._due and not some._queue


def test_who_takes_the_place_of_one_who_is_gone_is_asked_too(clock: Clock, timers: Timers) -> None:
    some, holder = Expiry(timers), Holder(clock, clock.now + 10)
    some._due[id(holder)] = (clock.now + 1, weakref.ref(Holder(clock, 0)))
    assert some.ask(holder, 10)
    clock.now += 10
    timers.going().go_off()
    assert holder.until is None


def test_one_that_fails_does_not_keep_the_others_waiting(
    clock: Clock, timers: Timers, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    some, holders = Expiry(timers), [Holder(clock, clock.now + 10) for _ in range(2)]

    def fail() -> None:
        raise ValueError("of its own")

    monkeypatch.setattr(holders[0], "sweep", fail)
    for each in holders:
        assert some.ask(each, 10)
    clock.now += 10
    timers.going().go_off()
    assert holders[1].until is None and "could not be wiped" in caplog.text


def test_where_no_timer_is_to_be_had(clock: Clock, timers: Timers) -> None:
    """Who asks hears of it; those whose timer goes off for the last time are wiped before their time."""
    some, holders = Expiry(timers), [Holder(clock, clock.now + seconds) for seconds in (10, 20, 5, 30)]
    assert some.ask(holders[0], 10) and some.ask(holders[1], 20)
    timers.none_left = True
    assert not some.ask(holders[2], 5)
    assert not some.ask(holders[1], 5)  # which leaves it the later time that it has
    assert some.ask(holders[3], 30)  # which needs no new one now
    clock.now += 10
    timers.going().go_off()
    assert [each.swept for each in holders] == [1, 0, 0, 0]
    assert [each.wiped for each in holders] == [False, True, False, True]
    assert not some.ask(holders[1], 1)
    timers.none_left = False
    assert some.ask(holders[1], 1)


def test_who_cannot_be_asked_again_is_wiped(clock: Clock, timers: Timers) -> None:
    some, holder = Expiry(timers), Holder(clock, clock.now + 20)
    assert some.ask(holder, 10)
    timers.none_left = True
    clock.now += 10
    timers.going().go_off()
    assert (holder.swept, holder.wiped) == (1, True)


def test_each_way_to_wait_has_one_that_goes_with_it() -> None:
    timers = Timers()
    assert expiry_of(timers) is expiry_of(timers) is not expiry_of(THREADS)
    gone = weakref.ref(expiry_of(timers))
    del timers
    gc.collect()
    assert gone() is None


# ---- who uses it --------------------------------------------------------------------------------------


@pytest.fixture
def core(tmp_path: Path) -> Iterator[openkcm.Core]:
    with make_vault(tmp_path) as core:
        yield without_threads(core)


def service_of(core: openkcm.Core, **options: Any) -> ServiceHandle:
    return openkcm.Gateway(core, **options).service("acme", "records")


def open_keys(core: openkcm.Core) -> int:
    """How many handles there are on open keys, the Core's own loaded."""
    service_of(core).encrypt_many([b"x"])
    gc.collect()
    return int(crypto.secret_memory_info()["handles"])


def ready_of(handle: ServiceHandle) -> ReadyKeys:
    ready = handle._pool.ready
    assert ready is not None
    return ready


def current_of(handle: ServiceHandle) -> SecretKeys:
    current = handle._shared._current
    assert current is not None
    return current.keys


def test_time_zeroes_a_pool_that_nobody_uses(core: openkcm.Core) -> None:
    before = open_keys(core)
    handle = service_of(core, pool=PoolPolicy(keys=8, seconds=0.05))
    blob = handle.encrypt(b"x")
    until(lambda: handle._pool.ready is None)
    assert crypto.secret_memory_info()["handles"] <= before
    again = handle.encrypt(b"y")
    ready = ready_of(handle)
    until(lambda: ready.keys.wiped)
    assert handle.decrypt_many([blob, again]) == [b"x", b"y"]


def test_time_zeroes_a_key_that_serves_several_records(core: openkcm.Core) -> None:
    handle = service_of(core, policy=DataKeyPolicy(records=1000, seconds=0.05))
    blob = handle.encrypt(b"x")
    keys = current_of(handle)
    until(lambda: keys.wiped)
    assert handle.decrypt_many([blob, handle.encrypt(b"y")]) == [b"x", b"y"]


def test_a_key_without_a_time_stays(core: openkcm.Core) -> None:
    handle = service_of(core, policy=DataKeyPolicy(records=1000))
    handle.encrypt(b"x")
    assert handle._shared.sweep() is not None
    assert not current_of(handle).wiped


def test_a_pool_sweeps_what_is_past_its_time(core: openkcm.Core) -> None:
    """Each half by itself, as where the Core is far away."""
    handle = service_of(core, pool=PoolPolicy(keys=8, seconds=1000))
    pool = handle._pool
    assert pool.sweep() is None
    handle.encrypt(b"x")
    ready, spare = ready_of(handle), pool._make()
    pool._spare = spare
    left = pool.sweep()
    assert left is not None and 0 < left <= 1000
    ready.expires = 0.0
    left = pool.sweep()
    assert left is not None and 0 < left <= 1000
    assert (pool.ready, pool._spare) == (None, spare)
    assert ready.keys.wiped and not spare.keys.wiped
    spare.expires = 0.0
    assert pool.sweep() is None
    assert spare.keys.wiped and pool._spare is None
    assert handle.decrypt(handle.encrypt(b"y")) == b"y"


def test_a_key_that_went_from_the_pool_is_there_no_more(core: openkcm.Core) -> None:
    """Else it would be open in two places, and the pool's would outlive it."""
    handle = service_of(core, pool=PoolPolicy(keys=4), policy=DataKeyPolicy(records=10))
    blob = handle.encrypt(b"x")
    ready = ready_of(handle)
    (gone,) = {0, 1, 2, 3} - set(ready.positions)
    inline = handle._inline
    assert inline.open_one(current_of(handle), 0, b"\0", blob) == b"x"
    assert inline.open_one(ready.keys, gone, b"\0", blob) is None
    zeros = crypto.import_keys(bytes(32))
    assert (
        inline.open_one(ready.keys, gone, b"\0", inline.seal_one(zeros, 0, 1, bytes(72), b"\0", b"z")) == b"z"
    )


def test_keys_wiped_while_they_are_used_are_made_anew(core: openkcm.Core) -> None:
    """Their time may be over at any moment between look and use."""
    for policy in (DataKeyPolicy(), DataKeyPolicy(records=100, seconds=60)):
        handle = service_of(core, policy=policy)
        for _ in range(3):
            assert handle.decrypt(handle.encrypt(b"x")) == b"x"
            ready_of(handle).keys.wipe()
            if handle._shared._current is not None:
                current_of(handle).wipe()


class NoTimers(Threads):
    """A machine that has no thread left for a timer."""

    def timer(self, seconds: float, call: Callable[[], None]) -> Timer:
        raise RuntimeError("can't start new thread")


@pytest.fixture
def no_threads(core: openkcm.Core) -> Iterator[openkcm.Core]:
    core.waiting = NoTimers()  # type: ignore[attr-defined]
    yield core
    del core.waiting  # type: ignore[attr-defined]


@pytest.mark.parametrize("policy", [DataKeyPolicy(), DataKeyPolicy(records=9, seconds=60)])
def test_without_a_timer_no_key_waits(no_threads: openkcm.Core, policy: DataKeyPolicy) -> None:
    before = open_keys(no_threads)
    handle = service_of(no_threads, policy=policy)
    blobs = [handle.encrypt(b"x") for _ in range(3)] + handle.encrypt_many([b"y"] * 3)
    assert handle._pool.ready is None and handle._shared._current is None
    assert len({blob[24:96] for blob in blobs[:3]}) == 3
    assert handle.decrypt_many(blobs) == [b"x"] * 3 + [b"y"] * 3
    assert open_keys(no_threads) <= before


def test_without_a_timer_no_key_is_leased(no_threads: openkcm.Core) -> None:
    no_threads.set_lease("acme", "records", 60)
    handle = service_of(no_threads)
    blobs = [handle.encrypt(b"x"), handle.encrypt(b"x", subject="somebody")]
    for blob in blobs:
        assert handle.decrypt(blob) == b"x"
        assert handle.decrypt(blob) == b"x"
    assert not handle._leases.kept


def test_one_thread_for_any_number_of_services(core: openkcm.Core) -> None:
    for number in range(20):
        core.create_service("acme", f"s{number}")
    before = threading.active_count()
    with openkcm.Gateway(core, policy=DataKeyPolicy(records=9, seconds=60)) as gateway:
        for number in range(20):
            handle = gateway.service("acme", f"s{number}")
            core.set_lease("acme", f"s{number}", 60)
            handle.decrypt(handle.encrypt(b"x"))
            assert handle._leases.kept and handle._pool.ready and handle._shared._current
        # One that was cancelled may be on its way out.
        until(lambda: threading.active_count() <= before + 1)


def test_a_forked_child_zeroes_its_own(core: openkcm.Core) -> None:
    """The parent's timer thread is not there, and what the child makes has its own."""
    handle = service_of(core, pool=PoolPolicy(keys=8, seconds=0.05))
    handle.encrypt(b"x")
    child = os.fork()
    if not child:
        signal.alarm(60)
        status = 1
        try:
            blob = handle.encrypt(b"y")
            until(lambda: handle._pool.ready is None)
            assert handle.decrypt(blob) == b"y"
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    until(lambda: handle._pool.ready is None)


def test_a_gateway_that_nobody_has_any_more_is_let_go_of(core: openkcm.Core) -> None:
    handle = service_of(core)
    handle.encrypt(b"x")
    gone = weakref.ref(handle)
    del handle
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("records", [1, 1000])
def test_an_event_loop_zeroes_what_nobody_uses(core: openkcm.Core, records: int) -> None:
    async def main() -> None:
        gateway = aio.Gateway(
            core, pool=PoolPolicy(keys=8, seconds=0.05), policy=DataKeyPolicy(records=records, seconds=0.05)
        )
        async with gateway:
            service = await gateway.service("acme", "records")
            blob = await service.encrypt(b"x")
            handle = service._handle
            ready, current = ready_of(handle), handle._shared._current
            while not ready.keys.wiped or (current is not None and not current.keys.wiped):
                await asyncio.sleep(0.005)
            assert handle._pool.ready is None
            assert await service.decrypt(blob) == b"x"
            assert await service.decrypt(await service.encrypt(b"y")) == b"y"

    asyncio.run(asyncio.wait_for(main(), 4 * SECONDS))


def test_a_moved_key() -> None:
    keys = crypto.generate_keys(2)
    refused(lambda: keys.move(2), openkcm.InvalidInput)
    refused(lambda: keys.move(-1), openkcm.InvalidInput)
    keys.wipe()
    refused(lambda: keys.move(0), openkcm.SecretMemoryError)
