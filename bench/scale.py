# SPDX-License-Identifier: Apache-2.0
"""Whether a Core keeps its promises in a vault of very many tenants, and what very many subjects cost.

Run ``python bench/scale.py [TENANTS] [LOADED] [FOLDER]`` (100,000 and 10,000 by default; the vault is made once in a
folder that is named, and kept there). Each line has what is promised, if anything is, and what was measured; times
that are not totals are medians. Every measurement has a process of its own.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import openkcm
from large_vault import make_large_vault, service_name, tenant_name
from openkcm import crypto
from openkcm.gateway import ServiceHandle
from openkcm.keys import Kind, Service
from openkcm.limits import MAX_KEYS_PER_CALL

SERVICES = 10
BATCH = 64
BATCHES = 2000
SUBJECTS = 100_000
MIB = 1024 * 1024

Line = tuple[str, str, str]


def resident() -> int:
    """This process's resident memory in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def first_wrap(core: openkcm.Core, tenant: int, service: int) -> Service:
    """Use a service's key, opening what has to be."""
    found = core.find_service(tenant_name(tenant), service_name(service))
    keys = crypto.generate_keys(1)
    core.wrap_keys(found, keys, Kind.INLINE)
    keys.wipe()
    return found


def cold(url: str, count: int) -> list[Line]:
    """Opening the vault, and the first wrap of tenants that nobody used yet."""
    started = time.perf_counter()
    core = openkcm.Core.open(url)
    opening = time.perf_counter() - started
    roots: list[float] = []
    ask = core._vault.ask_root

    def timed(row: Any) -> bytes:
        began = time.perf_counter()
        try:
            return ask(row)
        finally:
            if threading.current_thread() is threading.main_thread():  # and not a probe
                roots.append(time.perf_counter() - began)

    core._vault.ask_root = timed  # type: ignore[method-assign]
    first_wrap(core, 0, 0)  # whatever is made once a process
    roots.clear()
    whole = []
    for tenant in range(1, count + 1):
        began = time.perf_counter()
        first_wrap(core, tenant, 0)
        whole.append(time.perf_counter() - began)
    own = sorted(each - root for each, root in zip(whole, roots, strict=True))
    core.close()
    return [
        ("open the vault", "under 1 s", f"{1e3 * opening:.1f} ms"),
        (
            "a cold tenant's first wrap, beyond its root call",
            "under 5 ms",
            f"{1e3 * statistics.median(own):.2f} ms, 99 of 100 under {1e3 * own[len(own) * 99 // 100]:.2f} ms",
        ),
        ("root calls for it", "1", f"{len(roots) / count:g}"),
    ]


def loaded(url: str, tenants: int, services: int) -> list[Line]:
    """What so many loaded tenants take of memory."""
    core = openkcm.Core.open(url)
    first_wrap(core, tenants, 0)
    idle = resident()
    for tenant in range(tenants):
        for service in range(services):
            first_wrap(core, tenant, service)
    now, secret = resident(), openkcm.backend_info()["secret_memory"]["locked_bytes"]
    core.close()
    what = f"{tenants:,} tenants loaded, {services} service{'s' if services > 1 else ''} each"
    return [
        (f"{what}: secret memory", "under 64 MB", f"{secret / MIB:.1f} MiB"),
        (
            f"{what}: in all",
            "under 200 MB",
            f"{(now - idle) / MIB:.0f} MiB more than idle ({now / MIB:.0f} MiB)",
        ),
    ]


def a_record(url: str, tenants: int) -> list[Line]:
    """What wrapping and opening a record's key costs with so many tenants loaded."""
    core = openkcm.Core.open(url)
    services = [first_wrap(core, tenant, 0) for tenant in range(tenants)]

    def use(service: Service) -> None:
        keys = crypto.generate_keys(BATCH)
        wrapped = core.wrap_keys(service, keys, Kind.INLINE)
        keys.wipe()
        core.unwrap_keys(service, wrapped)[0].wipe()

    def cost(pick: Callable[[int], int]) -> float:
        rounds = []
        for _ in range(5):
            began = time.perf_counter()
            for number in range(BATCHES):
                use(services[pick(number)])
            rounds.append((time.perf_counter() - began) / (BATCHES * BATCH))
        return 1e6 * min(rounds)

    hot, around = cost(lambda number: 0), cost(lambda number: number * 7919 % tenants)
    core.close()
    return [
        (
            f"a record's key, wrapped and opened in batches of {BATCH}; {tenants:,} tenants loaded",
            "no growth",
            f"{hot:.3f} us in one tenant, {around:.3f} us in all by turns",
        )
    ]


