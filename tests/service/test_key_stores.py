# SPDX-License-Identifier: Apache-2.0
"""What every key store for named data keys keeps to, on the real servers."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import openkcm
from key_store_support import (
    OTHER,
    RACER,
    SERVICE,
    Place,
    by_id,
    by_subject,
    ids,
    make_keys,
    opened,
    postgres_place,
    sqlite_place,
    subjects,
    valkey_place,
)
from openkcm import postgres
from openkcm.errors import KeyDestroyed, StoreUnavailable
from openkcm.gateway import valkey_client
from openkcm.gateway.keystore import KeyStore
from openkcm.limits import MAX_KEYS_PER_CALL
from openkcm.testing.tcp_proxy import TcpProxy
from support import environment, make_vault, refused

KINDS = ["sqlite", "postgres", "valkey"]
SERVERS = ["postgres", "valkey"]
_numbers = itertools.count()


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty place of each kind."""
    if request.param == "sqlite":
        return sqlite_place(tmp_path)
    if request.param == "postgres":
        server = request.getfixturevalue("postgres_server")
        return postgres_place(server, f"keys_{next(_numbers)}")
    return valkey_place(request.getfixturevalue("empty_valkey"))


@pytest.fixture(params=SERVERS)
def served(request: pytest.FixtureRequest) -> Place:
    """An empty place on a server of the test's own."""
    if request.param == "postgres":
        return postgres_place(request.getfixturevalue("own_postgres"), "keys")
    return valkey_place(request.getfixturevalue("own_valkey"))


@pytest.fixture(params=SERVERS)
def remote(request: pytest.FixtureRequest) -> Place:
    """An empty place on a server that others use too."""
    if request.param == "postgres":
        return postgres_place(request.getfixturevalue("postgres_server"), f"keys_{next(_numbers)}")
    return valkey_place(request.getfixturevalue("empty_valkey"))


@pytest.fixture
def store(place: Place) -> Iterator[KeyStore]:
    with opened(place.url) as store:
        yield store


