# SPDX-License-Identifier: Apache-2.0
"""What is Valkey's alone: servers that would lose keys, what they say of themselves, their refusals, and TLS."""

from __future__ import annotations

import logging
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from key_store_support import OTHER, SERVICE, by_id, by_subject, ids, make_keys, opened
from openkcm.errors import ConfigurationError, InvalidInput, StoreUnavailable
from openkcm.gateway.keystore import open_key_store
from openkcm.gateway.valkey_store import ValkeyKeyStore
from openkcm.testing.https import make_certificate
from openkcm.testing.valkey import ValkeyServer
from support import refused


def refused_at(url: str, kind: type[BaseException]) -> BaseException:
    return refused(lambda: open_key_store(url), kind)


# ---- servers that would lose keys ----------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random", "volatile-ttl", "allkeys-lfu"])
def test_a_server_that_evicts_is_refused(empty_valkey: ValkeyServer, policy: str) -> None:
    empty_valkey.run("CONFIG", "SET", "maxmemory-policy", policy)
    try:
        assert policy in str(refused_at(empty_valkey.url, ConfigurationError))
        # Where it does not tell its settings, it still tells its state.
        limited = _limited(empty_valkey, "-config")
        assert policy in str(refused_at(limited, ConfigurationError))
        assert empty_valkey.run("DBSIZE") == 0
    finally:
        empty_valkey.run("CONFIG", "SET", "maxmemory-policy", "noeviction")


def _limited(server: ValkeyServer, *denied: str) -> str:
    """The URL of a user who may do anything but these."""
    server.run("ACL", "SETUSER", "limited", "reset", "on", ">se:cret/", "~*", "+@all", *denied)
    return f"redis://limited:se%3Acret%2F@127.0.0.1:{server.port}/0"


@pytest.mark.parametrize(
    ("appendonly", "appendfsync", "expected"),
    [
        ("yes", "always", "always"),
        ("yes", "everysec", "everysec"),
        ("yes", "no", "no"),
        ("no", "always", "none"),
    ],
)
def test_its_durability_is_told(
    appendonly: str, appendfsync: str, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    with ValkeyServer({"appendonly": appendonly, "appendfsync": appendfsync}) as server:
        with opened(server.url) as store:
            assert isinstance(store, ValkeyKeyStore)
            assert store.durability == expected
            assert repr(store) == f"<ValkeyKeyStore durability={expected}>"
        warned = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warned) == (expected != "always")
        with opened(_limited(server, "-config")) as store:
            assert isinstance(store, ValkeyKeyStore)
            assert store.durability == ("none" if appendonly == "no" else "unknown")
        with opened(_limited(server, "-config", "-info")) as store:
            assert isinstance(store, ValkeyKeyStore)
            assert store.durability == "unknown"
        assert "noeviction" in caplog.text


def test_a_store_that_is_emptied_while_it_is_used(empty_valkey: ValkeyServer) -> None:
    keys = make_keys(3)
    with opened(empty_valkey.url) as store:
        store.add(SERVICE, keys[:1])
        empty_valkey.run("FLUSHALL")
        # Its salt is gone: a key that is added now would not be found by those who open it afterwards.
        assert not refused(lambda: store.add(SERVICE, keys), StoreUnavailable).retryable
        assert store.find_ids(SERVICE, ids(keys)) == {}
        with opened(empty_valkey.url) as other:
            assert other.salt != store.salt
            assert not refused(lambda: store.add(SERVICE, keys), StoreUnavailable).retryable
            assert other.add(SERVICE, keys) == by_subject(keys)


def test_memory_that_is_full_is_said_so(own_valkey: ValkeyServer) -> None:
    keys = make_keys(50)
    with opened(own_valkey.url) as store:
        store.add(SERVICE, keys)
        own_valkey.run("CONFIG", "SET", "maxmemory", 1024)
        error = refused(lambda: store.add(SERVICE, make_keys(50)), StoreUnavailable)
        assert error.retryable
        assert "maxmemory" in str(error)
        assert store.find_ids(SERVICE, ids(keys)) == by_id(keys)
        own_valkey.run("CONFIG", "SET", "maxmemory", 0)
        store.add(SERVICE, make_keys(50))
        assert store.count(SERVICE) == 100


# ---- refusals ------------------------------------------------------------------------------------------


