# SPDX-License-Identifier: Apache-2.0
"""What is particular to an event loop: no threads, one call for many tasks, cancelling, deadlines, a loop kept free."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import openkcm
from openkcm import aio, crypto
from openkcm.aio.green import TOGETHER, GreenCondition, GreenEvent, GreenLock, Loop
from openkcm.aio.waiting import HEAVY_BYTES, Green, is_heavy
from openkcm.errors import CoreUnavailable, DecryptError, InvalidInput, TenantDark
from remote_support import SECONDS
from rpc_support import Replica, Site
from support import closed, environment, make_vault, released

Work = Callable[[aio.RemoteCore, aio.ServiceHandle], Awaitable[None]]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site"), "acme", "leased")


@pytest.fixture(scope="module")
def replica(site: Site) -> Iterator[Replica]:
    """A Core in a process of its own."""
    with site.start() as replica:
        yield replica


@pytest.fixture
def run(site: Site, replica: Replica, tmp_path: Path) -> Callable[..., None]:
    """Have a Gateway on an event loop work."""

    def run(work: Work, **options: Any) -> None:
        async def main() -> None:
            address = f"127.0.0.1:{replica.ports['data']}"
            async with (
                aio.connect(address, tls=site.tls(), **options) as core,
                aio.Gateway(core, keys=tmp_path / "keys.db") as gateway,
            ):
                await work(core, await gateway.service("acme", "records"))

        asyncio.run(asyncio.wait_for(main(), 4 * SECONDS))

    return run


@contextmanager
def stopped(replica: Replica) -> Iterator[None]:
    """The Core takes what is sent, and says nothing."""
    os.kill(replica.pid, signal.SIGSTOP)
    end = time.monotonic() + SECONDS
    while not _is_stopped(replica.pid):  # its threads stop one by one, and any of them may still answer
        assert time.monotonic() < end, "it did not stop"
        time.sleep(0.001)
    try:
        yield
    finally:
        os.kill(replica.pid, signal.SIGCONT)


def _is_stopped(pid: int) -> bool:
    states = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(state.rpartition(")")[2].split()[0] == "T" for state in states)


async def until(condition: Callable[[], object]) -> None:
    """Give way to the loop until something is true."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not become true in time"
        await asyncio.sleep(0.002)


class Counted:
    """Counts the calls that go to a Core's only address."""

    def __init__(self, core: aio.RemoteCore, monkeypatch: pytest.MonkeyPatch) -> None:
        endpoint = core._core._endpoints._all[0]
        self.made: list[str] = []
        call = endpoint.call

        def counting(method: str, request: bytes, end: float) -> bytes:
            self.made.append(method)
            return call(method, request, end)

        monkeypatch.setattr(endpoint, "call", counting)


def ends_at_once(work: Any) -> Any:
    """What something that is awaited comes to, which must not give way to the loop."""
    with pytest.raises(StopIteration) as caught:
        work.send(None)
    return caught.value.value


# ---- what tasks share ------------------------------------------------------------------------------------


def test_no_thread_is_started(site: Site, replica: Replica) -> None:
    before = threading.active_count()

    async def main() -> None:
        address = f"127.0.0.1:{replica.ports['data']}"
        async with aio.connect(address, tls=site.tls()) as core, aio.Gateway(core) as gateway:
            service = await gateway.service("acme", "records")
            blobs = await asyncio.gather(*[service.encrypt(b"%d" % at) for at in range(300)])
            found = await asyncio.gather(*[service.decrypt(blob) for blob in blobs])
            assert found == [b"%d" % at for at in range(300)]
            await until(lambda: core._core._heard())
            assert threading.active_count() == before

    asyncio.run(main())
    assert threading.active_count() == before


