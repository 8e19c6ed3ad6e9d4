# SPDX-License-Identifier: Apache-2.0
"""The scan of ``test_memory_scan`` on both processes of a Core on the network, and a look at what crosses between them.

The test knows every key, as the customer and the operator together would, and looks for each in the Core that serves,
in the Gateway that loads it over both transports, and in all that passes through somebody who terminates the TLS.
"""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from attacker import Secrets, read_vault
from scan import Patterns, scan_process
from test_memory_scan import PLANTED, cpu_seconds

import openkcm
from openkcm.rpc.frames import format as frames
from rpc_support import GATEWAY, VERBS, Site
from support import ON_FAST, environment

LOAD = """
import os, sys, threading, traceback
import openkcm
frames, grpc, keys, *tls = sys.argv[1:]
planted = b"".join(bytes([number, 255 - number]) for number in range(16))
tls = openkcm.TLS(*tls)
cores = [openkcm.connect(address, tls=tls, deadline=60) for address in (frames, grpc)]
resting_long = openkcm.PoolPolicy(seconds=3600)             # longer than a scan may take
gateways = [openkcm.Gateway(core, keys=keys, pool=resting_long) for core in cores]
handles = [gateway.service(tenant, "records") for gateway in gateways for tenant in ("acme", "globex")]

def work(handle):
    number = 0
    while True:
        number += 1
        try:
            handle.decrypt_many(handle.encrypt_many([b"record"] * 200))
            handle.decrypt(handle.encrypt(b"one", subject=f"s{number % 20}"))
            handle.decrypt(handle.encrypt(b"pooled"))
        except BaseException:
            traceback.print_exc()
            os._exit(3)                                    # a scan of an idle process would prove nothing

# Keys that rest: those that wait in a pool, and those that a lease lets the Gateway keep.
resting, leased = [], []
for gateway in gateways:
    rests = gateway.service("acme", "resting")
    rests.encrypt(b"x")
    resting.append(rests._pool.ready.wrapped)
    keeps = gateway.service("acme", "leased")
    leased.append(keeps.encrypt(b"x"))
    for _ in range(2):
        keeps.decrypt(leased[-1])
    assert len(keeps._opener._leases.kept) == 1
for handle in handles:
    threading.Thread(target=work, args=(handle,), daemon=True).start()
print(*(each.hex() for each in resting + leased), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A vault of two tenants, and services whose keys are to rest."""
    site = Site(tmp_path, "acme", "globex")
    with openkcm.Core.open(site.store) as core:
        core.create_service("acme", "resting")
        core.create_service("acme", "leased")
        core.set_lease("acme", "leased", 600)
        core.grant(GATEWAY, "globex", "*", VERBS)
    return site


@contextmanager
def loading(site: Site, ports: dict[str, int]) -> Iterator[tuple[subprocess.Popen[str], list[bytes]]]:
    """A Gateway's process under load, and what it said: two pools' wrapped keys, and two leased records."""
    tls = site.tls()
    addresses = [f"127.0.0.1:{ports['data']}", f"grpc://127.0.0.1:{ports['grpc']}"]
    files = [str(each) for each in (site.folder / "keys.db", tls.certificate, tls.key, tls.roots)]
    with (site.folder / "gateway.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", LOAD, *addresses, *files],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment(),
        )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said, (site.folder / "gateway.log").read_text()
        yield process, [bytes.fromhex(each) for each in said.split()]
    finally:
        process.kill()
        process.communicate()


def head_of(secrets: Secrets, service: openkcm.Service) -> bytes:
    """An inline envelope of a service, up to its wrapped key."""
    (version,) = (version for service_id, version in secrets.service_keys if service_id == service.service_id)
    return b"OKC\x01\x01\x01\x00\x00" + service.service_id + version.to_bytes(4, "big")


