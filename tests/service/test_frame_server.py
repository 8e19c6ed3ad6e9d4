# SPDX-License-Identifier: Apache-2.0
"""The frame server: who is let in, what is bounded, and how it ends."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import resource
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from frame_support import SECONDS, Place, eventually, frame, is_ended, read_frame
from openkcm.errors import AccessDenied, CoreUnavailable, DecryptError, InternalError
from openkcm.pki import DevelopmentCA
from openkcm.rpc import keys_pb2 as pb
from openkcm.rpc import wire
from openkcm.rpc.frames import format as frames
from openkcm.rpc.frames.client import FrameTransport
from openkcm.rpc.server.streams import HEARTBEAT_SECONDS
from support import refused


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def context_without_certificate(place: Place) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(place.ca.certificate_path)
    context.set_alpn_protocols([frames.ALPN])
    return context


def context_of_tls_1_2(place: Place) -> ssl.SSLContext:
    context = context_without_certificate(place)
    context.load_cert_chain(place.client.certificate, place.client.key)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


def context_of_another_protocol(place: Place) -> ssl.SSLContext:
    context = frames.client_context(place.pem(place.client))
    context.set_alpn_protocols(["h2"])
    return context


def context_of_another_ca(place: Place) -> ssl.SSLContext:
    other = DevelopmentCA.create(place.ca.folder.parent / "other")
    theirs = other.issue_client("gateway")
    context = context_without_certificate(place)
    context.load_cert_chain(theirs.certificate, theirs.key)
    return context


def context_of_an_expired(place: Place) -> ssl.SSLContext:
    earlier = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=3)
    expired = DevelopmentCA.open(place.ca.folder, now=lambda: earlier).issue_client("expired", days=1)
    return frames.client_context(place.pem(expired))


def context_of_a_server(place: Place) -> ssl.SSLContext:
    return frames.client_context(place.pem(place.server))


STRANGERS: dict[str, tuple[Callable[[Place], ssl.SSLContext], str]] = {
    "no certificate": (context_without_certificate, "a connection with no certificate refused"),
    "expired": (context_of_an_expired, "a connection with an expired certificate refused"),
    "wrong CA": (context_of_another_ca, "a connection with a certificate of an unknown authority refused"),
    "a server's": (context_of_a_server, "a connection with a certificate for another purpose refused"),
    "TLS 1.2": (context_of_tls_1_2, "a connection with TLS below 1.3 refused"),
    "another protocol": (context_of_another_protocol, "a connection with another protocol refused"),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stranger_is_refused_and_noted(
    place: Place, stranger: str, caplog: pytest.LogCaptureFixture
) -> None:
    make, line = STRANGERS[stranger]
    context = make(place)
    with place.serve() as server:
        with socket.create_connection(("127.0.0.1", server.port), SECONDS) as plain:
            try:
                with context.wrap_socket(plain, server_hostname="127.0.0.1") as sock:
                    sock.sendall(frame(frames.REQUEST, method=3, call=1, millis=9999, payload=b"?"))
                    assert b"?" not in sock.recv(100)
            except OSError:
                pass  # an alert, or the end
        eventually(lambda: place.noted(f"{line} to an unknown peer at 127.0.0.1"))
        eventually(lambda: not server.connections)
        place.handlers.act = lambda name, data: b"still here"
        with contextlib.closing(place.connect(server.port)) as client:
            assert client.call("WrapKeys", b"", SECONDS) == b"still here"
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize(
    "said", [b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", bytes(400), b"\x80" * 400]
)
def test_plaintext_is_refused_and_noted(place: Place, said: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with place.serve() as server:
        with socket.create_connection(("127.0.0.1", server.port), SECONDS) as plain:
            plain.sendall(said)
            plain.settimeout(SECONDS)
            with contextlib.suppress(ConnectionError):
                while plain.recv(1000):
                    pass
        eventually(lambda: place.noted("refused to an unknown peer at 127.0.0.1"))
        assert place.noted("a connection with no TLS") or place.noted("a connection with a broken handshake")
    assert not any(record.exc_info for record in caplog.records)


def test_a_certificate_that_the_core_does_not_accept_is_told_so_and_noted(place: Place) -> None:
    def check(peer: Any) -> None:
        raise AccessDenied(wire.REFUSED)

    place.handlers.check = check
    with place.serve() as server, contextlib.closing(place.connect(server.port)) as client:
        error = refused(lambda: client.call("WrapKeys", b"", SECONDS), AccessDenied)
        assert str(error) == wire.REFUSED
        eventually(
            lambda: place.noted("a certificate that is not accepted refused to cn:gateway at 127.0.0.1")
        )


def test_who_does_not_finish_a_handshake_is_ended_and_noted(place: Place) -> None:
    with place.serve(handshake_seconds=0.2) as server:
        with socket.create_connection(("127.0.0.1", server.port), SECONDS) as plain:
            plain.sendall(b"\x16\x03")
            assert plain.recv(100) == b""
        eventually(lambda: place.noted("a connection with a handshake too slow refused"))


def test_many_unfinished_handshakes_make_room_for_a_good_one(place: Place) -> None:
    with place.serve(handshakes=20) as server, contextlib.ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), SECONDS))
        with contextlib.closing(place.connect(server.port)) as client:
            assert client.call("WrapKeys", b"me", SECONDS) == b"me"
        eventually(lambda: server.connections <= 21)


def test_connections_above_the_limit_are_closed(place: Place) -> None:
    with place.serve(connections=5) as server, contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(place.raw(server.port))
        with contextlib.closing(place.connect(server.port)) as client:
            refused(lambda: client.call("WrapKeys", b"", SECONDS), CoreUnavailable)
        eventually(lambda: place.noted("a connection above the limit refused"))
        stack.close()
        eventually(lambda: server.connections == 0)
        with contextlib.closing(place.connect(server.port)) as client:
            assert client.call("WrapKeys", b"now", SECONDS) == b"now"


def test_without_descriptors_those_connected_go_on_and_others_come_later(place: Place) -> None:
    with place.serve() as server, contextlib.closing(place.connect(server.port)) as client:
        client.ping(SECONDS)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        socks = []
        try:
            resource.setrlimit(
                resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 20, hard)
            )
            with contextlib.suppress(OSError):
                while True:
                    socks.append(socket.create_connection(("127.0.0.1", server.port), SECONDS))
            eventually(lambda: server._paused or len(socks) < 5)
            assert client.call("WrapKeys", b"on", SECONDS) == b"on"
        finally:
            for each in socks:
                each.close()
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        with contextlib.closing(place.connect(server.port)) as later:
            assert later.call("WrapKeys", b"later", SECONDS) == b"later"


@pytest.mark.slow
def test_5000_connections_leave_others_their_latency_and_the_server_its_memory(place: Place) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard >= 11_000, "this test opens 10,000 sockets: raise the limit of open files (ulimit -Hn)"
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    context = frames.client_context(place.pem(place.client))
    memory = psutil.Process().memory_info
    try:
        with place.serve(connections=5001, peer_connections=5001) as server, contextlib.ExitStack() as stack:
            before = memory().rss
            for _ in range(5000):
                stack.enter_context(place.raw(server.port, context))
            assert memory().rss - before < 500_000_000  # of both ends
            assert server.connections == 5000
            with contextlib.closing(place.connect(server.port)) as client:
                times = []
                for _ in range(500):
                    start = time.perf_counter()
                    client.call("WrapKeys", b"", SECONDS)
                    times.append(time.perf_counter() - start)
                assert sorted(times)[250] < 0.01
            stack.close()
            eventually(lambda: server.connections == 0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---- peers that are let in, and misbehave ------------------------------------------------------------


BROKEN = {
    "no frame": b"\xff" * 14,
    "oversized": struct.pack(">IBBII", wire.MAX_MESSAGE_BYTES + 1, frames.REQUEST, 3, 1, 1000),
    "a reply": frame(frames.REPLY, call=1, payload=b"?"),
    "a greeting": frame(frames.HELLO),
    "an unknown method": frame(frames.REQUEST, method=9, call=1, millis=1000),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_request_ends_the_connection(place: Place, what: str) -> None:
    with place.serve() as server, place.raw(server.port) as sock:
        sock.sendall(BROKEN[what])
        kind, call, payload = read_frame(sock)
        assert (kind, call) == (frames.FAILURE, 0)
        assert pb.Failure.FromString(payload).code == "format"
        assert is_ended(sock)


def test_a_frame_that_stays_half_sent_ends_the_connection(place: Place) -> None:
    with place.serve(frame_seconds=0.2) as server:
        for half in (
            frame(frames.PING, call=1)[:5],
            frame(frames.REQUEST, method=3, call=1, millis=9, payload=b"x" * 50_000)[:-1],
        ):
            with place.raw(server.port) as sock:
                sock.sendall(half)
                assert is_ended(sock)
        eventually(lambda: server.connections == 0)
        assert server._held == 0


def test_what_is_held_of_half_sent_frames_has_a_bound(place: Place) -> None:
    half = frame(frames.REQUEST, method=3, call=1, millis=9, payload=bytes(100_001))[:100_000]
    with place.serve(held_bytes=1_000_000) as server, contextlib.ExitStack() as stack:
        socks = [stack.enter_context(place.raw(server.port)) for _ in range(15)]
        for sock in socks:
            sock.sendall(half)
        eventually(lambda: server.connections == 10 and server._held == 1_000_000)


def test_what_is_held_of_answers_that_nobody_reads_has_a_bound(place: Place) -> None:
    place.handlers.act = lambda name, data: bytes(wire.MAX_MESSAGE_BYTES)
    with place.serve(held_bytes=5 * wire.MAX_MESSAGE_BYTES) as server, contextlib.ExitStack() as stack:
        for _ in range(20):
            sock = stack.enter_context(place.raw(server.port))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            for at in range(1, 9):
                sock.sendall(frame(frames.REQUEST, method=3, call=at, millis=9999))
        eventually(lambda: server.connections <= 5)
        assert server._held <= 5 * wire.MAX_MESSAGE_BYTES


def test_an_answer_that_is_not_read_ends_the_connection(place: Place) -> None:
    place.handlers.act = lambda name, data: bytes(wire.MAX_MESSAGE_BYTES) if data == b"all" else data
    with place.serve(frame_seconds=0.3, threads=2) as server, contextlib.ExitStack() as stack:
        for _ in range(20):
            sock = stack.enter_context(place.raw(server.port))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            for at in range(1, 9):
                sock.sendall(frame(frames.REQUEST, method=3, call=at, millis=9999, payload=b"all"))
        with contextlib.closing(place.connect(server.port)) as client:
            assert client.call("WrapKeys", b"fine", SECONDS) == b"fine"
            eventually(lambda: server.connections == 1)


def test_requests_that_come_at_once_are_answered_in_turn(place: Place) -> None:
    with place.serve() as server, place.raw(server.port) as sock:
        requests = [
            frame(frames.REQUEST, method=3, call=at, millis=9999, payload=b"%d" % at) for at in range(1, 200)
        ]
        sock.sendall(b"".join(requests))
        for at in range(1, 200):
            assert read_frame(sock) == (frames.REPLY, at, b"%d" % at)
        sock.sendall(frame(frames.PING, call=7))
        assert read_frame(sock) == (frames.PONG, 7, b"")


def test_a_connection_that_always_has_more_makes_way(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with place.serve() as server, place.raw(server.port) as sock:
        turns = 0
        advance = server._advance

        def counted(connection: Any, mask: int) -> Any:
            nonlocal turns
            turns += 1
            return advance(connection, mask)

        monkeypatch.setattr(server, "_advance", counted)
        for at in range(1, 1001):
            sock.sendall(frame(frames.PING, call=at))
        for at in range(1, 1001):
            assert read_frame(sock) == (frames.PONG, at, b"")
        assert turns >= 1000 // 64


def test_idle_and_slow_peers_do_not_hold_others_up(place: Place) -> None:
    with place.serve(threads=4) as server, contextlib.ExitStack() as stack:
        for at in range(200):
            sock = stack.enter_context(place.raw(server.port))
            if at % 2:
                sock.sendall(frame(frames.REQUEST, method=3, call=1, millis=9999, payload=b"slow")[:-1])
        for _ in range(50):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), SECONDS))
        stop = threading.Event()

        def drip() -> None:
            with place.raw(server.port) as sock:
                for byte in frame(frames.REQUEST, method=3, call=1, millis=9999, payload=bytes(10_000)):
                    sock.sendall(bytes([byte]))
                    if stop.wait(0.002):
                        return

        dripping = [threading.Thread(target=drip) for _ in range(20)]
        for each in dripping:
            each.start()
        try:
            with contextlib.closing(place.connect(server.port)) as client:
                times = []
                for _ in range(300):
                    start = time.perf_counter()
                    client.call("WrapKeys", b"", SECONDS)
                    times.append(time.perf_counter() - start)
            # Were threads held up, the median would be that of LINGER_SECONDS and more.
            assert sorted(times)[150] < 0.015
        finally:
            stop.set()
            for each in dripping:
                each.join()


# ---- calls -------------------------------------------------------------------------------------------


def test_errors_cross_as_their_class_and_words(place: Place) -> None:
    def act(name: str, data: bytes) -> bytes:
        raise {
            b"decrypt": DecryptError(),
            b"bug": RuntimeError("/a/path"),
            b"out": CoreUnavailable("no store"),
        }[data]

    place.handlers.act = act
    with place.serve() as server, contextlib.closing(place.connect(server.port)) as client:
        refused(lambda: client.call("UnwrapKeys", b"decrypt", SECONDS), DecryptError)
        error = refused(lambda: client.call("UnwrapKeys", b"bug", SECONDS), InternalError)
        assert "/a/path" not in str(error)
        assert refused(lambda: client.call("UnwrapKeys", b"out", SECONDS), CoreUnavailable).retryable  # type: ignore[attr-defined]
        assert server.connections == 1  # an answer that is an error is an answer


class Held:
    """Calls that wait until they may go on."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.begun = 0
        self._lock = threading.Lock()

    def __call__(self, name: str, data: bytes) -> bytes:
        with self._lock:
            self.begun += 1
        assert self.go.wait(SECONDS)
        return data


