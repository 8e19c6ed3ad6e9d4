# SPDX-License-Identifier: Apache-2.0
"""``encrypt`` and ``decrypt``, a call a record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from contender import LARGEST, MIB, SIZES

from .base import SERVICE, TENANT, OpenKCM

CALLS = 200
OVERHEAD = 156
LEASE_SECONDS = 3600.0


class Strict(OpenKCM):
    """A data key for each record from a warm pool, which refills within the timed calls; each decrypt asks the Core."""

    title = "OpenKCM, a call a record, strict"
    most = CALLS
    most_bytes = MIB
    sizes: ClassVar[Sequence[int]] = (*SIZES, LARGEST)

    def encrypt(self, records: list[bytes]) -> list[bytes]:
        call = self.service.encrypt
        return [call(record) for record in records]

    def decrypt(self, sealed: list[bytes]) -> list[bytes]:
        call = self.service.decrypt
        return [call(blob) for blob in sealed]


class Into(Strict):
    """Large records into buffers that are used again, so that the kernel need not hand out fresh pages."""

    title = "OpenKCM, a call a record, into a buffer"
    sizes: ClassVar[Sequence[int]] = (MIB, LARGEST)

    def ways(self, records: list[bytes], threads: int) -> dict[str, Callable[[], Any]]:
        (record,) = records
        sealed, opened = bytearray(len(record) + OVERHEAD), bytearray(len(record))
        self.service.encrypt_into(record, sealed)
        self.service.decrypt_into(sealed, opened)
        self.check(records, [[bytes(opened)]])
        blob = bytes(sealed)
        return {
            "encrypt": lambda: self.service.encrypt_into(record, sealed),
            "decrypt": lambda: self.service.decrypt_into(blob, opened),
        }


class Leased(Strict):
    """The same where an open-lease was granted: data keys that were opened are kept for a while."""

    title = "OpenKCM, a call a record, open-lease"
    directions = ("decrypt",)

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.core.set_lease(TENANT, SERVICE, LEASE_SECONDS)
