# SPDX-License-Identifier: Apache-2.0
"""The C loop as a contender: ``loop.h`` on an engine, built beforehand (``environment.build_loops``) and loaded here.

Its buffers are contiguous and reused, and each thread has its own; only the call is timed, with the GIL released.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

from contender import LARGEST, MIB, SIZES, Contender

LIBRARIES = Path(__file__).resolve().parents[2] / "build" / "bench"
OVERHEAD = 156
TAG = 16
HEADLINE = 64


class Buffers(NamedTuple):
    """One share of a batch: input, output, and how many records."""

    source: ctypes.Array[ctypes.c_char]
    target: ctypes.Array[ctypes.c_char]
    records: int


class _Loop(Contender):
    """Class attributes: ``library``, the file that was built; ``overhead``, what a record grows by."""

    less = "a yardstick: no Python, no key management, no secret memory"
    library: str
    overhead = OVERHEAD
    arguments: tuple[int, ...] = ()
    way = ""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._library = ctypes.CDLL(str(LIBRARIES / f"{self.library}.so"))
        self._library.cloop_engine.restype = ctypes.c_char_p
        if self._library.cloop_start() != 1:
            raise RuntimeError(f"{self.library} cannot be used here")

    def version(self) -> str:
        name: bytes = self._library.cloop_engine()
        return name.decode()

    def prepare(self, records: list[bytes]) -> Buffers:
        source = ctypes.create_string_buffer(b"".join(records), len(records) * self.size)
        target = ctypes.create_string_buffer(len(records) * (self.size + self.overhead))
        return Buffers(source, target, len(records))

    def encrypt(self, records: Buffers) -> Buffers:
        self._call("encrypt", records)
        return Buffers(records.target, records.source, records.records)

    def decrypt(self, sealed: Buffers) -> Buffers:
        self._call("decrypt", sealed)
        return Buffers(sealed.target, sealed.source, sealed.records)

    def records(self, opened: Buffers) -> list[bytes]:
        whole = opened.source.raw
        return [whole[at : at + self.size] for at in range(0, len(whole), self.size)]

    def _call(self, direction: str, buffers: Buffers) -> None:
        size, count = ctypes.c_size_t(self.size), ctypes.c_size_t(buffers.records)
        call = self._library[f"cloop{self.way}_{direction}"]
        if call(buffers.source, size, count, *self.arguments, buffers.target) != 1:
            raise RuntimeError(f"the C loop could not {direction}")


class EvpKeyEach(_Loop):
    """On the libcrypto that the native layer links."""

    title = "C loop, EVP, a data key each"
    library = "evp"
    arguments: tuple[int, ...] = (1,)
    threads: ClassVar[Sequence[int]] = (1, 2)


class EvpLong(EvpKeyEach):
    """As many records as a long column has rows."""

    title = "C loop, EVP, 100,000 records, a data key each"
    most = 100_000
    most_bytes = 100_000 * HEADLINE
    sizes: ClassVar[Sequence[int]] = (HEADLINE,)


class EvpOneKey(EvpKeyEach):
    """One data key."""

    title = "C loop, EVP, one data key"
    arguments: tuple[int, ...] = (0,)


class EvpBare(EvpKeyEach):
    """The most that this engine gives: AES-256-GCM under one key into reused buffers, no envelope."""

    title = "bare AES-256-GCM in C, EVP"
    sizes: ClassVar[Sequence[int]] = (HEADLINE, MIB, LARGEST)
    threads: ClassVar[Sequence[int]] = (1,)
    arguments: tuple[int, ...] = ()
    way = "_bare"
    overhead = TAG


class IpsecMbKeyEach(EvpKeyEach):
    """On intel-ipsec-mb."""

    title = "C loop, intel-ipsec-mb, a data key each"
    library = "ipsec_mb"


class IpsecMbLong(EvpLong):
    """As many records as a long column has rows."""

    title = "C loop, intel-ipsec-mb, 100,000 records, a data key each"
    library = "ipsec_mb"


class IpsecMbOneKey(EvpOneKey):
    """One data key."""

    title = "C loop, intel-ipsec-mb, one data key"
    library = "ipsec_mb"


class IpsecMbBare(EvpBare):
    """The most that this engine gives."""

    title = "bare AES-256-GCM in C, intel-ipsec-mb"
    library = "ipsec_mb"


class NewerKeyEach(EvpKeyEach):
    """On a newer libcrypto, taken from a wheel that bundles one."""

    title = "C loop, newer EVP, a data key each"
    library = "newer"
    sizes: ClassVar[Sequence[int]] = (HEADLINE, SIZES[-1])
    threads: ClassVar[Sequence[int]] = (1,)


class NewerOneKey(NewerKeyEach):
    """One data key."""

    title = "C loop, newer EVP, one data key"
    arguments: tuple[int, ...] = (0,)


class NewerBare(EvpBare):
    """The most that this engine gives."""

    title = "bare AES-256-GCM in C, newer EVP"
    library = "newer"
