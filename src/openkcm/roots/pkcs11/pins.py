# SPDX-License-Identifier: Apache-2.0
"""The PIN of a token: from a file, from the environment or from a prompt.

Invariant: a PIN is read when a login needs it and is kept nowhere; it never stands in a URI or on a command line. A
prompt appears in the main thread on a terminal only: in a thread nobody would see it, and the thread would wait for
ever. A service therefore names a file or a variable, so that it can log in again after the token was taken out.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import stat
import sys
import threading
from pathlib import Path
from typing import Final

from ...errors import RootMisconfigured

PIN_VARIABLE: Final = "OPENKCM_PKCS11_PIN"
MAX_PIN_BYTES: Final = 1024

_OTHER_SCHEME: Final = re.compile(r"\||[a-z][a-z0-9+.-]*:", re.ASCII)
_WHERE: Final = f"pin-source=file:PATH or env:NAME in the URI, or {PIN_VARIABLE}"


class Pin:
    """A PIN on its way to the token."""

    __slots__ = ("prompted", "text")

    def __init__(self, text: str, *, prompted: bool = False) -> None:
        self.text = text
        self.prompted = prompted

    def __repr__(self) -> str:
        return "<Pin>"


class PinNeeded(Exception):
    """A login is needed; ``typed_before`` if the PIN of the login that was lost had been typed at a prompt."""

    def __init__(self, label: str, *, typed_before: bool = False) -> None:
        super().__init__()
        self.label = label
        self.typed_before = typed_before


def read_pin(source: str | None, needed: PinNeeded) -> Pin:
    """Read the PIN from its source, in the caller's thread.

    Raises:
        RootMisconfigured: there is no PIN, or it lies where others can read it.
    """
    if source is None:
        text = os.environ.get(PIN_VARIABLE)
        return Pin(_checked(text, PIN_VARIABLE)) if text is not None else _ask_for(needed)
    kind, _, rest = source.partition(":")
    if kind == "env" and rest:
        if rest not in os.environ:
            raise RootMisconfigured(f"the environment variable {rest}, the PIN's source, is not set")
        return Pin(_checked(os.environ[rest], rest))
    if kind == "file" and rest:
        return Pin(_from_file(Path(rest[2:] if rest.startswith("///") else rest)))
    if _OTHER_SCHEME.match(source):
        raise RootMisconfigured("a PIN's source is file:PATH or env:NAME")
    return Pin(_from_file(Path(source)))


def _ask_for(needed: PinNeeded) -> Pin:
    visible = (
        threading.current_thread() is threading.main_thread()
        and sys.stdin is not None
        and not sys.stdin.closed
        and sys.stdin.isatty()
    )
    if not visible and needed.typed_before:
        raise RootMisconfigured(
            f"the token {needed.label} must be logged in to again, and its PIN was typed at a prompt and kept nowhere; "
            f"a service needs {_WHERE}"
        )
    if not visible:
        raise RootMisconfigured(f"where is the PIN? {_WHERE}")
    text = ""
    with contextlib.suppress(EOFError):
        text = getpass.getpass(f"PIN of the token {needed.label}: ")
    return Pin(_checked(text, "the prompt"), prompted=True)


def _from_file(path: Path) -> str:
    try:
        # Not blocking, should it be a pipe; what it is, is asked of what was opened.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no path"
        raise RootMisconfigured(f"the PIN file {path} cannot be read: {reason}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_PIN_BYTES:
            raise RootMisconfigured(f"the PIN file {path} is not a file with a PIN in it")
        if status.st_mode & 0o077:
            raise RootMisconfigured(f"the PIN file {path} can be read by others; run: chmod 600 {path}")
        if status.st_uid not in (os.geteuid(), 0):
            raise RootMisconfigured(f"the PIN file {path} belongs to another user")
        return _checked(os.read(descriptor, MAX_PIN_BYTES).decode().rstrip("\r\n"), str(path))
    except OSError as error:
        raise RootMisconfigured(f"the PIN file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        pass  # not as the cause of what is raised: it holds the bytes
    finally:
        os.close(descriptor)
    raise RootMisconfigured(f"the PIN file {path} is not text in UTF-8")


def _checked(text: str, source: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        text = ""
    if not text:
        raise RootMisconfigured(f"the PIN from {source} is empty, or not text")
    return text
