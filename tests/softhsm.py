# SPDX-License-Identifier: Apache-2.0
"""A real SoftHSM2 token for the tests: a folder, a PIN file and a key that cannot be extracted.

One configuration a process, since the module reads it once; each test makes tokens of its own in it.
"""

from __future__ import annotations

import itertools
import os
import secrets
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from openkcm.roots import pkcs11
from openkcm.roots.pkcs11 import create_token_key

MODULES = (
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so",
)
_numbers = itertools.count(1)


def find_module() -> str:
    """The module's path; without SoftHSM2 the tests that need it fail and say what to install."""
    for module in MODULES:
        if Path(module).is_file():
            return module
    pytest.fail("SoftHSM2 is not installed: apt-get install softhsm2")


@dataclass
class Token:
    """A token with one root key."""

    module: str
    folder: Path
    label: str
    pin: str = field(repr=False)
    pin_file: Path
    uri: str = ""

    def add_key(self, label: str, key_id: bytes) -> str:
        """Make another key; its root URI."""
        return create_token_key(self.module, self.label, f"file:{self.pin_file}", label, key_id)


@pytest.fixture(scope="session")
def softhsm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Point SoftHSM2 at a folder of the tests."""
    folder = tmp_path_factory.mktemp("softhsm")
    (folder / "tokens").mkdir()
    configuration = folder / "softhsm2.conf"
    configuration.write_text(
        f"directories.tokendir = {folder / 'tokens'}\nobjectstore.backend = file\nlog.level = ERROR\n"
    )
    os.environ["SOFTHSM2_CONF"] = str(configuration)
    return folder


@pytest.fixture
def token(softhsm_folder: Path) -> Token:
    """A fresh token with a non-extractable AES-256 key."""
    module = find_module()
    number = next(_numbers)
    label, pin = f"test-{number}", secrets.token_hex(8)
    pin_file = softhsm_folder / f"pin-{number}"
    pin_file.touch(mode=0o600)
    pin_file.write_text(pin + "\n")
    subprocess.run(
        ["softhsm2-util", "--init-token", "--free", "--label", label, "--pin", pin, "--so-pin", pin],
        check=True,
        capture_output=True,
        timeout=60,
    )
    # The module in this process listed its tokens before; let it look again.
    pkcs11._reloaded.clear()
    made = Token(module, softhsm_folder, label, pin, pin_file)
    made.uri = made.add_key("root", b"\x01")
    return made