def test_a_replica_takes_no_keys(own_valkey: ValkeyServer) -> None:
    with opened(own_valkey.url) as store:
        own_valkey.run("REPLICAOF", "127.0.0.1", "1")
        error = refused(lambda: store.add(SERVICE, make_keys(1)), StoreUnavailable)
        assert error.retryable
        assert "replica" in str(error)
        own_valkey.run("REPLICAOF", "NO", "ONE")
        assert store.add(SERVICE, make_keys(1))


def test_a_right_that_is_missing_is_named(empty_valkey: ValkeyServer) -> None:
    error = refused_at(_limited(empty_valkey, "-get"), StoreUnavailable)
    assert not error.retryable
    assert "lacks a right" in str(error)
    with opened(_limited(empty_valkey, "-eval")) as store:
        assert not refused(lambda: store.add(SERVICE, make_keys(1)), StoreUnavailable).retryable


def test_a_login_that_is_missing(empty_valkey: ValkeyServer) -> None:
    for login in ("", ":guess@", "nobody:guess@"):
        error = refused_at(f"valkey://{login}127.0.0.1:{empty_valkey.port}", StoreUnavailable)
        assert not error.retryable
        assert "password" in str(error)
        assert "guess" not in str(error)


def test_the_rights_that_the_documentation_names_are_enough(empty_valkey: ValkeyServer) -> None:
    page = Path(__file__).parents[2].joinpath("docs", "key-stores.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith("ACL SETUSER gateway")]
    empty_valkey.run(*line.replace("PASSWORD", "word").split())
    keys = make_keys(3)
    with opened(f"valkey://gateway:word@127.0.0.1:{empty_valkey.port}") as store:
        assert isinstance(store, ValkeyKeyStore)
        assert store.durability == "always"
        store.add(SERVICE, keys)
        assert store.find_subjects(SERVICE, [keys[0].subject]) == by_subject(keys[:1])
        assert store.scan(SERVICE, b"", 10) == sorted(keys)
        store.rewrap(SERVICE, keys)
        store.remove(SERVICE, ids(keys))
        assert store.count(SERVICE) == 0


def test_names_that_others_took(empty_valkey: ValkeyServer) -> None:
    (key,) = make_keys(1)
    with opened(empty_valkey.url) as store:
        empty_valkey.run("SET", f"{{openkcm}}:{SERVICE.hex()}:keys", "x")
        for call in (
            lambda: store.find_ids(SERVICE, [key.key_id]),
            lambda: store.add(SERVICE, [key]),
            lambda: store.rewrap(SERVICE, [key]),
            lambda: store.count(SERVICE),
        ):
            error = refused(call, StoreUnavailable)
            assert not error.retryable
            assert "something else" in str(error)
        # Another service is not affected, and of the one that is nothing was half done.
        assert store.add(OTHER, [key]) == by_subject([key])
        empty_valkey.run("DEL", f"{{openkcm}}:{SERVICE.hex()}:keys")
        assert store.find_subjects(SERVICE, [key.subject]) == {}
        assert store.add(SERVICE, [key]) == by_subject([key])


@pytest.mark.parametrize("kept", [b"", b"junk", b"1:", b"1:short", b"1:" + bytes(33), b"x" * 34])
def test_a_salt_that_is_none(empty_valkey: ValkeyServer, kept: bytes) -> None:
    empty_valkey.run("SET", "{openkcm}:keystore", kept)
    assert not refused_at(empty_valkey.url, StoreUnavailable).retryable
    assert empty_valkey.run("GET", "{openkcm}:keystore") == kept


def test_a_later_format_is_not_touched(empty_valkey: ValkeyServer) -> None:
    empty_valkey.run("SET", "{openkcm}:keystore", b"2:" + bytes(50))
    assert "newer OpenKCM" in str(refused_at(empty_valkey.url, StoreUnavailable))


def test_what_is_no_valkey_is_said_so() -> None:
    with _answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        assert not refused_at(f"valkey://127.0.0.1:{port}", StoreUnavailable).retryable


@contextmanager
def _answering(answer: bytes) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(1024)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)


