# SPDX-License-Identifier: Apache-2.0
"""Where the PIN of a token comes from, and that no PIN is tried twice or shown."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from unittest import mock

import pytest

from openkcm.errors import (
    DecryptError,
    OpenKCMError,
    RootDenied,
    RootMisconfigured,
)
from openkcm.roots import open_root
from openkcm.roots.pkcs11.modules import module_at
from openkcm.roots.pkcs11.pins import PIN_VARIABLE, Pin, PinNeeded, read_pin
from softhsm import Token
from support import refused, run_python
from token_support import (
    CONTEXT,
    SEALED,
    VECTOR,
    at_a_terminal,
    use,
    without_source,
)

# ---- PINs ------------------------------------------------------------------------------------------------------


def test_where_the_pin_comes_from(token: Token, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def once(source: str | None) -> None:
        root = open_root(without_source(token) + ("" if source is None else f"&pin-source={source}"))
        try:
            use(root)
        finally:
            root.close()

    once(f"file:{token.pin_file}")
    once(f"file://{token.pin_file}")
    once(str(token.pin_file))
    monkeypatch.setenv("THE_PIN", token.pin)
    once("env:THE_PIN")
    monkeypatch.setenv(PIN_VARIABLE, token.pin)
    once(None)
    monkeypatch.delenv(PIN_VARIABLE)
    with mock.patch("sys.stdin", None):
        assert "pin-source" in str(refused(lambda: once(None), RootMisconfigured))
    refused(lambda: once("env:NOT_SET"), RootMisconfigured)
    refused(lambda: once(f"file:{tmp_path / 'none'}"), RootMisconfigured)
    refused(lambda: once("https://example.com/pin"), RootMisconfigured)
    refused(lambda: once("%7C/bin/cat%20/pin"), RootMisconfigured)
    token.pin_file.chmod(0o644)
    assert "chmod" in str(refused(lambda: once(f"file:{token.pin_file}"), RootMisconfigured))


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe-secret", b"x" * 2000])
def test_files_that_hold_no_pin(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pin"
    path.touch(mode=0o600)
    path.write_bytes(content)
    error = refused(lambda: read_pin(f"file:{path}", PinNeeded("token")), RootMisconfigured)
    assert error.__context__ is None
    assert "secret" not in repr(error)


def test_a_pin_file_that_is_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pin", 0o600)
    refused(lambda: read_pin(f"file:{tmp_path / 'pin'}", PinNeeded("token")), RootMisconfigured)
    refused(lambda: read_pin(f"file:{tmp_path}", PinNeeded("token")), RootMisconfigured)
    refused(lambda: read_pin("file:a\0b", PinNeeded("token")), RootMisconfigured)


def test_a_prompt(token: Token, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PIN_VARIABLE, raising=False)
    root = open_root(without_source(token))
    with at_a_terminal(token.pin):
        use(root)
        wrapped = root.wrap(SEALED, CONTEXT)
    with at_a_terminal():
        assert root.unwrap(wrapped, CONTEXT) == SEALED, "typed once"
    root.close()
    with at_a_terminal(""):
        refused(lambda: use(root), RootMisconfigured)
    with at_a_terminal("wrong"):
        refused(lambda: use(root), RootDenied)
    with at_a_terminal("wrong"):
        refused(lambda: use(root), RootDenied)
    with at_a_terminal(token.pin):
        use(root)
    root.close()


def test_a_login_that_was_typed_cannot_be_made_again_by_a_service(
    token: Token, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No prompt in a thread: nobody would see it. The message says what a service needs instead."""
    monkeypatch.delenv(PIN_VARIABLE, raising=False)
    root = open_root(without_source(token))
    with at_a_terminal(token.pin):
        wrapped = root.wrap(SEALED, CONTEXT)
    found: list[object] = []

    def probe() -> None:
        try:
            found.append(root.unwrap(wrapped, CONTEXT))
        except OpenKCMError as error:
            found.append(error)

    def in_a_thread() -> object:
        with at_a_terminal():
            thread = threading.Thread(target=probe)
            thread.start()
            thread.join(10)
        return found.pop()

    assert in_a_thread() == SEALED
    root.close()
    error = in_a_thread()
    assert type(error) is RootMisconfigured
    assert "typed at a prompt" in str(error)
    assert "pin-source" in str(error)
    with at_a_terminal(token.pin):
        assert root.unwrap(wrapped, CONTEXT) == SEALED
    root.close()


def test_a_wrong_pin_is_tried_once(token: Token, tmp_path: Path) -> None:
    """Many operations of several roots and children make one login, and the error never holds the PIN."""
    wrong = tmp_path / "wrong"
    wrong.touch(mode=0o600)
    wrong.write_text("0000-wrong")
    code = f"""
import os
from openkcm.errors import RootDenied
from openkcm.roots import open_root
from openkcm.roots.pkcs11.functions import Functions
call, logins = Functions.log_in, []
def counting(self, session, pin):
    logins.append(os.getpid())
    return call(self, session, pin)
Functions.log_in = counting
def attempt():
    for _ in range(20):
        root = open_root({token.uri.replace(str(token.pin_file), str(wrong))!r})
        try:
            root.wrap(b"x", {{}})
        except RootDenied as error:
            assert "0000-wrong" not in repr(error) + str(error)
        else:
            raise SystemExit("it was not refused")
attempt()
if os.fork() == 0:
    attempt()
    os._exit(len(logins) - 1)
assert os.wait()[1] == 0, "a child tries again"
print(len(logins))
"""
    assert run_python(code).stdout == "1\n"
    use(open_root(token.uri))


def frames_of(error: BaseException | None) -> str:
    """Everything that our frames of an error, of its cause and its context hold."""
    text = ""
    while error is not None:
        trace = error.__traceback__
        while trace is not None:
            if "/roots/" in trace.tb_frame.f_code.co_filename:
                for value in trace.tb_frame.f_locals.values():
                    text += repr(getattr(value, "text", value)) + repr(getattr(value, "args", ""))
            trace = trace.tb_next
        error = error.__cause__ or error.__context__
    return text


def test_nothing_secret_is_shown(token: Token, caplog: pytest.LogCaptureFixture) -> None:
    root = open_root(token.uri)
    with caplog.at_level(logging.DEBUG):
        use(root)
        refused(lambda: root.unwrap(VECTOR, CONTEXT), DecryptError)
    module = module_at(token.module)
    assert token.pin not in repr(root) + root.uri + str(vars(root)) + str(vars(module)) + caplog.text
    assert token.pin not in repr(token)
    assert repr(Pin(token.pin)) == "<Pin>"
    root.close()
    token.pin_file.write_text("refused-" + token.pin)
    error = refused(lambda: use(root), RootDenied)
    assert token.pin not in str(error) + repr(error) + frames_of(error)
    assert error.__context__ is None
