# SPDX-License-Identifier: Apache-2.0
"""Sessions that are lost, tokens that come and go, and modules that hang; all from outside, with SoftHSM2."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest

from openkcm.errors import (
    RootDenied,
    RootDestroyed,
    RootUnavailable,
)
from openkcm.roots import Root, open_root
from openkcm.roots.pkcs11.modules import _modules, module_at
from openkcm.roots.pkcs11.pins import PIN_VARIABLE
from softhsm import Token
from support import refused, run_python
from token_support import (
    CONTEXT,
    SEALED,
    at_a_terminal,
    make,
    use,
)


@pytest.fixture
def neighbour(token: Token, request: pytest.FixtureRequest, softhsm_folder: Path) -> Root:
    """A root on another token of the same module."""
    from openkcm.roots.pkcs11.keys import create_token_key
    from openkcm.roots.pkcs11.softhsm import init_token

    made = init_token(softhsm_folder, f"next-to-{token.label}")
    module_at(token.module).forget_tokens()
    return open_root(create_token_key(token.module, made.label, made.pin_source, "root"))


# ---- sessions that are lost ------------------------------------------------------------------------------------


def test_two_roots_on_one_token_share_its_login(token: Token) -> None:
    one, two = open_root(token.uri), open_root(token.add_key("second", b"\x05"))
    use(one)
    use(two)
    one.close()
    use(two)
    by_slot = open_root(re.sub(r"token=[^;]*", f"serial={serial(token)}", token.uri))
    use(by_slot)
    assert len(module_at(token.module)._logins) >= 1
    held = {id(login) for root in (two, by_slot) for login, _ in [root._held]}  # type: ignore[attr-defined]
    assert len(held) == 1, "however their URIs name the token"


def serial(token: Token) -> str:
    import pkcs11 as binding

    tokens = (slot.get_token() for slot in binding.lib(token.module).get_slots(token_present=True))
    return next(found.serial.decode() for found in tokens if found.label == token.label)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the binding's own clean-up
def test_a_session_that_was_lost_is_opened_again(token: Token) -> None:
    root, second = open_root(token.uri), open_root(token.uri)
    wrapped = root.wrap(SEALED, CONTEXT)
    for login in list(module_at(token.module)._logins.values()):
        login.session.close()
    assert second.unwrap(wrapped, CONTEXT) == SEALED
    assert root.unwrap(wrapped, CONTEXT) == SEALED


def test_another_part_of_the_process_logs_out(token: Token) -> None:
    """C_Logout ends every session's login: the key is no longer seen, and must not be called destroyed."""
    import pkcs11 as binding

    root = open_root(token.uri)
    root.close()
    theirs = next(
        slot.get_token()
        for slot in binding.lib(token.module).get_slots(token_present=True)
        if slot.get_token().label == token.label
    ).open(user_pin=token.pin)
    wrapped = root.wrap(SEALED, CONTEXT)
    theirs.close()
    assert root.unwrap(wrapped, CONTEXT) == SEALED
    fresh = open_root(token.uri)
    assert fresh.unwrap(wrapped, CONTEXT) == SEALED


def test_another_part_of_the_process_finalises_the_module(token: Token) -> None:
    import pkcs11 as binding

    root = open_root(token.uri)
    wrapped = root.wrap(SEALED, CONTEXT)
    binding.lib(token.module).finalize()
    assert root.unwrap(wrapped, CONTEXT) == SEALED


def test_roots_that_are_forgotten_leave_nothing(token: Token) -> None:
    """Roots that were never closed do not keep the login's users alive."""
    root = open_root(token.uri)
    use(root)
    for _ in range(100):
        use(open_root(token.uri))
    gc.collect()
    login, _ = root._held  # type: ignore[attr-defined]
    assert len(login.users) == 1
    threads = [thread for thread in threading.enumerate() if thread.name == "openkcm-pkcs11"]
    assert len(threads) <= len(_modules), "one for each module"


# ---- tokens that come and go -----------------------------------------------------------------------------------


def test_a_token_taken_out_and_put_back(token: Token, softhsm_folder: Path) -> None:
    """From outside, while a session is open; it is not called destroyed, and others go on."""
    root, away = open_root(token.uri), softhsm_folder / "away"
    wrapped = root.wrap(SEALED, CONTEXT)
    neighbour = open_root(token.uri)
    for _ in range(3):
        token.place.rename(away)
        for _ in range(3):
            refused(lambda: root.unwrap(wrapped, CONTEXT), RootUnavailable)
            refused(lambda: neighbour.wrap(SEALED, CONTEXT), RootUnavailable)
        away.rename(token.place)
        module_at(token.module)._reloads.clear()  # seconds have passed
        assert root.unwrap(wrapped, CONTEXT) == SEALED
        use(neighbour)


def test_a_neighbour_goes_on_while_a_token_is_away(
    token: Token, neighbour: Root, softhsm_folder: Path
) -> None:
    root, away = open_root(token.uri), softhsm_folder / "away"
    wrapped = root.wrap(SEALED, CONTEXT)
    use(neighbour)
    token.place.rename(away)
    try:
        for _ in range(3):
            use(neighbour)
            refused(lambda: root.unwrap(wrapped, CONTEXT), RootUnavailable)
            neighbour.close()
            use(neighbour)
    finally:
        away.rename(token.place)
    module_at(token.module)._reloads.clear()
    assert root.unwrap(wrapped, CONTEXT) == SEALED


