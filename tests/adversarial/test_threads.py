# SPDX-License-Identifier: Apache-2.0
"""Threads: eight on one Gateway, right answers, no races, through rotations, kills and shreds."""

from __future__ import annotations

import io
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import openkcm
from openkcm.errors import KeyDestroyed, TenantDark
from openkcm.gateway import DataKeyPolicy, PoolPolicy, ServiceHandle
from support import make_vault

THREADS = 8
SECONDS = 4.0


def run(
    work: Callable[[int, Callable[[], bool]], None], seconds: float = SECONDS, threads: int = THREADS
) -> None:
    """Run in threads until the time is over; the first error of any is raised."""
    wrong: list[BaseException] = []
    end = time.monotonic() + seconds
    start = threading.Barrier(threads)

    def going() -> bool:
        return time.monotonic() < end and not wrong

    def body(number: int) -> None:
        try:
            start.wait(60)
            work(number, going)
        except BaseException as error:
            wrong.append(error)

    pool = [threading.Thread(target=body, args=(number,)) for number in range(threads)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join(seconds + 120)
    assert not any(thread.is_alive() for thread in pool)
    if wrong:
        raise wrong[0]


def some(generator: random.Random, count: int) -> list[bytes]:
    return [generator.randbytes(generator.choice((0, 1, 16, 64, 100, 1000))) for _ in range(count)]


def test_every_call_at_once(tmp_path: Path) -> None:
    """All ways of encrypting and decrypting, with small pools and shared keys so that refills collide."""
    done = [0] * THREADS
    with make_vault(tmp_path, "acme", "globex") as core:
        gateways = [
            openkcm.Gateway(core, pool=PoolPolicy(keys=16)),
            openkcm.Gateway(core, policy=DataKeyPolicy(records=7), pool=PoolPolicy(keys=4)),
        ]
        handles = [
            gateway.service(tenant, "records") for gateway in gateways for tenant in ("acme", "globex")
        ]

        def work(number: int, going: Callable[[], bool]) -> None:
            generator = random.Random(number)
            while going():
                handle = generator.choice(handles)
                every_call(handle, generator)
                done[number] += 1

        run(work)
        for gateway in gateways:
            gateway.close()
    assert min(done) > 0


def every_call(handle: ServiceHandle, generator: random.Random) -> None:
    context = {"n": str(generator.randrange(1000))}
    subject = generator.choice((None, "ann", f"subject-{generator.randrange(50)}"))
    records = some(generator, generator.choice((1, 3, 40)))
    assert (
        handle.decrypt(handle.encrypt(records[0], context=context, subject=subject), context=context)
        == records[0]
    )
    blobs = handle.encrypt_many(records, context=context, subject=subject)
    assert handle.decrypt_many(blobs, context=context) == records
    moved = handle.rewrap_many(blobs)
    assert handle.decrypt_many(moved, context=context) == records
    sealed, opened = io.BytesIO(), io.BytesIO()
    data = generator.randbytes(generator.choice((0, 1000, 70_000)))
    handle.encrypt_stream(io.BytesIO(data), sealed, context=context, subject=subject)
    sealed.seek(0)
    handle.decrypt_stream(sealed, opened, context=context)
    assert opened.getvalue() == data


def test_one_large_batch_shared_by_all(tmp_path: Path) -> None:
    """The same inputs are read by eight threads at once."""
    with make_vault(tmp_path) as core, openkcm.Gateway(core) as gateway:
        handle = gateway.service("acme", "records")
        records = [os.urandom(64) for _ in range(5_000)]
        blobs = handle.encrypt_many(records)

        def work(number: int, going: Callable[[], bool]) -> None:
            while going():
                assert handle.decrypt_many(blobs) == records
                assert handle.decrypt_many(handle.encrypt_many(records[:500])) == records[:500]

        run(work, 2.0)


def test_rotation_while_all_work(tmp_path: Path) -> None:
    with make_vault(tmp_path) as core, openkcm.Gateway(core, pool=PoolPolicy(keys=32)) as gateway:
        handle = gateway.service("acme", "records")
        rotations = [0]

        def work(number: int, going: Callable[[], bool]) -> None:
            generator = random.Random(number)
            kept: list[tuple[bytes, bytes]] = []
            while going():
                if number == 0:
                    core.rotate_service("acme", "records")
                    rotations[0] += 1
                    if rotations[0] % 5 == 0:
                        core.rotate_tenant("acme")
                        handle.rewrap_subjects()
                    time.sleep(0.02)
                    continue
                record = some(generator, 1)[0]
                kept.append(
                    (handle.encrypt(record, subject="ann" if generator.random() < 0.3 else None), record)
                )
                blob, record = generator.choice(kept)
                assert handle.decrypt(blob) == record
                (moved,) = handle.rewrap_many([blob])
                assert handle.decrypt(moved) == record
            blobs, records = zip(*kept, strict=True) if kept else ((), ())
            assert handle.decrypt_many(list(blobs)) == list(records)

        run(work)
        assert rotations[0] > 3


def test_kill_and_restore_while_all_work(tmp_path: Path) -> None:
    """Each call gives the right answer or says that the tenant is dark; once a kill has returned nothing opens."""
    with (
        make_vault(tmp_path, "acme", "globex") as core,
        openkcm.Gateway(core, pool=PoolPolicy(keys=32)) as gateway,
    ):
        doomed, other = (gateway.service(tenant, "records") for tenant in ("acme", "globex"))
        seen = {"right": 0, "dark": 0, "kills": 0}
        lock = threading.Lock()

        def work(number: int, going: Callable[[], bool]) -> None:
            generator = random.Random(number)
            while going():
                if number == 0:
                    core.kill("acme")
                    for call in (lambda: doomed.encrypt(b"x"), lambda: doomed.decrypt(sample)):
                        try:
                            call()
                        except TenantDark:
                            continue
                        raise AssertionError("something opened after the kill")
                    core.restore("acme")
                    seen["kills"] += 1
                    time.sleep(0.03)
                    continue
                if number == 1:
                    every_call(other, generator)  # another tenant hears nothing of it
                    continue
                try:
                    every_call(doomed, generator)
                    outcome = "right"
                except TenantDark:
                    outcome = "dark"
                with lock:
                    seen[outcome] += 1

        sample = doomed.encrypt(b"x")
        run(work)
        assert min(seen.values()) > 0, seen
        assert doomed.decrypt(sample) == b"x"


def test_shredding_while_all_encrypt(tmp_path: Path) -> None:
    """What was acknowledged before a shred never opens after it; what comes later has a key of its own."""
    with make_vault(tmp_path) as core, openkcm.Gateway(core) as gateway:
        handle = gateway.service("acme", "records")
        shreds = [0]

        def work(number: int, going: Callable[[], bool]) -> None:
            generator = random.Random(number)
            while going():
                subject = f"subject-{number % 4}"
                blob = handle.encrypt(b"x", subject=subject)
                if generator.random() < 0.2:
                    handle.shred(subject)
                    shreds[0] += 1
                    try:
                        handle.decrypt(blob)
                    except KeyDestroyed:
                        continue
                    raise AssertionError("a shredded subject's record opened")
                try:
                    assert handle.decrypt(blob) == b"x"
                except KeyDestroyed:
                    continue  # by the other thread on the same subject

        run(work, 3.0)
        assert shreds[0] > 0