@contextlib.contextmanager
def calling(client: FrameTransport, count: int, seconds: float = SECONDS) -> Iterator[list[object]]:
    """So many calls in threads; their outcomes."""
    outcomes: list[object] = []

    def call(at: int) -> None:
        try:
            outcomes.append(client.call("WrapKeys", b"%d" % at, seconds))
        except Exception as error:
            outcomes.append(error)

    threads = [threading.Thread(target=call, args=(at,)) for at in range(count)]
    for each in threads:
        each.start()
    try:
        yield outcomes
    finally:
        for each in threads:
            each.join()


def test_calls_above_the_bound_wait_and_those_above_that_are_turned_away(place: Place) -> None:
    held = place.handlers.act = Held()
    with (
        place.serve(threads=2, waiting=3) as server,
        contextlib.closing(place.connect(server.port)) as client,
    ):
        with calling(client, 10) as outcomes:
            eventually(lambda: len(outcomes) == 5)
            assert all(type(each) is CoreUnavailable and each.retryable for each in outcomes)
            assert "more calls than it takes" in str(outcomes[0])
            assert held.begun == 2
            held.go.set()
        assert sorted(each for each in outcomes if isinstance(each, bytes)) != []
        assert held.begun == 5
        assert len(outcomes) == 10


def test_bytes_that_wait_have_a_bound(place: Place) -> None:
    held = place.handlers.act = Held()
    with (
        place.serve(threads=1, waiting_bytes=2) as server,
        contextlib.closing(place.connect(server.port)) as client,
        calling(client, 8) as outcomes,
    ):
        eventually(lambda: len(outcomes) == 5)
        held.go.set()


