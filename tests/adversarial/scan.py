# SPDX-License-Identifier: Apache-2.0
"""Looks for byte strings in another process's memory and in core dumps, from outside."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_PART = 16 * 2**20


class Patterns:
    """16-byte halves of secrets, searched for all at once."""

    def __init__(self, secrets: Iterable[bytes]) -> None:
        halves = sorted({half for secret in secrets for half in (secret[:16], secret[16:32])})
        assert halves
        assert all(len(half) == 16 for half in halves)
        self._halves = halves

    def count(self, data: bytes) -> int:
        """How often any of them occurs."""
        return sum(data.count(half) for half in self._halves)


def scan_process(pid: int, patterns: Patterns) -> tuple[int, int]:
    """Read every readable mapping of a process: (hits, bytes read).

    Mappings that nobody may read from outside (memfd_secret, the kernel's own) are passed over: that they cannot
    be read is the point, and the caller checks that enough was.
    """
    hits = total = 0
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, permissions = line.split()[:2]
            if not permissions.startswith("r") or line.endswith(("[vvar]", "[vsyscall]", "[vvar_vclock]")):
                continue
            start, end = (int(part, 16) for part in span.split("-"))
            for at in range(start, end, _PART):
                try:
                    memory.seek(at)
                    # A little over the end, so that nothing hides on a border.
                    data = memory.read(min(_PART + 15, end - at))
                except (OSError, OverflowError, ValueError):
                    continue
                total += len(data)
                hits += patterns.count(data)
    return hits, total


def scan_file(path: Path, patterns: Patterns) -> tuple[int, int]:
    """Read a file: (hits, bytes read)."""
    hits = total = 0
    with path.open("rb") as file:
        tail = b""
        while part := file.read(_PART):
            hits += patterns.count(tail + part)
            total += len(part)
            tail = part[-15:]
    return hits, total
