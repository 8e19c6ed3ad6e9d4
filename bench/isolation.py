# SPDX-License-Identifier: Apache-2.0
"""Whether one customer's outage is felt by another: latency of tenant B's decrypts while tenant A is unplugged.

Run ``python bench/isolation.py [ROUNDS]`` (60 by default: eight minutes). Both tenants decrypt 4,000 single records a
second, each in a thread of one process. A round has one short phase of each of A's conditions, in random order, so
that drift of the machine falls on all alike; each condition is compared with "well" over the same rounds.

The 99th percentile of a microsecond's work is made by the operating system more than by the work. How much it moves
by chance is shown by "well again", which is "well" once more: a condition whose interval looks like its interval has
no effect that this machine can show. "idle" is A without any user. Where A decrypts, it keeps the code that B needs
in the processor's caches; B loses that as well when A's users merely go home.
"""

from __future__ import annotations

import logging
import random
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import openkcm
from openkcm.core.core import POLL_SECONDS
from openkcm.errors import OpenKCMError, RootDisabled, RootUnavailable

RATE: Final = 4000.0
ROUNDS: Final = 60
PHASE_SECONDS: Final = 0.7
SETTLE_SECONDS: Final = 0.15
RESAMPLES: Final = 1000
HOLD_SECONDS: Final = 3.0
NAP_SECONDS: Final = 0.02
PATIENCE_SECONDS: Final = 30.0


class Plug:
    """A root in this process whose customer can pull the plug, or whose network can go."""

    development = False

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.state = "well"
        self.healed = threading.Event()

    def wrap(self, sealed: bytes, context: Mapping[str, str]) -> bytes:
        return sealed

    def unwrap(self, wrapped: bytes, context: Mapping[str, str]) -> bytes:
        if self.state == "disabled":
            raise RootDisabled("off")
        if self.state == "black-holed":
            self.healed.wait(HOLD_SECONDS)
        if self.state != "well":
            raise RootUnavailable("no answer", retryable=False)
        return wrapped

    def warnings(self) -> list[str]:
        return []

    def close(self) -> None:
        """Nothing is open."""


class Load(threading.Thread):
    """A tenant's users: decrypt one record at a steady rate, and note how long each took and how many failed.

    Between two records the thread sleeps, as one does that waits for its next request.
    """

    def __init__(self, service: openkcm.ServiceHandle) -> None:
        super().__init__(daemon=True)
        self._service = service
        self._blob = service.encrypt(b"r" * 64)
        self._end = threading.Event()
        self.idle = False
        self.times = array("d")
        self.failed = 0

    def run(self) -> None:
        due = time.perf_counter()
        while not self._end.is_set():
            if self.idle:
                time.sleep(NAP_SECONDS)
                due = time.perf_counter()
                continue
            begun = time.perf_counter()
            try:
                self._service.decrypt(self._blob)
            except OpenKCMError:
                self.failed += 1
            self.times.append(time.perf_counter() - begun)
            due += (0.5 + random.random()) / RATE  # else both threads meet at each tick, or never
            time.sleep(max(0.0, due - time.perf_counter()))

    def take(self) -> tuple[array[float], int]:
        """What was noted since the last time."""
        times, self.times = self.times, array("d")
        failed, self.failed = self.failed, 0
        return times, failed

    def end(self) -> None:
        """Stop."""
        self._end.set()
        self.join(30)


class Bench:
    """Tenants A and B of one Core, and what A can be in."""

    def __init__(self, core: openkcm.Core, gateway: openkcm.Gateway) -> None:
        self._core = core
        self._plug = Plug("plug:A")
        self._killed = False
        for tenant, plug in (("A", self._plug), ("B", Plug("plug:B"))):
            core._vault._roots[plug.uri] = plug
            core.link_tenant(tenant, root=plug.uri)
            core.create_service(tenant, "records")
        self.a, self.b = (Load(gateway.service(tenant, "records")) for tenant in ("A", "B"))
        # The condition, how it is brought about, and whether A's users are refused.
        self.conditions: dict[str, tuple[Callable[[], None], bool]] = {
            "well": (lambda: None, False),
            "well again": (lambda: None, False),
            "idle": (self._idle, False),
            "disabled": (self._disable, True),
            "black-holed": (self._black_hole, True),
            "killed": (self._kill, True),
        }

    def heal(self) -> None:
        """Make A well again, whatever it was in, and its users served."""
        self._plug.state = "well"
        self._plug.healed.set()
        self.a.idle = False
        if self._killed:
            self._core.restore("A")
            self._killed = False
        self._wait_for(openkcm.TenantState.LIVE)
        time.sleep(
            POLL_SECONDS
        )  # keys that were opened before the recovery was recorded are opened once more
        self._core.poll()
        while not self._core.status("A")[0].open:
            time.sleep(NAP_SECONDS)

    def _idle(self) -> None:
        self.a.idle = True

    def _kill(self) -> None:
        self._core.kill("A")
        self._killed = True

    def _disable(self) -> None:
        self._plug.state = "disabled"
        self._wait_for(openkcm.TenantState.DARK)

    def _black_hole(self) -> None:
        self._plug.state = "silent"
        self._wait_for(openkcm.TenantState.DARK)  # grace is over
        self._plug.healed.clear()
        self._plug.state = "black-holed"  # the probes from now on hang

    def _wait_for(self, state: openkcm.TenantState) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while self._core.probe("A").state is not state:
            if time.monotonic() > end:
                raise RuntimeError(f"A does not become {state}")
            time.sleep(NAP_SECONDS)