def test_a_call_whose_time_has_passed_while_it_waited_is_not_carried_out(place: Place) -> None:
    held = place.handlers.act = Held()
    with place.serve(threads=1) as server, contextlib.closing(place.connect(server.port)) as client:
        with calling(client, 1):
            eventually(lambda: held.begun == 1)
            with calling(client, 3, seconds=1.0) as late:
                eventually(lambda: len(server._gate._queue) == 3)
                passed = time.monotonic() + 1.0  # for the server their time counts from when they were read
                eventually(lambda: len(late) == 3)
                eventually(lambda: time.monotonic() > passed)
            assert all(type(each) is CoreUnavailable for each in late)
            held.go.set()
        assert client.call("WrapKeys", b"next", SECONDS) == b"next"
        assert held.begun == 2


# ---- the end, and new certificates -------------------------------------------------------------------


def test_the_end_lets_calls_under_way_finish(place: Place) -> None:
    held = place.handlers.act = Held()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(place.serve())
        idle = stack.enter_context(place.raw(server.port))
        client = stack.enter_context(contextlib.closing(place.connect(server.port)))
        with calling(client, 3) as outcomes:
            eventually(lambda: held.begun == 3)
            ending = threading.Thread(target=server.stop, args=(SECONDS,))
            ending.start()
            assert is_ended(idle)
            with contextlib.closing(place.connect(server.port)) as late:
                refused(lambda: late.call("WrapKeys", b"", 1), CoreUnavailable)
            assert outcomes == []
            held.go.set()
        ending.join()
        assert sorted(outcomes) == [b"0", b"1", b"2"]  # type: ignore[type-var]
        assert server.connections == 0
        server.stop()


