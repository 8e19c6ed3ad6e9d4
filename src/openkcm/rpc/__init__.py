# SPDX-License-Identifier: Apache-2.0
"""The Core as a service: what crosses the wire, the server, and the client that a Gateway holds in a Core's place.

Invariant: both ends of every connection are known by certificate (TLS 1.3), what a peer may do is decided before
anything is looked up, and no data key crosses in plaintext or lies in plaintext on a Python heap.
"""

from __future__ import annotations

from importlib import import_module

from ..errors import ConfigurationError

try:
    import_module("google.protobuf")
except ModuleNotFoundError:
    raise ConfigurationError("a Core on the network needs the extra: pip install 'openkcm[rpc]'") from None
