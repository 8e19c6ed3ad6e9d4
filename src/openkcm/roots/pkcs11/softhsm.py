# SPDX-License-Identifier: Apache-2.0
"""SoftHSM2 tokens in a folder of one's own: for the demo, and to test against.

Invariant: no token outside the folder is seen or touched. SoftHSM2 reads where its tokens are from the file that
``SOFTHSM2_CONF`` names, once a process or when the module is initialised anew; one folder a process at a time.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ...errors import RootMisconfigured
from .modules import MODULE_VARIABLE

MODULES: Final = (
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib64/pkcs11/libsofthsm2.so",
    "/usr/lib64/softhsm/libsofthsm2.so",
    "/usr/lib64/softhsm/libsofthsm.so",
    "/usr/local/lib/softhsm/libsofthsm2.so",
    "/opt/homebrew/lib/softhsm/libsofthsm2.so",
)
"""Where distributions put the module."""

CONFIGURATION_VARIABLE: Final = "SOFTHSM2_CONF"
UTILITY: Final = "softhsm2-util"
PIN_DIGITS: Final = 8
INIT_SECONDS: Final = 60


@dataclass(frozen=True)
class Token:
    """An initialised token; its PIN lies in a file that only this user can read."""

    label: str
    pin_file: Path
    folder: Path = field(repr=False)

    @property
    def pin_source(self) -> str:
        """For a root URI."""
        return f"file:{self.pin_file}"


def find_module() -> str | None:
    """The path of the SoftHSM2 module, or None if it or its utility is not installed."""
    if shutil.which(UTILITY) is None:
        return None
    named = os.environ.get(MODULE_VARIABLE, "")
    candidates = (named, *MODULES) if "softhsm" in named else MODULES
    return next((path for path in candidates if os.path.isfile(path)), None)


def configure(folder: Path) -> Path:
    """Make a folder for tokens, and the configuration that names it; returns the configuration's path."""
    tokens = folder / "tokens"
    tokens.mkdir(mode=0o700)
    path = folder / "softhsm2.conf"
    path.write_text(f"directories.tokendir = {tokens}\nobjectstore.backend = file\nlog.level = ERROR\n")
    return path


def init_token(folder: Path, label: str) -> Token:
    """Make a token in a configured folder, with a random PIN.

    Raises:
        RootMisconfigured: SoftHSM2 is not installed, or refuses.
    """
    before = set((folder / "tokens").iterdir())
    pin, officer_pin = (f"{secrets.randbelow(10**PIN_DIGITS):0{PIN_DIGITS}}" for _ in range(2))
    # The utility takes PINs as arguments only; these two live as long as the folder.
    command = (UTILITY, "--init-token", "--free", "--label", label, "--pin", pin, "--so-pin", officer_pin)
    environment = os.environ | {CONFIGURATION_VARIABLE: str(folder / "softhsm2.conf")}
    try:
        done = subprocess.run(
            command, capture_output=True, check=False, timeout=INIT_SECONDS, env=environment
        ).returncode
    except (OSError, subprocess.SubprocessError):
        done = -1
    made = set((folder / "tokens").iterdir()) - before
    if done != 0 or len(made) != 1:
        raise RootMisconfigured(f"{UTILITY} could not make a token; is SoftHSM2 installed?")
    (token,) = made
    path = folder / f"pin-{token.name}"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(pin)
    return Token(label, path, token)