def test_the_end_does_not_wait_longer_than_it_was_told(place: Place) -> None:
    held = place.handlers.act = Held()
    with place.serve() as server, contextlib.closing(place.connect(server.port)) as client:
        with calling(client, 1) as outcomes:
            eventually(lambda: held.begun == 1)
            ending = threading.Thread(target=server.stop, args=(0.05,))
            ending.start()
            time.sleep(0.2)
            held.go.set()
            ending.join()
        assert len(outcomes) == 1


def test_an_address_in_use_is_told(place: Place) -> None:
    with place.serve() as server:
        from openkcm.rpc.frames.server import FrameServer

        error = refused(
            lambda: FrameServer(
                f"127.0.0.1:{server.port}",
                lambda: place.pem(place.server),
                place.handlers,
                place.handlers,  # type: ignore[arg-type]
                place.denials,
            ),
            CoreUnavailable,
        )
        assert not error.retryable  # type: ignore[attr-defined]


def shown(port: int, place: Place) -> bytes:
    with place.raw(port) as sock:
        return sock.getpeercert(binary_form=True) or b""


def test_new_connections_get_a_new_certificate_and_old_ones_go_on(place: Place) -> None:
    with place.serve() as server, place.raw(server.port) as old:
        before = shown(server.port, place)
        place.ca.renew("core")
        eventually(lambda: shown(server.port, place) != before)
        assert shown(server.port, place) == place.ca.find("core").der
        old.sendall(frame(frames.PING, call=1))
        assert read_frame(old) == (frames.PONG, 1, b"")