# ---- what is put in comes out ------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 999, 1000, 1001, MAX_KEYS_PER_CALL, 2 * MAX_KEYS_PER_CALL + 1])
def test_keys_come_back(store: KeyStore, count: int) -> None:
    keys = make_keys(count)
    assert store.add(SERVICE, keys) == by_subject(keys)
    assert store.find_ids(SERVICE, [*ids(keys), bytes(16)]) == by_id(keys)
    assert store.find_subjects(SERVICE, [bytes(32), *subjects(keys)]) == by_subject(keys)
    assert store.count(SERVICE) == count
    some = keys[:: max(1, count // 7)]
    assert store.find_ids(SERVICE, ids(some)) == by_id(some)
    assert store.find_subjects(SERVICE, subjects(some)) == by_subject(some)


def test_nothing_is_asked_for_and_nothing_given(store: KeyStore) -> None:
    assert store.add(SERVICE, []) == {}
    assert store.find_ids(SERVICE, []) == store.find_subjects(SERVICE, []) == {}
    store.rewrap(SERVICE, [])
    store.remove(SERVICE, [])
    assert store.scan(SERVICE, b"", 10) == []
    assert store.count(SERVICE) == 0


def test_extreme_bytes_and_versions_come_back(store: KeyStore) -> None:
    keys = [
        key._replace(key_id=fill * 16, subject=fill * 32, wrapped=fill * 72, version=version)
        for key, fill, version in zip(
            make_keys(4), [b"\0", b"\xff", b"\r", b"\n"], [1, 2**32 - 1, 2**31, 10], strict=True
        )
    ]
    assert store.add(SERVICE, keys) == by_subject(keys)
    assert store.find_ids(SERVICE, ids(keys)) == by_id(keys)
    assert store.scan(SERVICE, b"", 10) == sorted(keys)
    store.rewrap(SERVICE, keys)
    store.remove(SERVICE, ids(keys))
    assert store.count(SERVICE) == 0


def test_services_do_not_see_each_other(store: KeyStore) -> None:
    mine, same_subjects = make_keys(5), make_keys(5)
    theirs = [key._replace(subject=own.subject) for key, own in zip(same_subjects, mine, strict=True)]
    store.add(SERVICE, mine)
    assert store.add(OTHER, theirs) == by_subject(theirs)
    assert store.find_ids(OTHER, ids(mine)) == {}
    assert store.find_subjects(SERVICE, subjects(mine)) == by_subject(mine)
    store.remove(OTHER, ids(mine))
    store.rewrap(OTHER, [key._replace(version=9) for key in mine])
    assert store.find_ids(SERVICE, ids(mine)) == by_id(mine)
    assert store.count(OTHER) == 5


def test_a_store_is_the_same_when_it_is_opened_again(place: Place) -> None:
    keys = make_keys(20)
    with opened(place.url) as store:
        salt = store.salt
        store.add(SERVICE, keys)
    with opened(place.url) as store:
        assert store.salt == salt
        assert len(salt) == 32
        assert store.find_ids(SERVICE, ids(keys)) == by_id(keys)
    assert refused(lambda: store.count(SERVICE), StoreUnavailable).retryable is False


def test_scan_goes_through_all_in_order(store: KeyStore) -> None:
    keys = sorted(make_keys(250))
    store.add(SERVICE, keys)
    store.add(OTHER, make_keys(50))
    seen, after = [], b""
    while part := store.scan(SERVICE, after, 40):
        assert len(part) <= 40
        seen += part
        after = part[-1].key_id
    assert seen == keys


# ---- who is first, and who is gone -------------------------------------------------------------------


def test_the_first_key_of_a_subject_counts(store: KeyStore) -> None:
    first, second = make_keys(6), make_keys(6)
    store.add(SERVICE, first[:3])
    late = [key._replace(subject=won.subject) for key, won in zip(second, first, strict=True)]
    expected = by_subject([*first[:3], *late[3:]])
    assert store.add(SERVICE, late) == expected
    assert store.find_subjects(SERVICE, subjects(first)) == expected
    # Nothing is left of those that came too late.
    assert store.find_ids(SERVICE, ids(late)) == by_id(late[3:])
    assert store.count(SERVICE) == 6
    # To add once more what was added, as after a lost answer, changes nothing.
    assert store.add(SERVICE, late[3:]) == by_subject(late[3:])


def test_a_removed_key_does_not_come_back(store: KeyStore) -> None:
    keys = make_keys(10)
    store.add(SERVICE, keys)
    store.remove(SERVICE, [*ids(keys[:4]), bytes(16)])
    store.remove(SERVICE, ids(keys[:4]))
    # A rewrap that was under way when they were removed.
    moved = [key._replace(version=2, wrapped=os.urandom(72)) for key in keys]
    store.rewrap(SERVICE, moved)
    assert store.find_ids(SERVICE, ids(keys)) == by_id(moved[4:])
    assert store.find_subjects(SERVICE, subjects(keys)) == by_subject(moved[4:])
    assert store.scan(SERVICE, b"", 100) == sorted(moved[4:])
    assert store.count(SERVICE) == 6


def test_a_subject_that_was_removed_gets_another_key(store: KeyStore) -> None:
    (old,) = make_keys(1)
    store.add(SERVICE, [old])
    store.remove(SERVICE, [old.key_id])
    (new,) = [key._replace(subject=old.subject) for key in make_keys(1)]
    assert store.add(SERVICE, [new]) == by_subject([new])
    # Others are late: neither their removal of the old key nor its rewrap touches the new one.
    store.rewrap(SERVICE, [old._replace(version=7)])
    store.remove(SERVICE, [old.key_id])
    assert store.find_subjects(SERVICE, [old.subject]) == by_subject([new])
    assert store.find_ids(SERVICE, [old.key_id, new.key_id]) == by_id([new])


def test_a_rewrap_does_not_go_back(store: KeyStore) -> None:
    keys = make_keys(3, version=9)
    store.add(SERVICE, keys)
    moved = [key._replace(version=10, wrapped=os.urandom(72)) for key in keys]
    store.rewrap(SERVICE, moved)
    store.rewrap(SERVICE, keys)
    assert store.find_ids(SERVICE, ids(keys)) == by_id(moved)
    again = [key._replace(wrapped=os.urandom(72)) for key in moved]
    store.rewrap(SERVICE, again)
    assert store.find_ids(SERVICE, ids(keys)) == by_id(again)


# ---- many at once ------------------------------------------------------------------------------------


def test_processes_that_race_end_with_the_same_keys(place: Place) -> None:
    command = [sys.executable, "-c", RACER, place.url]
    with ExitStack() as stack:
        racers = []
        for _ in range(4):
            # All find it empty, and make its tables and its salt.
            racer = stack.enter_context(
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
                )
            )
            stack.callback(racer.kill)
            racers.append(racer)
        assert [racer.stdout.readline() for racer in racers if racer.stdout] == ["ready\n"] * 4
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("go\n")
            racer.stdin.flush()
        told = {racer.communicate(timeout=120)[0] for racer in racers}
        assert [racer.returncode for racer in racers] == [0] * 4
    assert len(told) == 1
    with opened(place.url) as store:
        assert told.pop().startswith(store.salt.hex())
        assert store.count(SERVICE) == store.count(OTHER) == 3000
        assert len(store.scan(SERVICE, b"", 5000)) == 3000


def test_threads_that_race_end_with_the_same_keys(store: KeyStore) -> None:
    names = subjects(make_keys(800))
    turn = threading.Barrier(8)

    def race(number: int) -> dict[bytes, Any]:
        mine = [key._replace(subject=each) for key, each in zip(make_keys(800), names, strict=True)]
        turn.wait(30)
        return dict(store.add(SERVICE, mine[::-1] if number % 2 else mine))

    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(race, range(8)))
    assert all(result == results[0] for result in results)
    assert store.find_subjects(SERVICE, names) == results[0]
    assert store.count(SERVICE) == 800


