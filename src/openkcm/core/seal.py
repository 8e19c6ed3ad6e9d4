# SPDX-License-Identifier: Apache-2.0
"""The Core's seal key, and the file it lies in beside an embedded vault.

Invariant: 32 random bytes in a file that only its owner can read; they go between file and secret memory
without passing through a Python object; or a file of the form of ``rooted_seal``. An existing vault never gets a new
seal file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

from ..crypto import WrappingKey, generate_wrapping_key, random_bytes, read_wrapping_key, write_wrapping_key
from ..errors import SealError
from ..limits import KEY_BYTES
from ..systemd import is_credential
from . import rooted_seal


def make_seal(path: Path) -> None:
    """Write a new seal key, whole or not at all.

    Raises:
        SealError: a file is there already, or the folder cannot be written.
    """
    key = generate_wrapping_key()
    try:
        _write(path, lambda descriptor: write_wrapping_key(key, descriptor))
    finally:
        key.wipe()


def wrap_seal(source: Path, uri: str, target: Path) -> None:
    """Write a seal key in the form that opens only through a root of the operator's own.

    Raises:
        SealError: the source cannot be read, or the target is there already or cannot be written.
        RootMisconfigured, RootDenied, RootDisabled, RootDestroyed, RootUnavailable: the root's answer.
    """
    key = open_seal(source)
    try:
        _write(target, lambda descriptor: rooted_seal.make(key, uri, descriptor))
    finally:
        key.wipe()


def _write(path: Path, write: Callable[[int], None]) -> None:
    """Make a private file, whole or not at all."""
    temporary: Path | None = None
    try:
        # Where the file system allows it, the file has no other name: a kill leaves no second one to the key.
        descriptor = _open_unnamed(path.parent)
        if descriptor is None:
            temporary = path.with_name(f".{path.name}.{random_bytes(8).hex()}.new")
            descriptor = os.open(
                temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
            )
        try:
            write(descriptor)
            os.fsync(descriptor)
            _link(temporary or Path(f"/proc/self/fd/{descriptor}"), path)
        finally:
            os.close(descriptor)
        sync_folder(path.parent)
    except FileExistsError:
        raise SealError(f"the seal file {path} is there already") from None
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO)
        raise SealError(f"the seal file {path} cannot be written: {reason}") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):  # not there, or in a folder that may not be looked into
                temporary.unlink()


def _open_unnamed(folder: Path) -> int | None:
    """A new file without a name, or None where there is no such thing."""
    if not os.path.isdir("/proc/self/fd"):
        return None
    # Whatever else stands in the way is then met, and told, in making a file with a name.
    with contextlib.suppress(OSError, AttributeError):
        return os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    return None


def _link(source: Path, target: Path) -> None:
    """Name a file; unlike a rename, this never replaces one that is there."""
    # With a directory given, os.link follows the symbolic link that an open file is in /proc; both paths are absolute.
    folder = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.link(source.absolute(), target.absolute(), src_dir_fd=folder)
    finally:
        os.close(folder)


def open_seal(path: Path) -> WrappingKey:
    """Read the seal key into secret memory.

    Raises:
        SealError: the file is missing, not this user's, open to others, or of neither form.
        RootDenied, RootDisabled, RootDestroyed, RootUnavailable: the answer of the root that it opens through.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise SealError(
            f"the seal file {path} is missing; without it nothing opens. Put the copy you kept back there"
        ) from None
    except PermissionError:
        raise SealError(
            f"the seal file {path} may not be read by this user; run as the user that made it"
        ) from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise SealError(
                f"the seal file {path} is a symbolic link; name the file itself (seal=PATH)"
            ) from None
        raise SealError(f"the seal file {path} cannot be opened: {error.strerror}") from None
    try:
        status = os.fstat(descriptor)
        _check(path, status)
        key = read_wrapping_key(descriptor)
        if status.st_size == KEY_BYTES:
            return key
        return rooted_seal.open_rest(key, os.read(descriptor, rooted_seal.MAX_BYTES), path)
    finally:
        os.close(descriptor)


def _check(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise SealError(f"the seal file {path} is not a regular file")
    credential = is_credential(path)
    if status.st_uid != os.geteuid() and not (credential and status.st_uid == 0):
        raise SealError(f"the seal file {path} belongs to another user; chown it to the user that runs this")
    if status.st_mode & (0o007 if credential else 0o077):
        raise SealError(
            f"the seal file {path} can be read by others; assume they have, then run: chmod 600 {path}"
        )
    if status.st_size != KEY_BYTES and not KEY_BYTES + 9 < status.st_size <= rooted_seal.MAX_BYTES:
        raise SealError(f"the seal file {path} is damaged: it has {status.st_size} bytes and not {KEY_BYTES}")


def sync_folder(folder: Path) -> None:
    """Make a new name in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
