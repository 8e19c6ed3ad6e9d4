# SPDX-License-Identifier: Apache-2.0
"""``encrypt_column`` and ``decrypt_column``: an Arrow array in, an Arrow array out, no Python object a record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import pyarrow

from contender import LARGEST, MIB

from .base import ONE_KEY, OpenKCM
from .lists import HEADLINE


class KeyEach(OpenKCM):
    """A data key for every row. The threads are its own: the column is not cut."""

    title = "OpenKCM columns, a data key each"
    threads: ClassVar[Sequence[int]] = (1, 2)

    def prepare(self, records: list[bytes]) -> pyarrow.Array:
        return pyarrow.array(records, pyarrow.binary())

    def ways(self, records: list[bytes], threads: int) -> dict[str, Callable[[], Any]]:
        column, service = self.prepare(records), self.service
        sealed = service.encrypt_column(column, threads=threads)
        self.check(records, [service.decrypt_column(sealed, threads=threads)])
        return {
            "encrypt": lambda: self.service.encrypt_column(column, threads=threads),
            "decrypt": lambda: self.service.decrypt_column(sealed, threads=threads),
        }

    def records(self, opened: pyarrow.Array) -> list[bytes]:
        found: list[bytes] = opened.to_pylist()
        return found


class LongKeyEach(KeyEach):
    """As many rows as a column has: 10,000 make 20 runs, which two threads share out but coarsely."""

    title = "OpenKCM columns of 100,000 rows, a data key each"
    most = 100_000
    most_bytes = 100_000 * HEADLINE
    sizes: ClassVar[Sequence[int]] = (HEADLINE,)


class OneKey(KeyEach):
    """One data key for all rows."""

    title = "OpenKCM columns, one data key"
    policy = ONE_KEY


class Reused(KeyEach):
    """Outputs go into buffers that are reused, so that the kernel need not hand out fresh pages."""

    title = "OpenKCM columns, a data key each, out="
    sizes: ClassVar[Sequence[int]] = (HEADLINE, MIB, LARGEST)
    threads: ClassVar[Sequence[int]] = (1,)

    def ways(self, records: list[bytes], threads: int) -> dict[str, Callable[[], Any]]:
        column, service = self.prepare(records), self.service
        sealed = service.encrypt_column(column)
        there, back = bytearray(sealed.nbytes), bytearray(column.nbytes)
        self.check(records, [service.decrypt_column(sealed, out=back)])
        return {
            "encrypt": lambda: self.service.encrypt_column(column, out=there),
            "decrypt": lambda: self.service.decrypt_column(sealed, out=back),
        }


class KeyEachEvp(KeyEach):
    """Held to OpenSSL's EVP, to set it beside the C loop on EVP whatever the default engine is."""

    title = "OpenKCM columns, a data key each, EVP"
    sizes: ClassVar[Sequence[int]] = (HEADLINE,)
    environment = MappingProxyType({"OPENKCM_AES": "evp"})


class OneKeyEvp(OneKey):
    """The same with one data key."""

    title = "OpenKCM columns, one data key, EVP"
    sizes: ClassVar[Sequence[int]] = (HEADLINE,)
    environment = MappingProxyType({"OPENKCM_AES": "evp"})
