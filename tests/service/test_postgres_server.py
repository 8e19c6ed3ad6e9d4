# SPDX-License-Identifier: Apache-2.0
"""The PostgreSQL that other tests use: what it keeps over a stop and a kill, and that nothing of it stays behind."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest

from openkcm.testing.https import make_certificate
from openkcm.testing.postgres import PostgresServer, find_programs
from postgres_support import tls_server


def _insert(url: str) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS kept (number integer)")
        connection.execute("INSERT INTO kept VALUES (1)")


def _count(url: str) -> int:
    with psycopg.connect(url) as connection:
        found = connection.execute("SELECT count(*) FROM kept").fetchone()
    assert found is not None
    return int(found[0])


def _gone(process: int) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


def test_data_outlive_a_stop_and_a_kill(own_postgres: PostgresServer) -> None:
    url = own_postgres.url("kept")
    _insert(url)
    own_postgres.restart()
    assert own_postgres.url("kept") == url
    _insert(url)
    own_postgres.kill()
    assert not own_postgres.running
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(url, connect_timeout=2)
    own_postgres.start()
    assert _count(url) == 2


def test_it_asks_for_its_password(postgres_server: PostgresServer) -> None:
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(postgres_server.url().replace(postgres_server.password, "guessed"))


def test_each_database_is_its_own(postgres_server: PostgresServer) -> None:
    first = postgres_server.create_database("first")
    _insert(first)
    with pytest.raises(psycopg.errors.UndefinedTable):
        _count(postgres_server.create_database("second"))
    with pytest.raises(ValueError, match="name"):
        postgres_server.create_database('x"; DROP')


def test_tls_is_verified_to_the_host(tmp_path: Path) -> None:
    with tls_server(make_certificate(tmp_path)) as server:
        url = server.url(sslmode="verify-full", sslrootcert=str(tmp_path / "authority.pem"))
        with psycopg.connect(url) as connection:
            assert connection.pgconn.ssl_in_use
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(server.url(sslmode="verify-full", sslrootcert=_other_authority(tmp_path)))


def _other_authority(folder: Path) -> str:
    other = folder / "other"
    other.mkdir()
    make_certificate(other)
    assert ssl.create_default_context(cafile=str(other / "authority.pem"))
    return str(other / "authority.pem")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_its_owner(number: int) -> None:
    script = (
        "import time; from openkcm.testing.postgres import PostgresServer; server = PostgresServer();"
        "print(server.folder, server._server(), flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        folder, process = owner.stdout.readline().split()
        os.kill(owner.pid, number)
    assert _gone(int(process))
    deadline = time.monotonic() + 20
    while Path(folder).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(folder).exists()


def test_closing_leaves_nothing(tmp_path: Path) -> None:
    with PostgresServer() as server:
        folder = server.folder
        server.kill()
    assert not folder.exists()
    server.close()


def test_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENKCM_TEST_POSTGRES", raising=False)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(()))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="apt-get install postgresql"):
        find_programs()
