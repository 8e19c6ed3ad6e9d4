# SPDX-License-Identifier: Apache-2.0
"""Measure one contender at one record size, in this process: ``worker.py CONTENDER SIZE MIN_TIME VALUES OUTPUT``.

The driver starts one for each contender, size and round, so that contenders take turns and what disturbs the machine
disturbs them all; pyperf's own runner would finish one figure in all its processes before it begins the next. The
rest is pyperf's: calibrated loops, a warm-up, its runs and its files, which are merged over the rounds. Times are for
one record. A figure is named contender/direction/size/threads.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import pyperf

import registry
from contender import Contender, count_for, works


def describe(contender: Contender) -> str:
    """The package and version that a contender runs on, and what it says of itself."""
    package = type(contender).package
    parts = [f"{package} {importlib.metadata.version(package)}" if package else "", contender.version()]
    return ", ".join(part for part in parts if part)


def time_loops(work: Callable[[], Any], loops: int) -> float:
    """Seconds for so many calls, with the results freed as they come."""
    start = time.perf_counter()
    for _ in range(loops):
        work()
    return time.perf_counter() - start


def calibrate(work: Callable[[], Any], min_time: float) -> int:
    """How many calls take ``min_time`` seconds; what it runs warms up too."""
    loops = 1
    while (spent := time_loops(work, loops)) < min_time:
        loops = max(loops + 1, min(10 * loops, int(loops * min_time / max(spent, 1e-9)) + 1))
    return loops


def measure(name: str, work: Callable[[], Any], count: int, min_time: float, values: int) -> pyperf.Benchmark:
    """One process's share of a figure."""
    loops = calibrate(work, min_time)
    records = loops * count
    first, *rest = (time_loops(work, loops) / records for _ in range(values + 1))
    metadata = {"name": name, "unit": "second", "loops": loops, "inner_loops": count}
    run = pyperf.Run(rest, warmups=[(loops, first)], metadata=metadata, collect_metadata=False)
    return pyperf.Benchmark([run])


def main() -> None:
    """Set the contender up, check a round trip, and time what it does."""
    name, size, min_time, values, output = sys.argv[1:]
    kind = registry.load(name)
    most = count_for(kind, int(size), max(kind.threads))
    contender = kind(int(size))
    try:
        records = [os.urandom(int(size)) for _ in range(most)]
        benchmarks = [
            measure(f"{name}/{direction}/{size}/{threads}", work, count, float(min_time), int(values))
            for (direction, threads), (work, count) in works(contender, records).items()
        ]
        for benchmark in benchmarks:
            benchmark.update_metadata({"ran_on": describe(contender) or "-"})
    finally:
        contender.close()
    pyperf.BenchmarkSuite(benchmarks).dump(output, replace=True)


if __name__ == "__main__":
    main()
