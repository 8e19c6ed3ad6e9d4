# SPDX-License-Identifier: Apache-2.0
"""Sets of data key ids, of the Python backend."""

from __future__ import annotations

from ..errors import InvalidInput
from ..limits import KEY_ID_BYTES


class IdSet:
    """A set of 16-byte ids, made from packed ones, that never changes."""

    def __init__(self, ids: bytes) -> None:
        self._packed = ids
        self._members = frozenset(_split(ids))

    def __len__(self) -> int:
        return len(self._members)

    @property
    def ids(self) -> bytes:
        """The packed ids it was made from."""
        return self._packed

    def positions(self, ids: bytes) -> list[int]:
        """The positions, among packed ids, of those that are in the set."""
        return [at for at, key_id in enumerate(_split(ids)) if key_id in self._members]

    def missing(self, ids: bytes) -> bytes:
        """Those of packed ids that are not in the set, packed."""
        return b"".join([key_id for key_id in _split(ids) if key_id not in self._members])


def _split(ids: bytes) -> list[bytes]:
    if len(ids) % KEY_ID_BYTES:
        raise InvalidInput("data key ids have 16 bytes each")
    return [ids[at : at + KEY_ID_BYTES] for at in range(0, len(ids), KEY_ID_BYTES)]