def test_a_thousand_tasks_that_want_one_key_make_one_call(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(core: aio.RemoteCore, service: aio.ServiceHandle) -> None:
        blob = await service.encrypt(b"x")
        assert await service.decrypt(blob) == b"x"
        counted = Counted(core, monkeypatch)
        assert await asyncio.gather(*[service.decrypt(blob) for _ in range(1000)]) == [b"x"] * 1000
        assert counted.made == ["UnwrapKeys"]

    run(work)


def test_a_thousand_tasks_that_want_a_key_each_make_a_few_calls(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(core: aio.RemoteCore, service: aio.ServiceHandle) -> None:
        records = [b"%d" % at for at in range(1000)]
        blobs = await service.encrypt_many(records)
        counted = Counted(core, monkeypatch)
        assert await asyncio.gather(*[service.decrypt(blob) for blob in blobs]) == records
        # Two at once, and then all that came meanwhile.
        assert set(counted.made) == {"UnwrapKeys"} and len(counted.made) <= 4

    run(work)


def test_a_waiting_or_kept_key_does_not_give_way_to_the_loop(tmp_path: Path) -> None:
    site = Site(tmp_path)

    async def main(port: int) -> None:
        async with (
            aio.connect(f"127.0.0.1:{port}", tls=site.tls()) as core,
            aio.Gateway(core) as gateway,
        ):
            service = await gateway.service("acme", "records")
            blob = await service.encrypt(b"x", context={"row": "1"})
            await until(lambda: core._core._heard())
            assert await service.decrypt(blob, context={"row": "1"}) == b"x"
            again = ends_at_once(service.encrypt(b"y", context={"row": "1"}))
            assert again[24:96] != blob[24:96]
            assert ends_at_once(service.decrypt(blob, context={"row": "1"})) == b"x"
            with pytest.raises(DecryptError):
                service.decrypt(blob, context={"row": "2"}).send(None)

    with site.serve() as server:
        server.core.set_lease("acme", "records", 60)
        asyncio.run(main(server.ports["data"]))


def test_both_ends_of_each_method(run: Callable[..., None]) -> None:
    async def work(core: aio.RemoteCore, service: aio.ServiceHandle) -> None:
        assert (service.tenant, service.name, len(service.service_id)) == ("acme", "records", 12)
        blobs = await service.encrypt_many([b"a", b"b"], subjects=["one", "two"])
        assert await service.decrypt_many(blobs) == [b"a", b"b"]
        assert await service.rewrap_many(blobs) == blobs
        assert await service.rewrap_subjects() == 0
        assert await service.shred("one") and not await service.shred("nobody")
        found = await service.decrypt_many(blobs, errors="return")
        assert type(found[0]) is openkcm.KeyDestroyed and found[1] == b"b"
        sealed, opened = io.BytesIO(), io.BytesIO()
        await service.encrypt_stream(io.BytesIO(b"s" * 200_000), sealed)
        sealed.seek(0)
        assert await service.decrypt_stream(sealed, opened) == 200_000
        column = (memoryview(b"").cast("B"), b"")
        with pytest.raises(InvalidInput):
            await service.encrypt_column(column)

    run(work)


@pytest.mark.parametrize("threads", [1, 3])
def test_large_columns_and_batches(run: Callable[..., None], threads: int) -> None:
    numpy = pytest.importorskip("numpy")

    async def work(core: aio.RemoteCore, service: aio.ServiceHandle) -> None:
        rows = numpy.arange(6000, dtype="i8")
        sealed = await service.encrypt_column(rows, threads=threads)
        opened = await service.decrypt_column(sealed, threads=threads)
        assert bytes(opened.data) == rows.tobytes()
        records = [bytes([at % 251]) * 300 for at in range(6000)]
        assert is_heavy(records)
        assert await service.decrypt_many(await service.encrypt_many(records)) == records
        one = bytes(HEAVY_BYTES + 1)
        assert await service.decrypt(await service.encrypt(one)) == one

    run(work)


# ---- cancelling, deadlines, kills --------------------------------------------------------------------------


def test_who_is_cancelled_leaves_the_call_to_those_that_joined(
    run: Callable[..., None], replica: Replica
) -> None:
    async def work(core: aio.RemoteCore, service: aio.ServiceHandle) -> None:
        blob = await service.encrypt(b"x")
        assert await service.decrypt(blob) == b"x"
        with stopped(replica):
            tasks = [asyncio.create_task(service.decrypt(blob)) for _ in range(20)]
            await asyncio.sleep(0)
            lane = next(iter(core._core._joined._lanes.values()))
            await until(lambda: sum(each.takers for each in lane._flying.values()) == 20)
            for task in tasks[:2]:  # the one that makes the call, and one that joined it
                task.cancel()
            await asyncio.wait(tasks[:2])
            assert all(task.cancelled() for task in tasks[:2])
        assert await asyncio.gather(*tasks[2:]) == [b"x"] * 18
        assert not lane._underway and not lane._flying

    run(work)


def test_who_is_cancelled_holds_no_lock_and_leaves_no_key(run: Callable[..., None], replica: Replica) -> None:
    async def work(core: aio.RemoteCore, service: aio.ServiceHandle) -> None:
        blobs = await service.encrypt_many([b"x"] * 3, subject="a")
        blob = await service.encrypt(b"x")
        await service.decrypt(blob)
        assert await service.decrypt_many(blobs) == [b"x"] * 3
        await until(lambda: service._handle._pool._spare is not None)  # nothing is fetched any more
        service._handle.renew()  # and nothing waits ready
        gc.collect()
        before = crypto.secret_memory_info()["handles"]
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: service.encrypt(b"y"),
            lambda: service.encrypt(b"y"),  # waits for the first one's lock
            lambda: service.decrypt(blob),
            lambda: service.decrypt_many(blobs),
            lambda: service.encrypt_many([b"y"] * 100),
            lambda: service.encrypt(b"y", subject="a"),
        ]
        with stopped(replica):
            tasks = [asyncio.ensure_future(call()) for call in calls]
            await asyncio.sleep(0.05)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            assert all(task.cancelled() for task in tasks)
            del tasks, task

        def is_given_back() -> bool:
            gc.collect()
            return bool(crypto.secret_memory_info()["handles"] <= before)

        await until(is_given_back)  # what was fetched in the background meanwhile is, in its time
        pool = service._handle._pool
        assert not pool._filling._held  # type: ignore[attr-defined]
        for call in calls:
            await call()

    run(work)


def test_a_deadline(run: Callable[..., None], replica: Replica) -> None:
    async def work(core: aio.RemoteCore, service: aio.ServiceHandle) -> None:
        blob = await service.encrypt(b"x")
        with stopped(replica):
            begun = time.monotonic()
            found = await asyncio.gather(*[service.decrypt(blob) for _ in range(5)], return_exceptions=True)
            assert {type(each) for each in found} == {CoreUnavailable}
            assert 0.5 <= time.monotonic() - begun < SECONDS / 2
        assert await service.decrypt(blob) == b"x"

    run(work, deadline=0.6)


def test_a_kill_while_tasks_wait(tmp_path: Path) -> None:
    """Nothing opens after the kill was heard of, and what waits ready is wiped."""
    site = Site(tmp_path)

    async def main(server: Any) -> None:
        async with (
            aio.connect(f"127.0.0.1:{server.ports['data']}", tls=site.tls()) as core,
            aio.Gateway(core) as gateway,
        ):
            service = await gateway.service("acme", "records")
            blob = await service.encrypt(b"x")
            await until(lambda: core._core._heard())
            ready = service._handle._pool.ready
            outcomes: list[object] = []

            async def ask() -> None:
                while not outcomes or outcomes[-1] == b"x":
                    try:
                        outcomes.append(await service.decrypt(blob))
                    except TenantDark as error:
                        outcomes.append(error)

            tasks = [asyncio.create_task(ask()) for _ in range(10)]
            await until(lambda: len(outcomes) > 20)
            await asyncio.to_thread(server.core.kill, "acme")
            await asyncio.wait_for(asyncio.gather(*tasks), SECONDS)
            await until(lambda: ready is not None and ready.keys.wiped)
            with pytest.raises(TenantDark):
                await service.encrypt(b"y")
            with pytest.raises(TenantDark):
                await service.decrypt(blob)

    with site.serve() as server:
        asyncio.run(main(server))


def test_what_closes_while_tasks_wait_tells_them(run: Callable[..., None], replica: Replica) -> None:
    async def work(core: aio.RemoteCore, service: aio.ServiceHandle) -> None:
        blob = await service.encrypt(b"x")
        await service.decrypt(blob)
        with stopped(replica):
            task = asyncio.create_task(service.decrypt(blob))
            await asyncio.sleep(0.02)
            await core.close()
            with pytest.raises(CoreUnavailable):
                await task

    run(work)


# ---- the loop ----------------------------------------------------------------------------------------------


def test_what_is_large_does_not_hold_up_the_loop() -> None:
    """The loop goes on while it is worked on: here the work waits for the loop."""
    waiting = Green(Loop())
    gone_on = threading.Event()

    def work(data: bytes) -> threading.Thread:
        assert len(data) <= HEAVY_BYTES or gone_on.wait(SECONDS)
        return threading.current_thread()

    async def main() -> None:
        call = waiting.heavy(work, 0)
        assert await waiting.loop.run(call, bytes(HEAVY_BYTES)) is threading.current_thread()
        task = asyncio.create_task(waiting.loop.run(call, bytes(HEAVY_BYTES + 1)))
        asyncio.get_running_loop().call_later(0.01, gone_on.set)
        assert await task is not threading.current_thread()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("data", "heavy"),
    [
        (b"x", False),
        (bytearray(HEAVY_BYTES + 1), True),
        (memoryview(bytes(HEAVY_BYTES)), False),
        ([b"x"] * 10, False),
        ([b"x"] * 4000, True),
        ([bytes(HEAVY_BYTES + 1)], True),
        ("text", False),
        ([1] * 4000, True),
        ([1], False),
        (None, False),
        (released(HEAVY_BYTES + 1), False),
        ([released()], False),
        (closed(HEAVY_BYTES + 1), False),
    ],
)
def test_what_is_large(data: object, heavy: bool) -> None:
    assert is_heavy(data) is heavy


