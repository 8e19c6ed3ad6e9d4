# SPDX-License-Identifier: Apache-2.0
"""Threads that lend a hand: used again, gone after a while, and outlasted by whoever asked for them."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import pyarrow as pa
import pytest

from openkcm import hands
from openkcm.crypto import Turns
from openkcm.gateway import ServiceHandle
from openkcm.hands import Hand, Hands
from openkcm.waiting import THREADS
from support import FREE_THREADED, run_python, until


def lent(ours: Hands, work: Callable[[], None]) -> None:
    hand = Hand(work)
    ours.lend(hand)
    until(lambda: hand._begun)  # else it would be given up
    hand.outlast()


def test_a_thread_serves_one_call_after_the_other() -> None:
    ours, who = Hands(), []
    for _ in range(20):
        lent(ours, lambda: who.append(threading.get_ident()))
    assert len(who) == 20
    assert len(set(who)) == 1


def test_calls_at_once_have_a_thread_each() -> None:
    barrier = threading.Barrier(4)
    Hands().together(4, lambda: barrier.wait(20) and None)
    assert not barrier.broken


def test_a_thread_that_is_not_needed_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hands, "IDLE_SECONDS", 0.05)
    ours, who = Hands(), []
    lent(ours, lambda: who.append(threading.current_thread()))
    until(lambda: not who[0].is_alive())
    assert not ours._idle
    lent(ours, lambda: who.append(threading.current_thread()))
    assert who[0] is not who[1]


def test_one_that_is_asked_as_it_is_about_to_end_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hands, "IDLE_SECONDS", 0.0005)
    ours, calls = Hands(), []
    for at in range(1000):
        ours.together(2, lambda: calls.append(1))
        time.sleep(0.0001 * (at % 10))
    assert 1000 <= len(calls) <= 2000


def test_a_thread_that_was_taken_and_then_given_nothing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hands, "IDLE_SECONDS", 0.05)
    ours, who = Hands(), []
    lent(ours, lambda: who.append(threading.current_thread()))
    until(lambda: ours._idle or not who[0].is_alive())
    ours._idle.clear()
    until(lambda: not who[0].is_alive())


def test_one_that_has_not_begun_is_not_waited_for() -> None:
    """Its thread may be gone: with the interpreter, or in a process that was forked."""
    ours, calls = Hands(), []
    ours._idle.append(desk := queue.SimpleQueue())
    ours.together(2, lambda: calls.append(1))
    desk.get_nowait().do(lambda: calls.append(2))
    assert calls == [1, 2]  # the thread goes on, and works on nothing
    hand = Hand(lambda: calls.append(3))
    hand._begun.setdefault("begun", False)  # it is being given up at this moment
    hand.do(lambda: None)
    assert calls == [1, 2]


LAST = """
import sys
from openkcm.hands import HANDS, Hand

if sys.argv[1] == "warm":
    HANDS.together(2, lambda: None)


class Last:
    def __del__(self, print=print, is_finalizing=sys.is_finalizing, together=HANDS.together):
        together(2, lambda: None)
        print(is_finalizing(), flush=True)


