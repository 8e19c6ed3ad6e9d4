# SPDX-License-Identifier: Apache-2.0
"""Progress on standard error for what takes longer than a second.

Invariant: nothing is drawn unless standard error is a terminal, the second is over, and nobody asked for
quiet; Rich is not even imported before then.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO, Final

from .output import settings

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PATIENCE_SECONDS: Final = 1.0


class Meter:
    """Counts bytes; ``advance_to`` and ``add`` are cheap enough for every block."""

    def __init__(self, label: str, total: int | None) -> None:
        self._label = label
        self._total = total
        self._started = time.monotonic()
        self._enabled = sys.stderr.isatty() and not settings.quiet and not settings.json
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self.done = 0

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self._started

    def add(self, size: int) -> None:
        """Count more bytes."""
        self.advance_to(self.done + size)

    def advance_to(self, done: int) -> None:
        """Set the bytes done so far."""
        self.done = done
        if not self._enabled:
            return
        if self._progress is None:
            if self.seconds < PATIENCE_SECONDS:
                return
            self._begin()
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done)

    def close(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()

    def _begin(self) -> None:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        from .output import console

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(compact=True),
            console=console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task(self._label, total=self._total, completed=self.done)
        self._progress.start()


@contextlib.contextmanager
def meter(label: str, total: int | None) -> Iterator[Meter]:
    """Show the progress of what runs inside."""
    shown = Meter(label, total)
    try:
        yield shown
    finally:
        shown.close()


class CountedReader:
    """A source that shows how much was read from it."""

    def __init__(self, source: BinaryIO, shown: Meter) -> None:
        self._source = source
        self._meter = shown

    def read(self, size: int = -1, /) -> bytes:
        """Read up to ``size`` bytes."""
        data = self._source.read(size)
        self._meter.add(len(data))
        return data

    def readinto(self, buffer: bytearray | memoryview, /) -> int:
        """Read into a buffer."""
        count: int = self._source.readinto(buffer)  # type: ignore[attr-defined]
        self._meter.add(count)
        return count


class CountedWriter:
    """A target that counts what was written to it."""

    def __init__(self, target: BinaryIO) -> None:
        self._target = target
        self.done = 0

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """Write all of it."""
        self._target.write(data)
        self.done += len(data)
        return len(data)

    def flush(self) -> None:
        """Pass on what is buffered."""
        self._target.flush()


class Rewound:
    """A source from which the first bytes were taken, and put back."""

    def __init__(self, head: bytes, source: BinaryIO) -> None:
        self._head = head
        self._source = source

    def read(self, size: int = -1, /) -> bytes:
        """Read up to ``size`` bytes."""
        if not self._head:
            return self._source.read(size)
        if size < 0:
            head, self._head = self._head, b""
            return head + self._source.read()
        head, self._head = self._head[:size], self._head[size:]
        return head + (self._source.read(size - len(head)) if size > len(head) else b"")

    def readinto(self, buffer: bytearray | memoryview, /) -> int:
        """Read into a buffer."""
        data = self.read(len(buffer))
        memoryview(buffer)[: len(data)] = data
        return len(data)


def size_text(size: float) -> str:
    """Return a number of bytes for people, in powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"


def seconds_text(seconds: float) -> str:
    """Return a time for people."""
    return f"{seconds:.1f} s" if seconds >= 0.95 else f"{seconds * 1000:.0f} ms"


def rate(shown: Meter) -> str:
    """Return how much was read, how long it took, and how fast that is."""
    text = f"{size_text(shown.done)} in {seconds_text(shown.seconds)}"
    return f"{text} ({size_text(shown.done / shown.seconds)}/s)" if shown.done > 1_000_000 else text
