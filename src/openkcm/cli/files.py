# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all.

Invariant: until the last byte is on disk the target is what it was before, whatever ends the process; and
where the file system allows it, the new file has no name until then, so that not even ``kill -9`` leaves a
part of it (which might be plaintext) behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

from ..errors import InvalidInput

STANDARD: Final = "-"
PRIVATE_MODE: Final = 0o600
BUFFER_BYTES: Final = 1024 * 1024
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class TargetExists(FileExistsError):
    """The output file is there and was not to be replaced."""

    hint = "--force replaces it, --output names another"


@contextlib.contextmanager
def reading(name: str) -> Iterator[BinaryIO]:
    """Open a file, or standard input for ``-``, for reading bytes.

    Raises:
        InvalidInput: standard input is a terminal, or the name is a directory.
    """
    if name == STANDARD:
        if sys.stdin.isatty():
            raise InvalidInput("nothing to read: name a file, or pipe data in")
        yield sys.stdin.buffer
        return
    if Path(name).is_dir():
        raise InvalidInput(f"{name} is a directory; name a file")
    with open(name, "rb", buffering=BUFFER_BYTES) as source:
        yield source


@contextlib.contextmanager
def writing(name: str, *, force: bool = False, like: str | None = None) -> Iterator[BinaryIO]:
    """Open a new file, or standard output for ``-``, for writing bytes.

    Args:
        force: replace a file of that name; otherwise it is an error if there is one.
        like: a file whose permissions (and owner, where allowed) the new one takes; a new file is otherwise
            for its owner only.

    Raises:
        TargetExists: the file is there and ``force`` is not given.
    """
    if name == STANDARD:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    target = Path(name).resolve() if force else Path(name)
    if not force and os.path.lexists(target):
        raise _exists(target)
    if target.exists() and not target.is_file():
        # A pipe or a device is written to, not replaced.
        with open(target, "wb") as stream:
            yield stream
        return
    try:
        with _draft(target) as draft:
            _take_mode(draft.stream.fileno(), like, target)
            yield draft.stream
            draft.publish(target, replace=force)
    except OSError as error:
        if error.errno in _FULL and error.filename is None:
            error.filename = str(target)  # a failed write names no file
        raise


class _Draft:
    """A file being written, and the name, if any, that it goes by until it is whole."""

    def __init__(self, target: Path) -> None:
        self.directory = os.open(target.parent, os.O_RDONLY | os.O_CLOEXEC)
        self.path: str | None = None
        try:
            self.stream: BinaryIO = os.fdopen(self._open(target), "wb", buffering=BUFFER_BYTES)
        except BaseException:
            os.close(self.directory)
            raise

    def _open(self, target: Path) -> int:
        if os.path.isdir("/proc/self/fd"):
            with contextlib.suppress(OSError, AttributeError):
                return os.open(target.parent, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, PRIVATE_MODE)
        path = _draft_name(target)
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, PRIVATE_MODE)
        self.path = path
        return descriptor

    def publish(self, target: Path, *, replace: bool) -> None:
        """Put the file on disk, then give it the target's name."""
        self.stream.flush()
        os.fsync(self.stream.fileno())
        if replace:
            if self.path is None:
                path = _draft_name(target)
                self._link(path)
                self.path = path
            os.rename(self.path, target)
            self.path = None
        else:
            try:
                self._link(target)
            except FileExistsError:
                # Somebody took the name in the meantime; a link, unlike a rename, leaves theirs alone.
                raise _exists(target) from None
        with contextlib.suppress(OSError):
            os.fsync(self.directory)

    def _link(self, name: str | Path) -> None:
        source = f"/proc/self/fd/{self.stream.fileno()}" if self.path is None else self.path
        # With a directory given, os.link follows the symbolic link that an open file is in /proc.
        os.link(os.path.abspath(source), os.path.abspath(name), src_dir_fd=self.directory)

    def close(self) -> None:
        """Forget the file unless it was published."""
        if self.path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
        os.close(self.directory)
        self.stream.close()


@contextlib.contextmanager
def _draft(target: Path) -> Iterator[_Draft]:
    draft = _Draft(target)
    try:
        yield draft
    finally:
        draft.close()


def _exists(target: Path) -> TargetExists:
    return TargetExists(errno.EEXIST, "the file is there already", str(target))


def _draft_name(target: Path) -> str:
    return str(target.parent / f".{target.name[:200]}.{secrets.token_hex(6)}.part")


def _take_mode(descriptor: int, like: str | None, target: Path) -> None:
    """Give a new file the permissions of another, and no more than the file that it replaces has."""
    if like is None or like == STANDARD:
        return
    original = os.stat(like)
    mode = original.st_mode & 0o777
    with contextlib.suppress(FileNotFoundError):
        mode &= os.stat(target).st_mode
    with contextlib.suppress(PermissionError):
        if (original.st_uid, original.st_gid) != (os.geteuid(), os.getegid()):
            os.fchown(descriptor, original.st_uid, original.st_gid)
    os.fchmod(descriptor, mode)


@contextlib.contextmanager
def behind(target: BinaryIO) -> Iterator[Callable[[bytes], object]]:
    """Write blocks to a regular file one behind, in a thread; to anything else at once.

    Finding new pages for a file takes the kernel up to a quarter of the time that its blocks take to be made. A
    write into a pipe that nobody empties would never let the thread end: it stays where an interrupt reaches it.

    Raises:
        OSError: a write failed; at the latest when the context ends.
    """
    if size_of(target) is None:
        yield target.write
        return
    from concurrent.futures import Future, ThreadPoolExecutor

    last: Future[int] | None = None

    def write(data: bytes) -> None:
        nonlocal last
        if last is not None:
            last.result()
        last = worker.submit(target.write, data)

    with ThreadPoolExecutor(1, "openkcm-write") as worker:
        yield write
        if last is not None:
            last.result()


def size_of(source: BinaryIO) -> int | None:
    """Return how many bytes a file holds, or None if that is not known (a pipe)."""
    try:
        status = os.fstat(source.fileno())
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None
