# SPDX-License-Identifier: Apache-2.0
"""The figures of one run: what the workers wrote, merged over the rounds.

Invariant: a ratio is of two figures of one run. A figure that is missing makes a ratio None, never a guess.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyperf

import registry


@dataclass(frozen=True)
class Figure:
    """Time for one record in nanoseconds: median and standard deviation of all values of all processes."""

    median: float
    deviation: float
    values: int
    processes: int


class Results:
    """Figures by contender, direction, size and threads, and what each contender ran on."""

    def __init__(self) -> None:
        self.figures: dict[tuple[str, str, int, int], Figure] = {}
        self.ran_on: dict[str, str] = {}

    @classmethod
    def load(cls, files: Iterable[Path]) -> Results:
        """Merge the files of a run."""
        runs: dict[str, list[pyperf.Benchmark]] = {}
        for file in files:
            for benchmark in pyperf.BenchmarkSuite.load(str(file)):
                runs.setdefault(benchmark.get_name(), []).append(benchmark)
        results = cls()
        for name, benchmarks in runs.items():
            contender, direction, size, threads = name.split("/")
            values = [value * 1e9 for benchmark in benchmarks for value in benchmark.get_values()]
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            figure = Figure(statistics.median(values), deviation, len(values), len(benchmarks))
            results.figures[contender, direction, int(size), int(threads)] = figure
            results.ran_on[contender] = str(benchmarks[0].get_metadata()["ran_on"])
        return results

    def find(self, contender: str, direction: str, size: int, threads: int = 1) -> Figure | None:
        """One figure, or None if it was not measured."""
        return self.figures.get((contender, direction, size, threads))

    def time(self, contender: str, direction: str, size: int, threads: int = 1) -> float | None:
        """Nanoseconds a record, or None."""
        figure = self.find(contender, direction, size, threads)
        return figure.median if figure else None

    def speed(self, contender: str, direction: str, size: int, threads: int = 1) -> float | None:
        """Gigabytes of plaintext a second, or None."""
        figure = self.find(contender, direction, size, threads)
        return size / figure.median if figure else None

    def sizes(self) -> list[int]:
        """Every size that was measured."""
        return sorted({size for _, _, size, _ in self.figures})

    def contenders(self) -> list[str]:
        """Every contender that was measured, in the registry's order."""
        return [name for name in (*registry.OURS, *registry.PEERS) if name in self.ran_on]

    def as_json(self) -> dict[str, Mapping[str, Any]]:
        """The figures by their names."""
        return {"/".join(map(str, place)): asdict(figure) for place, figure in self.figures.items()}


def ratio(time: float | None, other: float | None) -> float | None:
    """How many times as fast the first is as the other."""
    return None if time is None or other is None else other / time
