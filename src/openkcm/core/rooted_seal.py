# SPDX-License-Identifier: Apache-2.0
"""A seal key that opens only through a root of the operator's own: the file of it, made and opened.

Invariant: dual lock, as for tenant keys. The root wraps the seal key under a key that lies in the file, so that neither
the file nor the root alone opens it, and what a provider's SDK leaves on the Python heap is still ciphertext. The file
is the operator's secret as before; moved to where the root is not to be had, it is worth nothing.

The file: a key, 32 random bytes; the magic ``OKCS`` and version 1 (5); the root's URI and the wrapped seal key, each
behind its length (2).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from ..crypto import WrappingKey, generate_wrapping_key, unwrap_key, wrap_key, write_wrapping_key
from ..errors import DecryptError, RootMisconfigured, SealError
from ..roots import open_root

MAGIC: Final = b"OKCS\x01"
CONTEXT: Final = {"layer": "seal"}
LABEL: Final = b"openkcm/v1/seal"
MAX_BYTES: Final = 64 * 1024


def make(seal: WrappingKey, uri: str, descriptor: int) -> None:
    """Write what ``open_rest`` opens to a file, and prove before that it opens.

    Raises:
        RootMisconfigured, RootDenied, RootDisabled, RootDestroyed, RootUnavailable: the root's answer.
    """
    key = generate_wrapping_key()
    root = open_root(uri)
    try:
        sealed = wrap_key(key, seal, LABEL)
        wrapped = root.wrap(sealed, CONTEXT)
        if root.unwrap(wrapped, CONTEXT) != sealed:
            raise RootMisconfigured("the root does not give back what it wrapped; nothing was written")
        write_wrapping_key(key, descriptor)
        rest = MAGIC + _field(root.uri.encode()) + _field(wrapped)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    finally:
        key.wipe()
        root.close()


def open_rest(key: WrappingKey, rest: bytes, path: Path) -> WrappingKey:
    """Open a seal key through its root.

    Args:
        key: the first 32 bytes of the file; wiped.
        rest: what follows them.
        path: the file, for messages.

    Raises:
        SealError: it is no such file, or it was altered.
        RootDenied, RootDisabled, RootDestroyed, RootUnavailable: the root's answer.
    """
    try:
        uri, wrapped = _parse(rest, path)
        root = open_root(uri)
        try:
            return unwrap_key(key, bytes(root.unwrap(wrapped, CONTEXT)), LABEL)
        except DecryptError:
            raise SealError(f"the seal file {path} was altered, or its root is another key now") from None
        finally:
            root.close()
    finally:
        key.wipe()


def _field(value: bytes) -> bytes:
    return len(value).to_bytes(2, "big") + value


def _parse(rest: bytes, path: Path) -> tuple[str, bytes]:
    fields = []
    at = len(MAGIC)
    for _ in range(2):
        end = at + 2 + int.from_bytes(rest[at : at + 2], "big")
        fields.append(rest[at + 2 : end])
        at = end
    if not rest.startswith(MAGIC) or at != len(rest) or not all(fields):
        raise SealError(f"the seal file {path} is damaged, or was made by a newer OpenKCM; put its copy back")
    try:
        return fields[0].decode(), fields[1]
    except UnicodeDecodeError:
        raise SealError(f"the seal file {path} is damaged; put its copy back") from None
