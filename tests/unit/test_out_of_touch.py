# SPDX-License-Identifier: Apache-2.0
"""Streams and columns that are being decrypted while the network falls silent: no kill could be told of then."""

from __future__ import annotations

import asyncio
import io
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import openkcm
from openkcm import aio
from openkcm.clock import awake_clock
from openkcm.errors import CoreUnavailable, OpenKCMError, TenantDark
from openkcm.gateway.columns import LONG_RUN
from openkcm.rpc.client.remote import STALE_SECONDS, RemoteCore
from openkcm.rpc.server.serving import CoreServer
from openkcm.testing.tcp_proxy import TcpProxy
from remote_support import SECONDS, until
from rpc_support import Site
from support import refused

SEGMENT = 65_536
PLAIN = os.urandom(12 * SEGMENT)


class Far:
    """A Gateway behind a proxy, that the Core is in touch with."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.site = Site(folder)
        self.server: CoreServer = stack.enter_context(self.site.serve())
        self.proxy = stack.enter_context(TcpProxy(("127.0.0.1", self.server.ports["data"])))
        self.remote: RemoteCore = stack.enter_context(
            self.site.connect({"data": self.proxy.port}, deadline=SECONDS)
        )
        gateway = stack.enter_context(openkcm.Gateway(self.remote, keys=folder / "keys.db"))
        self.service = gateway.service("acme", "records")
        self.service.encrypt(b"x")
        until(self.remote._heard)
        self.unwraps = 0
        self._unwrap = self.remote.unwrap_keys

    def count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Count from now on how often keys are opened."""

        def unwrap(*given: Any) -> Any:
            self.unwraps += 1
            return self._unwrap(*given)

        monkeypatch.setattr(self.remote, "unwrap_keys", unwrap)

    def fall_silent(self) -> None:
        """Nothing passes any more, and by now the Gateway can tell."""
        self.proxy.black_hole()
        self.outwait()

    def outwait(self) -> None:
        """Wait until nothing that was opened so far is good without another word of the Core."""
        now = awake_clock()
        until(lambda: not self.remote._heard() and not self.remote.in_touch(now))


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Far]:
    with ExitStack() as stack:
        yield Far(tmp_path, stack)


class Source:
    """A stream's bytes; something happens before one of its segments is read."""

    def __init__(self, data: bytes, **acts: Callable[[], None]) -> None:
        self._data = io.BytesIO(data)
        self._acts = {int(name.removeprefix("at")): act for name, act in acts.items()}
        self._reads = 0

    def read(self, size: int, /) -> bytes:
        self._reads += 1
        self._acts.get(self._reads, lambda: None)()
        return self._data.read(size)


def sealed(far: Far, subject: str | None) -> bytes:
    target = io.BytesIO()
    far.service.encrypt_stream(io.BytesIO(PLAIN), target, subject=subject)
    return target.getvalue()


# ---- streams ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", [None, "ann"])
def test_a_stream_stops_where_a_kill_could_not_be_told_of(far: Far, subject: str | None) -> None:
    target, written = io.BytesIO(), []

    def kill() -> None:
        far.fall_silent()
        far.server.core.kill("acme")
        far.remote._deadline = 1.0
        written.append(len(target.getvalue()))

    source = Source(sealed(far, subject), at6=kill)
    refused(lambda: far.service.decrypt_stream(source, target), CoreUnavailable)
    assert 0 < written[0] == len(target.getvalue())


@pytest.mark.parametrize("subject", [None, "ann"])
def test_a_core_that_is_asked_again_says_that_the_tenant_is_dark(far: Far, subject: str | None) -> None:
    target, written = io.BytesIO(), []

    def kill() -> None:
        assert far.remote._watcher is not None
        far.remote._watcher.stop()  # calls go on
        far.outwait()
        far.server.core.kill("acme")
        written.append(len(target.getvalue()))

    source = Source(sealed(far, subject), at6=kill)
    refused(lambda: far.service.decrypt_stream(source, target), TenantDark)
    assert 0 < written[0] == len(target.getvalue())


def test_it_stops_within_a_second_of_the_kill(far: Far) -> None:
    assert STALE_SECONDS <= 0.75
    told: list[float] = []
    target = io.BytesIO()

    def kill() -> None:
        far.proxy.black_hole()
        far.server.core.kill("acme")
        far.remote._deadline = 1.0
        told.append(awake_clock())

    def slowly() -> None:
        # Were the answer that a segment may be opened later than that, this would go on to the end.
        until(lambda: awake_clock() > told[0] + 1.0)

    source = Source(sealed(far, None), at5=kill, at6=slowly)
    refused(lambda: far.service.decrypt_stream(source, target), CoreUnavailable)
    assert len(target.getvalue()) < len(PLAIN) // 2


@pytest.mark.parametrize("subject", [None, "ann"])
def test_a_stream_goes_on_after_a_silence(far: Far, subject: str | None) -> None:
    def pause() -> None:
        far.fall_silent()
        far.proxy.heal()

    target = io.BytesIO()
    assert far.service.decrypt_stream(Source(sealed(far, subject), at6=pause), target) == len(PLAIN)
    assert target.getvalue() == PLAIN


