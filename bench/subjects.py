# SPDX-License-Identifier: Apache-2.0
"""A column with a subject a row: very many rows, very many subjects, and how few calls it takes.

Run ``python bench/subjects.py [ROWS] [SUBJECTS]`` (10,000,000 and 100,000 by default, which takes 4 GiB of memory). The
rows have 64 bytes, and their subjects are in no order. Counted are the calls of the Core and of the Gateway's key
store; "again" is a Gateway that has opened nothing yet.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import openkcm
from openkcm.gateway import ServiceHandle
from openkcm.gateway.sqlite_store import SQLiteKeyStore
from ours.base import SERVICE, TENANT, open_vault

SIZE = 64


class Calls:
    """How often the Core and key stores are called."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def watch(self, thing: Any, *names: str) -> Any:
        """Count what is called on it by these names."""
        for name in names:
            setattr(thing, name, self._counted(name, getattr(thing, name)))
        return thing

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            self.counts[name] += 1
            return call(*arguments)

        return counted


def column(rows: int, subjects: int) -> tuple[pa.Array, pa.Array]:
    """Records, and a name for each: plain text, not a dictionary."""
    random = np.random.default_rng(4)
    data = random.bytes(rows * SIZE)
    offsets = np.arange(0, rows * SIZE + 1, SIZE, dtype=np.int32)
    records = pa.Array.from_buffers(pa.binary(), rows, [None, pa.py_buffer(offsets), pa.py_buffer(data)])
    names = pa.array([f"user-{number}" for number in range(subjects)])
    # Every subject is there, and each row's is drawn.
    codes = np.concatenate([np.arange(subjects), random.integers(0, subjects, rows - subjects)]).astype(
        np.int32
    )
    random.shuffle(codes)
    return records, pa.DictionaryArray.from_arrays(codes, names)


def measure(what: str, rows: int, calls: Calls, act: Callable[[], Any]) -> Any:
    """Do it once, and print time and calls."""
    calls.counts.clear()
    began = time.perf_counter()
    result = act()
    spent = time.perf_counter() - began
    counted = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sorted(calls.counts.items()))
    print(f"{what:44} {spent:7.2f} s  {1e9 * spent / rows:6.0f} ns a row   {counted}", flush=True)
    return result


def main() -> None:
    """Encrypt and decrypt on one thread and on two."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000_000
    subjects = int(sys.argv[2]) if len(sys.argv) > 2 else 100_000
    records, coded = column(rows, subjects)
    names = coded.dictionary_decode()
    with tempfile.TemporaryDirectory() as name, open_vault(Path(name)) as core:
        calls = Calls()
        calls.watch(core, "wrap_keys", "unwrap_keys")

        def fresh() -> ServiceHandle:
            store = calls.watch(SQLiteKeyStore(Path(name) / "keys.db"), "find_subjects", "find_ids", "add")
            return openkcm.Gateway(core, keys=store).service(TENANT, SERVICE)

        print(f"{rows:,} rows of {subjects:,} subjects; {openkcm.backend_info()['engine']}")
        first = fresh()
        sealed = measure(
            "encrypt, every subject new", rows, calls, lambda: first.encrypt_column(records, subjects=names)
        )
        for threads in (1, 2):
            handle, words = fresh(), f"again, threads: {threads}"
            opened = measure(
                f"decrypt {words}",
                rows,
                calls,
                partial(handle.decrypt_column, sealed, threads=threads),
            )
            if not opened.equals(records):
                raise SystemExit("it does not give back what went in")
            del opened
        for kind, given in (("text", names), ("a dictionary", coded)):
            for threads in (1, 2):
                handle = fresh()
                measure(
                    f"encrypt again, subjects as {kind}, threads: {threads}", rows, calls,
                    partial(handle.encrypt_column, records, subjects=given, threads=threads),
                )  # fmt: skip
    print(f"most memory at a time: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2:.1f} GiB")


if __name__ == "__main__":
    main()