@dataclass
class Side:
    """B's latencies under one condition of A, in seconds, round by round."""

    rounds: list[array[float]] = field(default_factory=list)
    failed: int = 0

    def quantile(self, part: float, weights: Sequence[int] | None = None) -> float:
        """Of all rounds together, each counted as often as its weight says (once by default)."""
        weights = weights or [1] * len(self.rounds)
        left = (1 - part) * sum(
            weight * len(times) for weight, times in zip(weights, self.rounds, strict=True)
        )
        for seconds, at in self._descending:
            left -= weights[at]
            if left < 0:
                return seconds
        raise ValueError("there is no such quantile")

    def close(self) -> None:
        """Sort; not while anything is measured."""
        self._descending = sorted(
            ((seconds, at) for at, times in enumerate(self.rounds) for seconds in times), reverse=True
        )


def measure(bench: Bench, rounds: int) -> dict[str, Side]:
    """Have each condition once a round, in random order."""
    sides = {name: Side() for name in bench.conditions}
    for _ in range(rounds):
        for name in random.sample(list(sides), len(sides)):
            act, refused = bench.conditions[name]
            act()
            time.sleep(SETTLE_SECONDS)
            bench.a.take()
            bench.b.take()
            time.sleep(PHASE_SECONDS)
            times, failed = bench.b.take()
            ours, ours_failed = bench.a.take()
            if ours_failed != (len(ours) if refused else 0):
                raise RuntimeError(
                    f"A was to be {name}, and {ours_failed} of its {len(ours)} decrypts failed"
                )
            sides[name].rounds.append(times)
            sides[name].failed += failed
            bench.heal()
    for side in sides.values():
        side.close()
    return sides


def interval(side: Side, base: Side) -> tuple[float, float]:
    """The bootstrap's 95% interval of the ratio of 99th percentiles: whole rounds are drawn, with repetition."""
    count = len(base.rounds)
    ratios = []
    for _ in range(RESAMPLES):
        weights = [0] * count
        for at in random.choices(range(count), k=count):
            weights[at] += 1
        ratios.append(side.quantile(0.99, weights) / base.quantile(0.99, weights))
    ratios.sort()
    return ratios[int(0.025 * RESAMPLES)], ratios[int(0.975 * RESAMPLES)]


def report(sides: Mapping[str, Side]) -> None:
    """Print a line for each condition."""
    base = sides["well"]
    print(
        f"{'A is':<12} {'decrypts of B':>14} {'p50 us':>8} {'p99 us':>8} {'p99.9 us':>9}   p99 against well"
    )
    for name, side in sides.items():
        values = [side.quantile(part) * 1e6 for part in (0.5, 0.99, 0.999)]
        line = f"{name:<12} {sum(map(len, side.rounds)):>14,} {values[0]:>8.1f} {values[1]:>8.1f} {values[2]:>9.1f}"
        if side is not base:
            low, high = interval(side, base)
            change = side.quantile(0.99) / base.quantile(0.99) - 1
            line += f"   {change:+.1%} (95%: {low - 1:+.1%} to {high - 1:+.1%})"
        print(line, flush=True)
    print(f"errors of B: {sum(side.failed for side in sides.values())}")


def main() -> None:
    """Measure and report."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    logging.getLogger("openkcm").setLevel(logging.ERROR)  # a line for each change of A is no news here
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'vault.db'}"
        with openkcm.Core.open(url, probe_interval=1.0, grace=0.1) as core, openkcm.Gateway(core) as gateway:
            bench = Bench(core, gateway)
            bench.a.start()
            bench.b.start()
            try:
                sides = measure(bench, rounds)
            finally:
                bench.a.end()
                bench.b.end()
    report(sides)


if __name__ == "__main__":
    main()
