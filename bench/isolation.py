# SPDX-License-Identifier: Apache-2.0
"""Whether one customer's outage is felt by another: latency of tenant B's decrypts while tenant A is unplugged.

Run ``python bench/isolation.py [SECONDS]`` (20 by default, for each phase). Both tenants decrypt 4,000 single records a
second in threads of one process. Phases with A well and with A in trouble take turns, so that drift of the machine
falls on both alike. A is refused ("disabled") in one comparison, and black-holed in the other: its root never answers,
its grace is over and its users come all the same.
"""

from __future__ import annotations

import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import openkcm
from openkcm.errors import OpenKCMError, RootDisabled, RootUnavailable

RATE = 4000.0
ROUNDS = 12
HOLD = 3.0


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
            self.healed.wait(HOLD)
            raise RootUnavailable("no answer")
        return wrapped

    def warnings(self) -> list[str]:
        return []

    def close(self) -> None:
        """Nothing is open."""


class Load(threading.Thread):
    """Decrypts one record at a steady rate and notes how long each took, and each error."""

    def __init__(self, service: openkcm.ServiceHandle) -> None:
        super().__init__(daemon=True)
        self._service = service
        self._blob = service.encrypt(b"r" * 64)
        self._end = threading.Event()
        self.times: list[float] = []
        self.errors: list[str] = []

    def run(self) -> None:
        due = time.perf_counter()
        while not self._end.is_set():
            begun = time.perf_counter()
            try:
                self._service.decrypt(self._blob)
            except OpenKCMError as error:
                self.errors.append(type(error).__name__)
            self.times.append(time.perf_counter() - begun)
            due += (0.5 + random.random()) / RATE  # else both threads meet at each tick, or never
            time.sleep(max(0.0, due - time.perf_counter()))

    def take(self) -> tuple[list[float], list[str]]:
        """What was noted since the last time."""
        times, self.times = self.times, []
        errors, self.errors = self.errors, []
        return times, errors

    def end(self) -> None:
        """Stop."""
        self._end.set()
        self.join(30)


def quantile(times: list[float], part: float) -> float:
    """In microseconds."""
    return sorted(times)[int(part * (len(times) - 1))] * 1e6


def compare(
    name: str, seconds: float, load: Load, trouble: Callable[[], None], well: Callable[[], None]
) -> None:
    """Take turns and print both sides."""
    sides: dict[str, list[float]] = {"A well": [], name: []}
    failed = 0
    ratios = []
    for _ in range(ROUNDS):
        each = []
        for side, act in (("A well", well), (name, trouble)):
            act()
            load.take()
            time.sleep(seconds / ROUNDS)
            times, errors = load.take()
            sides[side] += times
            each.append(quantile(times, 0.99))
            failed += len(errors)
        ratios.append(each[1] / each[0])
    well()
    for side, times in sides.items():
        print(
            f"{side:<16} B: {len(times):>7,} decrypts  p50 {quantile(times, 0.5):6.1f} us  p99 "
            f"{quantile(times, 0.99):6.1f} us  p99.9 {quantile(times, 0.999):6.1f} us"
        )
    ratios.sort()
    print(
        f"{'':<16} p99 {100 * (ratios[ROUNDS // 2] - 1):+.1f}% (median of {ROUNDS} pairs, "
        f"{100 * (ratios[0] - 1):+.0f}% to {100 * (ratios[-1] - 1):+.0f}%), errors of B: {failed}\n",
        flush=True,
    )


def main() -> None:
    """Both comparisons."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 20.0
    plugs = {tenant: Plug(f"plug:{tenant}") for tenant in ("A", "B")}
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'vault.db'}"
        with openkcm.Core.open(url, probe_interval=1.0, grace=2.0) as core, openkcm.Gateway(core) as gateway:
            loads = {}
            for tenant, plug in plugs.items():
                core._vault._roots[plug.uri] = plug
                core.link_tenant(tenant, root=plug.uri)
                core.create_service(tenant, "records")
                loads[tenant] = Load(gateway.service(tenant, "records"))
                loads[tenant].start()

            def set_a(state: str, wanted: openkcm.TenantState) -> Callable[[], None]:
                def act() -> None:
                    plugs["A"].state = state
                    (plugs["A"].healed.clear if state == "black-holed" else plugs["A"].healed.set)()
                    while core.status("A")[0].state is not wanted:
                        time.sleep(0.05)

                return act

            well = set_a("well", openkcm.TenantState.LIVE)
            dark = openkcm.TenantState.DARK
            compare("A disabled", seconds, loads["B"], set_a("disabled", dark), well)
            compare("A black-holed", seconds, loads["B"], set_a("black-holed", dark), well)
            for load in loads.values():
                load.end()


if __name__ == "__main__":
    main()