def test_a_certificate_that_cannot_be_used_leaves_the_old_one(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    with place.serve() as server, caplog.at_level(logging.ERROR, "openkcm.rpc"):
        before = shown(server.port, place)
        key = place.server.key
        good = key.read_bytes()
        os.chmod(key, 0o600)
        key.write_bytes(b"not a key")
        eventually(lambda: "stays in use" in caplog.text)
        assert shown(server.port, place) == before
        assert caplog.text.count("stays in use") == 1
        key.write_bytes(good)


# ---- streams -----------------------------------------------------------------------------------------


def test_streams_are_told_at_once_and_have_a_heartbeat(place: Place) -> None:
    with place.serve() as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(contextlib.closing(place.connect(server.port))) for _ in range(30)]
        streams = [each.stream("Watch", b"") for each in clients]
        for stream in streams:
            assert pb.WatchReply.FromString(next(stream)).position == 1
        assert len(place.handlers.open_streams) == 30
        for stream in streams:
            next(stream)
            next(stream)
        place.handlers.open_streams[7].put("acme")
        while not (reply := pb.WatchReply.FromString(next(streams[7]))).events:
            pass
        assert reply.events[0].tenant == "acme"
        for stream in streams:
            stream.cancel()
        eventually(lambda: len(place.handlers.dropped) == 30)
        assert threading.active_count() < 30 + 20


