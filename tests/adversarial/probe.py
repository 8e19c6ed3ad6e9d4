# SPDX-License-Identifier: Apache-2.0
"""What an attacker inside a process can do: look at its own mappings, give up privileges, forbid system calls.

Used by the adversarial tests and by the Python processes that they start.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import resource
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CAP_IPC_LOCK = 14
_SYS_MEMFD_SECRET = 447
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP = 22
_CAPABILITY_VERSION = 0x20080522

HERE = Path(__file__).resolve().parent
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Mapping:
    """One entry of /proc/PID/smaps."""

    start: int
    end: int
    permissions: str
    name: str
    flags: frozenset[str]


def mappings(pid: int | str = "self") -> list[Mapping]:
    """Every mapping of a process."""
    found: list[Mapping] = []
    span: list[str] = []
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        word = line.split(maxsplit=1)[0]
        if not word.endswith(":"):
            span = line.split(maxsplit=5)
        elif word == "VmFlags:":
            start, end = (int(part, 16) for part in span[0].split("-"))
            name = span[5] if len(span) > 5 else ""
            found.append(Mapping(start, end, span[1], name, frozenset(line.split()[1:])))
    return found


def regions(pid: int | str = "self") -> list[Mapping]:
    """The regions of secret memory: writable, locked, and kept out of forks and dumps."""
    return [
        each for each in mappings(pid) if each.permissions[:2] == "rw" and {"lo", "dc", "dd"} <= each.flags
    ]


def peek(address: int, size: int) -> bytes:
    """Read this process's own memory, past every check."""
    return ctypes.string_at(address, size)


def poke(address: int, data: bytes) -> None:
    """Write this process's own memory, past every check."""
    ctypes.memmove(address, data, len(data))


def find(secret: bytes) -> list[int]:
    """Where in this process's secret memory these bytes are."""
    places = []
    for region in regions():
        data = peek(region.start, region.end - region.start)
        at = data.find(secret)
        while at >= 0:
            places.append(region.start + at)
            at = data.find(secret, at + 1)
    return places


def capabilities() -> int:
    """The effective capabilities of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    raise AssertionError


def drop_capabilities() -> None:
    """Give up every capability, CAP_IPC_LOCK above all, for good."""
    header = struct.pack("Ii", _CAPABILITY_VERSION, 0)
    assert _libc.capset(header, bytes(24)) == 0, os.strerror(ctypes.get_errno())
    assert capabilities() == 0


def limit_locked_memory(size: int) -> None:
    """From now on this process can lock ``size`` bytes and no more."""
    drop_capabilities()
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (size, size))


def deny_memfd_secret(number: int) -> None:
    """Have the kernel answer memfd_secret with this errno, as one without it or a container's filter does."""
    allow, deny = 0x7FFF0000, 0x00050000 | number
    program = b"".join(
        (
            struct.pack("HBBI", 0x20, 0, 0, 0),  # load the system call's number
            struct.pack("HBBI", 0x15, 0, 1, _SYS_MEMFD_SECRET),
            struct.pack("HBBI", 0x06, 0, 0, deny),
            struct.pack("HBBI", 0x06, 0, 0, allow),
        )
    )
    code = ctypes.create_string_buffer(program)
    filters = ctypes.create_string_buffer(struct.pack("H6xP", 4, ctypes.addressof(code)))
    assert _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert _libc.prctl(_PR_SET_SECCOMP, 2, filters, 0, 0) == 0, os.strerror(ctypes.get_errno())


def use_up_file_handles() -> list[int]:
    """Open files until there is no handle left; close the returned ones to have some again."""
    taken = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 64), hard))
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        return taken


def crash_quietly() -> None:
    """In a forked child that is meant to die of a signal: no core, no traceback of the test runner's."""
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def child_environment(**more: str) -> dict[str, str]:
    """The environment of a Python process that imports this module too."""
    import support  # not above: it makes the first region, which is too early in some children

    path = support.environment()["PYTHONPATH"]
    return support.environment(PYTHONPATH=f"{path}:{HERE}", **more)


def run(code: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process that dumps no core; it must end well."""
    done = attempt(code, *arguments, **more)
    assert done.returncode == 0, f"status {done.returncode}\n{done.stderr}"
    return done


def attempt(code: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process that dumps no core, however it ends."""
    quiet = "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
    return subprocess.run(
        [sys.executable, "-c", quiet + code, *arguments],
        capture_output=True,
        text=True,
        env=child_environment(**more),
        timeout=120,
        check=False,
    )


def wait_until(true: Callable[[], bool], seconds: float) -> None:
    """Look again and again until it is true; fail when it is not within so many seconds."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} seconds"
        time.sleep(0.002)


def together(*works: object) -> None:
    """Run each callable in a thread of its own; the first error of any of them is raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(works))

    def guarded(work: object) -> None:
        try:
            start.wait(30)
            work()  # type: ignore[operator]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]
