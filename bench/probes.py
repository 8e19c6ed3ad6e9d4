# SPDX-License-Identifier: Apache-2.0
"""What it costs a Core to probe many live tenants, and how evenly the probes are spread.

Run ``python bench/probes.py [TENANTS] [SECONDS]`` (10,000 and 30 by default). Each tenant is linked to a root that
answers at once, out of this process's memory, so that what is measured is the Core's own part: choosing whose turn it
is, threads, and comparing what the root unwrapped. A provider's SDK comes on top, and is another's code.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import openkcm
from openkcm import crypto
from openkcm.keys import Kind

INTERVAL = 10.0


class NullRoot:
    """A root that costs nothing; counts when it was asked."""

    development = False

    def __init__(self, uri: str, asked: list[float]) -> None:
        self.uri = uri
        self._asked = asked

    def wrap(self, sealed: bytes, context: Mapping[str, str]) -> bytes:
        return sealed

    def unwrap(self, wrapped: bytes, context: Mapping[str, str]) -> bytes:
        self._asked.append(time.monotonic())
        return wrapped

    def warnings(self) -> list[str]:
        return []

    def close(self) -> None:
        """Nothing is open."""


def load(core: openkcm.Core, tenants: int, asked: list[float]) -> None:
    """Link tenants and open the keys of each."""
    for number in range(tenants):
        uri = f"null:{number}"
        core._vault._roots[uri] = NullRoot(uri, asked)
        core.link_tenant(f"t{number}", root=uri)
        service = core.create_service(f"t{number}", "records")
        core.wrap_keys(service, crypto.generate_keys(1), Kind.INLINE)


def main() -> None:
    """Load, wait, and print."""
    tenants = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 30.0
    asked: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'vault.db'}"
        with openkcm.Core.open(url, probe_interval=INTERVAL) as core:
            started = time.monotonic()
            load(core, tenants, asked)
            print(f"{tenants:,} tenants linked and loaded in {time.monotonic() - started:.0f} s", flush=True)
            time.sleep(INTERVAL)
            asked.clear()
            wall, cpu = time.monotonic(), time.process_time()
            time.sleep(seconds)
            wall, cpu = time.monotonic() - wall, time.process_time() - cpu
            report(list(asked), wall, cpu, core.liveness())


def report(asked: list[float], wall: float, cpu: float, counts: Mapping[str, int]) -> None:
    """Print what was seen."""
    each = Counter(int((at - asked[0]) * 10) for at in asked)
    full = [each[number] for number in range(int(wall * 10) - 1)]
    print(f"probes: {len(asked) / wall:,.0f} a second; in a tenth of a second {min(full)} to {max(full)}")
    print(f"processor time: {100 * cpu / wall:.2f}% of one core, {1e6 * cpu / len(asked):.1f} us a probe")
    print(f"changes: {counts['grace']} to grace, {counts['dark']} to dark")


if __name__ == "__main__":
    main()
