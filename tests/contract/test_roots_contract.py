# SPDX-License-Identifier: Apache-2.0
"""One suite over every root: the same cases, the same answers."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from openkcm.errors import DecryptError, RootDestroyed, RootDisabled
from openkcm.roots import Root, open_root, pkcs11
from softhsm import Token
from support import refused

CONTEXT = {"layer": "L2", "tenant": "acme", "region": "local", "version": "1"}
SEALED = bytes(range(72))


@dataclass
class Case:
    """A root, another root of the same provider, and how its customer takes the key away."""

    root: Root
    other: Root
    development: bool
    remove: Callable[[], None]
    answer: type[Exception]


@pytest.fixture(params=["local", "pkcs11"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    if request.param == "local":
        root, other = (open_root(f"local:{tmp_path / name}", create=True) for name in ("a", "b"))
        return Case(root, other, True, (tmp_path / "a").unlink, RootDisabled)
    token: Token = request.getfixturevalue("token")
    uri = token.add_key("doomed", b"\x03")
    root = open_root(uri)
    root.warnings()

    def remove() -> None:
        with root._find_token(pkcs11._module(token.module)).open(rw=True) as session:  # type: ignore[attr-defined]
            session.get_key(label="doomed").destroy()

    return Case(root, open_root(token.add_key("other", b"\x02")), False, remove, RootDestroyed)


def test_round_trip(case: Case) -> None:
    wrapped = case.root.wrap(SEALED, CONTEXT)
    assert case.root.unwrap(wrapped, CONTEXT) == SEALED
    assert case.root.wrap(SEALED, CONTEXT) != wrapped
    assert SEALED not in wrapped
    assert case.root.development is case.development
    assert bool(case.root.warnings()) is case.development


def test_the_uri_finds_the_same_root(case: Case) -> None:
    wrapped = case.root.wrap(SEALED, CONTEXT)
    again = open_root(case.root.uri)
    assert again.uri == case.root.uri
    assert again.unwrap(wrapped, CONTEXT) == SEALED


@pytest.mark.parametrize(
    "change", [{"tenant": "globex"}, {"region": "us"}, {"version": "2"}, {"layer": "L3"}, {"x": "y"}]
)
def test_the_context_is_bound(case: Case, change: dict[str, str]) -> None:
    wrapped = case.root.wrap(SEALED, CONTEXT)
    refused(lambda: case.root.unwrap(wrapped, CONTEXT | change), DecryptError)
    refused(lambda: case.root.unwrap(wrapped, {}), DecryptError)


def test_every_byte_counts(case: Case) -> None:
    wrapped = case.root.wrap(SEALED, CONTEXT)
    for at in range(len(wrapped)):
        altered = wrapped[:at] + bytes([wrapped[at] ^ 0x80]) + wrapped[at + 1 :]
        refused(lambda altered=altered: case.root.unwrap(altered, CONTEXT), DecryptError)
    for wrong in (b"", wrapped[:-1], wrapped[:5], wrapped + b"x", os.urandom(len(wrapped))):
        refused(lambda wrong=wrong: case.root.unwrap(wrong, CONTEXT), DecryptError)
    assert case.root.unwrap(wrapped, CONTEXT) == SEALED


def test_another_root_does_not_open_it(case: Case) -> None:
    refused(lambda: case.other.unwrap(case.root.wrap(SEALED, CONTEXT), CONTEXT), DecryptError)


def test_a_key_that_is_gone(case: Case) -> None:
    wrapped = case.root.wrap(SEALED, CONTEXT)
    case.remove()
    refused(lambda: case.root.unwrap(wrapped, CONTEXT), case.answer)
    refused(lambda: case.root.wrap(SEALED, CONTEXT), case.answer)
    assert case.other.unwrap(case.other.wrap(SEALED, CONTEXT), CONTEXT) == SEALED


def test_eight_threads(case: Case) -> None:
    wrapped = case.root.wrap(SEALED, CONTEXT)
    wrong: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(25):
                assert case.root.unwrap(wrapped, CONTEXT) == SEALED
                assert case.other.unwrap(case.other.wrap(SEALED, CONTEXT), CONTEXT) == SEALED
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_a_forked_child(case: Case) -> None:
    wrapped = case.root.wrap(SEALED, CONTEXT)
    pids = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                assert case.root.unwrap(wrapped, CONTEXT) == SEALED
                assert case.root.unwrap(case.root.wrap(SEALED, CONTEXT), CONTEXT) == SEALED
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    assert case.root.unwrap(wrapped, CONTEXT) == SEALED


def test_closing_lets_go_and_use_comes_back(case: Case) -> None:
    wrapped = case.root.wrap(SEALED, CONTEXT)
    case.root.close()
    assert case.root.unwrap(wrapped, CONTEXT) == SEALED