def test_a_lock_that_was_handed_to_who_is_gone_is_handed_on() -> None:
    loop = Loop()
    order: list[int] = []

    def take(lock: GreenLock, number: int) -> None:
        with lock:
            order.append(number)

    async def main() -> None:
        lock = GreenLock(loop)
        assert lock.acquire() and not lock.acquire(blocking=False)
        tasks = [asyncio.create_task(loop.run(take, lock, number)) for number in range(3)]
        await asyncio.sleep(0)
        assert not await loop.run(lock.acquire, True, 0.01)
        lock.release()  # to the first, which has not run yet
        tasks[0].cancel()
        await asyncio.wait(tasks)
        assert tasks[0].cancelled() and order == [1, 2]
        assert lock.acquire(blocking=False)

    asyncio.run(main())


def test_a_word_to_who_is_gone_is_for_the_next() -> None:
    loop = Loop()

    async def main() -> None:
        condition = GreenCondition(loop)
        tasks = [asyncio.create_task(loop.run(condition.wait, SECONDS)) for _ in range(2)]
        await asyncio.sleep(0)
        condition.notify()
        tasks[0].cancel()
        await asyncio.wait(tasks)
        assert tasks[0].cancelled() and tasks[1].result() is True
        assert await loop.run(condition.wait, 0.01) is False

    asyncio.run(main())


