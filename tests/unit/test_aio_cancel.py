# SPDX-License-Identifier: Apache-2.0
"""Who is cancelled while a thread of the executor works for them: it has ended before they hear of it."""

from __future__ import annotations

import array
import asyncio
import gc
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import openkcm
from openkcm import aio, crypto
from openkcm.aio.green import Loop
from openkcm.aio.waiting import Green
from openkcm.errors import CoreUnavailable
from remote_support import SECONDS
from support import make_vault

ROWS, SIZE = 8, 1 << 20


class Held:
    """Work that begins, and goes on when it is told to, or when the test is over."""

    def __init__(self, work: Callable[..., Any] = lambda: None) -> None:
        self._work = work
        self.begun = threading.Semaphore(0)
        self.let_go = threading.Event()
        self.ended = 0

    def __call__(self, *args: Any) -> Any:
        self.begun.release()
        assert self.let_go.wait(SECONDS)
        try:
            return self._work(*args)
        finally:
            self.ended += 1

    async def until_begun(self) -> None:
        while not self.begun.acquire(blocking=False):
            await asyncio.sleep(0.001)


@pytest.fixture
def core(tmp_path: Path) -> Iterator[openkcm.Core]:
    with make_vault(tmp_path) as core:
        yield core


def run(main: Callable[[], Coroutine[Any, Any, None]], *held: Held) -> None:
    """Run a test in a loop, whose executor has nothing to wait for when it is over, however that is."""

    async def bounded() -> None:
        try:
            await asyncio.wait_for(main(), 4 * SECONDS)
        finally:
            for each in held:
                each.let_go.set()

    asyncio.run(bounded())


def column() -> tuple[array.array[int], bytes]:
    return array.array("q", [SIZE * at for at in range(ROWS + 1)]), b"P" * (SIZE * ROWS)


async def turns(count: int = 20) -> None:
    """Let the loop go round: all that can go on without the executor has, then."""
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("subject", [None, "somebody"])
@pytest.mark.parametrize("way", ["decrypt", "encrypt"])
def test_a_cancelled_column_leaves_zeros(
    core: openkcm.Core, monkeypatch: pytest.MonkeyPatch, way: str, subject: str | None, threads: int
) -> None:
    """The place it was to fill is wiped when the last thread has left it, and so before the caller has it back."""
    name = {
        ("decrypt", None): "open_rows",
        ("decrypt", "somebody"): "open_named",
        ("encrypt", None): "seal_rows",
        ("encrypt", "somebody"): "seal_rows",
    }[way, subject]
    held, ended = Held(getattr(crypto, name)), list[int]()

    async def main() -> None:
        async with aio.Gateway(core) as gateway:
            service = await gateway.service("acme", "records")
            out = bytearray(ROWS * (SIZE + 1024))
            if way == "encrypt":
                work = service.encrypt_column(column(), subject=subject, out=out, threads=threads)
            else:
                work = service.decrypt_column(sealed, out=out, threads=threads)
            task = asyncio.create_task(work)
            await held.until_begun()
            for _ in range(2):  # and hears of it once
                task.cancel()
                await turns()
                assert not task.done()
            held.let_go.set()
            await asyncio.wait([task])
            assert task.cancelled()
            ended.append(held.ended)
            assert out.count(0) == len(out)

    with openkcm.Gateway(core) as gateway:
        sealed = gateway.service("acme", "records").encrypt_column(column(), subject=subject)
    monkeypatch.setattr(crypto, name, held)
    run(main, held)
    assert ended == [held.ended] and held.ended >= 1


def test_a_cancelled_batch_has_let_go_of_its_keys_and_records(
    core: openkcm.Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(crypto.RecordCipher.open_one)

    async def main() -> None:
        async with aio.Gateway(core) as gateway:
            service = await gateway.service("acme", "records")
            blob = await service.encrypt(bytes(2 * SIZE))
            opener = service._handle._opener
            before = crypto.secret_memory_info()["handles"]
            cipher = service._handle._inline
            monkeypatch.setattr(
                opener, "_open_one", service._handle._core.waiting.heavy(lambda *args: held(cipher, *args), 3)
            )
            task = asyncio.create_task(service.decrypt(blob))
            await held.until_begun()
            task.cancel()
            await turns()
            assert not task.done()
            held.let_go.set()
            await asyncio.wait([task])
            assert task.cancelled() and held.ended == 1
            del task
            gc.collect()
            assert crypto.secret_memory_info()["handles"] <= before

    run(main, held)


def test_what_has_not_begun_never_does() -> None:
    """Nobody waits for a busy executor; what would have been done is forgotten with all that it holds."""
    loop, held, later = Loop(), Held(), Held()

    async def main() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        busy = asyncio.create_task(loop.run(loop.apart_to_the_end, held))
        await held.until_begun()
        queued = asyncio.create_task(loop.run(loop.apart_to_the_end, later))
        await turns()
        queued.cancel()
        await asyncio.wait([queued], timeout=SECONDS)
        assert queued.cancelled() and not busy.done()
        held.let_go.set()
        await busy
        await asyncio.get_running_loop().shutdown_default_executor()
        assert not later.begun.acquire(blocking=False)

    run(main, held, later)


def test_what_fails_after_its_caller_was_cancelled_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ValueError("nobody is told")

    loop, held = Loop(), Held(fail)

    async def main() -> None:
        with pytest.raises(ValueError, match="nobody"):
            await loop.run(loop.apart_to_the_end, fail)
        task = asyncio.create_task(loop.run(loop.apart_to_the_end, held))
        await held.until_begun()
        task.cancel()
        await turns()
        held.let_go.set()
        await asyncio.wait([task])
        assert task.cancelled()

    run(main, held)
    gc.collect()
    assert not caplog.records


def test_a_loop_that_ended_is_waited_for_with_the_thread() -> None:
    """A loop that was stopped, and never cancelled its tasks: what was theirs still ends before they unwind."""
    green, held, order = Loop(), Held(), []

    def work() -> None:
        try:
            green.apart_to_the_end(lambda: (held(), order.append("ended")))
        finally:
            order.append("wiped")

    loop = asyncio.new_event_loop()

    async def main() -> Any:
        wanted = green.run(work)
        wanted.send(None)
        await held.until_begun()
        return wanted

    wanted = loop.run_until_complete(main())
    threading.Timer(0.05, held.let_go.set).start()
    wanted.close()
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    assert order == ["ended", "wiped"]


@pytest.mark.parametrize("begun", [False, True])
def test_a_column_whose_helpers_were_ended_is_no_column(begun: bool) -> None:
    """A Core's close ends what was spawned, begun or not: then nobody says that all was done."""
    loop, held = Loop(), Held()
    waiting = Green(loop)

    def work() -> None:
        loop.apart_to_the_end(held)

    async def main() -> None:
        task = asyncio.create_task(loop.run(waiting.together, 3, work))
        await asyncio.sleep(0)
        if begun:
            for _ in range(3):
                await held.until_begun()
        ending = asyncio.create_task(loop.settle())
        await turns()
        assert not task.done()
        held.let_go.set()
        await ending
        with pytest.raises(CoreUnavailable, match="closed"):
            await task

    run(main, held)
