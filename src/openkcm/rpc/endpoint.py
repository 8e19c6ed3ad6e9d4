# SPDX-License-Identifier: Apache-2.0
"""The addresses of a Core, as a client knows them: connection, session and health of each.

Invariant: one connection and one session an address, shared by all threads; a session is agreed on by one thread while
the others wait for it. An address that did not answer is asked last for a while.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from typing import Final

from ..errors import InvalidInput
from . import keys_pb2 as pb
from . import wire
from .session import ChannelReply, Credentials, Session, begin, finish
from .transport import Connector, Stream, Transport

FIRST_PAUSE_SECONDS: Final = 0.25
LONGEST_PAUSE_SECONDS: Final = 5.0
"""For how long an address that failed is asked last; doubled with each failure, and drawn from half of it up."""


class Endpoint:
    """One address."""

    def __init__(
        self, address: str, connector: Connector, credentials: Credentials, server_name: str | None
    ) -> None:
        self.address = address
        self._connector = connector
        self._credentials = credentials
        self._server_name = server_name or host_of(address)
        self._lock = threading.Lock()
        self._agreeing = threading.Lock()
        self._transport: Transport | None = None
        self._session: Session | None = None
        self.failures = 0
        self.until = 0.0

    def call(self, method: str, request: bytes, seconds: float) -> bytes:
        """As ``Transport.call``."""
        return self._connected().call(method, request, seconds)

    def stream(self, method: str, request: bytes) -> Stream:
        """As ``Transport.stream``."""
        return self._connected().stream(method, request)

    def _connected(self) -> Transport:
        transport = self._transport
        if transport is None:
            with self._lock:
                transport = self._transport
                if transport is None:
                    transport = self._transport = self._connector(self.address)
        return transport

    def session(self, seconds: float) -> Session:
        """The session under which data keys cross to this address, agreed on if there is none."""
        session = self._session
        if session is not None and session.is_good():
            return session
        with self._agreeing:
            session = self._session
            if session is None or not session.is_good():
                state, hello = begin(self._credentials)
                request = pb.ChannelHello(
                    lowest_version=hello.lowest_version,
                    highest_version=hello.highest_version,
                    public_key=hello.public_key,
                    certificates=hello.certificates,
                    signature=hello.signature,
                )
                data = self.call("OpenChannel", request.SerializeToString(), seconds)
                reply = wire.parse(pb.ChannelReply.FromString, data)
                session = finish(
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
                self._session = session
        return session

    def has_lost_session(self) -> bool:
        """Whether the session's keys are gone: wiped, or the parent's."""
        session = self._session
        return session is None or session.channel.wiped

    def drop_session(self) -> None:
        """Agree anew at the next use."""
        session, self._session = self._session, None
        if session is not None:
            session.channel.wipe()

    def close(self) -> None:
        """Wipe the session and close the connection."""
        self.drop_session()
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()


class Endpoints:
    """All addresses, those that answer first."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        if not endpoints:
            raise InvalidInput("a Core has at least one address")
        self._all = list(endpoints)
        self.addresses = [each.address for each in self._all]
        self._kept: list[Endpoint] = []

    def in_order(self) -> list[Endpoint]:
        """The addresses in the order in which to ask them."""
        if len(self._all) == 1:
            return self._all
        now = time.monotonic()
        return sorted(self._all, key=lambda each: each.until > now)

    def failed(self, endpoint: Endpoint) -> None:
        """It did not answer."""
        endpoint.failures += 1
        pause = min(FIRST_PAUSE_SECONDS * 2 ** (endpoint.failures - 1), LONGEST_PAUSE_SECONDS)
        endpoint.until = time.monotonic() + pause * random.uniform(0.5, 1.0)

    def answered(self, endpoint: Endpoint) -> None:
        """It answered."""
        if endpoint.failures:
            endpoint.failures, endpoint.until = 0, 0.0

    def close(self) -> None:
        """Close every connection."""
        for each in self._all:
            each.close()

    def forget(self) -> None:
        """In a forked child: the parent's connections are left alone, and not even collected."""
        _inherited.append(self)


_inherited: Final[list[Endpoints]] = []


def host_of(address: str) -> str:
    """The host of ``HOST:PORT`` or ``[IPV6]:PORT``.

    Raises:
        InvalidInput: it is neither.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 <= int(port) < 65536:
        raise InvalidInput(f"a Core's address is HOST:PORT, not {address!r}")
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host
