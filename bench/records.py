# SPDX-License-Identifier: Apache-2.0
"""Time a record through the whole chain: Gateway, Core, native layer, on one core.

Run ``python bench/records.py`` (or ``make bench``); pyperf's options apply, ``--fast`` for a quick look and
``-o FILE`` to keep the results. Times are for one record (or one call), 64-byte records unless named.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pyperf

import openkcm
from _runner import make_runner

BATCH = 10_000
CALLS = 200
SIZE = 64


def open_vault(folder: Path) -> openkcm.Core:
    """Make a vault of one tenant on a development root; the root is not on any timed path."""
    core = openkcm.Core.open(f"sqlite:///{folder / 'vault.db'}")
    core.link_tenant("bench", root=f"local:{folder / 'root.key'}")
    core.create_service("bench", "records")
    return core


def add_batches(runner: pyperf.Runner, core: openkcm.Core) -> None:
    """Batches of 10,000 with a data key each, and with one data key for all."""
    records = [bytes([number % 251]) * SIZE for number in range(BATCH)]
    each = openkcm.Gateway(core).service("bench", "records")
    shared = openkcm.Gateway(core, policy=openkcm.DataKeyPolicy(records=2**31)).service("bench", "records")
    blobs = each.encrypt_many(records)
    shared_blobs = shared.encrypt_many(records)
    assert each.decrypt_many(blobs) == records
    assert shared.decrypt_many(shared_blobs) == records
    runner.bench_func("encrypt_many, 64 B, a data key each", each.encrypt_many, records, inner_loops=BATCH)
    runner.bench_func("encrypt_many, 64 B, one data key", shared.encrypt_many, records, inner_loops=BATCH)
    runner.bench_func("decrypt_many, 64 B, a data key each", each.decrypt_many, blobs, inner_loops=BATCH)
    runner.bench_func(
        "decrypt_many, 64 B, one data key", shared.decrypt_many, shared_blobs, inner_loops=BATCH
    )


def add_subjects(runner: pyperf.Runner, core: openkcm.Core) -> None:
    """A batch of 10,000 records of 1,000 people, whose data keys are in the key store."""
    records = [b"r" * SIZE] * BATCH
    subjects = [f"user-{number % 1000}" for number in range(BATCH)]
    service = openkcm.Gateway(core).service("bench", "records")
    service.encrypt_many(records, subjects=subjects)
    runner.bench_func(
        "encrypt_many, 64 B, 1,000 subjects",
        lambda: service.encrypt_many(records, subjects=subjects),
        inner_loops=BATCH,
    )


def add_calls(runner: pyperf.Runner, core: openkcm.Core) -> None:
    """Single calls; the pool refills itself within the timed calls, as it does in use."""
    service = openkcm.Gateway(core).service("bench", "records")
    record = b"r" * SIZE
    blob = service.encrypt(record)

    def encrypt() -> None:
        call = service.encrypt
        for _ in range(CALLS):
            call(record)

    def decrypt() -> None:
        call = service.decrypt
        for _ in range(CALLS):
            call(blob)

    runner.bench_func("encrypt, 64 B, warm pool", encrypt, inner_loops=CALLS)
    runner.bench_func("decrypt, 64 B, strict", decrypt, inner_loops=CALLS)


def main() -> None:
    """Run every benchmark on whichever backend OPENKCM_BACKEND picks."""
    runner = make_runner(__file__)
    with tempfile.TemporaryDirectory() as folder, open_vault(Path(folder)) as core:
        add_batches(runner, core)
        add_subjects(runner, core)
        add_calls(runner, core)


if __name__ == "__main__":
    main()