def test_a_neighbour_whose_pin_was_typed_is_not_logged_out_for_others(
    token: Token, neighbour: Root, softhsm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PIN_VARIABLE, raising=False)
    neighbour.close()
    pin = Path(neighbour.uri.partition("pin-source=file:")[2]).read_text()
    typed = open_root(re.sub(r"&pin-source=.*", "", neighbour.uri))
    root, away = open_root(token.uri), softhsm_folder / "away"
    with at_a_terminal(pin):
        use(typed)
    wrapped = root.wrap(SEALED, CONTEXT)
    token.place.rename(away)
    try:
        with at_a_terminal():
            for _ in range(3):
                refused(lambda: root.unwrap(wrapped, CONTEXT), RootUnavailable)
                use(typed)
    finally:
        away.rename(token.place)
    typed.close()
    assert root.unwrap(wrapped, CONTEXT) == SEALED


def test_a_key_deleted_by_another_process(token: Token) -> None:
    root = open_root(make(token, "doomed", 9))
    wrapped = root.wrap(SEALED, CONTEXT)
    objects = list(token.place.glob("*.object"))
    code = """
import sys, pkcs11
module, label, pin = sys.argv[1:]
session = pkcs11.lib(module).get_token(token_label=label).open(rw=True, user_pin=pin)
session.get_key(label="doomed").destroy()
"""
    run_python(code, token.module, token.label, token.pin)
    assert len(list(token.place.glob("*.object"))) == len(objects) - 1
    for _ in range(5):
        refused(lambda: root.unwrap(wrapped, CONTEXT), RootDestroyed)
        refused(lambda: root.wrap(SEALED, CONTEXT), RootDestroyed)
    use(open_root(token.uri))


def test_a_key_that_is_restored_from_a_backup(token: Token, softhsm_folder: Path) -> None:
    root = open_root(token.uri)
    wrapped = root.wrap(SEALED, CONTEXT)
    (path,) = (path for path in token.place.glob("*.object") if path.name != "token.object")
    away = softhsm_folder / "backup"
    for _ in range(3):
        path.rename(away)
        refused(lambda: root.unwrap(wrapped, CONTEXT), RootDestroyed)
        away.rename(path)
        module_at(token.module)._reloads.clear()
        assert root.unwrap(wrapped, CONTEXT) == SEALED


def test_a_token_initialised_anew_by_another_process(token: Token, softhsm_folder: Path) -> None:
    """Its keys are gone with it, and it has a PIN of its own."""
    from openkcm.roots.pkcs11.softhsm import init_token

    root = open_root(token.uri)
    wrapped = root.wrap(SEALED, CONTEXT)
    shutil.rmtree(token.place)
    refused(lambda: root.unwrap(wrapped, CONTEXT), RootUnavailable)
    made = init_token(softhsm_folder, token.label)
    refused(lambda: root.unwrap(wrapped, CONTEXT), RootDenied)
    token.pin_file.write_text(made.pin_file.read_text())
    refused(lambda: root.unwrap(wrapped, CONTEXT), RootDestroyed)


def test_processes_that_log_in_at_one_moment(token: Token) -> None:
    """SoftHSM2 rewrites the token's file at each login, and tells others meanwhile that it is not there."""
    code = f"""
import sys
from openkcm.roots import open_root
root = open_root({token.uri!r})
sys.stdin.readline()
for _ in range(20):
    assert root.unwrap(root.wrap(b"x", {{}}), {{}}) == b"x"
    root.close()
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", code]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
        for _ in range(3)
    ]
    said = [process.communicate(b"go\n", timeout=120)[1].decode() for process in children]
    assert [process.returncode for process in children] == [0, 0, 0], said


# ---- a module that hangs, for real ------------------------------------------------------------------------------


HOLDER = """
import fcntl, glob, sys
files = [open(path, "r+b") for path in glob.glob(sys.argv[1] + "/*.object")]
for file in files:
    fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_process_ends_while_a_call_hangs(token: Token) -> None:
    """And so does an interrupt: the caller waits in Python, not in the module."""
    code = f"""
import os, signal, sys, threading, time
from openkcm.errors import RootUnavailable
from openkcm.roots import open_root
root = open_root({token.uri!r})
wrapped = root.wrap(b"x", {{}})
print("ready", flush=True)
sys.stdin.readline()
began = time.monotonic()
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    root.unwrap(wrapped, {{}})
except KeyboardInterrupt:
    pass
try:
    root.unwrap(wrapped, {{}})
except RootUnavailable:
    print("told", time.monotonic() - began < 2.5)
sys.exit(3)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    user = subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes)
    assert user.stdout is not None
    assert user.stdout.readline() == "ready\n"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(token.place)], **pipes)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        began = time.monotonic()
        assert user.communicate("go\n", timeout=30)[0] == "told True\n"
        assert user.returncode == 3
        assert time.monotonic() - began < 10
    finally:
        user.kill()
        user.communicate()
        holder.communicate()


def test_a_copy_of_the_module_is_apart(token: Token, neighbour: Root, tmp_path: Path) -> None:
    """One module has one thread; a customer who must not wait for another's HSM gets a copy of the file."""
    copy = shutil.copy(token.module, tmp_path / "copy.so")
    apart = open_root(re.sub(r"module-path=[^&]*", f"module-path={copy}", neighbour.uri))
    root = open_root(token.uri)
    use(apart)
    use(neighbour)
    wrapped = root.wrap(SEALED, CONTEXT)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(token.place)], **pipes)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with mock.patch("openkcm.roots.pkcs11.root.ANSWER_SECONDS", 0.3):
            refused(lambda: root.unwrap(wrapped, CONTEXT), RootUnavailable)
            refused(lambda: use(neighbour), RootUnavailable)
        began = time.monotonic()
        use(apart)
        assert time.monotonic() - began < 1
    finally:
        holder.communicate()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with contextlib.suppress(RootUnavailable):
            use(neighbour)
            break
    assert root.unwrap(wrapped, CONTEXT) == SEALED
