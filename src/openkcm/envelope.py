# SPDX-License-Identifier: Apache-2.0
"""The bytes of an envelope, version 1, and the associated data of every layer.

Invariant: this is the only module that lays out bytes, and it is canonical: ``parse(b).header`` starts
``b``, and unknown or reserved values are refused. All integers are big-endian.

A record (kinds 01 and 02)::

    4F 4B 43 01 | suite 1 | kind 1 | 00 00 | service id 12 |
        kind 01:  service key version 4 | wrapped data key 72 |
        kind 02:  00 00 00 00           | data key id 16      |
    nonce 12 | AES-256-GCM(32 zero bytes || plaintext) | tag 16

A stream (kinds 03 and 04) has the same header up to the data key, then the 19 random bytes of its
segments' nonces, then the segments; see ``openkcm.gateway.streams``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from .context import Buffer
from .errors import FormatError, InvalidInput
from .keys import Kind
from .limits import (
    COMMITMENT_BYTES,
    KEY_ID_BYTES,
    NONCE_BYTES,
    SERVICE_ID_BYTES,
    STREAM_NONCE_BYTES,
    TAG_BYTES,
    WRAPPED_KEY_BYTES,
)

MAGIC: Final = b"OKC\x01"
SUITE: Final = 1
"""AES-256-GCM with key commitment; the data key wrapped by XAES-256-GCM."""

_FIXED: Final = struct.Struct(">4sBBH12sI")
FIXED_BYTES: Final = _FIXED.size
"""Magic, suite, kind, reserved, service id and service key version."""

VERSION_BYTES: Final = 4
VERSION_OFFSET: Final = FIXED_BYTES - VERSION_BYTES
INLINE_PLACE_BYTES: Final = VERSION_BYTES + WRAPPED_KEY_BYTES
INLINE_HEADER_BYTES: Final = FIXED_BYTES + WRAPPED_KEY_BYTES
STORED_HEADER_BYTES: Final = FIXED_BYTES + KEY_ID_BYTES
INLINE_OVERHEAD: Final = INLINE_HEADER_BYTES + NONCE_BYTES + COMMITMENT_BYTES + TAG_BYTES
STORED_OVERHEAD: Final = STORED_HEADER_BYTES + NONCE_BYTES + COMMITMENT_BYTES + TAG_BYTES
MAX_VERSION: Final = 2**32 - 1


def header_bytes(kind: Kind) -> int:
    """Length of the header up to and with the data key, in bytes."""
    return STORED_HEADER_BYTES if kind.stored else INLINE_HEADER_BYTES


def fixed_header(kind: Kind, service_id: bytes, version: int) -> bytes:
    """Serialise the 24 bytes before the data key.

    Args:
        kind: what follows.
        service_id: 12 bytes.
        version: the service key version, 1 to 2**32 - 1; 0 for stored kinds.

    Raises:
        InvalidInput: a field is out of range.
    """
    if len(service_id) != SERVICE_ID_BYTES:
        raise InvalidInput(f"a service id has {SERVICE_ID_BYTES} bytes")
    if (version != 0) if kind.stored else not 1 <= version <= MAX_VERSION:
        raise InvalidInput("a service key version is 1 to 2**32 - 1, and 0 where the key is stored")
    return _FIXED.pack(MAGIC, SUITE, kind, 0, service_id, version)


@dataclass(frozen=True, slots=True)
class Envelope:
    """The public part of an envelope: everything that needs no key to read.

    ``data_key`` is the wrapped data key (72 bytes) or the stored one's id (16 bytes); ``nonce`` has 12
    bytes for a record and 19 for a stream; ``size`` is the length of the plaintext, None for a stream.
    """

    kind: Kind
    service_id: bytes
    version: int
    data_key: bytes
    nonce: bytes
    size: int | None

    @property
    def header(self) -> bytes:
        """The bytes from the magic to the nonce, as they were read."""
        return fixed_header(self.kind, self.service_id, self.version) + self.data_key + self.nonce


def parse(blob: Buffer) -> Envelope:
    """Read the public part of an envelope, or of the start of a stream.

    Raises:
        FormatError: too short, or an unknown magic, version, suite, kind, or a reserved value.
        InvalidInput: not bytes-like.
    """
    try:
        view = blob if isinstance(blob, bytes) else memoryview(blob).cast("B")
    except (TypeError, ValueError, BufferError):  # the last two of what was released or closed
        raise InvalidInput(
            f"an envelope is bytes-like, contiguous and not released; this {type(blob).__name__} is not"
        ) from None
    if len(view) < FIXED_BYTES:
        raise FormatError("too short for an OpenKCM envelope")
    magic, suite, kind_byte, reserved, service_id, version = _FIXED.unpack_from(view)
    kind = _check_fixed(magic, suite, kind_byte, reserved, version)
    key_end = header_bytes(kind)
    nonce_end = key_end + (STREAM_NONCE_BYTES if kind.stream else NONCE_BYTES)
    if len(view) < nonce_end + (0 if kind.stream else COMMITMENT_BYTES + TAG_BYTES):
        raise FormatError("the envelope is cut short")
    return Envelope(
        kind=kind,
        service_id=service_id,
        version=version,
        data_key=bytes(view[FIXED_BYTES:key_end]),
        nonce=bytes(view[key_end:nonce_end]),
        size=None if kind.stream else len(view) - nonce_end - COMMITMENT_BYTES - TAG_BYTES,
    )


def _check_fixed(magic: bytes, suite: int, kind_byte: int, reserved: int, version: int) -> Kind:
    if magic[:3] != MAGIC[:3]:
        raise FormatError("not an OpenKCM envelope")
    if magic != MAGIC:
        raise FormatError(
            f"envelope version {magic[3]} is not known to this build; a newer OpenKCM may open it"
        )
    if suite != SUITE:
        raise FormatError(f"cipher suite {suite} is not known to this build")
    if reserved:
        raise FormatError("reserved bytes of the envelope are not zero")
    try:
        kind = Kind(kind_byte)
    except ValueError:
        raise FormatError(f"envelope kind {kind_byte} is not known to this build") from None
    if kind.stored != (version == 0):
        raise FormatError("the envelope's service key version does not fit its kind")
    return kind


def payload_aad(kind: Kind, service_id: bytes) -> bytes:
    """Associated data of a payload, before the stored data key's id (if any) and the encoded context.

    The service key version and the wrapped key are left out, so that a data key can be rewrapped under a
    new service key without touching the data.
    """
    return MAGIC + bytes((SUITE, kind)) + service_id


def wrap_aad(
    layer: int,
    tenant: str,
    region: str,
    *,
    service_id: bytes = b"",
    version: int,
    kind: Kind | None = None,
    key_id: bytes = b"",
) -> bytes:
    """Associated data of a wrapped key: who and what it is, each field with its length (2 bytes) before it.

    Args:
        layer: 2, 3 or 4 for L2 under the seal key, L3 under L2 and L4 under L3.
        version: of the tenant key for layer 2, of the service key for layers 3 and 4.
        kind: how the data key is used; layer 4 only.
        key_id: the stored data key's 16-byte id, or nothing.
    """
    fields = (
        b"openkcm/v1/L%d" % layer,
        tenant.encode(),
        region.encode(),
        service_id,
        version.to_bytes(4, "big"),
        b"" if kind is None else bytes((kind.wrap_kind,)),
        key_id,
    )
    return b"".join(len(field).to_bytes(2, "big") + field for field in fields)


def data_keys_aad(tenant: str, region: str, service_id: bytes, version: int) -> bytes:
    """What ``wrap_aad`` has in common for all data keys under one service key: the argument of ``data_key_aad``."""
    return wrap_aad(4, tenant, region, service_id=service_id, version=version)[:-4]


def data_key_aad(common: bytes, kind: Kind) -> bytes:
    """``wrap_aad`` of layer 4 up to and with the id's length, for batches: append each id, or nothing."""
    return common + _KIND_AAD[kind]


_KIND_AAD: Final = {
    kind: b"\0\1" + bytes((kind.wrap_kind,)) + (KEY_ID_BYTES if kind.stored else 0).to_bytes(2, "big")
    for kind in Kind
}


def pack_place(version: int, wrapped: bytes) -> bytes:
    """A service key version (4, big-endian) and the wrapped key under it, side by side as in an inline envelope."""
    return version.to_bytes(VERSION_BYTES, "big") + wrapped


def split_place(place: bytes) -> tuple[int, bytes]:
    """The inverse of ``pack_place``."""
    return int.from_bytes(place[:VERSION_BYTES], "big"), place[VERSION_BYTES:]
