# SPDX-License-Identifier: Apache-2.0
"""A server's sessions: bound to the certificate that made them, in number and in time."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
import weakref
from collections.abc import Iterator

import pytest
from cryptography import x509

from certificates import CLIENT, SERVER, Authority, key_of
from openkcm import crypto
from openkcm.errors import ChannelExpired, SecretMemoryError
from openkcm.rpc.session import Credentials, Session, SessionTable, answer, begin, finish
from support import refused

ONE, TWO = b"the certificate of one", b"the certificate of two"


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(clock: Clock) -> Iterator[SessionTable]:
    made = SessionTable(600, most=5, most_each=3, clock=clock)
    yield made
    made.close()


def channel() -> crypto.Channel:
    return crypto.offer_channel().agree(crypto.offer_channel().public, b"t", False)


def add(table: SessionTable, leaf: bytes, *names: bytes) -> list[crypto.Channel]:
    """Keep a session of this name each."""
    made = [channel() for _ in names]
    for name, each in zip(names, made, strict=True):
        table.add(name, each, leaf)
    return made


def is_unknown(table: SessionTable, session: bytes, leaf: bytes) -> bool:
    """Whether there is no such session; nothing is said beyond that."""
    try:
        table.find(session, leaf)
    except ChannelExpired as error:
        assert str(error) == ChannelExpired.default
        assert error.retryable
        return True
    return False


def test_a_session_is_its_own_certificates(table: SessionTable) -> None:
    (made,) = add(table, ONE, b"a")
    assert table.find(b"a", ONE) is made
    for session, leaf in ((b"a", TWO), (b"a", b""), (b"b", ONE), (b"", ONE), (b"a" * 1000, TWO)):
        assert is_unknown(table, session, leaf)
    assert not made.wiped


def test_a_session_ends_however_much_it_is_used(table: SessionTable, clock: Clock) -> None:
    (made,) = add(table, ONE, b"a")
    for _ in range(599):
        clock.now += 1
        assert table.find(b"a", ONE) is made
    clock.now += 1
    assert is_unknown(table, b"a", ONE)
    table.sweep()
    assert made.wiped
    assert len(table) == 0


def test_a_new_session_wipes_what_is_over(table: SessionTable, clock: Clock) -> None:
    (first,) = add(table, ONE, b"a")
    clock.now += 300
    (second,) = add(table, TWO, b"b")
    clock.now += 300
    add(table, TWO, b"c")
    assert (first.wiped, second.wiped, len(table)) == (True, False, 2)


def test_one_certificate_pushes_out_only_its_own(table: SessionTable) -> None:
    (other,) = add(table, TWO, b"other")
    own = add(table, ONE, b"a", b"b", b"c", b"d", b"e")
    assert [each.wiped for each in own] == [True, True, False, False, False]
    assert is_unknown(table, b"b", ONE)
    assert table.find(b"other", TWO) is other


def test_the_oldest_goes_first_when_all_is_full(table: SessionTable) -> None:
    made = [add(table, b"leaf %d" % number, b"%d" % number)[0] for number in range(7)]
    assert [each.wiped for each in made] == [True] * 2 + [False] * 5
    assert len(table) == 5


def test_one_session_each_is_possible(clock: Clock) -> None:
    table = SessionTable(most=1, most_each=1, clock=clock)
    made = add(table, ONE, b"a", b"b") + add(table, TWO, b"c", b"d") + add(table, ONE, b"e")
    assert [each.wiped for each in made] == [True] * 4 + [False]
    assert table.find(b"e", ONE) is made[4]
    table.close()


def test_a_revoked_certificate_loses_its_sessions(table: SessionTable) -> None:
    own, (other,) = add(table, ONE, b"a", b"b"), add(table, TWO, b"c")
    table.drop(ONE)
    table.drop(b"nobody's")
    assert [each.wiped for each in own] == [True, True]
    assert is_unknown(table, b"a", ONE)
    assert table.find(b"c", TWO) is other
    (again,) = add(table, ONE, b"d")
    assert table.find(b"d", ONE) is again


def test_a_closed_table_keeps_nothing(table: SessionTable) -> None:
    made = add(table, ONE, b"a") + add(table, TWO, b"b")
    table.close()
    table.close()
    made += add(table, ONE, b"c")
    assert all(each.wiped for each in made)
    assert is_unknown(table, b"c", ONE)


def wait_until_wiped(made: crypto.Channel) -> None:
    deadline = time.monotonic() + 20
    while not made.wiped:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_sessions_are_wiped_when_nobody_comes() -> None:
    table = SessionTable(1)
    first, second = add(table, ONE, b"a", b"b")
    wait_until_wiped(first)
    wait_until_wiped(second)
    # And again, by another timer.
    (third,) = add(table, ONE, b"c")
    wait_until_wiped(third)
    assert len(table) == 0
    table.close()


def test_sessions_are_kept_where_no_thread_can_be_had(
    table: SessionTable, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(timer: threading.Timer) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Timer, "start", start)
    (made,) = add(table, ONE, b"a")
    assert table.find(b"a", ONE) is made
    clock.now += 600
    add(table, ONE, b"b")
    assert made.wiped
    monkeypatch.undo()
    add(table, ONE, b"c")
    assert table._timer is not None


def test_a_timer_keeps_no_table_alive() -> None:
    table = SessionTable()
    gc.collect()
    before = crypto.secret_memory_info()["handles"]
    add(table, ONE, b"a")
    gone, timer = weakref.ref(table), table._timer
    del table
    gc.collect()
    assert gone() is None
    assert crypto.secret_memory_info()["handles"] == before
    assert timer is not None
    timer.cancel()


def test_a_child_starts_without_sessions(table: SessionTable) -> None:
    (made,) = add(table, ONE, b"a")
    with table._lock:  # as another thread may hold it at that moment
        child = os.fork()
        if child == 0:
            status = 1
            try:
                assert is_unknown(table, b"a", ONE)
                (own,) = add(table, ONE, b"b")
                assert table.find(b"b", ONE) is own
                table.close()
                status = 0 if own.wiped and made.wiped else 2
            finally:
                os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert table.find(b"a", ONE) is made
    assert not made.wiped


def test_many_threads_at_once() -> None:
    """Every channel is either found by its owner or wiped, and the books agree at the end."""
    table = SessionTable(600, most=40, most_each=15)
    errors: list[BaseException] = []
    made: list[crypto.Channel] = []

    def work(number: int) -> None:
        rng = random.Random(number)
        leaf = b"leaf %d" % (number % 3)
        try:
            for turn in range(150):
                name = b"%d %d" % (number, turn)
                one = channel()
                made.append(one)
                table.add(name, one, leaf)
                try:
                    assert table.find(name, leaf) is one
                    crypto.seal_keys(one, crypto.generate_keys(1), b"")
                except (ChannelExpired, SecretMemoryError):
                    assert one.wiped or not table._kept.get(name)
                if rng.random() < 0.05:
                    table.drop(leaf)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    alive = {id(each) for each in made if not each.wiped}
    assert alive == {id(kept.channel) for kept in table._kept.values()}
    assert sum(map(len, table._own.values())) == len(table) <= 40
    assert all(0 < len(own) <= 15 for own in table._own.values())
    table.close()
    assert all(each.wiped for each in made)


# ---- the client's side ---------------------------------------------------------------------------------


def session_of(lifetime: int, clock: Clock) -> Session:
    ca = Authority()
    gateway = Credentials(
        ca.issue(key_of("p256"), CLIENT, x509.DNSName("g")), key_of("p256"), [ca.certificate]
    )
    core = Credentials(
        ca.issue(key_of("p256", 1), SERVER, x509.DNSName("c")), key_of("p256", 1), [ca.certificate]
    )
    offer, hello = begin(gateway, clock=clock)
    clock.now += 7  # on the way
    return finish(offer, answer(core, hello, gateway.leaf, lifetime=lifetime).reply, "c")


@pytest.mark.parametrize(("lifetime", "good"), [(600, 570), (10, 9), (1, 0.9), (3600, 3570)])
def test_a_client_ends_a_session_before_the_server(lifetime: int, good: float, clock: Clock) -> None:
    began = clock.now
    session = session_of(lifetime, clock)
    clock.now = began + good - 0.01
    assert session.is_good()
    clock.now = began + good
    assert not session.is_good()
    assert repr(session) == "<Session over>"


def test_a_wiped_session_is_over(clock: Clock) -> None:
    session = session_of(600, clock)
    assert session.is_good()
    session.channel.wipe()
    assert not session.is_good()
    refused(lambda: crypto.seal_keys(session.channel, crypto.generate_keys(1), b""), SecretMemoryError)
