# SPDX-License-Identifier: Apache-2.0
"""Run the whole suite: ``python bench [--quick] [--output DIR] [--only NAME ...]`` (``make bench ARGS=...``).

In each round and at each size every contender has its turn, in a process of its own, so that the peers stand side by
side in time. Writes results.json, README.md and plots into docs/benchmarks (a quick run: build/bench/quick, so
that it never stands in for a whole one). Contenders that cannot run are named in the tables, with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import environment
import plots
import registry
import report
from contender import MIB
from environment import BUILT, ROOT
from goals import HEADLINE, verdicts
from results import Results

BENCH = ROOT / "bench"
MOST_SECONDS = 300
"""A worker that takes longer is ended, and named."""


@dataclass(frozen=True)
class Plan:
    """How thoroughly a run measures.

    Attributes:
        rounds: processes for each figure; the headline size has ``headline_rounds``.
        min_time: seconds that a value takes at least.
        values: values a process.
        sizes: record sizes, or None for all.
    """

    rounds: int
    headline_rounds: int
    min_time: float
    values: int
    sizes: frozenset[int] | None = None

    def turns(self, sizes: dict[str, set[int]]) -> Iterator[tuple[int, int, str]]:
        """(round, size, contender) in the order they run, given the sizes that each contender has."""
        every = sorted(set().union(*sizes.values()))
        for turn in range(max(self.rounds, self.headline_rounds)):
            for size in every:
                if (self.sizes is None or size in self.sizes) and turn < self._rounds(size):
                    yield from ((turn, size, name) for name in sizes if size in sizes[name])

    def _rounds(self, size: int) -> int:
        return self.headline_rounds if size == HEADLINE else self.rounds


WHOLE = Plan(rounds=3, headline_rounds=6, min_time=0.05, values=3)
QUICK = Plan(rounds=1, headline_rounds=1, min_time=0.01, values=2, sizes=frozenset({HEADLINE, 4096, MIB}))


class Run:
    """One run: its plan, who takes part as what (``cards``), and who could not (``failures``)."""

    def __init__(
        self, plan: Plan, names: list[str], missing: dict[str, str], folder: Path = BUILT / "runs"
    ) -> None:
        self.plan = plan
        self.failures = {name: missing[family(name)] for name in names if family(name) in missing}
        self.cards: dict[str, dict[str, Any]] = {}
        self._folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for group in (registry.OURS, registry.PEERS):
            self._introduce([name for name in names if name in group and name not in self.failures])

    def _introduce(self, names: list[str]) -> None:
        """Ask contenders of one environment what they are."""
        if not names:
            return
        done = self._start("describe.py", names, names[0])
        cards = {} if isinstance(done, str) else json.loads(done.stdout)
        for name in names:
            card = cards.get(name, {"problem": done})
            if "problem" in card:
                self._fail(name, card["problem"])
            else:
                self.cards[name] = card

    def measure(self) -> Results:
        """Let everyone take turns; whoever fails is not asked again."""
        turns = list(self.plan.turns({name: set(card["sizes"]) for name, card in self.cards.items()}))
        start = time.monotonic()
        for done, (turn, size, name) in enumerate(turns):
            if name in self.failures:
                continue
            say(f"{time.monotonic() - start:6.0f} s  {done + 1}/{len(turns)}  {name}, {size} B")
            output = self._folder / f"{turn}-{size}-{name}.json"
            values = [name, str(size), str(self.plan.min_time), str(self.plan.values), str(output)]
            problem = self._start("worker.py", values, name)
            if isinstance(problem, str):
                self._fail(name, f"at {size} B: {problem}")
        return Results.load(sorted(self._folder.glob("*.json")))

    def _fail(self, name: str, problem: str) -> None:
        self.failures[name] = problem
        print(f"!! {name} did not run: {problem}", file=sys.stderr)

    def _start(self, script: str, values: list[str], name: str) -> subprocess.CompletedProcess[str] | str:
        """Run a script in the environment that ``name`` belongs to: the finished process, or what went wrong."""
        python = sys.executable
        variables = {**os.environ, **self.cards.get(name, {}).get("environment", {})}
        if name in registry.PEERS:
            python = str(environment.peers_python())
            variables.pop("PYTHONPATH", None)
        command = [python, str(BENCH / script), *values]
        try:
            done = subprocess.run(
                command, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                timeout=MOST_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"took longer than {MOST_SECONDS} s"
        return done if done.returncode == 0 else environment.last_line(done.stderr)


def family(name: str) -> str:
    """What a contender is installed or built with: the C loops by their engine, the peers by their package."""
    return "-".join(name.split("-")[: 2 if name.startswith("c-") else 1])


def measure_memory() -> dict[str, float]:
    """Bytes beyond input and output, and for lists their part of the input; what fails is left out and said."""
    found: dict[str, float] = {}
    for name, way, threads in (
        ("columns, one thread", "columns", 1),
        ("columns, two threads", "columns", 2),
        ("lists, of the input's size", "lists", 1),
    ):
        command = [sys.executable, str(BENCH / "memory.py"), way, str(threads)]
        done = subprocess.run(command, cwd=BENCH, capture_output=True, text=True)
        if done.returncode:
            print(f"!! memory of {name}: {environment.last_line(done.stderr)}", file=sys.stderr)
            continue
        answer = json.loads(done.stdout)
        found[name] = answer["beyond"] / answer["input"] if way == "lists" else answer["beyond"]
    return found


def say(text: str) -> None:
    """Show where the run stands, on one line where there is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="bench", description="OpenKCM beside its peers.")
    parser.add_argument("--quick", action="store_true", help="a smoke run: three sizes, one process each")
    parser.add_argument("--output", type=Path, help="where to write (default docs/benchmarks)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these contenders only")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Run, judge, write; returns 1 if anything of ours did not run."""
    options = parse(arguments)
    output = options.output or (BUILT / "quick" if options.quick else ROOT / "docs" / "benchmarks")
    names = options.only or [*registry.OURS, *registry.PEERS]
    print("Installing the peers and building the C loops", file=sys.stderr)
    missing = {**environment.install_peers(), **environment.build_loops()}
    for family, why in missing.items():
        print(f"!! {family}: {why}", file=sys.stderr)
    machine = environment.describe_machine()
    run = Run(QUICK if options.quick else WHOLE, names, missing)
    results = run.measure()
    memory = measure_memory()
    found = verdicts(results, machine["engine"], memory)
    write(output, machine, run, results, memory, found)
    say("")
    print(report.goals_table(found))
    for name, why in run.failures.items():
        print(f"!! {name} did not run: {why}", file=sys.stderr)
    print(f"Written to {output}", file=sys.stderr)
    return int(any(name in registry.OURS for name in run.failures))


def write(
    output: Path, machine: dict[str, Any], run: Run, results: Results, memory: dict[str, float], found: Any
) -> None:
    """Write the JSON, the page and the plots."""
    output.mkdir(parents=True, exist_ok=True)
    whole = {
        "machine": machine,
        "plan": {**asdict(run.plan), "sizes": results.sizes()},
        "contenders": {
            name: {"title": run.cards[name]["title"], "ran_on": ran_on}
            for name, ran_on in results.ran_on.items()
        },
        "did_not_run": run.failures,
        "goals": [{**asdict(verdict), "met": verdict.met} for verdict in found],
        "memory_bytes": memory,
        "nanoseconds_per_record": results.as_json(),
    }
    (output / "results.json").write_text(json.dumps(whole, indent=1) + "\n")
    titles = {name: card["title"] for name, card in run.cards.items()}
    drawn = plots.draw(results, titles, output)
    page = report.page(machine, results, found, run.cards, run.failures, drawn, quick=run.plan is QUICK)
    (output / "README.md").write_text(page)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
