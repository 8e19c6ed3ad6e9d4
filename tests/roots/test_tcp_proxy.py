# SPDX-License-Identifier: Apache-2.0
"""The TCP proxy: each lever acts at once, also on connections that are open."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from openkcm.testing import tcp_proxy
from openkcm.testing.tcp_proxy import TcpProxy

WORD = b"twelve bytes"


class Echo:
    """Sends back what comes, with a mark of its own before it."""

    def __init__(self, mark: bytes = b"") -> None:
        self.mark = mark
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self.listener.getsockname()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(65536):
                    connection.sendall(self.mark + data)
            except OSError:
                return

    def close(self) -> None:
        if self.listener.fileno() >= 0:
            self.listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self.listener.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[TcpProxy]:
    with TcpProxy(echo.address) as made:
        yield made


def connect(proxy: TcpProxy, timeout: float = 10) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout)


def read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := connection.recv(size - len(data))):
        data += more
    return data


def say(connection: socket.socket, word: bytes = WORD) -> bytes:
    connection.sendall(word)
    return read(connection, len(word))


def test_bytes_pass_both_ways(proxy: TcpProxy) -> None:
    with connect(proxy) as connection:
        assert say(connection) == WORD
        large = os.urandom(3 * 1024 * 1024)
        sender = threading.Thread(target=connection.sendall, args=(large,))
        sender.start()
        assert read(connection, len(large)) == large
        sender.join()
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    assert proxy.accepted == 1


def test_a_target_that_is_not_there(echo: Echo, proxy: TcpProxy) -> None:
    echo.close()
    with connect(proxy) as connection, pytest.raises(OSError):
        connection.sendall(WORD)
        if connection.recv(1) == b"":
            raise ConnectionError


def test_a_delay(proxy: TcpProxy) -> None:
    with connect(proxy) as connection:
        say(connection)
        proxy.delay(0.2)
        started = time.monotonic()
        assert say(connection, bytes(100_000)) == bytes(100_000)
        took = time.monotonic() - started
        assert 0.2 <= took < 5  # once, however many chunks there were
        proxy.heal()
        assert say(connection) == WORD


def test_a_black_hole_holds_and_lets_go(proxy: TcpProxy) -> None:
    with connect(proxy) as old:
        say(old)
        proxy.black_hole()
        old.sendall(WORD)
        with connect(proxy) as new:
            new.sendall(WORD)
            for connection in (old, new):
                connection.settimeout(0.1)
                with pytest.raises(TimeoutError):
                    connection.recv(1)
                connection.settimeout(10)
            proxy.heal()
            assert read(old, len(WORD)) == read(new, len(WORD)) == WORD


def test_a_black_hole_is_bounded(proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_proxy, "MAX_HOLD_SECONDS", 0.1)
    proxy.black_hole()
    with connect(proxy) as connection:
        connection.sendall(WORD)
        with pytest.raises(OSError):
            if connection.recv(1) == b"":
                raise ConnectionError
    # What is held is held in bounded memory: a sender is made to wait.
    monkeypatch.setattr(tcp_proxy, "MAX_HOLD_SECONDS", 60)
    with connect(proxy, timeout=0.3) as connection, pytest.raises(TimeoutError):
        connection.sendall(bytes(64 * 1024 * 1024))


def test_refusing(proxy: TcpProxy) -> None:
    with connect(proxy) as connection:
        say(connection)
        for _ in range(2):
            proxy.refuse()
            with pytest.raises(ConnectionError):
                say(connection) or connection.recv(1)
            with pytest.raises(ConnectionRefusedError):
                connect(proxy)
        taken = socket.socket()
        with taken, pytest.raises(OSError):
            taken.bind(("127.0.0.1", proxy.port))
    proxy.heal()
    with connect(proxy) as connection:
        assert say(connection) == WORD


def test_cutting(proxy: TcpProxy) -> None:
    with connect(proxy) as connection:
        say(connection)
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    with connect(proxy) as connection:
        assert say(connection) == WORD


def test_cutting_where_a_forked_child_lives_on(proxy: TcpProxy) -> None:
    """A child has the sockets open too; what is shut down is shut down for both."""
    with connect(proxy) as connection:
        say(connection)
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(write_end)
            os.read(read_end, 1)
            os._exit(0)
        try:
            proxy.refuse()
            with pytest.raises(ConnectionRefusedError):
                connect(proxy)
        finally:
            os.close(write_end)
            os.close(read_end)
            os.waitpid(pid, 0)


def test_diverting(proxy: TcpProxy) -> None:
    other = Echo(b"!")
    try:
        with connect(proxy) as connection:
            say(connection)
            proxy.divert(other.address)
            with pytest.raises(ConnectionError):
                say(connection) or connection.recv(1)
        with connect(proxy) as connection:
            connection.sendall(WORD)
            assert read(connection, 1 + len(WORD)) == b"!" + WORD
    finally:
        other.close()


def test_too_many_connections(proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_proxy, "MAX_CONNECTIONS", 2)
    kept = [connect(proxy) for _ in range(2)]
    try:
        assert all(say(connection) == WORD for connection in kept)
        with connect(proxy) as one_more, pytest.raises(OSError):
            if say(one_more) == b"":
                raise ConnectionError
        assert all(say(connection) == WORD for connection in kept)
    finally:
        for connection in kept:
            connection.close()


def test_closing_is_final_and_may_be_repeated(echo: Echo) -> None:
    before = threading.active_count()
    proxy = TcpProxy(echo.address)
    with connect(proxy) as connection:
        say(connection)
        proxy.close()
        proxy.close()
        with pytest.raises(ConnectionError):
            say(connection) or connection.recv(1)
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    assert threading.active_count() <= before + 1  # the echo's own
