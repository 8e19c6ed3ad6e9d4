# SPDX-License-Identifier: Apache-2.0
"""Stopping a command in the middle: the original stays, nothing half done does, the exit code says why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import openkcm
from openkcm.cli.app import run
from openkcm.cli.exits import ExitCode

ROWS = b"id,name\n" + b"".join(b"%d,somebody\n" % i for i in range(40_000))
"""More than a pipe holds, so that a finished write means that the command has begun to read."""


@pytest.fixture
def vault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "keys").mkdir()
    monkeypatch.setenv("OPENKCM_VAULT", str(tmp_path / "keys" / "vault.db"))
    monkeypatch.setenv("PYTHONPATH", str(Path(openkcm.__file__).parents[1]))
    assert run(["-q", "init"]) == 0
    assert run(["-q", "tenant", "link", "acme", "--root", f"local:{tmp_path / 'keys' / 'root.key'}"]) == 0
    assert run(["-q", "service", "create", "acme", "people"]) == 0
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def start(*arguments: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "openkcm.cli", *arguments]

    def heed_interrupts() -> None:
        """A shell starts background jobs with SIGINT ignored, which children inherit."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=subprocess.PIPE,
        preexec_fn=heed_interrupts,
    )


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        (signal.SIGINT, ExitCode.INTERRUPTED, b"interrupted"),
        (signal.SIGTERM, ExitCode.TERMINATED, b"terminated"),
        (signal.SIGKILL, -signal.SIGKILL, b""),
    ],
)
def test_a_stopped_protect_leaves_the_original(
    vault: Path, number: signal.Signals, code: int, word: bytes
) -> None:
    target = vault / "people.csv"
    target.write_bytes(b"what was there before")
    process = start("protect", "acme", "people", "-", "-C", "name", "-o", str(target), "--force")
    with process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(ROWS)
        process.stdin.flush()
        process.send_signal(number)
        errors = process.stderr.read()
    assert process.returncode == code
    assert b"Traceback" not in errors
    assert word in errors
    assert target.read_bytes() == b"what was there before"
    if number is not signal.SIGKILL:
        assert os.listdir(vault) == ["people.csv"]


def test_the_reader_of_the_output_may_leave(vault: Path) -> None:
    there, here = os.pipe()
    os.close(there)
    process = start("protect", "acme", "people", "-", "-C", "name", stdout=here)
    os.close(here)
    _, errors = process.communicate(ROWS)
    assert (process.returncode, errors) == (ExitCode.BROKEN_PIPE, b"")
