# SPDX-License-Identifier: Apache-2.0
"""The installation goes on with OpenSSL where the faster engine cannot be had, and says so in a line."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BOOTSTRAP = Path(__file__).parents[2] / "scripts" / "bootstrap"
MODERN = platform.machine() == "x86_64" and "avx2" in Path("/proc/cpuinfo").read_text()

pytestmark = pytest.mark.skipif(
    not MODERN, reason="this processor has no AVX2: the bootstrap looks for no faster engine"
)


class Machine:
    """A copy of the bootstrap on a machine where libIPSec_MB.so.1 does not load and apt-get only writes down."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.calls = folder / "calls"
        (folder / "scripts").mkdir()
        self.bin.mkdir()
        shutil.copy(BOOTSTRAP, folder / "scripts")
        (folder / "libIPSec_MB.so.1").touch()  # found first, and no library
        # All that else is asked for is there.
        self.program("softhsm2-util", "exit 0")
        (folder / "module.so").touch()

    def program(self, name: str, body: str) -> None:
        """Put a program before all others on the path."""
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def apt_get(self, body: str = "exit 0") -> None:
        """An apt-get that writes down how it was called."""
        self.program("apt-get", f'echo "$*" >> "{self.calls}"\n{body}')

    def user(self, number: int) -> None:
        """Who runs it."""
        self.program("id", f"echo {number}")

    def run(self) -> subprocess.CompletedProcess[str]:
        """Bootstrap the system's packages, without those of the tests."""
        settings = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": str(self.folder),
            "OPENKCM_PKCS11_MODULE": str(self.folder / "module.so"),
            "PYTHON": sys.executable,
        }
        return subprocess.run(
            ["sh", str(self.folder / "scripts" / "bootstrap"), "system"],
            capture_output=True,
            text=True,
            env=os.environ | settings,
            timeout=60,
            check=False,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine without the faster engine."""
    return Machine(tmp_path)


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What it said; it must have ended well."""
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


def test_root_installs_it(machine: Machine) -> None:
    machine.apt_get(f'case "$*" in *libipsec-mb1) rm "{machine.folder}/libIPSec_MB.so.1";; esac')
    machine.user(0)
    lines = said(machine.run())
    assert "libipsec-mb1" in machine.calls.read_text()
    assert lines[0] == "Installing libipsec-mb1 (build/system.log)"


def test_a_system_that_does_not_have_it_goes_on(machine: Machine) -> None:
    machine.apt_get('case "$*" in *libipsec-mb1) echo "Unable to locate package" >&2; exit 100;; esac')
    machine.user(0)
    assert said(machine.run()) == [
        "Installing libipsec-mb1 (build/system.log)",
        "Without libipsec-mb1, which this system does not have: OpenSSL does AES-GCM",
    ]


def test_a_user_without_sudo_goes_on(machine: Machine) -> None:
    machine.apt_get()
    machine.user(1000)
    machine.program("sudo", "exit 1")
    assert said(machine.run()) == ["Faster AES-GCM is to be had: sudo apt-get install libipsec-mb1"]
    assert not machine.calls.exists()


def test_where_it_loads_nothing_is_done(machine: Machine) -> None:
    """Also for a user whose path has no ldconfig."""
    cc = shutil.which("cc")
    assert cc is not None
    library = machine.folder / "libIPSec_MB.so.1"
    subprocess.run([cc, "-shared", "-o", str(library), "-x", "c", "/dev/null"], check=True)
    machine.apt_get()
    machine.user(1000)
    machine.program("ldconfig", "exit 127")
    assert said(machine.run()) == []
    assert not machine.calls.exists()
