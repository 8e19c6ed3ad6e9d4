# SPDX-License-Identifier: Apache-2.0
"""gRPC, kept to TLS 1.3: whatever needs it takes it from here.

Invariant: whatever the environment says. gRPC's Python interface cannot set the lowest TLS version. Of TLS 1.2 it is
left one cipher suite that takes a pre-shared key, which nobody here has, so that TLS 1.3 is all that can be agreed on.
"""

from __future__ import annotations

import os
from typing import Final

SUITES: Final = "ECDHE-PSK-CHACHA20-POLY1305"

os.environ["GRPC_SSL_CIPHER_SUITES"] = SUITES
import grpc as grpc  # noqa: E402 - it reads the variable when it is loaded