def test_where_only_the_watch_stream_is_lost_the_key_is_opened_again_and_again(
    far: Far, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = sealed(far, None)
    assert far.remote._watcher is not None
    monkeypatch.setattr(far.remote._watcher, "is_heard", lambda: False)
    far.count(monkeypatch)
    target = io.BytesIO()
    assert far.service.decrypt_stream(Source(blob, at5=far.outwait, at9=far.outwait), target) == len(PLAIN)
    assert target.getvalue() == PLAIN
    assert far.unwraps >= 3


def test_a_quiet_connection_is_in_touch(far: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = sealed(far, None)
    assert far.remote._watcher is not None
    monkeypatch.setattr(far.remote._watcher, "is_heard", lambda: True)  # as on a machine that is not busy
    far.count(monkeypatch)
    begun = awake_clock()
    target = io.BytesIO()
    slowly = Source(blob, at6=lambda: until(lambda: awake_clock() > begun + 2 * STALE_SECONDS))
    assert far.service.decrypt_stream(slowly, target) == len(PLAIN)
    assert target.getvalue() == PLAIN
    assert far.unwraps == 1


def test_encrypting_goes_on_with_the_key_at_hand(far: Far) -> None:
    target = io.BytesIO()
    written = far.service.encrypt_stream(Source(PLAIN, at4=far.fall_silent), target)
    assert written == len(target.getvalue()) > len(PLAIN)
    far.proxy.heal()
    opened = io.BytesIO()
    until(far.remote._heard)
    far.service.decrypt_stream(io.BytesIO(target.getvalue()), opened)
    assert opened.getvalue() == PLAIN


@pytest.mark.parametrize("killed", [False, True])
def test_a_stream_of_asyncios(far: Far, killed: bool) -> None:
    blob = sealed(far, None)

    async def decrypt() -> bytes:
        address = f"127.0.0.1:{far.proxy.port}"
        async with (
            aio.connect(address, tls=far.site.tls(), deadline=1.0 if killed else SECONDS) as core,
            aio.Gateway(core) as gateway,
        ):
            service = await gateway.service("acme", "records")
            inner = core._core

            def silence() -> None:  # in a thread, while the loop goes on
                far.proxy.black_hole()
                now = awake_clock()
                until(lambda: not inner.in_touch(now))
                if killed:
                    far.server.core.kill("acme")
                else:
                    far.proxy.heal()

            target = io.BytesIO()
            try:
                await service.decrypt_stream(Source(blob, at6=silence), target)
            except OpenKCMError as error:
                assert killed and isinstance(error, CoreUnavailable)
            return target.getvalue()

    opened = asyncio.run(decrypt())
    assert 0 < len(opened) < len(PLAIN) if killed else opened == PLAIN


# ---- columns ------------------------------------------------------------------------------------------

RUNS = 4


def column(far: Far) -> Any:
    """Envelopes of a few subjects, of as many rows as take ``RUNS`` runs."""
    rows = pa.array([b"%d" % at for at in range(RUNS * LONG_RUN)])
    return far.service.encrypt_column(rows, subjects=pa.array(["ann", "bob"] * (len(rows) // 2)))


def between(far: Far, monkeypatch: pytest.MonkeyPatch, threads: int, act: Callable[[], None]) -> list[int]:
    """Have something happen after the second run of a column, which no thread's next one begins before.

    Returns where each run that is decrypted begins.
    """
    opener, begun, over = far.service._column_opener, [], threading.Event()
    real, numbers = opener._open_names, itertools.count(1)

    def work(*given: Any) -> Any:
        begun.append(given[4])
        number = next(numbers)
        refusals = real(*given)
        if number == 2:
            act()
            over.set()
        elif threads > 1:
            assert over.wait(SECONDS)
        return refusals

    monkeypatch.setattr(opener, "_open_names", work)
    return begun


@pytest.mark.parametrize("threads", [1, 3])
def test_a_column_stops_where_a_kill_could_not_be_told_of(
    far: Far, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    rows = column(far)
    out = bytearray(b"\xff" * (RUNS * LONG_RUN * 8))

    def kill() -> None:
        far.fall_silent()
        far.server.core.kill("acme")
        far.remote._deadline = 1.0

    begun = between(far, monkeypatch, threads, kill)
    refused(lambda: far.service.decrypt_column(rows, out=out, threads=threads), CoreUnavailable)
    assert len(begun) == 2 if threads == 1 else len(begun) <= threads
    most = sum(len(b"%d" % at) for at in range(RUNS * LONG_RUN))
    assert out[:most] == bytes(most)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_column_goes_on_after_a_silence(far: Far, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    rows = column(far)

    def pause() -> None:
        far.fall_silent()
        far.proxy.heal()

    begun = between(far, monkeypatch, threads, pause)
    opened = far.service.decrypt_column(rows, threads=threads)
    assert opened.to_pylist() == [b"%d" % at for at in range(RUNS * LONG_RUN)]
    assert len(begun) >= RUNS


def test_the_keys_of_a_quiet_column_are_not_opened_again(far: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = column(far)
    assert far.remote._watcher is not None
    monkeypatch.setattr(far.remote._watcher, "is_heard", lambda: True)
    far.count(monkeypatch)
    begun = between(far, monkeypatch, 1, lambda: time.sleep(2 * STALE_SECONDS))
    assert far.service.decrypt_column(rows).to_pylist() == [b"%d" % at for at in range(RUNS * LONG_RUN)]
    assert len(begun) == RUNS
    assert far.unwraps == 1
