# SPDX-License-Identifier: Apache-2.0
"""How much memory a batch takes beyond its input and its output: the process's high-water mark, reset before.

Run ``python bench/memory.py lists|columns THREADS``; prints a JSON object. Records are large enough that what lies
around each object in a list is small beside them. Linux only: it reads and resets /proc/self's counters.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from contender import KIB, MIB
from ours.columns import KeyEach as Columns
from ours.lists import KeyEach as Lists

SIZE = KIB
COUNT = 64 * MIB // SIZE
WARM = 64


def resident(field: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at the most since it was reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * KIB
    raise RuntimeError(f"this system does not tell {field}")


def reset_mark() -> None:
    """Begin the high-water mark anew."""
    Path("/proc/self/clear_refs").write_text("5")


def beyond(call: Any, argument: Any, output_bytes: Any) -> int:
    """Bytes at the highest point above what was there before and what came out."""
    # What stays for good is there before; a whole batch would leave its memory with the allocator, for the next to use.
    call(argument[:WARM])
    reset_mark()
    before = resident("VmRSS")
    result = call(argument)
    return resident("VmHWM") - before - int(output_bytes(result))


def main() -> None:
    """Measure one way in this process."""
    way, threads = sys.argv[1], int(sys.argv[2])
    records = [bytes([at % 251]) * SIZE for at in range(COUNT)]
    if way == "lists":
        contender: Any = Lists(SIZE)
        extra = beyond(
            contender.service.encrypt_many, records, lambda blobs: sum(map(sys.getsizeof, [blobs, *blobs]))
        )
    else:
        contender = Columns(SIZE)
        column = contender.prepare(records)
        del records
        service = contender.service
        extra = beyond(
            lambda rows: service.encrypt_column(rows, threads=threads), column, lambda made: made.nbytes
        )
    contender.close()
    print(json.dumps({"beyond": extra, "input": COUNT * SIZE}))


if __name__ == "__main__":
    main()
