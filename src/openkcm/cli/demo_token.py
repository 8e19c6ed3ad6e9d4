# SPDX-License-Identifier: Apache-2.0
"""A SoftHSM2 token for the demo, in the demo's own directory.

Invariant: no token outside that directory is seen or touched, and the key in it can be used but not read out.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from ..errors import ConfigurationError, RootMisconfigured
from ..roots.pkcs11.keys import create_token_key
from ..roots.pkcs11.softhsm import CONFIGURATION_VARIABLE, MODULES, configure, find_module, init_token

__all__ = ["MODULES", "NoToken", "make_token"]

TOKEN: Final = "united"
LABEL: Final = "root"


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
    module = find_module()
    if module is None:
        raise NoToken("the demo needs SoftHSM2, a software HSM, for the first customer's root key")
    os.environ[CONFIGURATION_VARIABLE] = str(configure(directory))
    try:
        token = init_token(directory, TOKEN)
    except RootMisconfigured as error:
        raise NoToken(str(error)) from None
    return create_token_key(module, TOKEN, token.pin_source, LABEL)
