# SPDX-License-Identifier: Apache-2.0
"""Writes and reads the files of the CA's folder.

Invariant: a file is there whole and on disk, or as it was before; a private key is never readable by others, not
even while it is written, and one that others could read is not used.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from ..errors import ConfigurationError


def write(path: Path, data: bytes, mode: int, *, replace: bool = False) -> None:
    """Write a file, whole or not at all.

    Raises:
        FileExistsError: there is one, and ``replace`` is not given.
        OSError: it cannot be written.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(descriptor)
        if replace:
            os.replace(draft, path)
        else:
            os.link(draft, path)  # unlike a rename, this never replaces one that is there
    finally:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()
    sync(path.parent)


def switch(link: Path, target: Path) -> None:
    """Point a symbolic link somewhere else, or make it, in one step."""
    draft = link.with_name(f".{link.name}.{secrets.token_hex(8)}.part")
    draft.symlink_to(target)
    try:
        os.replace(draft, link)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync(link.parent)


def sync(folder: Path) -> None:
    """Make new names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time change a folder; the lock goes with the process that held it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def read_certificate(path: Path) -> x509.Certificate:
    """Read a certificate in PEM.

    Raises:
        ConfigurationError: the file is missing or holds none.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except FileNotFoundError:
        raise ConfigurationError(f"{path} is missing; put it back, or make the CA anew elsewhere") from None
    except (ValueError, x509.InvalidVersion):
        raise ConfigurationError(f"{path} holds no certificate in PEM; put the right file back") from None


def read_ca_key(path: Path, certificate: x509.Certificate) -> ec.EllipticCurvePrivateKey:
    """Read the CA's private key.

    Raises:
        ConfigurationError: it is missing, not this user's, readable by others, or not the certificate's.
    """
    data = _read_private(path)
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError):
        raise ConfigurationError(f"{path} holds no private key in PEM; put the right file back") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ConfigurationError(f"{path} is not the key of the CA's certificate; put the right file back")
    return key


def _read_private(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO).lower()
        raise ConfigurationError(f"the CA's key {path} cannot be read: {reason}") from None
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise ConfigurationError(f"the CA's key {path} is not a file of this user's")
        if status.st_mode & 0o077:
            raise ConfigurationError(
                f"the CA's key {path} can be read by others; assume they have, and make a new CA"
            )
        return stream.read()