last = Last()
"""


@pytest.mark.parametrize("before", ["warm", "cold"])
def test_the_end_of_the_interpreter(before: str) -> None:
    """Threads are gone by then: those that wait, and those that would be started."""
    told = run_python(LAST, before).stdout
    # Without a GIL modules may be emptied before the last objects go, who then can call nothing of them.
    assert told == "True\n" or (FREE_THREADED and told == "")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_fails_in_a_thread_holds_nobody_up() -> None:
    ours, calls = Hands(), []

    def fail() -> None:
        calls.append(threading.current_thread())
        raise SystemError("of a test")

    lent(ours, fail)
    calls[0].join()
    assert not ours._idle
    lent(ours, lambda: calls.append(threading.current_thread()))
    assert calls[1] is not calls[0]


class Work:
    """Work that can be asked after."""

    def __call__(self) -> None:
        pass


def test_nothing_is_held_that_a_call_was_about() -> None:
    """Not when it has ended, nor when it was given up: a caller may close what it was about as soon as it returns."""
    for done in (True, False):
        work = Work()
        hand, gone = Hand(work), weakref.ref(work)
        if done:
            hand.do(lambda: None)
        hand.outlast()
        del work
        assert gone() is None


class Interrupt:
    """Interrupts this thread at one of the places where Python looks for it: here, or as a thread is started."""

    def __init__(self, number: int) -> None:
        self._left = number
        self.came = False

    def __call__(self, frame: FrameType, kind: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if kind not in ("call", "c_return") or not (
            name == hands.__file__ or frame.f_code.co_name == "start"
        ):
            return
        self._left -= 1
        if not self._left:
            self.came = True
            sys.setprofile(None)
            raise KeyboardInterrupt


@pytest.mark.parametrize("warm", [True, False])
def test_an_interrupt_anywhere_leaves_nobody_at_work(warm: bool) -> None:
    main, places, came = threading.get_ident(), 0, True
    while came:
        places += 1
        ours, busy = Hands(), threading.Semaphore(0)
        ended: list[list[int]] = []

        def work(busy: threading.Semaphore = busy, ended: list[list[int]] = ended) -> None:
            if threading.get_ident() == main:
                busy.acquire(timeout=20)  # until one has begun
                return
            ended.append(mine := [])
            busy.release()
            time.sleep(0.01)
            mine.append(1)

        if warm:
            for each in [Hand(work) for _ in range(2)]:
                ours.lend(each)
            until(lambda ours=ours: len(ours._idle) == 2)  # type: ignore[misc]
        interrupt = Interrupt(places)
        sys.setprofile(interrupt)
        try:
            ours.together(3, work)
        except KeyboardInterrupt:
            assert interrupt.came
        finally:
            sys.setprofile(None)
            came = interrupt.came
        assert all(ended)
        time.sleep(0.005)
        assert all(ended), "one began after that"
    assert places > 15


def test_an_interrupt_waits_until_all_have_ended() -> None:
    """The caller zeroes a result when it is interrupted: nobody may write to it after that."""
    main, ended = threading.get_ident(), []

    def work() -> None:
        if threading.get_ident() == main:
            return
        time.sleep(0.1)
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.3)
        ended.append(1)

    with pytest.raises(KeyboardInterrupt):
        THREADS.together(2, work)
    assert ended


def test_after_a_fork_there_are_none_and_then_new_ones() -> None:
    ours = hands.HANDS
    lent(ours, lambda: None)
    assert ours._idle
    child = os.fork()
    if child == 0:
        calls: list[int] = []
        lent(ours, lambda: calls.append(1))
        os._exit(0 if calls else 1)
    until(lambda: os.waitpid(child, os.WNOHANG) == (child, 0))


# ---- turns in the interpreter ------------------------------------------------------------------------------


def test_one_who_has_the_turn_for_long_holds_nobody_up() -> None:
    turns, steps = Turns(), []
    begun, end = threading.Event(), threading.Event()

    def hold() -> None:
        with turns:
            begun.set()
            end.wait(20)
            steps.append("held")

    hand = Hand(hold)
    hands.HANDS.lend(hand)
    begun.wait(20)
    with turns:
        steps.append("other")
    end.set()
    hand.outlast()
    assert steps == ["other", "held"]


def test_turns_come_to_an_end_whatever_happens_in_them(service: ServiceHandle) -> None:
    turns = Turns()
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), turns:
            1 / 0  # noqa: B018
    rows = pa.array([b"r" * 64] * 5000)
    with turns, Turns():
        sealed = service.encrypt_column(rows, threads=2)
    assert service.decrypt_column(sealed, threads=3) == rows


def test_many_threads_take_turns(service: ServiceHandle) -> None:
    """More than there are cores, in one column and in many at once."""
    rows = pa.array([b"%d" % at for at in range(6000)])

    def work() -> None:
        for threads in (2, 5, 16):
            assert (
                service.decrypt_column(service.encrypt_column(rows, threads=threads), threads=threads) == rows
            )

    THREADS.together(4, work)
