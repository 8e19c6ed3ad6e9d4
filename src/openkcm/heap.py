# SPDX-License-Identifier: Apache-2.0
"""The C library's heap, told that large blocks come and go here.

By default glibc gives the memory at the end of its heap back to the system with each block of 128 KiB that is freed,
and takes it anew, zeroed page by page, for the next: where batches of records, messages and lists of megabytes follow
each other, that takes half of all time. It learns from what a process frees (mallopt(3), M_MMAP_THRESHOLD): after one
block of nearly 32 MiB, the most that it learns from, it keeps up to twice that for the next batch. Any process that
ever freed a large array is in that state; so this changes no setting, and where MALLOC_TRIM_THRESHOLD_ or
MALLOC_MMAP_THRESHOLD_ is set in the environment, that stands.
"""

from __future__ import annotations

from typing import Final

_BLOCK_BYTES: Final = (32 << 20) - (64 << 10)
"""Just below what glibc still learns from."""


def keep_freed_memory() -> None:
    """Free one large block, which the system never had to give memory for."""
    bytes(_BLOCK_BYTES)
