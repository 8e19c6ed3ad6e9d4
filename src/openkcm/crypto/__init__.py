# SPDX-License-Identifier: Apache-2.0
"""The one door to cryptography: picks the backend once and gives both the same names."""

from __future__ import annotations

import os
from typing import Any

from ..errors import (
    BackendUnavailable,
    DecryptError,
    InternalError,
    InvalidInput,
    LimitExceeded,
    SecretMemoryError,
)

_choice = os.environ.get("OPENKCM_BACKEND", "")
if _choice not in ("", "fast", "python"):
    raise BackendUnavailable("OPENKCM_BACKEND is 'fast' or 'python', or not set")
_reason = ""
if _choice == "python":
    from .pure import *
    backend = "python"
else:
    from .._fast.secret import (
        SecretKeys, WrappingKey, generate_keys, generate_wrapping_key, import_keys, import_wrapping_key,
        install_errors, random_bytes, read_wrapping_key, secret_memory_info, write_wrapping_key,
    )
    from .._fast.wrapping import _xaes_open, _xaes_seal, native_info, rewrap_many, unwrap_key, unwrap_many, wrap_key, wrap_many
    from .._fast.aead import RecordCipher, _gcm_open, _gcm_seal
    from .._fast.stream import StreamCipher
    install_errors(invalid=InvalidInput, limit=LimitExceeded, decrypt=DecryptError, memory=SecretMemoryError, internal=InternalError)
    backend = "fast"

def backend_info() -> dict[str, Any]:
    return {"backend": backend, "openssl": native_info()["openssl"], "aes": native_info()["aes"], "secret_memory": secret_memory_info()["kind"], "notes": []}
