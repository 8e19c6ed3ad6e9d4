# SPDX-License-Identifier: Apache-2.0
"""The SoftHSM2 tokens that users test against: each lever does what its owner would do, and a root says so."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from openkcm.errors import (
    RootDenied,
    RootDestroyed,
    RootMisconfigured,
    RootThrottled,
    RootUnavailable,
)
from openkcm.roots import Root, open_root
from openkcm.roots.pkcs11.answers import ANSWERS
from openkcm.testing.softhsm import SoftHSM, SoftHSMKey
from support import refused

CONTEXT = {"tenant": "acme"}
SEALED = bytes(range(72))


@pytest.fixture(scope="module")
def provider() -> Iterator[SoftHSM]:
    """One provider; its folder stands in for that of other tests meanwhile."""
    with SoftHSM() as provider:
        yield provider


@pytest.fixture(scope="module")
def shared(provider: SoftHSM) -> SoftHSMKey:
    """A key for tests that leave it as it was."""
    return provider.make_key("shared")


@pytest.fixture
def key(shared: SoftHSMKey) -> Iterator[SoftHSMKey]:
    """The shared key, put right again."""
    yield shared
    shared.heal()
    shared.plug_in()
    shared.denied = frozenset()
    shared.enable()
    use(open_root(shared.uri))


def use(root: Root) -> None:
    assert root.unwrap(root.wrap(SEALED, CONTEXT), CONTEXT) == SEALED


def test_the_owners_levers(key: SoftHSMKey) -> None:
    root = open_root(key.uri)
    wrapped = root.wrap(SEALED, CONTEXT)
    for pull, release, answer in (
        (key.disable, key.enable, RootDenied),
        (key.deny, key.allow, RootDenied),
        (key.delete, key.enable, RootDestroyed),
        (key.unplug, key.plug_in, RootUnavailable),
    ):
        began = time.monotonic()
        pull()
        assert answer is RootUnavailable or (key.first_no is not None and key.first_no >= began)
        refused(lambda: root.unwrap(wrapped, CONTEXT), answer)
        refused(lambda: root.wrap(SEALED, CONTEXT), answer)
        refused(lambda: open_root(key.uri).wrap(SEALED, CONTEXT), answer)
        release()
        assert root.unwrap(wrapped, CONTEXT) == SEALED
        use(root)


def test_permissions_one_by_one(provider: SoftHSM, key: SoftHSMKey) -> None:
    root = open_root(key.uri)
    wrapped = root.wrap(SEALED, CONTEXT)
    wrap, unwrap = provider.permissions
    key.deny(wrap)
    assert root.unwrap(wrapped, CONTEXT) == SEALED
    error = refused(lambda: root.wrap(SEALED, CONTEXT), RootDenied)
    assert error.permission == wrap  # type: ignore[attr-defined]
    key.deny(unwrap)
    refused(lambda: root.unwrap(wrapped, CONTEXT), RootDenied)
    key.allow()
    assert root.unwrap(wrapped, CONTEXT) == SEALED


@pytest.mark.parametrize("kind", ["aes-wrap", "rsa"])
def test_other_kinds_of_keys(provider: SoftHSM, kind: str) -> None:
    key = provider.make_key(f"kind-{kind}", kind=kind)
    root = open_root(key.uri)
    wrapped = root.wrap(SEALED, CONTEXT)
    key.disable()
    refused(lambda: root.unwrap(wrapped, CONTEXT), RootDenied)
    key.enable()
    key.lie()
    assert root.unwrap(wrapped, CONTEXT) not in (SEALED, b"")
    key.heal()
    assert root.unwrap(wrapped, CONTEXT) == SEALED
    key.disable()
    key.destroy()
    refused(lambda: root.unwrap(wrapped, CONTEXT), RootDestroyed)


def test_destroyed_is_for_good(provider: SoftHSM) -> None:
    for number, deleted in enumerate((False, True)):
        key = provider.make_key(f"doomed-{number}")
        root = open_root(key.uri)
        use(root)
        if deleted:
            key.delete()
        key.destroy()
        key.enable()
        refused(lambda root=root: use(root), RootDestroyed)


def test_a_black_hole_is_real_and_ends(key: SoftHSMKey) -> None:
    root = open_root(key.uri)
    wrapped = root.wrap(SEALED, CONTEXT)
    key.black_hole()
    key.black_hole()
    began = time.monotonic()
    refused(lambda: root.unwrap(wrapped, CONTEXT), RootUnavailable)
    assert 2.5 < time.monotonic() - began < 8
    began = time.monotonic()
    refused(lambda: open_root(key.uri).wrap(SEALED, CONTEXT), RootUnavailable)
    assert time.monotonic() - began < 1
    key.heal()
    assert root.unwrap(wrapped, CONTEXT) == SEALED


def test_faults_of_the_module(key: SoftHSMKey) -> None:
    root = open_root(key.uri)
    before = key.requests
    wrapped = root.wrap(SEALED, CONTEXT)
    assert key.requests == before + 1
    key.slow(0.2)
    began = time.monotonic()
    assert root.unwrap(wrapped, CONTEXT) == SEALED
    assert time.monotonic() - began >= 0.2
    key.heal()
    for fault, answer in ((key.throttle, RootThrottled), (key.fail, RootUnavailable)):
        fault()
        refused(lambda: root.unwrap(wrapped, CONTEXT), answer)
        key.heal()
    key.lie()
    assert root.unwrap(wrapped, CONTEXT) not in (SEALED, b"")
    key.heal()
    assert root.unwrap(wrapped, CONTEXT) == SEALED


@pytest.mark.parametrize("code", sorted(ANSWERS))
def test_every_answer(key: SoftHSMKey, code: str) -> None:
    root = open_root(key.uri)
    wrapped = root.wrap(SEALED, CONTEXT)
    key.answer(code)
    refused(lambda: root.unwrap(wrapped, CONTEXT), ANSWERS[code])
    key.heal()
    assert root.unwrap(wrapped, CONTEXT) == SEALED


def test_answers_of_nobody(key: SoftHSMKey) -> None:
    with pytest.raises(ValueError, match="CKR_NONSENSE"):
        key.answer("CKR_NONSENSE")
    with pytest.raises(NotImplementedError):
        key.rotate()


def test_the_levers_work_on_another_process(key: SoftHSMKey) -> None:
    """As on a Core that runs as a service."""
    code = f"""
