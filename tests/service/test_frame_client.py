# SPDX-License-Identifier: Apache-2.0
"""The frame client: its connections, deadlines, and what it makes of a Core that is gone."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from frame_support import SECONDS, Place, eventually, frame, read_frame
from openkcm.errors import (
    AccessDenied,
    ConfigurationError,
    CoreUnavailable,
    FormatError,
    InvalidInput,
    KeyNotFound,
)
from openkcm.rpc.frames import format as frames
from openkcm.rpc.frames.client import FrameTransport
from openkcm.testing.tcp_proxy import TcpProxy
from support import refused


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_calls_one_after_the_other_share_a_connection(place: Place) -> None:
    with place.serve() as server, contextlib.closing(place.connect(server.port)) as client:
        assert server.connections == 0  # not before it is used
        for size in (0, 1, 16_370, 16_371, 320_000, 1_500_000):
            data = os.urandom(size)
            assert client.call("WrapKeys", data, SECONDS) == data
        client.ping(SECONDS)
        assert server.connections == 1


@pytest.mark.parametrize("most", [1, 3, 16])
def test_threads_share_a_transport(place: Place, most: int) -> None:
    with place.serve() as server, contextlib.closing(place.connect(server.port, most=most)) as client:
        wrong: list[object] = []

        def work(number: int) -> None:
            try:
                for at in range(60):
                    data = b"%d of %d " % (at, number) * (1 + at % 7 * 1500)
                    if client.call("WrapKeys", data, SECONDS) != data:
                        wrong.append(data[:20])
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert wrong == []
        assert 1 <= server.connections <= most


def test_a_call_that_waits_for_a_connection_has_its_deadline(place: Place) -> None:
    go = threading.Event()

    def act(name: str, data: bytes) -> bytes:
        if data == b"hold":
            assert go.wait(SECONDS)
        return data

    place.handlers.act = act
    with place.serve() as server, contextlib.closing(place.connect(server.port, most=1)) as client:
        holding = threading.Thread(target=client.call, args=("WrapKeys", b"hold", SECONDS))
        holding.start()
        eventually(lambda: client._count == 1 and not client._idle)
        start = time.monotonic()
        error = refused(lambda: client.call("WrapKeys", b"", 0.1), CoreUnavailable)
        assert error.retryable and time.monotonic() - start < 5  # type: ignore[attr-defined]
        go.set()
        assert client.call("WrapKeys", b"next", SECONDS) == b"next"
        holding.join()


def test_an_answer_that_comes_late_is_nobody_elses(place: Place) -> None:
    def act(name: str, data: bytes) -> bytes:
        if data == b"late":
            time.sleep(0.2)
        return data

    place.handlers.act = act
    with place.serve() as server, contextlib.closing(place.connect(server.port, most=1)) as client:
        refused(lambda: client.call("WrapKeys", b"late", 0.05), CoreUnavailable)
        for at in range(20):
            assert client.call("WrapKeys", b"%d" % at, SECONDS) == b"%d" % at


# ---- a network that fails ----------------------------------------------------------------------------


@pytest.fixture
def proxied(place: Place) -> Iterator[tuple[TcpProxy, FrameTransport]]:
    with (
        place.serve() as server,
        TcpProxy(("127.0.0.1", server.port)) as proxy,
        contextlib.closing(place.connect(proxy.port)) as client,
    ):
        assert client.call("WrapKeys", b"first", SECONDS) == b"first"
        yield proxy, client


@pytest.mark.parametrize("size", [0, 1_500_000])
def test_a_black_hole_ends_a_call_at_its_deadline(
    proxied: tuple[TcpProxy, FrameTransport], size: int
) -> None:
    proxy, client = proxied
    proxy.black_hole()
    for _ in range(2):  # on the connection there was, and on a new one
        start = time.monotonic()
        refused(lambda: client.call("WrapKeys", bytes(size), 0.3), CoreUnavailable)
        assert 0.25 < time.monotonic() - start < 5
    proxy.heal()
    assert client.call("WrapKeys", b"again", SECONDS) == b"again"


def test_a_connection_that_was_cut_while_idle_is_not_used(proxied: tuple[TcpProxy, FrameTransport]) -> None:
    proxy, client = proxied
    for at in range(5):
        proxy.cut()
        assert client.call("WrapKeys", b"%d" % at, SECONDS) == b"%d" % at
    assert proxy.accepted == 6


def test_a_core_that_is_not_there_is_an_outage(proxied: tuple[TcpProxy, FrameTransport]) -> None:
    proxy, client = proxied
    proxy.refuse()
    error = refused(lambda: client.call("WrapKeys", b"", SECONDS), CoreUnavailable)
    assert error.retryable  # type: ignore[attr-defined]
    proxy.heal()
    assert client.call("WrapKeys", b"back", SECONDS) == b"back"


def test_calls_under_way_end_when_the_connection_is_cut(place: Place) -> None:
    go = threading.Event()
    begun: list[bytes] = []

    def act(name: str, data: bytes) -> bytes:
        begun.append(data)
        assert go.wait(SECONDS)
        return data

    with (
        place.serve() as server,
        TcpProxy(("127.0.0.1", server.port)) as proxy,
        contextlib.closing(place.connect(proxy.port)) as client,
    ):
        client.ping(SECONDS)  # so that the call is on a connection that was in use, and may be made again
        place.handlers.act = act
        outcome: list[bytes] = []
        calling = threading.Thread(target=lambda: outcome.append(client.call("WrapKeys", b"twice", SECONDS)))
        calling.start()
        eventually(lambda: begun == [b"twice"])
        proxy.cut()
        eventually(lambda: begun == [b"twice", b"twice"])  # once more, on another connection
        go.set()
        calling.join()
        assert outcome == [b"twice"]


# ---- a Core that misbehaves --------------------------------------------------------------------------


class FakeCore:
    """Answers one connection after the other with what it is told to, past TLS."""

    def __init__(
        self, place: Place, answer: Callable[[ssl.SSLSocket], None], alpn: str = frames.ALPN
    ) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._context = frames.server_context(place.pem(place.server))
        self._context.set_alpn_protocols([alpn])
        self._answer = answer
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            with (
                contextlib.suppress(OSError),
                plain,
                self._context.wrap_socket(plain, server_side=True) as sock,
            ):
                sock.settimeout(SECONDS)
                self._answer(sock)

    def __enter__(self) -> FakeCore:
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()


def says(*answers: bytes) -> Callable[[ssl.SSLSocket], None]:
    def answer(sock: ssl.SSLSocket) -> None:
        sock.sendall(frame(frames.HELLO))
        read_frame(sock)
        for each in answers:
            sock.sendall(each)
        sock.recv(1)

    return answer


ODD = {
    "another call's answer": frame(frames.REPLY, call=2, payload=b"another's"),
    "a request": frame(frames.REQUEST, method=3, call=1, millis=5),
    "an item": frame(frames.ITEM, call=1, payload=b"item"),
    "no frame": b"\xff" * 14,
    "oversized": b"\xff\xff\xff\xff" + frame(frames.REPLY, call=1)[4:],
}


@pytest.mark.parametrize("what", ODD)
def test_what_is_no_answer_is_an_error_and_never_an_answer(place: Place, what: str) -> None:
    with FakeCore(place, says(ODD[what])) as core, contextlib.closing(place.connect(core.port)) as client:
        with pytest.raises((FormatError, CoreUnavailable)):
            client.call("WrapKeys", b"", SECONDS)
        assert client._count == 0  # that connection is not used again


@pytest.mark.parametrize("cut", [0, 5, 14, 20])
def test_an_answer_that_ends_early_is_an_outage(place: Place, cut: int) -> None:
    def answer(sock: ssl.SSLSocket) -> None:
        sock.sendall(frame(frames.HELLO))
        read_frame(sock)
        sock.sendall(frame(frames.REPLY, call=1, payload=b"the answer")[:cut])

    with FakeCore(place, answer) as core, contextlib.closing(place.connect(core.port)) as client:
        refused(lambda: client.call("WrapKeys", b"", SECONDS), CoreUnavailable)


def test_a_core_of_another_protocol_is_told(place: Place) -> None:
    with (
        FakeCore(place, lambda sock: None, alpn="h2") as core,
        contextlib.closing(place.connect(core.port)) as client,
    ):
        error = refused(lambda: client.call("WrapKeys", b"", SECONDS), CoreUnavailable)
        assert not error.retryable  # type: ignore[attr-defined]


def test_a_server_of_another_name_or_authority_is_not_spoken_to(place: Place, tmp_path: Path) -> None:
    with place.serve() as server:
        with contextlib.closing(place.connect(server.port, server_name="other.example")) as client:
            error = refused(lambda: client.call("WrapKeys", b"", SECONDS), CoreUnavailable)
            assert "other.example" in str(error) and not error.retryable  # type: ignore[attr-defined]
        with contextlib.closing(place.connect(server.port, server_name="localhost")) as client:
            client.ping(SECONDS)
        other = Place(tmp_path / "other")
        with contextlib.closing(other.connect(server.port)) as client:
            refused(lambda: client.call("WrapKeys", b"", SECONDS), CoreUnavailable)


def test_a_certificate_that_the_core_does_not_take_is_told(place: Place, tmp_path: Path) -> None:
    other = Place(tmp_path / "other")
    key, chain, _ = other.pem(other.client)
    pem = (key, chain, place.ca.certificate_path.read_bytes())
    with (
        place.serve() as server,
        contextlib.closing(FrameTransport(f"127.0.0.1:{server.port}", lambda: pem)) as client,
    ):
        error = refused(lambda: client.call("WrapKeys", b"", SECONDS), CoreUnavailable)
        assert "does not take this certificate" in str(error)


def test_a_new_certificate_is_used_for_new_connections(place: Place) -> None:
    seen: list[Any] = []
    place.handlers.check = lambda peer: seen.append(peer.leaf)
    with place.serve() as server, contextlib.closing(place.connect(server.port)) as client:
        client.ping(SECONDS)
        place.ca.renew("gateway")
        place.client = place.ca.find("gateway")
        client._drop_idle()
        client.ping(SECONDS)
        assert len(set(seen)) == 2


def test_a_connection_whose_certificate_may_be_refused_is_not_used_again(place: Place) -> None:
    def answer(error: Exception) -> bytes:
        raise error

    with place.serve() as server, contextlib.closing(place.connect(server.port)) as client:
        for error, left in ((KeyNotFound("none"), 1), (AccessDenied("no"), 0), (KeyNotFound("none"), 1)):
            place.handlers.act = lambda name, data, error=error: answer(error)  # type: ignore[misc]
            refused(lambda: client.call("WrapKeys", b"", SECONDS), type(error))
            assert client._count == len(client._idle) == left


def test_a_retired_transport_finishes_its_calls_and_keeps_no_connection(place: Place) -> None:
    go, came = threading.Event(), threading.Event()

    def act(name: str, data: bytes) -> bytes:
        came.set()
        assert go.wait(SECONDS)
        return data

    with place.serve() as server, contextlib.closing(place.connect(server.port)) as client:
        client.ping(SECONDS)
        place.handlers.act = act
        answers: list[bytes] = []
        caller = threading.Thread(target=lambda: answers.append(client.call("WrapKeys", b"x", SECONDS)))
        caller.start()
        assert came.wait(SECONDS)
        client.retire()
        assert client._count == 1
        go.set()
        caller.join(SECONDS)
        assert answers == [b"x"]
        assert client._count == 0
        assert client.call("WrapKeys", b"y", SECONDS) == b"y"  # of who had it in hand already
        assert client._count == 0


def test_a_certificate_that_is_not_there_is_told(place: Place) -> None:
    def missing() -> frames.PEM:
        raise FileNotFoundError(2, "No such file")

    with contextlib.closing(FrameTransport("127.0.0.1:1", missing)) as client:
        refused(lambda: client.call("WrapKeys", b"", SECONDS), ConfigurationError)
        assert client._count == 0


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:99999"])
def test_an_address_is_checked(place: Place, address: str) -> None:
    refused(lambda: FrameTransport(address, lambda: place.pem(place.client)), InvalidInput)


# ---- the end -----------------------------------------------------------------------------------------


def test_a_closed_transport_makes_no_calls_and_ends_those_under_way(place: Place) -> None:
    go = threading.Event()
    begun = threading.Event()

    def act(name: str, data: bytes) -> bytes:
        begun.set()
        assert go.wait(SECONDS)
        return data

    place.handlers.act = act
    with place.serve() as server:
        client = place.connect(server.port)
        outcome: list[object] = []

        def call() -> None:
            try:
                client.call("WrapKeys", b"", SECONDS)
            except CoreUnavailable as error:
                outcome.append(error)

        calling = threading.Thread(target=call)
        calling.start()
        assert begun.wait(SECONDS)
        client.close()
        calling.join(SECONDS)
        assert len(outcome) == 1
        go.set()
        refused(lambda: client.call("WrapKeys", b"", SECONDS), CoreUnavailable)
        client.close()


def test_a_stream_is_cancelled_from_another_thread(place: Place) -> None:
    with place.serve() as server, contextlib.closing(place.connect(server.port)) as client:
        stream = client.stream("Watch", b"")
        heard = threading.Event()
        outcome: list[object] = []

        def listen() -> None:
            try:
                for _ in stream:
                    heard.set()
            except CoreUnavailable as error:
                outcome.append(error)

        listening = threading.Thread(target=listen)
        listening.start()
        assert heard.wait(SECONDS)
        stream.cancel()
        listening.join(SECONDS)
        assert len(outcome) == 1
        refused(lambda: next(stream), CoreUnavailable)
        stream.cancel()
        eventually(lambda: server.connections == 0)


def test_a_stream_that_was_cancelled_first_does_not_connect(place: Place) -> None:
    with place.serve() as server, contextlib.closing(place.connect(server.port)) as client:
        stream = client.stream("Watch", b"")
        stream.cancel()
        refused(lambda: next(stream), CoreUnavailable)
        assert server.connections == 0


def test_a_stream_whose_connection_is_cut_is_an_outage(proxied: tuple[TcpProxy, FrameTransport]) -> None:
    proxy, client = proxied
    stream = client.stream("Watch", b"")
    next(stream)
    proxy.cut()
    with pytest.raises(CoreUnavailable):
        while True:
            next(stream)


# ---- fork --------------------------------------------------------------------------------------------


def in_child(act: Callable[[], bool]) -> None:
    """Fork; ``act`` in the child says whether all is well there."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = 0 if act() else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_forked_child_makes_its_own_connections_and_leaves_the_parents_alone(place: Place) -> None:
    with place.serve() as server, contextlib.closing(place.connect(server.port)) as client:
        stop = threading.Event()
        wrong: list[object] = []

        def work(number: int) -> None:
            at = 0
            while not stop.is_set():
                at += 1
                data = b"%d of %d" % (at, number)
                try:
                    if client.call("WrapKeys", data, SECONDS) != data:
                        wrong.append(data)
                except Exception as error:
                    wrong.append(error)

        stream = client.stream("Watch", b"")
        next(stream)
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for each in threads:
            each.start()

        def child() -> bool:
            return all(client.call("WrapKeys", b"%d" % at, SECONDS) == b"%d" % at for at in range(50))

        try:
            for _ in range(10):
                in_child(child)
        finally:
            stop.set()
            for each in threads:
                each.join()
        assert wrong == []
        next(stream)
        assert client.call("WrapKeys", b"parent", SECONDS) == b"parent"
        eventually(lambda: server.connections <= 5)  # the children's have ended, with their processes
