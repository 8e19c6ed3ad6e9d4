# SPDX-License-Identifier: Apache-2.0
"""Threads that lend a hand: used again, gone after a while, and outlasted by whoever asked for them."""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from collections.abc import Callable

import pyarrow as pa
import pytest

from openkcm import hands
from openkcm.crypto import Turns
from openkcm.gateway import ServiceHandle
from openkcm.hands import Hands
from openkcm.waiting import THREADS
from remote_support import until


def lent(ours: Hands, work: Callable[[], None]) -> None:
    ours.lend(work).outlast()


def test_a_thread_serves_one_call_after_the_other() -> None:
    ours, who = Hands(), []
    for _ in range(20):
        lent(ours, lambda: who.append(threading.get_ident()))
    assert len(who) == 20
    assert len(set(who)) == 1


def test_calls_at_once_have_a_thread_each() -> None:
    ours, barrier = Hands(), threading.Barrier(3)
    for hand in [ours.lend(lambda: barrier.wait(20) and None) for _ in range(3)]:
        hand.outlast()
    assert not barrier.broken


def test_a_thread_that_is_not_needed_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hands, "IDLE_SECONDS", 0.05)
    ours, who = Hands(), []
    lent(ours, lambda: who.append(threading.current_thread()))
    until(lambda: not who[0].is_alive())
    assert not ours._idle
    lent(ours, lambda: who.append(threading.current_thread()))
    assert who[0] is not who[1]


def test_one_that_is_asked_as_it_is_about_to_end_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hands, "IDLE_SECONDS", 0.0005)
    ours, calls = Hands(), []
    for at in range(1000):
        lent(ours, lambda: calls.append(1))
        time.sleep(0.0001 * (at % 10))
    assert len(calls) == 1000


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


def test_nothing_is_held_that_a_call_was_about() -> None:
    class Work:
        def __call__(self) -> None:
            pass

    ours, work = Hands(), Work()
    gone = weakref.ref(work)
    lent(ours, work)
    del work
    until(lambda: gone() is None)


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

    hand = hands.HANDS.lend(hold)
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
