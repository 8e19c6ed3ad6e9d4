# SPDX-License-Identifier: Apache-2.0
"""The Core's seal key, and the file it lies in beside an embedded vault.

Invariant: 32 random bytes in a file that only its owner can read; they go between file and secret memory
without passing through a Python object. An existing vault never gets a new seal file.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from ..crypto import WrappingKey, generate_wrapping_key, random_bytes, read_wrapping_key, write_wrapping_key
from ..errors import SealError
from ..limits import KEY_BYTES


def make_seal(path: Path) -> None:
    """Write a new seal key, whole or not at all.

    Raises:
        SealError: a file is there already, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{random_bytes(8).hex()}.new")
    key = generate_wrapping_key()
    try:
        descriptor = os.open(
            temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
        try:
            write_wrapping_key(key, descriptor)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.link(temporary, path)  # unlike rename, never replaces a seal that is there
        sync_folder(path.parent)
    except FileExistsError:
        raise SealError(f"the seal file {path} is there already") from None
    except OSError as error:
        raise SealError(f"the seal file {path} cannot be written: {error.strerror}") from None
    finally:
        key.wipe()
        temporary.unlink(missing_ok=True)


def open_seal(path: Path) -> WrappingKey:
    """Read the seal key into secret memory.

    Raises:
        SealError: the file is missing, not this user's, open to others, or not 32 bytes.
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
        _check(path, os.fstat(descriptor))
        return read_wrapping_key(descriptor)
    finally:
        os.close(descriptor)


def _check(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise SealError(f"the seal file {path} is not a regular file")
    if status.st_uid != os.geteuid():
        raise SealError(f"the seal file {path} belongs to another user; chown it to the user that runs this")
    if status.st_mode & 0o077:
        raise SealError(
            f"the seal file {path} can be read by others; assume they have, then run: chmod 600 {path}"
        )
    if status.st_size != KEY_BYTES:
        raise SealError(f"the seal file {path} is damaged: it has {status.st_size} bytes and not {KEY_BYTES}")


def sync_folder(folder: Path) -> None:
    """Make a new name in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
