# SPDX-License-Identifier: Apache-2.0
"""The context, for mechanisms that cannot bind it: carried inside what is wrapped, and compared when it comes back.

Invariant: no mechanism drops the context. ``bind`` puts 32 bytes before the sealed key, the SHA-256 of the encoded
context; the length (104 bytes) fits RSA-OAEP-256 with a 2048-bit key, and AES key wrap (RFC 3394) as a multiple of 8.
Whoever can make a ciphertext of his own for the root (for RSA, anybody) still cannot make one that opens: what is
inside is sealed under the Core's seal key.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from typing import Final

from ..context import encode_context
from ..errors import DecryptError

DIGEST_BYTES: Final = 32


def bind(sealed: bytes, context: Mapping[str, str]) -> bytes:
    """Return the plaintext to wrap: the context's digest, then the sealed key."""
    return _digest(context) + sealed


def unbind(plaintext: bytes, context: Mapping[str, str]) -> bytes:
    """Return the sealed key; DecryptError if it was bound to another context."""
    if len(plaintext) < DIGEST_BYTES or not hmac.compare_digest(plaintext[:DIGEST_BYTES], _digest(context)):
        raise DecryptError
    return plaintext[DIGEST_BYTES:]


def _digest(context: Mapping[str, str]) -> bytes:
    return hashlib.sha256(encode_context(context)).digest()