# ---- where it is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "valkey://",
        "valkey:///0",
        "valkey://host:port",
        "valkey://:hunter2@host:99999",
        "valkey://:hunter2@host/name",
        "valkey://:hunter2@host/-1",
        "valkey://:hunter2@host/0/1",
        "valkey://:hunter2@host/0?socket_timeout=0",
        "valkey://:hunter2@host/0?ssl_ca_certs=x",
        "valkeys://:hunter2@host/0?ssl_cert_reqs=none",
        "valkeys://:hunter2@host/0?ssl_check_hostname=false",
        "valkeys://:hunter2@host/0?x",
        "valkey://:hunter2@host/0#x",
        "valkey://:hunter2@[host/0",
    ],
)
def test_a_url_of_another_form(url: str) -> None:
    error = refused_at(url, InvalidInput)
    assert "hunter2" not in str(error)
    assert error.__cause__ is error.__context__ is None


def test_databases_of_a_server_are_apart(empty_valkey: ValkeyServer) -> None:
    with opened(empty_valkey.url_of(0)) as one, opened(empty_valkey.url_of(3)) as two:
        one.add(SERVICE, make_keys(2))
        assert two.count(SERVICE) == 0
        assert one.salt != two.salt


def test_tls_is_verified_to_the_host(empty_valkey: ValkeyServer, tmp_path: Path) -> None:
    keys = make_keys(2000)
    with _tls_front(empty_valkey.port, make_certificate(tmp_path)) as port:
        secure = f"valkeys://:{empty_valkey.password}@localhost:{port}/0"
        with opened(f"{secure}?ssl_ca_certs={tmp_path / 'authority.pem'}") as store:
            assert store.add(SERVICE, keys) == by_subject(keys)
            assert store.find_ids(SERVICE, ids(keys)) == by_id(keys)
        assert "TLS" in str(refused_at(secure, StoreUnavailable))
        other = tmp_path / "other"
        other.mkdir()
        make_certificate(other)
        assert not refused_at(f"{secure}?ssl_ca_certs={other / 'authority.pem'}", StoreUnavailable).retryable
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with _tls_front(empty_valkey.port, make_certificate(elsewhere, ("elsewhere.example",))) as port:
        secure = f"rediss://:{empty_valkey.password}@localhost:{port}/0"
        url = f"{secure}?ssl_ca_certs={elsewhere / 'authority.pem'}"
        assert "TLS" in str(refused_at(url, StoreUnavailable))


@contextmanager
def _tls_front(target: int, certificate: Path) -> Iterator[int]:
    """A port that speaks TLS in front of one that does not: the packaged server is built without."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    over = threading.Event()

    def relay(accepted: socket.socket) -> None:
        accepted.settimeout(20)
        try:
            with (
                context.wrap_socket(accepted, server_side=True) as outside,
                socket.create_connection(("127.0.0.1", target), 20) as inside,
            ):
                _relay(outside, inside, over)
        except OSError:
            accepted.close()  # the client did not want this certificate

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        threads = []

        def accept() -> None:
            while not over.is_set():
                try:
                    accepted, _ = listener.accept()
                except TimeoutError:
                    continue
                threads.append(threading.Thread(target=relay, args=(accepted,)))
                threads[-1].start()

        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield listener.getsockname()[1]
        finally:
            over.set()
            accepting.join(20)
            for thread in threads:
                thread.join(20)


def _relay(outside: ssl.SSLSocket, inside: socket.socket, over: threading.Event) -> None:
    """Both ways in one thread, since a TLS connection is not for two."""
    outside.settimeout(0.01)
    inside.settimeout(0.01)
    while not over.is_set():
        for source, target in ((outside, inside), (inside, outside)):
            try:
                part = source.recv(65536)
            except TimeoutError:
                continue
            if not part:
                return
            target.settimeout(20)
            target.sendall(part)
            target.settimeout(0.01)


def test_a_child_does_not_disturb_its_parent(empty_valkey: ValkeyServer) -> None:
    """The parent's connection is not used, and not ended, when the child's copy of the store goes away."""
    with opened(empty_valkey.url) as store:
        before = _clients(empty_valkey)
        assert len(before) == 1
        child = os.fork()
        if not child:
            try:
                store.forget()
                store.close()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert store.count(SERVICE) == 0
        assert _clients(empty_valkey) == before


def _clients(server: ValkeyServer) -> set[str]:
    lines = server.run("CLIENT", "LIST").decode().splitlines()
    return {line.split()[0] for line in lines if " name=openkcm-gateway " in line}
