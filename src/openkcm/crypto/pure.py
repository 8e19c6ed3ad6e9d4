# SPDX-License-Identifier: Apache-2.0
"""The Cython-free backend: the same names and bytes as ``openkcm._fast``, on ``cryptography``.

Invariant: it refuses what the native backend refuses, with the same errors, and each opens what the other sealed.

Its promises about memory are weaker, and exactly so: keys *rest* in the same kind of secret memory, but for
every use a copy is handed to ``cryptography`` as bytes. Of L2, L3 and the seal key that copy is overwritten after
each use; while one is in use it, and the schedule that OpenSSL makes of it, are on the heap. Of data keys and of
subkeys ``AESGCM`` keeps copies until it is collected, and neither those nor the bytes objects are zeroed when they
are freed, so that they may be found in a core dump and, if the machine swaps, on disk. ``openkcm doctor`` says so.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from struct import iter_unpack
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.backends.openssl import backend as _openssl
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ..errors import DecryptError, InvalidInput, LimitExceeded
from ..limits import (
    KEY_BYTES,
    KEY_ID_BYTES,
    MAX_KEYS_PER_CALL,
    NONCE_BYTES,
    WRAPPED_KEY_BYTES,
    XAES_NONCE_BYTES,
)
from .memory import Slot, lent, overwrite, secret_memory_info

__all__ = [
    "SecretKeys",
    "WrappingKey",
    "generate_keys",
    "generate_wrapping_key",
    "import_keys",
    "import_wrapping_key",
    "native_info",
    "random_bytes",
    "read_wrapping_key",
    "rewrap_many",
    "secret_memory_info",
    "unwrap_key",
    "unwrap_many",
    "wrap_key",
    "wrap_many",
    "write_wrapping_key",
]

HALF: Final = 12
_LAST_NONCE: Final = (1 << 8 * NONCE_BYTES) - 1

# The parts of a wrapped key.
_HEAD: Final = slice(HALF)
_NONCE: Final = slice(HALF, XAES_NONCE_BYTES)
_SEALED: Final = slice(XAES_NONCE_BYTES, None)


class SecretKeys(Slot):
    """Data keys, 32 bytes each, side by side in secret memory."""

    def __init__(self, count: int) -> None:
        if not 1 <= count <= MAX_KEYS_PER_CALL:
            raise LimitExceeded(f"1 to {MAX_KEYS_PER_CALL} keys at a time, not {count}")
        self._count = count
        super().__init__(count * KEY_BYTES)

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"<SecretKeys n={self._count}{' wiped' if self.wiped else ''}>"

    def select(self, positions: Iterable[int]) -> SecretKeys:
        """Copy the keys at these positions into a handle of their own."""
        wanted = list(positions)
        if any(not 0 <= position < self._count for position in wanted):
            raise InvalidInput("no key at that position")
        chosen = SecretKeys(len(wanted))
        with self as source, chosen as target:
            for to, position in enumerate(wanted):
                target[to * KEY_BYTES : (to + 1) * KEY_BYTES] = source[
                    position * KEY_BYTES : (position + 1) * KEY_BYTES
                ]
        return chosen

    def move(self, position: int) -> SecretKeys:
        """Move one key into a handle of its own: where it was is zeroed."""
        moved = self.select([position])
        with self as source:
            source[position * KEY_BYTES : (position + 1) * KEY_BYTES] = bytes(KEY_BYTES)
        return moved

    def keep(self, position: int) -> SecretKeys:
        """Copy one key into a handle of its own that will be used again and again."""
        return self.select([position])


class WrappingKey(Slot):
    """A tenant key, service key or seal key in secret memory."""

    def __init__(self) -> None:
        super().__init__(KEY_BYTES)

    def __repr__(self) -> str:
        return f"<WrappingKey{' wiped' if self.wiped else ''}>"


# ---- making keys ---------------------------------------------------------------------------------------


def generate_keys(count: int) -> SecretKeys:
    """Draw ``count`` data keys into secret memory."""
    keys = SecretKeys(count)
    with keys as data:
        data[:] = os.urandom(count * KEY_BYTES)
    return keys


def import_keys(data: Any) -> SecretKeys:
    """Copy 32-byte data keys into secret memory; the caller's bytes stay where they are."""
    view = memoryview(data).cast("B")
    if not len(view) or len(view) % KEY_BYTES:
        raise InvalidInput("data keys have 32 bytes each")
    keys = SecretKeys(len(view) // KEY_BYTES)
    with keys as target:
        target[:] = view
    return keys


def generate_wrapping_key() -> WrappingKey:
    """Draw a wrapping key into secret memory."""
    drawn = os.urandom(KEY_BYTES)
    try:
        return import_wrapping_key(drawn)
    finally:
        overwrite(drawn)


def import_wrapping_key(data: Any) -> WrappingKey:
    """Copy a 32-byte wrapping key into secret memory; the caller's bytes stay where they are."""
    view = memoryview(data).cast("B")
    if len(view) != KEY_BYTES:
        raise InvalidInput("a wrapping key has 32 bytes")
    key = WrappingKey()
    with key as target:
        target[:] = view
    return key


def read_wrapping_key(descriptor: int) -> WrappingKey:
    """Read a 32-byte wrapping key from a file descriptor straight into secret memory."""
    key = WrappingKey()
    with key as target:
        got = 0
        while got < KEY_BYTES:
            part = os.readv(descriptor, [target[got:]])
            if not part:
                raise InvalidInput("the key file holds fewer than 32 bytes")
            got += part
    return key


def write_wrapping_key(key: WrappingKey, descriptor: int) -> None:
    """Write the 32 bytes of a wrapping key from secret memory to a file descriptor."""
    with key as source:
        done = 0
        while done < KEY_BYTES:
            done += os.writev(descriptor, [source[done:]])


def random_bytes(size: int) -> bytes:
    """Draw ``size`` random bytes; for identifiers, never for keys."""
    if not 0 <= size <= 1 << 24:
        raise LimitExceeded("at most 16 MiB of randomness at a time")
    return os.urandom(size)


# ---- wrapping: XAES-256-GCM (C2SP) ---------------------------------------------------------------------


def xaes_subkey(key: bytes, nonce: bytes) -> bytes:
    """Kx for a key and nonce[:12] (C2SP XAES-256-GCM)."""
    # ECB here is the block function itself: XAES is defined on raw AES blocks (a CMAC-based KDF).
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update
    doubled = int.from_bytes(block(bytes(16)), "big") << 1
    mask = (doubled & (1 << 128) - 1) ^ (0x87 * (doubled >> 128))
    blocks = b"\x00\x01\x58\x00" + nonce[:HALF] + b"\x00\x02\x58\x00" + nonce[:HALF]
    return block((int.from_bytes(blocks, "big") ^ (mask << 128 | mask)).to_bytes(KEY_BYTES, "big"))


def cut(data: bytes | memoryview, width: int) -> Iterator[bytes]:
    """Pieces of ``width`` bytes each: ``struct`` makes 64 a call, in a third of the time that slicing takes."""
    if len(data) == width:
        return iter((bytes(data),))
    whole = len(data) - len(data) % (64 * width)
    blocks = iter_unpack(f"{width}s" * 64, data[:whole])
    return chain.from_iterable(chain(blocks, iter_unpack(f"{width}s", data[whole:])))


def _wrap_run(key: bytes, data_keys: Sequence[bytes], aads: Iterable[bytes]) -> bytes:
    """Wrap keys in one batch: nonce[:12] once at random, nonce[12:] counting from a random start."""
    start = os.urandom(XAES_NONCE_BYTES)
    encrypt = AESGCM(xaes_subkey(key, start)).encrypt
    head, first = start[:HALF], int.from_bytes(start[HALF:], "big")
    nonces = [
        (number & _LAST_NONCE).to_bytes(NONCE_BYTES, "big") for number in range(first, first + len(data_keys))
    ]
    return b"".join(
        [
            head + nonce + encrypt(nonce, data_key, aad)
            for nonce, data_key, aad in zip(nonces, data_keys, aads, strict=True)
        ]
    )


def _unwrap_run(key: bytes, wrapped: bytes, aads: Iterable[bytes]) -> list[bytes | None]:
    """Open wrapped keys; None for those that do not verify. A run of one batch is keyed once."""
    opened: list[bytes | None] = []
    keyed = b""
    for blob, aad in zip(cut(wrapped, WRAPPED_KEY_BYTES), aads, strict=True):
        if blob[_HEAD] != keyed:
            keyed = blob[_HEAD]
            decrypt = AESGCM(xaes_subkey(key, keyed)).decrypt
        try:
            opened.append(decrypt(blob[_NONCE], blob[_SEALED], aad))
        except InvalidTag:
            opened.append(None)
    return opened


def _aads(count: int, aad: bytes, ids: bytes) -> list[bytes]:
    if not ids:
        return [aad] * count
    if len(ids) != count * KEY_ID_BYTES:
        raise InvalidInput("ids have 16 bytes for each key, or are left out")
    return [aad + each for each in cut(ids, KEY_ID_BYTES)]


def wrap_many(parent: WrappingKey, keys: SecretKeys, aad: bytes, ids: bytes = b"") -> bytes:
    """Wrap data keys: n x 72 bytes. The associated data of key i is ``aad`` followed by its id, if ids are given."""
    aads = _aads(len(keys), aad, ids)
    with parent as slot, keys as data, lent(slot) as key:
        return _wrap_run(key, list(cut(data, KEY_BYTES)), aads)


def unwrap_many(
    parent: WrappingKey, wrapped: bytes, aad: bytes, ids: bytes = b""
) -> tuple[SecretKeys, list[int]]:
    """Open wrapped data keys; returns the keys and the positions that did not verify."""
    count, rest = divmod(len(wrapped), WRAPPED_KEY_BYTES)
    if rest or not count:
        raise InvalidInput("wrapped keys have 72 bytes each")
    aads = _aads(count, aad, ids)
    keys = SecretKeys(count)
    with parent as slot, keys as data, lent(slot) as key:
        opened = _unwrap_run(key, wrapped, aads)
        # A place that did not open holds a key nobody knows, so that using it by mistake fails too.
        data[:] = b"".join([os.urandom(KEY_BYTES) if each is None else each for each in opened])
    return keys, [at for at, each in enumerate(opened) if each is None]


def rewrap_many(
    old: WrappingKey, new: WrappingKey, wrapped: bytes, old_aad: bytes, new_aad: bytes, ids: bytes = b""
) -> tuple[bytes, list[int]]:
    """Move wrapped data keys from one wrapping key to another; positions that did not verify come out as zeros."""
    keys, failed = unwrap_many(old, wrapped, old_aad, ids)
    moved = bytearray(wrap_many(new, keys, new_aad, ids))
    keys.wipe()
    for at in failed:
        moved[at * WRAPPED_KEY_BYTES : (at + 1) * WRAPPED_KEY_BYTES] = bytes(WRAPPED_KEY_BYTES)
    return bytes(moved), failed


def wrap_key(parent: WrappingKey, child: WrappingKey, aad: bytes) -> bytes:
    """Wrap one wrapping key under another: 72 bytes."""
    with parent as slot, child as data, lent(slot) as key, lent(data) as wrapped:
        return _wrap_run(key, [wrapped], [aad])


def unwrap_key(parent: WrappingKey, wrapped: bytes, aad: bytes) -> WrappingKey:
    """Open a wrapped wrapping key; DecryptError when it does not verify."""
    if len(wrapped) != WRAPPED_KEY_BYTES:
        raise DecryptError
    with parent as slot, lent(slot) as key:
        opened = _unwrap_run(key, wrapped, [aad])[0]
    if opened is None:
        raise DecryptError
    try:
        return import_wrapping_key(opened)
    finally:
        overwrite(opened)


# ---- for test vectors only: nothing in the package calls these -----------------------------------------


def _gcm_seal(key: bytes, nonce: bytes, aad: bytes, plaintext: bytes) -> bytes:
    """AES-256-GCM with a given nonce and no commitment: ciphertext || tag."""
    if len(key) != KEY_BYTES or len(nonce) != NONCE_BYTES:
        raise InvalidInput("a key has 32 bytes and a nonce 12")
    return AESGCM(key).encrypt(nonce, plaintext, aad)


def _gcm_open(key: bytes, nonce: bytes, aad: bytes, ciphertext: bytes) -> bytes | None:
    """The inverse of ``_gcm_seal``; None when the tag does not verify."""
    if len(key) != KEY_BYTES or len(nonce) != NONCE_BYTES:
        raise InvalidInput("a key has 32 bytes and a nonce 12")
    try:
        return AESGCM(key).decrypt(nonce, ciphertext, aad)
    except InvalidTag:
        return None


def _xaes_seal(key: bytes, nonce: bytes, aad: bytes, plaintext: bytes) -> bytes:
    """XAES-256-GCM with a given nonce."""
    if len(nonce) != XAES_NONCE_BYTES:
        raise InvalidInput("an XAES nonce has 24 bytes")
    return _gcm_seal(xaes_subkey(key, nonce), nonce[HALF:], aad, plaintext)


def _xaes_open(key: bytes, nonce: bytes, aad: bytes, ciphertext: bytes) -> bytes | None:
    """The inverse of ``_xaes_seal``; None when the tag does not verify."""
    if len(nonce) != XAES_NONCE_BYTES:
        raise InvalidInput("an XAES nonce has 24 bytes")
    return _gcm_open(xaes_subkey(key, nonce), nonce[HALF:], aad, ciphertext)


def native_info() -> dict[str, Any]:
    """Tell which OpenSSL is in use and what is weaker than on the native backend."""
    return {
        "engine": "cryptography",
        "why": "the Python backend has no other",
        "openssl": _openssl.openssl_version_text(),
        "file": "",
        "modern": False,
        "aes": "cryptography",
        "notes": [
            (
                "the Python backend copies keys to the heap while it uses them, and they are not zeroed there; "
                "install a C compiler and libssl-dev and reinstall for the native backend"
            )
        ],
    }
