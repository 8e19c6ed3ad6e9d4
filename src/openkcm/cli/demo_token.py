# SPDX-License-Identifier: Apache-2.0
"""A SoftHSM2 token for the demo, in the demo's own directory.

Invariant: no token outside that directory is seen or touched, and the key in it can be used but not read out.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from pathlib import Path
from typing import Final

from ..errors import ConfigurationError

MODULES: Final = (
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib64/pkcs11/libsofthsm2.so",
    "/usr/lib64/softhsm/libsofthsm2.so",
    "/usr/local/lib/softhsm/libsofthsm2.so",
    "/opt/homebrew/lib/softhsm/libsofthsm2.so",
)
TOKEN: Final = "united"
LABEL: Final = "root"
PIN_NAME: Final = "pin"
PIN_DIGITS: Final = 8


class NoToken(ConfigurationError):
    """SoftHSM2 is not installed, or does not work."""

    hint = "apt-get install softhsm2, and pip install 'openkcm[pkcs11]'"


def make_token(directory: Path) -> str:
    """Make a token with a non-extractable AES-256 key and return the key's root URI.

    Sets SOFTHSM2_CONF for this process, which must not have used SoftHSM2 before.

    Raises:
        NoToken: SoftHSM2 is missing, or refuses.
        RootMisconfigured: python-pkcs11 is missing.
    """
    module = next((path for path in MODULES if Path(path).is_file()), None)
    utility = shutil.which("softhsm2-util")
    if module is None or utility is None:
        raise NoToken("the demo needs SoftHSM2, a software HSM, for the first customer's root key")
    tokens = directory / "tokens"
    tokens.mkdir()
    configuration = directory / "softhsm2.conf"
    configuration.write_text(f"directories.tokendir = {tokens}\nlog.level = ERROR\n")
    os.environ["SOFTHSM2_CONF"] = str(configuration)
    pin, officer_pin = (f"{secrets.randbelow(10**PIN_DIGITS):0{PIN_DIGITS}}" for _ in range(2))
    # The utility takes PINs as arguments only; these two live as long as the demo.
    pins = ("--pin", pin, "--so-pin", officer_pin)
    command = (utility, "--init-token", "--free", "--label", TOKEN, *pins)
    done = subprocess.run(command, capture_output=True, check=False, timeout=60)
    if done.returncode:
        raise NoToken("softhsm2-util could not make a token")
    pin_file = directory / PIN_NAME
    pin_file.touch(0o600)
    pin_file.write_text(pin)

    from ..roots.pkcs11 import create_token_key

    return create_token_key(module, TOKEN, f"file:{pin_file}", LABEL)
