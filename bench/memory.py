# SPDX-License-Identifier: Apache-2.0
"""How much memory a batch takes beyond its input and its output, by the pages that the kernel had to hand out for it.

Run ``python bench/memory.py lists|columns THREADS``; prints a JSON object. Page faults are exact where the counters of
resident memory are not: each thread keeps up to 64 pages of those to itself. Without huge pages a fault is a page. What
a batch takes and gives back again and again is counted each time, so this is the most that it can be. Records are
large, so that offsets, and what lies around each object of a list, are small beside them.
"""

from __future__ import annotations

import ctypes
import gc
import json
import resource
import sys
from collections.abc import Callable
from typing import Any

from contender import KIB, MIB
from ours.columns import KeyEach as Columns
from ours.lists import KeyEach as Lists

SIZE = 16 * KIB
COUNT = 64 * MIB // SIZE
WARM = 64
PR_SET_THP_DISABLE = 41


def pages() -> int:
    """How many pages this process had to be given since it began, but for those read from a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def beyond(call: Callable[[Any], Any], records: Any, size_of: Callable[[Any], int]) -> int:
    """Bytes that a call touched for the first time, less what came out."""
    # What stays for good is there before; a whole batch would leave its memory with the allocator, for the next to use.
    call(records[:WARM])
    gc.collect()
    before = pages()
    result = call(records)
    return (pages() - before) * resource.getpagesize() - size_of(result)


def measure(way: str, threads: int) -> int:
    """Bytes beyond input and output for one way."""
    records = [bytes([at % 251]) * SIZE for at in range(COUNT)]
    contender: Any = Lists(SIZE) if way == "lists" else Columns(SIZE)
    batch = contender.prepare(records)
    try:
        if way == "lists":
            return beyond(contender.encrypt, batch, lambda blobs: sum(map(sys.getsizeof, (blobs, *blobs))))
        call = contender.service.encrypt_column
        return beyond(lambda column: call(column, threads=threads), batch, lambda made: int(made.nbytes))
    finally:
        contender.close()


if __name__ == "__main__":
    if ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) != 0:
        raise SystemExit("huge pages cannot be turned off here, so pages cannot be counted")
    print(json.dumps({"beyond": measure(sys.argv[1], int(sys.argv[2])), "input": COUNT * SIZE}))
