# SPDX-License-Identifier: Apache-2.0
"""What the tests of ``bao-transit:`` roots share: values, scripted servers, bounds in time, and fixtures.

A module imports a fixture as itself (``key as key``), since only pytest uses the name.
"""

from __future__ import annotations

import itertools
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from openkcm.roots import Root, open_root
from openkcm.testing.https import Request, Response, Server, make_certificate
from openkcm.testing.openbao import OpenBao, OpenBaoKey
from support import refused

CONTEXT = {"layer": "L2", "tenant": "acme", "region": "local", "version": "1"}
SEALED = bytes(range(72))
BLOB = b"\1\0\0\0\1" + bytes(132)
LIMIT = 8.0
"""Seconds within which a call has to end, whatever happens; loose, for a busy machine."""

names = (f"key-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def bao() -> Iterator[OpenBao]:
    """One server for all tests of a module."""
    with OpenBao() as provider:
        yield provider


@pytest.fixture
def key(bao: OpenBao) -> Iterator[OpenBaoKey]:
    """A fresh key."""
    made = bao.make_key(next(names))
    yield made
    made.close()


def use(root: Root) -> None:
    assert root.unwrap(root.wrap(SEALED, CONTEXT), CONTEXT) == SEALED


@contextmanager
def answering(handle: Callable[[Request], Response], login: str = "") -> Iterator[Root]:
    """A root at a server that answers as it is told."""
    server = Server(handle, tls=True)
    try:
        yield open_root(f"bao-transit://127.0.0.1:{server.port}/transit/key?{login}ca={server.authority}")
    finally:
        server.close()


def in_time(call: Callable[[], object], kind: type[BaseException]) -> BaseException:
    started = time.monotonic()
    error = refused(call, kind)
    assert time.monotonic() - started < LIMIT
    return error


@contextmanager
def listening(serve: Callable[[socket.socket], None], context: ssl.SSLContext | None = None) -> Iterator[int]:
    """A port where each connection is handled as told, after a TLS handshake if there is a context."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        over = threading.Event()

        def accept() -> None:
            while not over.is_set():
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    continue
                connection.settimeout(20)
                with connection:
                    try:
                        if context is None:
                            serve(connection)
                        else:
                            with context.wrap_socket(connection, server_side=True) as secure:
                                serve(secure)
                    except (OSError, ValueError):
                        continue

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            over.set()
            thread.join(30)


def own_context(folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(make_certificate(folder))
    return context


def root_at(port: int, folder: Path) -> Root:
    return open_root(f"bao-transit://127.0.0.1:{port}/transit/key?ca={folder / 'authority.pem'}")
