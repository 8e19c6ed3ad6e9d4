# SPDX-License-Identifier: Apache-2.0
"""A Gateway and a Core in two processes, mutual TLS 1.3 over loopback between them, beside OpenBao Transit.

Run ``python bench/remote.py [ROUNDS]`` (12 by default, a minute). Batches of 10,000 records of 64 bytes with a data key
each; a batch is timed from list to list, and rounds of all contenders take turns, so that drift of the machine falls on
all alike. Transit has its batches of 100, about the most that it takes, without TLS.

A cold decrypt is one record whose data key the Core has to open; it takes turns with an empty call over the same
connection, in the same process pair. Every transport that the Core serves is measured; ``embedded`` is a Core in the
Gateway's own process, for comparison.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import _tests_path  # noqa: F401
import openkcm
from environment import processor, system
from peers.transit import BATCH, Transit
from rpc_support import Replica, Site

ROUNDS: Final = 12
RECORDS: Final = 10_000
SIZE: Final = 64
COLD: Final = 2000
"""Cold decrypts, and as many empty calls."""

TRANSPORTS: Final = {"frames": "data", "gRPC": "grpc"}
"""What each is called in the configuration."""

GOALS: Final = {
    "decrypts over gRPC a second": 600_000.0,
    "encrypts over gRPC a second": 1_000_000.0,
    "decrypts over gRPC, times Transit's": 20.0,
}


class Far:
    """A Gateway that reaches a Core over one transport."""

    def __init__(self, site: Site, replica: Replica, transport: str) -> None:
        port = replica.ports[TRANSPORTS[transport]]
        scheme = "grpc://" if transport == "gRPC" else ""
        self.core = openkcm.connect(f"{scheme}127.0.0.1:{port}", tls=site.tls())
        self.gateway = openkcm.Gateway(self.core, keys=site.folder / "keys.db")
        self.service = self.gateway.service("acme", "records")

    def empty_call(self) -> None:
        """The smallest call there is: ids that were shredded, of none."""
        self.core.shredded(self.service._service, bytes(16))

    def close(self) -> None:
        """Let go of the Core."""
        self.gateway.close()
        self.core.close()


def rate(act: Callable[[], object], count: int) -> float:
    """Records a second of one run."""
    start = time.perf_counter()
    act()
    return count / (time.perf_counter() - start)


def quantiles(seconds: list[float]) -> tuple[float, float]:
    """Median and 99th percentile, in microseconds."""
    ordered = sorted(seconds)
    return ordered[len(ordered) // 2] * 1e6, ordered[int(len(ordered) * 0.99)] * 1e6


def batches(
    contenders: dict[str, openkcm.ServiceHandle], transit: Transit, rounds: int
) -> dict[str, list[float]]:
    """Records a second of every contender, in turns."""
    records = [bytes([at % 251]) * SIZE for at in range(RECORDS)]
    sealed = {name: service.encrypt_many(records) for name, service in contenders.items()}
    theirs = transit.encrypt(records[:BATCH])
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, service in contenders.items():
            found.setdefault(f"encrypt, {name}", []).append(
                rate(lambda service=service: service.encrypt_many(records), RECORDS)  # type: ignore[misc]
            )
            found.setdefault(f"decrypt, {name}", []).append(
                rate(lambda service=service, name=name: service.decrypt_many(sealed[name]), RECORDS)  # type: ignore[misc]
            )
        found.setdefault("encrypt, OpenBao Transit", []).append(
            rate(lambda: transit.encrypt(records[:BATCH]), BATCH)
        )
        found.setdefault("decrypt, OpenBao Transit", []).append(rate(lambda: transit.decrypt(theirs), BATCH))
    return found


def cold(far: Far, empty: Callable[[], object]) -> tuple[tuple[float, float], tuple[float, float]]:
    """An empty call and a cold decrypt, in turns: median and 99th percentile of each, in microseconds."""
    blob = far.service.encrypt(b"r" * SIZE)
    calls: list[float] = []
    decrypts: list[float] = []
    for _ in range(COLD + 100):
        for act, into in ((empty, calls), (lambda: far.service.decrypt(blob), decrypts)):
            start = time.perf_counter()
            act()
            into.append(time.perf_counter() - start)
    return quantiles(calls[100:]), quantiles(decrypts[100:])


def grpc_empty(far: Far) -> Callable[[], object]:
    """gRPC's own health check: an empty request to the same server over the same connection."""
    transport: Any = far.core._endpoints._all[0]._lines.now().transport
    call = transport._channel.unary_unary("/grpc.health.v1.Health/Check")
    return lambda: call(b"")


def main() -> None:
    """Measure, and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    with tempfile.TemporaryDirectory(prefix="bench-remote-") as folder:
        site = Site(Path(folder))
        listen: dict[str, Any] = {f"listen.{name}": "127.0.0.1:0" for name in TRANSPORTS.values()}
        with site.start(**listen) as replica:
            run(site, replica, rounds)


def run(site: Site, replica: Replica, rounds: int) -> None:
    """All of it, against one server."""
    transit = Transit(SIZE)
    fars = {name: Far(site, replica, name) for name, port in TRANSPORTS.items() if port in replica.ports}
    core = openkcm.Core.open(site.store)
    near = openkcm.Gateway(core, keys=site.folder / "keys.db")
    try:
        services = {name: far.service for name, far in fars.items()}
        found = batches({**services, "embedded": near.service("acme", "records")}, transit, rounds)
        print(
            f"{processor()}; {system()}; Python {sys.version.split()[0]}; {openkcm.backend_info()['openssl']}"
        )
        print(
            f"\n| {RECORDS:,} records of {SIZE} bytes, a key each | records a second, median | lowest | highest |"
        )
        print("|---|---:|---:|---:|")
        for name, rates in found.items():
            print(f"| {name} | {statistics.median(rates):,.0f} | {min(rates):,.0f} | {max(rates):,.0f} |")
        base = statistics.median(found["decrypt, OpenBao Transit"])
        for name in fars:
            print(
                f"\nDecrypting over {name}: {statistics.median(found[f'decrypt, {name}']) / base:.1f} times Transit."
            )
        print("\n| one cold decrypt | empty call p50 | p99 | decrypt p50 | p99 | ratio p50 | p99 |")
        print("|---|---:|---:|---:|---:|---:|---:|")
        for name, far in fars.items():
            (call50, call99), (own50, own99) = cold(
                far, grpc_empty(far) if name == "gRPC" else far.empty_call
            )
            print(
                f"| {name} | {call50:.0f} us | {call99:.0f} us | {own50:.0f} us | {own99:.0f} us "
                f"| {own50 / call50:.2f} | {own99 / call99:.2f} |"
            )
    finally:
        for far in fars.values():
            far.close()
        near.close()
        core.close()
        transit.close()


if __name__ == "__main__":
    main()
