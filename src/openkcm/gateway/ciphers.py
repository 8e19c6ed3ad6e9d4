# SPDX-License-Identifier: Apache-2.0
"""The two layouts of record that a service has (docs/formats.md)."""

from __future__ import annotations

from ..crypto import RecordCipher
from ..envelope import VERSION_OFFSET, fixed_header, payload_aad
from ..keys import Kind, Service
from ..limits import KEY_ID_BYTES, WRAPPED_KEY_BYTES


def inline_cipher(service: Service) -> RecordCipher:
    """Records whose wrapped data key is inside."""
    return _cipher(Kind.INLINE, service, WRAPPED_KEY_BYTES)


def stored_cipher(service: Service) -> RecordCipher:
    """Records whose data key is in a key store."""
    return _cipher(Kind.STORED, service, KEY_ID_BYTES)


def _cipher(kind: Kind, service: Service, middle_bytes: int) -> RecordCipher:
    head = fixed_header(kind, service.service_id, 0 if kind.stored else 1)[:VERSION_OFFSET]
    return RecordCipher(head, middle_bytes, kind.stored, payload_aad(kind, service.service_id))
