# SPDX-License-Identifier: Apache-2.0
"""Taking off the padding of RSA-OAEP with SHA-256 and MGF1-SHA256 (RFC 8017, section 7.1.2), for tokens that cannot.

Invariant: whatever is wrong with a block, the answer is the same. The label is empty.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

from ...errors import DecryptError

DIGEST_BYTES: Final = 32
_EMPTY_LABEL: Final = hashlib.sha256(b"").digest()


def unpad_oaep(block: bytes) -> bytes:
    """Return the message in a block as long as the modulus; DecryptError if it is none."""
    if len(block) < 2 * DIGEST_BYTES + 2:
        raise DecryptError
    first, seed, masked = block[:1], block[1 : 1 + DIGEST_BYTES], block[1 + DIGEST_BYTES :]
    seed = _xor(seed, _mask(masked, DIGEST_BYTES))
    data = _xor(masked, _mask(seed, len(masked)))
    found, padded = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
    padding, one, message = padded.partition(b"\x01")
    right = hmac.compare_digest(first, b"\0")
    right &= hmac.compare_digest(found, _EMPTY_LABEL)
    right &= hmac.compare_digest(padding, bytes(len(padding)))
    right &= hmac.compare_digest(one, b"\x01")
    if not right:
        raise DecryptError
    return message


def _mask(seed: bytes, length: int) -> bytes:
    """MGF1 (appendix B.2.1)."""
    blocks = (
        hashlib.sha256(seed + bytes((0, 0, counter >> 8, counter & 255))).digest()
        for counter in range(-(-length // DIGEST_BYTES))
    )
    return b"".join(blocks)[:length]


def _xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))