def test_adding_moving_and_removing_at_once(store: KeyStore) -> None:
    """Whatever the order, what is removed last is gone, and the two ways to a key agree."""
    keys = make_keys(300)
    store.add(SERVICE, keys)
    over = threading.Event()

    def move() -> None:
        version = 2
        while not over.is_set():
            store.rewrap(SERVICE, [key._replace(version=version) for key in keys])
            version += 1

    def add() -> None:
        while not over.is_set():
            store.add(SERVICE, [key._replace(key_id=os.urandom(16)) for key in keys[:50]])

    with ThreadPoolExecutor(4) as threads:
        work = [threads.submit(each) for each in (move, add, move)]
        try:
            for start in range(0, 300, 20):
                store.remove(SERVICE, ids(keys[start : start + 20]))
        finally:
            over.set()
        for each in work:
            each.result(60)
    assert store.find_ids(SERVICE, ids(keys)) == {}
    left = store.scan(SERVICE, b"", 1000)
    assert store.count(SERVICE) == len(left) <= 50
    assert store.find_subjects(SERVICE, subjects(keys)) == by_subject(left)


def test_a_forked_child_has_connections_of_its_own(store: KeyStore) -> None:
    keys = make_keys(50)
    store.add(SERVICE, keys[:20])
    child = os.fork()
    if not child:
        code = 1
        try:
            store.forget()
            good = store.find_ids(SERVICE, ids(keys[:20])) == by_id(keys[:20])
            good = good and store.add(SERVICE, keys[20:40]) == by_subject(keys[20:40])
            code = 0 if good else 2
        finally:
            os._exit(code)
    for _ in range(20):
        assert store.find_ids(SERVICE, ids(keys[:20])) == by_id(keys[:20])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    store.add(SERVICE, keys[40:])
    assert store.find_ids(SERVICE, ids(keys)) == by_id(keys)


# ---- outages -----------------------------------------------------------------------------------------


def test_an_outage_is_a_retryable_error_and_ends_by_itself(served: Place) -> None:
    server = served.server
    assert server is not None
    keys = make_keys(2000)
    with opened(served.url) as store:
        for stop in (server.stop, server.kill):
            store.add(SERVICE, keys)
            stop()
            for call in _every_call(store):
                assert refused(call, StoreUnavailable).retryable
            assert refused(lambda: opened(served.url).__enter__(), StoreUnavailable).retryable
            server.start()
            # Killed or stopped, what was acknowledged is there.
            assert store.find_ids(SERVICE, ids(keys)) == by_id(keys)
            for call in _every_call(store):
                call()


def _every_call(store: KeyStore) -> list[Callable[[], object]]:
    (key,) = make_keys(1)
    return [
        lambda: store.find_ids(SERVICE, [key.key_id]),
        lambda: store.find_subjects(SERVICE, [key.subject]),
        lambda: store.add(SERVICE, [key]),
        lambda: store.rewrap(SERVICE, [key]),
        lambda: store.remove(SERVICE, [key.key_id]),
        lambda: store.scan(SERVICE, b"", 1),
        lambda: store.count(SERVICE),
    ]


def test_a_gateway_goes_on_with_what_it_remembers(served: Place, tmp_path: Path) -> None:
    server = served.server
    assert server is not None
    with make_vault(tmp_path) as core, openkcm.Gateway(core, keys=served.url) as gateway:
        handle = gateway.service("acme", "records")
        blob = handle.encrypt(b"x", subject="known")
        for stop, new in ((server.stop, "one"), (server.kill, "two")):
            stop()
            assert handle.decrypt(blob) == b"x"
            assert handle.decrypt(handle.encrypt(b"y", subject="known")) == b"y"
            encrypt = partial(handle.encrypt, b"y", subject=new)
            assert refused(encrypt, StoreUnavailable).retryable
            # A shred has to know which key is the subject's, and says that it does not.
            assert refused(lambda: handle.shred("known"), StoreUnavailable).retryable
            server.start()
            assert handle.decrypt(handle.encrypt(b"z", subject=new)) == b"z"
        assert handle.shred("known") == 1
        refused(lambda: handle.decrypt(blob), KeyDestroyed)


