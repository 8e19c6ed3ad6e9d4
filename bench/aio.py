# SPDX-License-Identifier: Apache-2.0
"""Cold decrypts from one event loop, beside the same from threads, and for how long the loop is held up.

Run ``python bench/aio.py [CALLS]``. One Core in a process of its own, mutual TLS 1.3 over loopback; every record is of
64 bytes and has a data key of its own, which the Core has to open. 1, 64 and 1000 tasks, or threads, share the calls;
the two take turns in rounds. A heartbeat that is due every millisecond tells for how long the loop had no turn for it,
with these and with work that is large.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import _tests_path  # noqa: F401
import openkcm
from environment import processor
from openkcm import aio
from rpc_support import Site

CALLS: Final = 2000
ROUNDS: Final = 5
CALLERS: Final = (1, 64, 1000)
BEAT_SECONDS: Final = 0.001
LARGE: Final = {
    "100,000 records of 64 B": [bytes(64)] * 100_000,
    "2,000 records of 64 B": [bytes(64)] * 2_000,
    "16 records of 1 MiB": [bytes(1 << 20)] * 16,
}


class Heartbeat:
    """How late the loop was, at the most."""

    def __init__(self) -> None:
        self.worst = 0.0

    async def beat(self) -> None:
        """Until cancelled."""
        while True:
            due = time.perf_counter() + BEAT_SECONDS
            await asyncio.sleep(BEAT_SECONDS)
            self.worst = max(self.worst, time.perf_counter() - due)


async def with_heartbeat(work: Callable[[], Awaitable[object]]) -> float:
    """For how long the loop was held up while something was done, in seconds."""
    heart = Heartbeat()
    beats = asyncio.create_task(heart.beat())
    await asyncio.sleep(0.005)
    heart.worst = 0.0
    await work()
    await asyncio.sleep(0.005)
    beats.cancel()
    return heart.worst


async def in_tasks(service: aio.ServiceHandle, blobs: list[bytes], count: int, took: list[float]) -> float:
    """Seconds until so many tasks have decrypted all."""

    async def work(start: int) -> None:
        for blob in blobs[start::count]:
            begun = time.perf_counter()
            await service.decrypt(blob)
            took.append(time.perf_counter() - begun)

    begun = time.perf_counter()
    await asyncio.gather(*[work(start) for start in range(count)])
    return time.perf_counter() - begun


def in_threads(service: openkcm.ServiceHandle, blobs: list[bytes], count: int, took: list[float]) -> float:
    """As ``in_tasks``; the threads are there before the time is taken."""
    barrier = threading.Barrier(count + 1)

    def work(start: int) -> None:
        barrier.wait()
        for blob in blobs[start::count]:
            begun = time.perf_counter()
            service.decrypt(blob)
            took.append(time.perf_counter() - begun)

    workers = [threading.Thread(target=work, args=(start,)) for start in range(count)]
    for each in workers:
        each.start()
    barrier.wait()
    begun = time.perf_counter()
    for each in workers:
        each.join()
    return time.perf_counter() - begun


def line(name: str, count: int, calls: int, seconds: list[float], took: list[float]) -> str:
    """One row of the table."""
    took = sorted(took)
    return (
        f"{name:8} {count:5} | {calls / statistics.median(seconds):8,.0f}/s"
        f" | p50 {took[len(took) // 2] * 1e3:7.2f} ms | p99 {took[len(took) * 99 // 100] * 1e3:7.2f} ms"
    )


async def compare(service: aio.ServiceHandle, threaded: openkcm.ServiceHandle, calls: int) -> None:
    """The table of cold decrypts."""
    blobs = await service.encrypt_many([bytes(64)] * calls)
    for count in CALLERS:
        seconds: dict[str, list[float]] = {"tasks": [], "threads": []}
        took: dict[str, list[float]] = {"tasks": [], "threads": []}
        await in_tasks(service, blobs, count, [])
        for _ in range(ROUNDS):
            seconds["tasks"].append(await in_tasks(service, blobs, count, took["tasks"]))
            # The loop goes on meanwhile, with nothing to do but to hear the watch stream.
            seconds["threads"].append(
                await asyncio.to_thread(in_threads, threaded, blobs, count, took["threads"])
            )
        for name in seconds:
            print(line(name, count, calls, seconds[name], took[name]))


async def hold_ups(service: aio.ServiceHandle, calls: int) -> None:
    """For how long the loop is held up, at the most."""
    blobs = await service.encrypt_many([bytes(64)] * calls)
    for count in CALLERS:
        late = await with_heartbeat(lambda count=count: in_tasks(service, blobs, count, []))  # type: ignore[misc]
        print(f"loop held up: {late * 1e3:6.2f} ms by cold decrypts of {count} tasks")
    for name, records in LARGE.items():
        sealed = await service.encrypt_many(records)
        late = await with_heartbeat(lambda records=records: service.encrypt_many(records))  # type: ignore[misc]
        print(f"loop held up: {late * 1e3:6.2f} ms by encrypting {name}")
        late = await with_heartbeat(lambda sealed=sealed: service.decrypt_many(sealed))  # type: ignore[misc]
        print(f"loop held up: {late * 1e3:6.2f} ms by decrypting {name}")


async def warm(service: aio.ServiceHandle, threaded: openkcm.ServiceHandle) -> None:
    """A single encrypt where a data key waits ready, refills and all."""
    count = 20_000
    for name in ("awaited", "called"):
        begun = time.perf_counter()
        if name == "awaited":
            for _ in range(count):
                await service.encrypt(b"r" * 64)
        else:
            for _ in range(count):
                threaded.encrypt(b"r" * 64)
        print(f"encrypt of 64 B, {name}: {(time.perf_counter() - begun) / count * 1e6:5.2f} us")


async def measure(site: Site, port: int, calls: int) -> None:
    """All of it."""
    address = f"127.0.0.1:{port}"
    pool = openkcm.PoolPolicy(keys=4096)
    with (
        openkcm.connect(address, tls=site.tls(), deadline=30) as near,
        openkcm.Gateway(near, pool=pool) as gateway,
    ):
        threaded = gateway.service("acme", "records")
        async with (
            aio.connect(address, tls=site.tls(), deadline=30) as core,
            aio.Gateway(core, pool=pool) as awaited,
        ):
            service = await awaited.service("acme", "records")
            await warm(service, threaded)
            await compare(service, threaded, calls)
            await hold_ups(service, calls)


def main() -> None:
    """Measure."""
    calls = int(sys.argv[1]) if len(sys.argv) > 1 else CALLS
    print(f"{processor()}; load {os.getloadavg()[0]:.1f}; {calls} cold decrypts, {ROUNDS} rounds")
    with tempfile.TemporaryDirectory() as folder:
        site = Site(Path(folder))
        with site.start() as replica:
            asyncio.run(measure(site, replica.ports["data"], calls))


if __name__ == "__main__":
    main()
