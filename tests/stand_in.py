# SPDX-License-Identifier: Apache-2.0
"""The development root where `cryptography` is not to be had: it has no wheel for CPython 3.13's free-threaded build.

Of all that the native backend uses, this root alone takes its cipher from there. The same bytes come from the native
layer's functions for test vectors. Nothing is replaced where `cryptography` is installed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Final

from openkcm.context import encode_context
from openkcm.errors import DecryptError
from openkcm.limits import NONCE_BYTES, TAG_BYTES
from openkcm.roots import local
from openkcm.roots.local import LocalRoot


def _wrap(root: LocalRoot, sealed: bytes, context: Mapping[str, str]) -> bytes:
    from openkcm._fast.aead import _gcm_seal

    nonce = os.urandom(NONCE_BYTES)
    return local._FORMAT + nonce + bytes(_gcm_seal(root._key(), nonce, encode_context(context), sealed))


def _unwrap(root: LocalRoot, wrapped: bytes, context: Mapping[str, str]) -> bytes:
    from openkcm._fast.aead import _gcm_open

    key = root._key()
    if len(wrapped) < 1 + NONCE_BYTES + TAG_BYTES or wrapped[:1] != local._FORMAT:
        raise DecryptError
    opened = _gcm_open(key, wrapped[1 : 1 + NONCE_BYTES], encode_context(context), wrapped[1 + NONCE_BYTES :])
    if opened is None:
        raise DecryptError
    return bytes(opened)


NEEDED: Final = find_spec("cryptography") is None

if NEEDED:
    LocalRoot.wrap = _wrap  # type: ignore[method-assign]
    LocalRoot.unwrap = _unwrap  # type: ignore[method-assign]
