# SPDX-License-Identifier: Apache-2.0
"""``local:PATH``, a root key in a file, for development only.

Invariant: the file is this user's, 0600 and 32 bytes, and once made it is never made anew. Renaming it away
plays the customer who pulls the plug: the root then answers "disabled".

A wrapped blob is ``01 || nonce 12 || AES-256-GCM ciphertext and tag``, the context being associated data.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shlex
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ..context import encode_context
from ..errors import DecryptError, RootDenied, RootDisabled, RootMisconfigured, RootUnavailable
from ..limits import KEY_BYTES, NONCE_BYTES, TAG_BYTES
from .base import Grant

_FORMAT: Final = b"\x01"


class LocalRoot:
    """A root key in a file; read at every use, so that removing the file acts at once."""

    development = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self.uri = f"local:{path}"

    def wrap(self, sealed: bytes, context: Mapping[str, str]) -> bytes:
        """Encrypt ``sealed`` with the file's key, binding the context."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        nonce = os.urandom(NONCE_BYTES)
        return _FORMAT + nonce + AESGCM(self._key()).encrypt(nonce, sealed, encode_context(context))

    def unwrap(self, wrapped: bytes, context: Mapping[str, str]) -> bytes:
        """Return what ``wrap`` was given; DecryptError for anything else."""
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        key = self._key()
        if len(wrapped) < 1 + NONCE_BYTES + TAG_BYTES or wrapped[:1] != _FORMAT:
            raise DecryptError
        nonce, rest = wrapped[1 : 1 + NONCE_BYTES], wrapped[1 + NONCE_BYTES :]
        try:
            return AESGCM(key).decrypt(nonce, rest, encode_context(context))
        except InvalidTag:
            raise DecryptError from None

    def warnings(self) -> list[str]:
        """A root in a file is for development only."""
        return [f"{self.uri} is a development root: its key lies in a file on this machine"]

    def grant(self, identity: str | None = None) -> Grant:
        """Say whose file it must be."""
        who = identity or _user()
        text = (
            f"chown {shlex.quote(who)} {shlex.quote(str(self.path))}\nchmod 600 {shlex.quote(str(self.path))}"
        )
        return Grant("shell commands", text, ("read the file",), who)

    def switch_off(self) -> None:
        """Rename the file away: the root answers "disabled"."""
        self._rename(self.path, self._unplugged)

    def switch_on(self) -> None:
        """Rename the file back."""
        self._rename(self._unplugged, self.path)

    @property
    def _unplugged(self) -> Path:
        return self.path.with_name(f"{self.path.name}.unplugged")

    def _rename(self, here: Path, there: Path) -> None:
        if not os.path.exists(here) and os.path.exists(there):
            return
        try:
            os.rename(here, there)
        except OSError as error:
            raise RootMisconfigured(f"the file {here} cannot be renamed: {error.strerror}") from None

    def close(self) -> None:
        """Nothing is held open."""

    def _key(self) -> bytes:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise RootDisabled(f"the development root {self.path} is not there; put the file back") from None
        except PermissionError:
            raise RootDenied(f"the development root {self.path} may not be read by this user") from None
        except OSError as error:
            raise RootUnavailable(
                f"the development root {self.path} does not answer: {error.strerror}"
            ) from None
        try:
            _check(self.path, os.fstat(descriptor))
            return os.read(descriptor, KEY_BYTES)
        finally:
            os.close(descriptor)


def open_local(uri: str, *, create: bool = False) -> LocalRoot:
    """Open ``local:PATH``; a relative path counts from the current folder and is kept absolute."""
    path = uri.removeprefix("local:")
    if not path or "\0" in path:
        raise RootMisconfigured("a development root is local:PATH")
    place = Path(path).absolute()
    if create and not os.path.exists(place):
        _make(place)
    return LocalRoot(place)


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _make(path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        descriptor = os.open(
            temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
        try:
            os.write(descriptor, os.urandom(KEY_BYTES))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.link(temporary, path)  # unlike rename, never replaces a key that is there
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except FileExistsError:
        pass  # another process made it first; that one counts
    except OSError as error:
        raise RootMisconfigured(f"the development root {path} cannot be made: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):  # not there, or in a folder that may not be looked into
            temporary.unlink()


def _check(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode) or status.st_size != KEY_BYTES:
        raise RootMisconfigured(f"the development root {path} is not a file of {KEY_BYTES} bytes")
    if status.st_uid != os.geteuid():
        raise RootMisconfigured(f"the development root {path} belongs to another user")
    if status.st_mode & 0o077:
        raise RootMisconfigured(f"the development root {path} can be read by others; run: chmod 600 {path}")
