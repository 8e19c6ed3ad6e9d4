# SPDX-License-Identifier: Apache-2.0
"""What the tests of faults share: a vault on PostgreSQL that replicas serve as processes, and load on Gateways of it.

Everything a Gateway acknowledged is kept, so that at the end each record is either opened by every replica or was
shredded.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

import pytest

import openkcm
from openkcm.errors import KeyDestroyed
from openkcm.gateway import ServiceHandle
from openkcm.testing.postgres import PostgresServer
from rpc_support import CHIEF, GATEWAY, VERBS, Replica, Site
from support import refused

T = TypeVar("T")

SOAK: Final = (pytest.mark.soak, pytest.mark.timeout(1800))
SECONDS: Final = 60.0
"""For what is only a matter of time, on however busy a machine."""


def until(condition: Callable[[], object], seconds: float = SECONDS, what: str = "it") -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not come to be"
        time.sleep(0.01)


class PostgresSite(Site):
    """A vault on PostgreSQL: tenant ``acme`` with the services ``records`` and ``leased``, and an operator."""

    def __init__(self, folder: Path, server: PostgresServer, lease: float = 0.0) -> None:
        url = server.create_database(f"site_{next(_numbers)}")
        super().__init__(folder, store=url)
        self.issue("chief", CHIEF)
        with openkcm.Core.open(url, seal=folder / "vault.seal", create=True) as core:
            core.link_tenant("acme", root=f"local:{folder / 'acme.root'}")
            core.create_service("acme", "records")
            core.create_service("acme", "leased")
            core.set_lease("acme", "leased", lease)
            core.grant(GATEWAY, "acme", "*", VERBS)
            core.grant(CHIEF, "*", "*", ["administer"])

    def start_replica(self, name: str, **settings: object) -> Replica:
        """One replica, with an administrative interface."""
        return self.start(name, **({"listen.admin": "127.0.0.1:0"} | settings))

    def admin(self, replica: Replica) -> openkcm.RemoteAdmin:
        """An operator's connection to a replica."""
        return openkcm.connect_admin(f"127.0.0.1:{replica.ports['admin']}", tls=self.tls("chief"))


_numbers = itertools.count(1)


@contextmanager
def running(*works: Callable[[], None]) -> Iterator[list[BaseException]]:
    """Do each again and again, in a thread of its own, while the block lasts; what went wrong is raised at its end."""
    errors: list[BaseException] = []
    stop = threading.Event()

    def repeat(work: Callable[[], None]) -> None:
        try:
            while not stop.is_set():
                work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield errors
    finally:
        stop.set()
        for thread in threads:
            thread.join(SECONDS)
    assert not any(thread.is_alive() for thread in threads), "a Gateway hangs"
    if errors:
        raise errors[0]


class Ledger:
    """What a Gateway acknowledged, from any of its threads, and how long it took."""

    def __init__(self, handle: ServiceHandle) -> None:
        self._handle = handle
        self._lock = threading.Lock()
        self._number = itertools.count()
        self.inline: list[tuple[bytes, bytes]] = []
        self.named: dict[str, list[tuple[bytes, bytes]]] = {}
        self.shredded: dict[str, list[tuple[bytes, bytes]]] = {}
        self.calls = 0
        self.longest = 0.0

    def encrypt(self) -> None:
        """A record, or a batch of them."""
        plain = [b"record %d" % next(self._number) for _ in range(random.choice((1, 1, 20)))]
        blobs = self._timed(lambda: self._encrypted(plain))
        with self._lock:
            self.inline += zip(blobs, plain, strict=True)

    def _encrypted(self, plain: Sequence[bytes]) -> list[bytes]:
        one = self._handle.encrypt
        return [one(plain[0])] if len(plain) == 1 else self._handle.encrypt_many(plain)

    def decrypt(self) -> None:
        """Some of what was encrypted, in one call or one by one."""
        with self._lock:
            chosen = random.choices(self.inline, k=5) if self.inline else []
        if not chosen:
            time.sleep(0.01)
        elif random.random() < 0.5:
            blobs, plain = zip(*chosen, strict=True)
            assert self._timed(lambda: self._handle.decrypt_many(blobs)) == list(plain)
        else:
            for blob, text in chosen:
                assert self._timed(lambda blob=blob: self._handle.decrypt(blob)) == text  # type: ignore[misc]

    def people(self) -> None:
        """A person comes; now and then one goes."""
        name = f"user-{next(self._number)}-{id(self)}"  # nobody else's, who would shred it
        text = name.encode()
        records = [(self._timed(lambda: self._handle.encrypt(text, subject=name)), text) for _ in range(2)]
        with self._lock:
            self.named[name] = records
        assert self._timed(lambda: self._handle.decrypt(records[0][0])) == text
        # Somebody stays, and of five somebody has gone.
        if len(self.named) > 1 and (random.random() < 0.3 or (len(self.named) > 4 and not self.shredded)):
            gone = random.choice(list(self.named))
            records = self.named.pop(gone)
            self._timed(lambda: self._handle.shred(gone))
            self.shredded[gone] = records

    def _timed(self, act: Callable[[], T]) -> T:
        started = time.monotonic()
        result = act()
        took = time.monotonic() - started
        with self._lock:
            self.calls += 1
            self.longest = max(self.longest, took)
        return result

    def verify(self, handle: ServiceHandle) -> None:
        """Every record opens through another Gateway, but for those that were shredded."""
        assert self.inline and self.named and self.shredded, "there was no load"
        kept = [*self.inline, *itertools.chain(*self.named.values())]
        assert handle.decrypt_many([blob for blob, _ in kept]) == [text for _, text in kept]
        for blob, _ in itertools.chain(*self.shredded.values()):
            refused(lambda blob=blob: handle.decrypt(blob), KeyDestroyed)  # type: ignore[misc]