def resting_keys(site: Site, secrets: Secrets, said: list[bytes]) -> list[bytes]:
    """Data keys that lie in the Gateway's process, some of each kind."""
    with openkcm.Core.open(site.store) as core:
        head = head_of(secrets, core.find_service("acme", "resting"))
    pools, leased = said[:2], said[2:]
    pooled = [head + pool[at : at + 72] for pool in pools for at in range(0, len(pool), 72)]
    keys = [secrets.data_key(each) for each in pooled]
    assert len(set(keys)) == len(keys) > 100
    # A few of them: each one searched for costs a pass over the process.
    return keys[:: len(keys) // 8] + [secrets.data_key(each) for each in leased]


def test_nothing_is_found_in_a_core_and_its_gateway_under_load(site: Site) -> None:
    if not ON_FAST:
        pytest.skip("the Python backend promises nothing under load")
    with site.start() as replica, loading(site, replica.ports) as (gateway, said):
        secrets = read_vault(site.folder)
        assert len(secrets.all_keys()) == 6
        resting = resting_keys(site, secrets, said)
        patterns = Patterns([*secrets.all_keys(), secrets.seal, *resting])
        busy = {pid: cpu_seconds(pid) for pid in (replica.pid, gateway.pid)}
        for _ in range(2):
            for pid in (replica.pid, gateway.pid):
                hits, total = scan_process(pid, patterns)
                assert hits == 0, "the Core's" if pid == replica.pid else "the Gateway's"
                assert total > 20 * 2**20
        assert gateway.poll() is None, (site.folder / "gateway.log").read_text()
        assert all(cpu_seconds(pid) > before + 0.2 for pid, before in busy.items()), "a process was idle"
        # The scanner sees what is there to be seen.
        assert scan_process(gateway.pid, Patterns([PLANTED]))[0] > 0
        assert scan_process(replica.pid, Patterns([site.server.der[40:72]]))[0] > 0


# ---- on the wire ---------------------------------------------------------------------------------------------------


class Terminator:
    """Somebody between a Gateway and its Core who holds certificates that both accept, and writes down what passes."""

    def __init__(self, site: Site, port: int, protocol: str) -> None:
        own = site.ca.issue_server(f"terminator-{port}", dns=["localhost"], ips=["127.0.0.1"])
        tls = site.tls()
        self._inner = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=tls.roots)
        self._inner.load_cert_chain(own.certificate, own.key)
        self._inner.verify_mode = ssl.CERT_REQUIRED
        self._outer = ssl.create_default_context(cafile=tls.roots)
        self._outer.load_cert_chain(tls.certificate, tls.key)
        for context in (self._inner, self._outer):
            context.set_alpn_protocols([protocol])
        self._target = port
        self.seen = bytearray()
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Terminator:
        self._thread.start()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._server = self._do(asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._inner))
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *error: object) -> None:
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _do(self, act: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(act, self._loop).result(20)

    async def _end(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0.05)  # the transports' own goodbyes

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        far, far_writer = await asyncio.open_connection(
            "127.0.0.1", self._target, ssl=self._outer, server_hostname="localhost"
        )
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._carry(reader, far_writer))
                group.create_task(self._carry(far, writer))
        except (ExceptionGroup, asyncio.CancelledError):
            pass  # one end went away, or the test is over
        finally:
            for each in (writer, far_writer):
                each.transport.abort()
            self._tasks.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(2**16):
            self.seen += chunk
            writer.write(chunk)
            await writer.drain()
        raise ConnectionError


PROTOCOLS: Final = {"data": frames.ALPN, "grpc": "h2"}


@pytest.mark.parametrize("way", list(PROTOCOLS))
def test_who_terminates_tls_sees_no_data_key(way: str, site: Site) -> None:
    with site.start() as replica, Terminator(site, replica.ports[way], PROTOCOLS[way]) as between:
        scheme = "grpc://" if way == "grpc" else ""
        with (
            openkcm.connect(f"{scheme}127.0.0.1:{between.port}", tls=site.tls(), deadline=30) as remote,
            openkcm.Gateway(remote, keys=site.folder / "keys.db") as gateway,
        ):
            handle = gateway.service("acme", "records")
            blobs = [*handle.encrypt_many([b"x"] * 50), *(handle.encrypt(b"y") for _ in range(10))]
            assert [handle.decrypt(blob) for blob in blobs] == [b"x"] * 50 + [b"y"] * 10
            assert handle.decrypt_many(blobs) == [b"x"] * 50 + [b"y"] * 10
            named = handle.encrypt(b"z", subject="user-1")
            assert handle.decrypt(named) == b"z"
        secrets, seen = read_vault(site.folder), bytes(between.seen)
        assert named[24:40] in seen
        assert all(blob[24:96] in seen for blob in blobs), "the capture does not hold what was asked"
        keys = [secrets.data_key(blob) for blob in blobs]
        assert Patterns([*keys, *secrets.all_keys(), secrets.seal]).count(seen) == 0
