# SPDX-License-Identifier: Apache-2.0
"""The addresses of a Core, as a client knows them: connection, session and health of each.

Invariant: one transport and one session an address, shared by all threads and both of the certificate that is in use; a
session is agreed on by one thread while the others wait for it, no longer than they wait for their call. An address
that did not answer is asked last until it has answered a question of our own, asked in the background: no caller waits
to find out whether it is back.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Final

from ...clock import DICE
from ...errors import CoreUnavailable, InvalidInput, OpenKCMError, Unavailable
from ...waiting import THREADS, Event, Waiting
from .. import keys_pb2 as pb
from .. import wire
from ..session import ChannelReply, Session, begin, finish
from ..transport import Connector, Stream
from .line import Lines
from .own import OwnFiles

logger = logging.getLogger("openkcm.rpc")

FIRST_PAUSE_SECONDS: Final = 0.25
LONGEST_PAUSE_SECONDS: Final = 5.0
"""After how long an address that failed is tried again; doubled with each failure, and drawn from half of it up."""

TRIAL_SECONDS: Final = 1.0
"""How long an address that is tried again may take to answer."""


def left_until(end: float) -> float:
    """Seconds up to a moment of ``time.monotonic``, and a little when it is past."""
    return max(end - time.monotonic(), 0.001)


class Endpoint:
    """One address.

    Attributes:
        own: this end's certificate; with a new one come a new transport and a new session.
    """

    def __init__(
        self,
        address: str,
        connector: Connector,
        own: OwnFiles,
        server_name: str | None,
        waiting: Waiting = THREADS,
    ) -> None:
        self.address = address
        self.own = own
        # The Core does not know a session of the old certificate on the new one's connections.
        self._lines = Lines(address, connector, own, self.drop_session)
        self._server_name = server_name or host_of(address)
        self._lock = threading.Lock()
        self._agreeing = waiting.lock()
        self._session: Session | None = None
        self.failures = 0

    def call(self, method: str, request: bytes, end: float) -> bytes:
        """Make a call that is of use until ``end`` (of ``time.monotonic``); see ``Transport.call``."""
        return self._lines.now().transport.call(method, request, left_until(end))

    def stream(self, method: str, request: bytes) -> Stream:
        """As ``Transport.stream``."""
        return self._lines.now().transport.stream(method, request)

    def session(self, end: float) -> Session:
        """The session under which data keys cross to this address, agreed on if there is none.

        Raises:
            CoreUnavailable: it was not agreed on before ``end``, by this thread or by another.
        """
        session = self._session
        if session is not None and session.is_good():
            return session
        if not self._agreeing.acquire(timeout=left_until(end)):
            raise CoreUnavailable(f"the Core at {self.address} did not answer in time")
        try:
            session = self._session
            if session is None or not session.is_good():
                session = self._session = self._agree(end)
            return session
        finally:
            self._agreeing.release()

    def _agree(self, end: float) -> Session:
        line = self._lines.now()  # the Core takes the hello only of the certificate that TLS has shown
        state, hello = begin(line.reading.credentials)
        request = pb.ChannelHello(
            lowest_version=hello.lowest_version,
            highest_version=hello.highest_version,
            public_key=hello.public_key,
            certificates=hello.certificates,
            signature=hello.signature,
        )
        data = line.transport.call("OpenChannel", request.SerializeToString(), left_until(end))
        reply = wire.parse(pb.ChannelReply.FromString, data)
        return finish(
            state,
            ChannelReply(
                reply.version,
                reply.session,
                reply.lifetime,
                reply.public_key,
                tuple(reply.certificates),
                reply.signature,
            ),
            self._server_name,
        )

    def has_lost_session(self) -> bool:
        """Whether the session's keys are gone: wiped, or the parent's."""
        session = self._session
        return session is None or session.channel.wiped

    def drop_session(self, session: Session | None = None) -> None:
        """Agree anew at the next use; with ``session``, only where it is still that one."""
        with self._lock:
            dropped = self._session
            if dropped is None or (session is not None and dropped is not session):
                return
            self._session = None
        dropped.channel.wipe()

    def peek(self) -> Session | None:
        """The session there is, good or not."""
        return self._session

    def close(self) -> None:
        """Wipe the session and close the connection."""
        self.drop_session()
        self._lines.close()


class Endpoints:
    """All addresses, those that answer first.

    Attributes:
        heard: the one whose watch stream is listened to. It is asked before others that answer too: what another one
            does not know of yet, as a kill, nobody would tell again.
    """

    def __init__(self, endpoints: Sequence[Endpoint], waiting: Waiting = THREADS) -> None:
        if not endpoints:
            raise InvalidInput("a Core has at least one address")
        self._all = list(endpoints)
        self.addresses = [each.address for each in self._all]
        self._lock = threading.Lock()
        self._trying: set[str] = set()
        self._untried: set[Endpoint] = set()
        self._told = False
        self._closed = waiting.event()
        self._waiting = waiting
        self.heard: Endpoint | None = None

    def in_order(self) -> list[Endpoint]:
        """The addresses in the order in which to ask: the one listened to, as preferred, those that failed last."""
        if len(self._all) == 1:
            return self._all
        heard = self.heard
        return sorted(self._all, key=lambda each: (each.failures, each is not heard))

    def is_best(self, endpoint: Endpoint) -> bool:
        """Whether no address that is preferred to this one answers."""
        return all(each.failures for each in self._all[: self._all.index(endpoint)])

    def failed(self, endpoint: Endpoint) -> None:
        """It did not answer: ask it last until it does, which is found out in the background."""
        with self._lock:
            endpoint.failures = max(endpoint.failures, 1)
            # One that is alone is asked by every call anyway.
            if len(self._all) == 1 or endpoint.address in self._trying or self._closed.is_set():
                return
            self._trying.add(endpoint.address)
        try:
            self._waiting.spawn(
                partial(_try_again, weakref.ref(self), endpoint, self._closed), "openkcm-retry"
            )
        except Unavailable as error:
            with self._lock:
                self._trying.discard(endpoint.address)
                self._untried.add(endpoint)
            if not self._told:
                self._told = True
                logger.warning("%s is not tried again for now: %s", endpoint.address, error)

    def answered(self, endpoint: Endpoint) -> None:
        """It answered."""
        endpoint.failures = 0
        if self._untried:
            with self._lock:
                untried, self._untried = self._untried, set()
            for each in untried:
                if each.failures:
                    self.failed(each)

    def tried(self, endpoint: Endpoint, answered: bool) -> None:
        """What a trial in the background found out."""
        with self._lock:
            if answered:
                endpoint.failures = 0
                self._trying.discard(endpoint.address)
            else:
                endpoint.failures += 1

    def close(self) -> None:
        """Close every connection."""
        self._closed.set()
        for each in self._all:
            each.close()

    def forget(self) -> None:
        """In a forked child: the parent's connections are left alone, and not even collected."""
        _inherited.append(self)


_inherited: Final[list[Endpoints]] = []


def _try_again(endpoints: weakref.ref[Endpoints], endpoint: Endpoint, closed: Event) -> None:
    """Ask an address that failed for a new session, again and again, until it answers or nobody wants to know."""
    pause = FIRST_PAUSE_SECONDS
    answered = False
    while not answered and not closed.wait(pause * DICE.uniform(0.5, 1.0)):
        if endpoints() is None:
            return
        try:
            endpoint.drop_session()  # the next caller finds one that was agreed on with what answers now
            endpoint.session(time.monotonic() + TRIAL_SECONDS)
            answered = True
        except CoreUnavailable:
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
        except OpenKCMError:
            answered = True  # a refusal is an answer, and the next caller is to hear it
        held = endpoints()
        if held is None or closed.is_set():
            return
        held.tried(endpoint, answered)
        del held


def host_of(address: str) -> str:
    """The host of ``HOST:PORT`` or ``[IPV6]:PORT``.

    Raises:
        InvalidInput: it is neither.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 <= int(port) < 65536:
        raise InvalidInput(f"a Core's address is HOST:PORT, not {address!r}")
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host