def the_tree(url: str) -> list[Line]:
    """What ``status`` takes."""
    core = openkcm.Core.open(url)
    began = time.perf_counter()
    core.status(tenant_name(1))
    one = time.perf_counter() - began
    before, began = resident(), time.perf_counter()
    tree = core.status()
    every, memory = time.perf_counter() - began, resident() - before
    core.close()
    return [
        ("status of one tenant", "", f"{1e3 * one:.1f} ms"),
        (f"status of all {len(tree):,}", "", f"{every:.1f} s, {memory / MIB:.0f} MiB"),
    ]


def subjects(url: str) -> list[Line]:
    """What each of very many distinct subjects costs, the first time and later."""
    names = [f"user-{number}" for number in range(SUBJECTS)]
    ids: list[bytes] = []

    def every(handle: ServiceHandle) -> None:
        ids.clear()
        for opened in handle._subjects.open_chunks(names):
            ids.append(opened.ids)
            opened.keys.wipe()

    def by_id(handle: ServiceHandle) -> None:
        distinct = [part[at : at + 16] for part in ids for at in range(0, len(part), 16)]
        for groups, _ in handle._subjects.open_ids_chunks(distinct):
            for group in groups:
                group.keys.wipe()

    def cost(act: Callable[[ServiceHandle], None], handle: ServiceHandle) -> str:
        began = time.perf_counter()
        act(handle)
        return f"{1e6 * (time.perf_counter() - began) / SUBJECTS:.2f} us each"

    with tempfile.TemporaryDirectory() as folder, openkcm.Core.open(url) as core:

        def fresh() -> ServiceHandle:
            gateway = openkcm.Gateway(core, keys=Path(folder) / "keys.db")
            return gateway.service(tenant_name(0), service_name(0))

        what, first = f"{SUBJECTS:,} subjects", fresh()
        return [
            (f"{what}: made and opened", "", cost(every, first)),
            (f"{what}: opened again", "", cost(every, first)),
            (f"{what}: opened by a Gateway that has none", "", cost(every, fresh())),
            (f"{what}: opened by their ids, likewise", "", cost(by_id, fresh())),
            ("keys in a Core call", "", f"{MAX_KEYS_PER_CALL:,}"),
        ]


def measure(name: str, *arguments: str | int) -> list[Line]:
    """Run a measurement in a process of its own."""
    command = [sys.executable, __file__, "--measure", name, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return [tuple(line) for line in json.loads(done.stdout)]


def report(lines: Sequence[Line]) -> None:
    """Print some lines of the table."""
    for what, wanted, found in lines:
        print(f"{what:76} {wanted:14} {found}", flush=True)


def run(folder: Path, tenants: int, many: int) -> None:
    """Make the vault unless it is there, and measure all."""
    path = folder / f"scale-{tenants}.db"
    if not path.exists():
        began = time.perf_counter()
        make_large_vault(path, tenants, SERVICES)
        print(f"made in {time.perf_counter() - began:.0f} s, {path.stat().st_size / MIB:.0f} MiB")
    url = f"sqlite:///{path}"
    openkcm.Core.open(url).close()
    print(f"{tenants:,} tenants with {SERVICES} services each; backend {openkcm.backend_info()['backend']}")
    report([("", "wanted", "measured")])
    report(measure("cold", url, min(1000, many - 1)))
    report(measure("loaded", url, many, 1))
    report(measure("loaded", url, many, SERVICES))
    for count in (1, many // 10, many):
        report(measure("a_record", url, count))
    report(measure("the_tree", url))
    report(measure("subjects", url))


def main() -> None:
    """Measure, or be one of the processes that do."""
    given = sys.argv[1:]
    if given[:1] == ["--measure"]:
        call: Callable[..., list[Line]] = globals()[given[1]]
        print(json.dumps(call(given[2], *map(int, given[3:]))))
        return
    tenants = int(given[0]) if given else 100_000
    many = int(given[1]) if len(given) > 1 else min(10_000, tenants - 1)
    if len(given) > 2:
        run(Path(given[2]), tenants, many)
        return
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), tenants, many)


if __name__ == "__main__":
    main()