import sys
from openkcm.errors import OpenKCMError
from openkcm.roots import open_root
root = open_root({key.uri!r})
wrapped = root.wrap(b"x", {{}})
for line in sys.stdin:
    try:
        root.unwrap(wrapped, {{}})
        print("yes", flush=True)
    except OpenKCMError as error:
        print(type(error).__name__, flush=True)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None

        def answer() -> str:
            process.stdin.write("?\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            return process.stdout.readline().strip()  # type: ignore[union-attr]

        assert answer() == "yes"
        for pull, release, expected in (
            (key.disable, key.enable, "RootDenied"),
            (key.delete, key.enable, "RootDestroyed"),
            (key.unplug, key.plug_in, "RootUnavailable"),
            (key.black_hole, key.heal, "RootUnavailable"),
        ):
            pull()
            assert answer() == expected
            release()
            deadline = time.monotonic() + 5
            while (said := answer()) != "yes":
                assert said == "RootUnavailable"
                assert time.monotonic() < deadline
    finally:
        process.kill()
        process.communicate()


def test_one_provider_a_process(key: SoftHSMKey) -> None:
    with pytest.raises(RootMisconfigured, match="one folder"), SoftHSM():
        pass
    use(open_root(key.uri))


def test_it_leaves_nothing_behind(tmp_path: Path) -> None:
    code = """
import os, sys, threading
from openkcm.errors import OpenKCMError
from openkcm.roots import open_root
from openkcm.testing.softhsm import SoftHSM
provider = SoftHSM()
for _ in range(2):
    with provider:
        folder = os.path.dirname(os.environ["SOFTHSM2_CONF"])
        key = provider.make_key("one")
        root = open_root(key.uri)
        assert root.unwrap(root.wrap(b"x", {}), {}) == b"x"
        key.black_hole()
    assert not os.path.exists(folder)
    assert "SOFTHSM2_CONF" not in os.environ
    provider.stop()
try:
    provider.make_key("two")
except OpenKCMError as error:
    print(type(error).__name__)
"""
    environment = {name: value for name, value in os.environ.items() if name != "SOFTHSM2_CONF"}
    environment |= {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "TMPDIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "RootMisconfigured\n"
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []
