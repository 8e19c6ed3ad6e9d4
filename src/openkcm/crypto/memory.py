# SPDX-License-Identifier: Apache-2.0
"""Secret memory for the Python backend: cffi in ABI mode, no compiler needed.

Invariant: the same as the native arena's. A slot is inside a locked region between guard pages and canaries, out of
core dumps and of forked children; it is zeroed before its place is given to another; a wiped or inherited handle
cannot be used; and there is no unlocked fallback.
"""

from __future__ import annotations

import atexit
import errno
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import cffi

from ..errors import SecretMemoryError

GRANULE: Final = 64
CANARY_BYTES: Final = 16
REGION_BYTES: Final = 256 * 1024
KEEP_BYTES: Final = 1024 * 1024

_SYS_MEMFD_SECRET: Final = 447
_PROT_NONE, _PROT_READ_WRITE = 0, 3
_MAP_SHARED, _MAP_PRIVATE, _MAP_ANONYMOUS = 1, 2, 0x20
_MADV_DONTFORK, _MADV_DONTDUMP = 10, 16

_ffi: Final = cffi.FFI()
_ffi.cdef(
    """
    void *mmap(void *, size_t, int, int, int, long);
    int munmap(void *, size_t);
    int mlock(const void *, size_t);
    int madvise(void *, size_t, int);
    int mprotect(void *, size_t, int);
    int ftruncate(int, long);
    long syscall(long, ...);
    """
)
_c: Any = _ffi.dlopen(None)
_FAILED: Final = _ffi.cast("void *", -1)
_PAGE: Final = os.sysconf("SC_PAGESIZE")
_ZEROS: Final = bytes(GRANULE)
_canary = os.urandom(CANARY_BYTES)


class _Region:
    def __init__(self, size: int) -> None:
        self.size = (max(size, REGION_BYTES) + _PAGE - 1) // _PAGE * _PAGE
        self.mapped = self.size + 2 * _PAGE
        self.mapping = _map_locked(self.mapped)
        if self.mapping == _FAILED:
            raise _exhausted()
        self.start = _ffi.cast("char *", self.mapping) + _PAGE
        if not (
            _c.mprotect(self.mapping, _PAGE, _PROT_NONE) == 0
            and _c.mprotect(self.start + self.size, _PAGE, _PROT_NONE) == 0
            and _c.madvise(self.mapping, self.mapped, _MADV_DONTDUMP) == 0
            and _c.madvise(self.mapping, self.mapped, _MADV_DONTFORK) == 0
        ):
            number = _ffi.errno
            _c.munmap(self.mapping, self.mapped)
            _ffi.errno = number
            raise _exhausted()
        self.view = memoryview(_ffi.buffer(self.start, self.size))
        self.taken = bytearray(self.size // GRANULE)
        self.used = 0

    def unmap(self) -> None:
        self.view.release()
        _c.munmap(self.mapping, self.mapped)


class _Arena:
    """Every region of this process; a new one is made after a fork."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.regions: list[_Region] = []
        self.slots = 0
        self.given: list[tuple[_Region, int, int]] = []

    def take(self, size: int) -> tuple[_Region, int, int]:
        """A zeroed place: its region, first granule and number of granules."""
        count = (size + 2 * CANARY_BYTES + GRANULE - 1) // GRANULE
        with self.lock:
            self._take_back()
            region, at = self._place(count)
            region.taken[at : at + count] = b"\x01" * count
            region.used += count
            self.slots += 1
            start, end = at * GRANULE, (at + count) * GRANULE
            region.view[start : start + CANARY_BYTES] = _canary
            region.view[end - CANARY_BYTES : end] = _canary
            return region, at, count

    def _place(self, count: int) -> tuple[_Region, int]:
        free = bytes(count)
        for region in self.regions:
            at = region.taken.find(free)
            if at >= 0:
                return region, at
        try:
            region = _Region(count * GRANULE)
        except SecretMemoryError:
            if not self._release(0):
                raise
            region = _Region(count * GRANULE)
        self.regions.append(region)
        return region, 0

    def give(self, region: _Region, at: int, count: int) -> None:
        start, end = at * GRANULE, (at + count) * GRANULE
        intact = (
            region.view[start : start + CANARY_BYTES] == _canary
            and region.view[end - CANARY_BYTES : end] == _canary
        )
        if not intact:
            os.write(2, b"openkcm: secret memory was overwritten; aborting\n")
            os.abort()
        region.view[start:end] = _ZEROS * count
        # A collection may run this in a thread that is inside ``take``: never wait here, its next use takes it back.
        self.given.append((region, at, count))
        if self.lock.acquire(blocking=False):
            try:
                self._take_back()
                self._release(KEEP_BYTES)
            finally:
                self.lock.release()

    def _take_back(self) -> None:
        while self.given:
            region, at, count = self.given.pop()
            region.taken[at : at + count] = bytes(count)
            region.used -= count
            self.slots -= 1

    def _release(self, keep: int) -> bool:
        """Unmap free regions beyond ``keep`` bytes; whether any was."""
        idle = [region for region in self.regions if not region.used]
        total = sum(region.size for region in idle)
        before = len(self.regions)
        for region in idle:
            if total <= keep:
                break
            total -= region.size
            self.regions.remove(region)
            region.unmap()
        return len(self.regions) < before


_arena = _Arena()
_forks = 0
_kind: str | None = None


class Slot:
    """A handle on ``size`` zeroed bytes; the base of the two kinds of key."""

    def __init__(self, size: int) -> None:
        self._born = _forks
        self._closing = False
        self._uses = 0
        self._guard = threading.RLock()
        self._unused: threading.Condition | None = None  # made by a wipe that has to wait
        self._place: tuple[_Region, int, int] | None = None
        self._place = _arena.take(size)
        region, at, _ = self._place
        start = at * GRANULE + CANARY_BYTES
        self._view: memoryview | None = region.view[start : start + size]

    def __enter__(self) -> memoryview:
        """Begin a use: until it ends the slot is not wiped."""
        if self._born != _forks:
            raise SecretMemoryError(
                "this key belongs to the process before the fork; open it again in this one"
            )
        with self._guard:
            if self._closing or self._view is None:
                raise SecretMemoryError("this key was wiped")
            self._uses += 1
            return self._view

    def __exit__(self, *error: object) -> None:
        with self._guard:
            self._uses -= 1
            if self._unused is not None:
                self._unused.notify_all()

    def wipe(self) -> None:
        """Zero the key; refuses new uses first and waits for those in flight. Idempotent."""
        if self._born != _forks:
            return
        with self._guard:
            if self._closing:
                return
            self._closing = True
            if self._uses:
                self._unused = threading.Condition(self._guard)
                while self._uses:
                    self._unused.wait()
            self._give()

    def _give(self) -> None:
        place, self._place = self._place, None
        if place is not None:
            if self._view is not None:
                self._view.release()
                self._view = None
            _arena.give(*place)

    @property
    def wiped(self) -> bool:
        """Whether the key is gone: wiped, or left behind by a fork."""
        return self._born != _forks or self._closing

    def __del__(self) -> None:
        if getattr(self, "_place", None) is not None and self._born == _forks:
            self._give()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("secret keys cannot be pickled or copied")

    def __copy__(self) -> Any:
        raise TypeError("secret keys cannot be pickled or copied")

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("secret keys cannot be pickled or copied")


@contextmanager
def lent(view: Any) -> Iterator[bytes]:
    """A private copy of a key as bytes, for a library that wants such; overwritten at the end."""
    copy = bytes(view)
    try:
        yield copy
    finally:
        overwrite(copy)


def overwrite(private: bytes) -> None:
    """Zero a bytes object that only the caller holds. Python calls them immutable, so nobody else may."""
    _ffi.memmove(_ffi.from_buffer(private), bytes(len(private)), len(private))


def memory_limit() -> int | None:
    """RLIMIT_MEMLOCK in bytes, None if there is none."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def secret_memory_info() -> dict[str, Any]:
    """Tell which protection is in force, and how much is locked and in use (bytes)."""
    if _kind is None:
        Slot(16).wipe()
    with _arena.lock:
        _arena._take_back()
    return {
        "kind": _kind,
        "locked_bytes": sum(region.size for region in _arena.regions),
        "idle_bytes": sum(region.size for region in _arena.regions if not region.used),
        "handles": _arena.slots,
        "limit_bytes": memory_limit(),
    }


def _map_locked(size: int) -> Any:
    """Map locked pages: memfd_secret where the kernel has it, else mmap and mlock; never over a reservation."""
    global _kind
    if _kind != "mlock":
        descriptor = _c.syscall(_SYS_MEMFD_SECRET, _ffi.cast("int", os.O_CLOEXEC))
        if descriptor >= 0:
            _kind = "memfd_secret"
            try:
                if _c.ftruncate(descriptor, size) != 0:
                    return _FAILED
                return _c.mmap(_ffi.NULL, size, _PROT_READ_WRITE, _MAP_SHARED, descriptor, 0)
            finally:
                number = _ffi.errno
                os.close(descriptor)  # who holds the descriptor could map the keys
                _ffi.errno = number
        # Not there, or forbidden by a container. Anything else (no file handle, no memory) is exhaustion.
        if _kind is not None or _ffi.errno not in (errno.ENOSYS, errno.EPERM, errno.EACCES):
            return _FAILED
        _kind = "mlock"
    mapped = _c.mmap(_ffi.NULL, size, _PROT_READ_WRITE, _MAP_PRIVATE | _MAP_ANONYMOUS, -1, 0)
    if mapped != _FAILED and _c.mlock(mapped, size) != 0:
        number = _ffi.errno
        _c.munmap(mapped, size)
        _ffi.errno = number
        return _FAILED
    return mapped


def _exhausted() -> SecretMemoryError:
    number = _ffi.errno
    if number in (errno.EMFILE, errno.ENFILE):
        return SecretMemoryError(
            "no file handle was left to map memory for keys (RLIMIT_NOFILE); close files, or raise it with 'ulimit -n' "
            "or LimitNOFILE= in a systemd unit"
        )
    limit = memory_limit()
    locked = sum(region.size for region in _arena.regions)
    allowed = "no limit is set" if limit is None else f"the limit (RLIMIT_MEMLOCK) is {limit // 1024} KiB"
    return SecretMemoryError(
        f"no more memory could be locked for keys ({errno.errorcode.get(number, number)}): {locked // 1024} KiB are "
        f"locked and {allowed}. Raise it with 'ulimit -l', LimitMEMLOCK= in a systemd unit or --ulimit memlock= of a "
        "container"
    )


def _wipe_all() -> None:
    """At exit: make every handle unusable, then zero what they pointed to."""
    global _forks
    _forks += 1
    for region in _arena.regions:
        region.view[:] = bytes(region.size)


def _after_fork_in_child() -> None:
    """Forget the parent's regions, which are not mapped here; they stay referenced so that nothing frees them."""
    global _arena, _forks, _inherited
    _arena.lock.release()
    _inherited.append(_arena)
    _arena = _Arena()
    _forks += 1


_inherited: list[_Arena] = []
# Not in the middle of mapping a region: it might be inherited before MADV_DONTFORK is on it.
os.register_at_fork(
    before=lambda: _arena.lock.acquire(),
    after_in_parent=lambda: _arena.lock.release(),
    after_in_child=_after_fork_in_child,
)
atexit.register(_wipe_all)
