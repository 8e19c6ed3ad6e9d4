# SPDX-License-Identifier: Apache-2.0
"""A Core that serves, among very many connections and peers that send too much, half of it, or very slowly.

It stays up, its memory stays within bounds, and a Gateway on the same port keeps its answers and their latency.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import grpc
import psutil
import pytest

import openkcm
from fault_support import SOAK, until
from openkcm.cli import serve
from openkcm.rpc import wire
from openkcm.rpc.client.grpc_client import OPTIONS
from openkcm.rpc.frames import format as frames
from rpc_support import Replica, Site

WAYS: Final = {"data": ("", frames.ALPN), "grpc": ("grpc://", "h2")}
KIB_EACH: Final = 160
"""Of memory for a connection: what OpenSSL and the transport keep of one."""
SLACK_KIB: Final = 96 * 1024
SAMPLES: Final = 100
PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""What a client of HTTP/2 says first (RFC 9113, section 3.4)."""


class Crowd:
    """Connections to one port that do nothing good."""

    def __init__(self, site: Site, replica: Replica, way: str) -> None:
        tls = site.tls()
        self._context = ssl.create_default_context(cafile=tls.roots)
        self._context.load_cert_chain(tls.certificate, tls.key)
        self._context.set_alpn_protocols([WAYS[way][1]])
        self._address = ("127.0.0.1", replica.ports[way])
        self._way = way
        self.sockets: list[socket.socket] = []

    def silent(self) -> None:
        """One that does not even begin a handshake."""
        self.sockets.append(socket.create_connection(self._address, 30))

    def idle(self) -> ssl.SSLSocket:
        """One that could ask, and does not."""
        plain = socket.create_connection(self._address, 30)
        try:
            secured = self._context.wrap_socket(plain, server_hostname="localhost")
        except BaseException:
            plain.close()
            raise
        self.sockets.append(secured)
        if self._way == "grpc":
            secured.sendall(PREFACE)
        return secured

    def half(self) -> None:
        """One that announces a request of the largest size and sends some of it."""
        secured = self.idle()
        if self._way == "grpc":
            secured.sendall(struct.pack(">I", 16384)[1:] + bytes((0, 0, 0, 0, 0, 1)) + bytes(100))
        else:
            header = struct.pack(">IBBII", wire.MAX_MESSAGE_BYTES, frames.REQUEST, 2, 1, 5000)
            secured.sendall(header + bytes(100))

    def close(self) -> None:
        """End them."""
        for each in self.sockets:
            with contextlib.suppress(OSError):
                each.close()


@contextmanager
def crowd(site: Site, replica: Replica, way: str) -> Iterator[Crowd]:
    """Nobody yet; gone with the block."""
    made = Crowd(site, replica, way)
    try:
        yield made
    finally:
        made.close()


def resident_kib(pid: int) -> int:
    """A process's memory."""
    return int(psutil.Process(pid).memory_info().rss) // 1024


def percentile(samples: list[float], part: float) -> float:
    """Of sorted samples."""
    return sorted(samples)[min(int(len(samples) * part), len(samples) - 1)]


class Client:
    """A Gateway that asks for one key at a time."""

    def __init__(self, site: Site, replica: Replica, way: str) -> None:
        self.remote = openkcm.connect(
            f"{WAYS[way][0]}127.0.0.1:{replica.ports[way]}", tls=site.tls(), deadline=30
        )
        self._gateway = openkcm.Gateway(self.remote)
        self._handle = self._gateway.service("acme", "records")
        self._blob = self._handle.encrypt(b"x")
        for _ in range(20):
            self.ask()

    def ask(self) -> float:
        """One cold decrypt; how long it took."""
        started = time.monotonic()
        assert self._handle.decrypt(self._blob) == b"x"
        return time.monotonic() - started

    def p99(self, count: int = SAMPLES) -> float:
        """Of many."""
        return percentile([self.ask() for _ in range(count)], 0.99)

    def during(self, act: Callable[[], None]) -> float:
        """The 99th percentile of what is asked meanwhile."""
        done = threading.Event()
        errors: list[BaseException] = []

        def run() -> None:
            try:
                act()
            except BaseException as error:
                errors.append(error)
            finally:
                done.set()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        samples = []
        while not done.wait(0.002):
            samples.append(self.ask())
        thread.join()
        if errors:
            raise errors[0]
        return percentile(samples, 0.99)

    def close(self) -> None:
        """End it."""
        self._gateway.close()
        self.remote.close()