def test_a_new_stream_is_told_before_the_next_heartbeat_of_others(place: Place) -> None:
    with place.serve() as server, contextlib.closing(place.connect(server.port)) as client:
        first = client.stream("Watch", b"")
        next(first)
        times = []
        for _ in range(10):
            stream = client.stream("Watch", b"")
            start = time.monotonic()
            next(stream)
            times.append(time.monotonic() - start)
            stream.cancel()
        assert min(times) < HEARTBEAT_SECONDS / 2


def test_a_stream_whose_source_ends_ends(place: Place) -> None:
    with place.serve() as server, contextlib.closing(place.connect(server.port)) as client:
        stream = client.stream("Watch", b"")
        next(stream)
        place.handlers.close()
        with pytest.raises(StopIteration):
            while True:
                next(stream)
        eventually(lambda: len(place.handlers.dropped) == 1)


def test_a_stream_is_ended_when_its_peer_is_not_accepted_any_more(place: Place) -> None:
    def check(peer: Any) -> None:
        raise AccessDenied(wire.REFUSED)

    with place.serve() as server, contextlib.closing(place.connect(server.port)) as client:
        stream = client.stream("Watch", b"")
        next(stream)
        place.handlers.check = check
        with pytest.raises(AccessDenied):
            while True:
                next(stream)
        eventually(lambda: len(place.handlers.dropped) == 1)


def test_a_stream_that_is_refused_is_told_why(place: Place) -> None:
    def refuse(*_: Any) -> Any:
        raise AccessDenied(wire.REFUSED)

    place.handlers.open = refuse  # type: ignore[method-assign]
    with place.serve() as server, contextlib.closing(place.connect(server.port)) as client:
        refused(lambda: next(client.stream("Watch", b"")), AccessDenied)
        assert place.handlers.errors == [("Watch", "AccessDenied")]


def test_a_reader_of_a_stream_that_reads_nothing_is_dropped_and_others_are_told(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openkcm.rpc.frames.streams.STALL_SECONDS", 0.3)
    with (
        place.serve() as server,
        place.raw(server.port) as stuck,
        contextlib.closing(place.connect(server.port)) as client,
    ):
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.sendall(frame(frames.REQUEST, method=frames.WATCH, call=1))
        eventually(lambda: len(place.handlers.open_streams) == 1)
        slow = place.handlers.open_streams[0]
        stream = client.stream("Watch", b"")
        next(stream)

        def fill() -> bool:
            for _ in range(5000):
                slow.put("a tenant with a long name" * 4)
            next(stream)
            return slow in place.handlers.dropped

        eventually(fill)
        next(stream)


def test_who_speaks_on_a_stream_is_ended(place: Place) -> None:
    with place.serve() as server, place.raw(server.port) as sock:
        sock.sendall(frame(frames.REQUEST, method=frames.WATCH, call=1))
        assert read_frame(sock)[0] == frames.ITEM
        sock.sendall(frame(frames.PING, call=2))
        assert is_ended(sock)
        eventually(lambda: len(place.handlers.dropped) == 1)