def test_keys_that_were_acknowledged_survive_a_kill_under_load(served: Place) -> None:
    server = served.server
    assert server is not None
    acknowledged: list[Any] = []
    started = threading.Event()

    def load(store: KeyStore) -> None:
        while True:
            keys = make_keys(20)
            try:
                store.add(SERVICE, keys)
            except StoreUnavailable as error:
                assert error.retryable
                return
            acknowledged.extend(keys)
            started.set()

    with opened(served.url) as store:
        with ThreadPoolExecutor(3) as threads:
            work = [threads.submit(load, store) for _ in range(3)]
            assert started.wait(30)
            server.kill()
            for each in work:
                each.result(60)
        server.start()
        found = store.find_ids(SERVICE, ids(acknowledged))
        assert found == by_id(acknowledged)
        assert store.find_subjects(SERVICE, subjects(acknowledged)) == by_subject(acknowledged)
        assert store.count(SERVICE) == len(store.scan(SERVICE, b"", 100_000))


def test_a_server_that_does_not_answer_is_not_waited_for(
    remote: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert remote.server is not None
    monkeypatch.setattr(postgres, "SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(valkey_client, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(valkey_client, "CONNECT_SECONDS", 2)
    keys = make_keys(3)
    with TcpProxy(("127.0.0.1", remote.server.port)) as proxy, opened(remote.port(proxy.port)) as store:
        store.add(SERVICE, keys)
        proxy.black_hole()
        started = time.monotonic()
        assert refused(lambda: store.find_ids(SERVICE, ids(keys)), StoreUnavailable).retryable
        assert refused(lambda: store.count(SERVICE), StoreUnavailable).retryable
        assert time.monotonic() - started < 10
        proxy.heal()
        assert store.find_ids(SERVICE, ids(keys)) == by_id(keys)
        proxy.cut()
        assert store.find_ids(SERVICE, ids(keys)) == by_id(keys)


# ---- what is not ours --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("wrapped", b""),
        ("wrapped", bytes(71)),
        ("wrapped", bytes(73)),
        ("wrapped", "text"),
        ("key_id", bytes(15)),
        ("version", 0),
        ("version", -1),
        ("version", 2**32),
        ("version", "text"),
    ],
)
def test_what_is_no_key_is_said_so(place: Place, field: str, value: Any) -> None:
    bad, good = make_keys(2)
    with opened(place.url) as store:
        store.add(SERVICE, [bad, good])
        place.ruin(bad, field, value)
    with opened(place.url) as store:
        for call in (
            # An id of another length is never asked for.
            *([lambda: store.find_ids(SERVICE, [good.key_id, bad.key_id])] if field != "key_id" else []),
            lambda: store.find_subjects(SERVICE, [good.subject, bad.subject]),
            lambda: store.scan(SERVICE, b"", 10),
            lambda: store.add(SERVICE, [bad._replace(key_id=os.urandom(16))]),
        ):
            error = refused(call, StoreUnavailable)
            assert not error.retryable
            assert "text" not in str(error)
        if not isinstance(value, str):  # else all of a column became text
            assert store.find_ids(SERVICE, [good.key_id]) == by_id([good])


def test_a_lost_salt_is_not_replaced(place: Place) -> None:
    """Under a new salt nobody would find the subjects that are there, and a shred would miss them."""
    with opened(place.url) as store:
        store.add(SERVICE, make_keys(1))
        place.lose_salt()
    assert not refused(lambda: opened(place.url).__enter__(), StoreUnavailable).retryable


# ---- what is not told --------------------------------------------------------------------------------


def test_passwords_are_not_told(
    remote: Place, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    told: list[str] = []

    def tell(url: str, retryable: bool) -> None:
        try:
            with opened(url):
                raise AssertionError("it was opened")
        except StoreUnavailable as error:
            assert error.retryable is retryable
            assert error.__cause__ is None
            told.append("".join(traceback.format_exception(error)))

    wrong = f"{remote.password[:-4]}oops"
    tell(remote.url.replace(remote.password, wrong), False)
    tell(remote.port(1), True)
    with opened(remote.url) as store:
        told += [repr(store), str(store)]
    text = "".join(told) + caplog.text
    assert remote.password[:-4] not in text