def test_others_have_a_turn_while_many_are_woken() -> None:
    loop = Loop()
    count = 5 * TOGETHER

    async def main() -> None:
        event = GreenEvent(loop)
        tasks = [asyncio.create_task(loop.run(event.wait, SECONDS)) for _ in range(count)]
        await until(lambda: len(event._waiters) == count)
        tasks[count // 2].cancel()
        event.set()
        left = []
        while event._waiters:
            left.append(len(event._waiters))
            await asyncio.sleep(0)
        assert len(left) >= 5
        assert max(before - after for before, after in pairwise(left)) <= TOGETHER + 1
        await asyncio.wait(tasks)
        assert [task.cancelled() for task in tasks].count(True) == 1

    asyncio.run(main())


def test_another_loop_is_refused(site: Site, replica: Replica) -> None:
    core = aio.connect(f"127.0.0.1:{replica.ports['data']}", tls=site.tls())
    gateway = aio.Gateway(core)

    async def use() -> None:
        await gateway.service("acme", "records")

    async def main() -> None:
        await use()
        await gateway.close()
        await core.close()

    asyncio.run(main())
    with pytest.raises(InvalidInput, match="another event loop"):
        asyncio.run(use())


def test_what_would_hold_up_the_loop_is_refused(site: Site, replica: Replica) -> None:
    with pytest.raises(InvalidInput, match="frames only"):
        aio.connect("grpc://127.0.0.1:1", tls=site.tls())
    with site.connect(replica.ports) as core, pytest.raises(InvalidInput, match=r"aio\.connect"):
        aio.Gateway(core)


def test_a_core_in_this_process(tmp_path: Path) -> None:
    async def main(core: openkcm.Core) -> None:
        async with aio.Gateway(core) as gateway:
            service = await gateway.service("acme", "records")
            blobs = await asyncio.gather(*[service.encrypt(b"x", subject=each) for each in ("a", "b", "a")])
            assert await service.decrypt_many(blobs) == [b"x"] * 3
            core.set_lease("acme", "records", 60)
            blob = ends_at_once(service.encrypt(b"x"))
            assert await service.decrypt(blob) == b"x"
            assert ends_at_once(service.decrypt(blob)) == b"x"
            await asyncio.to_thread(core.kill, "acme")
            with pytest.raises(TenantDark):
                await service.decrypt(blob)

    with make_vault(tmp_path) as core:
        asyncio.run(main(core))


FORK = """
import asyncio, os, signal, sys
import openkcm
from openkcm import aio

address, certificate, key, roots = sys.argv[1:]
core = aio.connect(address, tls=openkcm.TLS(certificate, key, roots))
gateway = aio.Gateway(core)

async def work():
    service = await gateway.service("acme", "records")
    blob = await service.encrypt(b"x")
    return blob, await service.decrypt(blob)

async def main():
    blob, found = await work()
    assert found == b"x"
    child = os.fork()
    if not child:
        signal.alarm(60)
        asyncio.events._set_running_loop(None)
        code = 1
        try:
            other, found = asyncio.run(work())
            assert found == b"x" and other[24:96] != blob[24:96]
            code = 0
        finally:
            os._exit(code)
    status = (await asyncio.to_thread(os.waitpid, child, 0))[1]
    assert status == 0, status
    assert (await work())[1] == b"x"
    await gateway.close()
    await core.close()

asyncio.run(main())
"""


def test_a_forked_child_has_a_loop_of_its_own(site: Site, replica: Replica) -> None:
    tls = site.tls()
    arguments = [f"127.0.0.1:{replica.ports['data']}", *map(str, (tls.certificate, tls.key, tls.roots))]
    path = os.pathsep.join([environment()["PYTHONPATH"], os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", FORK, *arguments],
        capture_output=True,
        text=True,
        env=environment(PYTHONPATH=path),
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