@contextmanager
def client(site: Site, replica: Replica, way: str) -> Iterator[Client]:
    """One that is connected."""
    made = Client(site, replica, way)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def descriptors(count: int) -> Iterator[None]:
    """That many, for this process and those that it starts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        pytest.skip(f"not tried: this machine gives a process {hard} descriptors, and {count} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("count", [200, pytest.param(5000, marks=SOAK)])
@pytest.mark.parametrize("way", list(WAYS))
def test_a_crowd_leaves_others_their_latency_and_the_core_its_memory(
    way: str, count: int, tmp_path: Path
) -> None:
    site = Site(tmp_path)
    with ExitStack() as stack:
        stack.enter_context(descriptors(count * 2 + 500))
        replica = stack.enter_context(site.start(**{"limits.peer_connections": 6000}))
        one = stack.enter_context(client(site, replica, way))
        before, kib = one.p99(), resident_kib(replica.pid)
        many = stack.enter_context(crowd(site, replica, way))

        def come() -> None:
            for number in range(count):
                (many.silent if number % 10 == 0 else many.half if number % 10 == 1 else many.idle)()

        started = time.monotonic()
        coming = one.during(come)
        took = time.monotonic() - started
        there, grown = one.p99(), resident_kib(replica.pid) - kib
        print(
            f"{count} connections over {way} in {took:.1f} s; p99 {before * 1000:.1f} ms before, "
            f"{coming * 1000:.1f} ms meanwhile, {there * 1000:.1f} ms with them; {grown / count:.0f} KiB each"
        )
        assert grown < count * KIB_EACH + SLACK_KIB
        assert there < 10 * before + 0.25  # a busy machine's own pauses are in both
        many.close()
        one.ask()
        until(lambda: psutil.Process(replica.pid).num_fds() < 150, what="the end of their connections")
        assert replica.process.poll() is None


@pytest.mark.parametrize("way", list(WAYS))
def test_without_descriptors_those_connected_go_on_and_others_come_later(way: str, tmp_path: Path) -> None:
    site = Site(tmp_path)
    with site.start() as replica, client(site, replica, way) as one, crowd(site, replica, way) as many:
        used = psutil.Process(replica.pid).num_fds()
        resource.prlimit(replica.pid, resource.RLIMIT_NOFILE, (used + 40, used + 40))
        for _ in range(120):
            many.silent()
        until(lambda: psutil.Process(replica.pid).num_fds() >= used + 38, what="the end of its descriptors")
        for _ in range(20):
            one.ask()
        assert one.remote.find_service("acme", "records")
        many.close()
        with client(site, replica, way) as another:
            another.ask()
        one.ask()


def test_the_service_takes_the_descriptors_that_it_needs(tmp_path: Path) -> None:
    site, connections = Site(tmp_path), 600
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft != resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 300), hard))
    try:
        replica = site.start(**{"limits.connections": connections})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with replica:
        allowed, _ = resource.prlimit(replica.pid, resource.RLIMIT_NOFILE)
        assert connections < allowed < 2 * connections


def test_the_service_says_that_it_has_too_few_descriptors(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    taken: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: taken.append(limits))
    serve._take_descriptors(5000)
    assert taken == [(4096, 4096)]
    assert "LimitNOFILE" in caplog.text


# ---- requests that are too much, or too little -------------------------------------------------------------------


def wrap_call(site: Site, replica: Replica, size: int) -> Any:
    """A request of that many bytes over gRPC, from a client that itself has no bounds."""
    key, chain, roots = site.tls().pem()
    with (
        grpc.secure_channel(
            f"127.0.0.1:{replica.ports['grpc']}",
            grpc.ssl_channel_credentials(roots, key, chain),
            options=OPTIONS,
        ) as channel,
        pytest.raises(grpc.RpcError) as raised,
    ):
        channel.unary_unary("/openkcm.v1.Keys/WrapKeys")(bytes(size), timeout=60)
    return raised.value


def test_an_oversized_request_is_turned_away_unread(tmp_path: Path) -> None:
    site = Site(tmp_path)
    with site.start() as replica, client(site, replica, "data") as one:
        kib = resident_kib(replica.pid)
        for _ in range(3):
            error = wrap_call(site, replica, 16 * wire.MAX_MESSAGE_BYTES)
            assert error.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED), error
            with crowd(site, replica, "data") as many:
                sock = many.idle()
                sock.sendall(struct.pack(">IBBII", wire.MAX_MESSAGE_BYTES + 1, frames.REQUEST, 2, 1, 5000))
                sock.settimeout(30)
                said = b""
                while part := sock.recv(65536):
                    said += part
                assert said[14 + 4] == frames.FAILURE  # after the greeting, and then the end
        one.ask()
        assert resident_kib(replica.pid) - kib < SLACK_KIB


def test_slow_requests_end_and_hold_nobody_up(tmp_path: Path) -> None:
    """Ten times as many as there are threads, each a byte at a time."""
    site = Site(tmp_path)
    with ExitStack() as stack:
        replica = stack.enter_context(site.start(**{"limits.threads": 4}))
        one = stack.enter_context(client(site, replica, "data"))
        many = stack.enter_context(crowd(site, replica, "data"))
        request = struct.pack(">IBBII", 1000, frames.REQUEST, 2, 1, 5000) + bytes(1000)
        slow = [many.idle() for _ in range(40)]
        ended: set[int] = set()
        position, started = 0, time.monotonic()
        while len(ended) < len(slow):
            assert time.monotonic() - started < 60, "slow requests are waited for without end"
            for number, sock in enumerate(slow):
                try:
                    sock.sendall(request[position : position + 1])
                except OSError:
                    ended.add(number)
            position = min(position + 1, len(request) - 2)
            assert one.ask() < 5
            time.sleep(0.05)
        assert time.monotonic() - started > 5, "they were not given the time that a request has"
        assert os.path.exists(f"/proc/{replica.pid}")
