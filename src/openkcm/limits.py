# SPDX-License-Identifier: Apache-2.0
"""Every size and bound in one place, each with its reason.

Invariant: nothing else in the package spells a length or a maximum as a bare number.
"""

from __future__ import annotations

from typing import Final

KEY_BYTES: Final = 32
"""AES-256 keys at every layer."""

NONCE_BYTES: Final = 12
"""AES-GCM nonce (NIST SP 800-38D, section 8.2.2: random 96-bit)."""

TAG_BYTES: Final = 16
"""AES-GCM tag, never truncated."""

COMMITMENT_BYTES: Final = 32
"""Leading zeros that commit to the key (Albertini et al., USENIX Security 2022)."""

XAES_NONCE_BYTES: Final = 24
WRAPPED_KEY_BYTES: Final = XAES_NONCE_BYTES + KEY_BYTES + TAG_BYTES
"""XAES-256-GCM (C2SP): nonce 24 || ciphertext 32 || tag 16."""

KEY_ID_BYTES: Final = 16
SERVICE_ID_BYTES: Final = 12
SUBJECT_HASH_BYTES: Final = 32
"""A subject as a key store knows it: SHA-256."""

MAX_RECORD_BYTES: Final = 2**31 - 1024
"""One record: OpenSSL counts a call's bytes in a C int. Larger data goes through a stream."""

MAX_CONTEXT_BYTES: Final = 64 * 1024
"""A record's context once encoded."""

MAX_NAME_BYTES: Final = 128
"""A tenant, service or region name."""

MAX_IDENTITY_BYTES: Final = 512
"""A caller's identity, which is ASCII: what a grant's column holds. SPIFFE allows 2048, which nobody uses."""

MAX_TRUST_DOMAIN_BYTES: Final = 255
"""A SPIFFE trust domain (SPIFFE-ID, section 2.3)."""

MAX_SUBJECT_BYTES: Final = 1024
"""A subject's name in UTF-8."""

MAX_KEYS_PER_CALL: Final = 16_384
"""Keys in one wrap, unwrap, rewrap or shred: bounds secret memory (512 KiB) and the time a kill waits."""

MAX_RECORDS_PER_KEY: Final = 2**32
"""Random 96-bit nonces under one AES-GCM key (NIST SP 800-38D, section 8.3)."""

SEGMENT_BYTES: Final = 64 * 1024
"""Plaintext in each segment of a stream but the last."""

MAX_SEGMENTS: Final = 2**32
"""A stream's segments: the counter in the STREAM nonce has 32 bits (256 TiB)."""

STREAM_NONCE_BYTES: Final = 19
"""Random part of a stream's XAES nonce; a 4-byte counter and a last-segment byte complete it."""

CHANNEL_COUNTER_BYTES: Final = 8
"""In front of each message of the inner channel; the nonce is made from it."""

MAX_CHANNEL_MESSAGES: Final = 2**32
"""Messages a session key seals: the counter cannot repeat, and this keeps the blocks of one key below 2**43."""
