# SPDX-License-Identifier: Apache-2.0
"""Run each hot loop under callgrind, for ``instructions.py``: ``hot_loops.py COUNTING_LIBRARY``.

Each loop has run before it is counted, so that what is made once is not in the count, and the garbage collector rests
meanwhile. Each is counted several times: now and then something else falls into it, a look at a clock that is due or
memory from the system, so the least is what the loop costs. Threads in the background are counted apart by callgrind.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from typing import Any

from openkcm import crypto
from ours.columns import KeyEach as Columns
from ours.columns import OneKey as OneKeyColumns
from ours.lists import KeyEach, OneKey
from ours.single import Leased, Strict

SIZE = 64
BATCH = 1000
REPEATS = 3
CALLS = 512
"""Two fillings of the pool, so that single calls carry their part of what it costs."""


def loops() -> dict[str, tuple[Callable[[], Any], int]]:
    """What is counted, and how many records it does."""
    records = [bytes([at % 251]) * SIZE for at in range(BATCH)]
    found: dict[str, tuple[Callable[[], Any], int]] = {}
    for kind, words in ((KeyEach, "a data key each"), (OneKey, "one data key")):
        batches = kind(SIZE)
        add_pair(found, "_many", words, batches, records)
    for column, words in ((Columns, "a data key each"), (OneKeyColumns, "one data key")):
        add_column(found, words, column(SIZE), records)
    calls = records[: CALLS // 2] * 2
    add_pair(found, "", "a call a record", Strict(SIZE), calls)
    leased = Leased(SIZE)
    blobs = leased.encrypt(calls)
    found["decrypt, a call a record, open-lease"] = (lambda: leased.decrypt(blobs), CALLS)
    parent, keys, aad = crypto.generate_wrapping_key(), crypto.generate_keys(BATCH), bytes(56)
    wrapped = crypto.wrap_many(parent, keys, aad)
    found["wrap keys"] = (lambda: crypto.wrap_many(parent, keys, aad), BATCH)
    found["unwrap keys"] = (lambda: crypto.unwrap_many(parent, wrapped, aad), BATCH)
    return found


def add_pair(
    found: dict[str, tuple[Callable[[], Any], int]], form: str, words: str, way: Any, records: Any
) -> None:
    """Encrypt and decrypt of one way."""
    sealed = way.encrypt(records)
    found[f"encrypt{form}, {words}"] = (lambda: way.encrypt(records), len(records))
    found[f"decrypt{form}, {words}"] = (lambda: way.decrypt(sealed), len(records))


def add_column(found: dict[str, tuple[Callable[[], Any], int]], words: str, way: Any, records: Any) -> None:
    """A column's two directions."""
    for direction, work in way.ways(records, 1).items():
        found[f"{direction}_column, {words}"] = (work, len(records))


def main() -> None:
    """Warm every loop up, then count each."""
    counting = ctypes.CDLL(sys.argv[1])
    found = loops()
    for work, _ in found.values():
        work()
    gc.collect()
    gc.disable()
    for name, (work, count) in found.items():
        for _ in range(REPEATS):
            counting.counting_start()
            result = work()
            counting.counting_stop(f"{count} {name}".encode())
            del result


if __name__ == "__main__":
    main()
