# SPDX-License-Identifier: Apache-2.0
"""What the real servers of the tests have in common: a process under a guard, in a private folder, on a free port.

Invariant: a server ends when its owner does, however that ends: a shell waits on a pipe that only the owner holds open,
and stops the server when it breaks. Its folder goes away with it. A forked child owns neither.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Final, Self

STOP_SECONDS: Final = 10.0
PAUSE_SECONDS: Final = 0.01
PORT_TRIES: Final = 5

# $1 is the folder, $2 the signal that asks for an orderly shutdown, the rest the server. Standard input is the pipe: a
# background command gets it by another number. Where the owner is gone, nobody else removes the folder.
_GUARD: Final = """
folder=$1; signal=$2; shift 2
exec 3<&0
"$@" </dev/null 3<&- & server=$!
echo $server >"$folder/pid.new" && mv "$folder/pid.new" "$folder/pid"
{ read -r nothing || : >"$folder/orphan"; kill -$signal $server; } <&3 & guard=$!
exec 3<&-
wait $server
kill -9 $guard 2>/dev/null
[ ! -e "$folder/orphan" ] || rm -rf "$folder"
"""


class GuardedServer(ABC):
    """One server on a free port of 127.0.0.1; a context manager that stops it.

    Args:
        prefix: of the private folder's name.
    """

    title: ClassVar[str]
    start_seconds: ClassVar[float]
    stop_signal: ClassVar[str]

    def __init__(self, prefix: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=prefix))
        self.port = 0
        self._life: list[subprocess.Popen[bytes]] = []  # the running server, if it runs
        self._end = weakref.finalize(self, _end, self._life, self.folder, os.getpid())

    @property
    def running(self) -> bool:
        """Whether the server's main process is there."""
        return any(process.poll() is None for process in self._life)

    @abstractmethod
    def start(self) -> None:
        """Start again on the same port, with the same data; returns when it is ready."""

    @abstractmethod
    def _is_ready(self) -> bool:
        """Whether it is ours that answers."""

    def stop(self) -> None:
        """Shut down in order; the data stays for ``start``. Idempotent."""
        _stop(self._life)

    def restart(self) -> None:
        """Stop and start."""
        self.stop()
        self.start()

    def close(self) -> None:
        """Stop for good and remove the data; idempotent."""
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _launch(self, command: Sequence[str], **options: Any) -> None:
        """Start the server under its guard, and wait until it is ready; ``options`` are those of ``Popen``.

        Raises:
            RuntimeError: it did not start.
        """
        with (self.folder / "log").open("ab") as log:
            (self.folder / "pid").unlink(missing_ok=True)
            process = subprocess.Popen(
                ["/bin/sh", "-c", _GUARD, "sh", str(self.folder), self.stop_signal, *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # an interrupt at the terminal is for the owner, who stops the server in order
                **options,
            )
        self._life[:] = [process]
        self._wait_ready()

    def _start_somewhere(self) -> None:
        for left in reversed(range(PORT_TRIES)):
            self.port = free_port()
            try:
                self.start()
            except RuntimeError:
                if not left:  # else the port may have been taken meanwhile
                    raise
            else:
                return

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + self.start_seconds
        while time.monotonic() < deadline and self.running:
            if self._is_ready():
                return
            time.sleep(PAUSE_SECONDS)
        self.stop()
        lines = (self.folder / "log").read_text(errors="replace").strip().splitlines()[-3:]
        raise RuntimeError(f"{self.title} did not start: {' | '.join(lines)}")

    def _server(self) -> int | None:
        """The id of the server's main process, once the guard has written it."""
        if not self.running:
            return None
        with contextlib.suppress(OSError, ValueError):
            return int((self.folder / "pid").read_text())
        return None


def _stop(life: list[subprocess.Popen[bytes]]) -> None:
    """End the running server in order, or take note that it ended."""
    for process in life:
        if process.stdin is not None:
            with contextlib.suppress(OSError):  # it ended by itself
                process.stdin.write(b"\n")  # a line, since a forked child may still hold the pipe open
                process.stdin.close()
        process.wait(STOP_SECONDS)
    life.clear()


def _end(life: list[subprocess.Popen[bytes]], folder: Path, owner: int) -> None:
    if os.getpid() != owner:
        return  # a forked child, which owns neither
    try:
        _stop(life)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody had just now; somebody may take it before it is used."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
