# SPDX-License-Identifier: Apache-2.0
"""gRPC, kept to TLS 1.3: whatever needs it takes it from here, and calls ``check`` before it makes credentials.

Invariant: whatever the environment says. gRPC's Python interface cannot set the lowest TLS version. Of TLS 1.2 it is
left one cipher suite that takes a pre-shared key, which nobody here has, so that TLS 1.3 is all that can be agreed on.
It reads the suites when it is loaded: where somebody else has loaded it before, and without them, it is not used.

All of gRPC in this process is kept to TLS 1.3 with that, whoever uses it.
"""

from __future__ import annotations

import os
import sys
from typing import Final

from ..errors import ConfigurationError

VARIABLE: Final = "GRPC_SSL_CIPHER_SUITES"
SUITES: Final = "ECDHE-PSK-CHACHA20-POLY1305"

_TOO_LATE: Final = "grpc._cython.cygrpc" in sys.modules and os.environ.get(VARIABLE) != SUITES

if not _TOO_LATE:
    os.environ[VARIABLE] = SUITES
import grpc as grpc  # noqa: E402 - it reads the variable when it is loaded


def check() -> None:
    """Raise ConfigurationError where gRPC would agree on TLS 1.2 too."""
    if _TOO_LATE:
        raise ConfigurationError(
            "grpc was imported before openkcm could keep it to TLS 1.3: import openkcm.rpc.tls13 before anything that "
            f"imports grpc, or start this process with {VARIABLE}={SUITES}; both hold for all that uses grpc in it"
        )
